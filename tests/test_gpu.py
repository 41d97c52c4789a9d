"""What only a CUDA device can show: the registered kernels run, agree with float64 and never wait.

Skipped without a device; ``benchmarks/gpu_run.sh`` builds the extension and runs these.
"""

import itertools
import sys
from math import prod

import pytest
import stiefel_oracle
import torch
from support import (
    TOLERANCE,
    assert_near,
    dense_kron,
    dense_soda_weight,
    random_rotation,
    randomise,
    relative_error,
)
from torch.library import opcheck

from spectral_adapters import SODALinear, SpectralAdapterALinear, SpectralAdapterRLinear
from spectral_adapters.functional import cayley
from spectral_kernels import backend_report
from spectral_kernels._overrides import STATUS
from spectral_kernels.ops import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
#: The last three leave the kernels: several passes, no Gram kernel, a factor above the limit.
SHAPES = [
    (7, (1,)), (1000, (13,)), (257, (128,)), (33, (7, 11)), (257, (8, 8, 10)), (100, (6, 8, 16)),
    (100, (4, 16, 20)), (130, (4, 8, 64)), (4099, (32, 40)), (515, (64, 64)), (65, (96, 100)),
    (33, (128, 128)), (130, (16, 16, 16)), (65, (17, 19, 18)), (9, (32, 32, 32)), (0, (32, 40)),
    (40, (8, 256)), (5, (64, 64, 64)), (40, (3, 2, 137, 5)),
]  # fmt: skip
op = torch.ops.spectral


