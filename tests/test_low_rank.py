"""Spectral Adapters A and R and SVDiff as stand-alone layers: definition, identity, persistence."""

import copy
import io
import pickle

import pytest
import torch
from support import assert_near, random_rotation
from torch import nn
from torch.nn.functional import linear

from spectral_adapters import SpectralAdapterALinear, SpectralAdapterRLinear, SVDiffLinear
from spectral_adapters.autograd import LowRankLinearFunction
from spectral_adapters.decomposition import decompose_columns, select_columns
from spectral_adapters.functional import (
    SpectralBasis,
    adapted_linear,
    cayley,
    low_rank_factors,
    low_rank_linear,
    low_rank_spectral_linear,
)

LAYERS = [SpectralAdapterALinear, SpectralAdapterRLinear]
SHAPES = [(12, 20), (20, 12), (7, 13), (1, 5), (5, 1)]


def trained(layer, scale=0.3):
    """The layer away from the identity."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, scale)
    return layer


def dense_weight(layer):
    """The definition of W' in float64."""
    left, singular_values, right = (part.double() for part in layer.basis)
    base, middle = layer.base.weight.double(), torch.diag(singular_values)
    if isinstance(layer, SpectralAdapterALinear):
        shift_left, shift_right = layer.shift_left.double(), layer.shift_right.double()
        changed = (left + shift_left) @ middle @ (right.mT + shift_right).mT
    else:
        r = len(singular_values)
        packed = (layer.rotation_left, layer.rotation_right)
        turn_left, turn_right = (cayley(p[None].double(), r)[0] for p in packed)
        changed = left @ turn_left @ middle @ turn_right.mT @ right
    return base + changed - left @ middle @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", LAYERS)
def test_values_and_gradients_against_the_definition(cls, shape):
    out_features, in_features = shape
    base = nn.Linear(in_features, out_features).double()
    layer = cls.from_linear(base, r=min(4, *shape))
    x = torch.randn(3, 4, in_features, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), base(x))
    assert torch.count_nonzero(layer.get_delta_weight()) == 0
    assert torch.equal(layer.merged_weight(), base.weight)

    trained(layer)
    dense = dense_weight(layer)
    torch.testing.assert_close(layer.merged_weight(), dense, rtol=1e-12, atol=1e-12)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected_y = x @ dense.mT + base.bias
    expected = torch.autograd.grad(expected_y.sin().sum(), wanted)
    y = layer(x)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    for actual, exact in zip(torch.autograd.grad(y.sin().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer.to_linear()(x), expected_y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", LAYERS)
def test_every_trained_parameter_moves_from_the_identity(cls):
    layer = cls.from_linear(nn.Linear(9, 6), r=3)
    x, target = torch.randn(8, 9), torch.randn(8, 6)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.count_nonzero(p) for p in layer.parameters() if p.requires_grad)
    assert all(p.grad is None for p in layer.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", LAYERS)
def test_half_precision_bases_keep_trained_numbers_in_fp32(cls, dtype):
    base = nn.Linear(20, 12).to(dtype)
    layer = cls.from_linear(base, r=3)
    x = torch.randn(5, 20).to(dtype)
    assert torch.equal(layer(x), base(x))
    trained(layer)
    y = layer(x)
    assert y.dtype == dtype
    exact = x.double() @ dense_weight(layer).mT + base.bias.double()
    assert_near(y, exact, factor=2)
    wide = {name: p for name, p in layer.named_parameters() if not name.startswith("base.")}
    assert {p.dtype for p in wide.values()} == {torch.float32}
    layer.to(torch.float32).to(dtype)
    assert layer.base.weight.dtype == dtype
    assert layer.left.dtype == torch.float32


@pytest.mark.parametrize("cls", LAYERS)
def test_the_base_weight_is_shared_not_copied(cls):
    base = nn.Linear(20, 12)
    layer = cls.from_linear(base, r=3)
    assert layer.base.weight.data_ptr() == base.weight.data_ptr()
    assert base.weight.requires_grad and not layer.base.weight.requires_grad


@pytest.mark.parametrize("cls", LAYERS)
def test_autocast_and_compile(cls):
    layer = trained(cls.from_linear(nn.Linear(20, 12), r=3))
    x = torch.randn(5, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize("save_factors", [True, False])
@pytest.mark.parametrize("cls", LAYERS)
def test_reload_keeps_the_trained_layer(cls, save_factors):
    base = nn.Linear(20, 12)
    layer = trained(cls.from_linear(base, r=3, save_factors=save_factors))
    x = torch.randn(5, 20)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    state = layer.state_dict()
    assert ("base.weight" in state) == ("left" in state) == save_factors
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = cls.from_linear(base, r=3, save_factors=save_factors)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), expected)
    other = cls.from_linear(nn.Linear(20, 12), r=3, save_factors=save_factors)
    if save_factors:
        other.load_state_dict(state)
        assert torch.equal(other(x), expected)
    else:
        with pytest.raises(RuntimeError, match=r"refused.*another base weight"):
            other.load_state_dict(state)


def test_svdiff_is_the_published_formula():
    base = nn.Linear(9, 6).double()
    layer = SVDiffLinear.from_linear(base)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.delta.normal_(0, 1)
    left, singular_values, right = torch.linalg.svd(base.weight, full_matrices=False)
    dense = left @ torch.diag((singular_values + layer.delta).relu()) @ right
    torch.testing.assert_close(layer.merged_weight(), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), x @ dense.mT + base.bias, rtol=1e-12, atol=1e-12)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["delta"]
    assert isinstance(SVDiffLinear(9, 6)(torch.randn(2, 9)), torch.Tensor)


