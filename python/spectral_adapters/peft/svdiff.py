"""SVDiff as a PEFT method: trained singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectral_adapters._validation import check_choice
from spectral_adapters.absorption import absorbed_basis
from spectral_adapters.activations import SPECTRUM_ACTIVATIONS, spectrum_activation
from spectral_adapters.decomposition import BASIS_DTYPES, WholeFactorisation
from spectral_adapters.functional import SpectralBasis, soda_delta_weight, soda_linear
from spectral_adapters.peft._config import RANDOM_STD, SpectralConfig
from spectral_adapters.peft._layer import (
    SpectralConv,
    SpectralEmbedding,
    SpectralLayer,
    SpectralLinear,
)
from spectral_adapters.peft._model import SpectralModel
from spectral_adapters.peft._registration import register
from spectral_adapters.planner import PLANS
from spectral_kernels.ops.kron import accumulation_dtype

_METHOD: dict[str, Any] = {"decomposition": "svd", "rotation": None}


@dataclass
class SVDiffConfig(SpectralConfig):
    """SVDiff (Han et al., ICCV 2023): ``W' = U diag(s) V^T`` with trained ``s = relu(S + delta)``.

    Args:
        spectrum_activation: "relu" (as published), "identity" or "softplus".
        plan: "auto", "factored", "merged" or "tokens", for linear layers; equal values at different
            cost.
        basis_dtype: precision of U and V, as in :class:`SODAConfig`.

    Further arguments: :class:`SpectralConfig`.
    """

    method: ClassVar[str] = "SVDIFF"

    spectrum_activation: str = field(default="relu")
    plan: str = field(default="auto")
    basis_dtype: str = field(default="base")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("spectrum_activation", self.spectrum_activation, SPECTRUM_ACTIVATIONS)
        check_choice("plan", self.plan, ("auto", *PLANS))
        check_choice("basis_dtype", self.basis_dtype, BASIS_DTYPES)


class SVDiffLayer(SpectralLayer):
    """Trained: ``svdiff_delta`` [k]."""

    prefix = "svdiff_"
    adapter_layer_names = ("svdiff_delta",)
    _can_absorb = True

    svdiff_delta: nn.ParameterDict

    def _add_parameters(self, adapter: str, config: SVDiffConfig) -> None:
        delta = torch.zeros(min(self._matrix_shape()), **self._new_options())
        if not config.init_weights:
            nn.init.normal_(delta, std=RANDOM_STD)
        self.svdiff_delta[adapter] = nn.Parameter(delta)

    def _factorisation(self, config: SVDiffConfig) -> WholeFactorisation:
        return WholeFactorisation("svd", config.basis_dtype)

    @torch.no_grad()
    def combine(self, terms: Sequence[tuple[float, str]], adapter: str) -> None:
        """``delta = sum of weight * delta_i``."""
        total = torch.zeros_like(self.svdiff_delta[adapter])
        for weight, name in terms:
            total += weight * self.svdiff_delta[name].to(total)
        self.svdiff_delta[adapter].copy_(total)

    def _terms(self, adapter: str, device: torch.device) -> tuple[SpectralBasis, Tensor]:
        basis = self._basis(adapter, device)
        assert basis.singular_values is not None
        delta = self.svdiff_delta[adapter].to(device, accumulation_dtype(basis.left.dtype))
        name = self.configs[adapter].spectrum_activation
        return basis, spectrum_activation(name, basis.singular_values, delta)

    def _absorbed(self, adapter: str, device: torch.device) -> SpectralBasis:
        return absorbed_basis(*self._terms(adapter, device), None, **_METHOD)

    def _delta_matrix(self, adapter: str, device: torch.device) -> Tensor:
        return soda_delta_weight(*self._terms(adapter, device), **_METHOD)


class Linear(SpectralLinear, SVDiffLayer):
    """SVDiff on ``nn.Linear`` and ``Conv1D``."""

    def _replace_base(self, x: Tensor, adapter: str) -> Tensor | None:
        base: Any = self.base_layer
        return soda_linear(
            x,
            *self._terms(adapter, x.device),
            bias=base.bias,
            plan=self.configs[adapter].plan,
            base_weight=self._as_matrix(base.weight),
            **_METHOD,
        )


class Conv(SpectralConv, SVDiffLayer):
    """SVDiff on ``nn.Conv1d``, ``2d`` and ``3d``."""


class Embedding(SpectralEmbedding, SVDiffLayer):
    """SVDiff on ``nn.Embedding``."""


class SVDiffModel(SpectralModel):
    """The PEFT model of SVDiff; see :class:`SVDiffConfig`."""

    prefix = SVDiffLayer.prefix
    tuner_layer_cls = SVDiffLayer
    linear_cls = Linear
    conv_cls = Conv
    embedding_cls = Embedding

    @classmethod
    def _combined_config(
        cls, model: nn.Module, configs: Mapping[str, SVDiffConfig]
    ) -> SVDiffConfig:
        activations = [config.spectrum_activation for config in configs.values()]
        if any(activation != "identity" for activation in activations):
            raise ValueError(
                'adapters must have spectrum_activation="identity", or their sum is no SVDIFF '
                f"adapter; got {activations}"
            )
        return replace(next(iter(configs.values())))


register("svdiff", SVDiffConfig, SVDiffModel)
