"""Layers with a change of low rank on Triton: the change is added to the base product in place.

The products over a whole dimension are left to cuBLAS: ``x W^T`` and ``x`` times the adapter's
columns [M, q]. What follows in plain PyTorch is a chain of passes over [M, out] that do hardly any
arithmetic. Here it is one: a program reads its tile of the base product once, adds ``thin @ up``,
which it computes from the few columns, and writes the tile back. The columns of Spectral Adapter A
are mixed on the way; those of R are turned by a small kernel of their own before.
"""

# Kernel arguments are traced values, which have no Python types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from spectral_kernels.ops.low_rank import (
    flat,
    low_rank_linear_bwd_reference,
    low_rank_linear_fwd_reference,
    nothing,
    rotation_grads,
    spectral_a_linear_bwd_reference,
    spectral_a_linear_fwd_reference,
    spectral_r_linear_bwd_reference,
    spectral_r_linear_fwd_reference,
)
from spectral_kernels.triton_kernels._host import check, on_device
from spectral_kernels.triton_kernels._launch import (
    plan_low_rank,
    plan_turn,
    supports,
)


@triton.jit(do_not_specialize=["m"])
def _low_rank_add_kernel(
    base_ptr,
    thin_ptr,
    up_ptr,
    shift_ptr,
    scale_ptr,
    mixed_ptr,
    y_ptr,
    m,
    n,
    up_stride_n,
    up_stride_q,
    shift_stride_n,
    shift_stride_q,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``y = base + t @ up^T`` (``+ u @ shift^T``) for a tile ``[ROWS, COLUMNS]`` of [m, n].

    ``t`` is ``thin`` [m, R]. With a scale [R], thin is ``[w, a]`` [m, 2 R], ``t = a * scale`` and
    ``u = (w + a) * scale``, which also go to ``mixed``. A sum of outer products, not ``tl.dot``:
    nothing is padded to 16 columns, and the sums have the layout of the tile in memory. STEP
    divides R, so the columns need no mask.
    """
    blocks = tl.cdiv(n, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    # Pointers move to the tile in int64; within it 32 bits do, and take half the registers.
    first_row = (pid // blocks) * ROWS
    first_output = (pid % blocks) * COLUMNS
    rows = tl.arange(0, ROWS)
    outputs = tl.arange(0, COLUMNS)
    row_live = rows < m - first_row
    output_live = outputs < n - first_output
    tile = row_live[:, None] & output_live[None, :]
    offsets = rows[:, None] * n + outputs[None, :]
    corner = first_row * n + first_output
    y_ptr += corner
    if base_ptr is not None:
        base_ptr += corner
    up_ptr += first_output * up_stride_n
    if scale_ptr is None:
        thin_ptr += first_row * R
    else:
        thin_ptr += first_row * (2 * R)
        mixed_ptr += first_row * (2 * R)
        shift_ptr += first_output * shift_stride_n
    if base_ptr is not None:
        # Asked for before the sums, needed after them.
        base = tl.load(base_ptr + offsets, mask=tile, other=0.0)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, R, STEP):
        for j in tl.static_range(STEP):
            q = first + j
            up = tl.load(
                up_ptr + outputs * up_stride_n + q * up_stride_q, mask=output_live, other=0.0
            )
            if scale_ptr is None:
                t = tl.load(thin_ptr + rows * R + q, mask=row_live, other=0.0).to(tl.float32)
            else:
                thin = thin_ptr + rows * (2 * R) + q
                scale = tl.load(scale_ptr + q)
                whole = tl.load(thin, mask=row_live, other=0.0).to(tl.float32)
                alone = tl.load(thin + R, mask=row_live, other=0.0).to(tl.float32)
                t = alone * scale
                u = (whole + alone) * scale
                shift = shift_ptr + outputs * shift_stride_n + q * shift_stride_q
                shifted = tl.load(shift, mask=output_live, other=0.0).to(tl.float32)
                acc += u[:, None] * shifted[None, :]
                if pid % blocks == 0:
                    mixed = mixed_ptr + rows * (2 * R) + q
                    tl.store(mixed, t.to(mixed_ptr.dtype.element_ty), mask=row_live)
                    tl.store(mixed + R, u.to(mixed_ptr.dtype.element_ty), mask=row_live)
            acc += t[:, None] * up.to(tl.float32)[None, :]
    if base_ptr is not None:
        acc += base.to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["m"])
def _turn_thin_kernel(
    thin_ptr,
    scale_ptr,
    left_ptr,
    right_ptr,
    turned_ptr,
    m,
    scaling,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``thin @ N`` [m, R] or ``thin @ N^T`` for ``N = scaling * (R_U S1 R_V^T - S1)``.

    N is exactly zero for identities, however the rest of the process has set TF32, and cheap enough
    for every program to make it again.
    """
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, PADDED)
    i, j = index[:, None], index[None, :]
    square = (i < R) & (j < R)
    scale = tl.load(scale_ptr + index, mask=index < R, other=0.0)
    left = tl.load(left_ptr + i * R + j, mask=square, other=0.0).to(tl.float32)
    right = tl.load(right_ptr + i * R + j, mask=square, other=0.0).to(tl.float32)
    if TRANSPOSE:
        middle = tl.dot(right * scale[None, :], tl.trans(left), input_precision=PRECISION)
    else:
        middle = tl.dot(left * scale[None, :], tl.trans(right), input_precision=PRECISION)
    middle = (middle - tl.where(i == j, scale[:, None], 0.0)) * scaling
    live = (rows < m)[:, None] & (index < R)[None, :]
    offsets = rows[:, None] * R + index[None, :]
    thin = tl.load(thin_ptr + offsets, mask=live, other=0.0).to(tl.float32)
    turned = tl.dot(thin, middle, input_precision=PRECISION)
    tl.store(turned_ptr + offsets, turned.to(turned_ptr.dtype.element_ty), mask=live)


