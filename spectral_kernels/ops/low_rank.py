"""Raw ops of linear layers with a change of low rank: ``low_rank_linear``, ``spectral_a_linear``
and ``spectral_r_linear``, each with ``_fwd`` and ``_bwd``.

All compute ``y = start + x dW^T`` with ``start = x W^T + bias`` for a frozen W [out, in], or a
given tensor, or nothing, and ``dW`` of low rank, never built:

* ``low_rank_linear``: ``dW = scaling * up @ down``, as in a LoRA;
* ``spectral_a_linear``: ``dW = scaling * ((U1 + A_U) S1 (V1 + A_V)^T - U1 S1 V1^T)``;
* ``spectral_r_linear``: ``dW = scaling * U1 (R_U S1 R_V^T - S1) V1^T``.

The last two know what is frozen, so that their backward multiplies the tokens with r columns where
the product of two thin matrices would ask for gradients of 2r (A) or of the frozen bases (R).
Everything is computed in the dtype of x; factors are cast to it, and gradients are returned in the
dtype of the factor. The r x r middle of R is built in the dtype of the rotations.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from spectral_kernels.ops._registry import define_op
from spectral_kernels.ops.kron import accumulation_dtype


def flat(tensor: Tensor) -> Tensor:
    """[..., n] as [M, n]."""
    return tensor.reshape(-1, tensor.shape[-1])


def nothing(like: Tensor, count: int) -> list[Tensor]:
    """Tensors [0] for what is not asked for, none of which shares memory with another."""
    return [like.new_empty(0) for _ in range(count)]


def mix_shifted(product: Tensor, scale: Tensor) -> Tensor:
    """``[w, a]`` [M, 2r] to ``[a * scale, (w + a) * scale]``, the middle of Spectral Adapter A.

    ``w`` are products with the frozen columns, ``a`` those with the shifts; the results belong to
    the frozen and to the shifted columns of the other side. Forward and backward are alike.
    """
    wide = product.to(scale.dtype)
    whole, alone = wide.chunk(2, 1)
    return torch.cat([alone * scale, (whole + alone) * scale], 1).to(product.dtype)


def rotated_middle(
    singular_values: Tensor, rotation_left: Tensor, rotation_right: Tensor, scaling: float
) -> Tensor:
    """``scaling * (R_U S1 R_V^T - S1)`` [r, r]; exactly zero for identities."""
    turned = (rotation_left * singular_values) @ rotation_right.mT
    return scaling * (turned - torch.diag(singular_values))


def rotation_grads(
    grad_middle: Tensor,
    singular_values: Tensor,
    rotation_left: Tensor,
    rotation_right: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """``dR_U`` and ``dR_V`` [r, r] from the gradient of :func:`rotated_middle`."""
    grad = scaling * grad_middle.to(rotation_left.dtype)
    return grad @ (rotation_right * singular_values), grad.mT @ (rotation_left * singular_values)


def _shifted_scale(x: Tensor, singular_values: Tensor, scaling: float) -> Tensor:
    return singular_values.to(accumulation_dtype(x.dtype)) * scaling


def _onto(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    thin: Tensor,
    up: Tensor,
) -> Tensor:
    """``start + thin @ up`` [..., out]: thin [M, q], up [q, out]."""
    torch._check(base is None or weight is None, lambda: "base and weight exclude each other")
    if weight is not None:
        bias = None if bias is None else bias.to(x.dtype)
        base = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    y = thin @ up if base is None else torch.addmm(flat(base), thin, up)
    return y.view(*x.shape[:-1], up.shape[1])


def _grad_x(grad: Tensor, weight: Tensor | None, thin: Tensor, down: Tensor) -> Tensor:
    """``grad W + thin @ down`` [..., in]: thin [M, q], down [q, in]."""
    change = thin @ down
    if weight is not None:
        change = flat(grad) @ weight.to(grad.dtype) + change
    return change.view(*grad.shape[:-1], down.shape[1])


def low_rank_linear_fwd_reference(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and, for the backward, ``scaling * x down^T`` [M, q].

    ``x`` [..., in], ``down`` [q, in], ``up`` [out, q]; ``base`` [..., out], or ``weight`` [out, in]
    and ``bias`` [out], or neither for the change alone.
    """
    thin = flat(x) @ down.to(x.dtype).mT * scaling
    return _onto(x, base, weight, bias, thin, up.to(x.dtype).mT), thin