@pytest.fixture
def poison(monkeypatch):
    """Every buffer the host functions allocate starts as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


def factors_of(dims, dtype=torch.float32):
    return [random_rotation(n, dtype=dtype).to(DEVICE) for n in dims]


def rotated(x, factors, transpose, before, after):
    """float64 oracle on the device, one einsum per axis."""
    dims = [factor.shape[0] for factor in factors]
    y = x.double() if before is None else x.double() * before.double()
    y = y.reshape(-1, *dims)
    for axis, factor in enumerate(factors, start=1):
        matrix = factor.double().mT if transpose else factor.double()
        y = torch.einsum("...p,pq->...q", y.movedim(axis, -1), matrix).movedim(-1, axis)
    y = y.reshape(x.shape)
    return y if after is None else y * after.double()


def grams(a, b, dims, scale):
    """float64 oracle on the device, one einsum per axis, then the column sums."""
    a, b = a.double(), b.double()
    scaled = (b if scale is None else b * scale.double()).reshape(-1, *dims)
    unfolded = a.reshape(-1, *dims)
    pairs = [(unfolded.movedim(i, -1), scaled.movedim(i, -1)) for i in range(1, len(dims) + 1)]
    sums = [torch.einsum("...p,...q->pq", left, right) for left, right in pairs]
    return [*sums, (a * b).sum(0)]


def samples(name):
    """Arguments of one raw op on the device."""
    x = torch.randn(9, 12, device=DEVICE)
    scale = torch.rand(12, device=DEVICE)
    rotations = [random_rotation(5, dtype=torch.float32).to(DEVICE).expand(3, 5, 5).contiguous()]
    grad, weight, down = (torch.randn(*s, device=DEVICE) for s in ((9, 5), (5, 12), (3, 12)))
    square = torch.randn(12, 12, device=DEVICE)
    up, shift = torch.randn(5, 3, device=DEVICE), torch.randn(12, 3, device=DEVICE)
    basis, turn = (up, scale[:3].clone(), down), torch.eye(3, device=DEVICE)
    needs = (1.0, True, True)
    return {
        "low_rank_linear_fwd": (x, None, weight, None, down, up, 1.0),
        "low_rank_linear_bwd": (grad, x, weight, shift[:9], down, up, *needs),
        "spectral_a_linear_fwd": (x, grad, None, None, *basis, up + 1, shift, 1.0),
        "spectral_a_linear_bwd": (grad, x, weight, x[:, :6].clone(), *basis, up + 1, shift, *needs),
        "spectral_r_linear_fwd": (x, None, weight, None, *basis, turn, turn.clone(), 1.0),
        "spectral_r_linear_bwd": (grad, weight, shift[:9], *basis, turn, turn.clone(), *needs),
        "cayley_fwd": ([torch.randn(3, 10, device=DEVICE)], [5]),
        "cayley_bwd": ([torch.randn(3, 5, 5, device=DEVICE)], rotations),
        "kron_rotate": (x, factors_of((3, 4)), True, scale, None),
        "kron_gram": (x, torch.randn_like(x), [3, 4], scale),
        "stiefel_sgd_": (*stiefel_problem([(3, 5, 5), (40, 40)])[:3], 1e-2, 0.9, -1.0),
        "stiefel_adam_": (*stiefel_problem([(3, 5, 5), (40, 40)]), 1e-2, 0.9, 0.99, 1e-8, -1.0),
        "soda_linear_fwd": (x, scale, weight, square, None, None, True, factors_of((3, 4))),
        "soda_linear_bwd": (
            *(grad, x, scale, weight, square, None, True, True, True, factors_of((3, 4))),
        ),
        "rotated_linear_fwd": (x, scale, x[:5], None, None, False, True, factors_of((3, 4))),
        "rotated_linear_bwd": (
            *(torch.randn(9, 5, device=DEVICE), x, scale, x[:5].clone(), None, None),
            *(False, True, factors_of((3, 4))),
        ),
    }[name]


def test_the_kernels_are_registered():
    report = backend_report()
    assert report.device == "cuda"
    assert report["kron_rotate"].implementation == "triton"
    assert report["kron_gram"].implementation == "triton"
    assert report["stiefel_sgd_"].implementation == "triton"
    assert report["stiefel_adam_"].implementation == "triton"
    host = "c++" if STATUS["extension"].loaded else "triton"
    assert report["spectral_a_linear_fwd"].implementation == host


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "dims"), SHAPES)
def test_kron_rotate(poison, rows, dims, dtype):
    k = prod(dims)
    x = torch.randn(rows, k, device=DEVICE).to(dtype)
    factors = factors_of(dims)
    before, after = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    for transpose, scales in itertools.product((False, True), ((None, None), (before, after))):
        y = op.kron_rotate(x, factors, transpose, *scales)
        assert y.dtype == dtype
        assert_near(y, rotated(x, factors, transpose, *scales))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "dims"), SHAPES)
def test_kron_gram(poison, rows, dims, dtype):
    k = prod(dims)
    a, b = (torch.randn(rows, k, device=DEVICE).to(dtype) for _ in range(2))
    for scale in (None, torch.randn(k, device=DEVICE)):
        actual = op.kron_gram(a, b, list(dims), scale)
        for value, oracle in zip(actual, grams(a, b, dims, scale), strict=True):
            assert value.dtype == torch.float32
            assert_near(value, oracle)


def test_kron_gram_gives_the_same_bits_every_time():
    a, b = (torch.randn(5000, 1280, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    first = op.kron_gram(a, b, [32, 40], None)
    for _ in range(5):
        again = op.kron_gram(a, b, [32, 40], None)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_strided_and_misaligned_inputs(poison):
    x = torch.randn(481, 11, device=DEVICE, dtype=torch.bfloat16)[1:].mT[:, ::4]
    y = torch.randn(11 * 120 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(11, 120)
    factors = [factor.mT for factor in factors_of((8, 15))]
    for rows in (x, y):
        expected = rotated(rows, factors, False, None, None)
        assert_near(op.kron_rotate(rows, factors, False, None, None), expected)
    actual = op.kron_gram(x, y, [8, 15], None)
    for value, oracle in zip(actual, grams(x, y, (8, 15), None), strict=True):
        assert_near(value, oracle)


def test_more_elements_than_int32_counts():
    rows, dims = 2**31 // 1280 + 3, (32, 40)
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    x = torch.zeros(rows, 1280, device=DEVICE, dtype=torch.bfloat16)
    x[-2:] = torch.randn(2, 1280, device=DEVICE)
    factors = factors_of(dims)
    y = op.kron_rotate(x, factors, False, None, None)
    assert_near(y[-2:], rotated(x[-2:], factors, False, None, None))
    for value, oracle in zip(
        op.kron_gram(x, y, list(dims), None), grams(x[-2:], y[-2:], dims, None), strict=True
    ):
        assert_near(value, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.3, 30.0])
def test_cayley(dtype, scale):
    sizes, batches = [1, 2, 5, 32, 40, 100, 128], [2, 3, 0, 48, 48, 2, 4]
    packed = [
        (torch.randn(batch, n * (n - 1) // 2, device=DEVICE, dtype=dtype) * scale).requires_grad_()
        for n, batch in zip(sizes, batches, strict=True)
    ]
    rotations = cayley(packed, sizes)
    weights = [torch.randn_like(rotation) for rotation in rotations]
    sum((r * w).sum() for r, w in zip(rotations, weights, strict=True)).backward()

    exact = [batch.detach().double().cpu().requires_grad_() for batch in packed]
    oracles = cayley(exact, sizes)
    pairs = zip(oracles, weights, strict=True)
    sum((r * w.double().cpu()).sum() for r, w in pairs).backward()
    # Both the values and the gradient are conditioned no worse than (1 + |Q|), and fp32 sees that.
    factor = 1 + 10 * scale
    for rotation, oracle, batch, reference in zip(rotations, oracles, packed, exact, strict=True):
        assert_near(rotation, oracle.to(DEVICE), factor=factor)
        assert_near(batch.grad, reference.grad.to(DEVICE), factor=factor)
        identity = torch.eye(rotation.shape[1], device=DEVICE, dtype=torch.float64)
        product = rotation.detach().double()
        assert_near((product.mT @ product).to(dtype), identity.expand_as(product), factor=factor)


@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name):
    opcheck(getattr(op, name).default, samples(name))


@pytest.mark.parametrize("name", sorted(OPS))
def test_does_not_wait_for_the_device(name):
    report = backend_report()[name]
    if report.implementation == "reference":
        pytest.skip(f"{name} runs on the reference: {report.reason}")
    arguments, call = samples(name), getattr(op, name)
    call(*arguments)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


needs_tensor_cores = pytest.mark.skipif(
    not hasattr(torch.ops.spectral_products, "kron_gram_on_tensor_cores"),
    reason="needs an extension with CUDA code",
)


@needs_tensor_cores
@pytest.mark.parametrize("rows", [0, 1, 77, 4099])
@pytest.mark.parametrize(
    "dims",
    [
        *((16, 20), (20, 32), (24, 32), (32, 32), (32, 40), (32, 48)),
        *((32, 64), (48, 64), (64, 64), (64, 32)),
    ],
)
def test_products_on_tensor_cores(poison, dims, rows):
    k = prod(dims)
    x, z = (torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    factors = factors_of(dims)
    before, after = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    products = torch.ops.spectral_products
    for transpose, scales in itertools.product((False, True), ((None, None), (before, after))):
        y = products.kron_rotate_on_tensor_cores(x, factors, transpose, *scales)
        assert_near(y, rotated(x, factors, transpose, *scales))
    for scale in (None, before):
        sums = products.kron_gram_on_tensor_cores(x, z, list(dims), scale)
        for value, oracle in zip(sums, grams(x, z, dims, scale), strict=True):
            assert_near(value, oracle)
        again = products.kron_gram_on_tensor_cores(x, z, list(dims), scale)
        assert all(map(torch.equal, sums, again))


@pytest.fixture
def new_kernels():
    """The layers use their newest kernels, as they do by themselves."""
    extension = pytest.importorskip("spectral_kernels._C", reason="needs the extension")
    if not hasattr(extension, "_use_new_kernels"):
        pytest.skip("needs an extension with CUDA code")
    extension._use_new_kernels(True)
    yield extension


@pytest.fixture(params=["usual kernels", "new kernels"])
def kernels(request):
    if request.param == "new kernels":
        request.getfixturevalue("new_kernels")
        yield
        return
    extension = sys.modules.get("spectral_kernels._C")
    switch = getattr(extension, "_use_new_kernels", lambda on: None)
    switch(False)
    yield
    switch(True)


@pytest.fixture(params=["narrow", "wide"])
def width(request, new_kernels):
    """A layer's width, whose rows one warp takes or, which has to be switched on, several."""
    if request.param == "narrow":
        yield 640
        return
    new_kernels._use_wide_tiles(True)
    yield 2048
    new_kernels._use_wide_tiles(False)


