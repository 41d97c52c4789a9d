"""Triton kernels of the Kronecker, low-rank and Stiefel ops, registered for CUDA by ``register``.

Triton is imported when an op first runs, not before: importing this package must stay free.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.triton_kernels._launch import LOW_RANK_OPS, MAX_AXIS, MAX_RANK, supports

LIMITS = (
    f"float64, and kron_gram with a factor above {MAX_AXIS} or too many sums for the registers, "
    "run on the reference"
)
LOW_RANK_LIMITS = f"between cuBLAS's GEMMs; float64 and ranks above {MAX_RANK} run on the reference"

STIEFEL_LIMITS = f"float64 and matrices above {MAX_AXIS} run on the reference"

#: The ops with Triton kernels, and what these leave to the reference.
OVERRIDDEN = {
    "kron_rotate": LIMITS,
    "kron_gram": LIMITS,
    "stiefel_sgd_": STIEFEL_LIMITS,
    "stiefel_adam_": STIEFEL_LIMITS,
    **dict.fromkeys(LOW_RANK_OPS, LOW_RANK_LIMITS),
}

__all__ = ["LIMITS", "LOW_RANK_LIMITS", "OVERRIDDEN", "STIEFEL_LIMITS", "register", "supports"]


def register(library: torch.library.Library, leave: Collection[str] = ()) -> list[str]:
    """Override ``OVERRIDDEN`` but for ``leave`` for CUDA, and return which ops these are.

    Imports and compiles nothing, and creates no CUDA context.
    """
    implementations = {
        "kron_rotate": _kron_rotate,
        "kron_gram": _kron_gram,
        "stiefel_sgd_": _stiefel_sgd_,
        "stiefel_adam_": _stiefel_adam_,
        **{op: _low_rank(op) for op in LOW_RANK_OPS},
    }
    taken = [op for op in implementations if op not in leave]
    for op in taken:
        library.impl(op, implementations[op], "CUDA")
    return taken


def _low_rank(op: str) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        from spectral_kernels.triton_kernels import low_rank

        return getattr(low_rank, op)(*arguments)

    return implementation


def _kron_rotate(
    x: Tensor,
    factors: list[Tensor],
    transpose: bool,
    scale_before: Tensor | None,
    scale_after: Tensor | None,
) -> Tensor:
    from spectral_kernels.triton_kernels.kron_rotate import kron_rotate

    return kron_rotate(x, factors, transpose, scale_before, scale_after)


def _kron_gram(a: Tensor, b: Tensor, dims: list[int], scale_b: Tensor | None) -> list[Tensor]:
    from spectral_kernels.triton_kernels.kron_gram import kron_gram

    return kron_gram(a, b, dims, scale_b)


def _stiefel_sgd_(
    factors: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    lr: float,
    momentum: float,
    metric: float,
) -> None:
    from spectral_kernels.triton_kernels.stiefel import stiefel_sgd_

    stiefel_sgd_(factors, grads, velocities, lr, momentum, metric)


def _stiefel_adam_(
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
    from spectral_kernels.triton_kernels.stiefel import stiefel_adam_

    stiefel_adam_(factors, grads, velocities, squares, steps, lr, beta1, beta2, eps, metric)
