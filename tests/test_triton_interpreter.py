"""The Triton kernels' arithmetic, run on the CPU by Triton's interpreter.

``TRITON_INTERPRET`` is read when a kernel is imported, so these tests need a process of their own:
``TRITON_INTERPRET=1 pytest -m interpreter tests/test_triton_interpreter.py``. The one test without
the mark starts that process, so that the ordinary run covers them too.
"""

import os
import subprocess
import sys
from math import prod

import pytest
import stiefel_oracle
import torch
from support import TOLERANCE, assert_near, random_rotation, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 must be set before the import"),
]

if INTERPRETED:
    pytest.importorskip("triton")
    from spectral_kernels.triton_kernels import _launch, kron_gram, kron_rotate, low_rank, stiefel

FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# (rows, factor sizes): every kernel, every row of the launch tables, sizes of 1, primes, powers of
# two, the published presets, merged factors, rows that no program count divides, and no rows.
SHAPES = [
    (3, (1,)),
    (2, (1, 1)),
    (131, (13,)),
    (5, (32,)),
    (33, (61,)),
    (3, (7, 11)),
    (5, (8, 8, 10)),
    (2, (6, 8, 16)),
    (3, (4, 16, 20)),
    (3, (32, 40)),
    (2, (31, 37)),
    (3, (27, 27, 2)),
    (3, (2, 3, 2, 5, 3)),
    (0, (4, 8)),
    (0, (32, 40)),
]
LARGE_SHAPES = [(2, (64, 64)), (1, (96, 100)), (2, (17, 19, 18)), (1, (4, 32, 29))]
CHAINED_SHAPES = [(2, (8, 256)), (3, (131,)), (2, (3, 2, 137, 5))]


def test_in_a_process_of_its_own(pytestconfig):
    """Runs this file's interpreted tests; ``-P`` keeps the checkout from shadowing the package."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("this process is the interpreted one")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "interpreter", __file__]
    done = subprocess.run(
        command,
        cwd=pytestconfig.rootpath,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout, done.stdout


@pytest.fixture
def poison(monkeypatch):
    """Buffers the host functions allocate start as NaN; the references are out of reach."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))

    def unreachable(*args):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(kron_rotate, "kron_rotate_reference", unreachable)
    monkeypatch.setattr(kron_gram, "kron_gram_reference", unreachable)
    monkeypatch.setattr(stiefel, "stiefel_sgd_reference", unreachable)
    monkeypatch.setattr(stiefel, "stiefel_adam_reference", unreachable)
    for op in _launch.LOW_RANK_OPS:
        monkeypatch.setattr(low_rank, f"{op}_reference", unreachable)


def rotated(x, factors, transpose, before, after):
    """float64 oracle: one einsum per axis."""
    dims = [factor.shape[0] for factor in factors]
    y = x.double() if before is None else x.double() * before.double()
    y = y.reshape(-1, *dims)
    for axis, factor in enumerate(factors, start=1):
        matrix = factor.double().mT if transpose else factor.double()
        y = torch.einsum("...p,pq->...q", y.movedim(axis, -1), matrix).movedim(-1, axis)
    y = y.reshape(x.shape)
    return y if after is None else y * after.double()


def grams(a, b, dims, scale):
    """float64 oracle: one einsum per axis, then the column sums."""
    a, b = a.double(), b.double()
    scaled = (b if scale is None else b * scale.double()).reshape(-1, *dims)
    unfolded = a.reshape(-1, *dims)
    pairs = [(unfolded.movedim(i, -1), scaled.movedim(i, -1)) for i in range(1, len(dims) + 1)]
    sums = [torch.einsum("...p,...q->pq", left, right) for left, right in pairs]
    return [*sums, (a * b).sum(0)]


def rotations(dims):
    return [random_rotation(n, dtype=torch.float32) for n in dims]


def check_rotate(rows, dims, dtype, transpose, scaled):
    k = prod(dims)
    x = torch.randn(rows, k).to(dtype)
    before, after = (torch.randn(k), torch.randn(k)) if scaled else (None, None)
    factors = rotations(dims)
    y = kron_rotate.kron_rotate(x, factors, transpose, before, after)
    assert y.dtype == dtype and y.is_contiguous()
    assert_near(y, rotated(x, factors, transpose, before, after))


def check_gram(rows, dims, dtype, scaled):
    k = prod(dims)
    a, b = torch.randn(rows, k).to(dtype), torch.randn(rows, k).to(dtype)
    scale = torch.randn(k) if scaled else None
    actual = kron_gram.kron_gram(a, b, list(dims), scale)
    expected = grams(a, b, dims, scale)
    assert len(actual) == len(dims) + 1
    for value, oracle in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32 and value.is_contiguous()
        assert_near(value, oracle)


