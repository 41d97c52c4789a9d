"""``stiefel_sgd_`` and ``stiefel_adam_`` on Triton: one program steps one matrix, start to end.

A model's factors lie anywhere in memory, so the kernel reads their addresses from a table, one row
per matrix. All matrices of one class of sizes are one launch, whatever their number.

A program goes over its matrix in tiles, phase by phase: what a phase makes lies in the factor or in
a scratch of the program's own, which stay in the caches, and the next phase reads it behind a
barrier. Only so does a matrix of 128 fit the registers.
"""

# Kernel arguments are traced values, which have no Python types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.ops.stiefel import (
    LONGEST_STEP,
    SHORTEST_BOUND,
    adam_bound,
    check_stiefel,
    stiefel_adam_reference,
    stiefel_sgd_reference,
)
from spectral_kernels.triton_kernels._host import on_device
from spectral_kernels.triton_kernels._launch import (
    MAX_AXIS,
    StiefelLaunch,
    plan_stiefel,
    supports,
)

#: int64 per row of the table: addresses of factor, gradient, velocity, square and step count (0 for
#: what there is not), then n, the first element of its scratch, and whether the row is its tensor's
#: first. The table of every launch starts at a multiple of 16 bytes.
COLUMNS = 8

#: Step counts that one program counts up.
COUNT_BLOCK = 128

# Host sides of the tables that a CUDA graph copies again at every replay; it does not keep them.
_CAPTURED: list[Tensor] = []


