"""Spectrum activations: how the trained offset enters the spectrum, ``s = phi(S + delta)``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spectral_adapters._validation import check_choice

SPECTRUM_ACTIVATIONS = ("identity", "relu", "softplus")
SOFTPLUS_BETA = 5.0


def spectrum_activation(name: str, singular_values: Tensor, delta: Tensor) -> Tensor:
    """Adapted singular values [k] from the frozen S [k] and the trained offset delta [k].

    * identity: ``S + delta``.
    * relu: ``max(S + delta, 0)``, as in the published SODA and SVDiff code.
    * softplus (beta = 5): ``S + softplus(S + delta) - softplus(S)``, which is S exactly at delta =
      0, also where S = 0 and the inverse of softplus does not exist. It cannot fall below
      -ln(2)/beta.
    """
    check_choice("spectrum_activation", name, SPECTRUM_ACTIVATIONS)
    if name == "identity":
        return singular_values + delta
    if name == "relu":
        return torch.relu(singular_values + delta)
    # One layout for both terms: vectorised and strided loops round differently.
    singular_values = singular_values.contiguous()
    change = softplus(singular_values + delta, SOFTPLUS_BETA) - softplus(
        singular_values, SOFTPLUS_BETA
    )
    return singular_values + change
