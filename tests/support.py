"""Shared by the tests: one tolerance table, dense float64 oracles, and input generators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

#: Relative tolerance by dtype, against float64: a few roundings of the dtype itself.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; NaN counts as infinite."""
    difference = (actual.detach().double() - expected.detach().double()).abs()
    if difference.numel() == 0:
        return 0.0
    scale = expected.detach().double().abs().amax().clamp_min(1e-30)
    error = float(difference.amax() / scale)
    return error if error == error else float("inf")


def assert_near(actual: Tensor, expected: Tensor, *, factor: float = 1.0) -> None:
    """Fail unless ``actual`` is within ``factor`` times its tolerance of ``expected``."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = relative_error(actual, expected)
    limit = factor * TOLERANCE[actual.dtype]
    assert error <= limit, f"relative error {error:.2e} exceeds {limit:.2e} for {actual.dtype}"


def random_rotation(n: int, *, scale: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random n x n rotation, by a dense float64 Cayley transform."""
    skew = torch.randn(n, n, dtype=torch.float64).triu(1) * scale
    skew = skew - skew.mT
    identity = torch.eye(n, dtype=torch.float64)
    return torch.linalg.solve(identity - skew, identity + skew).to(dtype)


def dense_kron(factors: Sequence[Tensor]) -> Tensor:
    """The whole Kronecker product in float64."""
    return reduce(torch.kron, [factor.double().contiguous() for factor in factors])


def dense_soda_weight(layer: nn.Module) -> Tensor:
    """A SODA layer's adapted weight from the definition, in float64, differentiable."""
    left, right = layer.left.double(), layer.right.double()
    spectrum, rank = layer.spectrum().double(), layer.right.shape[0]
    rotation = None if layer.rotation_side is None else dense_kron(layer.rotation_factors())
    if layer.decomposition == "svd":
        if layer.rotation_side == "left":
            return left @ rotation @ torch.diag(spectrum) @ right
        weight = left @ torch.diag(spectrum) @ right
        return weight if rotation is None else weight @ rotation.mT
    triangular = right if layer.rotation_side == "left" else left
    offset = spectrum - triangular.diagonal()
    if layer.rotation_side == "left":
        diagonal = torch.zeros_like(right).index_put((torch.arange(rank),) * 2, offset)
        return left @ rotation @ (right + diagonal)
    diagonal = torch.zeros_like(left).index_put((torch.arange(rank),) * 2, offset)
    weight = (left + diagonal) @ right
    return weight if rotation is None else weight @ rotation.mT


def randomise(layer: nn.Module, *, scale: float = 0.3) -> nn.Module:
    """Move a layer's trained numbers away from the identity, in place."""
    with torch.no_grad():
        layer.delta.normal_(0, scale)
        for parameter in layer.rotation:
            if layer.parametrization == "cayley":
                parameter.normal_(0, scale)
            else:
                parameter.copy_(random_rotation(parameter.shape[0], scale=scale))
    return layer
