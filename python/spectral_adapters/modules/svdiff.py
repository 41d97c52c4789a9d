"""SVDiff: trained singular values on fixed singular vectors."""

from __future__ import annotations

import torch
from torch import nn

from spectral_adapters.modules.soda import SODALinear


class SVDiffLinear(SODALinear):
    """A linear layer ``y = x (U diag(s) V^T)^T + b``, ``s = relu(S + delta)``.

    SVDiff (Han et al., ICCV 2023) is SODA without its rotation: only ``delta`` [k] is trained. The
    change depends little on which singular vectors a machine finds, since signs cancel.

    Args (also of :meth:`from_linear`):
        spectrum_activation: "relu" (as published), "identity" or "softplus".
        plan: "auto", "factored", "merged" or "tokens"; equal values at different cost.
        save_factors, base_dtype, basis_dtype: as for :class:`SODALinear`.

    Shapes: x [..., in_features] -> [..., out_features], in the dtype of x.

    Raises:
        TypeError, ValueError: as :class:`SODALinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spectrum_activation: str = "relu",
        plan: str = "auto",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
        basis_dtype: str = "float32",
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            device=device,
            dtype=dtype,
            rotation=None,
            spectrum_activation=spectrum_activation,
            plan=plan,
            save_factors=save_factors,
            base_dtype=base_dtype,
            basis_dtype=basis_dtype,
        )

    # Without the options of a rotation that it does not have, which the base class accepts.
    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Linear,
        *,
        spectrum_activation: str = "relu",
        plan: str = "auto",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
        basis_dtype: str = "float32",
    ) -> SVDiffLinear:
        """An SVDiff layer that computes what ``linear`` computes; ``linear`` stays as it is."""
        layer = super().from_linear(
            linear,
            rotation=None,
            spectrum_activation=spectrum_activation,
            plan=plan,
            save_factors=save_factors,
            base_dtype=base_dtype,
            basis_dtype=basis_dtype,
        )
        assert isinstance(layer, SVDiffLinear)
        return layer
