"""Differentiable functions of spectral fine-tuning on the raw ops of ``spectral_kernels``.

Row-vector convention and torch layout throughout: a weight is ``[out, in]``, activations are
``[..., in]``. Section numbers refer to the design summary in ``docs/conventions.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from operator import is_
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear, pad

import spectral_kernels  # noqa: F401  (declares torch.ops.spectral)
from spectral_adapters._validation import (
    check_choice,
    check_device,
    check_factor_sizes,
    check_last_dimension,
    check_square_factors,
    check_tensor,
    check_vector,
)
from spectral_adapters.autograd import (
    CayleyFunction,
    KeptGradient,
    KronGramFunction,
    KronRotateFunction,
    LowRankLinearFunction,
    MergedLinearFunction,
    RotatedLinearFunction,
    RotatedWeightFunction,
    SharedRotations,
    SODALinearFunction,
    SpectralALinearFunction,
    SpectralRLinearFunction,
    apply,
    at_least,
    node_of,
    record,
)
from spectral_adapters.planner import PLANS, choose_plan, rates_for, remembered_plan
from spectral_kernels.ops.cayley import packed_length

__all__ = [
    "SpectralBasis",
    "cayley",
    "kron_gram",
    "kron_rotate",
    "low_rank_factors",
    "low_rank_linear",
    "low_rank_spectral_linear",
    "rotated_linear",
    "soda_delta_weight",
    "soda_linear",
    "soda_weight",
]

DECOMPOSITIONS = ("svd", "qr")
ROTATIONS = ("left", "right", None)


class SpectralBasis(NamedTuple):
    """A frozen factorisation of a weight ``W0`` [out, in], with ``k = min(out, in)``.

    * SVD: ``left`` U [out, k], ``singular_values`` S [k], ``right`` V^T [k, in]; ``W0 = U diag(S)
      V^T``.
    * QR (left rotation): ``left`` Q [out, k], ``right`` T [k, in] upper triangular; ``W0 = Q T``.
    * LQ ("qr", right rotation or none): ``left`` L [out, k] lower triangular, ``right`` Q [k, in].
    * Chosen columns of the SVD: ``left`` U1 [out, r], ``singular_values`` S1 [r], ``right`` V1^T
      [r, in]; they do not multiply up to the weight.
    """

    left: Tensor
    singular_values: Tensor | None
    right: Tensor


class FoldedBasis:
    """What a SODA layer may keep while its parameters do not change.

    Whoever owns it (:class:`spectral_adapters.rotation_bank.RotationBank`) knows when they do.

    Attributes:
        rotated: U R [out, k], or None as long as it was not needed.
        weight: W' [out, in] in the dtype of its last use, or None as long as it was not needed; of
            a layer rotated on the right, the weight with the adapted spectrum alone.
        gradient: the gradient of W' that waits for its contraction.
        uses: forward passes of the model that are expected to share this, at least 1.
    """

    def __init__(self, gradient: KeptGradient, uses: int = 1) -> None:
        self.gradient = gradient
        self.uses = uses
        self.rotated: Tensor | None = None
        self.weight: Tensor | None = None
        self._spectrum: Tensor | None = None
        #: The terms of the spectrum, and the marks of the first.
        self._terms: tuple[Tensor, Tensor, list[int | None]] | None = None
        self._sources: tuple[Tensor | None, ...] = (None, None, None, None)
        self._marks: list[int | None] = []
        self._layouts: list[Any] = []
        self._storages: list[StorageWeakRef] = []

    def forget(self) -> None:
        """Forget everything that was made from parameters."""
        self.rotated = self.weight = self._spectrum = None

    def rotated_in(self, dtype: torch.dtype) -> Tensor | None:
        """U R if it is kept in this very type: what a call returns does not depend on others."""
        return None if self.rotated is None or self.rotated.dtype != dtype else self.rotated

    def shifted(self, singular_values: Tensor, offset: Tensor) -> Tensor:
        """``S + offset`` [k], without a gradient."""
        marks = _marks((singular_values,))
        if (
            self._spectrum is None
            or self._terms is None
            or self._terms[0] is not singular_values
            or self._terms[2] != marks
            or self._were_freed()
        ):
            self._terms = (singular_values, offset, marks)
            shift_together([self])
        assert self._spectrum is not None
        return self._spectrum

    def adopt(self, basis: SpectralBasis, base_weight: Tensor | None) -> None:
        """Forget everything that was made from another basis or base weight than these, and what
        was made in inference mode and cannot be used for training."""
        sources = (*basis, base_weight)
        marks = _marks(sources)
        if marks != self._marks or not all(map(is_, sources, self._sources)) or self._were_freed():
            self._forget_others(sources, marks)
        if (self.rotated is None and self.weight is None) or torch.is_inference_mode_enabled():
            return
        for name in ("rotated", "weight"):
            kept = getattr(self, name)
            if kept is not None and kept.is_inference():
                setattr(self, name, None)

    def _were_freed(self) -> bool:
        """Whether the memory of a source is gone, and may be another's by now."""
        return any(storage.expired() for storage in self._storages)

    def _forget_others(self, sources: tuple[Tensor | None, ...], marks: list[int | None]) -> None:
        """Forget what was made from other tensors than these or views of the same numbers."""
        layouts: list[Any] = [
            None if t is None else (t.shape, t.stride(), t.dtype) for t in sources
        ]
        if marks != self._marks or layouts != self._layouts or self._were_freed():
            self.rotated = self.weight = None
        self._sources, self._layouts, self._marks = sources, layouts, marks
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in sources if t is not None]