@pytest.mark.parametrize(
    ("columns", "r", "offset", "expected"),
    [
        ("top", 3, 0, (0, 1, 2)),
        ("top", 3, 4, (4, 5, 6)),
        ("bottom", 3, 0, (7, 8, 9)),
        ("bottom", 3, 2, (5, 6, 7)),
        ([8, 1], None, 0, (8, 1)),
        ([8, 1], 2, 0, (8, 1)),
        ("top", None, 0, tuple(range(8))),
    ],
)
def test_selected_columns(columns, r, offset, expected):
    assert select_columns(columns, r, 10, offset) == expected
    layer = SpectralAdapterALinear.from_linear(
        nn.Linear(10, 11), r=r, columns=columns, offset=offset, algorithm="full"
    )
    values = torch.linalg.svdvals(layer.base.weight)
    torch.testing.assert_close(layer.singular_values, values[list(expected)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 11}, ValueError, r"r \+ offset must be at most the rank 10.*got 11 \+ 0"),
        ({"r": 4, "offset": 7}, ValueError, r"r \+ offset must be at most the rank 10"),
        ({"r": 0}, ValueError, "r must be an int of at least 1; got 0"),
        ({"r": True}, ValueError, "r must be an int"),
        ({"offset": -1}, ValueError, "offset must be an int of at least 0; got -1"),
        ({"columns": "middle"}, ValueError, "columns must be one of 'top', 'bottom'"),
        ({"columns": [1, 1]}, ValueError, "columns must hold different indices from 0 to 9"),
        ({"columns": [10]}, ValueError, "columns must hold different indices from 0 to 9"),
        ({"columns": []}, ValueError, "columns must hold different indices"),
        ({"columns": [0.5]}, TypeError, "columns must hold ints; got 0.5"),
        ({"columns": [1, 2], "r": 3}, ValueError, "r must be None or the number of columns, 2"),
        ({"columns": [1, 2], "offset": 3}, ValueError, "offset must be 0"),
        ({"algorithm": "exact"}, ValueError, "algorithm must be one of 'randomized', 'full'"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SpectralAdapterALinear.from_linear(nn.Linear(10, 11), **options)


@pytest.mark.parametrize("cls", [*LAYERS, SVDiffLinear])
def test_bad_layers_are_refused(cls):
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear; got Conv2d"):
        cls.from_linear(nn.Conv2d(1, 1, 1))
    broken = nn.Linear(10, 10)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        cls.from_linear(broken)
    with pytest.raises(ValueError, match="meta device"):
        cls.from_linear(nn.Linear(10, 10, device="meta"))


def falling_spectrum(rows, columns, decay):
    rank = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, rank).double()).Q for n in (rows, columns))
    return (left * decay ** torch.arange(rank).double()) @ right.mT


