"""Optimizer steps of a model's orthogonal factors: problem, providers and the float64 oracle.

Every step starts from the factors and moments that the step before it left, as in training; only
the first, which is checked, starts where the oracle does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from providers import Candidate, Tensors
from torch import Tensor, nn

from spectral_adapters import StiefelAdam
from spectral_kernels import backend_report
from spectral_kernels.ops.stiefel import stiefel_adam_reference

LR, BETAS, EPS, METRIC = 1e-3, (0.9, 0.99), 1e-8, -1.0

#: Number and size of the attention factors of an SDXL UNet: 80 layers of width 640 and 480 of 1280.
SDXL = ((80, 20), (560, 32), (480, 40))


@dataclass(frozen=True)
class StiefelCase:
    """One StiefelAdam step of ``factors``, (number, n) each, parameters of their own, fp32."""

    factors: tuple[tuple[int, int], ...]
    device: str

    def __str__(self) -> str:
        return "-".join([*(f"{count}x{n}x{n}" for count, n in self.factors), self.device])

    def build(self) -> StiefelProblem:
        return StiefelProblem(self)

    def note(self) -> str:
        """Where the step is computed."""
        return backend_report()["stiefel_adam_"].implementation


class StiefelProblem:
    """Random rotations [n, n] and their gradients [n, n]."""

    def __init__(self, case: StiefelCase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(len(case.factors))
        self.factors: list[Tensor] = []
        self.grads: list[Tensor] = []
        for count, n in case.factors:
            gauss = torch.randn(count, n, n, generator=generator, dtype=torch.float64)
            rotations = torch.linalg.qr(gauss).Q.float().contiguous()
            self.factors += (rotation.clone().to(case.device) for rotation in rotations)
            grads = torch.randn(count, n, n, generator=generator)
            self.grads += (grad.clone().to(case.device) for grad in grads)

    def states(self) -> list[list[Tensor]]:
        """Factors, gradients, velocities, squares and step counts of a provider's own."""
        factors = [factor.clone() for factor in self.factors]
        zeros = [[torch.zeros_like(factor) for factor in factors] for _ in range(2)]
        steps = [torch.zeros((), device=factor.device) for factor in factors]
        return [factors, self.grads, *zeros, steps]

    @cached_property
    def expected(self) -> Tensors:
        """Factors and velocities after the first step, with the polar factor by SVD, in float64."""
        factors, velocities = [], []
        for x, grad in zip(self.factors, self.grads, strict=True):
            x = x.double()
            pull = x.mT @ grad.double()
            skew = pull - pull.mT
            velocity = -(1 - BETAS[0]) * skew
            xi = LR * velocity / (1 - BETAS[0]) / (skew.abs() + EPS)
            left, _, right = torch.linalg.svd(x + x @ xi)
            factors.append(left @ right)
            velocities.append(velocity)
        return [*factors, *velocities]


def ours(problem: StiefelProblem) -> Candidate:
    """This project's optimizer, all factors in one parameter group."""
    parameters = [nn.Parameter(factor.clone()) for factor in problem.factors]
    for parameter, grad in zip(parameters, problem.grads, strict=True):
        parameter.grad = grad
    optimizer = StiefelAdam(parameters, LR, BETAS, EPS, metric=METRIC)

    def step() -> Tensors:
        optimizer.step()
        return [parameter.detach() for parameter in parameters]

    def comparable(factors: Tensors) -> Tensors:
        return [*factors, *(optimizer.state[p]["exp_avg"] for p in parameters)]

    @torch.no_grad()
    def reset() -> None:
        for parameter, factor in zip(parameters, problem.factors, strict=True):
            parameter.copy_(factor)
            for value in optimizer.state[parameter].values():
                value.zero_()

    return Candidate(step, lambda: problem.expected, comparable, reset=reset)


def _plain(problem: StiefelProblem, step_all: Callable[[list[list[Tensor]]], None]) -> Candidate:
    lists = problem.states()

    def step() -> Tensors:
        step_all(lists)
        return lists[0]

    return Candidate(step, lambda: problem.expected, lambda factors: [*factors, *lists[2]])


@torch.no_grad()
def _batched(lists: list[list[Tensor]]) -> None:
    x, grads, velocities, squares, steps = lists
    stiefel_adam_reference(x, grads, velocities, squares, steps, LR, *BETAS, EPS, METRIC)


def _one_by_one(lists: list[list[Tensor]]) -> None:
    for tensors in zip(*lists, strict=True):
        _batched([[tensor] for tensor in tensors])


def batched_plain(problem: StiefelProblem) -> Candidate:
    """Plain PyTorch on stacked factors, one batch per size."""
    return _plain(problem, _batched)


def loop(problem: StiefelProblem) -> Candidate:
    """Plain PyTorch on one factor after the other."""
    return _plain(problem, _one_by_one)


def copies(problem: StiefelProblem) -> Candidate:
    """What no step can do without: reading factor, gradient and moments, writing all but the
    gradient."""
    lists = [[tensor.clone() for tensor in tensors] for tensors in problem.states()[:4]]
    targets = [[tensor.clone() for tensor in lists[i]] for i in (0, 2, 3)]

    @torch.no_grad()
    def step() -> Tensors:
        for target, i in zip(targets, (0, 2, 3), strict=True):
            torch._foreach_copy_(target, lists[i])
        return [*targets[0], *torch._foreach_neg(lists[1])]

    def oracle() -> Tensors:
        return [*(x.double() for x in lists[0]), *(-g.double() for g in lists[1])]

    return Candidate(step, oracle)


STIEFEL_PROVIDERS: dict[str, Callable[[StiefelProblem], Candidate]] = {
    "ours": ours,
    "loop": loop,
    "batched plain": batched_plain,
    "copies": copies,
}
