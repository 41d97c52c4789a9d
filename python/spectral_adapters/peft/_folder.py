"""Saving and loading adapters of models that are no ``PeftModel``, such as the parts of a pipeline.

The folder is PEFT's own: ``adapter_config.json`` and ``adapter_model.safetensors``, which
``PeftModel.from_pretrained`` reads too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
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
from torch import Tensor, nn

from spectral_adapters._files import load_tensors, save_tensors, staged
from spectral_adapters.sharding import spread_like

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write one injected adapter of ``model`` (a UNet, a text encoder, ...) into a folder.

    The files are written beside their places and then moved there: whenever the process is killed,
    the folder holds the adapter that was there or the new one.

    Args:
        model: a model with an adapter from ``add_adapter`` or ``inject_adapter_in_model``.
        directory: the folder, made if it is not there.
        adapter_name: the adapter to save.

    Raises:
        ValueError: the model has no such adapter.
    """
    check_adapter_name(model, adapter_name, getattr(model, "peft_config", {}))
    with staged(Path(directory)) as (part,):
        write_adapter(model, part, adapter_name)


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The parameters and buffers that are saved of an adapter, by their names in the file."""
    state = get_peft_model_state_dict(
        model,
        state_dict=model.state_dict(keep_vars=True),
        adapter_name=adapter_name,
        save_embedding_layers=False,
    )
    return {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}


def write_adapter(
    model: nn.Module,
    folder: Path,
    adapter_name: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the two files of an adapter that the model has; ``tensors`` if its own are sharded."""
    configs: Any = model.peft_config
    config = copy.copy(configs[adapter_name])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    own = adapter_tensors(model, adapter_name) if tensors is None else tensors
    save_tensors(folder / WEIGHTS, own, {"format": "pt"})


def trained_outside(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient and that :func:`save_adapter` leaves out, by name."""
    saved = {id(value) for value in adapter_tensors(model, adapter_name).values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in saved
    }


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
        FileNotFoundError: the folder holds no adapter in safetensors.
        ValueError: the model has an adapter of that name, or the checkpoint does not fit or is not
            whole.
        RuntimeError: the adapter was trained on another base weight.
    """
    if isinstance(model, PeftModel):
        raise TypeError("model must be a bare model; a PeftModel has its own load_adapter")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be new; the model already has {adapter_name!r}")
    folder = Path(directory)
    weights = load_tensors(folder / WEIGHTS)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    add_adapter = getattr(model, "add_adapter", None)
    if add_adapter is not None:
        add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    try:
        _fill(model, weights, folder, adapter_name, prefix)
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
        FileNotFoundError: the folder holds no adapter in safetensors.
        ValueError: the model has no such adapter, or the checkpoint does not fit or is not whole.
        RuntimeError: the saved adapter was trained on another base weight.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    check_adapter_name(model, adapter_name, configs)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[configs[adapter_name].peft_type]
    folder = Path(directory)
    _fill(model, load_tensors(folder / WEIGHTS), folder, adapter_name, prefix)


def _fill(
    model: nn.Module, weights: dict[str, Tensor], folder: Path, adapter_name: str, prefix: str
) -> None:
    """Load the weights of an adapter that the model has, all of them and nothing else."""
    here = adapter_tensors(model, adapter_name)
    weights = {
        key: spread_like(value, here.get(PREFIX + key.removeprefix(PREFIX), value))
        for key, value in weights.items()
    }
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
