"""The raw ops: what the dispatcher demands of them, and the values of references and overrides."""

from itertools import product

import pytest
import torch
from support import TOLERANCE, assert_near, dense_kron, random_rotation, relative_error

import spectral_kernels
from spectral_kernels._overrides import STATUS
from spectral_kernels.ops import OPS, low_rank
from spectral_kernels.ops.cayley import cayley_bwd_reference, cayley_fwd_reference
from spectral_kernels.ops.kron import kron_gram_reference, kron_rotate_reference
from spectral_kernels.ops.rotated_linear import (
    rotated_linear_bwd_reference,
    rotated_linear_fwd_reference,
)
from spectral_kernels.ops.soda_linear import soda_linear_bwd_reference, soda_linear_fwd_reference

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

SAMPLES |= {
    "soda_linear_fwd": [
        (x, torch.randn(6), torch.randn(8, 6), torch.randn(6, 9), bias, rotated, on_tokens, FACTORS)
        for x, bias, rotated, on_tokens in (
            (torch.randn(2, 7, 9), torch.randn(8), None, True),
            (torch.randn(7, 9), None, None, False),
            (torch.randn(70, 9), torch.randn(8), torch.randn(8, 6), False),
            (torch.randn(0, 9), None, None, False),
        )
    ],
    "soda_linear_bwd": [
        (
            *(torch.randn(*rows, 8), torch.randn(*rows, 6), torch.randn(6), torch.randn(8, 6)),
            *(torch.randn(6, 9), rotated, on_tokens, needs_x, needs_sums, FACTORS),
        )
        for rows, rotated, on_tokens, needs_x, needs_sums in (
            ((2, 7), None, True, True, True),
            ((7,), None, False, True, False),
            ((70,), None, False, True, True),
            ((70,), torch.randn(8, 6), False, False, True),
            ((0,), torch.randn(8, 6), False, True, True),
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


def low_rank_factors(name, out_features, in_features, r, dtype=torch.float32):
    """What the op ``name`` takes between the bias and the scaling, away from the identity."""
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
    if name == "low_rank_linear":
        return random(r, in_features), random(out_features, r)
    basis = (random(out_features, r), random(r).abs(), random(r, in_features))
    if name == "spectral_a_linear":
        return *basis, random(out_features, r), random(in_features, r)
    return *basis, random_rotation(r, dtype=dtype), random_rotation(r, dtype=dtype)


def low_rank_delta(name, factors):
    """The definition of the change of the weight at scale 1 [out, in]."""
    if name == "low_rank_linear":
        down, up = factors
        return up @ down
    left, singular_values, right, first, second = factors
    middle = torch.diag(singular_values)
    if name == "spectral_a_linear":
        return (left + first) @ middle @ (right + second.mT) - left @ middle @ right
    return left @ (first @ middle @ second.mT - middle) @ right


def low_rank_samples(name):
    """Arguments of the forward and of the backward: 3-dimensional, empty, with and without W."""
    forward, backward = [], []
    for shape, r, start, dtype in (
        ((2, 7), 3, "weight", torch.float32),
        ((5,), 2, "base", torch.float64),
        ((0,), 2, "weight", torch.float32),
        # So many numbers that the largest is none of those that cancelled.
        ((9,), 2, "nothing", torch.bfloat16),
    ):
        factors = low_rank_factors(name, 5, 6, r)
        x, grad = torch.randn(*shape, 6, dtype=dtype), torch.randn(*shape, 5, dtype=dtype)
        base = torch.randn(*shape, 5, dtype=dtype) if start == "base" else None
        weight = torch.randn(5, 6, dtype=dtype) if start == "weight" else None
        bias = torch.randn(5, dtype=dtype) if start == "weight" else None
        forward.append((x, base, weight, bias, *factors, 0.5))
        thin = getattr(low_rank, f"{name}_fwd_reference")(*forward[-1])[1]
        saved = () if name == "spectral_r_linear" else (x,)
        needs = (start != "base", start != "nothing")
        backward.append((grad, *saved, weight, thin, *factors, 0.5, *needs))
    return {f"{name}_fwd": forward, f"{name}_bwd": backward}


LOW_RANK = ("low_rank_linear", "spectral_a_linear", "spectral_r_linear")
for stem in LOW_RANK:
    SAMPLES.update(low_rank_samples(stem))


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


def from_products(*names):
    """What runs on a GPU, here: the same functions of the extension, on any device."""
    if STATUS["extension"].loaded:
        namespace = torch.ops.spectral_products
        return {"products": tuple(getattr(namespace, name) for name in names)}
    return {}


ROTATIONS = {
    "op": op.kron_rotate,
    "reference": kron_rotate_reference,
    **{key: functions[0] for key, functions in from_products("kron_rotate").items()},
}
GRAMS = {
    "op": op.kron_gram,
    "reference": kron_gram_reference,
    **{key: functions[0] for key, functions in from_products("kron_gram").items()},
}

KRON_DIMS = [(1,), (7,), (2, 3), (3, 2), (8, 8, 10), (1, 5), (32, 40), (2, 3, 5, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", KRON_DIMS)
@pytest.mark.parametrize("which", ROTATIONS)
def test_kron_rotate_values(which, dims, dtype):
    rotate = ROTATIONS[which]
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
@pytest.mark.parametrize("which", GRAMS)
def test_kron_gram_values(which, dims, dtype):
    grams_of = GRAMS[which]
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


@pytest.mark.parametrize("which", GRAMS)
@pytest.mark.parametrize("dims", [(3, 2), (2, 3), (5, 2, 3)])
def test_kron_ops_without_rows(which, dims):
    """Nothing to rotate, and sums over nothing."""
    width = torch.Size(dims).numel()
    nothing = torch.zeros(0, width)
    factors = [random_rotation(n, dtype=torch.float32) for n in dims]
    assert ROTATIONS[which](nothing, factors, False, None, None).shape == (0, width)
    *grams, column_sums = GRAMS[which](nothing, nothing, list(dims), torch.ones(width))
    assert [gram.shape for gram in grams] == [(n, n) for n in dims]
    assert not any(sums.any() for sums in (*grams, column_sums))


PRODUCTS = {
    "op": (op.rotated_linear_fwd, op.rotated_linear_bwd),
    "reference": (rotated_linear_fwd_reference, rotated_linear_bwd_reference),
    **from_products("rotated_linear_fwd", "rotated_linear_bwd"),
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


SODA_LINEAR = {
    "op": (op.soda_linear_fwd, op.soda_linear_bwd),
    "reference": (soda_linear_fwd_reference, soda_linear_bwd_reference),
    **from_products("soda_linear_fwd", "soda_linear_bwd"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", SODA_LINEAR)
def test_soda_linear_values(which, dtype):
    """Few and many tokens, a basis in the layer's dtype and in fp32, kept or not."""
    forward, backward = SODA_LINEAR[which]
    small = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [random_rotation(n, dtype=small) for n in (3, 4)]
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
    for rows, biased, on_tokens, wide in product(((2, 3), (41,)), *[(False, True)] * 3):
        x, bias, grad, scale = (
            random(*rows, 13),
            random(15),
            random(*rows, 15),
            random(12).to(small),
        )
        left, right = random(15, 12), random(12, 13)
        if wide:
            left, right = left.to(small), right.to(small)
        leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, scale, *factors)]
        dense = torch.kron(leaves[2], leaves[3])
        weight = left.double() @ dense @ torch.diag(leaves[1]) @ right.double()
        expected = leaves[0] @ weight.mT + (bias.double() if biased else 0)
        exact_x, exact_scale, *exact_factors = torch.autograd.grad(expected, leaves, grad.double())

        options, given = (x, scale, left, right, bias if biased else None), None
        for _ in range(1 if on_tokens else 2):  # then with the rotated basis
            y, z, *made = forward(*options, given, on_tokens, factors)
            assert_near(y, expected, factor=3)
            assert_near(z, x.double() @ right.double().mT, factor=2)
            assert len(made) == (0 if on_tokens or given is not None else 1)
            saved = (grad, z, scale, left, right, given, on_tokens)
            (alone,) = backward(*saved, True, False, factors)
            dx, ds, *dfactors = backward(*saved, True, True, factors)
            assert dx.shape == x.shape and ds.dtype == small
            assert_near(alone, exact_x, factor=3)
            assert_near(dx, exact_x, factor=3)
            assert relative_error(ds, exact_scale) <= 4 * TOLERANCE[dtype]
            for factor, actual, exact in zip(factors, dfactors, exact_factors, strict=True):
                tangent = lambda g: factor.double().mT @ g.double()  # noqa: B023, E731
                skew = lambda g: tangent(g) - tangent(g).mT  # noqa: B023, E731
                assert relative_error(skew(actual), skew(exact)) <= 4 * TOLERANCE[dtype]
            for a, b in zip(backward(*saved, False, True, factors), [ds, *dfactors], strict=True):
                assert torch.equal(a, b)
            given = made[0] if made else None


LOW_RANK_PAIRS = ["op", "reference", *from_products()]


def low_rank_pair(name, which):
    if which == "op":
        return getattr(op, f"{name}_fwd"), getattr(op, f"{name}_bwd")
    if which == "products":
        return from_products(f"{name}_fwd", f"{name}_bwd")["products"]
    return getattr(low_rank, f"{name}_fwd_reference"), getattr(low_rank, f"{name}_bwd_reference")


def check_low_rank(name, which, x, grad, factors, *, start, scaling=1.0, factor=1.0):
    """Values and gradients of one op against the definition, differentiated in float64."""
    forward, backward = low_rank_pair(name, which)
    out_features, in_features, dtype = grad.shape[-1], x.shape[-1], x.dtype
    base = torch.randn(*grad.shape).to(dtype) if start == "base" else None
    weight = torch.randn(out_features, in_features).to(dtype) if start == "weight" else None
    bias = torch.randn(out_features).to(dtype) if start == "weight" else None
    y, thin = forward(x, base, weight, bias, *factors, scaling)
    saved = () if name == "spectral_r_linear" else (x,)
    everything = backward(grad, *saved, weight, thin, *factors, scaling, True, True)
    only_x = backward(grad, *saved, weight, thin, *factors, scaling, True, False)
    only_factors = backward(grad, *saved, weight, thin, *factors, scaling, False, True)

    exact_x = x.to(torch.float64, copy=True).requires_grad_()
    exact = [factor.to(torch.float64, copy=True) for factor in factors]
    leaves = [exact_x, exact[-2].requires_grad_(), exact[-1].requires_grad_()]
    expected = scaling * exact_x @ low_rank_delta(name, exact).mT
    if weight is not None:
        expected = expected + exact_x @ weight.double().mT + bias.double()
    if base is not None:
        expected = expected + base.double()
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    assert y.dtype == dtype
    assert_near(y, expected, factor=factor)
    for actual, gradient in zip(everything, gradients, strict=True):
        # The gradient of a factor has its dtype, and at best the precision of the tokens.
        limit = factor * max(TOLERANCE[dtype], TOLERANCE[actual.dtype])
        assert relative_error(actual, gradient) <= limit
    assert torch.equal(only_x[0], everything[0])
    assert [part.numel() for part in only_x[1:]] == [0, 0] and only_factors[0].numel() == 0
    assert all(map(torch.equal, only_factors[1:], everything[1:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", LOW_RANK_PAIRS)
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_values(name, which, dtype):
    small = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [(5, 6, 3), (31, 17, 5), (24, 40, 16)]
    if dtype != torch.bfloat16:
        # One sum alone may cancel, and bf16 rounds on the way.
        sizes += [(1, 7, 1), (7, 1, 1)]
    for out_features, in_features, r in sizes:
        factors = low_rank_factors(name, out_features, in_features, r, small)
        for shape, start in (((2, 7), "weight"), ((13,), "base"), ((1,), "nothing"), ((), "base")):
            x = torch.randn(*shape, in_features).to(dtype)
            grad = torch.randn(*shape, out_features).to(dtype)
            check_low_rank(name, which, x, grad, factors, start=start, scaling=-1.5, factor=2)


@pytest.mark.parametrize("which", LOW_RANK_PAIRS)
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_hostile_values(name, which):
    """Strides of all kinds, huge and tiny activations."""
    # Every entry twice, and then every other one: the same numbers with gaps between them.
    spread = lambda f: f.repeat_interleave(2, -1)[..., ::2]  # noqa: E731
    factors = [spread(factor) for factor in low_rank_factors(name, 12, 9, 4)]
    x, grad = torch.randn(9, 7).mT, torch.randn(12, 14).mT[::2]
    assert not any(t.is_contiguous() for t in (x, grad, *factors) if t.dim() == 2)
    for scale in (1.0, 1e15, 1e-15):
        check_low_rank(name, which, x * scale, grad, factors, start="nothing", factor=2)
        check_low_rank(name, which, x, grad * scale, factors, start="weight", factor=2)


@pytest.mark.parametrize("which", LOW_RANK_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOW_RANK[1:])
def test_low_rank_identity_changes_nothing_to_the_last_bit(name, dtype, which):
    forward, _ = low_rank_pair(name, which)
    left, singular_values, right, first, second = low_rank_factors(name, 12, 9, 4)
    first, second = torch.zeros_like(first), torch.zeros_like(second)
    if name == "spectral_r_linear":
        first, second = torch.eye(4), torch.eye(4)
    x, base = torch.randn(7, 9).to(dtype), torch.randn(7, 12).to(dtype)
    y, _ = forward(x, base, None, None, left, singular_values, right, first, second, 3.0)
    assert torch.equal(y, base)


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_refuses_what_does_not_fit(name):
    x, (*frozen, last) = torch.randn(7, 6), low_rank_factors(name, 5, 6, 3)
    for forward in low_rank_pair(name, "op")[0], low_rank_pair(name, "reference")[0]:
        with pytest.raises((RuntimeError, ValueError)):
            forward(x, None, None, None, *frozen, last[:, :-1], 1.0)
        with pytest.raises((RuntimeError, ValueError), match="base and weight exclude each other"):
            forward(x, torch.randn(7, 5), torch.randn(5, 6), None, *frozen, last, 1.0)


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
