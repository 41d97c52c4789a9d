"""Autograd Functions over the raw ops: thin, once differentiable, no shapes checked here.

Gradients are those of DESIGN section 3: no dense rotation, no ``dR`` of the whole Kronecker
product and no solve is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial, wraps
from threading import Lock
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from spectral_kernels.ops.kron import accumulation_dtype, eager_op, gram_axis, rotate_axis
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
from spectral_kernels.ops.soda_linear import soda_linear_bwd_reference, soda_linear_fwd_reference

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
        return record(function, *args)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return function.apply(*args)  # raises where there is a tangent, which no formula is for
    return function.forward(*args)


def record(function: type[torch.autograd.Function], *args: Any) -> Any:
    """:func:`apply` where a gradient is asked for."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # What Function.apply does once it has bound the arguments to the signature of forward, which
    # takes longer than all the rest and here, where none is missing, changes nothing.
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def outside_autocast(backward: _Backward) -> _Backward:
    """A backward whose dtypes are those that the forward chose, also where autocast is on."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if not torch._C._is_any_autocast_enabled():
            return backward(ctx, *grads)
        with ExitStack() as stack:
            accelerator = torch.accelerator.current_accelerator()
            for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return backward(ctx, *grads)

    return cast(_Backward, run)


def raw(op: Callable[..., Any], *args: Any) -> Any:
    """Call a raw op from inside a Function, below autograd and so past the op's guard."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _product(op: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or under ``torch.compile`` its reference, which leaves the GEMMs to the compiler."""
    return reference if torch.compiler.is_compiling() else partial(raw, op)


def at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in the smallest type that holds its numbers and those of ``dtype``."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def _fused(
    op: Callable[..., Any], reference: Callable[..., Any], x: Tensor, arguments: tuple[Any, ...]
) -> Any:
    """An op where it has an implementation of its own, else its reference: called without the
    dispatcher, which takes longer than the work of a small layer."""
    if not torch.compiler.is_compiling() and _is_compiled_for(x.device.type):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    return reference(*arguments)


@lru_cache
def _is_compiled_for(device: str) -> bool:
    """Whether the extension has the SODA layer's ops for a type of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return key is not None and has_kernel("spectral::soda_linear_fwd", key)


def eager_kron(name: str, x: Tensor, *args: Any) -> Any:
    """``kron_rotate`` or ``kron_gram`` of ``x`` inside a Function; when traced, the op itself."""
    if torch.compiler.is_compiling():
        return getattr(_ops, name)(x, *args)
    return raw(eager_op(name, x.device.type), x, *args)


class CayleyFunction(torch.autograd.Function):
    """Packed skew parameters of a whole model to rotations, as one node of the graph.

    Inputs: ``sizes`` (tuple of ints) and per batch ``packed`` [B_i, n_i(n_i-1)/2] or, for a single
    rotation, [n_i(n_i-1)/2]; outputs [B_i, n_i, n_i] or [n_i, n_i]. Keeps the rotations only, and
    not through ``save_for_backward``: a checkpoint must find the same saved tensors when it
    recomputes, and by then another may have computed the rotations (:class:`SharedCayleyFunction`).
    """

    @staticmethod
    def forward(sizes: tuple[int, ...], *packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(raw(_ops.cayley_fwd, packed, sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.is_traced = torch.compiler.is_compiling()
        if ctx.is_traced:
            ctx.save_for_backward(*output)
        else:
            ctx.rotations = [rotation.detach() for rotation in output]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rotations = ctx.saved_tensors if ctx.is_traced else ctx.rotations
        return None, *_cayley_gradients(grads, rotations, ctx.needs_input_grad[1:])


def _cayley_gradients(
    grads: Sequence[Tensor | None], rotations: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of packed parameters by one call; None where none is needed or came."""
    wanted = [i for i, grad in enumerate(grads) if grad is not None and needed[i]]
    results: list[Tensor | None] = [None] * len(grads)
    found = raw(_ops.cayley_bwd, [grads[i] for i in wanted], [rotations[i] for i in wanted])
    for i, grad in zip(wanted, found, strict=True):
        results[i] = grad
    return results


