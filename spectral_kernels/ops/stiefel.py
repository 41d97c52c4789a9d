"""Raw ops ``stiefel_sgd_`` and ``stiefel_adam_``: one optimizer step of many orthogonal factors.

The method of Kong, Wang and Tao (ICLR 2023) for square factors (DESIGN section 3, "Stiefel"). With
``A = X^T G`` and the skew gradient ``g = (1 - b)/2 (A - A^T)``:

* SGD: ``Y <- mu Y - g``, ``xi = lr Y``;
* Adam: ``Y <- beta1 Y - (1 - beta1) g``, ``p <- beta2 p + (1 - beta2) g*g``,
  ``xi = lr/(1 - beta1^t) Y / (sqrt(p/(1 - beta2^t)) + eps)``;

then ``X <- polar(X (I + xi))``. Both ops change their arguments in place and return nothing; lists
may mix sizes n, fp32 and fp64, and [n, n] with [B, n, n]. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.ops._registry import define_op

#: Longer steps are shortened to this norm. It turns a plane by arctan(1000), 89.94 degrees, and no
#: step however long turns one by 90.
LONGEST_STEP = 1e3

#: Keeps 0/0 out of the shortening when the learning rate is zero.
SHORTEST_BOUND = 1e-6

# Skew gradients [N, n, n] of some factors, by their numbers, to steps xi [N, n, n] and a bound on
# their norm that is known beforehand.
_Direction = Callable[[list[int], Tensor], tuple[Tensor, float]]


def stiefel_sgd_reference(
    factors: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    lr: float,
    momentum: float,
    metric: float,
) -> None:
    """Step ``factors`` and ``velocities`` (none for a momentum of 0), [n, n] or [B, n, n] each."""
    check_stiefel(factors, grads, velocities if momentum != 0 else None)

    def direction(batch: list[int], skew: Tensor) -> tuple[Tensor, float]:
        if momentum == 0:
            velocity = -skew
        else:
            buffers = [velocities[i] for i in batch]
            velocity = _stack(buffers).mul_(momentum).sub_(skew)
            _unstack(velocity, buffers)
        # Gradients have no bound, so neither has the step.
        return velocity * lr, math.inf

    _step(factors, grads, metric, direction)


def stiefel_adam_reference(
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
    """Step ``factors``, their moments Y and p, all [n, n] or [B, n, n], and ``steps``, the number
    of steps that each has taken: fp32 scalars on the factors' device."""
    check_stiefel(factors, grads, velocities, squares, steps)
    if steps:
        torch._foreach_add_(steps, 1.0)

    def direction(batch: list[int], skew: Tensor) -> tuple[Tensor, float]:
        averages, second = [velocities[i] for i in batch], [squares[i] for i in batch]
        velocity = _stack(averages).mul_(beta1).sub_(skew, alpha=1.0 - beta1)
        square = _stack(second).mul_(beta2).addcmul_(skew, skew, value=1.0 - beta2)
        _unstack(velocity, averages)
        _unstack(square, second)
        # One count per matrix: factors that were skipped for want of a gradient lag behind.
        counts = [steps[i].expand(_matrices(factors[i])) for i in batch]
        count = torch.cat(counts).to(skew.dtype)[:, None, None]
        ratio = (velocity / _unbias(beta1, count)) / (
            (square / _unbias(beta2, count)).sqrt_().add_(eps)
        )
        return ratio.mul_(lr), adam_bound(lr, beta1, beta2, skew.shape[-1])

    _step(factors, grads, metric, direction)


def _step(factors: list[Tensor], grads: list[Tensor], metric: float, direction: _Direction) -> None:
    """Step the factors of each size, dtype and device as one batch [N, n, n]."""
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, factor in enumerate(factors):
        if factor.numel() > 0:
            batches.setdefault((factor.shape[-1], factor.dtype, factor.device), []).append(i)
    for batch in batches.values():
        alike = [factors[i] for i in batch]
        with full_precision(alike[0].device.type):
            x = _stack(alike)
            pull = x.mT @ _stack([grads[i] for i in batch])
            skew = (pull - pull.mT).mul_(0.5 * (1.0 - metric))
            xi, bound = direction(batch, skew)
            _unstack(_retract(x, xi, longest_step(bound)), alike)


def check_stiefel(
    factors: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor] | None,
    squares: list[Tensor] | None = None,
    steps: list[Tensor] | None = None,
) -> None:
    """Refuse what a kernel would read out of bounds.

    Raises:
        ValueError: lists of different lengths, a factor that is not square, or a tensor with
            another shape, layout or device than its factor.
        TypeError: a factor that is not fp32 or fp64, or a tensor with another dtype than its
            factor.
    """
    beside = {"grads": grads, "velocities": velocities, "squares": squares, "steps": steps}
    for name, tensors in beside.items():
        if tensors is not None and len(tensors) != len(factors):
            raise ValueError(
                f"{name} must have one entry per factor, {len(factors)}; got {len(tensors)}"
            )
    for i, factor in enumerate(factors):
        if factor.dim() not in (2, 3) or factor.shape[-1] != factor.shape[-2]:
            raise ValueError(
                f"factors[{i}] must have shape [B, n, n] or [n, n]; got {tuple(factor.shape)}"
            )
        if factor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"factors[{i}] must be float32 or float64; got {factor.dtype}")
    matrices = [_facts(factor) for factor in factors]
    for name, tensors in beside.items():
        expected = matrices
        if name == "steps":
            expected = [(torch.Size([]), torch.float32, *fact[2:]) for fact in matrices]
        # Compared as lists first: a model has thousands of these tensors.
        if tensors is None or [_facts(tensor) for tensor in tensors] == expected:
            continue
        for i, (tensor, (shape, dtype, device, _)) in enumerate(
            zip(tensors, expected, strict=True)
        ):
            if tensor.shape != shape or tensor.layout != torch.strided:
                raise ValueError(
                    f"{name}[{i}] must be dense with shape {tuple(shape)}; got layout "
                    f"{tensor.layout}, shape {tuple(tensor.shape)}"
                )
            if tensor.dtype != dtype:
                raise TypeError(f"{name}[{i}] must be {dtype}; got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(
                    f"{name}[{i}] must be on {device} like its factor; got {tensor.device}"
                )


