"""Frozen bases in 8 and 4 bits: U and V as weights of a library that has products with them.

Nothing dense is kept. A product goes through the library's own GEMM path, which dequantises inside
of it; a backward pass dequantises one matrix for the time of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from spectral_adapters._validation import check_choice
from spectral_adapters.autograd import apply
from spectral_adapters.decomposition import BASIS_DTYPES
from spectral_adapters.functional import (
    SpectralBasis,
    autocast_is_on,
    kron_rotate,
    result_dtype,
    without_autocast,
)

#: Formats that a basis can be quantised to, with the package that has them.
QUANTIZED_DTYPES = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}


class QuantizedMatrix(nn.Module):
    """A frozen matrix [rows, columns] in the format of a library; ``module(x)`` is ``x M^T``.

    The library's tensors are parameters without gradient that follow the device and are never cast.
    They are made into the library's own weight for each product, so that copies, state dicts and
    safetensors see plain tensors.

    Args:
        matrix: [rows, columns], fp32.

    Attributes:
        shape: (rows, columns).
        dtype: fp32, what the matrix stands for.

    Raises:
        ImportError: the format's package is missing.
    """

    shape: torch.Size
    dtype = torch.float32

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.shape = matrix.shape
        for name, tensor in self._quantize(matrix.detach()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _quantize(self, matrix: Tensor) -> Mapping[str, Tensor]:
        """The library's tensors by name."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """``x M^T`` by the library, [tokens, columns] -> [tokens, rows] in the dtype of x; no
        gradient."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, columns] that this one stands for, dense."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(self.parameters()).device

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.nbytes for tensor in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]; differentiable in x."""
        flat = x.reshape(-1, self.shape[1])
        y: Tensor = apply(QuantizedLinearFunction, flat, self)
        return y.view(*x.shape[:-1], self.shape[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def extra_repr(self) -> str:
        return f"{'x'.join(str(size) for size in self.shape)}, bytes={self.nbytes:,}"


class QuantizedLinearFunction(torch.autograd.Function):
    """``x M^T`` for a :class:`QuantizedMatrix` M.

    torchao's own products keep the dequantised matrix for their backward, one per layer; this keeps
    nothing.
    """

    @staticmethod
    def forward(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        return matrix.product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad @ ctx.matrix.dequantized(grad.dtype), None


class _TorchaoMatrix(QuantizedMatrix):
    """A weight-only tensor subclass of torchao, one scale per row."""

    _config: str
    _subclass: Any
    _context: dict[str, Any]

    def _quantize(self, matrix: Tensor) -> Mapping[str, Tensor]:
        from torchao import quantization

        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix, requires_grad=False)
        # The setting that is left out is one of all torch.compile in the process.
        config = getattr(quantization, self._config)(set_inductor_config=False)
        quantization.quantize_(layer, config)
        weight: Any = layer.weight
        self._subclass = type(weight)
        names, self._context = weight.__tensor_flatten__()
        return {name: getattr(weight, name) for name in names}

    def _weight(self, dtype: torch.dtype) -> Any:
        inner = {name: tensor.detach() for name, tensor in self.named_parameters()}
        context = {**self._context, "dtype": dtype}
        return self._subclass.__tensor_unflatten__(inner, context, None, None)

    def product(self, x: Tensor) -> Tensor:
        return linear(x, self._weight(x.dtype))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense: Tensor = self._weight(dtype).dequantize()
        return dense


class Int8Matrix(_TorchaoMatrix):
    """int8, symmetric."""

    _config = "Int8WeightOnlyConfig"


class Float8Matrix(_TorchaoMatrix):
    """float8 e4m3."""

    _config = "Float8WeightOnlyConfig"

    def _quantize(self, matrix: Tensor) -> Mapping[str, Tensor]:
        # A row of zeros has the scale 0, and 0 / 0 for values.
        is_zero = (matrix == 0).all(dim=1, keepdim=True)
        return super()._quantize(matrix.masked_fill(is_zero, 1e-30))


class NF4Matrix(QuantizedMatrix):
    """4-bit normal float (Dettmers et al., "QLoRA", NeurIPS 2023) by bitsandbytes: 16 levels, one
    fp32 scale per 64 numbers."""

    _BLOCK = 64
    packed: Tensor
    absmax: Tensor
    code: Tensor

    def _quantize(self, matrix: Tensor) -> Mapping[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(matrix.contiguous(), blocksize=self._BLOCK, quant_type="nf4")
        return {"packed": packed, "absmax": state.absmax, "code": state.code}

    def _state(self, dtype: torch.dtype) -> Any:
        from bitsandbytes.functional import QuantState

        return QuantState(self.absmax, self.shape, self.code, self._BLOCK, "nf4", dtype)

    def product(self, x: Tensor) -> Tensor:
        import bitsandbytes

        if x.device.type == "cpu" and self.shape[1] % self._BLOCK:
            return linear(x, self.dequantized(x.dtype))
        return bitsandbytes.matmul_4bit(x, self.packed, self._state(x.dtype))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # As one row: on a CPU with AVX-512, bitsandbytes 0.50.2 takes wrong scales for rows whose
        # length is no multiple of the block's.
        state = self._state(dtype)
        state.shape = (1, prod(self.shape))
        dense: Tensor = dequantize_4bit(self.packed, state)
        return dense.view(self.shape)


_FORMATS: dict[str, type[QuantizedMatrix]] = {
    "int8": Int8Matrix,
    "float8": Float8Matrix,
    "nf4": NF4Matrix,
}


class QuantizedBasis(NamedTuple):
    """An SVD whose matrices are quantised, of a weight [out, in] with ``k = min(out, in)``.

    ``left`` U [out, k], ``singular_values`` S [k] in fp32, ``right`` V^T [k, in].
    """

    left: QuantizedMatrix
    singular_values: Tensor
    right: QuantizedMatrix

    @classmethod
    @torch.no_grad()
    def of(cls, basis: SpectralBasis, kind: str) -> QuantizedBasis:
        """``basis``, an SVD in fp32, with its matrices quantised to a format."""
        assert basis.singular_values is not None
        make = _FORMATS[kind]
        # Tensors made in inference mode could never be used for training later. The values are
        # copied, since they may lie in the memory of all of the basis.
        with torch.inference_mode(False):
            return cls(make(basis.left), basis.singular_values.clone(), make(basis.right))

    def dequantized(self) -> SpectralBasis:
        """The factorisation that this stands for, dense."""
        return SpectralBasis(
            self.left.dequantized(), self.singular_values, self.right.dequantized()
        )

    def to(self, device: torch.device) -> QuantizedBasis:
        """The same on a device; the matrices themselves move."""
        with torch.inference_mode(False):
            return QuantizedBasis(
                self.left.to(device), self.singular_values.to(device), self.right.to(device)
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self.left.nbytes + self.singular_values.nbytes + self.right.nbytes


def check_basis_dtype(
    basis_dtype: str, *, decomposition: str, rotation: str | None, plan: str, recompute: bool
) -> bool:
    """Whether ``basis_dtype`` asks for a quantised basis, which a SODA with these options can have.

    Raises:
        ValueError: naming the option that does not go with it.
    """
    check_choice("basis_dtype", basis_dtype, (*BASIS_DTYPES, *QUANTIZED_DTYPES))
    if basis_dtype not in QUANTIZED_DTYPES:
        return False
    for name, value, possible in (
        ("decomposition", decomposition, ("svd",)),
        ("rotation", rotation, ("left", None)),
        ("plan", plan, ("auto", "tokens")),
        ("recompute", recompute, (False,)),
    ):
        if value not in possible:
            expected = " or ".join(repr(choice) for choice in possible)
            raise ValueError(
                f"{name} must be {expected} with basis_dtype={basis_dtype!r}; got {value!r}"
            )
    return True


def require_library(basis_dtype: str, base_dtype: torch.dtype) -> None:
    """Raise unless a basis of a weight of this dtype can be quantised here.

    Raises:
        ImportError: the format's package is missing; the message names it.
        ValueError: the weight is fp64, for which the libraries have no products.
    """
    package = QUANTIZED_DTYPES[basis_dtype]
    try:
        import_module(package)
    except ImportError as error:
        raise ImportError(
            f"basis_dtype={basis_dtype!r} needs {package}: pip install {package}, or "
            "spectral-kernels[quantized]"
        ) from error
    if base_dtype == torch.float64:
        expected = " or ".join(repr(choice) for choice in BASIS_DTYPES)
        raise ValueError(
            f"basis_dtype must be {expected} for a float64 weight; got {basis_dtype!r}"
        )


def quantized_product(
    x: Tensor,
    basis: QuantizedBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None,
    *,
    change: bool,
) -> Tensor:
    """``x ((U R) diag(s) V^T)^T``, or with ``change`` less ``x (U diag(S) V^T)^T``, by tokens.

    The change of an untrained layer is exactly zero. What lies between the two products, where a
    small change would be lost, is in fp32 or better.

    Args:
        x: [..., in].
        basis: quantised SVD of the base weight.
        spectrum: adapted singular values s [k].
        factors: orthogonal [n_i, n_i] with product k, or None without a rotation.
        change: leave out what the base weight gives.

    Returns:
        [..., out] in the dtype of x (the autocast dtype under autocast). Products run in it on
        accelerators, and in fp32 on the CPU and for fp64, which the libraries do not have.
    """
    result = result_dtype(x, autocast_is_on(x.device.type))
    work = torch.float32 if x.device.type == "cpu" or result == torch.float64 else result
    with without_autocast(x.device):
        z = basis.right(x.to(work)).float()
        turned = z * spectrum
        if factors:
            turned = kron_rotate(turned, factors, transpose=True, orthogonal=True)
        if change:
            turned = turned - z * basis.singular_values
        return basis.left(turned.to(work)).to(result)
