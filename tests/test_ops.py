"""The raw ops: what the dispatcher demands of them, and the values of references and overrides."""

from itertools import product

import pytest
import torch
from support import TOLERANCE, assert_near, dense_kron, random_rotation, relative_error

import spectral_kernels
from spectral_kernels._overrides import STATUS
from spectral_kernels.ops import OPS
from spectral_kernels.ops.cayley import cayley_bwd_reference, cayley_fwd_reference
from spectral_kernels.ops.kron import kron_gram_reference, kron_rotate_reference
from spectral_kernels.ops.rotated_linear import (
    rotated_linear_bwd_reference,
    rotated_linear_fwd_reference,
)

op = torch.ops.spectral


def _packed(sizes_and_batches, dtype=torch.float32, scale=1.0):
    return [
        torch.randn(batch, n * (n - 1) // 2, dtype=dtype) * scale for n, batch in sizes_and_batches
    ]


FACTORS = [random_rotation(2, dtype=torch.float32), random_rotation(3, dtype=torch.float32)]
MIXED = [(4, 3), (5, 2), (3, 0), (1, 2), (17, 1), (2, 5)]

SAMPLES = {
    "cayley_fwd": [
        (_packed(MIXED), [n for n, _ in MIXED]),
        ([torch.randn(6), torch.randn(2, 3)], [4, 3]),
        ([], []),
    ],
    "cayley_bwd": [
        ([torch.randn(b, n, n) for n, b in MIXED], [torch.randn(b, n, n) for n, b in MIXED]),
        ([torch.randn(4, 4)], [torch.randn(4, 4)]),
    ],
    "kron_rotate": [
        (torch.randn(7, 12), [torch.randn(3, 3), torch.randn(4, 4)], True, torch.randn(12), None),
        (torch.randn(0, 12), [torch.randn(12, 12)], False, None, torch.randn(12)),
        (torch.randn(5, 1), [torch.ones(1, 1)], False, None, None),
        (
            torch.randn(5, 12, dtype=torch.bfloat16),
            [torch.eye(2)] * 2 + [torch.eye(3)],
            False,
            None,
            None,
        ),
    ],
    "kron_gram": [
        (torch.randn(7, 12), torch.randn(7, 12), [3, 4], torch.randn(12)),
        (torch.randn(0, 12), torch.randn(0, 12), [2, 2, 3], None),
        (torch.randn(7, 12).half(), torch.randn(7, 12).half(), [12], None),
    ],
    "rotated_linear_fwd": [
        (x, scale, matrix, subtract, bias, transpose, on_tokens, FACTORS)
        for x, scale, matrix, subtract, bias, transpose, on_tokens in (
            (torch.randn(2, 7, 6), torch.randn(6), torch.randn(5, 6), None, None, False, True),
            (torch.randn(7, 6), None, torch.randn(5, 6), None, torch.randn(5), True, True),
            (torch.randn(7, 6), None, torch.randn(5, 6), torch.randn(5, 6), None, True, False),
            (torch.randn(0, 6), torch.randn(6), torch.randn(5, 6), None, None, False, False),
        )
    ],
    "rotated_linear_bwd": [
        (grad, x, scale, torch.randn(5, 6), subtract, rotated, transpose, needs_sums, FACTORS)
        for grad, x, scale, subtract, rotated, transpose, needs_sums in (
            (torch.randn(2, 7, 5), torch.randn(2, 7, 6), torch.randn(6), None, None, False, True),
            (torch.randn(7, 5), torch.randn(7, 6), None, None, None, True, False),
            (torch.randn(7, 5), torch.randn(7, 6), None, *torch.randn(2, 5, 6), True, True),
            (torch.randn(0, 5), torch.randn(0, 6), None, None, None, False, True),
        )
    ],
}


def _zeros(shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def _stiefel(shapes, moments, dtype=torch.float32):
    """Rotations, gradients and zero moments of these shapes."""
    factors = [torch.eye(shape[-1], dtype=dtype).expand(shape).clone() for shape in shapes]
    grads = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [factors, grads, *(_zeros(shapes, dtype) for _ in range(moments))]


SQUARES = [(4, 4), (3, 5, 5), (1, 1), (0, 7, 7)]

SAMPLES |= {
    "stiefel_sgd_": [
        (*_stiefel(SQUARES, 1), 0.1, 0.9, -1.0),
        (*_stiefel(SQUARES, 0, torch.float64), [], 0.1, 0.0, 0.0),
        ([], [], [], 0.1, 0.9, -1.0),
    ],
    "stiefel_adam_": [
        (*_stiefel(SQUARES, 2), _zeros([()] * 4), 0.1, 0.9, 0.99, 1e-8, -1.0),
        (*_stiefel([(6, 6)], 2, torch.float64), _zeros([()]), 0.1, 0.0, 0.5, 1e-8, 0.0),
        ([], [], [], [], [], 0.1, 0.9, 0.99, 1e-8, -1.0),
    ],
}


def test_every_op_has_samples():
    assert set(SAMPLES) == set(OPS)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name):
    for arguments in SAMPLES[name]:
        torch.library.opcheck(getattr(op, name), arguments)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_raw_ops_refuse_autograd_and_name_the_public_function(name):
    arguments = list(SAMPLES[name][0])
    first = arguments[0]
    if isinstance(first, list):
        arguments[0] = [tensor.clone().requires_grad_() for tensor in first]
    else:
        arguments[0] = first.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=OPS[name].public_function.replace(".", r"\.")):
        getattr(op, name)(*arguments)
    with torch.no_grad():
        getattr(op, name)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forward", [op.cayley_fwd, cayley_fwd_reference], ids=["op", "reference"])