def _facts(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, torch.layout]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def adam_bound(lr: float, beta1: float, beta2: float, n: int) -> float:
    """A bound on the spectral norm of Adam's xi [n, n], whatever the gradients were.

    By Cauchy and Schwarz on Adam's moments |m|/sqrt(v) <= (1 - beta1) /
    sqrt((1 - beta2) (1 - beta1^2/beta2)); where that is no bound, 1e30 stands for infinity, which
    times zero, of a 1 x 1 factor or a learning rate, would be none.
    """
    spread = (1.0 - beta2) * (1.0 - beta1 * beta1 / beta2) if beta2 > 0 else 0.0
    return lr * ((1.0 - beta1) / math.sqrt(spread) if spread > 0 else 1e30) * (n - 1)


def longest_step(bound: float) -> float:
    """What a step with this bound is shortened to where it is longer nevertheless."""
    return min(max(bound, SHORTEST_BOUND), LONGEST_STEP)


def _retract(x: Tensor, xi: Tensor, longest: float) -> Tensor:
    """``polar(X (I + xi))`` for orthogonal X and skew xi, all [N, n, n].

    A xi longer than ``longest`` is shortened to it, and ``longest`` alone fixes the number of
    products. Where xi has a singular value sigma, ``I + xi`` has ``sqrt(1 + sigma^2)``: they lie in
    [1, sqrt(1 + longest^2)], and the Newton-Schulz iteration is scaled for that interval. Its last
    scale is all but 1, so that it also takes out what rounding has added to X. The diagonals of the
    Gram matrices are summed in float64: near the identity a column holds one entry of 1 and small
    ones whose squares an fp32 sum that has the 1 already loses, all of them.
    """
    reach = xi.abs().sum(-1).amax(-1)  # the largest row sum, never below the spectral norm
    xi = xi * (longest / reach.clamp_min(longest))[:, None, None]
    y = torch.baddbmm(x, x, xi)
    for scale in _newton_schulz_scales(math.hypot(1.0, longest), torch.finfo(x.dtype).eps):
        gram = y.mT @ y
        gram.diagonal(dim1=-2, dim2=-1).copy_(y.double().square().sum(-2))
        y = torch.baddbmm(y, y, gram, beta=1.5 * scale, alpha=-0.5 * scale**3)
    return y


def _newton_schulz_scales(largest: float, tolerance: float) -> list[float]:
    """Scales of ``y <- scale y (3 - (scale y)^2) / 2`` that bring all of [1, largest] to 1.

    The best scale makes both ends of the interval [low, high] meet:
    ``scale^2 = 3 / (low^2 + low high + high^2)``; the interval becomes [their image, 1].
    """
    low, high = 1.0, largest
    scales: list[float] = []
    while not scales or 1.0 - low > tolerance:
        scale = math.sqrt(3.0 / (low * low + low * high + high * high))
        scales.append(scale)
        low, high = 0.5 * scale * low * (3.0 - (scale * low) ** 2), 1.0
    return scales


def _unbias(beta: float, count: Tensor) -> Tensor:
    """``1 - beta^count`` without cancellation."""
    return -torch.expm1(count * (math.log(beta) if beta > 0 else -math.inf))


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Products in true fp32: with TF32, bf16 or autocast each step would leave the manifold."""
    backends: list[Any] = [
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    ]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _matrices(factor: Tensor) -> int:
    return factor.shape[0] if factor.dim() == 3 else 1


def _stack(tensors: list[Tensor]) -> Tensor:
    """[n, n] and [B, n, n] tensors to a new [N, n, n]."""
    n = tensors[0].shape[-1]
    return torch.cat([tensor.reshape(-1, n, n) for tensor in tensors])


def _unstack(stacked: Tensor, tensors: list[Tensor]) -> None:
    """Copy [N, n, n] back into the tensors it was stacked from."""
    parts = stacked.split([_matrices(tensor) for tensor in tensors])
    torch._foreach_copy_(
        tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    )


def _stiefel_sgd_fake(
    factors: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    lr: float,
    momentum: float,
    metric: float,
) -> None:
    torch._check(len(grads) == len(factors))
    torch._check(momentum == 0 or len(velocities) == len(factors))


def _stiefel_adam_fake(
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
    for tensors in (grads, velocities, squares, steps):
        torch._check(len(tensors) == len(factors))


define_op(
    "stiefel_sgd_(Tensor(a!)[] factors, Tensor[] grads, Tensor(b!)[] velocities, float lr, "
    "float momentum, float metric) -> ()",
    reference=stiefel_sgd_reference,
    fake=_stiefel_sgd_fake,
    public_function="spectral_adapters.StiefelSGD",
)
define_op(
    "stiefel_adam_(Tensor(a!)[] factors, Tensor[] grads, Tensor(b!)[] velocities, "
    "Tensor(c!)[] squares, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, "
    "float metric) -> ()",
    reference=stiefel_adam_reference,
    fake=_stiefel_adam_fake,
    public_function="spectral_adapters.StiefelAdam",
)
