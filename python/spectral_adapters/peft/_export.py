"""Adapters as what every tool reads: LoRA files, and plain merged weights.

Spectral Adapter A is exactly a LoRA of rank 2r, Spectral Adapter R and LiDB are of rank r. SODA and
SVDiff change the weight at full rank; the nearest LoRA of a given rank is their truncated SVD.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import onload_layer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_adapters._files import save_tensors, staged
from spectral_adapters.functional import without_autocast
from spectral_adapters.peft._folder import PREFIX, WEIGHTS, adapter_tensors, check_adapter_name
from spectral_adapters.peft._layer import SpectralLayer
from spectral_adapters.peft._model import adapted_layers, detach_unused_bank


@dataclass(frozen=True)
class LoRAExport:
    """An adapter as a LoRA whose scale is 1 (``lora_alpha == r``).

    Attributes:
        rank: r, the same for all layers (smaller ones are padded with zeros).
        state_dict: ``<module>.lora_A.weight`` and ``<module>.lora_B.weight`` in PEFT's layout,
            fp32 on the CPU (``lora_embedding_A`` and ``lora_embedding_B`` for embeddings).
        errors: by module, the Frobenius norm of what the rank leaves out, relative to that of the
            change; 0.0 where nothing is left out.
        target_modules: the adapted modules, as for ``LoraConfig``.
        fan_in_fan_out: whether the adapted layers are ``Conv1D`` of transformers.
    """

    rank: int
    state_dict: dict[str, Tensor]
    errors: dict[str, float]
    target_modules: list[str] | str
    fan_in_fan_out: bool

    @property
    def config(self) -> LoraConfig:
        """The PEFT config that goes with the state dict."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=self.target_modules,
            fan_in_fan_out=self.fan_in_fan_out,
            inference_mode=True,
        )


