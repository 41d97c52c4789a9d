"""Raw ops ``soda_linear_fwd`` and ``soda_linear_bwd``: a whole SODA layer (svd, left), one op per
direction.

``y = ((x V) * s) (U R)^T + b`` without its dense weight, and the gradients of docs/conventions.md.
The scale goes into whichever is smaller, the tokens or the matrix that they are multiplied with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_kernels.ops._registry import define_op
from spectral_kernels.ops.rotated_linear import rotated_linear_fwd_reference

_ops = torch.ops.spectral


def soda_linear_fwd_reference(
    x: Tensor,
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    rotated: Tensor | None,
    on_tokens: bool,
    factors: list[Tensor],
) -> list[Tensor]:
    """``[y, z]`` or, where U is rotated here, ``[y, z, U R]``.

    ``x`` [..., in], ``scale`` s [k], ``left`` U [out, k], ``right`` V^T [k, in], ``bias`` [out],
    ``rotated`` U R [out, k] if somebody has it; ``on_tokens`` rotates the tokens instead. y [...,
    out] and z = x V [..., k].
    """
    linear = torch.nn.functional.linear
    z = linear(x, right.to(x.dtype))
    if on_tokens:
        y, _ = rotated_linear_fwd_reference(z, scale, left, None, bias, False, True, factors)
        return [y, z]
    made = []
    if rotated is None:
        wide = left.to(torch.promote_types(left.dtype, x.dtype))
        rotated = _ops.kron_rotate(wide, factors, False, None, None).to(x.dtype)
        made = [rotated]
    rotated, small = rotated.to(x.dtype), scale.to(x.dtype)
    if z.numel() > rotated.numel():
        return [linear(z, rotated * small, bias), z, *made]
    return [linear(z * small, rotated, bias), z, *made]


def soda_linear_bwd_reference(
    grad: Tensor,
    z: Tensor,
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    rotated: Tensor | None,
    on_tokens: bool,
    needs_x: bool,
    needs_sums: bool,
    factors: list[Tensor],
) -> list[Tensor]:
    """``[dx]`` with ``needs_x``, then ``[ds, dR_1, ..., dR_f]`` with ``needs_sums``.

    Arguments as in the forward; z and U R are what it returned, ``rotated`` None where nobody kept
    it: then the tokens' gradients are rotated, or U again where that has fewer rows.
    """
    flat_grad = grad.reshape(-1, grad.shape[-1])
    if on_tokens or (rotated is None and len(flat_grad) <= len(left)):
        h = flat_grad @ left.to(grad.dtype)
        h = _ops.kron_rotate(h, factors, False, None, None)
    else:
        if rotated is None:
            wide = left.to(torch.promote_types(left.dtype, grad.dtype))
            rotated = _ops.kron_rotate(wide, factors, False, None, None)
        h = flat_grad @ rotated.to(grad.dtype)
    sums: list[Tensor] = []
    if needs_sums:
        dims = [factor.shape[0] for factor in factors]
        *grams, column_sums = _ops.kron_gram(h, z.reshape(-1, z.shape[-1]), dims, scale)
        sums.append(column_sums.to(scale.dtype))
        sums += [factor @ g.to(factor.dtype) for factor, g in zip(factors, grams, strict=True)]
    if not needs_x:
        return sums
    rows, small = right.to(grad.dtype), scale.to(grad.dtype)
    grad_x = h @ (rows * small[:, None]) if len(h) > rows.shape[1] else h.mul_(small) @ rows
    return [grad_x.view(*grad.shape[:-1], right.shape[1]), *sums]


def _soda_linear_fwd_fake(
    x: Tensor,
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    rotated: Tensor | None,
    on_tokens: bool,
    factors: list[Tensor],
) -> list[Tensor]:
    torch._check(x.shape[-1] == right.shape[1])
    y = x.new_empty(*x.shape[:-1], left.shape[0])
    z = x.new_empty(*x.shape[:-1], right.shape[0])
    made = [] if on_tokens or rotated is not None else [x.new_empty(left.shape)]
    return [y, z, *made]


def _soda_linear_bwd_fake(
    grad: Tensor,
    z: Tensor,
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    rotated: Tensor | None,
    on_tokens: bool,
    needs_x: bool,
    needs_sums: bool,
    factors: list[Tensor],
) -> list[Tensor]:
    results = [grad.new_empty(*grad.shape[:-1], right.shape[1])] if needs_x else []
    if needs_sums:
        results.append(torch.empty_like(scale, memory_format=torch.contiguous_format))
        results += [torch.empty_like(f, memory_format=torch.contiguous_format) for f in factors]
    return results


_PUBLIC = "spectral_adapters.functional.soda_linear"

define_op(
    "soda_linear_fwd(Tensor x, Tensor scale, Tensor left, Tensor right, Tensor? bias, "
    "Tensor? rotated, bool on_tokens, Tensor[] factors) -> Tensor[]",
    reference=soda_linear_fwd_reference,
    fake=_soda_linear_fwd_fake,
    public_function=_PUBLIC,
)
define_op(
    "soda_linear_bwd(Tensor grad, Tensor z, Tensor scale, Tensor left, Tensor right, "
    "Tensor? rotated, bool on_tokens, bool needs_x, bool needs_sums, Tensor[] factors) -> Tensor[]",
    reference=soda_linear_bwd_reference,
    fake=_soda_linear_bwd_fake,
    public_function=_PUBLIC,
)
