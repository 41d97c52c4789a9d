"""Problems for the ops ``stiefel_sgd_`` and ``stiefel_adam_``, and dense float64 steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support import assert_near, random_rotation
from torch import Tensor


def skew(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    upper = torch.randn(*shape, dtype=torch.float64).triu(1)
    return (upper - upper.mT).to(dtype)


def problem(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, scale: float = 1.0
) -> list[list[Tensor]]:
    """Factors, gradients, velocities, squares and steps of an optimizer that is under way."""
    factors = []
    for shape in shapes:
        factor = torch.empty(shape, dtype=dtype)
        for matrix in factor.view(-1, *shape[-2:]) if factor.numel() else ():
            matrix.copy_(random_rotation(shape[-1]))
        factors.append(factor)
    grads = [torch.randn_like(factor) * scale for factor in factors]
    velocities = [skew(shape, dtype) * scale for shape in shapes]
    squares = [(1 + skew(shape, dtype).square()) * scale**2 for shape in shapes]
    steps = [torch.tensor(float(i)) for i in range(len(shapes))]
    return [factors, grads, velocities, squares, steps]


def copies(lists: Sequence[Sequence[Tensor]], dtype: torch.dtype | None = None) -> Any:
    """Deep, in another dtype if given; step counts keep theirs."""
    kept = torch.preserve_format
    return [
        [t.to(dtype if t.dim() else None, copy=True, memory_format=kept) for t in tensors]
        for tensors in lists
    ]


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def expected_step(x: Tensor, xi: Tensor) -> Tensor:
    """polar(X (I + xi)), with xi shortened as the ops say, in float64."""
    if x.numel() == 0:
        return x
    reach = xi.abs().sum(-1).amax(-1)[..., None, None]
    xi = xi * (1e3 / reach.clamp_min(1e3))
    return polar(x @ (torch.eye(x.shape[-1], dtype=x.dtype) + xi))


def expected_sgd(
    lists: list[list[Tensor]], lr: float, momentum: float, metric: float
) -> list[list[Tensor]]:
    factors, grads, velocities = copies(lists[:3], torch.float64)
    for x, grad, velocity in zip(factors, grads, velocities, strict=True):
        a = x.mT @ grad
        velocity.mul_(momentum).sub_(0.5 * (1 - metric) * (a - a.mT))
        x.copy_(expected_step(x, lr * velocity))
    return [factors, grads, velocities]


def expected_adam(
    lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, metric: float
) -> list[list[Tensor]]:
    lists = copies(lists, torch.float64)
    for x, grad, velocity, square, step in zip(*lists, strict=True):
        a = x.mT @ grad
        g = 0.5 * (1 - metric) * (a - a.mT)
        velocity.mul_(beta1).sub_((1 - beta1) * g)
        square.mul_(beta2).add_((1 - beta2) * g * g)
        step += 1
        t = float(step)
        root = (square / (1 - beta2**t)).sqrt() + eps
        x.copy_(expected_step(x, lr / (1 - beta1**t) * velocity / root))
    return lists


def orthogonality_error(x: Tensor) -> float:
    gram = x.double().mT @ x.double()
    return float((gram - torch.eye(x.shape[-1], dtype=torch.float64)).abs().amax())


def assert_all_near(
    actual: list[list[Tensor]], expected: list[list[Tensor]], factor: float
) -> None:
    for tensors, exact in zip(actual, expected, strict=True):
        for tensor, oracle in zip(tensors, exact, strict=True):
            assert_near(tensor, oracle, factor=factor)