def test_cayley_values(dtype, forward):
    packed = _packed(MIXED, dtype)
    rotations = forward(packed, [n for n, _ in MIXED])
    for (n, batch), values, rotation in zip(MIXED, packed, rotations, strict=True):
        assert rotation.shape == (batch, n, n) and rotation.dtype == dtype
        for b in range(batch):
            skew = torch.zeros(n, n, dtype=torch.float64)
            skew[tuple(torch.triu_indices(n, n, 1))] = values[b].double() / 2
            skew = skew - skew.mT
            identity = torch.eye(n, dtype=torch.float64)
            expected = torch.linalg.solve((identity - skew).mT, (identity + skew).mT).mT
            assert_near(rotation[b], expected)
            assert torch.linalg.det(rotation[b].double()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("forward", [op.cayley_fwd, cayley_fwd_reference], ids=["op", "reference"])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("n", [1, 2, 16, 31, 64, 129, 256])
def test_cayley_is_orthogonal_to_fp32_rounding(n, norm, forward):
    packed = torch.randn(2, n * (n - 1) // 2)
    skew = torch.zeros(2, n, n)
    skew[:, *torch.triu_indices(n, n, 1)] = packed / 2
    spectral_norm = torch.linalg.matrix_norm(skew - skew.mT, 2).amax().clamp_min(1e-30)
    (rotation,) = forward([packed * (norm / spectral_norm)], [n])
    gram = rotation.double().mT @ rotation.double()
    assert (gram - torch.eye(n)).abs().amax() <= 2e-6
    if norm == 0:
        assert torch.equal(rotation, torch.eye(n).expand(2, n, n))


@pytest.mark.parametrize("backward", [op.cayley_bwd, cayley_bwd_reference], ids=["op", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cayley_backward_equals_autograd_through_a_solve(backward, dtype):
    for n in (1, 2, 5, 33):
        packed = torch.randn(3, n * (n - 1) // 2, dtype=torch.float64, requires_grad=True)
        rows, columns = torch.triu_indices(n, n, 1)
        upper = torch.zeros(3, n, n, dtype=torch.float64).index_put(
            (torch.arange(3)[:, None], rows[None], columns[None]), packed / 2
        )
        skew = upper - upper.mT
        identity = torch.eye(n, dtype=torch.float64)
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
        weight = torch.randn(3, n, n, dtype=torch.float64)
        (expected,) = torch.autograd.grad((rotation * weight).sum(), packed)
        (grad,) = backward([weight.to(dtype)], [rotation.detach().to(dtype)])
        assert_near(grad, expected, factor=2)


KRON_DIMS = [(1,), (7,), (2, 3), (3, 2), (8, 8, 10), (1, 5), (32, 40), (2, 3, 5, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", KRON_DIMS)
@pytest.mark.parametrize("rotate", [op.kron_rotate, kron_rotate_reference], ids=["op", "reference"])
def test_kron_rotate_values(rotate, dims, dtype):
    factors = [random_rotation(n) for n in dims]
    k = dense_kron(factors).shape[0]
    x = torch.randn(6, k, dtype=torch.float64).to(dtype)
    before, after = torch.randn(k), torch.randn(k)
    dense = dense_kron([f.float() for f in factors])
    stored = factors if dtype == torch.float64 else [f.float() for f in factors]
    if dtype == torch.float64:
        dense, before, after = dense_kron(factors), before.double(), after.double()
    for transpose in (False, True):
        matrix = dense.mT if transpose else dense
        plain = rotate(x, stored, transpose, None, None)
        assert_near(plain, x.double() @ matrix)
        scaled = rotate(x, stored, transpose, before, after)
        assert_near(scaled, ((x.double() * before.double()) @ matrix) * after.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", KRON_DIMS)
@pytest.mark.parametrize("grams_of", [op.kron_gram, kron_gram_reference], ids=["op", "reference"])
def test_kron_gram_values(grams_of, dims, dtype):
    k = torch.Size(dims).numel()
    a, b = (torch.randn(6, k, dtype=torch.float64).to(dtype) for _ in range(2))
    scale = torch.randn(k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    *grams, column_sums = grams_of(a, b, list(dims), scale)
    wide_a, wide_b = a.double().view(6, *dims), (b.double() * scale.double()).view(6, *dims)
    for axis, gram in enumerate(grams):
        assert gram.dtype == scale.dtype
        unfold = lambda t: t.movedim(axis + 1, 0).reshape(dims[axis], -1)  # noqa: B023, E731
        assert_near(gram, unfold(wide_a) @ unfold(wide_b).mT, factor=2)
    assert_near(column_sums, (a.double() * b.double()).sum(0))


PRODUCTS = {
    "op": (op.rotated_linear_fwd, op.rotated_linear_bwd),
    "reference": (rotated_linear_fwd_reference, rotated_linear_bwd_reference),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", PRODUCTS)
def test_rotated_linear_values(which, dtype):
    """Every combination of options against the dense product, differentiated in float64."""
    forward, backward = PRODUCTS[which]
    small = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [random_rotation(n, dtype=small) for n in (3, 4)]
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
    for scaled, subtracted, biased, transpose, on_tokens in product((False, True), repeat=5):
        if subtracted and on_tokens:
            continue
        x, matrix, bias, grad = random(2, 7, 12), random(5, 12), random(5), random(2, 7, 5)
        scale = random(12).to(small) if scaled else None
        subtract = random(5, 12) if subtracted else None

        leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, *factors)]
        unit = torch.ones(12, dtype=torch.float64)
        unit = (unit if scale is None else scale.to(torch.float64, copy=True)).requires_grad_()
        dense = torch.kron(leaves[1], leaves[2])
        expected = (leaves[0] * unit) @ (matrix.double() @ (dense.mT if transpose else dense)).mT
        if subtract is not None:
            expected = expected - leaves[0] @ subtract.double().mT
        if biased:
            expected = expected + bias.double()
        expected_x, expected_scale, *expected_factors = torch.autograd.grad(
            expected, [leaves[0], unit, *leaves[1:]], grad.double()
        )

        options = (x, scale, matrix, subtract, bias if biased else None)
        y, rotated = forward(*options, transpose, on_tokens, factors)
        assert_near(y, expected, factor=2)
        assert rotated.shape == ((0,) if on_tokens else matrix.shape) and rotated.dtype == dtype
        saved = (x, scale, matrix, subtract, None if on_tokens else rotated)
        (alone,) = backward(grad, *saved, transpose, False, factors)
        dx, ds, *dfactors = backward(grad, *saved, transpose, True, factors)
        assert_near(alone, expected_x, factor=2)
        assert_near(dx, expected_x, factor=2)
        # bf16: the sums are fp32, of values that were rounded on the way.
        assert relative_error(ds, expected_scale) <= 4 * TOLERANCE[dtype]
        for factor, actual, exact in zip(factors, dfactors, expected_factors, strict=True):
            # The op promises the gradient along the rotations only.
            tangent = lambda g: factor.double().mT @ g.double()  # noqa: B023, E731
            skew = lambda g: tangent(g) - tangent(g).mT  # noqa: B023, E731
            assert relative_error(skew(actual), skew(exact)) <= 4 * TOLERANCE[dtype]


def test_non_contiguous_inputs():
    x = torch.randn(12, 9).mT
    factors = [random_rotation(3, dtype=torch.float32), random_rotation(4, dtype=torch.float32).mT]
    expected = x.double() @ dense_kron(factors)
    assert_near(op.kron_rotate(x, factors, False, None, None), expected)
    *_, sums = op.kron_gram(x, x, [3, 4], None)
    assert_near(sums, (x.double() ** 2).sum(0))


def test_backend_report_tells_every_op_and_why():
    report = spectral_kernels.backend_report()
    assert set(report) == set(OPS)
    for row in report.rows:
        assert row.implementation in {"reference", "c++", "cuda", "triton"}
        assert row.reason
    text = str(report)
    for name in OPS:
        assert name in text
    if not torch.cuda.is_available():
        expected = "c++" if STATUS["extension"].loaded else "reference"
        assert {row.implementation for row in report.values()} == {expected}
