"""Spectral Adapter R as a PEFT method: chosen singular vectors are rotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spectral_adapters.absorption import absorbed_columns
from spectral_adapters.autograd import SpectralRLinearFunction
from spectral_adapters.functional import SpectralBasis, low_rank_factors
from spectral_adapters.peft._columns import ColumnConfig, ColumnLayer
from spectral_adapters.peft._config import RANDOM_STD
from spectral_adapters.peft._layer import (
    LinearChange,
    SpectralConv,
    SpectralEmbedding,
    SpectralLinear,
)
from spectral_adapters.peft._model import SpectralModel
from spectral_adapters.peft._registration import register
from spectral_adapters.rotation_bank import RotatedLayer, RotationSlot


@dataclass
class SpectralAdapterRConfig(ColumnConfig):
    """Spectral Adapter R: ``W' = W0 + U1 (R_U S1 R_V^T - S1) V1^T`` with exact Cayley rotations.

    Zhang and Pilanci, NeurIPS 2024. r(r-1) trained numbers per layer; exactly a LoRA of rank r
    when trained.

    Arguments: :class:`ColumnConfig`.
    """

    method: ClassVar[str] = "SPECTRAL_ADAPTER_R"


class SpectralAdapterRLayer(ColumnLayer, RotatedLayer):
    """Trained: ``spectral_adapter_r_left`` and ``spectral_adapter_r_right``, packed [r(r-1)/2]."""

    prefix = "spectral_adapter_r_"
    adapter_layer_names = ("spectral_adapter_r_left", "spectral_adapter_r_right")
    _can_absorb = True

    spectral_adapter_r_left: nn.ParameterDict
    spectral_adapter_r_right: nn.ParameterDict

    def _add_parameters(self, adapter: str, config: ColumnConfig) -> None:
        r = len(self._columns(config))
        if r < 2:
            raise ValueError(
                f"{self.name}: r must be at least 2, one column cannot be rotated; got {r}; use "
                "rank_pattern for single modules"
            )
        for name in self.adapter_layer_names:
            packed = torch.zeros(r * (r - 1) // 2, **self._new_options())
            if not config.init_weights:
                nn.init.normal_(packed, std=RANDOM_STD)
            getattr(self, name)[adapter] = nn.Parameter(packed)

    def _low_rank(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        basis = self._basis(adapter, device)
        left, right = self._turns(adapter, device, basis.left.dtype)
        return low_rank_factors(basis, rotations=(left, right))

    def _linear_change(self, adapter: str, device: torch.device) -> LinearChange:
        left, singular_values, right = self._basis(adapter, device)
        assert singular_values is not None
        turns, shared = self._rotations_for_product(self._slot(adapter), device, left.dtype)
        factors = (left, singular_values, right, *turns)
        return LinearChange(SpectralRLinearFunction, factors, shared)

    def _absorbed(self, adapter: str, device: torch.device) -> SpectralBasis:
        basis = self._basis(adapter, device)
        return absorbed_columns(basis, self._turns(adapter, device, basis.left.dtype))

    def _turns(
        self, adapter: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """R_U and R_V, orthogonal [r, r], as tensors that pass their gradients on."""
        (left, right), _ = self._rotations(self._slot(adapter))
        return left.to(device, dtype), right.to(device, dtype)

    def rotation_slots(self) -> list[RotationSlot]:
        """The rotations of the active adapters."""
        return [self._slot(name) for name in self.active_adapters if name in self.configs]

    def _slot(self, adapter: str) -> RotationSlot:
        # At every forward pass, and so past nn.Module.__getattr__ and ParameterDict's own lookup.
        r, containers = self.r[adapter], cast(Any, self._modules)
        packed = [containers[name]._parameters[adapter] for name in self.adapter_layer_names]
        return RotationSlot(adapter, tuple(packed), (r, r))


class Linear(SpectralLinear, SpectralAdapterRLayer):
    """Spectral Adapter R on linear layers, quantised ones included."""


class Conv(SpectralConv, SpectralAdapterRLayer):
    """Spectral Adapter R on ``nn.Conv1d``, ``2d`` and ``3d``."""


class Embedding(SpectralEmbedding, SpectralAdapterRLayer):
    """Spectral Adapter R on ``nn.Embedding``."""


class SpectralAdapterRModel(SpectralModel):
    """The PEFT model of Spectral Adapter R; see :class:`SpectralAdapterRConfig`."""

    prefix = SpectralAdapterRLayer.prefix
    tuner_layer_cls = SpectralAdapterRLayer
    linear_cls = Linear
    conv_cls = Conv
    embedding_cls = Embedding
    pattern_options = ("rank_pattern", "columns_pattern")


register("spectral_adapter_r", SpectralAdapterRConfig, SpectralAdapterRModel)