class TestKronRotate:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(("rows", "dims"), SHAPES)
    def test_value(self, poison, rows, dims, dtype):
        scaled = dtype != torch.float16
        check_rotate(rows, dims, dtype, transpose=dtype == torch.float32, scaled=scaled)

    @pytest.mark.parametrize(("rows", "dims"), LARGE_SHAPES)
    def test_large_rows(self, poison, rows, dims):
        assert len(_launch.plan_rotate(dims).passes) == 1
        check_rotate(rows, dims, torch.float32, transpose=False, scaled=True)

    @pytest.mark.parametrize(("rows", "dims"), CHAINED_SHAPES)
    def test_one_pass_per_axis(self, poison, rows, dims):
        for dtype, transpose in ((torch.float32, True), (torch.bfloat16, False)):
            check_rotate(rows, dims, dtype, transpose, scaled=True)

    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("scales", [(False, True), (True, False), (False, False)])
    def test_options(self, poison, transpose, scales):
        dims, x = (6, 20), torch.randn(3, 120)
        before, after = (torch.randn(120) if scale else None for scale in scales)
        factors = rotations(dims)
        y = kron_rotate.kron_rotate(x, factors, transpose, before, after)
        assert_near(y, rotated(x, factors, transpose, before, after))

    def test_strided_inputs(self, poison):
        x = torch.randn(240, 5).mT[:, ::2]
        factors = [factor.contiguous().mT for factor in rotations((8, 15))]
        scale = torch.randn(240)[::2]
        assert not x.is_contiguous() and not factors[1].is_contiguous()
        y = kron_rotate.kron_rotate(x, factors, False, scale, None)
        assert_near(y, rotated(x, factors, False, scale, None))

    @pytest.mark.parametrize("dims", [(24, 20), (17, 19, 18), (8, 256)])
    def test_identity_is_exact(self, poison, dims):
        x = torch.randn(2, prod(dims))
        y = kron_rotate.kron_rotate(x, [torch.eye(n) for n in dims], False, None, None)
        assert torch.equal(y, x)

    @pytest.mark.parametrize("magnitude", [1e-30, 1e30])
    def test_huge_and_tiny(self, poison, magnitude):
        x = torch.randn(3, 120) * magnitude
        factors = rotations((6, 20))
        y = kron_rotate.kron_rotate(x, factors, False, None, None)
        assert_near(y, rotated(x, factors, False, None, None))

    def test_float64_goes_to_the_reference(self, monkeypatch):
        monkeypatch.setattr(kron_rotate, "kron_rotate_reference", lambda *args: "reference")
        x = torch.randn(2, 6, dtype=torch.float64)
        factors = [torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)]
        assert kron_rotate.kron_rotate(x, factors, False, None, None) == "reference"

    def test_refuses_what_it_would_read_out_of_bounds(self):
        x, eye = torch.randn(2, 6), torch.eye
        with pytest.raises(ValueError, match=r"x must have shape \(2, 8\)"):
            kron_rotate.kron_rotate(x, [eye(2), eye(4)], False, None, None)
        with pytest.raises(ValueError, match=r"factors\[1\] must have shape \(3, 3\)"):
            kron_rotate.kron_rotate(x, [eye(2), torch.ones(3, 2)], False, None, None)
        with pytest.raises(ValueError, match=r"scale_after must have shape \(6,\)"):
            kron_rotate.kron_rotate(x, [eye(2), eye(3)], False, None, torch.ones(5))