def low_rank_add(
    base: Tensor | None,
    thin: Tensor,
    up: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``base + t @ up^T`` [M, n] as ``_low_rank_add_kernel`` has it, and what was mixed.

    Args:
        base: [M, n] contiguous, or None for nothing.
        thin: [M, r], or [M, 2r] with a scale.
        up: [n, r], any strides.
        shift: [n, r], any strides, with a scale.
        scale: fp32 [r].
        in_place: write into base.

    Returns:
        (y [M, n] in the dtype of thin, with a scale ``mixed`` [M, 2r], else thin).
    """
    rows, (n, r) = thin.shape[0], up.shape
    thin = thin.contiguous()
    check("thin", thin, (rows, r if scale is None else 2 * r), up.device)
    if scale is not None:
        assert shift is not None
        check("scale", scale, (r,), up.device)
        check("shift", shift, (n, r), up.device)
    if base is not None:
        check("base", base, (rows, n), up.device)
    if base is not None and in_place:
        y = base
    else:
        y = torch.empty(rows, n, dtype=thin.dtype, device=thin.device)
    mixed = thin if scale is None else torch.empty(thin.shape, dtype=thin.dtype, device=thin.device)
    launch = plan_low_rank(r)
    programs = triton.cdiv(rows, launch.rows) * triton.cdiv(n, launch.columns)
    if programs > 0:
        with on_device(thin):
            _low_rank_add_kernel[(programs,)](
                base,
                thin,
                up,
                shift,
                scale,
                None if scale is None else mixed,
                y,
                rows,
                n,
                *up.stride(),
                *(shift if shift is not None else up).stride(),
                **launch.constants(),
                **launch.options(),
            )
    return y, mixed


def turn_thin(
    thin: Tensor,
    singular_values: Tensor,
    rotation_left: Tensor,
    rotation_right: Tensor,
    scaling: float,
    transpose: bool,
) -> Tensor:
    """``thin @ N`` or ``thin @ N^T`` [M, r] in the dtype of thin, N as in ``_turn_thin_kernel``."""
    thin = thin.contiguous()
    rows, r = thin.shape
    for name, rotation in (("rotation_left", rotation_left), ("rotation_right", rotation_right)):
        check(name, rotation, (r, r), thin.device)
    check("singular_values", singular_values, (r,), thin.device)
    turned = torch.empty(rows, r, dtype=thin.dtype, device=thin.device)
    launch = plan_turn(r)
    with on_device(thin):
        _turn_thin_kernel[(triton.cdiv(rows, launch.rows),)](
            thin,
            singular_values.to(torch.float32).contiguous(),
            rotation_left.contiguous(),
            rotation_right.contiguous(),
            turned,
            rows,
            scaling,
            **launch.constants(),
            TRANSPOSE=transpose,
            **launch.options(),
        )
    return turned


def _runs_here(op: str, x: Tensor, factors: tuple[Tensor, ...], r: int) -> bool:
    return x.numel() > 0 and supports(op, [x.dtype, *(f.dtype for f in factors)], [r])[0]


def _start(
    x: Tensor, base: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, bool]:
    """What the change is added to [M, out], and whether it may be overwritten."""
    if base is not None and weight is not None:
        raise ValueError("base and weight exclude each other; got both")
    if weight is not None:
        bias = None if bias is None else bias.to(x.dtype)
        return flat(linear(x, weight.to(x.dtype), bias)).contiguous(), True
    return None if base is None else flat(base).contiguous(), False


def _grad_start(grad: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else flat(grad) @ weight.to(grad.dtype)


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1 else tensor.mul_(scaling)


def low_rank_linear_fwd(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """As the reference of this name."""
    if not _runs_here("low_rank_linear_fwd", x, (down, up), down.shape[0]):
        return low_rank_linear_fwd_reference(x, base, weight, bias, down, up, scaling)
    thin = _scaled(flat(x) @ down.to(x.dtype).mT, scaling)
    start, in_place = _start(x, base, weight, bias)
    y, _ = low_rank_add(start, thin, up, in_place=in_place)
    return y.view(*x.shape[:-1], up.shape[0]), thin


def low_rank_linear_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    thin: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    needs_x: bool,
    needs_factors: bool,
) -> list[Tensor]:
    """As the reference of this name."""
    needs = (needs_x, needs_factors)
    if not _runs_here("low_rank_linear_bwd", grad, (down, up), down.shape[0]):
        return low_rank_linear_bwd_reference(grad, x, weight, thin, down, up, scaling, *needs)
    h = _scaled(flat(grad) @ up.to(grad.dtype), scaling)
    grad_x, grad_down, grad_up = nothing(grad, 3)
    if needs_x:
        start = _grad_start(grad, weight)
        grad_x, _ = low_rank_add(start, h, down.mT, in_place=True)
        grad_x = grad_x.view(x.shape)
    if needs_factors:
        grad_down = (h.mT @ flat(x)).to(down.dtype)
        grad_up = (flat(grad).mT @ thin).to(up.dtype)
    return [grad_x, grad_down, grad_up]


def spectral_a_linear_fwd(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    singular_values: Tensor,
    right: Tensor,
    shift_left: Tensor,
    shift_right: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """As the reference of this name."""
    factors = (left, singular_values, right, shift_left, shift_right)
    if not _runs_here("spectral_a_linear_fwd", x, factors, len(singular_values)):
        return spectral_a_linear_fwd_reference(x, base, weight, bias, *factors, scaling)
    down = torch.cat([right, shift_right.mT]).to(x.dtype)
    start, in_place = _start(x, base, weight, bias)
    y, mixed = low_rank_add(
        start,
        flat(x) @ down.mT,
        left,
        shift=shift_left,
        scale=_fp32_scale(singular_values, scaling),
        in_place=in_place,
    )
    return y.view(*x.shape[:-1], left.shape[0]), mixed


def spectral_a_linear_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    thin: Tensor,
    left: Tensor,
    singular_values: Tensor,
    right: Tensor,
    shift_left: Tensor,
    shift_right: Tensor,
    scaling: float,
    needs_x: bool,
    needs_factors: bool,
) -> list[Tensor]:
    """As the reference of this name."""
    factors = (left, singular_values, right, shift_left, shift_right)
    r = len(singular_values)
    # Without dx there is nothing to add the mixed columns to.
    if not needs_x or not _runs_here("spectral_a_linear_bwd", grad, factors, r):
        return spectral_a_linear_bwd_reference(
            grad, x, weight, thin, *factors, scaling, needs_x, needs_factors
        )
    up = torch.cat([left, shift_left], 1).to(grad.dtype)
    grad_x, mixed = low_rank_add(
        _grad_start(grad, weight),
        flat(grad) @ up,
        right.mT,
        shift=shift_right,
        scale=_fp32_scale(singular_values, scaling),
        in_place=True,
    )
    grad_left, grad_right = nothing(grad, 2)
    if needs_factors:
        grad_left = (flat(grad).mT @ thin[:, r:]).to(shift_left.dtype)
        grad_right = (flat(x).mT @ mixed[:, r:]).to(shift_right.dtype)
    return [grad_x.view(x.shape), grad_left, grad_right]


def _fp32_scale(singular_values: Tensor, scaling: float) -> Tensor:
    return (singular_values.to(torch.float32) * scaling).contiguous()


def spectral_r_linear_fwd(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    singular_values: Tensor,
    right: Tensor,
    rotation_left: Tensor,
    rotation_right: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """As the reference of this name."""
    factors = (left, singular_values, right, rotation_left, rotation_right)
    if not _runs_here("spectral_r_linear_fwd", x, factors, len(singular_values)):
        return spectral_r_linear_fwd_reference(x, base, weight, bias, *factors, scaling)
    thin = flat(x) @ right.to(x.dtype).mT
    turned = turn_thin(thin, singular_values, rotation_left, rotation_right, scaling, True)
    start, in_place = _start(x, base, weight, bias)
    y, _ = low_rank_add(start, turned, left, in_place=in_place)
    return y.view(*x.shape[:-1], left.shape[0]), thin


def spectral_r_linear_bwd(
    grad: Tensor,
    weight: Tensor | None,
    thin: Tensor,
    left: Tensor,
    singular_values: Tensor,
    right: Tensor,
    rotation_left: Tensor,
    rotation_right: Tensor,
    scaling: float,
    needs_x: bool,
    needs_factors: bool,
) -> list[Tensor]:
    """As the reference of this name."""
    factors = (left, singular_values, right, rotation_left, rotation_right)
    if not _runs_here("spectral_r_linear_bwd", grad, factors, len(singular_values)):
        return spectral_r_linear_bwd_reference(
            grad, weight, thin, *factors, scaling, needs_x, needs_factors
        )
    rotations = (singular_values, rotation_left, rotation_right, scaling)
    h = flat(grad) @ left.to(grad.dtype)
    grad_x, grad_left, grad_right = nothing(grad, 3)
    if needs_x:
        turned = turn_thin(h, *rotations, False)
        grad_x, _ = low_rank_add(_grad_start(grad, weight), turned, right.mT, in_place=True)
        grad_x = grad_x.view(*grad.shape[:-1], right.shape[1])
    if needs_factors:
        grad_left, grad_right = rotation_grads(h.mT @ thin, *rotations)
    return [grad_x, grad_left, grad_right]