@triton.jit
def _product(
    acc,
    left_ptr,
    right_ptr,
    i0,
    j0,
    n,
    TRANSPOSE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the tile at (i0, j0) of ``L @ R``, or of ``L^T @ R``; [n, n] in memory."""
    i = i0 + tl.arange(0, TILE)[:, None]
    j = j0 + tl.arange(0, TILE)[None, :]
    for k0 in tl.range(0, n, STEP):
        k = k0 + tl.arange(0, STEP)
        depth = k[None, :]
        left_offset = depth * n + i if TRANSPOSE else i * n + depth
        left = tl.load(left_ptr + left_offset, mask=(i < n) & (depth < n), other=0.0)
        depth = k[:, None]
        right = tl.load(right_ptr + depth * n + j, mask=(depth < n) & (j < n), other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _scaled_product(
    out_ptr,
    base_ptr,
    left_ptr,
    right_ptr,
    scale,
    n,
    TRANSPOSE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = scale (L @ R)``, or ``scale (L^T @ R)``, or with a base ``scale base + L @ R``; all
    [n, n] in memory, and ``out`` none of the others. Ends with a barrier."""
    for i0 in tl.range(0, n, TILE):
        for j0 in tl.range(0, n, TILE):
            i = i0 + tl.arange(0, TILE)[:, None]
            j = j0 + tl.arange(0, TILE)[None, :]
            live = (i < n) & (j < n)
            acc = tl.zeros([TILE, TILE], tl.float32)
            if base_ptr is not None:
                acc += scale * tl.load(base_ptr + i * n + j, mask=live, other=0.0)
            acc = _product(acc, left_ptr, right_ptr, i0, j0, n, TRANSPOSE, TILE, STEP, PRECISION)
            if base_ptr is None:
                acc *= scale
            tl.store(out_ptr + i * n + j, acc, mask=live)
    tl.debug_barrier()


@triton.jit
def _sum_diagonal(gram_ptr, y_ptr, scale, n, TILE: tl.constexpr):
    """The diagonal of ``scale Y^T Y``, summed in float64: near the identity a column holds one
    entry of 1 and small ones whose squares an fp32 sum that has the 1 already loses. Ends with a
    barrier."""
    for j0 in tl.range(0, n, TILE):
        j = j0 + tl.arange(0, TILE)
        sums = tl.zeros([TILE], tl.float64)
        for i0 in tl.range(0, n, TILE):
            i = i0 + tl.arange(0, TILE)[:, None]
            live = (i < n) & (j[None, :] < n)
            y = tl.load(y_ptr + i * n + j[None, :], mask=live, other=0.0).to(tl.float64)
            sums += tl.sum(y * y, axis=0)
        tl.store(gram_ptr + j * n + j, scale * sums.to(tl.float32), mask=j < n)
    tl.debug_barrier()


@triton.jit
def _address(row_ptr, COLUMN: tl.constexpr):
    return tl.load(row_ptr + COLUMN).to(tl.pointer_type(tl.float32))


@triton.jit
def _unbias(log_beta, count):
    """``1 - beta^count``; in float64, for it cancels where beta is near one."""
    return (1.0 - tl.exp(log_beta * count.to(tl.float64))).to(tl.float32)


@triton.jit
def _stiefel_kernel(
    table_ptr,
    scratch_ptr,
    gradient,
    keep,
    mix,
    keep_square,
    mix_square,
    log_beta1,
    log_beta2,
    eps,
    rate,
    bound,
    ADAM: tl.constexpr,
    VELOCITY: tl.constexpr,
    LONGEST: tl.constexpr,
    SHORTEST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From ``A = X^T G``: ``g = gradient (A - A^T)``, ``Y <- keep Y - mix g``, and for Adam
    ``p <- keep_square p + mix_square g*g``; ``xi = rate Y``, for Adam over its denominators, is
    shortened to ``bound (n - 1)`` and ``X <- polar(X (I + xi))``."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    x_ptr = _address(row_ptr, 0)
    grad_ptr = _address(row_ptr, 1)
    n = tl.load(row_ptr + 5).to(tl.int32)
    small_ptr = scratch_ptr + tl.load(row_ptr + 6)
    y_ptr = small_ptr + n * n

    # xi, and its largest column sum: in a skew matrix columns have the sums of rows, which no
    # spectral norm exceeds.
    reach = tl.full([], 0.0, tl.float32)
    for j0 in tl.range(0, n, TILE):
        sums = tl.zeros([TILE], tl.float32)
        for i0 in tl.range(0, n, TILE):
            i = i0 + tl.arange(0, TILE)[:, None]
            j = j0 + tl.arange(0, TILE)[None, :]
            live = (i < n) & (j < n)
            entry = i * n + j
            # The tile of A^T = G^T X is a product as well: the tile of A at (j0, i0) may be another
            # one, and not made yet.
            a = tl.zeros([TILE, TILE], tl.float32)
            a = _product(a, grad_ptr, x_ptr, i0, j0, n, True, TILE, STEP, PRECISION)
            a = _product(-a, x_ptr, grad_ptr, i0, j0, n, True, TILE, STEP, PRECISION)
            skew = gradient * a
            if VELOCITY:
                velocity_ptr = _address(row_ptr, 2) + entry
                velocity = keep * tl.load(velocity_ptr, mask=live, other=0.0) - mix * skew
                tl.store(velocity_ptr, velocity, mask=live)
            else:
                velocity = -skew
            if ADAM:
                square_ptr = _address(row_ptr, 3) + entry
                square = keep_square * tl.load(square_ptr, mask=live, other=0.0)
                square += mix_square * (skew * skew)
                tl.store(square_ptr, square, mask=live)
                count = tl.load(_address(row_ptr, 4))
                root = tl.sqrt_rn(square / _unbias(log_beta2, count)) + eps
                xi = rate * ((velocity / _unbias(log_beta1, count)) / root)
            else:
                xi = rate * velocity
            xi = tl.where(live, xi, 0.0)
            tl.store(small_ptr + entry, xi, mask=live)
            sums += tl.sum(tl.abs(xi), axis=0)
        reach = tl.maximum(reach, tl.max(sums, axis=0))
    tl.debug_barrier()

    longest = tl.minimum(tl.maximum(bound * (n - 1), SHORTEST), LONGEST)
    shorten = longest / tl.maximum(reach, longest)
    for i0 in tl.range(0, n, TILE):
        for j0 in tl.range(0, n, TILE):
            i = i0 + tl.arange(0, TILE)[:, None]
            j = j0 + tl.arange(0, TILE)[None, :]
            live = (i < n) & (j < n)
            acc = tl.zeros([TILE, TILE], tl.float32)
            acc = _product(acc, x_ptr, small_ptr, i0, j0, n, False, TILE, STEP, PRECISION)
            acc = acc * shorten + tl.load(x_ptr + i * n + j, mask=live, other=0.0)
            tl.store(y_ptr + i * n + j, acc, mask=live)
    tl.debug_barrier()

    # Newton-Schulz scaled for singular values in [low, high], as in the reference. What that must
    # assume of xi beforehand is known here, and may need fewer iterations.
    reach64 = tl.minimum(reach, longest).to(tl.float64)
    low = tl.full([], 1.0, tl.float64)
    high = tl.sqrt(1.0 + reach64 * reach64)
    missing = tl.full([], 1.0, tl.float64)
    while missing > TOLERANCE:
        scale = tl.sqrt(3.0 / (low * low + low * high + high * high))
        linear = (1.5 * scale).to(tl.float32)
        cubic = (-0.5 * scale * scale * scale).to(tl.float32)
        _scaled_product(
            small_ptr, None, y_ptr, y_ptr, cubic, n, True, TILE, STEP, PRECISION
        )  # fmt: skip
        _sum_diagonal(small_ptr, y_ptr, cubic, n, TILE)
        _scaled_product(
            x_ptr, y_ptr, y_ptr, small_ptr, linear, n, False, TILE, STEP, PRECISION
        )  # fmt: skip
        before_ptr = y_ptr
        y_ptr = x_ptr
        x_ptr = before_ptr
        low = 0.5 * scale * low * (3.0 - scale * low * scale * low)
        high = tl.full([], 1.0, tl.float64)
        missing = 1.0 - low

    # The factor and the scratch took turns; the result is in either.
    factor_ptr = _address(row_ptr, 0)
    for i0 in tl.range(0, n, TILE):
        for j0 in tl.range(0, n, TILE):
            i = i0 + tl.arange(0, TILE)[:, None]
            j = j0 + tl.arange(0, TILE)[None, :]
            live = (i < n) & (j < n)
            y = tl.load(y_ptr + i * n + j, mask=live, other=0.0)
            tl.store(factor_ptr + i * n + j, y, mask=live)


@triton.jit(do_not_specialize=["rows"])
def _count_kernel(table_ptr, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts up the step count of every tensor in the table, before the matrices read it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ptr = table_ptr + row * COLUMNS
    first = tl.load(row_ptr + 7, mask=row < rows, other=0) > 0
    address = tl.load(row_ptr + 4, mask=first, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(address, mask=first, other=0.0)
    tl.store(address, count + 1.0, mask=first)


@dataclass(frozen=True)
class Rule:
    """The kernel's numbers: see there."""

    gradient: float
    keep: float
    mix: float = 1.0
    keep_square: float = 0.0
    mix_square: float = 0.0
    log_beta1: float = 0.0
    log_beta2: float = 0.0
    eps: float = 0.0
    rate: float = 0.0
    bound: float = math.inf

    def numbers(self) -> tuple[float, ...]:
        # A bound beyond this is none, and an infinite one times the zero of n = 1 would be NaN.
        *numbers, bound = vars(self).values()
        return (*numbers, min(bound, 1e30))


def rule_constants(lists: int) -> dict[str, object]:
    """What is compiled in besides the launch, by the number of lists of matrices."""
    return {
        "ADAM": lists == 4,
        "VELOCITY": lists >= 3,
        "LONGEST": LONGEST_STEP,
        "SHORTEST": SHORTEST_BOUND,
        "TOLERANCE": torch.finfo(torch.float32).eps,
        "COLUMNS": COLUMNS,
    }


def stiefel_sgd_(
    factors: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    lr: float,
    momentum: float,
    metric: float,
) -> None:
    """Step ``factors`` and ``velocities`` (none for a momentum of 0), [n, n] or [B, n, n], fp32.

    fp64 and n above 128 go to the reference.

    Raises:
        ValueError, TypeError: what ``check_stiefel`` refuses.
    """
    lists = [factors, grads, *([velocities] if momentum != 0 else [])]
    rule = Rule(0.5 * (1.0 - metric), momentum, rate=lr)
    if _step_at_once(rule, lists, None):
        return
    check_stiefel(factors, grads, velocities if momentum != 0 else None)
    ours, others = _split(lists)
    if others[0]:
        x, g, *y = others
        stiefel_sgd_reference(x, g, y[0] if y else [], lr, momentum, metric)
    _step(rule, ours, [])


def stiefel_adam_(
    factors: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    metric: float,
) -> None:
    """Step ``factors`` and their moments, [n, n] or [B, n, n], fp32, and count up ``steps``.

    fp64 and n above 128 go to the reference.

    Raises:
        ValueError, TypeError: what ``check_stiefel`` refuses.
    """
    rule = Rule(
        gradient=0.5 * (1.0 - metric),
        keep=beta1,
        mix=1.0 - beta1,
        keep_square=beta2,
        mix_square=1.0 - beta2,
        log_beta1=_log(beta1),
        log_beta2=_log(beta2),
        eps=eps,
        rate=lr,
        bound=adam_bound(lr, beta1, beta2, 2),
    )
    lists = [factors, grads, velocities, squares]
    if _step_at_once(rule, lists, steps):
        return
    check_stiefel(factors, grads, velocities, squares, steps)
    ours, others = _split([*lists, steps])
    if others[0]:
        x, g, y, p, t = others
        stiefel_adam_reference(x, g, y, p, t, lr, beta1, beta2, eps, metric)
    *matrices, counts = ours
    _step(rule, matrices, counts)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _split(lists: Sequence[list[Tensor]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The lists for what the kernels take, and for what the reference takes."""
    taken = [
        supports("stiefel", [factor.dtype], [max(factor.shape[-1], 1)])[0] for factor in lists[0]
    ]
    if all(taken):
        return list(lists), [[] for _ in lists]
    mine, theirs = (
        [[t for t, own in zip(tensors, taken, strict=True) if own is side] for tensors in lists]
        for side in (True, False)
    )
    return mine, theirs


def _step(rule: Rule, matrices: list[list[Tensor]], steps: list[Tensor]) -> None:
    """Launch for ``matrices``, [factors, grads[, velocities[, squares]]], and ``steps``, if any."""
    factors = matrices[0]
    if not factors:
        return
    memory = [[t if t.is_contiguous() else t.contiguous() for t in ts] for ts in matrices]
    launches, table = _table(memory, steps)
    scratch = 2 * sum(factor.numel() for factor in factors)
    _launch(rule, len(matrices), launches, table, scratch, factors[0], bool(steps))
    for index in (0, *range(2, len(matrices))):
        for tensor, contiguous in zip(matrices[index], memory[index], strict=True):
            if contiguous is not tensor:
                tensor.copy_(contiguous)


def _step_at_once(rule: Rule, matrices: list[list[Tensor]], steps: list[Tensor] | None) -> bool:
    """:func:`_step` with a table made in C++, without a look at the tensors from here.

    False, and nothing is done, without the extension or where any tensor needs that look: what is
    wrong, lies apart, has gaps, or is the reference's.
    """
    make = _table_in_cpp()
    count = len(matrices[0])
    beside = matrices if steps is None else [*matrices, steps]
    if make is None or count == 0 or any(len(tensors) != count for tensors in beside):
        return False
    lists = [*matrices, *([[]] * (4 - len(matrices)))]
    plans, classes = _classes()
    table, found = make(*lists, steps or [], classes, matrices[0][0].device.type == "cuda")
    *counts, scratch = found.tolist() or [0]
    if not counts:
        return False
    launches, start = {}, 0
    for plan, rows in zip(plans, counts, strict=True):
        if rows:
            launches[plan] = (start, rows)
        start += rows
    _launch(rule, len(matrices), launches, table, scratch, matrices[0][0], bool(steps))
    return True


@lru_cache
def _table_in_cpp() -> Callable[..., tuple[Tensor, Tensor]] | None:
    packet = getattr(torch.ops.spectral_products, "stiefel_table", None)
    return None if packet is None else packet.default


@lru_cache
def _classes() -> tuple[list[StiefelLaunch], list[int]]:
    """The launches there are, and the number of each matrix size's among them."""
    by_size = [plan_stiefel(max(n, 1)) for n in range(MAX_AXIS + 1)]
    plans = list(dict.fromkeys(by_size))
    return plans, [plans.index(plan) for plan in by_size]


def _launch(
    rule: Rule,
    lists: int,
    launches: dict[StiefelLaunch, tuple[int, int]],
    table: Tensor,
    scratch: int,
    like: Tensor,
    counts_steps: bool,
) -> None:
    """Launch what a table [rows, COLUMNS] on the host says, with ``scratch`` numbers beside it."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(table)
    with on_device(like):
        table = table.to(like.device, non_blocking=True)
        if counts_steps:
            programs = triton.cdiv(table.shape[0], COUNT_BLOCK)
            _count_kernel[(programs,)](
                table, table.shape[0], COLUMNS, COUNT_BLOCK, num_warps=4, enable_fp_fusion=True
            )
        memory = torch.empty(scratch, dtype=torch.float32, device=like.device)
        for plan, (start, count) in launches.items():
            _stiefel_kernel[(count,)](
                table[start:],
                memory,
                *rule.numbers(),
                **rule_constants(lists),
                **plan.constants(),
                **plan.options(),
            )


def _table(
    memory: list[list[Tensor]], steps: list[Tensor]
) -> tuple[dict[StiefelLaunch, tuple[int, int]], Tensor]:
    """First row and number of rows of each launch, and the table [rows, COLUMNS] on the host.

    Empty factors come last and are in no launch: only their steps count.
    """
    address: Callable[[Tensor], int] = Tensor.data_ptr
    nothing = [0] * len(memory[0])
    pointers = [list(map(address, tensors)) for tensors in memory]
    pointers += [nothing] * (4 - len(pointers))
    pointers.append(list(map(address, steps)) if steps else nothing)
    rows: dict[StiefelLaunch, list[int]] = {}
    empty: list[int] = []
    scratch = 0
    for factor, x, grad, velocity, square, step in zip(memory[0], *pointers, strict=True):
        n = factor.shape[-1]
        count = factor.shape[0] if factor.dim() == 3 else 1
        if n == 0 or count == 0:
            empty += (0, 0, 0, 0, step, 0, 0, step != 0)
            continue
        group = rows.setdefault(plan_stiefel(n), [])
        for skip in range(0, 4 * n * n * count, 4 * n * n):
            group += (x + skip, grad + skip, velocity and velocity + skip, square and square + skip)
            group += (step, n, scratch, skip == 0 and step != 0)
            scratch += 2 * n * n
    launches: dict[StiefelLaunch, tuple[int, int]] = {}
    start = 0
    groups = {plan: rows[plan] for plan in _classes()[0] if plan in rows}
    for plan, group in groups.items():
        launches[plan] = (start, len(group) // COLUMNS)
        start += len(group) // COLUMNS
    flat = [number for group in (*groups.values(), empty) for number in group]
    device = memory[0][0].device
    # Pinned, so that nothing waits for the copy.
    table = torch.tensor(flat, dtype=torch.int64, pin_memory=device.type == "cuda")
    return launches, table.view(-1, COLUMNS)