class TestKronGram:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(("rows", "dims"), SHAPES)
    def test_value(self, poison, rows, dims, dtype):
        check_gram(rows, dims, dtype, scaled=dtype != torch.float16)

    @pytest.mark.parametrize(("rows", "dims"), LARGE_SHAPES)
    def test_large_rows(self, poison, rows, dims):
        assert _launch.plan_gram(dims).blocks > 1
        check_gram(rows, dims, torch.float32, scaled=True)

    @pytest.mark.parametrize("rows", [1, 8, 9, 25])
    def test_rows_over_several_programs(self, poison, rows):
        check_gram(rows, (32, 40), torch.bfloat16, scaled=True)

    def test_many_programs(self, poison, monkeypatch):
        monkeypatch.setattr(kron_gram, "MIN_GRAM_TOKENS", 1)
        monkeypatch.setattr(kron_gram, "MAX_GRAM_PROGRAMS", 5)
        check_gram(333, (4, 5), torch.float32, scaled=False)

    def test_strided_and_mixed_inputs(self, poison):
        a = torch.randn(240, 5).mT[:, ::2]
        b = torch.randn(5, 120).to(torch.bfloat16)
        actual = kron_gram.kron_gram(a, b, [8, 15], None)
        for value, oracle in zip(actual, grams(a, b, (8, 15), None), strict=True):
            assert_near(value, oracle)

    def test_the_same_bits_every_time(self):
        a, b = torch.randn(50, 120), torch.randn(50, 120)
        first = kron_gram.kron_gram(a, b, [8, 15], None)
        again = kron_gram.kron_gram(a, b, [8, 15], None)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))

    def test_outputs_share_no_memory(self):
        outputs = kron_gram.kron_gram(torch.randn(3, 30), torch.randn(3, 30), [2, 3, 5], None)
        assert len({value.untyped_storage().data_ptr() for value in outputs}) == 4

    @pytest.mark.parametrize(
        ("dims", "dtype"), [((2, 3), torch.float64), ((3, 200), torch.float32)]
    )
    def test_unsupported_goes_to_the_reference(self, monkeypatch, dims, dtype):
        monkeypatch.setattr(kron_gram, "kron_gram_reference", lambda *args: "reference")
        a = torch.randn(2, prod(dims), dtype=dtype)
        assert kron_gram.kron_gram(a, a, list(dims), None) == "reference"

    def test_refuses_what_it_would_read_out_of_bounds(self):
        a = torch.randn(2, 6)
        with pytest.raises(ValueError, match=r"a must have shape \(2, 8\)"):
            kron_gram.kron_gram(a, a, [2, 4], None)
        with pytest.raises(ValueError, match=r"b must have shape \(2, 6\)"):
            kron_gram.kron_gram(a, torch.randn(3, 6), [2, 3], None)
        with pytest.raises(ValueError, match=r"scale_b must have shape \(6,\)"):
            kron_gram.kron_gram(a, a, [2, 3], torch.ones(3))


# Every row of the launch table, one tile and several, a whole and a partial last one; in one list.
SQUARES = [
    (4, 4),
    (3, 5, 5),
    (1, 1),
    (0, 7, 7),
    (2, 1, 1),
    (16, 16),
    (32, 32),
    (2, 31, 31),
    (40, 40),
]
LARGE_SQUARES = [(61, 61), (67, 67), (128, 128)]


