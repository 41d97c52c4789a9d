"""Autograd Functions over the raw ops: thin, once differentiable, no shapes checked here.

Gradients are those of DESIGN section 3: no dense rotation, no ``dR`` of the whole Kronecker
product and no solve is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_kernels.ops.kron import accumulation_dtype, gram_axis, rotate_axis
from spectral_kernels.ops.low_rank import (
    flat,
    low_rank_linear_bwd_reference,
    low_rank_linear_fwd_reference,
    spectral_a_linear_bwd_reference,
    spectral_a_linear_fwd_reference,
    spectral_r_linear_bwd_reference,
    spectral_r_linear_fwd_reference,
)
from spectral_kernels.ops.rotated_linear import (
    rotated_linear_bwd_reference,
    rotated_linear_fwd_reference,
)

_ops = torch.ops.spectral


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` where a gradient can be asked for, its plain forward otherwise.

    Besides saving the bookkeeping this keeps inference compilable: Dynamo (torch 2.13) inlines a
    Function that needs no gradient and passes a context that a variadic ``forward`` would take for
    an argument.
    """
    if torch.is_grad_enabled() and any(
        [arg.requires_grad for arg in args if isinstance(arg, Tensor)]  # noqa: C419 (Dynamo)
    ):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        # What Function.apply does once it has bound the arguments to the signature of forward,
        # which takes longer than all the rest and here, where none is missing, changes nothing.
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.forward(*args)


def raw(op: Callable[..., Any], *args: Any) -> Any:
    """Call a raw op from inside a Function, below autograd and so past the op's guard."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _product(op: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or under ``torch.compile`` its reference, which leaves the GEMMs to the compiler."""
    return reference if torch.compiler.is_compiling() else partial(raw, op)