def low_rank_linear_bwd_reference(
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
    """``[dx, d_down, d_up]``, with nothing [0] for what is not needed.

    With ``h = scaling * g up``: ``dx = g W + h down``, ``d_down = h^T x``, ``d_up = g^T thin``.
    """
    h = flat(grad) @ up.to(grad.dtype) * scaling
    grad_x, grad_down, grad_up = nothing(grad, 3)
    if needs_x:
        grad_x = _grad_x(grad, weight, h, down.to(grad.dtype))
    if needs_factors:
        grad_down = (h.mT @ flat(x)).to(down.dtype)
        grad_up = (flat(grad).mT @ thin).to(up.dtype)
    return [grad_x, grad_down, grad_up]


def spectral_a_linear_fwd_reference(
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
    """y [..., out] and, for the backward, ``scaling * [x A_V S1, x (V1 + A_V) S1]`` [M, 2r].

    ``left`` U1 [out, r], ``singular_values`` S1 [r], ``right`` V1^T [r, in], ``shift_left`` A_U
    [out, r], ``shift_right`` A_V [in, r]; the rest as in ``low_rank_linear_fwd``. The products meet
    U1 and A_U, so that zero shifts change nothing to the last bit.
    """
    down = torch.cat([right, shift_right.mT]).to(x.dtype)
    up = torch.cat([left, shift_left], 1).to(x.dtype)
    scale = _shifted_scale(x, singular_values, scaling)
    thin = mix_shifted(flat(x) @ down.mT, scale)
    return _onto(x, base, weight, bias, thin, up.mT), thin


def spectral_a_linear_bwd_reference(
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
    """``[dx, dA_U, dA_V]``, with nothing [0] for what is not needed.

    The mirror image of the forward: with ``[h, k] = scaling * [g A_U S1, g (U1 + A_U) S1]``:
    ``dx = g W + h V1^T + k A_V^T``, ``dA_V = x^T k`` and ``dA_U = g^T`` times the second half of
    ``thin``.
    """
    up = torch.cat([left, shift_left], 1).to(grad.dtype)
    mixed = mix_shifted(flat(grad) @ up, _shifted_scale(x, singular_values, scaling))
    r = len(singular_values)
    grad_x, grad_left, grad_right = nothing(grad, 3)
    if needs_x:
        down = torch.cat([right, shift_right.mT]).to(grad.dtype)
        grad_x = _grad_x(grad, weight, mixed, down)
    if needs_factors:
        grad_left = (flat(grad).mT @ thin[:, r:]).to(shift_left.dtype)
        grad_right = (flat(x).mT @ mixed[:, r:]).to(shift_right.dtype)
    return [grad_x, grad_left, grad_right]


def spectral_r_linear_fwd_reference(
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
    """y [..., out] and, for the backward, ``x V1`` [M, r].

    ``left`` U1 [out, r], ``singular_values`` S1 [r], ``right`` V1^T [r, in], ``rotation_left`` R_U
    and ``rotation_right`` R_V [r, r]; the rest as in ``low_rank_linear_fwd``.
    """
    middle = rotated_middle(singular_values, rotation_left, rotation_right, scaling)
    thin = flat(x) @ right.to(x.dtype).mT
    turned = thin @ middle.to(x.dtype).mT
    return _onto(x, base, weight, bias, turned, left.to(x.dtype).mT), thin


def spectral_r_linear_bwd_reference(
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
    """``[dx, dR_U, dR_V]``, with nothing [0] for what is not needed; x itself is not asked for.

    With ``h = g U1`` and the middle ``N = scaling * (R_U S1 R_V^T - S1)``: ``dx = g W + h N V1^T``,
    ``dN = h^T x V1``, ``dR_U = scaling * dN R_V S1``, ``dR_V = scaling * dN^T R_U S1``.
    """
    h = flat(grad) @ left.to(grad.dtype)
    grad_x, grad_left, grad_right = nothing(grad, 3)
    if needs_x:
        middle = rotated_middle(singular_values, rotation_left, rotation_right, scaling)
        turned = h @ middle.to(grad.dtype)
        grad_x = _grad_x(grad, weight, turned, right.to(grad.dtype))
    if needs_factors:
        grad_left, grad_right = rotation_grads(
            h.mT @ thin, singular_values, rotation_left, rotation_right, scaling
        )
    return [grad_x, grad_left, grad_right]


def _fwd_fake(x: Tensor, weight: Tensor | None, out: int, columns: int) -> tuple[Tensor, Tensor]:
    torch._check(weight is None or weight.shape[0] == out)
    thin = x.new_empty(prod(x.shape[:-1]), columns)
    return x.new_empty(*x.shape[:-1], out), thin


def _bwd_fake(
    grad: Tensor, width: int, trained: tuple[Tensor, Tensor], needs_x: bool, needs_factors: bool
) -> list[Tensor]:
    return [
        grad.new_empty(*grad.shape[:-1], width) if needs_x else grad.new_empty(0),
        *(f.new_empty(f.shape) if needs_factors else grad.new_empty(0) for f in trained),
    ]


def _low_rank_linear_fwd_fake(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[-1] == down.shape[1])
    return _fwd_fake(x, weight, up.shape[0], down.shape[0])


def _low_rank_linear_bwd_fake(
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
    return _bwd_fake(grad, x.shape[-1], (down, up), needs_x, needs_factors)


def _spectral_a_linear_fwd_fake(
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
    torch._check(x.shape[-1] == right.shape[1])
    return _fwd_fake(x, weight, left.shape[0], 2 * singular_values.shape[0])


def _spectral_r_linear_fwd_fake(
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
    torch._check(x.shape[-1] == right.shape[1])
    return _fwd_fake(x, weight, left.shape[0], singular_values.shape[0])


def _spectral_a_linear_bwd_fake(
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
    return _bwd_fake(grad, x.shape[-1], (shift_left, shift_right), needs_x, needs_factors)


def _spectral_r_linear_bwd_fake(
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
    trained = (rotation_left, rotation_right)
    return _bwd_fake(grad, right.shape[1], trained, needs_x, needs_factors)


_START = "Tensor x, Tensor? base, Tensor? weight, Tensor? bias, "
_SAVED = "Tensor? weight, Tensor thin, "
_BASIS = "Tensor left, Tensor singular_values, Tensor right, "
_NEEDS = "float scaling, bool needs_x, bool needs_factors) -> Tensor[]"
_PUBLIC = "spectral_adapters.functional.low_rank_spectral_linear"

define_op(
    f"low_rank_linear_fwd({_START}Tensor down, Tensor up, float scaling) -> (Tensor, Tensor)",
    reference=low_rank_linear_fwd_reference,
    fake=_low_rank_linear_fwd_fake,
    public_function="spectral_adapters.functional.low_rank_linear",
)
define_op(
    f"low_rank_linear_bwd(Tensor grad, Tensor x, {_SAVED}Tensor down, Tensor up, {_NEEDS}",
    reference=low_rank_linear_bwd_reference,
    fake=_low_rank_linear_bwd_fake,
    public_function="spectral_adapters.functional.low_rank_linear",
)
define_op(
    f"spectral_a_linear_fwd({_START}{_BASIS}Tensor shift_left, Tensor shift_right, float scaling) "
    "-> (Tensor, Tensor)",
    reference=spectral_a_linear_fwd_reference,
    fake=_spectral_a_linear_fwd_fake,
    public_function=_PUBLIC,
)
define_op(
    f"spectral_a_linear_bwd(Tensor grad, Tensor x, {_SAVED}{_BASIS}Tensor shift_left, "
    f"Tensor shift_right, {_NEEDS}",
    reference=spectral_a_linear_bwd_reference,
    fake=_spectral_a_linear_bwd_fake,
    public_function=_PUBLIC,
)
define_op(
    f"spectral_r_linear_fwd({_START}{_BASIS}Tensor rotation_left, Tensor rotation_right, "
    "float scaling) -> (Tensor, Tensor)",
    reference=spectral_r_linear_fwd_reference,
    fake=_spectral_r_linear_fwd_fake,
    public_function=_PUBLIC,
)
define_op(
    f"spectral_r_linear_bwd(Tensor grad, {_SAVED}{_BASIS}Tensor rotation_left, "
    f"Tensor rotation_right, {_NEEDS}",
    reference=spectral_r_linear_bwd_reference,
    fake=_spectral_r_linear_bwd_fake,
    public_function=_PUBLIC,
)
