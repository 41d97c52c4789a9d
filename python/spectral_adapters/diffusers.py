"""Adapters of diffusers pipelines: one folder per adapted component, each in PEFT's own format.

``FOLDER/unet/adapter_config.json`` and ``FOLDER/unet/adapter_model.safetensors`` are what
``peft.PeftModel.from_pretrained(pipe.unet, "FOLDER/unet")`` reads as well, for any PEFT method.

:func:`export_lora` and :func:`export_merged` write what tools without this package read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spectral_adapters._files import save_tensors, staged
from spectral_adapters._validation import check_choice
from spectral_adapters.peft import LoRAExport, merge_and_unload, restore_adapter, to_lora
from spectral_adapters.peft import load_adapter as load_component
from spectral_adapters.peft._folder import write_adapter

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "LORA_FORMATS",
    "adapted_components",
    "export_lora",
    "export_merged",
    "load_adapter",
    "register_checkpoint_hooks",
    "save_adapter",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: Layouts of LoRA files: of ``load_lora_weights``, and of the tools that use kohya's keys.
LORA_FORMATS = ("diffusers", "kohya")


def save_adapter(pipe: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter of every component that has it.

    All files are written beside their places and then moved there, one right after the other:
    whenever the process is killed, each folder holds the adapter that was there or the new one.

    Args:
        pipe: a diffusers pipeline, or a dict from names of components to modules, such as
            ``{"unet": unet}``.
        folder: gets one sub-folder per adapted component; made if it is not there.
        adapter_name: the adapter to save.

    Raises:
        ValueError: no component has this adapter.
    """
    modules = _require_adapter(pipe, adapter_name)
    with staged(*(Path(folder) / name for name in modules)) as parts:
        for module, part in zip(modules.values(), parts, strict=True):
            write_adapter(module, part, adapter_name)


def load_adapter(
    pipe: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> None:
    """Add what :func:`save_adapter` wrote to the components of ``pipe``, in place, and activate it.

    Args:
        pipe: a diffusers pipeline with the same base weights, or a dict as for
            :func:`save_adapter`.
        folder: from :func:`save_adapter`.
        adapter_name: the name the adapter gets here.
        is_trainable: whether its parameters require a gradient.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it holds one for a component that the pipeline lacks, or that does not fit it.
        RuntimeError: the adapter was trained on other base weights.
    """
    places = sorted(path.parent for path in Path(folder).glob(f"*/{ADAPTER_CONFIG}"))
    places = [place for place in places if not place.name.startswith(".")]
    if not places:
        raise FileNotFoundError(
            f"folder must hold an adapter, COMPONENT/{ADAPTER_CONFIG}; {folder} holds none"
        )
    for place in places:
        module = _components(pipe).get(place.name)
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"folder must hold adapters of the pipeline's components; {folder} has one for "
                f"{place.name!r}, which {type(pipe).__name__} lacks"
            )
        load_component(module, place, adapter_name, is_trainable=is_trainable)


def register_checkpoint_hooks(
    accelerator: Any, components: Mapping[str, nn.Module], adapter_name: str = "default"
) -> None:
    """Let ``accelerator.save_state`` and ``load_state`` keep one adapter instead of whole models.

    One line in place of the two hooks of diffusers' example scripts. A checkpoint then holds
    ``unet/adapter_model.safetensors`` and so on, beside what accelerate keeps of the optimizer,
    which it pickles; :mod:`spectral_adapters.checkpoint` needs no pickle.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        components: models by the name of their component, as ``{"unet": unet, "text_encoder":
            text_encoder}``; those without the adapter are left alone.
        adapter_name: the adapter in training.

    Raises:
        ValueError: no component has the adapter; or, when a state is saved or loaded, the
            accelerator prepared a model that is not among the adapted components.
    """
    modules = _require_adapter(
        {name: accelerator.unwrap_model(module) for name, module in components.items()},
        adapter_name,
    )

    def check(models: list[nn.Module]) -> None:
        for model in models:
            plain = accelerator.unwrap_model(model)
            if not any(plain is module for module in modules.values()):
                raise ValueError(
                    f"components must hold every prepared model, with adapter {adapter_name!r}; "
                    f"got {sorted(modules)} and a prepared {type(plain).__name__}"
                )

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        check(models)
        if accelerator.is_main_process:
            save_adapter(modules, folder, adapter_name)
        # What is left in these lists accelerate would save and load itself, whole.
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        check(models)
        for name, module in modules.items():
            restore_adapter(module, Path(folder) / name, adapter_name)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _components(pipe: Any) -> Mapping[str, Any]:
    return pipe if isinstance(pipe, Mapping) else pipe.components


def adapted_components(pipe: Any, adapter_name: str = "default") -> dict[str, nn.Module]:
    """Return the components of ``pipe`` that have the adapter, by name."""
    return {
        name: module
        for name, module in _components(pipe).items()
        if isinstance(module, nn.Module) and adapter_name in getattr(module, "peft_config", {})
    }


def export_lora(
    pipe: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    file_format: str = "diffusers",
) -> dict[str, dict[str, float]]:
    """Write one adapter as a LoRA file, ``FOLDER/pytorch_lora_weights.safetensors``.

    ``pipe.load_lora_weights(folder)`` reads both formats, without this package. Spectral Adapters A
    and R and LiDB are exact; SODA and SVDiff are cut to ``rank``.

    Args:
        pipe: a diffusers pipeline with the adapter, at the scale to export.
        folder: made if it is not there.
        adapter_name: the adapter to export.
        rank: of the LoRA; None for the exact one.
        file_format: "diffusers", or "kohya" with the ranks as alphas. Diffusers itself reads text
            encoders in kohya's layout only if their ``out_proj`` is adapted too.

    Returns:
        By component and module: the Frobenius norm of what is left out, relative to the change.

    Raises:
        ValueError: no such adapter, a missing rank, or a layer that no LoRA file describes.
    """
    check_choice("file_format", file_format, LORA_FORMATS)
    exports = {
        name: to_lora(module, adapter_name, rank=rank)
        for name, module in _require_adapter(pipe, adapter_name).items()
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    if file_format == "kohya":
        _save_kohya(exports, Path(folder))
    else:
        layers = {f"{name}_lora_layers": lora.state_dict for name, lora in exports.items()}
        type(pipe).save_lora_weights(save_directory=str(folder), **layers)
    return {name: lora.errors for name, lora in exports.items()}


def _save_kohya(exports: dict[str, LoRAExport], folder: Path) -> None:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from diffusers.utils import convert_state_dict_to_kohya

    tensors = {}
    for name, lora in exports.items():
        # Kohya's keys are those of CLIPTextModel as it was before transformers flattened it.
        inner = "text_model." if name.startswith("text_encoder") else ""
        for key, value in lora.state_dict.items():
            tensors[f"{name}.{inner}{key.removeprefix(inner)}"] = value
    save_tensors(folder / LORA_WEIGHT_NAME_SAFE, convert_state_dict_to_kohya(tensors))


def export_merged(pipe: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Merge one adapter into the weights of ``pipe``, in place, and write the whole pipeline.

    Raises:
        ValueError: no component has this adapter, or the merged weights would not be finite.
    """
    for module in _require_adapter(pipe, adapter_name).values():
        merge_and_unload(module, adapter_name, safe_merge=True)
    pipe.save_pretrained(str(folder))


def _require_adapter(pipe: Any, adapter_name: str) -> dict[str, nn.Module]:
    found = adapted_components(pipe, adapter_name)
    if not found:
        raise ValueError(
            f"adapter_name must be an adapter of a component; no component has {adapter_name!r}"
        )
    return found
