"""The SODA layers: values, gradients, numerics, persistence, and errors."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from support import assert_near, dense_soda_weight, randomise, relative_error
from torch.utils.checkpoint import checkpoint

from spectral_adapters import SODAConv2d, SODALinear
from spectral_adapters.factors import PUBLISHED_FACTORS, balanced_factors

PLANS = ("factored", "merged", "tokens")
METHODS = list(itertools.product(("svd", "qr"), ("left", "right", None)))
ACTIVATIONS = ("identity", "relu", "softplus")


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 13), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parametrization", ["cayley", "stiefel"])
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_values_and_gradients_against_the_definition(
    decomposition, rotation, parametrization, activation, shape
):
    out_features, in_features = shape
    base = torch.nn.Linear(in_features, out_features).double()
    layer = SODALinear.from_linear(
        base,
        decomposition=decomposition,
        rotation=rotation,
        parametrization=parametrization,
        spectrum_activation=activation,
    )
    x = torch.randn(3, 4, in_features, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(layer.get_delta_weight()) == 0

    randomise(layer)
    dense = dense_soda_weight(layer)
    torch.testing.assert_close(layer.merged_weight(), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.get_delta_weight(), dense - base.weight, rtol=1e-12, atol=1e-12
    )
    inputs = [x, layer.delta, *layer.rotation]
    expected_y = x @ dense.mT + base.bias
    expected = torch.autograd.grad(expected_y.sin().sum(), inputs)
    for plan in PLANS:
        layer.plan = plan
        y = layer(x)
        torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(y.sin().sum(), inputs)
        for actual, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer.to_linear()(x), expected_y, rtol=1e-12, atol=1e-12)


GEOMETRIES = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"groups": 2},
    {"bias": False},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_convolution_against_the_definition(decomposition, rotation, geometry):
    base = torch.nn.Conv2d(4, 6, 3, **geometry).double()
    layer = SODAConv2d.from_conv2d(base, decomposition=decomposition, rotation=rotation)
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-12, atol=1e-12)
    randomise(layer)
    dense = copy.deepcopy(base).requires_grad_(False)
    weight = dense_soda_weight(layer).view(base.weight.shape)
    expected_y = torch.func.functional_call(dense, {"weight": weight}, (x,))
    inputs = [x, layer.delta, *layer.rotation]
    expected = torch.autograd.grad(expected_y.sin().sum(), inputs)
    for plan in ("auto", "merged") if base.groups > 1 else PLANS:
        layer.plan = plan
        y = layer(x)
        torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
        for actual, wanted in zip(
            torch.autograd.grad(y.sin().sum(), inputs), expected, strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.to_conv2d()(x), expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-12, atol=1e-12)
    assert layer(x[:0]).shape == (0, *expected_y.shape[1:])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_a_fresh_layer_is_the_base_layer_in_every_dtype(decomposition, rotation, dtype, plan):
    """fp32: 1e-5 relative. Half precision: no worse than the base layer itself, against fp64."""
    base = torch.nn.Linear(96, 64, dtype=dtype)
    layer = SODALinear.from_linear(base, decomposition=decomposition, rotation=rotation, plan=plan)
    x = torch.randn(40, 96, dtype=dtype)
    exact = x.double() @ base.weight.double().mT + base.bias.double()
    y = layer(x)
    assert y.dtype == dtype
    own, error = relative_error(base(x), exact), relative_error(y, exact)
    if dtype == torch.float32:
        assert error <= 1e-5
    else:
        assert error <= 1.05 * own, (error, own)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_gradients_against_fp64(dtype, plan):
    base = torch.nn.Linear(48, 36, dtype=dtype)
    layer = randomise(SODALinear.from_linear(base, plan=plan))
    x = torch.randn(20, 48, dtype=dtype, requires_grad=True)
    weight = torch.randn(20, 36, dtype=dtype)
    (layer(x) * weight).sum().backward()

    wide = copy.deepcopy(layer).double()
    x_wide = x.detach().double().requires_grad_()
    ((x_wide @ dense_soda_weight(wide).mT) * weight.double()).sum().backward()
    assert_near(x.grad, x_wide.grad)
    for actual, expected in zip(
        [layer.delta, *layer.rotation], [wide.delta, *wide.rotation], strict=True
    ):
        assert actual.grad.dtype == torch.float32
        assert_near(actual.grad, expected.grad)


def test_autocast_returns_the_autocast_dtype():
    layer = SODALinear(24, 20)
    x = torch.randn(5, 24)
    for plan in PLANS:
        layer.plan = plan
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_near(y, x.double() @ layer.merged_weight().double().mT + layer.bias.double())
        y.float().sum().backward()
        assert layer.delta.grad.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing():
    layer = randomise(SODALinear(24, 20))
    x = torch.randn(5, 24, requires_grad=True)
    inputs = [x, layer.delta, *layer.rotation]
    plain = torch.autograd.grad(layer(x).sin().sum(), inputs)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sin().sum(), inputs)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan", PLANS)
def test_empty_batches_and_strided_inputs(plan):
    layer = randomise(SODALinear(24, 20, plan=plan))
    for shape in ((0, 24), (2, 0, 24)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], 20)
        y.sum().backward()
        assert x.grad.shape == x.shape and torch.count_nonzero(layer.delta.grad) == 0
    x = torch.randn(24, 7).mT
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


def test_prime_dimensions_use_one_full_rotation():
    layer = randomise(SODALinear(13, 17))
    assert layer.factor_sizes == (13,)
    x = torch.randn(4, 13)
    assert_near(layer(x), x.double() @ dense_soda_weight(layer).mT + layer.bias.double())


def test_frozen_and_trained_numbers_keep_fp32_when_the_model_is_cast():
    layer = randomise(SODALinear(24, 20))
    before = copy.deepcopy(layer)
    layer.to(torch.bfloat16)
    layer.half()
    for name, tensor in before.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    layer.double()
    assert layer.left.dtype == layer.delta.dtype == torch.float64
    assert layer(torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64


def test_only_the_adapter_is_trained():
    layer = SODALinear(24, 20, factors=(4, 5))
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"delta", "rotation.0", "rotation.1"}
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 20 + 6 + 10
    assert SODALinear(24, 20, rotation="right", factors=(24,)).rotation[0].numel() == 276


@pytest.mark.parametrize("save_factors", [True, False])
@pytest.mark.parametrize("parametrization", ["cayley", "stiefel"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_state_dict_copy_pickle_and_save(kind, parametrization, save_factors):
    options = {"parametrization": parametrization, "save_factors": save_factors}
    if kind == "linear":
        base, x = torch.nn.Linear(24, 20), torch.randn(3, 24)
        make = lambda: SODALinear.from_linear(base, **options)  # noqa: E731
    else:
        base, x = torch.nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
        make = lambda: SODAConv2d.from_conv2d(base, **options)  # noqa: E731
    layer = randomise(make())
    expected = layer(x)

    state = layer.state_dict()
    assert ("left" in state) == save_factors
    small = {"delta", "bias", "fingerprint", "rotation.0", "rotation.1"}
    assert set(state) - {"left", "singular_values", "right"} == small
    fresh = make()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), expected)

    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)


def test_state_dict_with_factors_restores_a_layer_made_without_the_base():
    layer = randomise(SODALinear(24, 20))
    stranger = SODALinear(24, 20)
    stranger.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(stranger(x), layer(x))


def test_state_dict_survives_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = randomise(SODALinear(24, 20))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = SODALinear(24, 20)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 24)
    assert torch.equal(fresh(x), layer(x))


def test_moves_between_devices_with_its_dtype():
    layer = SODALinear(24, 20).to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(3, 24, device="meta")).shape == (3, 20)


def test_accessors():
    base = torch.nn.Linear(24, 20)
    layer = SODALinear.from_linear(base, factors=(4, 5))
    torch.testing.assert_close(layer.spectrum(), torch.linalg.svdvals(base.weight))
    assert [tuple(r.shape) for r in layer.rotation_factors()] == [(4, 4), (5, 5)]
    assert SODALinear(24, 20, rotation=None).rotation_factors() == ()
    linear = layer.to_linear()
    assert type(linear) is torch.nn.Linear and linear.weight.dtype == base.weight.dtype
    text = repr(layer)
    for part in ("20x24", "svd", "left", "cayley", "4x5", "trained=36"):
        assert part in text
    assert layer.plan_for(77).name in PLANS
    layer.plan = "merged"
    assert layer.plan_for(77).name == "merged" and "forced" in str(layer.plan_for(77))


def test_the_base_layer_is_left_alone():
    base = torch.nn.Linear(24, 20)
    before = copy.deepcopy(base.state_dict())
    layer = randomise(SODALinear.from_linear(base))
    layer.bias.data.zero_()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert base.weight.requires_grad


def test_softplus_spectrum_has_a_gradient_at_zero_singular_values():
    base = torch.nn.Linear(8, 8, bias=False)
    base.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    layer = SODALinear.from_linear(base, spectrum_activation="softplus")
    x = torch.randn(4, 8)
    assert torch.equal(layer.spectrum()[3:], torch.zeros(5))
    layer(x).pow(2).sum().backward()
    assert torch.isfinite(layer.delta.grad).all()


def test_published_and_balanced_factors():
    for dimension, sizes in PUBLISHED_FACTORS.items():
        assert torch.Size(sizes).numel() == dimension
    expected = {
        1: (1,), 2: (2,), 6: (2, 3), 13: (13,), 320: (16, 20), 640: (20, 32), 1280: (32, 40),
        2048: (32, 64), 3072: (48, 64), 257: (257,), 514: (2, 257), 8192: (64, 128),
        11008: (86, 128), 4 * 1009: (2, 2, 1009), 127 * 127 * 2: (2, 127, 127),
    }  # fmt: skip
    for dimension, sizes in expected.items():
        assert balanced_factors(dimension) == sizes
    for bad in (0, -3):
        with pytest.raises(ValueError, match="dimension must be at least 1"):
            balanced_factors(bad)
    with pytest.raises(TypeError, match="dimension must be an int"):
        balanced_factors(4.0)


def test_grouped_convolutions_refuse_the_plans_they_do_not_have():
    with pytest.raises(ValueError, match="2 groups; got 'factored'"):
        SODAConv2d(4, 6, 3, groups=2, plan="factored")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (3, 4)}, r"factors must have product 20 .*got \(3, 4\) with product 12"),
        ({"factors": ()}, "factors must have product 20"),
        ({"factors": (-4, -5)}, "factors must hold positive ints"),
        ({"rotation": "right", "factors": (4, 5)}, "factors must have product 24"),
        ({"rotation": None, "factors": (4, 5)}, "factors must be None when rotation is None"),
        ({"decomposition": "lu"}, "decomposition must be one of 'svd', 'qr'; got 'lu'"),
        ({"rotation": "both"}, "rotation must be one of"),
        ({"parametrization": "euler"}, "parametrization must be one of"),
        ({"spectrum_activation": "gelu"}, "spectrum_activation must be one of"),
        ({"plan": "fast"}, "plan must be one of 'auto', 'factored', 'merged', 'tokens'"),
        ({"base_dtype": torch.int8}, "base_dtype must be one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SODALinear.from_linear(torch.nn.Linear(24, 20), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SODALinear.from_linear(torch.nn.Conv2d(2, 2, 1)), "linear must be a torch.nn"),
        (lambda: SODAConv2d.from_conv2d(torch.nn.Linear(2, 2)), "conv must be a torch.nn.Conv2d"),
        (lambda: SODALinear(24, 20, factors="45"), "factors must be a sequence of ints"),
        (lambda: SODALinear(24, 20, factors=(4.0, 5)), "factors must hold ints"),
        (lambda: SODALinear(24, 20)([1.0]), "x must be a torch.Tensor"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_bad_weights_and_inputs_are_named():
    base = torch.nn.Linear(24, 20)
    with torch.no_grad():
        base.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        SODALinear.from_linear(base)
    base.weight = torch.nn.Parameter(torch.ones(20, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weight must have a floating-point dtype"):
        SODALinear.from_linear(base)
    with pytest.raises(ValueError, match="meta device"):
        SODALinear.from_linear(torch.nn.Linear(24, 20, device="meta"))
    layer = SODALinear(24, 20)
    with pytest.raises(ValueError, match="x must have last dimension 24"):
        layer(torch.randn(3, 23))
    with pytest.raises(ValueError, match="x must have a floating-point dtype"):
        layer(torch.ones(3, 24, dtype=torch.int64))
    conv = SODAConv2d(4, 6, 3)
    with pytest.raises(ValueError, match="x must have 3 or 4 dimensions"):
        conv(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"x must have 4 channels.*got shape \(1, 3, 8, 8\)"):
        conv(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"x must reach, with its padding, over the kernel's 3x3"):
        conv(torch.randn(1, 4, 2, 8))
    with pytest.raises(TypeError, match="save_factors must be True or False; got 'no'"):
        SODALinear(24, 20, save_factors="no")


def test_parametrised_parameters_are_found():
    """What ``torch.nn.utils.parametrize`` puts in a parameter's place is used instead of it."""

    class Half(torch.nn.Module):
        def forward(self, values):
            return values / 2

    layer = randomise(SODALinear(24, 20))
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in (expected.delta, *expected.rotation):
            parameter.div_(2)
    torch.nn.utils.parametrize.register_parametrization(layer, "delta", Half())
    for name in list(layer.rotation._parameters):
        torch.nn.utils.parametrize.register_parametrization(layer.rotation, name, Half())
    x = torch.randn(5, 24)
    assert_near(layer(x), expected(x).double())
    layer(x).square().sum().backward()
    expected(x).square().sum().backward()
    found = layer.parametrizations["delta"].original.grad
    assert_near(found, expected.delta.grad.double() / 2, factor=3)


@pytest.mark.parametrize("plan", ["tokens", "factored", "merged"])
def test_backward_inside_autocast(plan):
    """The forward chose the dtypes; the CPU's one pass over the tokens takes no others."""
    layer = SODALinear.from_linear(torch.nn.Linear(20, 12), plan=plan)
    randomise(layer)
    x = torch.randn(5, 20, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(layer(x).sin().sum(), wanted)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sin().sum(), wanted)
    for actual, gradient in zip(inside, expected, strict=True):
        assert actual.dtype == gradient.dtype
        torch.testing.assert_close(actual, gradient)
