"""Checks at the public doors: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    options = tuple(choices)
    if value not in options:
        expected = ", ".join(repr(option) for option in options)
        raise ValueError(f"{argument} must be one of {expected}; got {value!r}")


def check_tensor(argument: str, value: Any, *, ndim: int | None = None) -> Tensor:
    """Raise unless ``value`` is a floating-point tensor (of ``ndim`` axes)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{argument} must have a floating-point dtype; got {value.dtype}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{argument} must have {ndim} dimensions; got shape {tuple(value.shape)}")
    return value


def check_last_dimension(argument: str, value: Tensor, size: int, meaning: str) -> None:
    """Raise ``ValueError`` unless the last dimension of ``value`` is ``size``."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(
            f"{argument} must have last dimension {size} ({meaning}); "
            f"got shape {tuple(value.shape)}"
        )


def check_vector(argument: str, value: Any, size: int) -> None:
    """Raise unless ``value`` is None or a floating-point tensor [size]."""
    if value is not None and check_tensor(argument, value).shape != (size,):
        raise ValueError(f"{argument} must have shape ({size},); got {tuple(value.shape)}")


def check_device(argument: str, value: Tensor, device: torch.device, meaning: str) -> None:
    """Raise ``ValueError`` unless ``value`` is on a device."""
    if value.device != device:
        raise ValueError(f"{argument} must be on {device} as {meaning}; got {value.device}")


def check_factor_sizes(argument: str, sizes: Any, dimension: int, meaning: str) -> tuple[int, ...]:
    """Return ``sizes`` as a tuple of positive ints whose product is ``dimension``."""
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(
            f"{argument} must be a sequence of ints with product {dimension}; got {sizes!r}"
        )
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{argument} must hold ints; got {size!r} in {tuple(sizes)!r}")
        if size < 1:
            raise ValueError(f"{argument} must hold positive ints; got {tuple(sizes)!r}")
    if len(sizes) == 0 or prod(sizes) != dimension:
        raise ValueError(
            f"{argument} must have product {dimension} ({meaning}); "
            f"got {tuple(sizes)!r} with product {prod(sizes)}"
        )
    return tuple(sizes)


def check_square_factors(
    argument: str, factors: Any, width: int | None = None, device: torch.device | None = None
) -> list[Tensor]:
    """Return ``factors`` as a non-empty list of square floating-point matrices ``[n_i, n_i]``, on
    the device of x and with the product of sizes ``width``, if these are given."""
    if isinstance(factors, Tensor) or not isinstance(factors, Iterable):
        raise TypeError(
            f"{argument} must be a sequence of square matrices; got {type(factors).__name__}"
        )
    matrices = [
        check_tensor(f"{argument}[{i}]", factor, ndim=2) for i, factor in enumerate(factors)
    ]
    if not matrices:
        raise ValueError(f"{argument} must hold at least one square matrix; got none")
    for i, matrix in enumerate(matrices):
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"{argument}[{i}] must be square; got shape {tuple(matrix.shape)}")
        if device is not None:
            check_device(f"{argument}[{i}]", matrix, device, "x")
    sizes = tuple([matrix.shape[0] for matrix in matrices])
    if width is not None and prod(sizes) != width:
        raise ValueError(f"{argument} must have product {width}; got sizes {sizes!r}")
    return matrices


def check_weight(argument: str, weight: Any) -> Tensor:
    """Return ``weight`` if it is a finite, non-empty floating-point tensor with data."""
    check_tensor(argument, weight)
    if weight.is_meta:
        raise ValueError(
            f"{argument} must hold data to be decomposed; got a tensor on the meta device: "
            "load the base weights first"
        )
    if weight.numel() == 0:
        raise ValueError(f"{argument} must not be empty; got shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{argument} must be finite; got NaN or infinity")
    return weight
