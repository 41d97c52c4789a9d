"""Which kernel takes which factor sizes, and with what launch parameters. Pure Python, no Triton.

One table per kernel, one row per shape class, instead of ``@triton.autotune``: tuning cannot run
in the interpreter and repeats for every shape. The rows were chosen by what the compiled kernels
need on sm_80, sm_90 and sm_100 (docs/kernels.md), none of which spills; they were not timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from math import prod
from typing import Any

import torch

# Plain fp32 multiply-adds. TF32 would cost 13 mantissa bits of every rotation, which would then no
# longer be orthogonal to fp32 rounding; the split variants (tf32x3) have not been timed yet.
DOT_PRECISION = "ieee"

# tl.dot contracts at least 16 values, so that is the smallest padded axis and the loops' step.
MIN_AXIS = 16
CHUNK = 16

# Merged neighbours and contracted register axes stay within this size; beyond it an operator tile
# no longer pays (merging) or no longer fits (contracting in registers).
MAX_AXIS = 128

# Padded elements of the trailing axes; a step, [16, 1024] in fp32, is 64 KiB of shared memory.
MAX_INNER = 1024

# Programs that may share the sums of one chunk of tokens; each holds a block of every Gram's rows.
MAX_BLOCKS = MIN_AXIS

# Loading a chunk costs about as much as this many multiply-adds per element (counted in SASS).
LOAD_COST = 32

# Partial Grams: enough programs to fill a 148-SM device three times over, and not so many that
# their partial sums outweigh the pass. Fixed, so that the bits do not depend on the device's size.
MAX_GRAM_PROGRAMS = 512
MIN_GRAM_TOKENS = 8

# Elements of a and of b that pass through all sums before the next; few enough for the first cache.
GRAM_CHUNK = 4096
MAX_CHUNK_TOKENS = 64

# A pass that adds a change of this rank still waits for memory, not for its arithmetic.
MAX_RANK = 64

# Columns of the change whose loads may be in flight together, best first.
LOW_RANK_STEPS = (4, 2, 1)

LOW_RANK_OPS = tuple(
    f"{stem}_{direction}"
    for stem in ("low_rank_linear", "spectral_a_linear", "spectral_r_linear")
    for direction in ("fwd", "bwd")
)

_Table = tuple[tuple[tuple[int | None, ...], tuple[Any, ...]], ...]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch(ABC):
    """What Triton itself is told; ``constants`` are the kernel's own constexpr arguments."""

    num_warps: int
    num_stages: int
    max_registers: int | None

    @abstractmethod
    def constants(self) -> dict[str, Any]: ...

    def options(self) -> dict[str, Any]:
        # Triton 3.9 warns where fusing multiply and add is left to its default.
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True)
class TileLaunch(Launch):
    """One-pass rotation of two or three axes, ``block x tokens x inner axes`` per program."""

    sizes: tuple[int, int, int]
    padded: tuple[int, int, int]
    tokens: int
    block: int

    def constants(self) -> dict[str, Any]:
        n1, n2, n3 = self.sizes
        return {
            "N1": n1,
            "N2": n2,
            "N3": n3,
            "P2": self.padded[1],
            "P3": self.padded[2],
            "TOKENS": self.tokens,
            "BLOCK": self.block,
            "STEP": CHUNK,
            "PRECISION": DOT_PRECISION,
        }


@dataclass(frozen=True)
class AxisLaunch(Launch):
    """One contracted axis of rows seen as ``[lead, n, inner]``: ``rows x columns`` per program."""

    lead: int
    n: int
    inner: int
    rows: int
    columns: int

    def constants(self) -> dict[str, Any]:
        return {
            "LEAD": self.lead,
            "N": self.n,
            "INNER": self.inner,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "STEP": CHUNK,
            "PRECISION": DOT_PRECISION,
        }


@dataclass(frozen=True)
class RotatePlan:
    """``groups[g]`` factors are merged into one operator; ``passes`` are launched in order.

    A tile pass contracts all groups; an axis pass contracts ``groups[g]`` for its own ``g``.
    """

    groups: tuple[tuple[int, ...], ...]
    passes: tuple[TileLaunch, ...] | tuple[AxisLaunch, ...]


