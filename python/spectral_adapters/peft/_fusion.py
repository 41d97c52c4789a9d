"""Fusing the adapters of a model: into one more adapter, into a LoRA, or into plain weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_adapters._validation import check_choice, check_tensor
from spectral_adapters.fusion import (
    CHANGE_METHODS,
    check_weights,
    fuse_changes,
    orthonormal_rows,
    second_moments,
)
from spectral_adapters.peft._config import BASE_DTYPES
from spectral_adapters.peft._export import (
    LoRAExport,
    cut_to_rank,
    lora_of,
    merge_and_unload,
    take_out,
)
from spectral_adapters.peft._folder import check_adapter_name
from spectral_adapters.peft._layer import SpectralLayer
from spectral_adapters.peft._model import check_adapters, check_new_name, combine_adapters

#: Methods whose result is an adapter of the same kind, and what ``add_weighted_adapter`` calls it.
ADAPTER_METHODS = {"spectral": "spectral", "geodesic": "geodesic", "delta": "sum"}
FUSION_METHODS = ("spectral", "geodesic", *CHANGE_METHODS)

#: What a LoRA without a given rank may leave out, relative to the change: the rounding of fp32.
_LORA_ROUNDING = 1e-6


def fuse(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    method: str,
    adapter_name: str = "fused",
    allow_overlap: bool = False,
) -> None:
    """Add the fusion of adapters that a model holds as one more adapter, and activate it.

    * "spectral": Spectral Adapters A, ``(U + sum of weight * A_U) S (V + sum of weight * A_V)^T``
      on all their columns; with weights 1 on disjoint columns exactly the sum of the changes.
    * "geodesic": SODA with equal settings, per factor ``R = exp(sum of weight * log R_i)``, and
      ``delta = sum of weight * delta_i``.
    * "delta": ``sum of weight * dW``, where that is an adapter of the method again: SVDiff with
      the identity activation, LiDB in equal subspaces, and LoRA in a ``PeftModel``.

    The fused adapter has the layers of all; one that an adapter does not have, it leaves as it is.

    Args:
        model: a ``PeftModel`` or a model with injected adapters.
        adapters: names of adapters of one method.
        weights: one number per adapter, 1 by default.
        method: "spectral", "geodesic" or "delta".
        adapter_name: name of the new adapter.
        allow_overlap: for "spectral": add the shifts of a column up that several adapters have.

    Raises:
        TypeError, ValueError: naming the argument; columns that collide; settings that differ; a
            rotation by half a turn; or, for "delta", a sum that is no adapter of the method.
    """
    check_choice("method", method, tuple(ADAPTER_METHODS))
    _check_overlap(allow_overlap, method)
    configs: Any = getattr(model, "peft_config", {})
    adapters = check_adapters(adapters, configs)
    numbers = check_weights(weights, len(adapters))
    check_new_name(adapter_name, configs)
    kind, options = ADAPTER_METHODS[method], {"allow_overlap": True} if allow_overlap else {}
    if isinstance(model, PeftModel):
        if all(isinstance(configs[name], LoraConfig) for name in adapters):
            # Stacks the factors, which is exact; "linear" would sum factors instead.
            kind = {"sum": "cat"}.get(kind, kind)
        tuner: Any = model.base_model
        if not hasattr(tuner, "add_weighted_adapter"):
            raise ValueError(f"adapters must be of a method that can be fused; got {adapters!r}")
        tuner.add_weighted_adapter(
            adapters, numbers, adapter_name, combination_type=kind, **options
        )
        model.set_adapter(adapter_name)
        return

    def inject(name: str) -> None:
        with several_adapters():
            inject_adapter_in_model(configs[name], model, name)

    combine_adapters(model, adapters, numbers, adapter_name, kind, inject, **options)


def _check_overlap(allow_overlap: bool, method: str) -> None:
    if allow_overlap and method != "spectral":
        raise ValueError(f'allow_overlap is for method "spectral"; got True for {method!r}')


@contextmanager
def several_adapters() -> Iterator[None]:
    """Without PEFT's warning that a model has other adapters: here that is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


