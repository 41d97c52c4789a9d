"""``kron_gram`` on Triton: every partial-trace Gram and the column sums in one pass over ``a, b``.

A fixed number of programs each walks its share of the rows, keeps all sums in registers and writes
them once; a plain sum over the programs follows. No atomics, so the same bits come out every time.
"""

# Kernel arguments are traced values, which have no Python types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.ops.kron import kron_gram_reference
from spectral_kernels.triton_kernels._host import check, on_device
from spectral_kernels.triton_kernels._launch import (
    MAX_GRAM_PROGRAMS,
    MIN_GRAM_TOKENS,
    GramPlan,
    plan_gram,
    supports,
)


@triton.jit
def _gram_axis(
    acc,
    a_ptr,
    b_ptr,
    scale_ptr,
    tokens,
    block,
    OUTER: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds ``sum_(o, c) a[o, p, c] b[o, q, c]`` for rows seen as ``[tokens * OUTER, N, INNER]``.

    ``acc`` [PADDED // BLOCKS, PADDED] holds one block of the p, and every q.
    """
    p = block * (PADDED // BLOCKS) + tl.arange(0, PADDED // BLOCKS)
    q = tl.arange(0, PADDED)
    for k0 in tl.range(0, tokens * (OUTER * INNER), STEP, disable_licm=True):
        k = k0 + tl.arange(0, STEP)
        o = k // INNER
        c = k % INNER
        live = o < tokens * OUTER
        start = o * (N * INNER) + c
        a_mask = (p < N)[:, None] & live[None, :]
        a_offset = (p * INNER)[:, None] + start[None, :]
        a = tl.load(a_ptr + a_offset, mask=a_mask, other=0.0).to(tl.float32)
        b_mask = live[:, None] & (q < N)[None, :]
        b_offset = start[:, None] + (q * INNER)[None, :]
        b = tl.load(b_ptr + b_offset, mask=b_mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            within = (o % OUTER) * (N * INNER) + c
            scale_offset = within[:, None] + (q * INNER)[None, :]
            b *= tl.load(scale_ptr + scale_offset, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_gram(out_ptr, acc, block, N: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr):
    p = block * (PADDED // BLOCKS) + tl.arange(0, PADDED // BLOCKS)
    q = tl.arange(0, PADDED)
    mask = (p < N)[:, None] & (q < N)[None, :]
    tl.store(out_ptr + p[:, None] * N + q[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["m", "share"])
def _kron_gram_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    partial_ptr,
    m,
    share,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of ``share`` rows of ``a, b`` [m, N1, N2, N3]; an axis with padding 1 is absent.

    ``TOKENS`` rows at a time pass through all sums, so that re-reading them hits the first cache.
    """
    K: tl.constexpr = N1 * N2 * N3
    SIZE2: tl.constexpr = N2 * N2 if P2 > 1 else 0
    SIZE3: tl.constexpr = N3 * N3 if P3 > 1 else 0
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % BLOCKS).to(tl.int32)
    program = pid // BLOCKS
    first = program * share
    last = tl.minimum(first + share, m)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    column_live = column < K

    acc1 = tl.zeros([P1 // BLOCKS, P1], tl.float32)
    if P2 > 1:
        acc2 = tl.zeros([P2 // BLOCKS, P2], tl.float32)
    if P3 > 1:
        acc3 = tl.zeros([P3 // BLOCKS, P3], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(first, last, TOKENS, disable_licm=True):
        # A chunk of one row is never short. Constant bounds are not for kernels with blocks, whose
        # loops the assembler then unrolls until it spills.
        known = TOKENS == 1 and BLOCKS == 1
        tokens = 1 if known else tl.minimum(last - start, TOKENS).to(tl.int32)
        a = a_ptr + start * K
        b = b_ptr + start * K
        for row in tl.static_range(0, TOKENS, ROWS):
            token = row + tl.arange(0, ROWS)
            mask = (token < tokens)[:, None] & column_live[None, :]
            offset = (token * K)[:, None] + column[None, :]
            a_tile = tl.load(a + offset, mask=mask, other=0.0).to(tl.float32)
            b_tile = tl.load(b + offset, mask=mask, other=0.0).to(tl.float32)
            sums += a_tile * b_tile
        acc1 = _gram_axis(
            acc1, a, b, scale_ptr, tokens, block,
            1, N1, N2 * N3, P1, BLOCKS, STEP, PRECISION,
        )  # fmt: skip
        if P2 > 1:
            acc2 = _gram_axis(
                acc2, a, b, scale_ptr, tokens, block,
                N1, N2, N3, P2, BLOCKS, STEP, PRECISION,
            )  # fmt: skip
        if P3 > 1:
            acc3 = _gram_axis(
                acc3, a, b, scale_ptr, tokens, block,
                N1 * N2, N3, 1, P3, BLOCKS, STEP, PRECISION,
            )  # fmt: skip

    out = partial_ptr + program * (N1 * N1 + SIZE2 + SIZE3 + K)
    _store_gram(out, acc1, block, N1, P1, BLOCKS)
    if P2 > 1:
        _store_gram(out + N1 * N1, acc2, block, N2, P2, BLOCKS)
    if P3 > 1:
        _store_gram(out + N1 * N1 + SIZE2, acc3, block, N3, P3, BLOCKS)
    column_sums = tl.sum(sums, axis=0)
    tl.store(out + N1 * N1 + SIZE2 + SIZE3 + column, column_sums, mask=column_live)


def kron_gram(a: Tensor, b: Tensor, dims: list[int], scale_b: Tensor | None) -> list[Tensor]:
    """All f Grams of ``(a, b * scale_b)`` and the column sums of ``a * b``, fp32, deterministic.

    Args:
        a, b: [M, k], fp16, bf16 or fp32 each (fp64 goes to the reference).
        dims: factor sizes, ``prod(dims) == k``, outermost first.
        scale_b: [k], fp32, or None; multiplies b in the Grams and not in the column sums.

    Returns:
        ``gram_i`` [ni, ni] for every factor, then the column sums [k]; fp32.

    Raises:
        ValueError: the shapes do not fit each other, or a tensor is on another device.
    """
    if not supports("kron_gram", [a.dtype, b.dtype], dims)[0]:
        return kron_gram_reference(a, b, dims, scale_b)
    shape = (a.shape[0], prod(dims))
    check("a", a, shape, a.device)
    check("b", b, shape, a.device)
    if scale_b is not None:
        check("scale_b", scale_b, shape[1:], a.device)
        scale_b = scale_b.to(torch.float32).contiguous()
    plan = plan_gram(tuple(dims))
    if plan is None:
        raise LookupError(f"supports() promised a plan for {dims}")
    with on_device(a):
        partial = _launch(plan, a.contiguous(), b.contiguous(), scale_b)
        return _reduce(plan, partial)


def _launch(plan: GramPlan, a: Tensor, b: Tensor, scale_b: Tensor | None) -> Tensor:
    """Partial sums of every program, [programs, sum of group Grams + k]."""
    m, k = a.shape
    share = max(MIN_GRAM_TOKENS, triton.cdiv(m, MAX_GRAM_PROGRAMS))
    # Whole chunks of tokens, so that only the last program masks rows off.
    share = triton.cdiv(share, plan.tokens) * plan.tokens
    programs = triton.cdiv(m, share)
    width = sum(prod(group) ** 2 for group in plan.groups) + k
    partial = torch.empty(programs, width, dtype=torch.float32, device=a.device)
    if programs > 0:
        _kron_gram_kernel[(programs * plan.blocks,)](
            a,
            b,
            scale_b,
            partial,
            m,
            share,
            **plan.constants(),
            **plan.options(),
        )
    return partial


def _reduce(plan: GramPlan, partial: Tensor) -> list[Tensor]:
    """Sum over programs; a merged group's Gram is traced down to each of its own factors."""
    outputs = []
    start = 0
    for group in plan.groups:
        size = prod(group)
        gram = partial[:, start : start + size * size]
        start += size * size
        if len(group) == 1:
            outputs.append(gram.sum(0).view(size, size))
            continue
        lead = 1
        for n in group:
            rest = size // (lead * n)
            parts = gram.view(-1, lead, n, rest, lead, n, rest)
            diagonal = parts.diagonal(dim1=1, dim2=4).diagonal(dim1=2, dim2=4)
            outputs.append(diagonal.sum((0, 3, 4)))
            lead *= n
    outputs.append(partial[:, start:].sum(0))
    return outputs