@pytest.mark.parametrize("plan", ["factored", "tokens"])
def test_soda_layer_on_tensor_cores(width, plan):
    layer = SODALinear.from_linear(torch.nn.Linear(width, width).bfloat16(), plan=plan)
    randomise(layer)
    layer.to(DEVICE)
    x = torch.randn(300, width, device=DEVICE, dtype=torch.bfloat16)
    upstream = torch.randn(300, width, device=DEVICE, dtype=torch.bfloat16)
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    gradients = torch.autograd.grad(y, trained, upstream)

    wide = SODALinear.from_linear(torch.nn.Linear(width, width), plan=plan).double().to(DEVICE)
    wide.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    exact = wide(x.double())
    expected = torch.autograd.grad(
        exact, [p for p in wide.parameters() if p.requires_grad], upstream.double()
    )
    assert_near(y, exact, factor=3)
    for value, oracle in zip(gradients, expected, strict=True):
        assert relative_error(value, oracle) <= 4 * TOLERANCE[torch.bfloat16]


def test_kernels_in_a_cuda_graph():
    x = torch.randn(300, 1280, device=DEVICE, dtype=torch.bfloat16)
    factors = factors_of((32, 40))

    def step():
        y = op.kron_rotate(x, factors, False, None, None)
        return y, op.kron_gram(x, y, [32, 40], None)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, sums = step()
    x.normal_()
    graph.replay()
    assert_near(y, rotated(x, factors, False, None, None))
    for value, oracle in zip(sums, grams(x, y, (32, 40), None), strict=True):
        assert_near(value, oracle)


