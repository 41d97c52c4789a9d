"""Saving and loading adapters of models that are no ``PeftModel``, such as the parts of a pipeline.

The folder is PEFT's own: ``adapter_config.json`` and ``adapter_model.safetensors``, which
``PeftModel.from_pretrained`` reads too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import delete_adapter, set_requires_grad
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write one injected adapter of ``model`` (a UNet, a text encoder, ...) into a folder.

    Args:
        model: a model with an adapter from ``add_adapter`` or ``inject_adapter_in_model``.
        directory: the folder, made if it is not there.
        adapter_name: the adapter to save.

    Raises:
        ValueError: the model has no such adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    check_adapter_name(model, adapter_name, configs)
    folder = Path(directory)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    config = copy.copy(configs[adapter_name])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {
        PREFIX + key.removeprefix(PREFIX): value.detach().cpu().clone().contiguous()
        for key, value in state.items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def check_adapter_name(model: nn.Module, adapter_name: str, known: Iterable[str]) -> None:
    """Raise ``ValueError`` unless the adapter is one of the known ones."""
    names = sorted(set(known))
    if adapter_name not in names:
        raise ValueError(
            f"adapter_name must be one of {names}, the adapters of {type(model).__name__}; "
            f"got {adapter_name!r}"
        )


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> None:
    """Add an adapter from a folder to ``model``, in place, and activate it.

    Args:
        model: the base model, or one that has other adapters already.
        directory: a folder from :func:`save_adapter` or ``PeftModel.save_pretrained``.
        adapter_name: the name it gets here.
        is_trainable: whether its parameters require a gradient.

    Raises:
        TypeError: ``model`` is a ``PeftModel``.
        ValueError: the model has an adapter of that name, or the checkpoint does not fit.
        RuntimeError: the adapter was trained on another base weight.
    """
    if isinstance(model, PeftModel):
        raise TypeError("model must be a bare model; a PeftModel has its own load_adapter")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be new; the model already has {adapter_name!r}")
    folder = Path(directory)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    add_adapter = getattr(model, "add_adapter", None)
    if add_adapter is not None:
        add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    try:
        _fill(model, folder, adapter_name, prefix)
    except Exception:
        # A refused adapter leaves no trace.
        configs: Any = model.peft_config
        del configs[adapter_name]
        delete_adapter(model, adapter_name, prefix)
        raise
    set_requires_grad(model, adapter_name, is_trainable)


def restore_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Give an adapter that ``model`` has the weights of a saved one, as resuming a run does.

    Args:
        model: a model with an adapter of the same config.
        directory: a folder from :func:`save_adapter` or ``PeftModel.save_pretrained``.
        adapter_name: the adapter to overwrite.

    Raises:
        ValueError: the model has no such adapter, or the checkpoint does not fit.
        RuntimeError: the saved adapter was trained on another base weight.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    check_adapter_name(model, adapter_name, configs)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[configs[adapter_name].peft_type]
    _fill(model, Path(directory), adapter_name, prefix)


def _fill(model: nn.Module, folder: Path, adapter_name: str, prefix: str) -> None:
    """Load the weights of an adapter that the model has, all of them and nothing else."""
    weights = load_file(folder / WEIGHTS)
    result: Any = set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    missing = [
        key
        for key in result.missing_keys
        if adapter_name in key.split(".") and (f".{prefix}" in key or ".modules_to_save." in key)
    ]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"directory must hold an adapter of this model; {folder} lacks {missing} and has "
            f"{result.unexpected_keys} too many"
        )
