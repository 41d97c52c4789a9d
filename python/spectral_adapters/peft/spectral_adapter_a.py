"""Spectral Adapter A as a PEFT method: chosen singular vectors are shifted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_adapters.autograd import SpectralALinearFunction
from spectral_adapters.functional import low_rank_factors
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


@dataclass
class SpectralAdapterAConfig(ColumnConfig):
    """Spectral Adapter A: ``W' = W0 + (U1 + A_U) S1 (V1 + A_V)^T - U1 S1 V1^T``.

    Zhang and Pilanci, NeurIPS 2024. As many trained numbers as a LoRA of rank r, a change of rank
    2r; exactly a LoRA of rank 2r when trained.

    Arguments: :class:`ColumnConfig`.
    """

    method: ClassVar[str] = "SPECTRAL_ADAPTER_A"


class SpectralAdapterALayer(ColumnLayer):
    """Trained: A_U [out, r] in ``spectral_adapter_a_left`` and A_V [in, r] in ``..._right``."""

    prefix = "spectral_adapter_a_"
    adapter_layer_names = ("spectral_adapter_a_left", "spectral_adapter_a_right")

    spectral_adapter_a_left: nn.ParameterDict
    spectral_adapter_a_right: nn.ParameterDict

    def _add_parameters(self, adapter: str, config: ColumnConfig) -> None:
        rows, columns = self._matrix_shape()
        for name, size in zip(self.adapter_layer_names, (rows, columns), strict=True):
            shift = torch.zeros(size, len(self._columns(config)), **self._new_options())
            if not config.init_weights:
                nn.init.normal_(shift, std=RANDOM_STD)
            getattr(self, name)[adapter] = nn.Parameter(shift)

    def _low_rank(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        basis = self._basis(adapter, device)
        return low_rank_factors(basis, shifts=self._shifts(adapter, basis.left))

    def _linear_change(self, adapter: str, device: torch.device) -> LinearChange:
        left, singular_values, right = self._basis(adapter, device)
        assert singular_values is not None
        shifts = self._shifts(adapter, left)
        return LinearChange(SpectralALinearFunction, (left, singular_values, right, *shifts))

    def _shifts(self, adapter: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """A_U [out, r] and A_V [in, r] on the device and in the dtype of ``like``."""
        left = self.spectral_adapter_a_left[adapter]
        right = self.spectral_adapter_a_right[adapter]
        if left.device == like.device and left.dtype == right.dtype == like.dtype:
            return left, right
        return left.to(like), right.to(like)


class Linear(SpectralLinear, SpectralAdapterALayer):
    """Spectral Adapter A on linear layers, quantised ones included."""


class Conv(SpectralConv, SpectralAdapterALayer):
    """Spectral Adapter A on ``nn.Conv1d``, ``2d`` and ``3d``."""


class Embedding(SpectralEmbedding, SpectralAdapterALayer):
    """Spectral Adapter A on ``nn.Embedding``."""


class SpectralAdapterAModel(SpectralModel):
    """The PEFT model of Spectral Adapter A; see :class:`SpectralAdapterAConfig`."""

    prefix = SpectralAdapterALayer.prefix
    tuner_layer_cls = SpectralAdapterALayer
    linear_cls = Linear
    conv_cls = Conv
    embedding_cls = Embedding
    pattern_options = ("rank_pattern",)


register("spectral_adapter_a", SpectralAdapterAConfig, SpectralAdapterAModel)