@torch.no_grad()
def weight_changes(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """``W' - W0`` [out, in] of every layer that an adapter changes, at its present scale.

    Args:
        model: a ``PeftModel`` or a model with injected adapters, of this package or plain LoRAs.
        adapter_name: the adapter.

    Returns:
        By the name of the layer in the base model, on the CPU, fp32 or better.

    Raises:
        ValueError: no such adapter, or it does more than change weights of layers: biases, modules
            that are saved whole, variants of LoRA.
    """
    configs: Any = getattr(model, "peft_config", {})
    check_adapter_name(model, adapter_name, configs)
    config: Any = configs[adapter_name]
    for option in ("modules_to_save", "trainable_token_indices", "lora_bias", "bias"):
        if getattr(config, option, None) not in (None, False, "none"):
            raise ValueError(
                f"{adapter_name} must change weights of layers alone to be fused; its {option} is "
                f"{getattr(config, option)!r}"
            )
    changes = {}
    for name, layer in _adapted(model, adapter_name).items():
        change = layer.get_delta_weight(adapter_name)
        matrix = _as_matrix(layer.get_base_layer(), change)
        changes[name] = matrix.to("cpu", torch.promote_types(matrix.dtype, torch.float32))
    return changes


def _adapted(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers with an adapter by their names in the base model."""
    found = {}
    for name, layer in _base_model(model).named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not any(adapter_name in getattr(layer, part) for part in layer.adapter_layer_names):
            continue
        variants = getattr(layer, "lora_variant", {})
        if not isinstance(layer, (SpectralLayer, LoraLayer)) or adapter_name in variants:
            raise ValueError(
                f"{adapter_name} must be of a method of this package or a plain LoRA to be fused; "
                f"{name} is a {type(variants.get(adapter_name, layer)).__name__}"
            )
        found[name] = layer
    return found


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _as_matrix(base: nn.Module, weight: Tensor) -> Tensor:
    return weight.mT if isinstance(base, Conv1D) else weight.flatten(1)


def _as_weight(base: Any, matrix: Tensor) -> Tensor:
    return matrix.mT if isinstance(base, Conv1D) else matrix.reshape(base.weight.shape)


def _base_layers(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Any]:
    """The base layers that changes are of; raise if there is none or of another shape."""
    if not isinstance(changes, Mapping):
        raise TypeError(f"changes must be a dict from layers to tensors; got {changes!r}")
    modules = dict(_base_model(model).named_modules())
    found = {}
    for name, change in changes.items():
        layer: Any = modules.get(name)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        weight = getattr(base, "weight", None)
        if (
            not isinstance(weight, Tensor)
            or weight.dtype not in BASE_DTYPES.values()
            or weight.dim() < 2
        ):
            raise ValueError(
                "changes must be of layers with a matrix for their weight that is not quantised; "
                f"{name} is none"
            )
        check_tensor(f"changes[{name!r}]", change)
        shape = tuple(_as_matrix(base, weight).shape)
        if shape != tuple(change.shape) or not bool(torch.isfinite(change).all()):
            raise ValueError(
                f"changes must be finite, for {name} of shape {shape}; got one of "
                f"{tuple(change.shape)}"
            )
        found[name] = base
    return found


@torch.no_grad()
def merge_changes(model: nn.Module, changes: Mapping[str, Tensor]) -> nn.Module:
    """Take all adapters out of a model and add changes to its weights, in place.

    Args:
        model: a ``PeftModel``, a model with injected adapters, or one without.
        changes: by the name of a layer, [out, in].

    Returns:
        The base model.

    Raises:
        TypeError, ValueError: a change is no tensor, has no layer, another shape or numbers that
            are not finite; the base is quantised or offloaded. Nothing was changed then.
    """
    bases = _base_layers(model, changes)
    absent = [name for name, base in bases.items() if base.weight.is_meta]
    if absent:
        raise ValueError(
            f"changes must be of weights that are here; those of {absent} are on the meta device: "
            "if they are offloaded, remove the hooks of accelerate first"
        )
    plain = _base_model(model)
    layers = {n: m for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer)}
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
    take_out(plain, layers)
    for name, base in bases.items():
        weight = base.weight
        # In the wider dtype of the two: a half-precision weight is rounded once.
        weight.copy_(weight + _as_weight(base, changes[name]).to(weight.device))
    return plain


def fuse_and_unload(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    method: str,
    moments: Sequence[Mapping[str, Tensor]] | None = None,
    regularization: float = 1e-6,
    allow_overlap: bool = False,
) -> nn.Module:
    """Merge the fusion of adapters into the weights and take all adapters out, in place.

    Args:
        model: a ``PeftModel`` or a model with injected adapters.
        adapters: names of its adapters.
        weights: one number per adapter, 1 by default.
        method: as for :func:`fuse`, or one of ``spectral_adapters.fusion.CHANGE_METHODS``.
        moments, regularization: for "gradient", see ``spectral_adapters.fusion.fuse_changes``.
        allow_overlap: for "spectral", see :func:`fuse`.

    Returns:
        The base model.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_choice("method", method, FUSION_METHODS)
    _check_overlap(allow_overlap, method)
    adapters = check_adapters(adapters, getattr(model, "peft_config", {}))
    if method in CHANGE_METHODS:
        changes = [weight_changes(model, name) for name in adapters]
        fused = fuse_changes(
            changes, weights, method=method, moments=moments, regularization=regularization
        )
        return merge_changes(model, fused)
    name = "fused"
    while name in getattr(model, "peft_config", {}):
        name += "_"
    fuse(model, adapters, weights, method=method, adapter_name=name, allow_overlap=allow_overlap)
    if isinstance(model, PeftModel):
        return model.merge_and_unload(safe_merge=True, adapter_names=[name])
    return merge_and_unload(model, name, safe_merge=True)


@torch.no_grad()
def changes_to_lora(
    model: nn.Module, changes: Mapping[str, Tensor], *, rank: int | None = None
) -> LoRAExport:
    """Changes of weights as a LoRA.

    Args:
        model: the base model, with or without adapters.
        changes: by the name of a layer, [out, in].
        rank: of the LoRA. None takes what leaves out less than 1e-6 of any change, provided that
            this is less than half of what the layer has.

    Raises:
        ValueError: a change does not fit the model, has no low rank, or is one of a layer that no
            LoRA describes.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an int of at least 1; got {rank!r}")
    if not changes:
        raise ValueError("changes must not be empty")
    bases = _base_layers(model, changes)
    factors, errors = {}, {}
    for name, change in changes.items():
        exact = change.double()
        wanted = _rank(name, exact) if rank is None else rank
        down, up, errors[name] = cut_to_rank(exact, wanted)
        factors[name] = (down, up)
    return lora_of(model, bases, factors, errors)


def _rank(name: str, change: Tensor) -> int:
    """The rank of a change up to rounding; ``ValueError`` if that is no low one."""
    squares = torch.linalg.svdvals(change).square()
    lost = squares.flip(0).cumsum(0).flip(0)
    rank = int((lost > _LORA_ROUNDING**2 * lost[0]).sum())
    if rank > min(change.shape) // 2:
        raise ValueError(
            f"rank must be given: the change of {name} has full rank, and a LoRA of any rank is an "
            "approximation; merged weights are exact"
        )
    return max(rank, 1)


@contextmanager
def adapter_moments(
    model: nn.Module, adapters: Sequence[str], *, dtype: torch.dtype = torch.float64
) -> Iterator[dict[str, Tensor]]:
    """``spectral_adapters.fusion.second_moments`` of all layers that any of the adapters changes.

    Gradient Fusion wants one per concept: run the concept's data with its adapter active.

        with adapter_moments(model, ["cat", "dog"]) as of_cats:
            model.set_adapter("cat")
            model(cats)

    Args:
        model: a ``PeftModel`` or a model with injected adapters.
        adapters: all those that are to be fused.
        dtype: of the sums.

    Raises:
        ValueError: no such adapter, or a layer that is neither linear nor an ungrouped Conv2d.
    """
    layers: dict[str, nn.Module] = {}
    for name in adapters:
        check_adapter_name(model, name, getattr(model, "peft_config", {}))
        layers.update(_adapted(model, name))
    with second_moments(layers, dtype=dtype) as moments:
        yield moments


@torch.no_grad()
def init_orthogonal_lora(
    model: nn.Module,
    rows: Sequence[int] | Mapping[str, Sequence[int]],
    adapter_name: str = "default",
    *,
    seed: int = 0,
) -> None:
    """Prepare a LoRA for Orthogonal Adaptation: its A is fixed, B starts at 0 and is trained.

    Po et al., CVPR 2024: ``dW_i = A_i B_i^T`` with frozen ``B_i`` [in, r], columns of one
    orthogonal matrix. PEFT calls B_i^T ``lora_A`` and A_i ``lora_B``. The rows are those of
    ``spectral_adapters.fusion.orthonormal_rows``. Adapters with different rows and the same seed
    have no crosstalk, and their sum is their fusion. Call it after the adapter is made and before
    the optimizer is; ``set_adapter`` of PEFT makes ``lora_A`` trainable again.

    Args:
        model: a ``PeftModel`` or a model with an injected LoRA.
        rows: r indices of rows of the matrix; one list for all layers, or one by layer's name
            (``columns_for(task, in_features, r, bias="none")`` draws them).
        adapter_name: the LoRA.
        seed: of the matrix.

    Raises:
        TypeError, ValueError: no such LoRA; convolutions and embeddings; rows that do not fit.
            Nothing was changed then.
    """
    if not isinstance(rows, (Mapping, Sequence)):
        raise TypeError(f"rows must be a list of ints or a dict of such lists; got {rows!r}")
    matrices = []
    for name, layer in _adapted_loras(model, adapter_name):
        if isinstance(rows, Mapping) and name not in rows:
            raise ValueError(f"rows must have every layer of the LoRA; got none for {name}")
        chosen = rows[name] if isinstance(rows, Mapping) else rows
        down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if len(chosen) != len(down):
            raise ValueError(
                f"rows must hold as many indices as the LoRA's rank; {name} has {len(down)}, got "
                f"{list(chosen)!r}"
            )
        matrices.append((down, up, orthonormal_rows(down.shape[1], chosen, seed=seed)))
    for down, up, values in matrices:
        down.copy_(values)
        up.zero_()
        down.requires_grad_(False)


def _adapted_loras(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    check_adapter_name(model, adapter_name, getattr(model, "peft_config", {}))
    for name, layer in _adapted(model, adapter_name).items():
        down: Any = layer.lora_A[adapter_name] if isinstance(layer, LoraLayer) else None
        if not isinstance(down, nn.Linear):
            raise ValueError(
                f"adapter_name must be a LoRA of linear layers; {name} is a {type(layer).__name__}"
            )
        yield name, layer
