"""LiDB as a PEFT method: a LoRA inside frozen random subspaces, the smallest baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_adapters.decomposition import RandomFactorisation
from spectral_adapters.peft._config import RANDOM_STD, SpectralConfig
from spectral_adapters.peft._layer import (
    SpectralConv,
    SpectralEmbedding,
    SpectralLayer,
    SpectralLinear,
)
from spectral_adapters.peft._model import SpectralModel, check_rank_pattern, pattern_value
from spectral_adapters.peft._registration import register


@dataclass
class LiDBConfig(SpectralConfig):
    """Lightweight DreamBooth: ``W' = W0 + A_aux A B B_aux`` with frozen orthonormal A_aux, B_aux.

    Ruiz et al., "HyperDreamBooth", CVPR 2024. Trained are A [a, r] and B [r, b]; B starts at zero.
    The frozen matrices come from a seed, not from the weight: an adapter loads on any base of the
    same shape.

    Args:
        r: rank of the change.
        a, b: dimensions of the frozen subspaces of the outputs and inputs; at most out and in are
            used.
        seed: of the frozen matrices.
        rank_pattern: r for single modules, by name or regular expression, as in ``LoraConfig``.

    Further arguments: :class:`SpectralConfig`.
    """

    method: ClassVar[str] = "LIDB"

    r: int = field(default=1)
    a: int = field(default=50)
    b: int = field(default=100)
    seed: int = field(default=0)
    rank_pattern: dict[str, int] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("a", 1), ("b", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}; got {value!r}")
        check_rank_pattern(self.rank_pattern)

    def r_for(self, name: str) -> int:
        """The rank for the module ``name``."""
        return pattern_value(self.rank_pattern, name, self.r)


class LiDBLayer(SpectralLayer):
    """Trained: ``lidb_a`` A [a, r] and ``lidb_b`` B [r, b]."""

    prefix = "lidb_"
    adapter_layer_names = ("lidb_a", "lidb_b")
    is_low_rank = True

    lidb_a: nn.ParameterDict
    lidb_b: nn.ParameterDict

    def _add_parameters(self, adapter: str, config: LiDBConfig) -> None:
        shapes = self._factorisation(config).shapes(*self._matrix_shape())
        r = config.r_for(self.name)
        left = torch.empty(shapes["left"][1], r, **self._new_options())
        nn.init.normal_(left, std=left.shape[0] ** -0.5)
        right = torch.zeros(r, shapes["right"][0], **self._new_options())
        if not config.init_weights:
            nn.init.normal_(right, std=RANDOM_STD)
        self.lidb_a[adapter], self.lidb_b[adapter] = nn.Parameter(left), nn.Parameter(right)

    def _factorisation(self, config: LiDBConfig) -> RandomFactorisation:
        return RandomFactorisation(config.a, config.b, config.seed)

    def _rank(self, adapter: str) -> int:
        return self.configs[adapter].r_for(self.name)

    def _changes_nothing(self, trained: Sequence[Tensor]) -> bool:
        return not all(bool(values.any()) for values in trained)

    @torch.no_grad()
    def combine(self, terms: Sequence[tuple[float, str]], adapter: str) -> None:
        """A and B of the others side by side, A times the weights; zero for those not here."""
        a, b = self.lidb_a[adapter], self.lidb_b[adapter]
        start = 0
        for weight, name in terms:
            end = start + self.r[name]
            a[:, start:end] = weight * self.lidb_a[name].to(a)
            b[start:end] = self.lidb_b[name].to(b)
            start = end

    def _low_rank(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        left, _, right = self._basis(adapter, device)
        a, b = self.lidb_a[adapter].to(device), self.lidb_b[adapter].to(device)
        # The frozen ones are in fp32, what is trained in fp64 on an fp64 base.
        dtype = torch.promote_types(left.dtype, a.dtype)
        return b.to(dtype) @ right.to(dtype), left.to(dtype) @ a.to(dtype)


class Linear(SpectralLinear, LiDBLayer):
    """LiDB on linear layers, quantised ones included."""


class Conv(SpectralConv, LiDBLayer):
    """LiDB on ``nn.Conv1d``, ``2d`` and ``3d``."""


class Embedding(SpectralEmbedding, LiDBLayer):
    """LiDB on ``nn.Embedding``."""


class LiDBModel(SpectralModel):
    """The PEFT model of LiDB; see :class:`LiDBConfig`."""

    prefix = LiDBLayer.prefix
    tuner_layer_cls = LiDBLayer
    linear_cls = Linear
    conv_cls = Conv
    embedding_cls = Embedding
    pattern_options = ("rank_pattern",)

    @classmethod
    def _combined_config(cls, model: nn.Module, configs: Mapping[str, LiDBConfig]) -> LiDBConfig:
        patterns = [config.rank_pattern for config in configs.values()]
        if any(patterns):
            raise ValueError(
                "adapters must have rank_pattern=None, or their sum is no LIDB adapter; got "
                f"{patterns}"
            )
        frozen = {(config.a, config.b, config.seed) for config in configs.values()}
        if len(frozen) > 1:
            raise ValueError(
                "adapters must have equal a, b and seed, or their sum is no LIDB adapter; got "
                f"{sorted(frozen)}"
            )
        r = sum(config.r for config in configs.values())
        return replace(next(iter(configs.values())), r=r, init_weights=True)


register("lidb", LiDBConfig, LiDBModel)
