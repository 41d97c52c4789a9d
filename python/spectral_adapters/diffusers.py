"""Adapters of diffusers pipelines: one folder per adapted component, each in PEFT's own format.

``FOLDER/unet/adapter_config.json`` and ``FOLDER/unet/adapter_model.safetensors`` are what
``peft.PeftModel.from_pretrained(pipe.unet, "FOLDER/unet")`` reads as well, for any PEFT method.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from spectral_adapters.peft import load_adapter as load_component
from spectral_adapters.peft import save_adapter as save_component

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "adapted_components",
    "load_adapter",
    "save_adapter",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapter(pipe: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter of every component that has it.

    Each file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        pipe: a diffusers pipeline, or anything with ``components``, a dict from names to modules.
        folder: gets one sub-folder per adapted component; made if it is not there.
        adapter_name: the adapter to save.

    Raises:
        ValueError: no component has this adapter.
    """
    found = adapted_components(pipe, adapter_name)
    if not found:
        raise ValueError(
            f"adapter_name must be an adapter of the pipeline; no component has {adapter_name!r}"
        )
    for name, module in found.items():
        place, part = Path(folder) / name, Path(folder) / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_component(module, part, adapter_name)
        place.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.replace(place / file.name)
        part.rmdir()


def load_adapter(
    pipe: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> None:
    """Add what :func:`save_adapter` wrote to the components of ``pipe``, in place, and activate it.

    Args:
        pipe: a diffusers pipeline with the same base weights.
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
        module = pipe.components.get(place.name)
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"folder must hold adapters of the pipeline's components; {folder} has one for "
                f"{place.name!r}, which {type(pipe).__name__} lacks"
            )
        load_component(module, place, adapter_name, is_trainable=is_trainable)


def adapted_components(pipe: Any, adapter_name: str = "default") -> dict[str, nn.Module]:
    """Return the components of ``pipe`` that have the adapter, by name."""
    return {
        name: module
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and adapter_name in getattr(module, "peft_config", {})
    }
