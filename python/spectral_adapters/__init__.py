"""Spectral fine-tuning of pretrained models: exact, fast, drop-in."""

from spectral_adapters import functional
from spectral_adapters.modules import (
    SODAConv2d,
    SODALinear,
    SpectralAdapterALinear,
    SpectralAdapterRLinear,
    SVDiffLinear,
)
from spectral_adapters.optim import StiefelAdam, StiefelSGD
from spectral_adapters.rotation_bank import RotationBank

__all__ = [
    "RotationBank",
    "SODAConv2d",
    "SODALinear",
    "SVDiffLinear",
    "SpectralAdapterALinear",
    "SpectralAdapterRLinear",
    "StiefelAdam",
    "StiefelSGD",
    "functional",
]
