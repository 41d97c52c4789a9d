"""The differentiable functions: gradients, compilation, hostile and bad inputs."""

import itertools

import pytest
import torch
from support import assert_near, dense_kron, dense_soda_weight, random_rotation, randomise

from spectral_adapters import SODALinear
from spectral_adapters.functional import (
    SpectralBasis,
    cayley,
    kron_gram,
    kron_rotate,
    low_rank_linear,
    rotated_linear,
    soda_linear,
)

PLANS = ("factored", "merged", "tokens")
X = torch.ones(2, 6)
FACTORS = [torch.eye(2), torch.eye(3)]
BASIS = SpectralBasis(torch.eye(6), torch.ones(6), torch.eye(6))
METHODS = list(itertools.product(("svd", "qr"), ("left", "right", None)))


def _leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_cayley_gradcheck(n):
    assert torch.autograd.gradcheck(lambda p: cayley(p, n), (_leaf(2, n * (n - 1) // 2),))


@pytest.mark.parametrize("plan", PLANS)
def test_torch_func_sees_the_same_gradients(plan):
    layer = randomise(SODALinear.from_linear(torch.nn.Linear(6, 4).double(), plan=plan))
    x, trained = _leaf(3, 6), {n: p for n, p in layer.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(layer, values, (x.detach(),)).square().sum()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    for name, expected in zip(
        trained, torch.autograd.grad(loss(trained), trained.values()), strict=True
    ):
        assert_near(gradients[name], expected)


@pytest.mark.parametrize("plan", PLANS)
def test_forward_mode_is_refused_where_there_is_no_formula(plan):
    """Never a tangent of zero, which would be wrong in silence."""
    layer = randomise(SODALinear.from_linear(torch.nn.Linear(6, 6), plan=plan))
    layer.requires_grad_(False)
    x, rotation = torch.randn(3, 6), random_rotation(6).float()
    packed = torch.randn(1, 15)
    for function, point in [
        (layer, x),
        (lambda x: kron_rotate(x, [rotation]), x),
        (lambda packed: cayley(packed, 6), packed),
    ]:
        with torch.no_grad():
            function(point)
        with pytest.raises(NotImplementedError, match="implement the jvp function"):
            torch.func.jvp(function, (point,), (torch.ones_like(point),))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="implement the jvp function"),
        ):
            function(torch.autograd.forward_ad.make_dual(point, torch.ones_like(point)))


@pytest.mark.parametrize("transpose", [False, True])
def test_rotated_tokens_and_rotated_matrix_agree(transpose):
    factors = [random_rotation(n).requires_grad_() for n in (2, 3)]
    x, scale, bias, matrix = _leaf(2, 4, 6), _leaf(6), _leaf(5), _leaf(5, 6).detach()
    leaves = [x, scale, bias, *factors]
    options = {"scale": scale, "bias": bias, "transpose": transpose}
    expected = rotated_linear(x, matrix, factors, **options)
    y = rotated_linear(x, matrix, factors, on_tokens=True, **options)
    assert_near(y, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, cotangent)
    for actual, gradient in zip(torch.autograd.grad(y, leaves, cotangent), gradients, strict=True):
        assert_near(actual, gradient)


def test_cayley_of_a_whole_model_is_one_node():
    packed = [_leaf(3, 6), _leaf(0, 3), _leaf(2, 0), _leaf(1, 10)]
    rotations = cayley(packed, [4, 3, 1, 5])
    assert len({rotation.grad_fn for rotation in rotations}) == 1
    assert torch.autograd.gradcheck(lambda *p: cayley(p, [4, 3, 1, 5]), tuple(packed))
    assert cayley([], []) == ()


def test_cayley_only_differentiates_what_is_asked():
    frozen, trained = torch.randn(2, 6), torch.randn(2, 6, requires_grad=True)
    first, second = cayley([frozen, trained], [4, 4])
    (first.sum() + second.pow(3).sum()).backward()
    assert frozen.grad is None and trained.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cayley_computes_low_precision_in_fp32(dtype):
    packed = torch.randn(2, 6).to(dtype)
    assert torch.equal(cayley(packed, 4), cayley(packed.float(), 4))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dims", [(1,), (4,), (2, 3), (2, 1, 3)])
def test_kron_rotate_gradcheck_for_any_factors(dims, transpose):
    factors = [_leaf(n, n) for n in dims]
    x = _leaf(3, torch.Size(dims).numel())
    assert torch.autograd.gradcheck(
        lambda x, *f: kron_rotate(x, f, transpose=transpose), (x, *factors)
    )


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dims", [(4,), (2, 3), (2, 2, 3)])
def test_kron_rotate_orthogonal_backward_equals_the_general_one(dims, transpose):
    factors = [random_rotation(n).requires_grad_() for n in dims]
    x = _leaf(5, torch.Size(dims).numel())
    weight = torch.randn_like(x)
    grads = [
        torch.autograd.grad(
            (kron_rotate(x, factors, transpose=transpose, orthogonal=flag) * weight).sum(),
            [x, *factors],
        )
        for flag in (False, True)
    ]
    for general, orthogonal in zip(*grads, strict=True):
        torch.testing.assert_close(orthogonal, general, rtol=1e-12, atol=1e-12)


def test_kron_rotate_keeps_leading_dimensions():
    factors = [random_rotation(2), random_rotation(3)]
    x = torch.randn(2, 0, 4, 6, dtype=torch.float64)
    assert kron_rotate(x, factors).shape == x.shape
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(kron_rotate(x, factors), x @ dense_kron(factors))


@pytest.mark.parametrize("dims", [(1,), (4,), (2, 3), (2, 2, 3)])
def test_kron_gram_gradcheck(dims):
    k = torch.Size(dims).numel()

    def flat(a, b):
        grams, sums = kron_gram(a, b, dims)
        return (*grams, sums)

    assert torch.autograd.gradcheck(flat, (_leaf(3, k), _leaf(3, k)))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (1, 5), (7, 7)])
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_soda_linear_gradcheck(decomposition, rotation, shape, plan):
    out_features, in_features = shape
    base = torch.nn.Linear(in_features, out_features).double()
    layer = SODALinear.from_linear(base, decomposition=decomposition, rotation=rotation)
    term = (layer.spectrum().detach() + 0.1).requires_grad_()
    factors = [random_rotation(n).requires_grad_() for n in layer.factor_sizes]

    def product(x, term, *factors):
        return soda_linear(
            x,
            layer.basis,
            term,
            factors or None,
            decomposition=decomposition,
            rotation=rotation,
            plan=plan,
        )

    assert torch.autograd.gradcheck(product, (_leaf(2, 3, in_features), term, *factors))