def stiefel_problem(shapes):
    """Rotations, gradients, skew velocities, squares and step counts on the device."""
    lists = stiefel_oracle.problem(shapes, torch.float32)
    return [[tensor.to(DEVICE) for tensor in tensors] for tensors in lists]


def on_cpu(lists):
    return [[tensor.cpu() for tensor in tensors] for tensors in lists]


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_stiefel_adam(poison, lr):
    """Every tile size, batches, an empty one, and a factor that the reference takes."""
    lists = stiefel_problem(
        [(1, 1), (3, 16, 16), (20, 20), (0, 5, 5), (40, 40), (128, 128), (130, 130)]
    )
    expected = stiefel_oracle.expected_adam(on_cpu(lists), lr, 0.9, 0.99, 1e-8, -1.0)
    op.stiefel_adam_(*lists, lr, 0.9, 0.99, 1e-8, -1.0)
    stiefel_oracle.assert_all_near(on_cpu(lists), expected, factor=4 if lr < 0.1 else 20)


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4])
def test_small_steps_from_the_identity(poison, lr):
    """One entry of 1 per column, and many whose squares an fp32 sum loses beside it: n 2^-24."""
    lists = stiefel_problem([(128, 128)])
    lists[0][0].copy_(torch.eye(128))
    for _ in range(100):
        op.stiefel_adam_(*lists, lr, 0.9, 0.99, 1e-8, -1.0)
        assert stiefel_oracle.orthogonality_error(lists[0][0].cpu()) <= 2e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stiefel_sgd(poison, momentum):
    lists = stiefel_problem([(1, 1), (3, 16, 16), (20, 20), (40, 40), (128, 128)])[:3]
    expected = stiefel_oracle.expected_sgd(on_cpu(lists), 0.3, momentum, -1.0)
    if momentum == 0:
        lists[2], expected[2] = [], []
    op.stiefel_sgd_(*lists, 0.3, momentum, -1.0)
    stiefel_oracle.assert_all_near(on_cpu(lists), expected, factor=20)