def test_randomized_columns_are_those_of_the_full_decomposition():
    weight = falling_spectrum(120, 200, 0.8)
    chosen = (0, 1, 5, 9)
    fast = decompose_columns(weight, chosen)
    exact = decompose_columns(weight, chosen, "full")
    for actual, expected in zip(fast, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_randomized_columns_of_a_flat_spectrum_stay_orthonormal_and_near_the_top():
    weight = torch.randn(200, 160)
    fast = decompose_columns(weight, range(8))
    for columns in (fast.left, fast.right.mT):
        torch.testing.assert_close(columns.mT @ columns, torch.eye(8), rtol=0, atol=1e-5)
    exact = torch.linalg.svdvals(weight)[:8]
    assert bool((fast.singular_values > 0.97 * exact).all())


def test_randomized_columns_do_not_depend_on_the_state_of_the_generator():
    weight = torch.randn(100, 90)
    torch.manual_seed(1)
    first = decompose_columns(weight, range(4))
    torch.manual_seed(2)
    second = decompose_columns(weight, range(4))
    assert all(map(torch.equal, first, second))


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def trained_arguments(kind, out_features, in_features, r):
    """Keyword argument and leaves: shifts, or the packed parameters of rotations."""
    if kind == "shifts":
        leaves = doubles(out_features, r), doubles(in_features, r)
    else:
        leaves = doubles(r * (r - 1) // 2), doubles(r * (r - 1) // 2)
    return [leaf.requires_grad_() for leaf in leaves]


def as_arguments(kind, first, second, r):
    if kind == "shifts":
        return {"shifts": (first, second)}
    left, right = cayley(torch.stack([first, second]), r)
    return {"rotations": (left, right)}


@pytest.mark.parametrize("shape", [(3, 4, 2), (4, 3, 3), (1, 5, 1), (5, 1, 1)])
@pytest.mark.parametrize("kind", ["shifts", "rotations"])
def test_gradcheck(kind, shape):
    out_features, in_features, r = shape
    basis = SpectralBasis(doubles(out_features, r), doubles(r).abs(), doubles(r, in_features))
    weight, bias = doubles(out_features, in_features), doubles(out_features).requires_grad_()
    x = doubles(2, 3, in_features).requires_grad_()
    leaves = trained_arguments(kind, out_features, in_features, r)

    def product(x, bias, first, second):
        arguments = as_arguments(kind, first, second, r)
        return low_rank_spectral_linear(x, weight, basis, bias=bias, **arguments)

    assert torch.autograd.gradcheck(product, (x, bias, *leaves))


def test_gradcheck_of_two_thin_matrices_with_every_start():
    x, down, up = (doubles(*shape).requires_grad_() for shape in ((2, 3, 4), (2, 4), (5, 2)))
    assert torch.autograd.gradcheck(low_rank_linear, (x, down, up))
    base = doubles(2, 3, 5).requires_grad_()
    onto = lambda x, down, up, base: adapted_linear(  # noqa: E731
        LowRankLinearFunction, x, (down, up), scaling=0.5, base=base
    )
    assert torch.autograd.gradcheck(onto, (x, down, up, base))
    # A weight that is trained too has its own gradient.
    weight, bias = doubles(5, 4).requires_grad_(), doubles(5).requires_grad_()
    both = lambda x, down, up, weight, bias: adapted_linear(  # noqa: E731
        LowRankLinearFunction, x, (down, up), weight=weight, bias=bias
    )
    assert torch.autograd.gradcheck(both, (x, down, up, weight, bias))


@pytest.mark.parametrize("kind", ["shifts", "rotations"])
def test_only_what_is_asked_for_is_differentiated(kind):
    r = 3
    basis = SpectralBasis(doubles(5, r), doubles(r).abs(), doubles(r, 4))
    weight, x = doubles(5, 4), doubles(7, 4).requires_grad_()
    first, second = trained_arguments(kind, 5, 4, r)
    whole = low_rank_spectral_linear(x, weight, basis, **as_arguments(kind, first, second, r))
    expected = torch.autograd.grad(whole.sin().sum(), [x, first, second])
    for i, wanted in enumerate((x, first, second)):
        parts = [t if t is wanted else t.detach() for t in (x, first, second)]
        arguments = as_arguments(kind, *parts[1:], r)
        y = low_rank_spectral_linear(parts[0], weight, basis, **arguments)
        (actual,) = torch.autograd.grad(y.sin().sum(), wanted)
        torch.testing.assert_close(actual, expected[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["shifts", "rotations"])
def test_functions_compile_without_a_graph_break(kind):
    r = 3
    basis = SpectralBasis(torch.randn(6, r), torch.rand(r), torch.randn(r, 4))
    weight, bias = torch.randn(6, 4), torch.randn(6)
    first, second = (p.detach().float() for p in trained_arguments(kind, 6, 4, r))
    leaves = [torch.randn(5, 4), first, second]

    def product(x, first, second):
        arguments = as_arguments(kind, first, second, r)
        return low_rank_spectral_linear(x, weight, basis, bias=bias, **arguments)

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(*leaves), product(*leaves))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(product(*leaves).sin().sum(), leaves)
    for actual, gradient in zip(
        torch.autograd.grad(compiled(*leaves).sin().sum(), leaves), expected, strict=True
    ):
        assert_near(actual, gradient)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_hooked_or_trained_base_keeps_its_own_product(cls):
    layer = trained(cls.from_linear(nn.Linear(20, 12), r=3))
    x = torch.randn(5, 20)
    fused = layer(x)
    seen = []
    handle = layer.base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), fused)
    assert len(seen) == 1
    handle.remove()
    layer.base.weight.requires_grad_()
    torch.testing.assert_close(layer(x), fused)
    layer(x).sum().backward()
    dense = layer.base.weight.detach().clone().requires_grad_()
    linear(x, dense).sum().backward()
    torch.testing.assert_close(layer.base.weight.grad, dense.grad)


