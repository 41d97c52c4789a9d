"""Raw ops ``cayley_fwd`` and ``cayley_bwd``: packed skew matrices to rotations, whole models at
once.

Conventions (docs/conventions.md): ``Q = (P - P^T) / 2`` with ``P`` strictly upper triangular and
stored packed, row by row; ``R = (I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_kernels.ops._registry import define_op


def packed_length(n: int) -> int:
    """Number of entries strictly above the diagonal of an ``n x n`` matrix."""
    return n * (n - 1) // 2


def _skew(packed: Tensor, n: int) -> Tensor:
    """``[..., n(n-1)/2]`` to the skew ``Q = (P - P^T)/2``, ``[..., n, n]``."""
    rows, columns = torch.triu_indices(n, n, offset=1, device=packed.device)
    upper = packed.new_zeros(*packed.shape[:-1], n, n)
    upper[..., rows, columns] = packed * 0.5
    return upper - upper.mT


def cayley_fwd_reference(packed: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """``R = 2 (I - Q)^-1 - I`` for every batch; ``packed[i]`` [B_i, n_i(n_i-1)/2] -> [B_i, n_i,
    n_i], or without the B_i for a single rotation.

    The inverse is taken in float64 so that fp32 rotations are orthogonal to rounding at any ``Q``.
    """
    rotations = []
    for batch, n in zip(packed, sizes, strict=True):
        skew = _skew(batch.double(), n)
        identity = torch.eye(n, dtype=skew.dtype, device=skew.device)
        inverse, _ = torch.linalg.inv_ex(identity - skew)
        rotations.append((2 * inverse - identity).to(batch.dtype).contiguous())
    return rotations


def cayley_bwd_reference(grad_rotation: list[Tensor], rotation: list[Tensor]) -> list[Tensor]:
    """Gradient of the packed entries from ``dR`` and ``R`` alone, no solve (DESIGN section 3).

    ``dQ = 1/2 (I + R) (R^T dR) (I + R)^T`` and ``dP[i, j] = (dQ[i, j] - dQ[j, i]) / 2`` above the
    diagonal. Batches ``[B_i, n_i, n_i]`` to ``[B_i, n_i(n_i-1)/2]``; both without the B_i for one.
    """
    grads = []
    for grad, matrix in zip(grad_rotation, rotation, strict=True):
        n = matrix.shape[-1]
        rows, columns = torch.triu_indices(n, n, offset=1, device=matrix.device)
        shifted = matrix + torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        grad_skew = 0.5 * (shifted @ (matrix.mT @ grad) @ shifted.mT)
        grads.append(0.5 * (grad_skew - grad_skew.mT)[..., rows, columns].contiguous())
    return grads


def _cayley_fwd_fake(packed: list[Tensor], sizes: list[int]) -> list[Tensor]:
    torch._check(len(packed) == len(sizes))
    for batch, n in zip(packed, sizes, strict=True):
        torch._check(batch.dim() in (1, 2) and batch.shape[-1] == packed_length(n))
    return [
        batch.new_empty(*batch.shape[:-1], n, n) for batch, n in zip(packed, sizes, strict=True)
    ]


def _cayley_bwd_fake(grad_rotation: list[Tensor], rotation: list[Tensor]) -> list[Tensor]:
    torch._check(len(grad_rotation) == len(rotation))
    return [
        matrix.new_empty(*matrix.shape[:-2], packed_length(matrix.shape[-1])) for matrix in rotation
    ]


define_op(
    "cayley_fwd(Tensor[] packed, int[] sizes) -> Tensor[]",
    reference=cayley_fwd_reference,
    fake=_cayley_fwd_fake,
    public_function="spectral_adapters.functional.cayley",
)
define_op(
    "cayley_bwd(Tensor[] grad_rotation, Tensor[] rotation) -> Tensor[]",
    reference=cayley_bwd_reference,
    fake=_cayley_bwd_fake,
    public_function="spectral_adapters.functional.cayley",
)
