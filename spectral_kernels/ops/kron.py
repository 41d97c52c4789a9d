"""Raw ops ``kron_rotate`` and ``kron_gram``: Kronecker-structured rotation and its gradient sums.

Index order (docs/conventions.md): the first factor is outermost, ``i = (i1 * n2 + i2) * n3 + i3``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.ops._registry import define_op


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate_axis(x: Tensor, matrix: Tensor, axis: int, dims: list[int]) -> Tensor:
    """``x`` [M, prod(dims)], seen as [M, *dims], times ``matrix`` along one axis."""
    rows, after = x.shape[0] * prod(dims[:axis]), prod(dims[axis + 1 :])
    n = dims[axis]
    if after == 1:
        return (x.reshape(rows, n) @ matrix).reshape(x.shape)
    # One small product per row beats moving the axis to the end: nothing is copied.
    return torch.bmm(matrix.mT.expand(rows, n, n), x.reshape(rows, n, after)).reshape(x.shape)


def gram_axis(a: Tensor, b: Tensor, axis: int, dims: list[int]) -> Tensor:
    """Sum of ``a[.., p, ..] b[.., q, ..]`` over all axes of [M, *dims] but one: [n, n]."""
    rows, after = a.shape[0] * prod(dims[:axis]), prod(dims[axis + 1 :])
    n = dims[axis]
    a, b = a.reshape(rows, n, after), b.reshape(rows, n, after)
    if after == 1:
        return a[..., 0].mT @ b[..., 0]
    if n <= after:
        return torch.bmm(a, b.mT).sum(0)
    long = rows * after
    return a.transpose(0, 1).reshape(n, long) @ b.transpose(0, 1).reshape(n, long).mT


@lru_cache
def eager_op(name: str, device: str) -> Any:
    """The op ``kron_rotate`` or ``kron_gram`` as eager code on a type of device should call it.

    On a GPU as products that C++ calls, if the extension has them: a Triton kernel is faster, and
    launching it from Python takes longer than it does.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if device == "cuda" and has_kernel("spectral::soda_linear_fwd", "CUDA"):
        return getattr(torch.ops.spectral_products, name)
    return getattr(torch.ops.spectral, name)


def tensor_cores_take(device: str, dtype: torch.dtype, sizes: Sequence[int] | None) -> bool:
    """Whether rows of a type are rotated on tensor cores by eager layers on a type of device."""
    if device != "cuda" or dtype != torch.bfloat16 or sizes is None or len(sizes) != 2:
        return False
    # Only an extension with CUDA code has it.
    takes = getattr(sys.modules.get("spectral_kernels._C"), "_layers_use_tile", None)
    return takes is not None and not torch.compiler.is_compiling() and takes(*sizes)


def kron_rotate_reference(
    x: Tensor,
    factors: list[Tensor],
    transpose: bool,
    scale_before: Tensor | None,
    scale_after: Tensor | None,
) -> Tensor:
    """``((x * scale_before) @ (R1 (x) ... (x) Rf)) * scale_after`` [M, k], axis by axis."""
    dtype = accumulation_dtype(x.dtype)
    dims = [factor.shape[0] for factor in factors]
    y = x.to(dtype)
    if scale_before is not None:
        y = y * scale_before.to(dtype)
    for axis, factor in enumerate(factors):
        matrix = factor.to(dtype)
        y = rotate_axis(y, matrix.mT if transpose else matrix, axis, dims)
    if scale_after is not None:
        y = y * scale_after.to(dtype)
    # A custom op must not return its own input, which y still is when there is nothing to do.
    return y.to(x.dtype) if y.data_ptr() != x.data_ptr() or y.numel() == 0 else x.clone()


def kron_gram_reference(
    a: Tensor, b: Tensor, dims: list[int], scale_b: Tensor | None
) -> list[Tensor]:
    """The f partial-trace Grams of ``(a, b * scale_b)``, then the column sums of ``a * b`` [k]."""
    dtype = accumulation_dtype(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    column_sums = (a * b).sum(0)
    if scale_b is not None:
        b = b * scale_b.to(dtype)
    grams = [gram_axis(a, b, axis, dims) for axis in range(len(dims))]
    return [*grams, column_sums]


def _kron_rotate_fake(
    x: Tensor,
    factors: list[Tensor],
    transpose: bool,
    scale_before: Tensor | None,
    scale_after: Tensor | None,
) -> Tensor:
    torch._check(x.dim() == 2)
    torch._check(x.shape[1] == prod(factor.shape[0] for factor in factors))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kron_gram_fake(a: Tensor, b: Tensor, dims: list[int], scale_b: Tensor | None) -> list[Tensor]:
    torch._check(a.dim() == 2 and a.shape[1] == prod(dims))
    torch._check(a.shape == b.shape)
    dtype = accumulation_dtype(a.dtype)
    return [a.new_empty(n, n, dtype=dtype) for n in dims] + [a.new_empty(a.shape[1], dtype=dtype)]


define_op(
    "kron_rotate(Tensor x, Tensor[] factors, bool transpose, "
    "Tensor? scale_before, Tensor? scale_after) -> Tensor",
    reference=kron_rotate_reference,
    fake=_kron_rotate_fake,
    public_function="spectral_adapters.functional.kron_rotate",
)
define_op(
    "kron_gram(Tensor a, Tensor b, int[] dims, Tensor? scale_b) -> Tensor[]",
    reference=kron_gram_reference,
    fake=_kron_gram_fake,
    public_function="spectral_adapters.functional.kron_gram",
)