def test_stiefel_steps_in_a_cuda_graph():
    """Each replay is a step, with the gradients of that moment, however much came in between."""
    lists = stiefel_problem([(20, 20), (3, 40, 40), (100, 100)])
    options = (1e-2, 0.9, 0.99, 1e-8, -1.0)
    op.stiefel_adam_(*lists, *options)
    torch.cuda.synchronize()
    expected = on_cpu(lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.stiefel_adam_(*lists, *options)
    for _ in range(3):
        for grad in lists[1]:
            grad.normal_()
        torch.empty(1 << 20, pin_memory=True).fill_(-1.0)
        expected[1] = on_cpu(lists)[1]
        graph.replay()
        expected = stiefel_oracle.expected_adam(expected, *options)
    stiefel_oracle.assert_all_near(on_cpu(lists), expected, factor=20)


def test_compiles_without_a_graph_break():
    x = torch.randn(65, 1280, device=DEVICE, dtype=torch.bfloat16)
    factors = factors_of((32, 40))

    def step(x):
        y = op.kron_rotate(x * 2, factors, True, None, None)
        return [y, *op.kron_gram(x, y, [32, 40], None)]

    compiled = torch.compile(step, fullgraph=True)
    for value, expected in zip(compiled(x), step(x), strict=True):
        assert_near(value, expected.double())


@pytest.mark.parametrize("plan", ["factored", "merged", "tokens"])
@pytest.mark.parametrize(("decomposition", "rotation"), [("svd", "left"), ("qr", "right")])
def test_soda_linear_step(decomposition, rotation, plan):
    base = torch.nn.Linear(96, 80)
    layer = SODALinear.from_linear(base, decomposition=decomposition, rotation=rotation, plan=plan)
    randomise(layer)
    x = torch.randn(50, 96)
    weight = dense_soda_weight(layer)
    expected = x.double() @ weight.mT + base.bias.double()
    upstream = torch.randn(50, 80)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    loss = (expected * upstream.double()).sum()
    oracles = torch.autograd.grad(loss, list(parameters.values()))

    layer.to(DEVICE)
    y = layer(x.to(DEVICE))
    assert_near(y, expected.to(DEVICE))
    (y * upstream.to(DEVICE)).sum().backward()
    device_parameters = dict(layer.named_parameters())
    for name, oracle in zip(parameters, oracles, strict=True):
        assert_near(device_parameters[name].grad, oracle.to(DEVICE), factor=2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cls", [SpectralAdapterALinear, SpectralAdapterRLinear])
def test_low_rank_step(poison, kernels, cls, dtype):
    """Against the dense weight in float64; a fresh layer is its base to the last bit."""
    layer = cls.from_linear(torch.nn.Linear(150, 130).to(dtype), r=5).to(DEVICE)
    x = torch.randn(3, 37, 150, device=DEVICE).to(dtype)
    assert torch.equal(layer(x), layer.base(x))
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    y = layer(x)
    change = layer.get_delta_weight().double()
    expected = x.double() @ (layer.base.weight.double() + change).mT + layer.base.bias.double()
    assert y.dtype == dtype
    assert_near(y, expected, factor=2)
    upstream = torch.randn_like(y)
    actual = torch.autograd.grad(y, trained, upstream)
    dense = upstream.double().flatten(0, 1).mT @ x.double().flatten(0, 1)
    exact = torch.autograd.grad(layer.get_delta_weight(), trained, dense.float())
    for value, oracle in zip(actual, exact, strict=True):
        assert relative_error(value, oracle) <= 4 * TOLERANCE[dtype]


def test_dense_kron_agrees_with_the_order_of_factors():
    x = torch.randn(9, 30, device=DEVICE)
    factors = factors_of((2, 3, 5))
    y = op.kron_rotate(x, factors, False, None, None)
    assert_near(y, x.double() @ dense_kron(factors))