@dataclass(frozen=True)
class LowRankLaunch(Launch):
    """A change of rank r added to a matrix: a tile ``rows x columns`` of it per program."""

    r: int
    rows: int
    columns: int

    def constants(self) -> dict[str, Any]:
        # A divisor of r, so that no column needs a mask, and at least two turns of the loop: with
        # masks, and with all loads of a single turn in flight, the registers do not suffice.
        fits = (n for n in LOW_RANK_STEPS if self.r % n == 0 and n < self.r)
        step = next(fits, 1)
        return {"R": self.r, "ROWS": self.rows, "COLUMNS": self.columns, "STEP": step}


@dataclass(frozen=True)
class TurnLaunch(Launch):
    """The thin side of a change times its middle [r, r]: ``rows`` of it per program."""

    r: int
    rows: int

    def constants(self) -> dict[str, Any]:
        return {"R": self.r, "PADDED": pad(self.r), "ROWS": self.rows, "PRECISION": DOT_PRECISION}


@dataclass(frozen=True)
class GramPlan(Launch):
    """All Grams and the column sums in one pass: ``blocks`` programs share each chunk of tokens."""

    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, int, int]
    padded: tuple[int, int, int]
    columns: int
    blocks: int
    rows: int
    tokens: int

    def constants(self) -> dict[str, Any]:
        n1, n2, n3 = self.sizes
        p1, p2, p3 = self.padded
        return {
            "N1": n1,
            "N2": n2,
            "N3": n3,
            "P1": p1,
            "P2": p2,
            "P3": p3,
            "COLUMNS": self.columns,
            "BLOCKS": self.blocks,
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "STEP": CHUNK,
            "PRECISION": DOT_PRECISION,
        }


@dataclass(frozen=True)
class StiefelLaunch(Launch):
    """One optimizer step of one matrix per program, in tiles ``[tile, tile]``."""

    tile: int

    def constants(self) -> dict[str, Any]:
        return {"TILE": self.tile, "STEP": CHUNK, "PRECISION": DOT_PRECISION}


# Launch options: num_warps, num_stages and a limit of registers per thread or None. The limit does
# not press registers down: left alone, the assembler may spill a few to fit one more program on a
# multiprocessor, and a limit above what it needs keeps it from that.

# padded trailing axes up to, padded elements per token up to ->
# padded elements per program, options
_TILE_TABLE: _Table = (
    ((256, 2048), (2048, 4, 2, None)),
    ((256, None), (4096, 8, 2, None)),
    ((None, None), (4096, 16, 1, None)),
)

# padded axis up to -> rows per program, columns per program, options
_AXIS_TABLE: _Table = (
    ((16,), (128, 16, 4, 2, None)),
    ((32,), (64, 32, 4, 2, None)),
    ((64,), (32, 64, 4, 2, None)),
    ((None,), (32, 128, 8, 2, None)),
)

# axes up to, sums up to -> sums per program, options
_GRAM_TABLE: _Table = (
    ((2, 2048), (2048, 2, 2, None)),
    ((2, 4096), (4096, 4, 2, None)),
    ((2, 8192), (8192, 8, 2, 255)),
    ((2, 16384), (4096, 8, 2, None)),
    ((2, None), (8192, 8, 2, 255)),
    ((3, 8192), (8192, 8, 2, None)),
    ((3, None), (8192, 16, 2, 128)),
)

# size up to -> tile, options. The registers of a tile of 64 leave one program per multiprocessor,
# those of 32 leave four.
_STIEFEL_TABLE: _Table = (
    ((16,), (16, 2, 1, None)),
    ((64,), (32, 4, 1, 128)),
    ((None,), (64, 8, 1, None)),
)


# rows and columns per program, options: 32 sums per thread whatever the rank
_LOW_RANK_LAUNCH = (32, 128, 4, 1, None)

