"""Spectral Adapter A as a PEFT method: chosen singular vectors are shifted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from spectral_adapters.autograd import SpectralALinearFunction
from spectral_adapters.columns import check_disjoint
from spectral_adapters.decomposition import Fingerprint
from spectral_adapters.functional import low_rank_factors
from spectral_adapters.peft._columns import ColumnConfig, ColumnLayer, adapter_columns
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
    2r; exactly a LoRA of rank 2r when trained. The default is the top columns, as published; on two
    of three tasks ``columns="random"`` was ahead of them, on the third level (docs/results.md).

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

    @torch.no_grad()
    def combine(self, terms: Sequence[tuple[float, str]], adapter: str) -> None:
        """``(U + sum of weight * A_U) S (V + sum of weight * A_V)^T`` on the columns of all.

        The frozen columns are those that the others were trained on: a decomposition of their union
        need not give the same ones to the last digit.
        """
        device = self._base_weight.device
        columns = self._columns(self.configs[adapter])
        blocks = [self._columns(self.configs[name]) for _, name in terms]
        bases = [self._basis(name, device) for _, name in terms]
        # Of those that share a column, the first one's.
        owned = [column for block in blocks for column in block]
        chosen = torch.tensor([owned.index(column) for column in columns], device=device)
        values = torch.cat([cast(Tensor, basis.singular_values) for basis in bases])
        frozen = self._factors[adapter]
        frozen.left = torch.cat([basis.left for basis in bases], 1)[:, chosen]
        frozen.singular_values = values[chosen]
        frozen.right = torch.cat([basis.right for basis in bases])[chosen]
        fingerprint = Fingerprint.of(self._base_matrix(), frozen.on(device))
        self._fingerprints[adapter] = fingerprint.to_tensor().to(device)
        for name in self.adapter_layer_names:
            shifts = getattr(self, name)
            total = shifts[adapter]
            for (weight, other), block in zip(terms, blocks, strict=True):
                place = torch.tensor([columns.index(c) for c in block], device=total.device)
                total.index_add_(1, place, weight * shifts[other].to(total))

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
    pattern_options = ("rank_pattern", "columns_pattern")
    combination = "spectral"
    combination_options = ("allow_overlap",)

    @classmethod
    def _combined_config(
        cls,
        model: nn.Module,
        configs: Mapping[str, SpectralAdapterAConfig],
        *,
        allow_overlap: bool = False,
    ) -> SpectralAdapterAConfig:
        blocks = {name: adapter_columns(model, name) for name in configs}
        if not allow_overlap:
            check_disjoint(blocks)
        joined: dict[str, list[int]] = {}
        # Longer names first: the pattern "0" is also one for "blocks.0".
        for layer in sorted({n for found in blocks.values() for n in found}, key=len, reverse=True):
            union = dict.fromkeys(c for found in blocks.values() for c in found.get(layer, ()))
            joined[re.escape(layer)] = list(union)
        lists = list(joined.values())
        same = all(columns == lists[0] for columns in lists)
        return replace(
            next(iter(configs.values())),
            r=None,
            columns=lists[0] if same else "top",
            offset=0,
            rank_pattern=None,
            columns_pattern=None if same else joined,
            init_weights=True,
            # The frozen columns are taken from the adapters, and travel along.
            save_factors=True,
            inference_mode=True,
        )


register("spectral_adapter_a", SpectralAdapterAConfig, SpectralAdapterAModel)
