"""What Spectral Adapters A and R share as PEFT methods: r columns of the SVD."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import safe_open
from torch import nn

from spectral_adapters._validation import check_choice
from spectral_adapters.columns import random_columns
from spectral_adapters.decomposition import (
    ALGORITHMS,
    COLUMNS,
    ColumnFactorisation,
    select_columns,
)
from spectral_adapters.peft._config import SpectralConfig
from spectral_adapters.peft._folder import PREFIX, WEIGHTS
from spectral_adapters.peft._layer import SpectralLayer
from spectral_adapters.peft._model import (
    adapted_layers,
    check_patterns,
    check_rank_pattern,
    pattern_value,
)

#: Of columns by name.
CHOICES = (*COLUMNS, "random")


@dataclass
class ColumnConfig(SpectralConfig):
    """Which singular triples of a weight are adapted.

    Args:
        r: number of columns; None is 8, or the number of indices in ``columns``.
        columns: "top", "bottom", "random", or a list of indices counted from the largest singular
            value. "random" draws them evenly from all, for every module anew, by its name and the
            seed (:func:`spectral_adapters.columns.random_columns`).
        offset: leave out this many columns at the named end, so that several adapters can have
            columns of their own.
        rank_pattern: r for single modules, by name or regular expression, as in ``LoraConfig``.
        columns_pattern: lists of indices for single modules, by name or regular expression; goes
            before all of the above.
        seed: of random columns.
        algorithm: of the SVD, "randomized" or "full"
            (:func:`spectral_adapters.decomposition.decompose_columns`).

    Further arguments: :class:`SpectralConfig`.
    """

    r: int | None = field(default=None)
    columns: str | list[int] = field(default="top")
    offset: int = field(default=0)
    rank_pattern: dict[str, int] | None = field(default=None)
    columns_pattern: dict[str, list[int]] | None = field(default=None)
    seed: int = field(default=0)
    algorithm: str = field(default="randomized")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        if not isinstance(self.columns, str) and isinstance(self.columns, Iterable):
            self.columns = _indices("columns", self.columns)
        check_rank_pattern(self.rank_pattern)
        if self.rank_pattern is not None and not isinstance(self.columns, str):
            raise ValueError(
                f"rank_pattern must be None when columns holds indices; got {self.rank_pattern!r}"
            )
        self.columns_pattern = _columns_pattern(self.columns_pattern)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an int of at least 0; got {self.seed!r}")
        if isinstance(self.columns, str):
            check_choice("columns", self.columns, CHOICES)
        elif not isinstance(self.columns, list):
            raise TypeError(
                f"columns must be one of {', '.join(map(repr, CHOICES))} or hold ints; "
                f"got {self.columns!r}"
            )
        if self.columns == "random" and self.offset:
            raise ValueError(f"offset must be 0 with columns='random'; got {self.offset!r}")
        for r in (self.r, *(self.rank_pattern or {}).values()):
            # All but the weight's own rank can be checked here.
            self._select("", r, sys.maxsize)

    def r_for(self, name: str) -> int | None:
        """The number of columns for the module ``name``."""
        return pattern_value(self.rank_pattern, name, self.r)

    def columns_for(self, name: str, rank: int, r: int | None = None) -> tuple[int, ...]:
        """The columns of the module ``name``, whose weight has this rank.

        Args:
            name, rank: of the module.
            r: how many, where that is known; None: by ``r`` and ``rank_pattern``.
        """
        chosen = pattern_value(self.columns_pattern, name, None)
        if chosen is not None:
            return select_columns(chosen, None, rank)
        return self._select(name, self.r_for(name) if r is None else r, rank)

    def _select(self, name: str, r: int | None, rank: int) -> tuple[int, ...]:
        if self.columns != "random":
            return select_columns(self.columns, r, rank, self.offset)
        top = select_columns("top", r, rank)  # checks r
        return tuple(random_columns(name, rank, len(top), seed=self.seed))


class ColumnLayer(SpectralLayer):
    """Frozen: U1 [out, r], S1 [r] and V1^T [r, in] of the adapted columns."""

    is_low_rank = True

    def _columns(self, config: ColumnConfig) -> tuple[int, ...]:
        try:
            return config.columns_for(self.name, min(self._matrix_shape()))
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {error}; use rank_pattern or columns_pattern for single modules"
            ) from None

    def _factorisation(self, config: ColumnConfig) -> ColumnFactorisation:
        return ColumnFactorisation(self._columns(config), config.algorithm)

    def _rank(self, adapter: str) -> int:
        return len(self._columns(self.configs[adapter]))


def adapter_columns(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[int, ...]]:
    """The columns of an adapter of method A or R, by the name of the layer.

    Raises:
        ValueError: the model has no such adapter, or it is of another method.
    """
    found = {
        layer.name: layer._columns(layer.configs[adapter_name])
        for layer in adapted_layers(model, adapter_name)
        if isinstance(layer, ColumnLayer)
    }
    if not found:
        raise ValueError(
            "adapter_name must be an adapter of Spectral Adapter A or R of this model; "
            f"got {adapter_name!r}"
        )
    return found


def saved_columns(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """The columns of a saved adapter of method A, by the name of the layer, without its base.

    Args:
        directory: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: it holds an adapter of another method.
    """
    config: Any = PeftConfig.from_pretrained(str(directory))
    if getattr(config, "method", None) != "SPECTRAL_ADAPTER_A":
        raise ValueError(
            f"directory must hold an adapter of SPECTRAL_ADAPTER_A; {directory} has one of "
            f"{getattr(config.peft_type, 'value', config.peft_type)}"
        )
    found = {}
    with safe_open(str(Path(directory) / WEIGHTS), framework="pt") as file:
        for key in sorted(file.keys()):
            name, mark, _ = key.removeprefix(PREFIX).partition(".spectral_adapter_a_left")
            if mark:
                rows, r = file.get_slice(key).get_shape()
                columns = file.get_slice(key.replace(mark, ".spectral_adapter_a_right"))
                rank = min(rows, columns.get_shape()[0])
                found[name] = config.columns_for(name, rank, r)
    return found


def _columns_pattern(value: Any) -> dict[str, list[int]] | None:
    """Patterns of names with lists of different indices, which JSON can hold."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(
            f"columns_pattern must be a dict from module names to lists of ints; got {value!r}"
        )
    check_patterns("columns_pattern", value)
    return {
        pattern: _indices(f"columns_pattern[{pattern!r}]", columns)
        for pattern, columns in value.items()
    }


def _indices(argument: str, columns: Any) -> list[int]:
    """Different indices as a list; the rank that bounds them is not known here."""
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise TypeError(f"{argument} must hold ints; got {columns!r}")
    found = list(columns)
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{argument} must hold ints; got {index!r}")
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"{argument} must hold different indices of at least 0; got {found!r}")
    return found
