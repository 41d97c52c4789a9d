"""Raw ops ``rotated_linear_fwd`` and ``rotated_linear_bwd``: the products of a SODA layer.

``y = (x * s) (M Q)^T - x N^T + b`` with ``Q = R`` or ``R^T`` a Kronecker product of orthogonal
factors, and the gradients of docs/conventions.md. The references call the Kronecker ops through the
dispatcher, so that a device with kernels for those runs them here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_kernels.ops._registry import define_op
from spectral_kernels.ops.kron import accumulation_dtype

_ops = torch.ops.spectral


def rotated_linear_fwd_reference(
    x: Tensor,
    scale: Tensor | None,
    matrix: Tensor,
    subtract: Tensor | None,
    bias: Tensor | None,
    transpose: bool,
    on_tokens: bool,
    factors: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """y [..., rows], and the rotated matrix [rows, k] or, when the tokens are rotated, nothing [0].

    ``x`` [..., k], ``scale`` [k], ``matrix`` and ``subtract`` [rows, k], ``bias`` [rows];
    ``transpose`` takes ``Q = R^T``. ``subtract`` does not go with ``on_tokens``.
    """
    linear = torch.nn.functional.linear
    if on_tokens:
        t = _ops.kron_rotate(x.reshape(-1, x.shape[-1]), factors, not transpose, scale, None)
        return linear(t.view(x.shape), matrix.to(x.dtype), bias), x.new_empty(0)
    wide = matrix.to(torch.promote_types(matrix.dtype, x.dtype))
    rotated = _ops.kron_rotate(wide, factors, transpose, None, None).to(x.dtype)
    if subtract is None:
        return linear(x if scale is None else x * scale.to(x.dtype), rotated, bias), rotated
    # Folding s and N into the basis keeps the difference exact: zero is zero.
    folded = rotated if scale is None else rotated * scale.to(x.dtype)
    return linear(x, folded - subtract.to(x.dtype), bias), rotated


def rotated_linear_bwd_reference(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    matrix: Tensor,
    subtract: Tensor | None,
    rotated: Tensor | None,
    transpose: bool,
    needs_sums: bool,
    factors: list[Tensor],
) -> list[Tensor]:
    """``[dx]``, or with ``needs_sums`` ``[dx, ds, dR_1, ..., dR_f]``.

    With ``h = dy (M Q)``: ``dx = h * s - dy N``, ``ds = sum h * x`` and
    ``Q_i^T dQ_i = gram_i(h, x * s)``. ``rotated`` is what the forward returned, or None where it
    rotated the tokens. Without a scale ``ds`` is that of a scale of ones.
    """
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if rotated is None:
        h = flat_grad @ matrix.to(grad.dtype)
        h = _ops.kron_rotate(h, factors, transpose, None, None)
    else:
        h = flat_grad @ rotated
    sums: list[Tensor] = []
    if needs_sums:
        dims = [factor.shape[0] for factor in factors]
        *grams, column_sums = _ops.kron_gram(h, flat_x, dims, scale)
        sums.append(column_sums if scale is None else column_sums.to(scale.dtype))
        for factor, gram in zip(factors, grams, strict=True):
            gram = gram.to(factor.dtype)
            sums.append(gram.mT @ factor if transpose else factor @ gram)
    if scale is not None:
        h = h.mul_(scale.to(h.dtype))
    if subtract is not None:
        h = h - flat_grad @ subtract.to(grad.dtype)
    return [h.view(x.shape), *sums]


def _rotated_linear_fwd_fake(
    x: Tensor,
    scale: Tensor | None,
    matrix: Tensor,
    subtract: Tensor | None,
    bias: Tensor | None,
    transpose: bool,
    on_tokens: bool,
    factors: list[Tensor],
) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[-1] == matrix.shape[1])
    y = x.new_empty(*x.shape[:-1], matrix.shape[0])
    return y, x.new_empty(0) if on_tokens else x.new_empty(matrix.shape)


def _rotated_linear_bwd_fake(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    matrix: Tensor,
    subtract: Tensor | None,
    rotated: Tensor | None,
    transpose: bool,
    needs_sums: bool,
    factors: list[Tensor],
) -> list[Tensor]:
    grad_x = grad.new_empty(x.shape)
    if not needs_sums:
        return [grad_x]
    dtype = accumulation_dtype(grad.dtype) if scale is None else scale.dtype
    return [
        grad_x,
        grad.new_empty(x.shape[-1], dtype=dtype),
        *(torch.empty_like(factor, memory_format=torch.contiguous_format) for factor in factors),
    ]


_PUBLIC = "spectral_adapters.functional.rotated_linear"

define_op(
    "rotated_linear_fwd(Tensor x, Tensor? scale, Tensor matrix, Tensor? subtract, Tensor? bias, "
    "bool transpose, bool on_tokens, Tensor[] factors) -> (Tensor, Tensor)",
    reference=rotated_linear_fwd_reference,
    fake=_rotated_linear_fwd_fake,
    public_function=_PUBLIC,
)
define_op(
    "rotated_linear_bwd(Tensor grad, Tensor x, Tensor? scale, Tensor matrix, Tensor? subtract, "
    "Tensor? rotated, bool transpose, bool needs_sums, Tensor[] factors) -> Tensor[]",
    reference=rotated_linear_bwd_reference,
    fake=_rotated_linear_bwd_fake,
    public_function=_PUBLIC,
)
