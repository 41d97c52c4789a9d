"""Saving and loading adapters of models that are no ``PeftModel``, such as the parts of a pipeline.

The folder is PEFT's own: ``adapter_config.json`` and ``adapter_model.safetensors``, which
``PeftModel.from_pretrained`` reads too.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from peft.tuners.tuners_utils import set_requires_grad
from torch import Tensor, nn

from spectral_adapters._files import load_tensors, save_tensors, staged
from spectral_adapters.peft._config import SpectralConfig
from spectral_adapters.rotation_bank import RotationBank
from spectral_adapters.sharding import spread_like

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

#: Options of this package's methods that say what the numbers of an adapter mean. Of all others,
#: the names and shapes of its tensors tell, and its fingerprints, or they change no value.
_MEANING = (
    "decomposition",
    "rotation",
    "parametrization",
    "spectrum_activation",
    "basis_dtype",
    "columns",
    "offset",
    "columns_pattern",
    "seed",
)


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
        TypeError: ``model`` is no module, or a ``PeftModel``.
        FileNotFoundError: the folder holds no adapter in safetensors.
        ValueError: ``adapter_name`` is no name or one that the model has, or the checkpoint does
            not fit or is not whole.
        RuntimeError: the adapter was trained on another base weight.

    A model that refuses an adapter is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, PeftModel):
        raise TypeError("model must be a bare model; a PeftModel has its own load_adapter")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(
            f"adapter_name must be a non-empty str without a dot; got {adapter_name!r}"
        )
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name must be new; the model already has {adapter_name!r}")
    folder = Path(directory)
    weights = load_tensors(folder / WEIGHTS)
    config = _read_config(folder)
    config.inference_mode = not is_trainable
    add_adapter = getattr(model, "add_adapter", None)
    with unchanged_if_refused([model], adapter_name):
        if add_adapter is not None:
            add_adapter(config, adapter_name)
        else:
            inject_adapter_in_model(config, model, adapter_name)
        _fill(model, weights, folder, adapter_name)
    set_requires_grad(model, adapter_name, is_trainable)


def restore_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Give an adapter that ``model`` has the weights of a saved one, as resuming a run does.

    Args:
        model: a model with an adapter of the same config.
        directory: a folder from :func:`save_adapter` or ``PeftModel.save_pretrained``.
        adapter_name: the adapter to overwrite.

    Raises:
        FileNotFoundError: the folder holds no adapter in safetensors.
        ValueError: the model has no such adapter, or the saved one does not fit, is not whole or
            has an option that makes its numbers mean something else.
        RuntimeError: the saved adapter was trained on another base weight.

    If that is refused, the adapter is left as it was.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    check_adapter_name(model, adapter_name, configs)
    folder = Path(directory)
    weights = load_tensors(folder / WEIGHTS)
    _check_meaning(_read_config(folder), configs[adapter_name], folder)
    with unchanged_if_refused([model], adapter_name):
        _fill(model, weights, folder, adapter_name)


@contextmanager
def unchanged_if_refused(models: Collection[nn.Module], adapter_name: str) -> Iterator[None]:
    """Put models back as they were if what is done to one of their adapters raises.

    That is all of their parts, which adapters are active, what requires a gradient, and the numbers
    of this adapter.
    """
    modules = [module for model in models for module in model.modules()]
    kept: list[tuple[Any, Any]] = [(vars(module), vars(module).copy()) for module in modules]
    # In place: handles of hooks refer to the dicts that these are in.
    kept += [
        (value, value.copy())
        for _, attributes in list(kept)
        for value in attributes.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    gradients = [(p, p.requires_grad) for model in models for p in model.parameters()]
    numbers = [
        (tensor, tensor.detach().clone())
        for model in models
        if adapter_name in getattr(model, "peft_config", {})
        for tensor in adapter_tensors(model, adapter_name).values()
    ]
    try:
        yield
    except BaseException:
        for now, before in kept:
            now.clear()
            now.extend(before) if isinstance(now, list) else now.update(before)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        for tensor, values in numbers:
            tensor.detach().copy_(values)
        for model in models:
            bank = RotationBank.of(model)
            if bank is not None:
                bank.invalidate()
        raise


def _read_config(folder: Path) -> PeftConfig:
    """The config of a saved adapter; what is no such file is told apart from a wrong option."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None:
            raise KeyError("peft_type")
        return config
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is no whole config of a known method ({error!r}): it was cut off, changed, or "
            "is something else; take another copy of it, or an earlier checkpoint"
        ) from error


def _check_meaning(saved: PeftConfig, here: PeftConfig, folder: Path) -> None:
    """Raise ``ValueError`` if the numbers of a saved adapter would mean something else here."""
    kind, own_kind = (getattr(c.peft_type, "value", c.peft_type) for c in (saved, here))
    options: dict[str, tuple[Any, Any]] = {"peft_type": (kind, own_kind)}
    if isinstance(here, SpectralConfig) and type(saved) is type(here):
        names = [name for name in _MEANING if hasattr(here, name)]
        if getattr(here, "columns", "random") != "random":
            # Nothing is drawn.
            names.remove("seed")
        options.update((name, (getattr(saved, name), getattr(here, name))) for name in names)
    for name, (there, now) in options.items():
        # Tuples come back from JSON as lists.
        if json.dumps(there) != json.dumps(now):
            raise ValueError(
                f"{name} must be {there!r}, as it was for the adapter in {folder}; got {now!r}"
            )


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path, adapter_name: str) -> None:
    """Load the weights of an adapter that the model has, all of them and nothing else."""
    here = adapter_tensors(model, adapter_name)
    configs: Any = model.peft_config
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[configs[adapter_name].peft_type]
    pairs = {
        key: (value, here.get(PREFIX + key.removeprefix(PREFIX), value))
        for key, value in weights.items()
    }
    for key, (value, own) in pairs.items():
        # Some of PEFT's own methods reshape what they load.
        if value.shape != own.shape and isinstance(configs[adapter_name], SpectralConfig):
            raise ValueError(
                f"directory must hold an adapter of this model; {key} in {folder} has shape "
                f"{tuple(value.shape)} and must have {tuple(own.shape)}"
            )
    # By the names in the model: PEFT looks up those of modules_to_save as they are there.
    prefixed = isinstance(model, PeftModel)
    weights = {
        key if prefixed else key.removeprefix(PREFIX): spread_like(value, own)
        for key, (value, own) in pairs.items()
    }
    try:
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    except KeyError as error:
        raise ValueError(
            f"directory must hold an adapter of this model; {folder} lacks {error}"
        ) from error
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