@torch.no_grad()
def shift_together(layers: Iterable[FoldedBasis]) -> None:
    """Spectra of many layers by one call: of those that were asked for theirs before."""
    known = []
    for layer in layers:
        if layer._terms is not None:
            values, offset, _ = layer._terms
            if values.device == offset.device:
                known.append((layer, values, offset))
    if not known:
        return
    offsets = [offset.to(values.dtype) for _, values, offset in known]
    sums = torch._foreach_add([values for _, values, _ in known], offsets)
    for (layer, values, offset), spectrum in zip(known, sums, strict=True):
        layer._spectrum, layer._terms = spectrum, (values, offset, _marks((values,)))


class SODATerms(NamedTuple):
    """What a SODA layer's weight is made of.

    Attributes:
        basis: frozen factorisation of the base weight.
        spectrum: s [k] for "svd", the offset d of the diagonal [k] for "qr".
        factors: orthogonal [n_i, n_i], or None without a rotation.
        folded: where to keep products of these, or None.
        offset: svd left only: trained [k] with ``s = S + offset``; the spectrum is then given as
            plain numbers and its gradient is the offset's.
        shared: svd left only: where the factors' gradients go, which are plain numbers then.
    """

    basis: SpectralBasis
    spectrum: Tensor
    factors: Sequence[Tensor] | None
    folded: FoldedBasis | None = None
    offset: Tensor | None = None
    shared: SharedRotations | None = None


def _marks(tensors: Iterable[Tensor | None]) -> list[int | None]:
    """What changes with the numbers of tensors, as far as autograd is told."""
    marks: list[int | None] = []
    for tensor in tensors:
        if tensor is None:
            marks.append(None)
        else:
            marks += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return marks


@overload
def cayley(packed: Tensor, n: int) -> Tensor: ...
@overload
def cayley(packed: Sequence[Tensor], n: Sequence[int]) -> tuple[Tensor, ...]: ...
def cayley(
    packed: Tensor | Sequence[Tensor], n: int | Sequence[int]
) -> Tensor | tuple[Tensor, ...]:
    """Exact Cayley transform, batched: ``R = (I + Q)(I - Q)^-1`` with ``Q = (P - P^T) / 2``.

    ``P`` is strictly upper triangular and given packed, row by row (the order of
    ``torch.triu_indices(n, n, 1)``). A list of batches of different sizes, a whole model for
    instance, is one call and one node of the autograd graph. The backward needs no solve:
    ``dQ = 1/2 (I + R) R^T dR (I + R)^T``.

    Args:
        packed: [B, n(n-1)/2], or a sequence of such; fp16 and bf16 are computed and returned in
            fp32.
        n: size of the rotations, or one size per batch.

    Returns:
        [B, n, n] rotations (``R^T R = I``, ``det R = 1``, ``R = I`` at zero), or a tuple of such.

    Raises:
        TypeError, ValueError: a shape or dtype does not fit, naming the argument.
    """
    if isinstance(packed, Tensor):
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an int when packed is one tensor; got {n!r}")
        return _cayley_list([packed], [n])[0]
    if isinstance(packed, (str, bytes)) or not isinstance(packed, Sequence):
        raise TypeError(
            f"packed must be a tensor or a sequence of tensors; got {type(packed).__name__}"
        )
    if not isinstance(n, Sequence) or len(packed) != len(n):
        raise ValueError(
            f"n must hold one size for each of the {len(packed)} batches in packed; got {n!r}"
        )
    return _cayley_list(list(packed), list(n))


