"""The ops ``stiefel_sgd_`` and ``stiefel_adam_``: references and C++ against dense float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stiefel_oracle import (
    assert_all_near,
    copies,
    expected_adam,
    expected_sgd,
    orthogonality_error,
    problem,
)
from support import assert_near
from torch import Tensor

from spectral_kernels import backend_report
from spectral_kernels.ops.stiefel import (
    adam_bound,
    longest_step,
    stiefel_adam_reference,
    stiefel_sgd_reference,
)

op = torch.ops.spectral
LEVELS = ("avx512", "avx2", "baseline")

# Single matrices, batches, none at all; every filling of the last vector and of the last tile.
SHAPES = [(4, 4), (3, 5, 5), (1, 1), (0, 7, 7), (2, 1, 1), (17, 17), (2, 31, 31), (40, 40), (0, 0)]

SGD = {"op": op.stiefel_sgd_, "reference": stiefel_sgd_reference}
ADAM = {"op": op.stiefel_adam_, "reference": stiefel_adam_reference}
WHICH = pytest.mark.parametrize("which", ["op", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(params=[*LEVELS, "reference"])
def level(request):
    """The compiled op at every SIMD level, and the reference."""
    if request.param == "reference":
        yield "reference"
        return
    extension = pytest.importorskip("spectral_kernels._C")
    if request.param not in extension._simd_levels():
        pytest.skip(f"this processor has no {request.param}")
    before = extension.build_info()["simd"]
    extension._set_simd_level(request.param)
    yield "op"
    extension._set_simd_level(before)


@DTYPES
@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("metric", [-1.0, 0.25])
def test_adam_values(level: str, dtype: torch.dtype, lr: float, metric: float) -> None:
    lists = problem(SHAPES, dtype)
    expected = expected_adam(lists, lr, 0.9, 0.99, 1e-8, metric)
    ADAM[level](*lists, lr, 0.9, 0.99, 1e-8, metric)
    assert_all_near(lists, expected, factor=4 if lr < 0.1 else 20)


@DTYPES
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9), (0.99, 0.5)])
def test_adam_without_a_useful_bound(level: str, dtype: torch.dtype, betas: Any) -> None:
    """Where the moments bound no step beforehand."""
    lists = problem(SHAPES, dtype)
    expected = expected_adam(lists, 1e-2, *betas, 1e-8, -1.0)
    ADAM[level](*lists, 1e-2, *betas, 1e-8, -1.0)
    assert_all_near(lists, expected, factor=20)


@DTYPES
@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_values(level: str, dtype: torch.dtype, lr: float, momentum: float) -> None:
    lists = problem(SHAPES, dtype)[:3]
    expected = expected_sgd(lists, lr, momentum, -1.0)
    if momentum == 0:
        SGD[level](lists[0], lists[1], [], lr, momentum, -1.0)
        lists, expected = lists[:2], expected[:2]
    else:
        SGD[level](*lists, lr, momentum, -1.0)
    assert_all_near(lists, expected, factor=20)


@pytest.mark.parametrize("n", [*range(1, 36), 48, 63, 64, 65, 100, 128, 131])
def test_every_size_stays_orthogonal(level: str, n: int) -> None:
    lists = problem([(2, n, n)], torch.float32)
    for _ in range(3):
        ADAM[level](*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
    assert orthogonality_error(lists[0][0]) <= 2e-6
    assert torch.linalg.det(lists[0][0].double()).sub(1).abs().amax() <= 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_huge_and_tiny_gradients(level: str, scale: float) -> None:
    """Squares overflow and vanish; factors stay on the manifold, velocities stay right."""
    for shape in [(5, 5), (2, 40, 40)]:
        lists = problem([shape], torch.float32, scale)
        expected = expected_adam(lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        ADAM[level](*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        assert orthogonality_error(lists[0][0]) <= 2e-6
        assert_near(lists[2][0], expected[2][0], factor=4)
        lists = problem([shape], torch.float32, scale)[:3]
        SGD[level](*lists, 1.0, 0.9, -1.0)
        assert orthogonality_error(lists[0][0]) <= 2e-6


def test_long_steps_are_shortened(level: str) -> None:
    """A step of any length turns a plane by less than a right angle."""
    x = [torch.eye(2, dtype=torch.float64)]
    velocity = [torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)]
    SGD[level](x, [torch.zeros(2, 2, dtype=torch.float64)], velocity, 1e9, 1.0, -1.0)
    angle = math.atan2(x[0][0, 1], x[0][0, 0])
    assert angle == pytest.approx(math.atan(1e3), abs=1e-9)
    assert orthogonality_error(x[0]) <= 1e-13


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_matrix(level: str, bad: float) -> None:
    lists = problem([(2, 20, 20), (6, 6)], torch.float32)
    alone = copies(lists)
    lists[1][0][0, 3, 4] = bad
    for run in (lists, alone):
        ADAM[level](*run, 1e-2, 0.9, 0.99, 1e-8, -1.0)
    assert lists[0][0][0].isnan().any()
    assert torch.equal(lists[0][0][1], alone[0][0][1])
    assert torch.equal(lists[0][1], alone[0][1])


@WHICH
def test_mixed_dtypes_in_one_call(which: str) -> None:
    """As two calls: what steps beside a matrix does not change it."""
    single = problem([(6, 6), (3, 4, 4)], torch.float32)
    double = problem([(5, 5), (6, 6)], torch.float64)
    mixed = [[*a, *b] for a, b in zip(copies(single), copies(double), strict=True)]
    options = (1e-2, 0.9, 0.99, 1e-8, -1.0)
    ADAM[which](*mixed, *options)
    ADAM[which](*single, *options)
    ADAM[which](*double, *options)
    for together, a, b in zip(mixed, single, double, strict=True):
        for left, right in zip(together, [*a, *b], strict=True):
            assert left.dtype == right.dtype and torch.equal(left, right)


@WHICH
def test_non_contiguous_tensors(which: str) -> None:
    """Strides of factors, gradients and state are kept and change nothing."""
    plain = problem([(5, 5), (3, 4, 4)], torch.float32)
    strided = [
        [t.mT.contiguous().mT if t.dim() else t.clone() for t in tensors] for tensors in plain
    ]
    options = (1e-2, 0.9, 0.99, 1e-8, -1.0)
    ADAM[which](*plain, *options)
    ADAM[which](*strided, *options)
    for tensors, others in zip(plain, strided, strict=True):
        for left, right in zip(tensors, others, strict=True):
            assert torch.equal(left, right)
            assert right.dim() == 0 or right.stride(-2) == 1


def test_sharing_over_threads_does_not_matter() -> None:
    """A long list is shared over threads, each of its factors alone is not."""
    lists = problem([(n, n) for n in (*range(16, 41),) * 4], torch.float32)
    alone = copies(lists)
    op.stiefel_adam_(*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
    for tensors in zip(*alone, strict=True):
        op.stiefel_adam_(*([tensor] for tensor in tensors), 1e-2, 0.9, 0.99, 1e-8, -1.0)
    if backend_report()["stiefel_adam_"].implementation == "c++":
        for tensors, others in zip(lists, alone, strict=True):
            assert all(map(torch.equal, tensors, others))
    else:
        assert_all_near(lists, copies(alone, torch.float64), factor=4)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_compiles_without_a_graph_break(name: str) -> None:
    calls: dict[str, tuple[Callable[..., None], int, tuple[float, ...]]] = {
        "sgd": (op.stiefel_sgd_, 3, (1e-2, 0.9, -1.0)),
        "adam": (op.stiefel_adam_, 5, (1e-2, 0.9, 0.99, 1e-8, -1.0)),
    }
    call, count, options = calls[name]
    torch._dynamo.reset()
    eager = problem([(5, 5), (2, 3, 3)], torch.float32)[:count]
    traced = copies(eager)

    def step(lists: list[list[Tensor]]) -> Tensor:
        call(*lists, *options)
        return lists[0][0] * 2

    result = torch.compile(step, fullgraph=True, backend="aot_eager")(traced)
    assert torch.equal(result, step(eager))
    for tensors, others in zip(eager, traced, strict=True):
        assert all(map(torch.equal, tensors, others))


def changed(lists: list[list[Tensor]], index: int, tensor: Tensor) -> list[list[Tensor]]:
    return [[tensor] if i == index else tensors for i, tensors in enumerate(lists)]


@WHICH
@pytest.mark.parametrize(
    ("index", "tensor", "error", "message"),
    [
        (0, torch.zeros(3, 4), ValueError, r"factors\[0\] must have shape \[B, n, n\] or \[n, n\]"),
        (0, torch.zeros(3), ValueError, r"factors\[0\] must have shape"),
        (0, torch.zeros(3, 3).half(), TypeError, r"factors\[0\] must be float32 or float64"),
        (1, torch.zeros(3, 2), ValueError, r"grads\[0\] must be dense with shape"),
        (1, torch.zeros(3, 3).double(), TypeError, r"grads\[0\] must be .*[Ff]loat.*; got .*ouble|"
         r"grads\[0\] must be torch.float32; got torch.float64"),
        (1, torch.zeros(3, 3).to_sparse(), ValueError, r"grads\[0\] must be dense"),
        (2, torch.zeros(1, 3, 3), ValueError, r"velocities\[0\] must be dense with shape"),
        (3, torch.zeros(()), ValueError, r"squares\[0\] must be dense with shape"),
        (4, torch.zeros(1), ValueError, r"steps\[0\] must be dense with shape"),
        (4, torch.zeros((), dtype=torch.int64), TypeError, r"steps\[0\] must be"),
    ],
)  # fmt: skip
def test_refuses(
    which: str, index: int, tensor: Tensor, error: type[Exception], message: str
) -> None:
    lists = [[torch.eye(3)], *([torch.zeros(3, 3)] for _ in range(3)), [torch.zeros(())]]
    with pytest.raises(error, match=message):
        ADAM[which](*changed(lists, index, tensor), 1e-2, 0.9, 0.99, 1e-8, -1.0)
    assert torch.equal(lists[0][0], torch.eye(3)) and lists[4][0] == 0
    if index < 3:
        with pytest.raises(error, match=message):
            SGD[which](*changed(lists[:3], index, tensor), 1e-2, 0.9, -1.0)


@WHICH
@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_refuses_lists_of_different_lengths(which: str, index: int) -> None:
    lists = [[torch.eye(3)], *([torch.zeros(3, 3)] for _ in range(3)), [torch.zeros(())]]
    lists[index] = lists[index] * 2
    with pytest.raises(ValueError, match=r"must have one entry per factor, 1; got 2"):
        ADAM[which](*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.9), (0.0, 0.5), (0.9, 0.999)])
def test_the_bound_holds(betas: tuple[float, float]) -> None:
    """Against the gradients that reach it: growing as fast as the second moment forgets."""
    beta1, beta2 = betas
    n, lr = 2, 1.0
    ratio = beta2 / beta1 if beta1 > 0 else 1e3
    m = v = largest = 0.0
    for t in range(1, 60):
        g = ratio**t
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        xi = m / (1 - beta1**t) / math.sqrt(v / (1 - beta2**t))
        largest = max(largest, xi)
    assert 0 < largest <= adam_bound(lr, beta1, beta2, n) * (1 + 1e-12)
    assert longest_step(0.0) == 1e-6 and longest_step(math.inf) == 1e3