def _target_modules(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """``target_modules`` for these modules of a model alone.

    PEFT takes a name in a list for the end of a name too, so that "0" would also mean "blocks.0";
    where the model has such a module, a regular expression says what is meant.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    others = {name for name, _ in inner.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(re.escape(name) for name in names)
    return list(names)


@torch.no_grad()
def to_lora(
    model: nn.Module, adapter_name: str = "default", *, rank: int | None = None
) -> LoRAExport:
    """An adapter of ``model`` as a LoRA, at its present scale.

    Args:
        model: a ``PeftModel`` or a model with injected adapters.
        adapter_name: the adapter to export.
        rank: of the LoRA. None takes what represents the adapter exactly, which only the methods
            of low rank have.

    Raises:
        ValueError: no such adapter, a rank that does not fit or is missing, or a convolution with
            groups, dilation or a padding mode, which no LoRA has; or the adapter has
            ``modules_to_save``, which only :func:`export_lora` writes.
    """
    layers = _exported_layers(model, adapter_name)
    names = _saved_names(model, adapter_name)
    if names:
        raise ValueError(
            "adapter_name must be an adapter without modules_to_save, which the matrices of a "
            f"LoRA do not hold; {adapter_name!r} has {names}: write a PEFT folder with "
            "spectral_adapters.peft.export_lora, or export a merged checkpoint"
        )
    return _as_lora(model, layers, adapter_name, rank)


def _exported_layers(model: nn.Module, adapter_name: str) -> list[SpectralLayer]:
    layers = adapted_layers(model, adapter_name)
    if not layers:
        check_adapter_name(model, adapter_name, ())
    return layers


def _saved_names(model: nn.Module, adapter_name: str) -> list[str]:
    """The modules that an adapter saves whole."""
    return [
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]


def _as_lora(
    model: nn.Module, layers: list[SpectralLayer], adapter_name: str, rank: int | None
) -> LoRAExport:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an int of at least 1; got {rank!r}")
    factors, errors = {}, {}
    for layer in layers:
        down, up, errors[layer.name] = _factors(layer, adapter_name, rank)
        factors[layer.name] = (down, up)
    bases = {layer.name: layer.get_base_layer() for layer in layers}
    return lora_of(model, bases, factors, errors)


def lora_of(
    model: nn.Module,
    bases: Mapping[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    errors: dict[str, float],
) -> LoRAExport:
    """A LoRA from (down [q, in], up [out, q]) by module, for base layers of the same names."""
    widest = max(len(down) for down, _ in factors.values())
    state_dict: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        state_dict.update(_tensors(name, bases[name], down, up, widest))
    kinds = {isinstance(base, Conv1D) for base in bases.values()}
    targets = _target_modules(model, errors)
    return LoRAExport(widest, state_dict, errors, targets, kinds == {True})


def _factors(layer: SpectralLayer, adapter: str, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """(down [q, in], up [out, q], error) in float64 on the CPU."""
    scale = layer.scaling[adapter]
    device = layer._new_device()
    with without_autocast(device):
        if layer.is_low_rank:
            down, up = (part.double().cpu() for part in layer._low_rank(adapter, device))
            if rank is None or len(down) <= rank:
                return down, scale * up, 0.0
            change = up @ down
        elif rank is None:
            raise ValueError(
                f"rank must be given: {layer.configs[adapter].method} changes {layer.name} at full "
                "rank, and a LoRA of any rank is an approximation; a merged checkpoint is exact"
            )
        else:
            change = layer._delta_matrix(adapter, device).double().cpu()
    down, up, error = cut_to_rank(change, rank)
    return down, scale * up, error


def cut_to_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest (down [q, in], up [out, q]) to a change [out, in], and the relative error."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    total = values.square().sum().sqrt()
    lost = values[rank:].square().sum().sqrt()
    error = float(lost / total) if total > 0 else 0.0
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root, error


def _tensors(name: str, base: nn.Module, down: Tensor, up: Tensor, rank: int) -> dict[str, Tensor]:
    """The two tensors of one layer in PEFT's layout, padded to ``rank``."""
    missing = rank - len(down)
    down = nn.functional.pad(down, (0, 0, 0, missing)).float().contiguous()
    up = nn.functional.pad(up, (0, missing)).float().contiguous()
    if isinstance(base, nn.Embedding):
        return {
            f"{name}.lora_embedding_A": up.mT.contiguous(),
            f"{name}.lora_embedding_B": down.mT.contiguous(),
        }
    kernel = getattr(base, "kernel_size", None)
    if isinstance(kernel, tuple):
        # The convolution of a LoRA has none of these, in PEFT and in the files of others.
        plain = {"groups": 1, "padding_mode": "zeros", "dilation": (1,) * len(kernel)}
        for option, value in plain.items():
            if getattr(base, option) != value:
                raise ValueError(
                    f"{name} is a convolution with {option}={getattr(base, option)!r}, which a "
                    f"LoRA cannot have, only {value!r}; exclude it, or export a merged checkpoint"
                )
        down = down.view(rank, -1, *kernel)
        up = up.view(-1, rank, *[1] * len(kernel))
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


@torch.no_grad()
def export_lora(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
) -> Mapping[str, float]:
    """Write an adapter as a PEFT LoRA folder; arguments and errors as for :func:`to_lora`.

    ``PeftModel.from_pretrained(base, directory)`` loads it without this package. Modules in
    ``modules_to_save`` are written along.

    Returns:
        The relative error by module, see :class:`LoRAExport`.
    """
    layers = _exported_layers(model, adapter_name)
    lora = _as_lora(model, layers, adapter_name, rank)
    tensors = {PREFIX + key: value for key, value in lora.state_dict.items()}
    config, names = lora.config, _saved_names(model, adapter_name)
    if names:
        config.modules_to_save = names
        own = f".{layers[0].prefix}"
        for key, value in adapter_tensors(model, adapter_name).items():
            if own not in key:
                tensors[key] = value
    with staged(Path(directory)) as (part,):
        config.save_pretrained(str(part))
        save_tensors(part / WEIGHTS, tensors, {"format": "pt"})
    return lora.errors


@torch.no_grad()
def merge_and_unload(
    model: nn.Module, adapter_name: str = "default", *, safe_merge: bool = False
) -> nn.Module:
    """Merge an injected adapter into the base weights and take all spectral layers out, in place.

    For models that are no ``PeftModel``; this one has its own method of the same name. Modules in
    ``modules_to_save`` become the adapter's copies, those of other adapters alone what they were.

    Raises:
        ValueError: the model has no such adapter, or, with ``safe_merge``, the merged weights would
            not be finite.
    """
    names = {
        name: module for name, module in model.named_modules() if isinstance(module, SpectralLayer)
    }
    check_adapter_name(model, adapter_name, [n for layer in names.values() for n in layer.configs])
    for layer in names.values():
        with onload_layer(layer):
            if layer.merged:
                layer.unmerge()
            if adapter_name in layer.configs:
                layer.merge(safe_merge=safe_merge, adapter_names=[adapter_name])
    take_out(model, names, adapter_name)
    return model


def take_out(model: nn.Module, layers: Mapping[str, Any], adapter_name: str | None = None) -> None:
    """Put plain modules in the place of a model's adapted layers, given by name, and forget them.

    A module that adapters save whole becomes the copy of ``adapter_name``, or else what it was.
    """
    # What is inside comes first.
    for name, module in reversed(list(model.named_modules())):
        if name in layers:
            plain: Any = layers[name].get_base_layer()
            if isinstance(module, SpectralLayer):
                module.forget_merged()
        elif isinstance(module, ModulesToSaveWrapper):
            copies: dict[Any, nn.Module] = dict(module.modules_to_save.items())
            plain = copies.get(adapter_name, module.original_module)
        elif isinstance(module, TrainableTokensWrapper):
            plain = module.token_adapter
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    detach_unused_bank(model)
    plain = model
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    if hasattr(plain, "_hf_peft_config_loaded"):
        plain._hf_peft_config_loaded = False
