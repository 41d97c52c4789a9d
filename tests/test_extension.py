"""The compiled ops: the CPU kernels at every SIMD level, the CUDA Cayley algorithm on the host."""

import ctypes
import os
import shutil
import subprocess
import sys
from itertools import pairwise, product
from math import prod
from pathlib import Path

import pytest
import stiefel_oracle
import torch
from support import TOLERANCE, assert_near, dense_kron, random_rotation, relative_error

from spectral_kernels import backend_report
from spectral_kernels.ops import OPS
from spectral_kernels.ops.cayley import cayley_bwd_reference, cayley_fwd_reference
from spectral_kernels.ops.kron import kron_gram_reference, kron_rotate_reference
from spectral_kernels.ops.low_rank import mix_shifted, rotated_middle, rotation_grads

REASON = "the extension is not built: SPECTRAL_BUILD_EXT=cpu pip install --no-build-isolation ."
extension = pytest.importorskip("spectral_kernels._C", reason=REASON)
op = torch.ops.spectral

LEVELS = ("avx512", "avx2", "baseline")
# Both sides of every padding, lane and block boundary, and the largest sizes the adapters use.
SIZES = [*range(1, 36), 40, 47, 63, 64, 65, 100, 128, 131, 200, 255, 256]
# R is computed in float64 and |R| <= 1, so float32 is off by one rounding.
FORWARD_TOLERANCE = {torch.float32: 6.1e-8, torch.float64: 1e-13}


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in extension._simd_levels():
        pytest.skip(f"this processor has no {request.param}")
    before = extension.build_info()["simd"]
    extension._set_simd_level(request.param)
    yield request.param
    extension._set_simd_level(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def packed_entries(batch, n, dtype=torch.float32, scale=1.0):
    return torch.randn(batch, n * (n - 1) // 2, dtype=dtype) * scale


def pack(skew):
    """Skew [B, n, n] to the packed P with (P - P^T)/2 = skew."""
    n = skew.shape[-1]
    return 2 * skew[(slice(None), *torch.triu_indices(n, n, 1))]


def orthogonality_error(rotation):
    rotation = rotation.double()
    return float((rotation.mT @ rotation - torch.eye(rotation.shape[-1])).abs().amax())


def structured_skews(n):
    """Skew matrices that elimination without pivoting might trip over, each of spectral norm 1."""
    gauss = torch.randn(n, n, dtype=torch.float64)
    first, second = torch.randn(2, n, 1, dtype=torch.float64)
    basis = torch.linalg.qr(gauss).Q
    pairs = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n // 2):
        pairs[2 * k, 2 * k + 1] = 10.0 ** (-8 * k / max(n // 2, 1))
    corner = torch.zeros(n, n, dtype=torch.float64)
    corner[0, -1] = 1
    skews = {
        "gauss": gauss,
        "one entry": corner,
        "rank 2": first @ second.mT,
        "all equal": torch.ones(n, n, dtype=torch.float64).triu(1),
        "sparse": gauss * (torch.rand(n, n) < 2 / n),
        "graded spectrum": basis @ pairs @ basis.mT,
        "neighbours": torch.diag(torch.ones(n - 1, dtype=torch.float64), 1),
    }
    for name, upper in skews.items():
        skew = upper - upper.mT
        norm = torch.linalg.matrix_norm(skew, 2)
        yield name, skew / norm if norm > 0 else skew


def test_the_dispatcher_runs_the_extension():
    rows = [row for row in backend_report().rows if row.device == "cpu"]
    assert {row.op for row in rows if row.implementation == "c++"} == set(OPS)


def test_build_info_says_what_was_built():
    info = extension.build_info()
    assert set(info) == {
        *("compiler", "cxx_standard", "torch", "simd", "multithreaded", "cuda"),
        "cuda_architectures",
    }
    assert info["multithreaded"] == (sys.platform == "linux" and info["compiler"][:3] == "gcc")
    assert info["simd"] == extension._simd_levels()[0]
    assert extension._simd_levels()[-1] == "baseline"
    assert torch.__version__.split("+")[0] == info["torch"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)


def test_an_unknown_simd_level_is_refused():
    with pytest.raises(ValueError, match="mmx"):
        extension._set_simd_level("mmx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_values(level, dtype):
    for n in SIZES:
        packed = packed_entries(17 if n <= 32 else 2, n, dtype, scale=n**-0.5)
        (rotation,) = op.cayley_fwd([packed], [n])
        (expected,) = cayley_fwd_reference([packed.double()], [n])
        assert rotation.dtype == dtype and rotation.shape == expected.shape
        error = float((rotation.double() - expected).abs().amax())
        assert error <= FORWARD_TOLERANCE[dtype], (n, error)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 33])
def test_every_filling_of_the_lanes(level, batch):
    for n in (2, 4, 7, 8, 13, 24):
        packed = packed_entries(batch, n)
        (rotation,) = op.cayley_fwd([packed], [n])
        (expected,) = cayley_fwd_reference([packed.double()], [n])
        assert float((rotation.double() - expected).abs().amax()) <= 6.1e-8
        grad = torch.randn_like(rotation)
        (actual,) = op.cayley_bwd([grad], [rotation])
        assert_near(actual, cayley_bwd_reference([grad.double()], [rotation.double()])[0])


# Above a norm of 1000 in float32 and 32 in float64 rows are exchanged (csrc/cayley_pivoting.h).
NORMS = {
    torch.float32: {1e-3: 2e-7, 1.0: 2e-7, 100.0: 2e-7, 1e3: 2e-7, 1e5: 2e-7, 1e8: 2e-7},
    torch.float64: {1.0: 2e-14, 10.0: 1e-13, 31.0: 4e-13, 33.0: 4e-13, 1e3: 1e-12, 1e6: 1e-9},
}


@pytest.mark.parametrize(
    ("dtype", "norm", "limit"),
    [(dtype, *pair) for dtype, limits in NORMS.items() for pair in limits.items()],
)
def test_rotations_are_orthogonal_to_rounding(level, dtype, norm, limit):
    for n in (2, 3, 8, 16, 17, 33, 64, 100, 256):
        for name, skew in structured_skews(n):
            packed = pack(norm * skew[None]).to(dtype)
            (rotation,) = op.cayley_fwd([packed], [n])
            error = orthogonality_error(rotation)
            assert error <= limit, (n, name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_ordinary_matrices_in_one_batch(level, dtype):
    for n in (2, 5, 16, 24, 40):
        packed = packed_entries(16, n, dtype)
        packed[5] *= 1e4
        (rotation,) = op.cayley_fwd([packed], [n])
        (expected,) = cayley_fwd_reference([packed.double()], [n])
        assert float((rotation.double() - expected).abs().amax()) <= max(
            FORWARD_TOLERANCE[dtype], 1e-10
        )


def test_zero_is_the_identity_to_the_last_bit(level):
    for n in SIZES:
        (rotation,) = op.cayley_fwd([torch.zeros(3, n * (n - 1) // 2)], [n])
        assert torch.equal(rotation, torch.eye(n).expand(3, n, n))


def test_tiny_values_survive():
    packed = torch.full((1, 6), 1e-30)
    (rotation,) = op.cayley_fwd([packed], [4])
    assert torch.equal(rotation[0].triu(1)[0, 1:], packed[0, :3])


def test_one_bad_matrix_spoils_no_other(level):
    for n in (5, 16, 40):
        packed = packed_entries(16, n)
        (clean,) = op.cayley_fwd([packed], [n])
        packed[3] = torch.nan
        (rotation,) = op.cayley_fwd([packed], [n])
        assert rotation[3].isnan().all()
        kept = torch.arange(16) != 3
        assert torch.equal(rotation[kept], clean[kept])


def test_lists_of_mixed_sizes_and_dtypes(level):
    shapes = [(4, 3), (64, 2), (5, 0), (1, 4), (16, 21), (4, 1), (300, 1), (2, 5), (33, 2)]
    for dtypes in ([torch.float32] * 9, [torch.float32, torch.float64] * 4 + [torch.float32]):
        packed = [
            packed_entries(b, n, dtype, scale=n**-0.5)
            for (n, b), dtype in zip(shapes, dtypes, strict=True)
        ]
        sizes = [n for n, _ in shapes]
        rotations = op.cayley_fwd(packed, sizes)
        for rotation, expected in zip(
            rotations, cayley_fwd_reference([p.double() for p in packed], sizes), strict=True
        ):
            assert_near(rotation, expected)
        grads = [torch.randn_like(rotation) for rotation in rotations]
        for actual, expected in zip(
            op.cayley_bwd(grads, rotations),
            cayley_bwd_reference([g.double() for g in grads], [r.double() for r in rotations]),
            strict=True,
        ):
            assert_near(actual, expected)
    assert op.cayley_fwd([], []) == []
    assert op.cayley_bwd([], []) == []


def test_strided_inputs():
    packed = packed_entries(10, 9).mT.contiguous().mT[::2]
    (rotation,) = op.cayley_fwd([packed], [9])
    assert torch.equal(rotation, op.cayley_fwd([packed.contiguous()], [9])[0])
    grad = torch.randn(9, 9, 5).permute(2, 1, 0)
    (actual,) = op.cayley_bwd([grad], [rotation.mT])
    (expected,) = op.cayley_bwd([grad.contiguous()], [rotation.mT.contiguous()])
    assert torch.equal(actual, expected)


def test_thread_counts_give_the_same_bits(threads):
    shapes = [(4, 100), (16, 70), (24, 50), (40, 30), (64, 20), (128, 3)]
    packed = [packed_entries(b, n) for n, b in shapes]
    sizes = [n for n, _ in shapes]
    threads(1)
    rotations = op.cayley_fwd(packed, sizes)
    grads = [torch.randn_like(rotation) for rotation in rotations]
    packed_grads = op.cayley_bwd(grads, rotations)
    for count in (2, 5):
        threads(count)
        assert all(map(torch.equal, op.cayley_fwd(packed, sizes), rotations))
        assert all(map(torch.equal, op.cayley_bwd(grads, rotations), packed_grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_equals_autograd_through_a_solve(level, dtype):
    for n in [n for n in SIZES if n <= 131]:
        packed = packed_entries(17 if n <= 32 else 2, n, torch.float64, scale=n**-0.5)
        packed.requires_grad_()
        rows, columns = torch.triu_indices(n, n, 1)
        batch = torch.arange(len(packed))[:, None]
        upper = torch.zeros(len(packed), n, n, dtype=torch.float64)
        upper = upper.index_put((batch, rows[None], columns[None]), packed / 2)
        skew, identity = upper - upper.mT, torch.eye(n, dtype=torch.float64)
        rotation = torch.linalg.solve(identity - skew, identity + skew)
        weight = torch.randn_like(rotation)
        (expected,) = torch.autograd.grad((rotation * weight).sum(), packed)
        (grad,) = op.cayley_bwd([weight.to(dtype)], [rotation.detach().to(dtype)])
        assert_near(grad, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.zeros(1, 6)], [3]), ValueError, r"packed\[0\] must have shape.*\[1, 6\]"),
        (([torch.zeros(5)], [4]), ValueError, r"packed\[0\] must have shape"),
        (([torch.zeros(1, 1, 6)], [4]), ValueError, r"packed\[0\] must have shape"),
        (([torch.zeros(1, 6)], [4, 4]), ValueError, "sizes must have one entry per batch"),
        (([torch.zeros(1, 0)], [0]), ValueError, r"sizes\[0\] must be at least 1; got 0"),
        (([torch.zeros(1, 6).half()], [4]), TypeError, r"packed\[0\] must be float32 or float64"),
        (([torch.zeros(1, 6).long()], [4]), TypeError, r"packed\[0\] must be float32 or float64"),
    ],
)
def test_forward_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        op.cayley_fwd(*arguments)


@pytest.mark.parametrize(
    ("grad", "rotation", "error", "message"),
    [
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 5), ValueError, r"rotation\[0\] must have shape"),
        (torch.zeros(4), torch.zeros(4), ValueError, r"rotation\[0\] must have shape"),
        (torch.zeros(2, 4, 4), torch.zeros(1, 4, 4), ValueError, r"grad_rotation\[0\] must have"),
        (torch.zeros(1, 4, 4).double(), torch.zeros(1, 4, 4), TypeError, "must have the dtype"),
        (torch.zeros(1, 4, 4).half(), torch.zeros(1, 4, 4).half(), TypeError, "must be float32"),
    ],
)
def test_backward_refuses(grad, rotation, error, message):
    with pytest.raises(error, match=message):
        op.cayley_bwd([grad], [rotation])


def test_one_rotation_needs_no_batch():
    packed = packed_entries(1, 12)
    (batch,), (single,) = op.cayley_fwd([packed], [12]), op.cayley_fwd([packed[0]], [12])
    assert torch.equal(single, batch[0])
    grad = torch.randn_like(batch)
    (batch_grad,) = op.cayley_bwd([grad], [batch])
    (single_grad,) = op.cayley_bwd([grad[0]], [single])
    assert torch.equal(single_grad, batch_grad[0])


# Axes narrower than a vector, one vector wide, wider; with little, nothing and much behind them.
KRON_DIMS = [
    *((1,), (5,), (17,), (128,), (1, 8), (8, 2), (7, 1, 3), (3, 4), (16, 20), (20, 32), (33, 40)),
    *((70, 2), (64, 3), (3, 128), (2, 3, 5), (4, 5, 16), (5, 3, 17), (2, 2, 2, 2)),
]
# Rows per thread below, at and above those of a block; none at all.
KRON_ROWS = [0, 1, 7, 130]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dims", KRON_DIMS)
def test_kron_rotate_at_every_level(level, dims, dtype):
    width, wide = prod(dims), torch.promote_types(dtype, torch.float32)
    factors = [torch.randn(n, n, dtype=wide) / n**0.5 for n in dims]
    scale = torch.randn(width, dtype=wide)
    for rows, transpose, before, after in product(KRON_ROWS, *[(False, True)] * 3):
        x = torch.randn(rows, width, dtype=wide).to(dtype)
        scales = [scale if before else None, scale if after else None]
        actual = op.kron_rotate(x, factors, transpose, *scales)
        assert actual.dtype == dtype and actual.shape == x.shape
        expected = kron_rotate_reference(
            x.double(),
            [f.double() for f in factors],
            transpose,
            *(s if s is None else s.double() for s in scales),
        )
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dims", KRON_DIMS)
def test_kron_gram_at_every_level(level, dims, dtype):
    width, wide = prod(dims), torch.promote_types(dtype, torch.float32)
    for rows, scaled in product(KRON_ROWS, (False, True)):
        a, b = (torch.randn(rows, width, dtype=wide).to(dtype) for _ in range(2))
        scale = torch.randn(width, dtype=wide) if scaled else None
        expected = kron_gram_reference(
            a.double(), b.double(), list(dims), None if scale is None else scale.double()
        )
        for actual, exact in zip(op.kron_gram(a, b, list(dims), scale), expected, strict=True):
            assert actual.dtype == wide
            assert_near(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dims", KRON_DIMS)
def test_rotated_linear_backward_at_every_level(level, dims, dtype):
    """The rotation and the sums of its result in one pass, for one column of M per token."""
    width, wide = prod(dims), torch.promote_types(dtype, torch.float32)
    factors = [torch.randn(n, n, dtype=wide) / n**0.5 for n in dims]
    exact_factors = [factor.double() for factor in factors]
    scale, matrix = torch.randn(width, dtype=wide), torch.ones(1, width, dtype=dtype)
    for rows, transpose, scaled in product(KRON_ROWS, *[(False, True)] * 2):
        x = torch.randn(rows, width, dtype=wide).to(dtype)
        grad = torch.randn(rows, 1, dtype=wide).to(dtype)
        given = scale if scaled else None
        dx, ds, *sums = op.rotated_linear_bwd(
            grad, x, given, matrix, None, None, transpose, True, factors
        )
        h = kron_rotate_reference(
            grad.double().expand(rows, width), exact_factors, transpose, None, None
        )
        exact_scale = None if given is None else given.double()
        # The sums are taken of what was stored.
        stored = h.to(dtype).double()
        *grams, column_sums = kron_gram_reference(stored, x.double(), list(dims), exact_scale)
        assert_near(dx, stored if exact_scale is None else stored * exact_scale)
        assert dx.dtype == dtype and ds.dtype == wide
        allowed = 2 * TOLERANCE[dtype]
        assert relative_error(ds, column_sums) <= allowed
        for actual, rotation, gram in zip(sums, exact_factors, grams, strict=True):
            exact = gram.mT @ rotation if transpose else rotation @ gram
            assert relative_error(actual, exact) <= allowed


def test_kron_padding_is_never_read(level):
    """Whatever a freed block of memory holds, NaN or denormal, must not reach a result."""
    for dims in KRON_DIMS:
        width = prod(dims)
        x, factors = torch.randn(33, width), [torch.randn(n, n) for n in dims]
        results = []
        for filling in (0.0, torch.nan):
            trash = [torch.full((size,), filling) for size in (1000, 10_000, 100_000) * 3]
            del trash
            results.append(
                [
                    op.kron_rotate(x, factors, False, None, None),
                    *op.kron_gram(x, x, list(dims), None),
                    *op.rotated_linear_bwd(
                        *(x[:, :1], x, None, x[:1], None, None, False, True, factors)
                    ),
                ]
            )
        assert all(map(torch.equal, *results))


def test_kron_thread_counts_agree(threads):
    x, factors = torch.randn(500, 1280), [torch.randn(32, 32), torch.randn(40, 40)]
    threads(1)
    rotated = op.kron_rotate(x, factors, False, None, None)
    grams = op.kron_gram(x, x, [32, 40], None)
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(op.kron_rotate(x, factors, False, None, None), rotated)
        for actual, expected in zip(op.kron_gram(x, x, [32, 40], None), grams, strict=True):
            assert_near(actual, expected.double())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: op.kron_rotate(torch.zeros(2, 6), [], False, None, None), ValueError, "factors"),
        (
            lambda: op.kron_rotate(torch.zeros(2, 6), [torch.eye(5)], False, None, None),
            ValueError,
            r"x must have shape \[M, 5\]; got \[2, 6\]",
        ),
        (
            lambda: op.kron_rotate(torch.zeros(2, 6), [torch.zeros(6, 1)], False, None, None),
            ValueError,
            "factors must be square",
        ),
        (
            lambda: op.kron_rotate(torch.zeros(2, 6), [torch.eye(6)], False, torch.zeros(5), None),
            ValueError,
            r"scale_before must have shape \[6\]; got \[5\]",
        ),
        (
            lambda: op.kron_rotate(torch.zeros(2, 6).int(), [torch.eye(6)], False, None, None),
            TypeError,
            "x must be floating-point",
        ),
        (
            lambda: op.kron_gram(torch.zeros(2, 6), torch.zeros(3, 6), [6], None),
            ValueError,
            "b must have as many rows as a, 2; got 3",
        ),
        (
            lambda: op.kron_gram(torch.zeros(2, 6), torch.zeros(2, 6), [0, 6], None),
            ValueError,
            "dims must have sizes of at least 1",
        ),
    ],
)
def test_kron_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def compiled_on_host(name, folder):
    """The functions of tests/<name>_cuda_on_host.cpp."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the host version of the CUDA kernels")
    library = folder / f"{name}.so"
    source = Path(__file__).with_name(f"{name}_cuda_on_host.cpp")
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


# The CUDA algorithm, thread after thread on the host: see tests/cayley_cuda_on_host.cpp.

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


@pytest.fixture(scope="module")
def cuda_on_host(tmp_path_factory):
    function = compiled_on_host("cayley", tmp_path_factory.mktemp("on_host")).run_cayley

    def run(inputs, rotations, outputs, order):
        def pointers(tensors):
            return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))

        matrices = outputs if rotations is None else rotations
        numbers = ctypes.c_int32 * len(inputs)
        function(
            ctypes.c_int64(len(inputs)),
            numbers(*(matrix.shape[-1] for matrix in matrices)),
            numbers(*(matrix.shape[0] for matrix in matrices)),
            pointers(inputs),
            pointers(inputs if rotations is None else rotations),
            pointers(outputs),
            ctypes.c_int32(outputs[0].dtype == torch.float64),
            ctypes.c_int32(rotations is not None),
            ctypes.c_int32(ORDERS[order]),
        )
        return outputs

    def forward(packed, sizes, order="ascending"):
        empty = [p.new_full((len(p), n, n), torch.nan) for p, n in zip(packed, sizes, strict=True)]
        return run(packed, None, empty, order)

    def backward(grads, rotations, order="ascending"):
        empty = [r.new_full((len(r), pack(r).shape[1]), torch.nan) for r in rotations]
        return run(grads, rotations, empty, order)

    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_algorithm_values(cuda_on_host, dtype):
    forward, backward = cuda_on_host
    sizes = [1, 2, 3, 4, 7, 8, 9, 10, 16, 20, 31, 48, 49, 64, 65, 72, 73, 128, 200, 256]
    packed = [packed_entries(2, n, dtype, scale=n**-0.5) for n in sizes]
    rotations = forward(packed, sizes)
    for rotation, expected in zip(
        rotations, cayley_fwd_reference([p.double() for p in packed], sizes), strict=True
    ):
        assert float((rotation.double() - expected).abs().amax()) <= FORWARD_TOLERANCE[dtype]
    grads = [torch.randn_like(rotation) for rotation in rotations]
    for actual, expected in zip(
        backward(grads, rotations),
        cayley_bwd_reference([g.double() for g in grads], [r.double() for r in rotations]),
        strict=True,
    ):
        assert_near(actual, expected)


def test_cuda_algorithm_does_not_depend_on_the_order_of_threads(cuda_on_host):
    forward, backward = cuda_on_host
    sizes = [1, 3, 8, 17, 40, 66, 76]
    packed = [packed_entries(2, n) for n in sizes]
    for batch in packed:
        batch[1] *= 1e4  # takes the path with pivoting
    rotations = forward(packed, sizes)
    grads = [torch.randn_like(rotation) for rotation in rotations]
    packed_grads = backward(grads, rotations)
    for order in ("descending", "shuffled"):
        assert all(map(torch.equal, forward(packed, sizes, order), rotations))
        assert all(map(torch.equal, backward(grads, rotations, order), packed_grads))


def test_cuda_lists_longer_than_one_launch(cuda_on_host):
    forward, backward = cuda_on_host
    sizes = [2 + index % 7 for index in range(1200)]
    packed = [packed_entries(1 + index % 3, n) for index, n in enumerate(sizes)]
    rotations = forward(packed, sizes)
    expected = cayley_fwd_reference([p.double() for p in packed], sizes)
    grads = [torch.randn_like(rotation) for rotation in rotations]
    expected_grads = cayley_bwd_reference(
        [g.double() for g in grads], [r.double() for r in rotations]
    )
    for actual, exact in zip(
        rotations + backward(grads, rotations), expected + expected_grads, strict=True
    ):
        assert_near(actual, exact)


@pytest.mark.parametrize("norm", [100.0, 1e5])
def test_cuda_rotations_are_orthogonal_to_rounding(cuda_on_host, norm):
    forward, _ = cuda_on_host
    for n in (3, 16, 64, 70, 256):
        skews = torch.stack([skew for _, skew in structured_skews(n)])
        packed = pack(norm * skews).float()
        (rotation,) = forward([packed], [n])
        assert orthogonality_error(rotation) <= 2e-7
        (expected,) = cayley_fwd_reference([packed.double()], [n])
        assert float((rotation.double() - expected).abs().amax()) <= 1e-7


def test_small_matrices_beside_larger_ones_stay_in_their_workspace():
    """A model's sizes come in one call. What is written past a workspace shows when it is freed."""
    code = """
import torch
import spectral_kernels
ops = torch.ops.spectral
for small in (3, 8, 12, 20, 24):
    for large in (25, 32, 40):
        sizes = [large, *[small] * 40]
        packed = [torch.randn(n * (n - 1) // 2) for n in sizes]
        for dtype in (torch.float32, torch.float64):
            for _ in range(5):
                rotations = ops.cayley_fwd([p.to(dtype) for p in packed], sizes)
                ops.cayley_bwd(rotations, rotations)
"""
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MALLOC_PERTURB_": "165"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


# Kronecker products on tensor cores, lane after lane on the host: see tests/warp_on_host.h.

TILES = [
    *((1, 8), (3, 8), (7, 40), (16, 16), (17, 16), (16, 20), (20, 32), (32, 40), (32, 48)),
    *((32, 64), (31, 56), (48, 64), (64, 32), (57, 40), (64, 64)),  # two and four warps a row
]


def address(tensor):
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


@pytest.fixture(scope="module")
def rotate_on_host(tmp_path_factory):
    function = compiled_on_host("kron_rotate", tmp_path_factory.mktemp("on_host")).run_rotate

    def rotate(x, factors, transpose, before, after, blocks=2, descending=False):
        y = torch.full_like(x, torch.nan)
        pointers = [address(t) for t in (x, y, *factors, before, after)]
        sizes = [len(factor) for factor in factors]
        rows = ctypes.c_int64(len(x))
        taken = function(*pointers, rows, *sizes, int(transpose), blocks, int(descending))
        return y if taken else None

    return rotate


@pytest.fixture(scope="module")
def gram_on_host(tmp_path_factory):
    function = compiled_on_host("kron_gram", tmp_path_factory.mktemp("on_host")).run_gram

    def gram(
        a, b, dims, scale, blocks=3, descending=False, scaled=None, factors=None, transpose=False
    ):
        n1, n2 = dims
        sums = [torch.full(shape, torch.nan) for shape in ((n1, n1), (n2, n2), (n1 * n2,))]
        tensors = (a, b, scale, scaled, *(factors or (None, None)), *sums)
        rows, flags = ctypes.c_int64(len(a)), (int(transpose), int(descending))
        taken = function(*map(address, tensors), rows, n1, n2, blocks, *flags)
        return sums if taken else None

    return gram


@pytest.mark.parametrize("dims", TILES)
def test_rotations_on_tensor_cores(rotate_on_host, dims):
    """As good as the exact result rounded to bf16, with and without scales, in any order."""
    k = dims[0] * dims[1]
    factors = [random_rotation(n, dtype=torch.float32).contiguous() for n in dims]
    dense = dense_kron(factors)
    for rows in (0, 1, 11):
        x = torch.randn(rows, k).bfloat16()
        for transpose in (False, True):
            for before, after in ((None, None), (torch.randn(k), None), (None, torch.randn(k))):
                y = rotate_on_host(x, factors, transpose, before, after)
                expected = x.double() if before is None else x.double() * before.double()
                expected = expected @ (dense.mT if transpose else dense)
                expected = expected if after is None else expected * after.double()
                assert_near(y, expected, factor=0.25)
                again = rotate_on_host(x, factors, transpose, before, after, descending=True)
                assert torch.equal(y, again)


@pytest.mark.parametrize("dims", TILES)
def test_grams_on_tensor_cores(gram_on_host, dims):
    """Sums of bf16 numbers to fp32's tolerance: the scaled ones are two bf16 numbers each."""
    k = dims[0] * dims[1]
    for rows in (0, 1, 37):
        a, b = (torch.randn(rows, k).bfloat16() for _ in range(2))
        for scale in (None, torch.randn(k)):
            sums = gram_on_host(a, b, dims, scale)
            exact = None if scale is None else scale.double()
            expected = kron_gram_reference(a.double(), b.double(), list(dims), exact)
            for actual, oracle in zip(sums, expected, strict=True):
                assert_near(actual, oracle)
            again = gram_on_host(a, b, dims, scale, descending=True)
            assert all(map(torch.equal, sums, again))


@pytest.mark.parametrize("dims", TILES)
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_on_tensor_cores(gram_on_host, dims, transpose):
    """The same sums times the factors, and the rows times the scale, written over the rows."""
    k = dims[0] * dims[1]
    factors = [torch.randn(n, n) for n in dims]
    for rows, blocks in ((0, 0), (1, 1), (37, 3), (90, 20)):
        a, b = (torch.randn(rows, k).bfloat16() for _ in range(2))
        scale = torch.randn(k)
        *grams, columns = kron_gram_reference(a.double(), b.double(), list(dims), scale.double())
        pairs = [(factor.double(), gram) for factor, gram in zip(factors, grams, strict=True)]
        products = [gram.mT @ factor if transpose else factor @ gram for factor, gram in pairs]
        expected_rows = (a.float() * scale).bfloat16()
        options = {"factors": factors, "transpose": transpose, "blocks": blocks}
        again = gram_on_host(
            a, b, dims, scale, scaled=torch.empty_like(a), descending=True, **options
        )
        found = gram_on_host(a, b, dims, scale, scaled=a, **options)
        for actual, oracle in zip(found, [*products, columns], strict=True):
            assert_near(actual, oracle)
        assert torch.equal(a, expected_rows)
        assert all(map(torch.equal, found, again))


def test_tensor_cores_leave_other_sizes(rotate_on_host, gram_on_host):
    for dims in ((65, 40), (32, 66), (4, 9), (3, 2)):
        k = dims[0] * dims[1]
        x = torch.randn(2, k).bfloat16()
        factors = [random_rotation(n, dtype=torch.float32) for n in dims]
        assert rotate_on_host(x, factors, False, None, None) is None
        assert gram_on_host(x, x, dims, None) is None


# What lies between the products of A and R, number after number on the host.

CUDA_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def low_rank_on_host(tmp_path_factory):
    return compiled_on_host("low_rank", tmp_path_factory.mktemp("on_host"))


@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_stacks_and_their_mix_on_cuda(low_rank_on_host, dtype):
    r, n_in, n_out, count = 3, 7, 5, 6
    code, wide = ctypes.c_int32(CUDA_TYPES[dtype]), ctypes.c_int32(0)
    right, left = torch.randn(r, n_in).to(dtype), torch.randn(n_out, r).to(dtype)
    shifts = torch.randn(n_in, r), torch.randn(n_out, r)
    down, up = (torch.full((2 * r, n), torch.nan, dtype=dtype) for n in (n_in, n_out))
    pointers = map(address, (right, shifts[0], down, left, shifts[1], up))
    sizes = ctypes.c_int64(n_in), ctypes.c_int64(n_out), r
    low_rank_on_host.run_stack(*pointers, *sizes, code, wide, code)
    assert torch.equal(down, torch.cat([right, shifts[0].mT.to(dtype)]))
    assert torch.equal(up, torch.cat([left.mT, shifts[1].mT.to(dtype)]))

    rows, values = torch.randn(count, 2 * r).to(dtype), torch.rand(r)
    expected = mix_shifted(rows.double(), values.double() * 1.5)
    options = ctypes.c_int64(count), ctypes.c_float(1.5), r, code
    low_rank_on_host.run_mix(address(rows), address(values), *options)
    assert_near(rows, expected)


@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_rotated_middle_on_cuda(low_rank_on_host, dtype):
    for r in (1, 4, 11):
        values, scaling = torch.rand(r), ctypes.c_float(-1.5)
        middle = torch.full((r, r), torch.nan, dtype=dtype)
        turns = [random_rotation(r, dtype=torch.float32).contiguous() for _ in range(2)]
        for left, right in (turns, [torch.eye(r)] * 2):
            pointers = map(address, (left, right, values, middle))
            low_rank_on_host.run_middle(*pointers, scaling, r, CUDA_TYPES[dtype])
            exact = rotated_middle(values.double(), left.double(), right.double(), -1.5)
            assert_near(middle, exact)
        assert torch.count_nonzero(middle) == 0

        grad = torch.randn(r, r)
        found = [torch.full((r, r), torch.nan) for _ in range(2)]
        low_rank_on_host.run_turn(*map(address, (grad, *turns, values, *found)), scaling, r)
        wide = [tensor.double() for tensor in (grad, values, *turns)]
        for actual, oracle in zip(found, rotation_grads(*wide, -1.5), strict=True):
            assert_near(actual, oracle)


# The table of addresses that the Triton kernels of optimizer steps read.


def launches_of_step(monkeypatch, step, *arguments):
    """What a step hands to the kernels: rows by launch, the rows of empty factors, the scratch."""
    from spectral_kernels.triton_kernels import stiefel

    calls = []
    monkeypatch.setattr(stiefel, "_launch", lambda *given: calls.append(given))
    taken = getattr(stiefel, step)(*arguments)
    if taken is False:
        assert not calls
        return None
    ((_, lists, launches, table, scratch, *_),) = calls
    rows = table.tolist()
    parts = {plan: rows[start : start + count] for plan, (start, count) in launches.items()}
    rest = rows[sum(map(len, parts.values())) :]
    return lists, parts, rest, scratch


@pytest.mark.parametrize("kind", ["sgd", "sgd with momentum", "adam"])
def test_stiefel_table(monkeypatch, kind):
    pytest.importorskip("triton")
    shapes = [(1, 1), (3, 16, 16), (20, 20), (0, 5, 5), (128, 128), (40, 40), (0, 0), (2, 1, 1)]
    lists = stiefel_oracle.problem(shapes, torch.float32)
    steps = lists[4] if kind == "adam" else []
    lists = lists[: {"sgd": 2, "sgd with momentum": 3, "adam": 4}[kind]]
    lists_count, parts, rest, scratch = launches_of_step(
        monkeypatch, "_step_at_once", None, lists, steps or None
    )
    expected_count, expected, expected_rest, expected_scratch = launches_of_step(
        monkeypatch, "_step", None, lists, steps
    )
    assert (lists_count, scratch, list(parts)) == (
        expected_count,
        expected_scratch,
        list(expected),
    )
    # Scratch is given out in the order of the table, which need not be the same.
    for plan, rows in parts.items():
        assert [[*row[:6], row[7]] for row in rows] == [
            [*row[:6], row[7]] for row in expected[plan]
        ]
    taken = sorted((row[6], row[6] + 2 * row[5] ** 2) for rows in parts.values() for row in rows)
    assert taken[0][0] == 0 and taken[-1][1] == scratch
    assert all(end == start for (_, end), (start, _) in pairwise(taken))
    assert rest == expected_rest


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (0, lambda t: t.double()),
        (1, lambda t: t.double()),
        (1, lambda t: t.mT),
        (2, lambda t: t[:4, :4].clone()),
        (3, lambda t: t.to("meta")),
        (4, lambda t: t.double()),
        (4, lambda t: t.expand(2)),
        (0, lambda t: t[None, None]),
        (1, lambda t: t.to_sparse()),
    ],
)
def test_stiefel_table_leaves_what_does_not_fit(monkeypatch, which, change):
    pytest.importorskip("triton")
    lists = stiefel_oracle.problem([(5, 5), (6, 6)], torch.float32)
    lists[which][1] = change(lists[which][1])
    *matrices, steps = lists
    assert launches_of_step(monkeypatch, "_step_at_once", None, matrices, steps) is None


def test_stiefel_table_leaves_other_lists(monkeypatch):
    pytest.importorskip("triton")
    *matrices, steps = stiefel_oracle.problem([(5, 5), (6, 6)], torch.float32)
    assert launches_of_step(monkeypatch, "_step_at_once", None, matrices, steps[:1]) is None
    for missing in (1, 2, 3):
        others = [*matrices[:missing], [], *matrices[missing + 1 :]]
        assert launches_of_step(monkeypatch, "_step_at_once", None, others, steps) is None
    assert launches_of_step(monkeypatch, "_step_at_once", None, matrices, []) is None
    matrices[1].pop()
    assert launches_of_step(monkeypatch, "_step_at_once", None, matrices, steps) is None
    large = stiefel_oracle.problem([(129, 129)], torch.float32)
    assert launches_of_step(monkeypatch, "_step_at_once", None, large[:4], large[4]) is None
    assert launches_of_step(monkeypatch, "_step_at_once", None, [[], []], None) is None