class GradientPool:
    """Gradients of rotations, added up by a model's layers during one backward pass.

    Every pass has sums of its own: one may run inside another (a reentrant checkpoint), or beside
    it in another thread. :func:`gradient_pool` makes the extension's where there is one.
    """

    #: What the extension knows the pool by, if it is the extension's.
    number: int | None = None

    def __init__(self, count: int) -> None:
        self._count = count
        #: By the number of the backward pass: the sums, and one of their sources.
        self._passes: dict[int, tuple[list[Tensor | None], list[Tensor]]] = {}
        self._lock = Lock()

    def add(self, first: int, grads: Sequence[Tensor], source: Tensor) -> Tensor | None:
        """Add the gradients of rotations number ``first`` and the following.

        ``source`` is what they were made of. Returns the token's gradient: none, as the pool has it
        all. Compiled autograd, which runs a backward outside of its node, cannot add two of none
        and gets an empty one, like the token.
        """
        with self._lock:
            sums, sources = self._pass_now()
            if source.requires_grad:
                sources[:] = [source]
            for index, grad in enumerate(grads, first):
                known = sums[index]
                sums[index] = grad if known is None else known + grad
        inside = torch._C._current_autograd_node() is not None
        return None if inside or not grads else grads[0].new_empty(0)

    def take(self) -> tuple[list[Tensor | None], Tensor | None]:
        """The sums of this backward pass, and one of their sources that has a gradient itself, if
        any has."""
        empty: tuple[list[Tensor | None], list[Tensor]] = ([None] * self._count, [])
        with self._lock:
            sums, sources = self._passes.pop(torch._C._current_graph_task_id(), empty)
        return sums, next(iter(sources), None)

    def _pass_now(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """What the pass has that runs now.

        Sums that nobody takes go when it ends; those of one that failed go with the pool, at the
        next change of the parameters.
        """
        number = torch._C._current_graph_task_id()
        if number not in self._passes:
            self._passes[number] = ([None] * self._count, [])
            if number != -1:
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: self._forget(number))
        return self._passes[number]

    def _forget(self, number: int) -> None:
        self._passes.pop(number, None)


class _ExtensionPool(GradientPool):
    """The same in the extension (csrc/gradient_pool.h)."""

    def __init__(self, count: int) -> None:
        self._pool = torch.classes.spectral_nodes.GradientPool(count)
        self.number = self._pool.number()

    def add(self, first: int, grads: Sequence[Tensor], source: Tensor) -> Tensor | None:
        return self._pool.add(first, list(grads), source)

    def take(self) -> tuple[list[Tensor | None], Tensor | None]:
        return self._pool.take()


def gradient_pool(count: int) -> GradientPool:
    """An empty pool for as many rotations, which the nodes of :func:`node_of` can add to."""
    return (GradientPool if _node("soda_linear") is None else _ExtensionPool)(count)


@lru_cache
def _node(name: str) -> Any:
    return getattr(torch.ops.spectral_nodes, name, None)


