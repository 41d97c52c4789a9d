"""Renaming an adapter in place, which PEFT has no function for."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from spectral_adapters.peft._config import SpectralConfig
from spectral_adapters.peft._factors import Fingerprints
from spectral_adapters.peft._folder import check_adapter_name
from spectral_adapters.peft._layer import SpectralLayer


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; weights, activity, order and optimizer state stay as they are.

    Args:
        model: a ``PeftModel`` or a model with injected adapters.
        old: the present name of the adapter.
        new: its name from now on.

    Raises:
        TypeError: the adapter is of a method of PEFT's own.
        ValueError: there is no adapter ``old``, there is one ``new``, or ``new`` is no name for a
            module (empty, or with a dot).
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    check_adapter_name(model, old, configs)
    if not isinstance(configs[old], SpectralConfig):
        raise TypeError(
            f"old must be an adapter of a method of this package; {old!r} is one of "
            f"{configs[old].peft_type}"
        )
    if not isinstance(new, str) or not new or "." in new:
        raise ValueError(f"new must be a non-empty str without a dot; got {new!r}")
    if new in configs:
        raise ValueError(f"new must not be the name of an adapter; the model has {new!r}")

    _rename_key(configs, old, new)
    for module in model.modules():
        if isinstance(module, (SpectralLayer, AuxiliaryTrainingWrapper)):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                _rename_key(getattr(module, name), old, new)
        for name in ("active_adapter", "_active_adapter", "_adapters", "merged_adapters"):
            if name in module.__dict__:
                module.__dict__[name] = _renamed(module.__dict__[name], old, new)
        if isinstance(module, BaseTuner):
            # A PeftModel's configs are those of its tuner, an injected model's are its own.
            _rename_key(module.peft_config, old, new)


def _rename_key(container: Any, old: str, new: str) -> None:
    """Rename a key of a dict or of one of torch's containers, in its place."""
    if old not in container:
        return
    items = list(container.items())
    unverified = set(container.unverified) if isinstance(container, Fingerprints) else set()
    for key, _ in items:
        del container[key]
    for key, value in items:
        container[new if key == old else key] = value
    if isinstance(container, Fingerprints):
        container.unverified = _renamed(unverified, old, new)


def _renamed(names: Any, old: str, new: str) -> Any:
    if isinstance(names, str):
        return new if names == old else names
    return type(names)(new if name == old else name for name in names)
