"""Absorbing an adapter of a whole model."""

from __future__ import annotations

from torch import nn

from spectral_adapters.peft._folder import check_adapter_name
from spectral_adapters.peft._model import spectral_layers


def absorb(model: nn.Module, adapter_name: str = "default") -> None:
    """Make the adapted weights the base weights; the adapter starts again at the identity.

    The next task starts from what was learned, without a decomposition: the rotated basis is the
    basis of the adapted weight (:mod:`spectral_adapters.absorption`). The model computes what it
    did. For SODA, SVDiff and Spectral Adapter R.

    An adapter that is trained and saved from here loads onto the same base after the same adapters
    were absorbed, or anywhere with ``save_factors=True``. So keep what is absorbed: save it first.
    An optimizer's state belongs to the old parameters and should be made anew.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        adapter_name: the adapter, the only one of the model.

    Raises:
        TypeError: the model has no adapters of this package, or the method does not know the
            adapted weight's factorisation.
        ValueError: there is no such adapter, or it cannot be absorbed; nothing was changed.
    """
    layers = spectral_layers(model)
    if not layers:
        raise TypeError(f"model must have spectral adapters; this {type(model).__name__} has none")
    check_adapter_name(model, adapter_name, getattr(model, "peft_config", {}))
    layers = [layer for layer in layers if adapter_name in layer.configs]
    for layer in layers:
        layer.check_absorbable(adapter_name)
    for layer in layers:
        layer.absorb(adapter_name)