def node_of(name: str, x: Tensor, shared: SharedRotations | None = None) -> Any:
    """An op of the extension that is a layer and its node of the graph, for eager code; or None.

    There is none where others trace, transform or stand in for x, or where the rotations' gradients
    go to a pool of another kind.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or not _is_compiled_for(x.device.type)
        or (shared is not None and shared.pool.number is None)
    ):
        return None
    return _node(name)


class SharedRotations(NamedTuple):
    """How the gradients of a layer's rotations reach the node that all layers share.

    Attributes:
        token: empty output of that node: one edge of the graph per layer instead of one per factor.
        pool: where the layer's backward puts the gradients.
        first: number of the layer's first rotation in there.
    """

    token: Tensor
    pool: GradientPool
    first: int


class SharedCayleyFunction(torch.autograd.Function):
    """Rotations of a whole model that are already known, as one node with the Cayley gradient.

    Inputs: ``pool`` for the gradients, ``rotations`` (list of [n_i, n_i], computed from the packed
    parameters) and per rotation ``packed`` [n_i(n_i-1)/2]; the output is the token of
    :class:`SharedRotations`. Autograd runs this node after all that have the token, and by then
    the pool holds what they found. Nothing passes through ``save_for_backward``, so the node can be
    run backward several times, as gradient accumulation over one set of rotations does, and
    checkpointing sees no tensor saved here. Rotations without a gradient are left out of the one
    call that all others share.
    """

    @staticmethod
    def forward(pool: GradientPool, rotations: list[Tensor], *packed: Tensor) -> Tensor:
        return rotations[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pool, ctx.rotations, *packed = inputs
        ctx.dtypes = [parameter.dtype for parameter in packed]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return SharedCayleyFunction._gradients(ctx, *ctx.pool.take())

    @staticmethod
    @once_differentiable  # as a function of the source, which is no argument of backward
    @outside_autocast
    def _gradients(
        ctx: Any, sums: list[Tensor | None], source: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        found = _cayley_gradients(sums, ctx.rotations, ctx.needs_input_grad[2:])
        cast = [
            grad if grad is None or grad.dtype is dtype else grad.to(dtype)
            for grad, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return None, None, *cast


def share_rotations(
    rotations: Sequence[Tensor], packed: Sequence[Tensor]
) -> tuple[Tensor, GradientPool]:
    """:class:`SharedCayleyFunction` for eager code: its token, and an empty pool.

    Args:
        rotations: [n_i, n_i], computed from the packed parameters, without a gradient.
        packed: [n_i(n_i-1)/2] each.
    """
    pool = gradient_pool(len(packed))
    if pool.number is None:
        return apply(SharedCayleyFunction, pool, list(rotations), *packed), pool
    return _node("shared_cayley")(pool.number, rotations, packed), pool


class LayerRotationsFunction(torch.autograd.Function):
    """Rotations [n_i, n_i] of one layer with a gradient that goes to the model's shared node.

    For whatever takes them as tensors; inputs: the token, the :class:`SharedRotations` that it is
    of, and the rotations.
    """

    @staticmethod
    def forward(token: Tensor, shared: SharedRotations, *rotations: Tensor) -> tuple[Tensor, ...]:
        return tuple([rotation.detach() for rotation in rotations])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shared = inputs[1]

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        token = None
        if ctx.needs_input_grad[0]:
            source = next((grad for grad in grads if grad.requires_grad), grads[0])
            token = ctx.shared.pool.add(ctx.shared.first, grads, source)
        return token, None, *[None] * len(grads)


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
    @outside_autocast
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
    @outside_autocast
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
    ``ds = sum h * x`` and ``Q_i^T dQ_i = gram_i(h, x * s)``. Saves x, not ``x * s``, not the
    rotated x and nothing of M's size: the backward rotates ``dy M``, or M again where that has
    fewer rows.
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
    ) -> Tensor:
        y, _ = _product(_ops.rotated_linear_fwd, rotated_linear_fwd_reference)(
            x, scale, matrix, subtract, bias, transpose, on_tokens, list(factors)
        )
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, matrix, subtract, bias, ctx.transpose, ctx.on_tokens, *factors = inputs
        ctx.save_for_backward(x, scale, matrix, subtract, bias, *factors)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, matrix, subtract, bias, *factors = ctx.saved_tensors
        needs_x, needs_scale, _, _, needs_bias, _, _, *needs_factors = ctx.needs_input_grad
        grad_x = grad_scale = grad_bias = None
        factor_grads: list[Tensor | None] = [None] * len(factors)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
        needs_sums = needs_scale or any(needs_factors)
        if needs_x or needs_sums:
            rotated = None
            if not ctx.on_tokens:
                rotated = _rotated_for_backward(grad, matrix, factors, ctx.transpose)
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


def _rotated_for_backward(
    grad: Tensor, matrix: Tensor, factors: Sequence[Tensor], transpose: bool
) -> Tensor | None:
    """``M Q`` [rows, k], where that is less work than to rotate ``dy M``; else None."""
    if grad.numel() <= matrix.shape[0] * grad.shape[-1]:
        return None
    matrix = at_least(matrix, grad.dtype)
    return raw(_ops.kron_rotate, matrix, list(factors), transpose, None, None).to(grad.dtype)


class SODALinearFunction(torch.autograd.Function):
    """``y = ((x V) * s) (U R)^T + b``: a whole SODA layer (svd, left) without its dense weight.

    ``x`` [..., in], ``scale`` s [k], ``left`` U [out, k], ``right`` V^T [k, in] and ``bias`` [out]
    or None; U and V frozen. ``rotated`` is U R [out, k] where somebody keeps it, else None;
    ``on_tokens`` rotates the tokens instead of U. Returns y, and what is kept for the backward or
    for the caller: z = x V [..., k] (None with ``recompute``) and U R (None where the tokens are
    rotated).

    What is trained may be the scale and the factors themselves, or ``offset`` [k] with ``s = S +
    offset``, whose gradient is that of the scale, and the rotations behind the token of ``shared``.

    The backward needs x no more once z is kept; with ``recompute`` it is the other way round, and
    layers that share an input share what they keep. U R is kept only with ``keep``, for callers
    that do so too; else the backward rotates the tokens' gradients, or U again where that has fewer
    rows.
    """

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        rotated: Tensor | None,
        on_tokens: bool,
        recompute: bool,
        keep: bool,
        offset: Tensor | None,
        token: Tensor | None,
        shared: SharedRotations | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        arguments = (x, scale, left, right, bias, rotated, on_tokens, list(factors))
        y, z, *made = _fused(_ops.soda_linear_fwd, soda_linear_fwd_reference, x, arguments)
        return y, None if recompute else z, made[0] if made else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, scale, left, right, bias, rotated, ctx.on_tokens, recompute, keep = inputs[:9]
        offset, _, ctx.shared, *factors = inputs[9:]
        _, z, made = output
        ctx.mark_non_differentiable(*[extra for extra in (z, made) if extra is not None])
        ctx.set_materialize_grads(False)
        ctx.offset_dtype = None if offset is None else offset.dtype
        # Its keeper's, and so not among what a checkpoint counts: there may be a keeper by the time
        # it recomputes.
        ctx.rotated = None
        if keep and not ctx.on_tokens:
            rotated = made if rotated is None else rotated
            ctx.rotated = None if rotated is None else rotated.detach()
        ctx.save_for_backward(x if recompute else None, z, scale, left, right, bias, *factors)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        results: list[Tensor | None] = [None] * len(needs)
        if grad is None:
            return tuple(results)
        x, z, scale, left, right, bias, *factors = ctx.saved_tensors
        rotated, on_tokens = ctx.rotated, ctx.on_tokens
        if needs[4]:
            results[4] = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
        needs_sums = needs[1] or any(needs[9:])
        if not (needs[0] or needs_sums):
            return tuple(results)
        if z is None:
            z = linear(x, right.to(x.dtype))
        found = _fused(
            _ops.soda_linear_bwd,
            soda_linear_bwd_reference,
            grad,
            (grad, z, scale, left, right, rotated, on_tokens, needs[0], needs_sums, factors),
        )
        if needs[0]:
            results[0], *found = found
        if needs_sums:
            _hand_out(ctx, results, found, grad, first=9)
        return tuple(results)


def _hand_out(
    ctx: Any, results: list[Tensor | None], sums: Sequence[Tensor], grad: Tensor, first: int
) -> None:
    """Put ``[ds, dR_1, ..., dR_f]``, made of ``grad``, where they belong: with the scale (input 1)
    and the factors, or with the offset, the token and its pool (inputs ``first`` and those that
    follow)."""
    needs = ctx.needs_input_grad
    grad_scale, *turns = sums
    if needs[1]:
        results[1] = grad_scale
    if needs[first]:
        results[first] = grad_scale.to(ctx.offset_dtype)
    if needs[first + 1]:
        results[first + 1] = ctx.shared.pool.add(ctx.shared.first, turns, grad)
    for index, turn in enumerate(turns, first + 3):
        if needs[index]:
            results[index] = turn


class Deferral:
    """Whether the gradients of merged weights have to wait now; one switch for a whole model."""

    def __init__(self) -> None:
        #: The extension's, which reads it there, if it has one.
        self.extension = None
        if _node("merged_linear") is not None:
            self.extension = torch.classes.spectral_nodes.Deferral()
        #: Whether it was ever on, and there may be a gradient that waits.
        self.was_on = False
        self._is_on = False

    @property
    def is_on(self) -> bool:
        """Whether gradients have to wait."""
        return self._is_on

    @is_on.setter
    def is_on(self, value: bool) -> None:
        self._is_on = value
        self.was_on |= value
        if self.extension is not None:
            self.extension.set(value)


class KeptGradient:
    """The gradient of a dense weight [out, in], summed over backward passes until it is wanted.

    While the deferral is on, a merged layer's backward adds to it and passes nothing on; the first
    backward after that takes the sum, so that it is contracted with the bases once.
    :func:`kept_gradient` makes the extension's where there is one.
    """

    #: What the extension knows it by, if it is the extension's.
    number: int | None = None
    #: The sum so far, in fp32 or better, or None.
    sum: Tensor | None = None

    def __init__(self, deferral: Deferral) -> None:
        self._deferral = deferral

    @property
    def is_waiting(self) -> bool:
        """Whether there is a sum that was not wanted yet."""
        return self._deferral.was_on and self.sum is not None

    def pass_on(self, grad: Tensor) -> Tensor | None:
        """The sum so far and ``grad``, or None if that has to wait."""
        total = grad if self.sum is None else self.sum.add_(grad)
        self.sum = at_least(total, torch.float32) if self._deferral.is_on else None
        return None if self._deferral.is_on else total


class _ExtensionGradient(KeptGradient):
    """The same in the extension (csrc/gradient_pool.h)."""

    def __init__(self, deferral: Deferral) -> None:
        super().__init__(deferral)
        self._kept = torch.classes.spectral_nodes.KeptGradient(deferral.extension)
        self.number = self._kept.number()

    @property
    def sum(self) -> Tensor | None:
        return self._kept.sum()

    @sum.setter
    def sum(self, value: Tensor | None) -> None:
        self._kept.set_sum(value)

    def pass_on(self, grad: Tensor) -> Tensor | None:
        return self._kept.pass_on(grad)


def kept_gradient(deferral: Deferral) -> KeptGradient:
    """An empty one, which the nodes of :func:`node_of` can add to."""
    return (KeptGradient if deferral.extension is None else _ExtensionGradient)(deferral)


class MergedLinearFunction(torch.autograd.Function):
    """``y = x W'^T + b`` with ``W' = U R diag(s) V^T``, three products over the tokens.

    ``x`` [..., in], ``scale`` s [k], the basis ``left`` U [out, k], ``singular_values`` S [k] and
    ``right`` V^T [k, in], ``bias`` [out] or None. Where ``base`` W0 [out, in] is given,
    ``W' = W0 + (U R diag(s) - U diag(S)) V^T``. ``weight`` is W' and ``rotated`` U R where somebody
    keeps them, else None. Returns y and, for those who keep them, W' in the dtype of x and U R, as
    far as they were built here.

    With ``H = (dy^T x) V``: ``ds`` = column sums of U R * H over the rows and
    ``R_i^T dR_i = gram_i(U R, H * s)``. ``gradient`` may hold ``dy^T x`` back. With ``recompute``
    nothing of the weight's size is kept and the backward builds W' again. ``offset``, ``token`` and
    ``shared`` as in :class:`SODALinearFunction`.
    """

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        left: Tensor,
        singular_values: Tensor,
        right: Tensor,
        base: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        rotated: Tensor | None,
        gradient: KeptGradient | None,
        recompute: bool,
        offset: Tensor | None,
        token: Tensor | None,
        shared: SharedRotations | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if weight is not None:
            return linear(x, weight, bias), None, None
        made = None
        if rotated is None:
            rotated = made = _rotated_basis(left, factors)
        dense = _merged_weight(rotated, scale, left, singular_values, right, base, x.dtype)
        return linear(x, dense, bias), dense, made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *operands, weight, rotated, ctx.gradient, recompute = inputs[:11]
        offset, _, ctx.shared, *factors = inputs[11:]
        ctx.offset_dtype = None if offset is None else offset.dtype
        _, *made = output
        ctx.mark_non_differentiable(*(extra for extra in made if extra is not None))
        if weight is None:
            weight = made[0]
        if rotated is None:
            rotated = made[1]
        ctx.set_materialize_grads(False)
        kept = (None, None) if recompute else (weight, rotated)
        ctx.save_for_backward(*operands, *kept, *factors)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs_x, needs_scale, _, _, _, needs_base, needs_bias, *rest = ctx.needs_input_grad
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(results)
        saved = ctx.saved_tensors  # to be read once, checkpoints insist
        x, scale, left, singular_values, right, base, bias, weight, rotated = saved[:9]
        factors = saved[9:]
        flat_grad = grad.reshape(-1, grad.shape[-1])
        if needs_bias:
            results[6] = flat_grad.sum(0).to(bias.dtype)
        needs_sums = needs_scale or any(rest[4:])
        grad_weight: Tensor | None = None
        if needs_sums or needs_base:
            grad_weight = flat_grad.mT @ x.reshape(-1, x.shape[-1])
        if needs_base:
            assert grad_weight is not None
            results[5] = grad_weight.to(base.dtype)
        if needs_sums:
            assert grad_weight is not None
            if ctx.gradient is not None:
                grad_weight = ctx.gradient.pass_on(grad_weight)
        if rotated is None:
            rotated = _rotated_basis(left, factors)
        if weight is None and needs_x:
            weight = _merged_weight(rotated, scale, left, singular_values, right, base, grad.dtype)
        if needs_x:
            results[0] = (flat_grad @ weight).view(x.shape)
        if not needs_sums or grad_weight is None:
            return tuple(results)
        dims = [factor.shape[0] for factor in factors]
        turned_grad = grad_weight.to(x.dtype) @ right.to(x.dtype).mT
        turned_grad = turned_grad.to(rotated.dtype)
        *grams, column_sums = eager_kron("kron_gram", rotated, turned_grad, dims, scale)
        turns = [f @ gram.to(f.dtype) for f, gram in zip(factors, grams, strict=True)]
        _hand_out(ctx, results, [column_sums.to(scale.dtype), *turns], grad, first=11)
        return tuple(results)


def _merged_weight(
    rotated: Tensor,
    scale: Tensor,
    left: Tensor,
    singular_values: Tensor,
    right: Tensor,
    base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """W' [out, in] from U R [out, k]; with a base W0, exactly that where nothing was trained.

    The product with V^T is one in ``dtype``, that of the layer's own products; what is in front of
    it is taken in fp32 or better, where a small change is not lost.
    """
    folded = rotated * scale
    right = right.to(dtype)
    if base is None:
        return folded.to(dtype) @ right
    # Two rounded products: fused into one operation, equal ones would not cancel.
    change = folded.sub_(left * singular_values).to(dtype) @ right
    return (base + change).to(dtype)


def _rotated_basis(left: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """U R [out, k] in fp32 or better, whatever U is kept in."""
    left = at_least(left, torch.float32)
    return eager_kron("kron_rotate", left, list(factors), False, None, None)


class RotatedWeightFunction(torch.autograd.Function):
    """The dense ``W = (M R * s - M * S) B``: M [out, k], S [k] or None and B [k, in] frozen, s [k].

    Without factors R is the identity. In the dtype of s, whatever M and B are kept in. With
    ``H = dW B^T``: ``ds = sum M R * H`` over the rows and ``R_i^T dR_i = gram_i(M R, H * s)``.
    Saves ``M R``, nothing of the size of W.
    """

    @staticmethod
    def forward(
        scale: Tensor, matrix: Tensor, subtract: Tensor | None, right: Tensor, *factors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        right = at_least(right, scale.dtype)
        if not factors:
            return (matrix * (scale if subtract is None else scale - subtract)) @ right, None
        rotated = _rotated_basis(matrix, factors)
        folded = rotated * scale
        return (folded if subtract is None else folded - matrix * subtract) @ right, rotated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scale, matrix, _, right, *factors = inputs
        rotated = output[1] if factors else matrix
        if factors:
            ctx.mark_non_differentiable(rotated)
        ctx.set_materialize_grads(False)  # else a matrix of zeros is made for `rotated`
        ctx.save_for_backward(scale, right, rotated, *factors)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        scale, right, rotated, *factors = ctx.saved_tensors
        needs_scale, _, _, _, *needs_factors = ctx.needs_input_grad
        turned_grad = grad @ at_least(right, grad.dtype).mT
        if not factors:
            return turned_grad.mul_(rotated).sum(0).to(scale.dtype), None, None, None
        dims = [factor.shape[0] for factor in factors]
        *grams, column_sums = raw(_ops.kron_gram, rotated, turned_grad, dims, scale)
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
    @outside_autocast
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        backward = _product(_ops.low_rank_linear_bwd, low_rank_linear_bwd_reference)
        return _low_rank_grads(ctx, grad, backward, ctx.needs_input_grad)


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
    @outside_autocast
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        backward = _product(_ops.spectral_a_linear_bwd, spectral_a_linear_bwd_reference)
        return _low_rank_grads(ctx, grad, backward, ctx.needs_input_grad)


class SpectralRLinearFunction(torch.autograd.Function):
    """:class:`LowRankLinearFunction` for ``dW = U1 (R_U S1 R_V^T - S1) V1^T``.

    Factors: the basis as in :class:`SpectralALinearFunction`, ``rotation_left`` R_U and
    ``rotation_right`` R_V [r, r], or these without a gradient of their own and the token of
    ``shared``. Saves ``x V1``, r numbers per token, and x itself not.
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
        token: Tensor | None = None,
        shared: SharedRotations | None = None,
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
        ctx.shared = inputs[-1] if len(inputs) > 10 else None
        _save_for_low_rank(ctx, inputs[:10], output[1], keeps_x=False)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        backward = _product(_ops.spectral_r_linear_bwd, spectral_r_linear_bwd_reference)
        needs = ctx.needs_input_grad
        rest: list[Tensor | None] = [None] * (len(needs) - 10)
        if ctx.shared is None:
            return *_low_rank_grads(ctx, grad, backward, needs[:10]), *rest
        needs_turns = needs[10]
        *results, turn_left, turn_right, _ = _low_rank_grads(
            ctx, grad, backward, [*needs[:7], needs_turns, needs_turns, False]
        )
        if needs_turns and grad is not None:
            rest[0] = ctx.shared.pool.add(ctx.shared.first, (turn_left, turn_right), grad)
        return *results, None, None, None, *rest


def _save_for_low_rank(ctx: Any, inputs: tuple[Any, ...], thin: Tensor, *, keeps_x: bool) -> None:
    x, _, weight, bias, *factors, ctx.scaling = inputs
    ctx.mark_non_differentiable(thin)
    ctx.set_materialize_grads(False)  # else zeros are made for `thin`
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*((x,) if keeps_x else ()), weight, thin, *factors)


def _low_rank_grads(
    ctx: Any,
    grad: Tensor | None,
    backward: Callable[..., list[Tensor]],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients that are needed, in the order of the inputs; the two trained factors are the last
    tensors."""
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
