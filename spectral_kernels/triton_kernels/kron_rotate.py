"""``kron_rotate`` on Triton: rows rotated by ``R1 (x) R2 (x) ...`` in one pass over them.

A row is a tile ``[n1, n2, n3]`` and every axis of it is contracted with its own small matrix. The
first axis streams from memory, the others never leave registers between load and store.
"""

# Kernel arguments are traced values, which have no Python types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.ops.kron import kron_rotate_reference
from spectral_kernels.triton_kernels._host import check, on_device
from spectral_kernels.triton_kernels._launch import (
    AxisLaunch,
    TileLaunch,
    plan_rotate,
    supports,
)


@triton.jit
def _load_operator(r_ptr, rows, columns, N: tl.constexpr, TRANSPOSE: tl.constexpr):
    """``R[rows, columns]`` (``R[columns, rows]`` when transposed), zero outside ``[N, N]``."""
    mask = (rows < N) & (columns < N)
    offsets = columns * N + rows if TRANSPOSE else rows * N + columns
    return tl.load(r_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _contract_last(
    acc,
    v,
    r_ptr,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    START: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + v @ R[START::STRIDE]``, ``v`` [rows, PADDED // STRIDE], ``acc`` [rows, PADDED].

    An fp32 dot holds its operands whole, so a long one spills. Halving ``v`` into even and odd
    columns moves no data (a thread owns neighbouring columns) and the order of a sum is free.
    """
    if PADDED // STRIDE <= STEP:
        rows = START + STRIDE * tl.arange(0, PADDED // STRIDE)
        columns = tl.arange(0, PADDED)
        r = _load_operator(r_ptr, rows[:, None], columns[None, :], N, TRANSPOSE)
        acc = tl.dot(v, r, acc, input_precision=PRECISION)
    else:
        even, odd = tl.split(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]))
        acc = _contract_last(
            acc, even, r_ptr, N, PADDED, START, 2 * STRIDE, STEP, TRANSPOSE, PRECISION
        )
        acc = _contract_last(
            acc, odd, r_ptr, N, PADDED, START + STRIDE, 2 * STRIDE, STEP, TRANSPOSE, PRECISION
        )
    return acc


@triton.jit(do_not_specialize=["m"])
def _kron_rotate_tile_kernel(
    x_ptr,
    r1_ptr,
    r2_ptr,
    r3_ptr,
    before_ptr,
    after_ptr,
    y_ptr,
    m,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``[m, N1, N2, N3]``: a program makes ``BLOCK`` outputs of axis 1 for ``TOKENS`` rows."""
    K: tl.constexpr = N1 * N2 * N3
    INNER: tl.constexpr = N2 * N3
    BLOCKS: tl.constexpr = (N1 + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    first = (pid // BLOCKS) * TOKENS
    left = tl.minimum(m - first, TOKENS).to(tl.int32)
    start = (pid % BLOCKS).to(tl.int32) * BLOCK
    x_ptr += first * K
    y_ptr += first * K

    # Axis 1, in steps: [BLOCK, STEP] @ [STEP, (token, i2, i3)].
    column = tl.arange(0, TOKENS * P2 * P3)
    token = column // (P2 * P3)
    i2 = (column // P3) % P2
    i3 = column % P3
    column_live = (token < left) & (i2 < N2) & (i3 < N3)
    inner = i2 * N3 + i3
    out1 = start + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, TOKENS * P2 * P3], tl.float32)
    for k0 in range(0, N1, STEP):
        i1 = k0 + tl.arange(0, STEP)
        mask = (i1 < N1)[:, None] & column_live[None, :]
        within = i1[:, None] * INNER + inner[None, :]
        x = tl.load(x_ptr + within + (token * K)[None, :], mask=mask, other=0.0).to(tl.float32)
        if before_ptr is not None:
            x *= tl.load(before_ptr + within, mask=mask, other=0.0)
        r = _load_operator(r1_ptr, i1[None, :], out1[:, None], N1, TRANSPOSE)
        acc = tl.dot(r, x, acc, input_precision=PRECISION)

    # The other axes, last first, each brought to the end: rows end up as (out1, token[, out3]).
    if r3_ptr is not None:
        v = tl.reshape(acc, [BLOCK * TOKENS * P2, P3])
        acc = tl.zeros([BLOCK * TOKENS * P2, P3], tl.float32)
        acc = _contract_last(acc, v, r3_ptr, N3, P3, 0, 1, STEP, TRANSPOSE, PRECISION)
        acc = tl.permute(tl.reshape(acc, [BLOCK * TOKENS, P2, P3]), (0, 2, 1))
    v = tl.reshape(acc, [BLOCK * TOKENS * P3, P2])
    acc = tl.zeros([BLOCK * TOKENS * P3, P2], tl.float32)
    acc = _contract_last(acc, v, r2_ptr, N2, P2, 0, 1, STEP, TRANSPOSE, PRECISION)

    row = tl.arange(0, BLOCK * TOKENS * P3)
    out1 = start + row // (TOKENS * P3)
    token = (row // P3) % TOKENS
    out3 = row % P3
    out2 = tl.arange(0, P2)
    row_live = (out1 < N1) & (token < left) & (out3 < N3)
    mask = row_live[:, None] & (out2 < N2)[None, :]
    within = (out1 * INNER + out3)[:, None] + out2[None, :] * N3
    if after_ptr is not None:
        acc *= tl.load(after_ptr + within, mask=mask, other=0.0)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + within + (token * K)[:, None], y, mask=mask)


@triton.jit(do_not_specialize=["outer"])
def _kron_rotate_axis_kernel(
    x_ptr,
    r_ptr,
    before_ptr,
    after_ptr,
    y_ptr,
    outer,
    LEAD: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y[o, :, c] = R^T x[o, :, c]`` for ``x`` [outer, N, INNER]; ``LEAD`` of the o make a row.

    A program makes ``COLUMNS`` outputs for ``ROWS`` of the ``(o, c)``: several o where ``INNER``
    is 1, neighbouring c of one o elsewhere, so that loads are contiguous either way.
    """
    SIZE: tl.constexpr = N * INNER
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    ROW_BLOCKS: tl.constexpr = (INNER + ROWS - 1) // ROWS
    pid = tl.program_id(0).to(tl.int64)
    columns = (pid % COLUMN_BLOCKS).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    pid //= COLUMN_BLOCKS
    row = tl.arange(0, ROWS)
    if INNER == 1:
        first = pid * ROWS
        row_offset = row * N
        row_live = first + row < outer
        scale_offset = ((first + row) % LEAD).to(tl.int32) * N
    else:
        first = pid // ROW_BLOCKS
        row_offset = (pid % ROW_BLOCKS).to(tl.int32) * ROWS + row
        row_live = row_offset < INNER
        scale_offset = (first % LEAD).to(tl.int32) * SIZE + row_offset
    x_ptr += first * SIZE
    y_ptr += first * SIZE

    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k0 in range(0, N, STEP):
        k = k0 + tl.arange(0, STEP)
        mask = row_live[:, None] & (k < N)[None, :]
        within = (k * INNER)[None, :]
        x = tl.load(x_ptr + row_offset[:, None] + within, mask=mask, other=0.0).to(tl.float32)
        if before_ptr is not None:
            x *= tl.load(before_ptr + scale_offset[:, None] + within, mask=mask, other=0.0)
        r = _load_operator(r_ptr, k[:, None], columns[None, :], N, TRANSPOSE)
        acc = tl.dot(x, r, acc, input_precision=PRECISION)

    mask = row_live[:, None] & (columns < N)[None, :]
    within = (columns * INNER)[None, :]
    if after_ptr is not None:
        acc *= tl.load(after_ptr + scale_offset[:, None] + within, mask=mask, other=0.0)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row_offset[:, None] + within, y, mask=mask)


def kron_rotate(
    x: Tensor,
    factors: list[Tensor],
    transpose: bool,
    scale_before: Tensor | None,
    scale_after: Tensor | None,
) -> Tensor:
    """``((x * scale_before) @ (R1 (x) ... (x) Rf)) * scale_after`` with fp32 accumulation.

    Args:
        x: [M, k], fp16, bf16 or fp32 (fp64 goes to the reference).
        factors: ``Ri`` [ni, ni], fp32, ``prod(ni) == k``; R1 outermost.
        transpose: rotate by every ``Ri^T`` instead.
        scale_before, scale_after: [k], fp32, or None.

    Returns:
        [M, k] in x's dtype.

    Raises:
        ValueError: the shapes do not fit each other, or a tensor is on another device.
    """
    dims = tuple(factor.shape[0] for factor in factors)
    if not supports("kron_rotate", [x.dtype], dims)[0]:
        return kron_rotate_reference(x, factors, transpose, scale_before, scale_after)
    check("x", x, (x.shape[0], prod(dims)), x.device)
    for index, (factor, n) in enumerate(zip(factors, dims, strict=True)):
        check(f"factors[{index}]", factor, (n, n), x.device)
    before = _prepare_scale("scale_before", scale_before, x)
    after = _prepare_scale("scale_after", scale_after, x)

    plan = plan_rotate(dims)
    x = x.contiguous()
    with on_device(x):
        operators = _merge(factors, plan.groups)
        if isinstance(plan.passes[0], TileLaunch):
            return _launch_tile(plan.passes[0], x, operators, transpose, before, after)
        return _launch_axes(plan.passes, x, operators, transpose, before, after)


def _prepare_scale(name: str, scale: Tensor | None, x: Tensor) -> Tensor | None:
    if scale is None:
        return None
    check(name, scale, (x.shape[1],), x.device)
    return scale.to(torch.float32).contiguous()


def _merge(factors: list[Tensor], groups: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """One fp32 operator per group: the Kronecker product of its factors, [prod, prod]."""
    operators = []
    remaining = iter(factors)
    for group in groups:
        operator = next(remaining).to(torch.float32)
        for _ in group[1:]:
            factor = next(remaining).to(torch.float32)
            size = operator.shape[0] * factor.shape[0]
            product = operator[:, None, :, None] * factor[None, :, None, :]
            operator = product.reshape(size, size)
        operators.append(operator.contiguous())
    return operators


def _launch_tile(
    launch: TileLaunch,
    x: Tensor,
    operators: list[Tensor],
    transpose: bool,
    before: Tensor | None,
    after: Tensor | None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(x.shape[0], launch.tokens) * triton.cdiv(launch.sizes[0], launch.block)
    if programs == 0:
        return y
    _kron_rotate_tile_kernel[(programs,)](
        x,
        operators[0],
        operators[1],
        operators[2] if len(operators) == 3 else None,
        before,
        after,
        y,
        x.shape[0],
        **launch.constants(),
        TRANSPOSE=transpose,
        **launch.options(),
    )
    return y


def _launch_axes(
    passes: tuple[AxisLaunch, ...],
    x: Tensor,
    operators: list[Tensor],
    transpose: bool,
    before: Tensor | None,
    after: Tensor | None,
) -> Tensor:
    """Contract one axis per pass, the last axis first; what lies between passes is fp32."""
    dtype = x.dtype
    last = len(passes) - 1
    for index, (launch, operator) in enumerate(zip(passes, reversed(operators), strict=True)):
        y = torch.empty(x.shape, dtype=dtype if index == last else torch.float32, device=x.device)
        outer = x.shape[0] * launch.lead
        blocks = triton.cdiv(launch.n, launch.columns)
        if launch.inner == 1:
            blocks *= triton.cdiv(outer, launch.rows)
        else:
            blocks *= outer * triton.cdiv(launch.inner, launch.rows)
        if blocks > 0:
            _kron_rotate_axis_kernel[(blocks,)](
                x,
                operator,
                before if index == 0 else None,
                after if index == last else None,
                y,
                outer,
                **launch.constants(),
                TRANSPOSE=transpose,
                **launch.options(),
            )
        x = y
    return x