class TestStiefel:
    pytestmark = interpreter

    @pytest.mark.parametrize("shapes", [SQUARES, LARGE_SQUARES], ids=["small", "large"])
    @pytest.mark.parametrize("lr", [1e-3, 0.3])
    def test_adam(self, poison, shapes, lr):
        lists = stiefel_oracle.problem(shapes, torch.float32)
        expected = stiefel_oracle.expected_adam(lists, lr, 0.9, 0.99, 1e-8, -1.0)
        stiefel.stiefel_adam_(*lists, lr, 0.9, 0.99, 1e-8, -1.0)
        stiefel_oracle.assert_all_near(lists, expected, factor=4 if lr < 0.1 else 20)

    @pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9), (0.99, 0.5)])
    def test_adam_without_a_useful_bound(self, poison, betas):
        lists = stiefel_oracle.problem(SQUARES, torch.float32)
        expected = stiefel_oracle.expected_adam(lists, 1e-2, *betas, 1e-8, 0.25)
        stiefel.stiefel_adam_(*lists, 1e-2, *betas, 1e-8, 0.25)
        stiefel_oracle.assert_all_near(lists, expected, factor=20)

    @pytest.mark.parametrize("shapes", [SQUARES, LARGE_SQUARES], ids=["small", "large"])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_sgd(self, poison, shapes, momentum):
        lists = stiefel_oracle.problem(shapes, torch.float32)[:3]
        expected = stiefel_oracle.expected_sgd(lists, 0.3, momentum, -1.0)
        if momentum == 0:
            lists[2], expected[2] = [], []
        stiefel.stiefel_sgd_(*lists, 0.3, momentum, -1.0)
        stiefel_oracle.assert_all_near(lists, expected, factor=20)

    @pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
    def test_huge_and_tiny_gradients(self, poison, scale):
        lists = stiefel_oracle.problem([(5, 5), (2, 40, 40)], torch.float32, scale)
        expected = stiefel_oracle.expected_adam(lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        stiefel.stiefel_adam_(*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        for factor, velocity, exact in zip(lists[0], lists[2], expected[2], strict=True):
            assert stiefel_oracle.orthogonality_error(factor) <= 2e-6
            assert_near(velocity, exact, factor=4)

    def test_stays_on_the_manifold(self, poison):
        lists = stiefel_oracle.problem([(20, 20), (33, 33)], torch.float32)
        for _ in range(4):
            stiefel.stiefel_adam_(*lists, 1e-1, 0.9, 0.99, 1e-8, -1.0)
        assert max(map(stiefel_oracle.orthogonality_error, lists[0])) <= 2e-6
        assert [float(step) for step in lists[4]] == [4, 5]

    def test_a_nan_stays_in_its_matrix(self, poison):
        lists = stiefel_oracle.problem([(2, 20, 20), (6, 6)], torch.float32)
        lists[1][0][0, 3, 4] = float("nan")
        stiefel.stiefel_adam_(*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        assert lists[0][0][0].isnan().any()
        assert stiefel_oracle.orthogonality_error(lists[0][0][1]) <= 2e-6
        assert stiefel_oracle.orthogonality_error(lists[0][1]) <= 2e-6

    def test_more_tensors_than_one_program_counts(self, poison):
        lists = stiefel_oracle.problem([(2, 2)] * 131 + [(0, 3, 3)], torch.float32)
        before = [float(step) for step in lists[4]]
        stiefel.stiefel_adam_(*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        assert [float(step) - 1 for step in lists[4]] == before

    def test_strided_tensors(self, poison):
        lists = stiefel_oracle.problem([(5, 5), (3, 4, 4)], torch.float32)
        strided = [[t.mT.contiguous().mT if t.dim() else t.clone() for t in ts] for ts in lists]
        stiefel.stiefel_adam_(*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        stiefel.stiefel_adam_(*strided, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        for tensors, others in zip(lists, strided, strict=True):
            assert all(map(torch.equal, tensors, others))

    @pytest.mark.parametrize("name", ["sgd", "adam"])
    def test_what_is_unsupported_goes_to_the_reference(self, monkeypatch, name):
        """And what stands beside it in the list does not."""
        seen = []
        reference = getattr(stiefel, f"stiefel_{name}_reference")

        def record(factors, *arguments):
            seen.extend(factors)
            reference(factors, *arguments)

        monkeypatch.setattr(stiefel, f"stiefel_{name}_reference", record)
        double = stiefel_oracle.problem([(4, 4)], torch.float64)
        single = stiefel_oracle.problem([(129, 129), (6, 6)], torch.float32)
        lists = [[*a, *b] for a, b in zip(double, single, strict=True)]
        if name == "adam":
            expected = stiefel_oracle.expected_adam(lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
            stiefel.stiefel_adam_(*lists, 1e-2, 0.9, 0.99, 1e-8, -1.0)
        else:
            lists = lists[:3]
            expected = stiefel_oracle.expected_sgd(lists, 1e-2, 0.9, -1.0)
            stiefel.stiefel_sgd_(*lists, 1e-2, 0.9, -1.0)
        assert [factor.shape[0] for factor in seen] == [4, 129]
        stiefel_oracle.assert_all_near(lists, expected, factor=20)

    def test_refuses_what_it_would_read_out_of_bounds(self):
        eye, zeros = torch.eye(3), torch.zeros(3, 3)
        with pytest.raises(ValueError, match=r"grads\[0\] must be dense with shape \(3, 3\)"):
            stiefel.stiefel_sgd_([eye], [torch.zeros(2, 3)], [zeros], 0.1, 0.9, -1.0)
        with pytest.raises(ValueError, match=r"velocities must have one entry per factor, 1"):
            stiefel.stiefel_sgd_([eye], [zeros], [], 0.1, 0.9, -1.0)


# (rows, outputs, inputs, r): one, primes, several tiles both ways, more columns than one step.
LOW_RANK_SHAPES = [(1, 1, 1, 1), (3, 5, 7, 2), (37, 130, 19, 8), (33, 20, 150, 17), (2, 9, 40, 64)]


def low_rank_case(stem, rows, outputs, inputs, r, dtype):
    """Factors as the op takes them, and the change of the weight in float64."""
    if stem == "low_rank_linear":
        down, up = torch.randn(r, inputs), torch.randn(outputs, r)
        return (down, up), lambda down, up: up @ down
    basis = (torch.randn(outputs, r), torch.rand(r), torch.randn(r, inputs))
    if stem == "spectral_a_linear":
        shifts = torch.randn(outputs, r), torch.randn(inputs, r)

        def shifted(left, scale, right, first, second):
            return ((left + first) * scale) @ (right + second.mT) - (left * scale) @ right

        return (*basis, *shifts), shifted

    def turned(left, scale, right, first, second):
        return left @ (first * scale @ second.mT - torch.diag(scale)) @ right

    return (*basis, *rotations((r, r))), turned


def check_low_rank(stem, rows, outputs, inputs, r, dtype, start):
    """Forward and backward against the definition, differentiated in float64."""
    factors, delta = low_rank_case(stem, rows, outputs, inputs, r, dtype)
    x, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype) if start == "weight" else None
    base = torch.randn(rows, outputs).to(dtype) if start == "base" else None
    kept = None if base is None else base.clone()
    y, thin = getattr(low_rank, f"{stem}_fwd")(x, base, weight, None, *factors, -0.5)
    saved = () if stem == "spectral_r_linear" else (x,)
    results = getattr(low_rank, f"{stem}_bwd")(
        grad, *saved, weight, thin, *factors, -0.5, True, True
    )
    exact_x = x.double().requires_grad_()
    exact = [factor.double() for factor in factors]
    leaves = [exact_x, *(factor.requires_grad_() for factor in exact[-2:])]
    expected = -0.5 * exact_x @ delta(*exact).mT
    if weight is not None:
        expected = expected + exact_x @ weight.double().mT
    if base is not None:
        assert torch.equal(base, kept)
        expected = expected + base.double()
    assert y.dtype == dtype
    assert_near(y, expected, factor=2)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    for actual, gradient in zip(results, gradients, strict=True):
        limit = 2 * max(TOLERANCE[dtype], TOLERANCE[actual.dtype])
        assert relative_error(actual, gradient) <= limit


class TestLowRank:
    pytestmark = interpreter

    @pytest.mark.parametrize("shape", LOW_RANK_SHAPES)
    @pytest.mark.parametrize("start", ["weight", "base", "nothing"])
    @pytest.mark.parametrize("stem", ["low_rank_linear", "spectral_a_linear", "spectral_r_linear"])
    def test_values_and_gradients(self, poison, stem, start, shape):
        check_low_rank(stem, *shape, torch.float32, start)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("stem", ["low_rank_linear", "spectral_a_linear", "spectral_r_linear"])
    def test_half_precision(self, poison, stem, dtype):
        check_low_rank(stem, 37, 130, 19, 8, dtype, "weight")

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("stem", ["spectral_a_linear", "spectral_r_linear"])
    def test_the_identity_changes_nothing_to_the_last_bit(self, poison, stem, dtype):
        (*basis, _, _), _ = low_rank_case(stem, 5, 12, 9, 4, dtype)
        same = (torch.zeros(12, 4), torch.zeros(9, 4))
        if stem == "spectral_r_linear":
            same = (torch.eye(4), torch.eye(4))
        x, base = torch.randn(5, 9).to(dtype), torch.randn(5, 12).to(dtype)
        y, _ = getattr(low_rank, f"{stem}_fwd")(x, base, None, None, *basis, *same, 3.0)
        assert torch.equal(y, base)

    @pytest.mark.parametrize("stem", ["low_rank_linear", "spectral_a_linear", "spectral_r_linear"])
    def test_strides_and_leading_dimensions(self, poison, stem):
        factors, delta = low_rank_case(stem, 6, 10, 12, 5, torch.float32)
        strided = [factor.repeat_interleave(2, -1)[..., ::2] for factor in factors]
        x, base = torch.randn(12, 3, 2).permute(2, 1, 0), torch.randn(10, 2, 3).permute(1, 2, 0)
        y, _ = getattr(low_rank, f"{stem}_fwd")(x, base, None, None, *strided, 1.0)
        exact = [factor.double() for factor in factors]
        assert_near(y, base.double() + x.double() @ delta(*exact).mT)

    def test_wrong_shapes_are_refused(self):
        factors, _ = low_rank_case("spectral_r_linear", 3, 6, 5, 4, torch.float32)
        x = torch.randn(3, 5)
        with pytest.raises(ValueError, match=r"rotation_right must have shape \(4, 4\)"):
            low_rank.spectral_r_linear_fwd(x, None, None, None, *factors[:-1], torch.eye(3), 1.0)
        with pytest.raises(ValueError, match=r"base must have shape \(3, 6\)"):
            low_rank.spectral_r_linear_fwd(x, torch.randn(3, 7), None, None, *factors, 1.0)

    def test_what_the_kernels_do_not_take_runs_on_the_reference(self):
        down, up = torch.randn(70, 5), torch.randn(6, 70)
        x = torch.randn(3, 5)
        y, _ = low_rank.low_rank_linear_fwd(x, None, None, None, down, up, 1.0)
        assert_near(y, x.double() @ (up.double() @ down.double()).mT)
        y, _ = low_rank.low_rank_linear_fwd(x[:0], None, None, None, down[:8], up[:, :8], 1.0)
        assert y.shape == (0, 6)