# padded rank up to -> rows per program, options
_TURN_TABLE: _Table = (
    ((16,), (64, 4, 1, None)),
    ((32,), (32, 4, 1, None)),
    ((None,), (32, 8, 1, None)),
)


def supports(op: str, dtypes: Sequence[torch.dtype], dims: Sequence[int]) -> tuple[bool, str]:
    """Whether the Triton kernels take this call, and in one sentence why (not).

    Args:
        op: ``"kron_rotate"``, ``"kron_gram"``, ``"stiefel"`` or one of ``LOW_RANK_OPS``.
        dtypes: of ``x`` (and the factors), of ``a`` and ``b``, or of a factor.
        dims: the factor sizes, outermost first, or the size of the one factor, or the one rank r.
    """
    if not dims or min(dims) < 1:
        return False, f"factor sizes must be at least 1 each, got {tuple(dims)}"
    for dtype in dtypes:
        if dtype not in SUPPORTED_DTYPES:
            return False, f"{dtype} runs on the reference: the kernels accumulate in float32"
    dims = tuple(dims)
    if op == "kron_rotate":
        passes = plan_rotate(dims).passes
        if len(passes) == 1:
            return True, "one pass"
        return True, f"{len(passes)} passes, one per axis: the row does not fit one program"
    if op == "kron_gram":
        if max(dims) > MAX_AXIS:
            return False, f"a factor above {MAX_AXIS} runs on the reference, got {dims}"
        if plan_gram(dims) is None:
            return False, f"the sums of {dims} do not fit the registers of {MAX_BLOCKS} programs"
        return True, "one pass"
    if op == "stiefel":
        if dtypes[0] != torch.float32:
            return False, f"{dtypes[0]} runs on the reference: factors are float32 in the kernel"
        if dims[0] > MAX_AXIS:
            return False, f"a factor above {MAX_AXIS} runs on the reference, got {dims[0]}"
        return True, "one program"
    if op in LOW_RANK_OPS:
        if max(dims) > MAX_RANK:
            return False, f"ranks above {MAX_RANK} run on the reference, got {max(dims)}"
        return True, "one pass over the base product"
    ops = ", ".join(("kron_rotate", "kron_gram", "stiefel", *LOW_RANK_OPS))
    raise ValueError(f"op must be one of {ops}; got {op!r}")


def pad(n: int) -> int:
    """The next power of two, at least ``MIN_AXIS``."""
    return max(MIN_AXIS, _power_of_two(n))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _row(table: _Table, *sizes: int) -> tuple[Any, ...]:
    """The first row whose limits hold ``sizes``; the last row of a table has none."""
    for limits, row in table:
        if all(limit is None or size <= limit for limit, size in zip(limits, sizes, strict=True)):
            return row
    raise LookupError(f"no row for {sizes}")