@pytest.mark.parametrize("cls", LAYERS)
def test_backward_inside_autocast(cls):
    layer = trained(cls.from_linear(nn.Linear(20, 12), r=3))
    x = torch.randn(5, 20, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(layer(x).sin().sum(), wanted)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sin().sum(), wanted)
    for actual, gradient in zip(inside, expected, strict=True):
        assert actual.dtype == gradient.dtype
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("cls", LAYERS)
def test_torch_func_sees_the_same_gradients(cls):
    layer = trained(cls.from_linear(nn.Linear(9, 6).double(), r=3))
    x, values = doubles(4, 9), {n: p for n, p in layer.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in values.items()})
    expected = torch.autograd.grad(loss(values), values.values())
    for name, gradient in zip(values, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient)


def test_low_rank_function_refuses_what_does_not_fit():
    basis = SpectralBasis(torch.eye(5)[:, :2], torch.ones(2), torch.eye(4)[:2])
    rotation = random_rotation(2, dtype=torch.float32)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    low_rank_spectral_linear(x, weight, basis, rotations=(rotation, rotation))
    with pytest.raises(ValueError, match=r"exactly one of shifts and rotations.*neither"):
        low_rank_factors(basis)
    with pytest.raises(ValueError, match=r"rotations\[1\] must have shape \(2, 2\); got \(3, 3\)"):
        low_rank_factors(basis, rotations=(rotation, torch.eye(3)))
    with pytest.raises(ValueError, match=r"shifts\[0\] must have shape \(5, 2\); got \(4, 2\)"):
        low_rank_factors(basis, shifts=(torch.zeros(4, 2), torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="basis"):
        low_rank_spectral_linear(
            x, torch.randn(6, 4), basis, shifts=(torch.zeros(5, 2), torch.zeros(4, 2))
        )
    with pytest.raises(ValueError, match="x must have last dimension 4"):
        low_rank_spectral_linear(x[:, :3], weight, basis, rotations=(rotation, rotation))
    with pytest.raises(ValueError, match="shifts must hold 2 matrices; got 1"):
        low_rank_factors(basis, shifts=(torch.zeros(5, 2),))
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\); got \(4,\)"):
        low_rank_spectral_linear(
            x, weight, basis, rotations=(rotation, rotation), bias=torch.zeros(4)
        )


def test_low_rank_function_takes_rotations_of_any_precision():
    basis = SpectralBasis(torch.eye(5)[:, :2], torch.ones(2), torch.eye(4)[:2])
    x, weight, rotation = torch.randn(3, 4), torch.randn(5, 4), torch.eye(2)
    expected = low_rank_spectral_linear(x, weight, basis, rotations=(rotation, rotation))
    for other in (rotation.bfloat16(), rotation.double()):
        for rotations in ((other, rotation), (other, other)):
            found = low_rank_spectral_linear(x, weight, basis, rotations=rotations)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cls", [SpectralAdapterALinear, SpectralAdapterRLinear])
def test_bad_input_of_a_layer_is_named(cls):
    layer = cls(4, 5, r=2)
    with pytest.raises(ValueError, match=r"x must have last dimension 4.*got shape \(3, 7\)"):
        layer(torch.randn(3, 7))
    with pytest.raises(ValueError, match="x must have a floating-point dtype"):
        layer(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor; got NoneType"):
        layer(None)


def test_raw_ops_read_nothing_that_is_not_there():
    """The backward ops of the extension check what their loops run over."""
    pytest.importorskip("spectral_kernels._C", reason="needs the extension")
    grad, x, r = torch.randn(3, 5), torch.randn(3, 4), 2
    left, values, right = torch.randn(5, r), torch.ones(r), torch.randn(r, 4)
    shifts, turns = (torch.randn(5, r), torch.randn(4, r)), (torch.eye(r), torch.eye(r))
    a, r_ = torch.ops.spectral.spectral_a_linear_bwd, torch.ops.spectral.spectral_r_linear_bwd
    needs = (1.0, True, True)
    thin = torch.randn(3, 2 * r)
    a(grad, x, None, thin, left, values, right, *shifts, *needs)
    r_(grad, None, thin[:, :r], left, values, right, *turns, *needs)
    with pytest.raises(ValueError, match="singular_values must have shape"):
        a(grad, x, None, thin, left, values[:1], right, *shifts, *needs)
    with pytest.raises(ValueError, match="right must have shape"):
        a(grad, x, None, thin, left, values, right[:1], *shifts, *needs)
    with pytest.raises(ValueError, match="thin must have shape"):
        a(grad, x, None, thin[:, :r], left, values, right, *shifts, *needs)
    with pytest.raises(ValueError, match="singular_values must have shape"):
        r_(grad, None, thin[:, :r], left, values[:1], right, *turns, *needs)
    with pytest.raises(ValueError, match="thin must have shape"):
        r_(grad, None, thin[:2, :r], left, values, right, *turns, *needs)
