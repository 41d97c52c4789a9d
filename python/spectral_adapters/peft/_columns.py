"""What Spectral Adapters A and R share as PEFT methods: r columns of the SVD."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from spectral_adapters._validation import check_choice
from spectral_adapters.decomposition import (
    ALGORITHMS,
    ColumnFactorisation,
    select_columns,
)
from spectral_adapters.peft._config import SpectralConfig
from spectral_adapters.peft._layer import SpectralLayer
from spectral_adapters.peft._model import check_rank_pattern, pattern_value


@dataclass
class ColumnConfig(SpectralConfig):
    """Which singular triples of a weight are adapted.

    Args:
        r: number of columns; None is 8, or the number of indices in ``columns``.
        columns: "top", "bottom", or a list of indices counted from the largest singular value.
        offset: leave out this many columns at the named end, so that several adapters can have
            columns of their own.
        rank_pattern: r for single modules, by name or regular expression, as in ``LoraConfig``.
        algorithm: of the SVD, "randomized" or "full"
            (:func:`spectral_adapters.decomposition.decompose_columns`).

    Further arguments: :class:`SpectralConfig`.
    """

    r: int | None = field(default=None)
    columns: str | list[int] = field(default="top")
    offset: int = field(default=0)
    rank_pattern: dict[str, int] | None = field(default=None)
    algorithm: str = field(default="randomized")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        if not isinstance(self.columns, str) and isinstance(self.columns, Iterable):
            self.columns = list(self.columns)
        check_rank_pattern(self.rank_pattern)
        if self.rank_pattern is not None and not isinstance(self.columns, str):
            raise ValueError(
                f"rank_pattern must be None when columns holds indices; got {self.rank_pattern!r}"
            )
        for r in (self.r, *(self.rank_pattern or {}).values()):
            # All but the weight's own rank can be checked here.
            select_columns(self.columns, r, sys.maxsize, self.offset)

    def r_for(self, name: str) -> int | None:
        """The number of columns for the module ``name``."""
        return pattern_value(self.rank_pattern, name, self.r)


class ColumnLayer(SpectralLayer):
    """Frozen: U1 [out, r], S1 [r] and V1^T [r, in] of the adapted columns."""

    is_low_rank = True

    def _columns(self, config: ColumnConfig) -> tuple[int, ...]:
        rank = min(self._matrix_shape())
        try:
            return select_columns(config.columns, config.r_for(self.name), rank, config.offset)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; use rank_pattern for single modules") from None

    def _factorisation(self, config: ColumnConfig) -> ColumnFactorisation:
        return ColumnFactorisation(self._columns(config), config.algorithm)

    def _rank(self, adapter: str) -> int:
        return len(self._columns(self.configs[adapter]))