def _cayley_list(packed: list[Tensor], sizes: list[int]) -> tuple[Tensor, ...]:
    if not packed:
        return ()
    batches = []
    for i, (batch, n) in enumerate(zip(packed, sizes, strict=True)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be at least 1; got {n!r}")
        check_tensor(f"packed[{i}]", batch, ndim=2)
        check_device(f"packed[{i}]", batch, packed[0].device, "packed[0]")
        check_last_dimension(f"packed[{i}]", batch, packed_length(n), f"n(n-1)/2 for n = {n}")
        batches.append(_at_least_fp32(batch).contiguous())
    return apply(CayleyFunction, tuple(sizes), *batches)


def cayley_factors(packed: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """:func:`cayley` of a layer's factors: [n_i(n_i-1)/2] each -> [n_i, n_i] each."""
    batches = [_at_least_fp32(parameter).contiguous() for parameter in packed]
    return apply(CayleyFunction, tuple(sizes), *batches)


def kron_rotate(
    x: Tensor,
    factors: Sequence[Tensor],
    *,
    transpose: bool = False,
    orthogonal: bool = False,
) -> Tensor:
    """Rows of ``x`` times a Kronecker product: ``x @ (R1 (x) ... (x) Rf)``, never built.

    Args:
        x: [..., k] with k the product of the factors' sizes; fp16, bf16, fp32 or fp64.
        factors: square matrices [n_i, n_i], the first outermost: ``i = (i1 * n2 + i2) * n3 + i3``.
        transpose: use the transpose of every factor.
        orthogonal: promise that the factors are orthogonal; the backward then takes one pass.
            Without it the gradient is right for any square factors.

    Returns:
        [..., k] in the dtype of ``x``; accumulated in fp32 (fp64 for fp64).
    """
    check_tensor("x", x)
    matrices = check_square_factors("factors", factors, device=x.device)
    width = prod([matrix.shape[0] for matrix in matrices])
    check_last_dimension("x", x, width, "the product of the factors' sizes")
    matrices = [_match_accumulation(matrix, x) for matrix in matrices]
    flat = x.reshape(-1, width)
    return apply(KronRotateFunction, flat, transpose, orthogonal, *matrices).view(x.shape)


def kron_gram(a: Tensor, b: Tensor, dims: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """All partial-trace Grams of two row batches, and the column sums of their product.

    ``gram_i = sum over tokens of (mode-i unfolding of a)(mode-i unfolding of b)^T``, the partial
    trace of ``sum_t a_t b_t^T`` over every axis but i.

    Args:
        a, b: [M, k], the same dtype.
        dims: sizes of the axes, with product k.

    Returns:
        (tuple of [n_i, n_i], column sums of ``a * b`` [k]), in fp32 (fp64 for fp64).
    """
    check_tensor("a", a, ndim=2)
    check_tensor("b", b, ndim=2)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            "b must have the shape, dtype and device of a; got "
            f"{tuple(b.shape)} {b.dtype} {b.device} for {tuple(a.shape)} {a.dtype} {a.device}"
        )
    sizes = check_factor_sizes("dims", dims, a.shape[1], "the columns of a and b")
    *grams, column_sums = apply(KronGramFunction, a, b, sizes)
    return tuple(grams), column_sums


def rotated_linear(
    x: Tensor,
    matrix: Tensor,
    factors: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    subtract: Tensor | None = None,
    bias: Tensor | None = None,
    transpose: bool = False,
    on_tokens: bool = False,
) -> Tensor:
    """``(x * scale) (M R)^T - x N^T + bias`` for a frozen M and orthogonal factors R.

    Args:
        x: [..., k].
        matrix: frozen M [rows, k].
        factors: orthogonal [n_i, n_i] with product of sizes k (their gradient assumes it).
        scale: [k], trained, or None.
        subtract: frozen N [rows, k], or None; not with ``on_tokens``.
        bias: [rows] or None.
        transpose: use ``R^T``.
        on_tokens: rotate the rows of x instead of those of M; the same product.

    Returns:
        [..., rows] in the dtype of x (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: a shape or dtype does not fit, naming the argument.
    """
    if on_tokens and subtract is not None:
        raise ValueError("subtract must be None when on_tokens is True; got a tensor")
    check_tensor("matrix", matrix, ndim=2)
    check_tensor("x", x)
    check_last_dimension("x", x, matrix.shape[1], "the columns of matrix")
    matrices = check_square_factors("factors", factors, matrix.shape[1], x.device)
    check_vector("scale", scale, matrix.shape[1])
    check_vector("bias", bias, matrix.shape[0])
    if subtract is not None:
        check_tensor("subtract", subtract)
        if subtract.shape != matrix.shape:
            raise ValueError(
                f"subtract must have the shape of matrix, {tuple(matrix.shape)}; "
                f"got {tuple(subtract.shape)}"
            )
    bias = None if bias is None else bias.to(x.dtype)
    return _rotated_linear(
        x,
        matrix,
        matrices,
        scale=scale,
        subtract=subtract,
        bias=bias,
        transpose=transpose,
        on_tokens=on_tokens,
    )


def _rotated_linear(
    x: Tensor,
    matrix: Tensor,
    factors: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    subtract: Tensor | None = None,
    bias: Tensor | None = None,
    transpose: bool = False,
    on_tokens: bool = False,
) -> Tensor:
    """:func:`rotated_linear` of what is known to fit."""
    return apply(
        RotatedLinearFunction, x, scale, matrix, subtract, bias, transpose, on_tokens, *factors
    )


def soda_linear(
    x: Tensor,
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    decomposition: str = "svd",
    rotation: str | None = "left",
    plan: str = "auto",
    base_weight: Tensor | None = None,
    folded: FoldedBasis | None = None,
    recompute: bool = False,
) -> Tensor:
    """``x W'^T + bias`` for a SODA-adapted weight, by the cheapest of three equal-valued plans.

    ======= ======== ==========================================
    decomp. rotation adapted weight (DESIGN section 2)
    ======= ======== ==========================================
    svd     left     ``(U R) diag(s) V^T``
    svd     right    ``U diag(s) V^T R^T``
    qr      left     ``(Q R)(T + diag d)``
    qr      right    ``(L + diag d) Q R^T``
    either  None     the same without R
    ======= ======== ==========================================

    Args:
        x: [..., in].
        basis: frozen factorisation of the base weight.
        spectrum: [k]; the adapted singular values s for "svd", the offset d of the diagonal for
            "qr".
        factors: orthogonal [n_i, n_i]; product of sizes k (left) or in (right); None without
            rotation.
        bias: [out] or None.
        plan: "auto", "factored", "merged" or "tokens" (see ``spectral_adapters.planner``).
        base_weight: the frozen ``W0`` [out, in] itself, where the caller has it: the merged plan
            then adds an exact difference to it, so that an untrained adapter returns ``W0`` to the
            last bit.
        folded: where to keep the rotated basis and the merged weight between calls with the same
            parameters, or None.
        recompute: svd left only: keep x for the backward instead of ``x V`` and of everything of
            the weight's size; one more product, less memory where layers share their input.

    Returns:
        [..., out] in the dtype of x (the autocast dtype under autocast). GEMMs run in that dtype on
        accelerators and in at least fp32 on the CPU; small sums always accumulate in fp32.
    """
    factors = _check_soda(basis, spectrum, factors, decomposition, rotation)
    check_choice("plan", plan, ("auto", *PLANS))
    check_recompute(recompute, decomposition, rotation)
    check_tensor("x", x)
    check_last_dimension("x", x, basis.right.shape[1], "the layer's in_features")
    check_vector("bias", bias, basis.left.shape[0])
    _check_base_weight(base_weight, basis)

    return adapted_product(
        x,
        SODATerms(basis, spectrum, factors, folded),
        bias,
        decomposition=decomposition,
        rotation=rotation,
        plan=plan,
        base_weight=base_weight,
        recompute=recompute,
    )


def adapted_product(
    x: Tensor,
    terms: SODATerms,
    bias: Tensor | None,
    *,
    decomposition: str,
    rotation: str | None,
    plan: str,
    base_weight: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """:func:`soda_linear` without checks of what a layer knows of itself."""
    basis, spectrum, factors, folded, offset, shared = terms
    is_autocast = autocast_is_on(x.device.type)
    out_dtype, work_dtype = basis_dtypes(x, basis, is_autocast)
    out_features, in_features = basis.left.shape[0], basis.right.shape[1]
    sizes = None if factors is None else tuple([factor.shape[0] for factor in factors])
    training = torch.is_grad_enabled()
    trained = spectrum if offset is None else offset
    fixed_spectrum = folded is not None and not (training and trained.requires_grad)
    uses = 1
    if folded is not None and keeps_builds(decomposition, rotation, recompute):
        uses = folded.uses
    # Tracing cannot see into a cache, and would warn of it.
    choose = choose_plan if torch.compiler.is_compiling() else remembered_plan
    name = choose(
        x.numel() // in_features,
        out_features,
        in_features,
        sizes,
        decomposition=decomposition,
        rotation=rotation,
        plan=plan,
        backward=training,
        uses=uses,
        has_base=base_weight is not None,
        fixed_spectrum=fixed_spectrum,
        rates=rates_for(x.device, work_dtype, sizes),
    ).name
    if folded is not None and folded.gradient.is_waiting and training:
        name = "merged"  # its backward takes the gradient that waits
    if folded is not None:
        folded.adopt(basis, base_weight)
    with _no_autocast(x.device) if is_autocast else nullcontext():
        if x.dtype != work_dtype:
            x = x.to(work_dtype)
        if bias is not None and bias.dtype != work_dtype:
            bias = bias.to(work_dtype)
        if name == "tokens" and rotation == "right" and fixed_spectrum and base_weight is not None:
            assert factors is not None and folded is not None
            weight = _spectrum_only_weight(basis, spectrum, decomposition, base_weight, folded)
            turned = kron_rotate(x, factors, orthogonal=True)
            y = linear(turned, weight.to(work_dtype), bias)
        elif decomposition == "svd" and rotation == "left":
            assert factors is not None
            arguments = (x, basis, spectrum, factors, bias, folded, recompute, offset, shared)
            if name == "merged":
                y = _merged_product(*arguments, base_weight)
            else:
                y = _spectral_product(*arguments, on_tokens=name == "tokens")
        elif name == "merged":
            weight = soda_weight(
                basis,
                spectrum,
                factors,
                decomposition=decomposition,
                rotation=rotation,
                base_weight=base_weight,
            )
            y = linear(x, weight.to(work_dtype), bias)
        else:
            y = _soda_product(
                x, basis, spectrum, factors, bias, decomposition, rotation, name == "tokens"
            )
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _spectral_product(
    x: Tensor,
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    folded: FoldedBasis | None,
    recompute: bool,
    offset: Tensor | None,
    shared: SharedRotations | None,
    *,
    on_tokens: bool,
) -> Tensor:
    """The factored and tokens plans of svd left; x and bias already in the working dtype."""
    left, _, right = basis
    if recompute:
        folded = None
    node = None if shared is None or offset is None else node_of("soda_linear", x, shared)
    if node is not None:
        assert shared is not None
        kept = None if folded is None else folded.rotated_in(x.dtype)
        flags = (on_tokens, recompute, folded is not None)
        behind = (offset, shared.token, shared.pool.number, shared.first, factors)
        y, *made = node(x, spectrum, left, right, bias, kept, *flags, *behind)
        if folded is not None and made:
            folded.rotated = made[0]
        return y
    y, _, rotated = (apply if shared is None else record)(
        SODALinearFunction,
        x,
        spectrum,
        left,
        right,
        bias,
        None if folded is None else folded.rotated_in(x.dtype),
        on_tokens,
        recompute,
        folded is not None,
        offset,
        None if shared is None else shared.token,
        shared,
        *factors,
    )
    if folded is not None and rotated is not None:
        folded.rotated = rotated
    return y


def _merged_product(
    x: Tensor,
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    folded: FoldedBasis | None,
    recompute: bool,
    offset: Tensor | None,
    shared: SharedRotations | None,
    base_weight: Tensor | None,
) -> Tensor:
    """The merged plan of svd left; x and bias already in the working dtype."""
    kept = rotated = None
    if folded is not None:
        kept = folded.weight
        rotated = folded.rotated_in(torch.promote_types(basis.left.dtype, torch.float32))
    if kept is not None and kept.dtype != x.dtype:
        kept = None
    node = None if shared is None or offset is None else node_of("merged_linear", x, shared)
    if node is not None:
        assert shared is not None
        gradient = None if folded is None else folded.gradient.number
        behind = (recompute, offset, shared.token, shared.pool.number, shared.first, factors)
        y, *made = node(x, spectrum, *basis, base_weight, bias, kept, rotated, gradient, *behind)
        if folded is not None and not recompute:
            _keep(folded, *made)
        return y
    y, *made = (apply if shared is None else record)(
        MergedLinearFunction,
        x,
        spectrum,
        *basis,
        base_weight,
        bias,
        kept,
        rotated,
        None if folded is None else folded.gradient,
        recompute,
        offset,
        None if shared is None else shared.token,
        shared,
        *factors,
    )
    if folded is not None and not recompute:
        _keep(folded, *made)
    return y


def _keep(folded: FoldedBasis, weight: Tensor | None = None, rotated: Tensor | None = None) -> None:
    """Hold on to what was built."""
    if weight is not None:
        folded.weight = weight
    if rotated is not None:
        folded.rotated = rotated


def keeps_builds(decomposition: str, rotation: str | None, recompute: bool) -> bool:
    """Whether what the merged plan builds may be kept for further passes."""
    return (decomposition, rotation) == ("svd", "left") and not recompute


def check_recompute(recompute: bool, decomposition: str, rotation: str | None) -> None:
    """Raise unless ``recompute`` is a bool that the method supports."""
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be True or False; got {recompute!r}")
    if recompute and (decomposition, rotation) != ("svd", "left"):
        raise ValueError(
            "recompute must be False except for decomposition='svd' with rotation='left'; "
            f"got True with {decomposition!r} and {rotation!r}"
        )


def _soda_product(
    x: Tensor,
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None,
    bias: Tensor | None,
    decomposition: str,
    rotation: str | None,
    on_tokens: bool,
) -> Tensor:
    """The factored and tokens plans but of svd left; x and bias already in the working dtype."""
    left, right = basis.left, basis.right.to(x.dtype)
    if rotation == "right":
        assert factors is not None
        z = _rotated_linear(x, basis.right, factors, transpose=True, on_tokens=on_tokens)
    else:
        z = linear(x, right)
    if decomposition == "svd":
        return spectral_output(z, basis, spectrum, None, bias, on_tokens=on_tokens)
    if rotation == "left":
        assert factors is not None
        t = z + x[..., : z.shape[-1]] * spectrum.to(x.dtype)
        return _rotated_linear(t, left, factors, bias=bias, on_tokens=on_tokens)
    y = linear(z, left.to(x.dtype), bias)
    return y + pad(z * spectrum.to(z.dtype), (0, y.shape[-1] - z.shape[-1]))


def spectral_output(
    z: Tensor,
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None,
    bias: Tensor | None,
    *,
    on_tokens: bool,
) -> Tensor:
    """Second half of an SVD product: z = x V [..., k] to (z * s)(U R)^T + bias [..., out]."""
    if factors is None:
        return linear(z * spectrum.to(z.dtype), basis.left.to(z.dtype), bias)
    return _rotated_linear(z, basis.left, factors, scale=spectrum, bias=bias, on_tokens=on_tokens)


def soda_weight(
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None = None,
    *,
    decomposition: str = "svd",
    rotation: str | None = "left",
    base_weight: Tensor | None = None,
) -> Tensor:
    """The dense adapted weight ``W'`` [out, in], differentiable in ``spectrum`` and ``factors``.

    Arguments as in :func:`soda_linear`. With ``base_weight`` the result is ``W0 + dW`` with an
    exact ``dW`` (zero to the last bit for an untrained adapter); without it, the product of the
    factors. In the wider of the dtypes of basis and ``base_weight``.
    """
    factors = _check_soda(basis, spectrum, factors, decomposition, rotation)
    _check_base_weight(base_weight, basis)
    if base_weight is not None and rotation == "right":
        # A rotation by identities changes no bit, so W0 itself may be rotated.
        assert factors is not None
        weight = base_weight + _spectral_change(basis, spectrum, decomposition)
        return kron_rotate(weight, factors, transpose=True, orthogonal=True)
    if base_weight is not None:
        delta = soda_delta_weight(
            basis, spectrum, factors, decomposition=decomposition, rotation=rotation
        )
        return base_weight + delta
    left, right = basis.left, basis.right
    if decomposition == "svd" and rotation != "right":
        return _svd_weight(basis, spectrum, factors or (), None)
    if rotation == "left":
        assert factors is not None
        return _rotated_linear((right + _diagonal(spectrum, right)).mT, left, factors).mT
    if decomposition == "svd":
        weight = _svd_weight(basis, spectrum, (), None)
    else:
        wide = at_least(left, spectrum.dtype) @ at_least(right, spectrum.dtype)
        weight = wide + _top_rows(spectrum[:, None] * right, left.shape[0])
    if rotation == "right":
        assert factors is not None
        weight = kron_rotate(weight, factors, transpose=True, orthogonal=True)
    return weight


def soda_delta_weight(
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None = None,
    *,
    decomposition: str = "svd",
    rotation: str | None = "left",
) -> Tensor:
    """``W' - W0`` [out, in] without cancellation: exactly zero for an untrained adapter.

    Left: ``(U R diag(s) - U diag(S)) V^T``. Right: ``C R^T - W0`` with ``C = W0 + U diag(s - S)
    V^T``.
    Arguments as in :func:`soda_linear`.
    """
    factors = _check_soda(basis, spectrum, factors, decomposition, rotation)
    left, singular_values, right = basis
    if rotation == "left":
        assert factors is not None
        if decomposition == "svd":
            return _svd_weight(basis, spectrum, factors, singular_values)
        turned = _rotated_linear(
            # A view: Dynamo takes no tensor twice among the inputs of one Function.
            (right + _diagonal(spectrum, right)).mT,
            left,
            factors,
            subtract=left.view_as(left),
        ).mT
        return turned + pad(left * spectrum, (0, right.shape[1] - right.shape[0]))
    change = _spectral_change(basis, spectrum, decomposition)
    if rotation is None:
        return change
    assert factors is not None
    base = at_least(left, spectrum.dtype)
    if singular_values is not None:
        base = base * singular_values
    base = base @ at_least(right, spectrum.dtype)
    return kron_rotate(base + change, factors, transpose=True, orthogonal=True) - base


def _spectral_change(basis: SpectralBasis, spectrum: Tensor, decomposition: str) -> Tensor:
    """What the spectrum alone adds to the weight, [out, in]: no product of matrices for "qr"."""
    left, singular_values, right = basis
    if decomposition == "svd":
        return _svd_weight(basis, spectrum, (), singular_values)
    return _top_rows(spectrum[:, None] * right, left.shape[0])


@torch.no_grad()
def _spectrum_only_weight(
    basis: SpectralBasis,
    spectrum: Tensor,
    decomposition: str,
    base_weight: Tensor,
    folded: FoldedBasis,
) -> Tensor:
    """The weight [out, in] with the adapted spectrum and without the rotation, kept."""
    if folded.weight is None:
        folded.weight = base_weight + _spectral_change(basis, spectrum, decomposition)
    return folded.weight


def _svd_weight(
    basis: SpectralBasis, spectrum: Tensor, factors: Sequence[Tensor], subtract: Tensor | None
) -> Tensor:
    """``(U R diag(s) - U diag(S)) V^T`` [out, in], without factors R = I, without S the first part
    alone."""
    weight, _ = apply(RotatedWeightFunction, spectrum, basis.left, subtract, basis.right, *factors)
    return weight


def low_rank_factors(
    basis: SpectralBasis,
    *,
    shifts: tuple[Tensor, Tensor] | None = None,
    rotations: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A Spectral Adapter's change of the weight as two thin matrices, ``W' - W0 = up @ down``.

    * A (shifts): ``(U1 + A_U) S1 (V1 + A_V)^T - U1 S1 V1^T``, of rank 2r at most;
    * R (rotations): ``U1 (R_U S1 R_V^T - S1) V1^T``, of rank r at most

    (Zhang and Pilanci, "Spectral Adapter", NeurIPS 2024; the chosen columns have the index 1). The
    product is exactly zero for zero shifts and for identities, and nothing cancels.

    Args:
        basis: U1 [out, r], S1 [r], V1^T [r, in].
        shifts: A_U [out, r] and A_V [in, r].
        rotations: orthogonal R_U and R_V [r, r].

    Returns:
        (down [2r or r, in], up [out, 2r or r]), differentiable in shifts or rotations.

    Raises:
        ValueError: not exactly one of shifts and rotations, or a shape does not fit.
    """
    left, singular_values, right = _check_low_rank(basis, shifts, rotations)
    if shifts is not None:
        shift_left, shift_right = shifts
        turned = shift_right.mT
        down = torch.cat([turned, right + turned])
        return down, torch.cat([left * singular_values, shift_left * singular_values], 1)
    assert rotations is not None
    rotation_left, rotation_right = rotations
    middle = (rotation_left * singular_values) @ rotation_right.mT - torch.diag(singular_values)
    return right, left @ middle


def _check_low_rank(
    basis: SpectralBasis,
    shifts: tuple[Tensor, Tensor] | None,
    rotations: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The basis, if exactly one of shifts and rotations is given and fits it."""
    left, singular_values, right = basis
    if (shifts is None) == (rotations is None):
        raise ValueError(
            "exactly one of shifts and rotations must be given; "
            f"got {'neither' if shifts is None else 'both'}"
        )
    if singular_values is None:
        raise ValueError("basis.singular_values must be a tensor [r]; got None")
    r = len(singular_values)
    if shifts is not None:
        _check_shapes("shifts", shifts, ((left.shape[0], r), (right.shape[1], r)))
    else:
        assert rotations is not None
        _check_shapes("rotations", rotations, ((r, r), (r, r)))
    return left, singular_values, right


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``x (up @ down)^T``: x [..., in], down [q, in], up [out, q] to [..., out].

    In the dtype of x (the autocast dtype under autocast); GEMMs as in :func:`soda_linear`.

    Raises:
        TypeError, ValueError: a shape or dtype does not fit, naming the argument.
    """
    check_tensor("x", x)
    check_tensor("down", down, ndim=2)
    check_last_dimension("x", x, down.shape[1], "the columns of down")
    check_last_dimension("up", check_tensor("up", up, ndim=2), down.shape[0], "the rows of down")
    return adapted_linear(LowRankLinearFunction, x, (down, up))


def adapted_linear(
    function: type[torch.autograd.Function],
    x: Tensor,
    factors: Sequence[Tensor],
    *,
    scaling: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    shared: SharedRotations | None = None,
) -> Tensor:
    """A linear layer with a change of low rank: one op per direction where the dtypes allow it.

    Args:
        function: ``LowRankLinearFunction``, ``SpectralALinearFunction`` or
            ``SpectralRLinearFunction``.
        x: [..., in].
        factors: what ``function`` takes between the bias and the scaling.
        scaling: of the change.
        weight, bias: W0 [out, in], and [out] or None: the change is added to ``x W0^T + bias``.
        base: [..., out], what the change is added to instead. Without either it is returned alone.
        shared: ``SpectralRLinearFunction`` only: where the rotations' gradients go, which are plain
            numbers then.

    Returns:
        [..., out] in the dtype of ``base``, else of x (the autocast dtype under autocast).
    """

    def product(x: Tensor, base: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Any:
        node = None
        if torch.compiler.is_compiling():
            pass  # Functions cannot be compared there
        elif function is SpectralALinearFunction:
            node = node_of("spectral_a_linear", x)
        elif function is SpectralRLinearFunction and shared is not None:
            node = node_of("spectral_r_linear", x, shared)
        if node is None:
            tail = () if shared is None else (shared.token, shared)
            return apply(function, x, base, weight, bias, *factors, float(scaling), *tail)[0]
        behind = () if shared is None else (shared.token, shared.pool.number, shared.first)
        return node(x, base, weight, bias, *factors, scaling, *behind)

    is_autocast = autocast_is_on(x.device.type)
    result = result_dtype(x, is_autocast)
    work = _work_dtype(x, result, factors[0])
    own = work if weight is None else _work_dtype(x, result, weight)
    change: Tensor
    with _no_autocast(x.device) if is_autocast else nullcontext():
        if weight is not None:
            # A weight that is trained itself needs a product of its own, which has its gradient.
            if result == work == own and not weight.requires_grad:
                if weight.dtype != work:
                    weight = weight.to(work)  # here: what the op would do again in its backward
                x = x if x.dtype == work else x.to(work)
                return product(x, None, weight, bias)
            bias = None if bias is None else bias.to(own)
            base = linear(x.to(own), weight.to(own), bias).to(result)
        start = base if base is not None and base.dtype == work else None
        change = product(x.to(work), start, None, None)
        if base is None:
            return change.to(result)
        return change if start is not None else base + change.to(base.dtype)


def low_rank_spectral_linear(
    x: Tensor,
    weight: Tensor,
    basis: SpectralBasis,
    *,
    shifts: tuple[Tensor, Tensor] | None = None,
    rotations: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x W'^T + bias`` for Spectral Adapter A (shifts) or R (rotations), as a LoRA computes it.

    ``W' = W0 + up @ down`` is never built; see :func:`low_rank_factors` for the formulas.

    Args:
        x: [..., in].
        weight: frozen W0 [out, in].
        basis: chosen columns of its SVD, U1 [out, r], S1 [r], V1^T [r, in].
        shifts: A_U [out, r] and A_V [in, r].
        rotations: orthogonal R_U and R_V [r, r].
        bias: [out] or None.

    Returns:
        [..., out] in the dtype of x (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: a shape does not fit, or not exactly one of shifts and rotations.
    """
    check_tensor("weight", weight, ndim=2)
    check_tensor("x", x)
    check_last_dimension("x", x, weight.shape[1], "the layer's in_features")
    frozen = _check_low_rank(basis, shifts, rotations)
    thin = (basis.left, basis.right.mT)
    _check_shapes("basis", thin, ((weight.shape[0], -1), (weight.shape[1], -1)))
    check_vector("bias", bias, weight.shape[0])
    if shifts is not None:
        factors = (*frozen, *shifts)
        return adapted_linear(SpectralALinearFunction, x, factors, weight=weight, bias=bias)
    assert rotations is not None
    wide = torch.promote_types(rotations[0].dtype, rotations[1].dtype)
    wide = torch.promote_types(wide, torch.float32)
    turns = [rotation.to(wide) for rotation in rotations]
    return adapted_linear(SpectralRLinearFunction, x, (*frozen, *turns), weight=weight, bias=bias)


def _check_shapes(
    argument: str, values: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> None:
    """Raise ``ValueError`` unless the matrices have these shapes; -1 allows any size."""
    if len(values) != len(shapes):
        raise ValueError(f"{argument} must hold {len(shapes)} matrices; got {len(values)}")
    for i, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        check_tensor(f"{argument}[{i}]", value, ndim=2)
        if any(wanted not in (-1, size) for size, wanted in zip(value.shape, shape, strict=True)):
            expected = tuple("any" if size == -1 else size for size in shape)
            raise ValueError(
                f"{argument}[{i}] must have shape {expected}; got {tuple(value.shape)}"
            )


def _diagonal(values: Tensor, like: Tensor) -> Tensor:
    """[k, in] with ``values`` [k] on the main diagonal."""
    return pad(torch.diag(values), (0, like.shape[1] - like.shape[0]))


def _top_rows(rows: Tensor, count: int) -> Tensor:
    """``rows`` [k, in] followed by zero rows: [count, in]."""
    return pad(rows, (0, 0, 0, count - rows.shape[0]))


def _check_soda(
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None,
    decomposition: str,
    rotation: str | None,
) -> list[Tensor] | None:
    """The factors, if all that a SODA layer is made of fits together."""
    check_choice("decomposition", decomposition, DECOMPOSITIONS)
    check_choice("rotation", rotation, ROTATIONS)
    if not isinstance(basis, SpectralBasis):
        raise TypeError(f"basis must be a SpectralBasis; got {type(basis).__name__}")
    check_tensor("basis.left", basis.left, ndim=2)
    check_tensor("basis.right", basis.right, ndim=2)
    rank = basis.right.shape[0]
    if basis.left.shape[1] != rank:
        raise ValueError(
            f"basis.left must have {rank} columns, one for each row of basis.right; "
            f"got shape {tuple(basis.left.shape)}"
        )
    check_vector("spectrum", check_tensor("spectrum", spectrum), rank)
    if (basis.singular_values is None) != (decomposition == "qr"):
        expected = "None" if decomposition == "qr" else "a tensor [k]"
        raise ValueError(
            f"basis.singular_values must be {expected} for decomposition={decomposition!r}; "
            f"got {type(basis.singular_values).__name__}"
        )
    if rotation is None:
        if factors:
            raise ValueError(
                f"factors must be None without a rotation; got {type(factors).__name__}"
            )
        return None
    width = rank if rotation == "left" else basis.right.shape[1]
    return check_square_factors("factors", factors, width)


def _check_base_weight(base_weight: Tensor | None, basis: SpectralBasis) -> None:
    if base_weight is None:
        return
    shape = (basis.left.shape[0], basis.right.shape[1])
    if check_tensor("base_weight", base_weight).shape != shape:
        raise ValueError(f"base_weight must have shape {shape}; got {tuple(base_weight.shape)}")


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _match_accumulation(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def product_dtypes(x: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the result, dtype of the GEMMs) for activations x and a frozen weight or basis.

    The result has the dtype that a linear layer would return here: the autocast dtype under
    autocast, else that of x. On accelerators the GEMMs run in it; on the CPU, where low precision
    is only a storage format, they run in the wider of it and the weight's.
    """
    result = result_dtype(x, autocast_is_on(x.device.type))
    return result, _work_dtype(x, result, weight)


def _work_dtype(x: Tensor, result: torch.dtype, weight: Tensor) -> torch.dtype:
    if result == weight.dtype or x.device.type != "cpu":
        return result
    return torch.promote_types(result, weight.dtype)


def basis_dtypes(
    x: Tensor, basis: SpectralBasis, is_autocast: bool
) -> tuple[torch.dtype, torch.dtype]:
    """:func:`product_dtypes` of activations x and a frozen basis.

    A half-precision basis is a way to keep it, not a wish for half-precision products: what the CPU
    does in at least fp32 it does so with any basis.
    """
    result = result_dtype(x, is_autocast)
    if x.device.type != "cpu" or result == basis.left.dtype == torch.float32:
        return result, result
    work = torch.promote_types(result, basis.left.dtype)
    return result, torch.promote_types(work, torch.float32)


def result_dtype(x: Tensor, is_autocast: bool) -> torch.dtype:
    """What a linear layer would return here for activations x."""
    if is_autocast and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products keep the dtypes that :func:`product_dtypes` chose."""
    return _no_autocast(device) if autocast_is_on(device.type) else nullcontext()


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False)


def autocast_is_on(device_type: str) -> bool:
    """Whether products on this type of device change their dtypes; also for those without it."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False  # what is asked for at every forward pass, in one call
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