@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_compiles_without_a_graph_break(decomposition, rotation):
    layer = SODALinear(12, 20, decomposition=decomposition, rotation=rotation)
    randomise(layer)
    for plan in (*PLANS, "auto"):
        torch._dynamo.reset()
        layer.plan = plan
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 12, requires_grad=True)
        inputs = [x, layer.delta, *layer.rotation]
        expected = torch.autograd.grad(layer(x).sin().sum(), inputs)
        actual = torch.autograd.grad(compiled(x).sin().sum(), inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("function", ["cayley", "kron_rotate", "kron_gram"])
def test_functions_compile_without_a_graph_break(function):
    torch._dynamo.reset()
    if function == "cayley":
        call = lambda p, q: sum(r.sum() for r in cayley([p, q], [4, 3]))  # noqa: E731
        inputs = (torch.randn(2, 6, requires_grad=True), torch.randn(1, 3, requires_grad=True))
    elif function == "kron_rotate":
        call = lambda x, *f: kron_rotate(x, f, transpose=True).sin().sum()  # noqa: E731
        inputs = tuple(torch.randn(n, 9 if n == 5 else n, requires_grad=True) for n in (5, 3, 3))
    else:
        call = lambda a, b: kron_gram(a, b, (3, 3))[1].sin().sum()  # noqa: E731
        inputs = (torch.randn(5, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True))
    expected = torch.autograd.grad(call(*inputs), inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor_runs_a_training_step():
    torch._dynamo.reset()
    layer = randomise(SODALinear(12, 20))
    x = torch.randn(5, 12)
    torch.compile(layer, fullgraph=True)(x).sin().sum().backward()
    compiled = layer.delta.grad.clone()
    layer.zero_grad()
    layer(x).sin().sum().backward()
    torch.testing.assert_close(compiled, layer.delta.grad)


@pytest.mark.parametrize("plan", PLANS)
def test_huge_and_tiny_values(plan):
    for magnitude in (1e-12, 1e12):
        base = torch.nn.Linear(12, 12, bias=False)
        with torch.no_grad():
            base.weight.mul_(magnitude)
        layer = randomise(SODALinear.from_linear(base, plan=plan), scale=0.3)
        with torch.no_grad():
            layer.delta.mul_(magnitude)
        x = torch.randn(4, 12)
        assert_near(layer(x), x.double() @ dense_soda_weight(layer).mT)


def test_factors_may_be_a_generator():
    y = soda_linear(X, BASIS, torch.ones(6), (factor for factor in FACTORS))
    assert_near(y, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cayley(torch.zeros(2, 5), 4), r"packed\[0\] must have last dimension 6"),
        (lambda: cayley(torch.zeros(6), 4), r"packed\[0\] must have 2 dimensions"),
        (lambda: cayley(torch.zeros(2, 6, dtype=torch.int64), 4), "floating-point"),
        (lambda: cayley(torch.zeros(2, 0), 0), "n must be at least 1"),
        (lambda: cayley([torch.zeros(2, 6)], [4, 4]), "one size for each of the 1 batches"),
        (lambda: kron_rotate(torch.zeros(2, 5), [torch.eye(2), torch.eye(3)]), "last dimension 6"),
        (
            lambda: kron_rotate(torch.zeros(2, 6), [torch.zeros(2, 3)]),
            r"factors\[0\] must be square",
        ),
        (lambda: kron_rotate(torch.zeros(2, 6), []), "at least one square matrix"),
        (lambda: kron_gram(torch.zeros(2, 6), torch.zeros(3, 6), (6,)), "b must have the shape"),
        (lambda: kron_gram(torch.zeros(2, 6), torch.zeros(2, 6), (4,)), "dims must have product 6"),
        (lambda: kron_rotate(torch.zeros(2, 6), [torch.eye(6).to("meta")]), "must be on cpu"),
        (lambda: cayley([torch.zeros(1, 3), torch.zeros(1, 3).to("meta")], [3, 3]), "be on cpu"),
        (lambda: kron_gram(torch.zeros(2, 6), torch.zeros(2, 6).to("meta"), (6,)), "and device"),
        (lambda: rotated_linear(X, X, [torch.eye(5)]), "factors must have product 6"),
        (lambda: rotated_linear(X, X, FACTORS, scale=torch.ones(5)), r"scale must have shape \(6,"),
        (lambda: rotated_linear(X, X, FACTORS, bias=torch.ones(5)), r"bias must have shape \(2,"),
        (lambda: rotated_linear(X, X, FACTORS, subtract=X.mT), "subtract must have the shape"),
        (lambda: rotated_linear(X.long(), X, FACTORS), "x must have a floating-point dtype"),
        (lambda: rotated_linear(X, X[0], FACTORS), "matrix must have 2 dimensions"),
        (lambda: low_rank_linear(X.long(), X, X.mT), "x must have a floating-point dtype"),
        (lambda: low_rank_linear(X, X, X), "up must have last dimension 2"),
        (lambda: soda_linear(X, BASIS, torch.ones(5), FACTORS), r"spectrum must have shape \(6,"),
        (lambda: soda_linear(X, BASIS, torch.ones(6).int(), FACTORS), "spectrum must have a float"),
        (
            lambda: soda_linear(X, BASIS, torch.ones(6), FACTORS, torch.ones(5)),
            r"bias must have shape \(6,",
        ),
        (
            lambda: soda_linear(X, BASIS, torch.ones(6), FACTORS, base_weight=X),
            r"base_weight must have shape \(6, 6\)",
        ),
        (
            lambda: soda_linear(X, BASIS._replace(left=X.mT), torch.ones(6), FACTORS),
            "basis.left must have 6 columns",
        ),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cayley(torch.zeros(2, 6), 4.0), "n must be an int"),
        (lambda: cayley([[0.0]], [2]), r"packed\[0\] must be a torch.Tensor"),
        (lambda: kron_rotate(torch.zeros(2, 4), torch.eye(4)), "factors must be a sequence"),
        (lambda: kron_rotate([[1.0]], [torch.eye(1)]), "x must be a torch.Tensor"),
        (lambda: cayley(None, 4), "packed must be a tensor or a sequence of tensors; got NoneType"),
        (lambda: kron_gram(X, X, (2.0, 3)), "dims must hold ints"),
        (lambda: kron_gram(X, X, 6), "dims must be a sequence of ints"),
        (lambda: soda_linear(X, tuple(BASIS), torch.ones(6), FACTORS), "basis must be a Spectral"),
        (lambda: soda_linear(X, BASIS, [1.0] * 6, FACTORS), "spectrum must be a torch.Tensor"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()