class CayleyFunction(torch.autograd.Function):
    """Packed skew parameters of a whole model to rotations, as one node of the graph.

    Inputs: ``sizes`` (tuple of ints) and per batch ``packed`` [B_i, n_i(n_i-1)/2] or, for a single
    rotation, [n_i(n_i-1)/2]; outputs [B_i, n_i, n_i] or [n_i, n_i]. Saves the rotations only.
    """

    @staticmethod
    def forward(sizes: tuple[int, ...], *packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(raw(_ops.cayley_fwd, packed, sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        results: list[Tensor | None] = [None] * len(grads)
        rotations = ctx.saved_tensors
        packed_grads = raw(
            _ops.cayley_bwd, [grads[i] for i in wanted], [rotations[i] for i in wanted]
        )
        for i, grad in zip(wanted, packed_grads, strict=True):
            results[i] = grad
        return None, *results


class KronRotateFunction(torch.autograd.Function):
    """``x`` [M, k] times ``R1 (x) ... (x) Rf`` (or its transpose).

    With ``orthogonal`` the caller vouches for orthogonal factors and the backward is one rotation
    and one Gram pass: ``R_i dR_i^T = gram_i(dx, x)`` (or its mirror image for the transpose).
    Without it the gradient is exact for any square factors, one axis at a time.
    """

    @staticmethod
    def forward(x: Tensor, transpose: bool, orthogonal: bool, *factors: Tensor) -> Tensor:
        return raw(_ops.kron_rotate, x, list(factors), transpose, None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.transpose, ctx.orthogonal, *factors = inputs
        ctx.save_for_backward(x, *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        factor_grads: list[Tensor | None] = [None] * len(factors)
        if not any(ctx.needs_input_grad[3:]):
            grad_x = raw(_ops.kron_rotate, grad, factors, not ctx.transpose, None, None)
        elif ctx.orthogonal:
            grad_x = raw(_ops.kron_rotate, grad, factors, not ctx.transpose, None, None)
            dims = [factor.shape[0] for factor in factors]
            grams = raw(_ops.kron_gram, x, grad_x, dims, None)
            for i, factor in enumerate(factors):
                gram = grams[i].to(factor.dtype)
                factor_grads[i] = factor @ gram.mT if ctx.transpose else gram @ factor
        else:
            grad_x, factor_grads = _kron_rotate_backward(x, grad, factors, ctx.transpose)
        return (
            grad_x if ctx.needs_input_grad[0] else None,
            None,
            None,
            *(
                g if needed else None
                for g, needed in zip(factor_grads, ctx.needs_input_grad[3:], strict=True)
            ),
        )


def _kron_rotate_backward(
    x: Tensor, grad: Tensor, factors: list[Tensor], transpose: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients for any square factors: undo the axes of ``grad``, redo those of ``x``."""
    dtype = accumulation_dtype(x.dtype)
    dims = [factor.shape[0] for factor in factors]
    matrices = [(f.mT if transpose else f).to(dtype) for f in factors]
    inputs = [x.to(dtype)]
    for axis, matrix in enumerate(matrices[:-1]):
        inputs.append(rotate_axis(inputs[-1], matrix, axis, dims))
    flow = grad.to(dtype)
    grads: list[Tensor | None] = [None] * len(factors)
    for axis in reversed(range(len(factors))):
        gram = gram_axis(inputs[axis], flow, axis, dims)
        grads[axis] = (gram.mT if transpose else gram).to(factors[axis].dtype)
        flow = rotate_axis(flow, matrices[axis].mT, axis, dims)
    return flow.to(x.dtype), grads


class KronGramFunction(torch.autograd.Function):
    """The f Grams of ``a``, ``b`` [M, k] and the column sums of ``a * b``; bilinear in a and b."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(raw(_ops.kron_gram, a, b, list(dims), None))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a, b, ctx.dims = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        *gram_grads, column_grad = grads
        dtype = accumulation_dtype(a.dtype)

        def contract(other: Tensor, transposed: bool) -> Tensor:
            wide = other.to(dtype)
            total = wide * column_grad
            for axis, gram_grad in enumerate(gram_grads):
                matrix = gram_grad if transposed else gram_grad.mT
                total = total + rotate_axis(wide, matrix, axis, list(ctx.dims))
            return total.to(other.dtype)

        return (
            contract(b, transposed=False) if ctx.needs_input_grad[0] else None,
            contract(a, transposed=True) if ctx.needs_input_grad[1] else None,
            None,
        )


class RotatedLinearFunction(torch.autograd.Function):
    """``y = (x * s) (M Q)^T - x N^T + b`` with a frozen ``M`` and ``Q = R`` or ``R^T`` orthogonal.

    The primitive under every SODA layer: ``x`` [..., k], ``scale`` s [k] or None, ``matrix`` M
    [rows, k], ``subtract`` N [rows, k] or None (frozen), ``bias`` [rows] or None. ``on_tokens``
    rotates ``x`` instead of M, which is the same product. With ``h = dy (M Q)``: ``dx = h * s``,
    ``ds = sum h * x`` and ``Q_i^T dQ_i = gram_i(h, x * s)``. Saves x, not ``x * s`` and not the
    rotated x.
    """

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor | None,
        matrix: Tensor,
        subtract: Tensor | None,
        bias: Tensor | None,
        transpose: bool,
        on_tokens: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        y, rotated = _product(_ops.rotated_linear_fwd, rotated_linear_fwd_reference)(
            x, scale, matrix, subtract, bias, transpose, on_tokens, list(factors)
        )
        return y, None if on_tokens else rotated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, scale, matrix, subtract, bias, ctx.transpose, ctx.on_tokens, *factors = inputs
        rotated = output[1]
        if rotated is not None:
            ctx.mark_non_differentiable(rotated)
            ctx.set_materialize_grads(False)  # else a matrix of zeros is made for `rotated`
        ctx.save_for_backward(x, scale, matrix, subtract, bias, rotated, *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, scale, matrix, subtract, bias, rotated, *factors = ctx.saved_tensors
        needs_x, needs_scale, _, _, needs_bias, _, _, *needs_factors = ctx.needs_input_grad
        grad_x = grad_scale = grad_bias = None
        factor_grads: list[Tensor | None] = [None] * len(factors)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
        needs_sums = needs_scale or any(needs_factors)
        if needs_x or needs_sums:
            backward = _product(_ops.rotated_linear_bwd, rotated_linear_bwd_reference)
            grad_x, *sums = backward(
                grad, x, scale, matrix, subtract, rotated, ctx.transpose, needs_sums, factors
            )
            if needs_sums:
                grad_scale = sums[0] if needs_scale else None
                for i, needed in enumerate(needs_factors):
                    factor_grads[i] = sums[i + 1] if needed else None
        return (
            grad_x if needs_x else None,
            grad_scale,
            None,
            None,
            grad_bias,
            None,
            None,
            *factor_grads,
        )


class RotatedWeightFunction(torch.autograd.Function):
    """The dense ``W = (M R * s - N) B``: M [out, k], N [out, k] or None and B [k, in] frozen, s
    [k].

    With ``H = dW B^T``: ``ds = sum M R * H`` over the rows and ``R_i^T dR_i = gram_i(M R, H *
    s)``. Saves ``M R``, nothing of the size of W.
    """

    @staticmethod
    def forward(
        scale: Tensor, matrix: Tensor, subtract: Tensor | None, right: Tensor, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        rotated = raw(_ops.kron_rotate, matrix, list(factors), False, None, None)
        folded = rotated * scale
        return (folded if subtract is None else folded - subtract) @ right, rotated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scale, _, _, right, *factors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else a matrix of zeros is made for `rotated`
        ctx.save_for_backward(scale, right, output[1], *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        scale, right, rotated, *factors = ctx.saved_tensors
        needs_scale, _, _, _, *needs_factors = ctx.needs_input_grad
        dims = [factor.shape[0] for factor in factors]
        *grams, column_sums = raw(_ops.kron_gram, rotated, grad @ right.mT, dims, scale)
        return (
            column_sums.to(scale.dtype) if needs_scale else None,
            None,
            None,
            None,
            *(
                factor @ gram.to(factor.dtype) if needed else None
                for factor, gram, needed in zip(factors, grams, needs_factors, strict=True)
            ),
        )


class LowRankLinearFunction(torch.autograd.Function):
    """``y = start + scaling * x (up @ down)^T``, with ``start = x W^T + bias`` for a frozen W.

    Like the next two: ``x`` [..., in]; ``base`` [..., out] or None; ``weight`` W [out, in] or None
    (not both; with neither the change alone is returned); ``bias`` [out] or None; the factors of
    the change, here ``down`` [q, in] and ``up`` [out, q]; ``scaling``. Saves x and ``x down^T``.
    """

    @staticmethod
    def forward(
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        return _product(_ops.low_rank_linear_fwd, low_rank_linear_fwd_reference)(
            x, base, weight, bias, down, up, scaling
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_for_low_rank(ctx, inputs, output[1], keeps_x=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        backward = _product(_ops.low_rank_linear_bwd, low_rank_linear_bwd_reference)
        return _low_rank_grads(ctx, grad, backward)


class SpectralALinearFunction(torch.autograd.Function):
    """:class:`LowRankLinearFunction` for ``dW = (U1 + A_U) S1 (V1 + A_V)^T - U1 S1 V1^T``.

    Factors: ``left`` U1 [out, r], ``singular_values`` S1 [r], ``right`` V1^T [r, in], all frozen,
    ``shift_left`` A_U [out, r], ``shift_right`` A_V [in, r]. Saves x and 2r numbers per token.
    """

    @staticmethod
    def forward(
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
        return _product(_ops.spectral_a_linear_fwd, spectral_a_linear_fwd_reference)(
            x,
            base,
            weight,
            bias,
            left,
            singular_values,
            right,
            shift_left,
            shift_right,
            scaling,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_for_low_rank(ctx, inputs, output[1], keeps_x=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        backward = _product(_ops.spectral_a_linear_bwd, spectral_a_linear_bwd_reference)
        return _low_rank_grads(ctx, grad, backward)


class SpectralRLinearFunction(torch.autograd.Function):
    """:class:`LowRankLinearFunction` for ``dW = U1 (R_U S1 R_V^T - S1) V1^T``.

    Factors: the basis as in :class:`SpectralALinearFunction`, ``rotation_left`` R_U and
    ``rotation_right`` R_V [r, r]. Saves ``x V1``, r numbers per token, and x itself not.
    """

    @staticmethod
    def forward(
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
        return _product(_ops.spectral_r_linear_fwd, spectral_r_linear_fwd_reference)(
            x,
            base,
            weight,
            bias,
            left,
            singular_values,
            right,
            rotation_left,
            rotation_right,
            scaling,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_for_low_rank(ctx, inputs, output[1], keeps_x=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        backward = _product(_ops.spectral_r_linear_bwd, spectral_r_linear_bwd_reference)
        return _low_rank_grads(ctx, grad, backward)


def _save_for_low_rank(ctx: Any, inputs: tuple[Any, ...], thin: Tensor, *, keeps_x: bool) -> None:
    x, _, weight, bias, *factors, ctx.scaling = inputs
    ctx.mark_non_differentiable(thin)
    ctx.set_materialize_grads(False)  # else zeros are made for `thin`
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*((x,) if keeps_x else ()), weight, thin, *factors)


def _low_rank_grads(
    ctx: Any, grad: Tensor | None, backward: Callable[..., list[Tensor]]
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the inputs; the two trained factors are the last tensors."""
    needs = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(needs)
    needs_x, needs_base, _, needs_bias, *_, needs_first, needs_second, _ = needs
    needs_factors = needs_first or needs_second
    grad_x = grad_bias = first = second = None
    if needs_bias:
        grad_bias = flat(grad).sum(0).to(ctx.bias_dtype)
    if needs_x or needs_factors:
        grad_x, first, second = backward(
            grad, *ctx.saved_tensors, ctx.scaling, needs_x, needs_factors
        )
    return (
        grad_x if needs_x else None,
        grad if needs_base else None,
        None,
        grad_bias,
        *(None,) * (len(needs) - 7),
        first if needs_first else None,
        second if needs_second else None,
        None,
    )