def _partitions(dims: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Contiguous partitions into at most three groups; merged groups stay within ``MAX_AXIS``."""
    f = len(dims)
    for count in range(min(f, 3)):
        for cuts in combinations(range(1, f), count):
            edges = (0, *cuts, f)
            groups = tuple(dims[i:j] for i, j in pairwise(edges))
            if all(len(group) == 1 or prod(group) <= MAX_AXIS for group in groups):
                yield groups


def _three_axes(
    groups: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Sizes and padded sizes of up to three axes; an axis that is not there is 1 in both."""
    sizes = [prod(group) for group in groups]
    n1, n2, n3 = (*sizes, 1, 1)[:3]
    p1, p2, p3 = (*(pad(n) for n in sizes), 1, 1)[:3]
    return (n1, n2, n3), (p1, p2, p3)


@lru_cache(maxsize=1024)
def plan_rotate(dims: tuple[int, ...]) -> RotatePlan:
    """The cheapest way through: one pass if any grouping of the factors fits, else one per axis."""
    options = []
    for groups in _partitions(dims):
        first, *inner = [pad(prod(group)) for group in groups]
        if len(groups) > 1 and (max(inner) > MAX_AXIS or prod(inner) > MAX_INNER):
            continue
        # The first axis is contracted in a loop and padded to its step, the others in registers.
        steps = -(-prod(groups[0]) // CHUNK)
        contracted = steps * CHUNK + sum(inner) + LOAD_COST * len(groups)
        options.append((first * prod(inner) * contracted, -len(groups), groups))
    if not options:
        return _chain(dims)
    groups = min(options)[2]
    if len(groups) == 1:
        return RotatePlan(groups, (_axis_launch(1, prod(dims), 1),))
    return RotatePlan(groups, (_tile_launch(groups),))


def _tile_launch(groups: tuple[tuple[int, ...], ...]) -> TileLaunch:
    sizes, padded = _three_axes(groups)
    inner = padded[1] * padded[2]
    elements, warps, stages, registers = _row(_TILE_TABLE, inner, padded[0] * inner)
    block = max(1, min(padded[0], elements // inner))
    tokens = max(1, elements // (block * inner))
    return TileLaunch(warps, stages, registers, sizes, padded, tokens, block)


def _chain(dims: tuple[int, ...]) -> RotatePlan:
    """One pass per axis, neighbours merged while they stay small; last axis first."""
    groups: list[tuple[int, ...]] = []
    for n in dims:
        if groups and prod(groups[-1]) * n <= MAX_AXIS // 2:
            groups[-1] = (*groups[-1], n)
        else:
            groups.append((n,))
    sizes = [prod(group) for group in groups]
    passes = tuple(
        _axis_launch(prod(sizes[:axis]), sizes[axis], prod(sizes[axis + 1 :]))
        for axis in reversed(range(len(sizes)))
    )
    return RotatePlan(tuple(groups), passes)


def _axis_launch(lead: int, n: int, inner: int) -> AxisLaunch:
    rows, columns, warps, stages, registers = _row(_AXIS_TABLE, pad(n))
    return AxisLaunch(warps, stages, registers, lead, n, inner, rows, columns)


@lru_cache(maxsize=1024)
def plan_gram(dims: tuple[int, ...]) -> GramPlan | None:
    """The cheapest grouping into at most three axes, or None where no grouping fits."""
    k = prod(dims)
    options = []
    for groups in _partitions(dims):
        lengths = [prod(group) for group in groups]
        if max(lengths) <= MAX_AXIS:
            cost = sum(k // n * pad(n) * (pad(n) + LOAD_COST) for n in lengths)
            options.append((cost, -len(groups), groups))
    if not options:
        return None
    groups = min(options)[2]
    sizes, padded = _three_axes(groups)
    sums = sum(n * n for n in padded if n > 1) + _power_of_two(k)
    held, warps, stages, registers = _row(_GRAM_TABLE, len(groups), sums)
    blocks = _power_of_two(-(-sums // held))
    if blocks > MAX_BLOCKS:
        return None
    tokens = min(max(1, GRAM_CHUNK // _power_of_two(k)), MAX_CHUNK_TOKENS)
    columns = _power_of_two(-(-k // blocks))
    rows = min(max(1, GRAM_CHUNK // 4 // columns), tokens)
    return GramPlan(warps, stages, registers, groups, sizes, padded, columns, blocks, rows, tokens)


@lru_cache(maxsize=1024)
def plan_stiefel(n: int) -> StiefelLaunch:
    """The launch for matrices of size ``n``, up to ``MAX_AXIS``."""
    tile, warps, stages, registers = _row(_STIEFEL_TABLE, n)
    return StiefelLaunch(warps, stages, registers, tile)


@lru_cache(maxsize=1024)
def plan_low_rank(r: int) -> LowRankLaunch:
    """The tile of a program for a change of rank r (of two terms of rank r for Adapter A)."""
    rows, columns, warps, stages, registers = _LOW_RANK_LAUNCH
    return LowRankLaunch(warps, stages, registers, r, rows, columns)


@lru_cache(maxsize=1024)
def plan_turn(r: int) -> TurnLaunch:
    """The rows of a program that multiplies the thin side by the middle of Adapter R."""
    rows, warps, stages, registers = _row(_TURN_TABLE, pad(r))
    return TurnLaunch(warps, stages, registers, r, rows)
