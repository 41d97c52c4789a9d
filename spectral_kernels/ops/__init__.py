"""Schemas, fakes and plain references of the raw ops in ``torch.ops.spectral``."""

from spectral_kernels.ops import cayley, kron, low_rank, rotated_linear, soda_linear, stiefel
from spectral_kernels.ops._registry import LIBRARY, NAMESPACE, OPS

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "OPS",
    "cayley",
    "kron",
    "low_rank",
    "rotated_linear",
    "soda_linear",
    "stiefel",
]
