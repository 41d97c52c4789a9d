"""Frozen bases kept in the base weight's dtype: half the memory, nothing small lost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import TOLERANCE, assert_near, dense_soda_weight, randomise, relative_error
from torch import Tensor, nn

from spectral_adapters import SODAConv2d, SODALinear, SVDiffLinear
from spectral_adapters.autograd import (
    Deferral,
    KeptGradient,
    MergedLinearFunction,
    kept_gradient,
)
from spectral_adapters.functional import soda_weight
from spectral_adapters.peft import SODAConfig, SVDiffConfig
from spectral_adapters.planner import PLANS

HALVES = [torch.bfloat16, torch.float16]
METHODS = [
    (decomposition, rotation)
    for decomposition in ("svd", "qr")
    for rotation in ("left", "right", None)
]


def frozen_bytes(layer: nn.Module) -> int:
    return sum(p.nbytes for name, p in layer.named_parameters() if name in ("left", "right"))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_values_and_gradients_against_fp64(decomposition, rotation, dtype, plan):
    """What a layer computes is exact for the basis that it keeps."""
    base = nn.Linear(48, 36, dtype=dtype)
    layer = SODALinear.from_linear(
        base, decomposition=decomposition, rotation=rotation, plan=plan, basis_dtype="base"
    )
    assert layer.left.dtype == layer.right.dtype == dtype
    assert layer.delta.dtype == layer.spectrum().dtype == torch.float32
    whole = SODALinear.from_linear(base, decomposition=decomposition, rotation=rotation)
    assert whole.left.dtype == torch.float32 and frozen_bytes(whole) == 2 * frozen_bytes(layer)

    randomise(layer)
    # In fp32, where only an error of the code's own shows.
    x = torch.randn(20, 48, requires_grad=True)
    y = layer(x)
    y.sin().sum().backward()
    wide = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ dense_soda_weight(wide).mT + wide.bias
    exact.sin().sum().backward()
    assert_near(y, exact)
    assert_near(x.grad, exact_x.grad)
    for actual, expected in zip(
        [layer.delta, *layer.rotation], [wide.delta, *wide.rotation], strict=True
    ):
        assert_near(actual.grad, expected.grad, factor=3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_small_changes_are_not_lost(decomposition, rotation, dtype):
    """A rotation by 1e-4 is far below the rounding of the basis, and as exact as any other."""
    base = nn.Linear(48, 36, dtype=dtype)
    layer = SODALinear.from_linear(
        base, decomposition=decomposition, rotation=rotation, basis_dtype="base"
    )
    assert torch.count_nonzero(layer.get_delta_weight()) == 0
    untrained = dense_soda_weight(copy.deepcopy(layer).double())
    randomise(layer, scale=1e-4)
    delta = layer.get_delta_weight()
    assert delta.dtype == torch.float32
    expected = dense_soda_weight(copy.deepcopy(layer).double()) - untrained
    # The change is 1e-4 of the weight, and fp32 knows that to six digits.
    assert relative_error(delta, expected) <= 5e-3
    assert relative_error(layer.merged_weight(), untrained + expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_fresh_layer_is_the_base_layer_up_to_the_rounding_of_the_basis(dtype):
    base = nn.Linear(96, 64, dtype=dtype)
    x = torch.randn(200, 96, dtype=dtype)
    exact = x.double() @ base.weight.double().mT + base.bias.double()
    own = (base(x).double() - exact).norm()
    for plan in PLANS:
        layer = SODALinear.from_linear(base, plan=plan, basis_dtype="base")
        # Two factors rounded where one weight was: three roundings of one size instead of one.
        assert (layer(x).double() - exact).norm() <= 1.1 * math.sqrt(3) * own


def test_convolutions_and_svdiff_take_it_too():
    conv = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.bfloat16)
    layer = SODAConv2d.from_conv2d(conv, basis_dtype="base")
    assert layer.left.dtype == torch.bfloat16
    randomise(layer)
    x = torch.randn(2, 4, 7, 7)
    for plan in PLANS:
        layer.plan = plan
        weight = dense_soda_weight(copy.deepcopy(layer).double()).view(conv.weight.shape)
        expected = torch.conv2d(x.double(), weight, conv.bias.double(), padding=1)
        assert_near(layer(x), expected)
    linear = SVDiffLinear.from_linear(nn.Linear(8, 6).half(), basis_dtype="base")
    assert linear.left.dtype == torch.float16


def test_wide_bases_stay_as_they_are():
    for dtype in (torch.float32, torch.float64):
        layer = SODALinear.from_linear(nn.Linear(6, 4, dtype=dtype), basis_dtype="base")
        assert layer.left.dtype == layer.singular_values.dtype == dtype


@pytest.mark.parametrize("make", [SODAConfig, SVDiffConfig])
def test_unknown_choice(make):
    with pytest.raises(ValueError, match=r"must be one of 'float32', 'base'.*; got 'x'"):
        make(basis_dtype="x")
    with pytest.raises(ValueError, match="basis_dtype must be one of"):
        SODALinear(6, 4, basis_dtype="float16")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_base", [True, False])
def test_merged_products_in_half_precision(dtype, with_base):
    """The build's product is one in the layer's dtype; the difference in front of it is not."""
    base = nn.Linear(48, 36, bias=False, dtype=dtype)
    layer = SODALinear.from_linear(base, basis_dtype="base")
    frozen = base.weight.detach() if with_base else None

    def run(x: Tensor) -> Tensor:
        y, _, _ = MergedLinearFunction.apply(
            x,
            layer.spectrum(),
            *layer.basis,
            frozen,
            None,
            None,
            None,
            None,
            False,
            None,
            None,
            None,
            *layer.rotation_factors(),
        )
        return y

    x = torch.randn(64, 48, dtype=dtype, requires_grad=True)
    if with_base:
        assert torch.equal(run(x), base(x))
    randomise(layer)
    y = run(x)
    outer = torch.randn(y.shape, dtype=dtype)
    grads = torch.autograd.grad((y * outer).sum(), [x, layer.delta, *layer.rotation])

    wide = copy.deepcopy(layer).double()
    weight = dense_soda_weight(wide)
    if with_base:
        start = wide.left * wide.singular_values @ wide.right
        weight = base.weight.detach().double() + weight - start
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ weight.mT
    inputs = [exact_x, wide.delta, *wide.rotation]
    expected = torch.autograd.grad((exact * outer.double()).sum(), inputs)
    assert_near(y, exact)
    for actual, wanted in zip(grads, expected, strict=True):
        assert relative_error(actual, wanted) <= 2 * TOLERANCE[dtype]
    assert grads[1].dtype == torch.float32


def adapted(base: nn.Module, **options: object) -> PeftModel:
    torch.manual_seed(3)
    config = SODAConfig(target_modules=["0", "2"], init_weights=False, **options)
    return get_peft_model(base, config)


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def test_peft_keeps_the_basis_in_the_base_dtype(tmp_path):
    model = adapted(two_layers().bfloat16(), save_factors=True)
    layer = model.base_model.model[0]
    frozen = layer.soda_factors["default"]
    assert frozen.left.dtype == frozen.right.dtype == torch.bfloat16
    assert frozen.singular_values.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(two_layers().bfloat16(), tmp_path)
    again = loaded.base_model.model[0].soda_factors["default"]
    assert again.left.dtype == torch.bfloat16 and again.singular_values.dtype == torch.float32
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), model(x))

    wide = adapted(two_layers().bfloat16(), basis_dtype="float32").base_model.model[0]
    assert wide.soda_factors["default"].left.dtype == torch.float32
    change, exact = layer.get_delta_weight("default"), wide.get_delta_weight("default")
    assert 0 < (change - exact).norm() <= 4e-3 * exact.norm()


def test_a_model_that_is_cast_up_gets_what_its_weight_says():
    """The rounded basis does not stand in for a weight that is in fp32 now."""
    model = adapted(two_layers().bfloat16())
    half = [layer.get_delta_weight("default") for layer in model.base_model.model[::2]]
    model.float()
    frozen = model.base_model.model[0].soda_factors["default"]
    assert frozen.left.dtype == frozen.singular_values.dtype == torch.float32
    x = torch.randn(5, 12)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_near(model(x), merged(x).double(), factor=2)
    for layer, delta in zip(model.base_model.model[::2], half, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_adapters_of_different_precision_do_not_share():
    model = adapted(two_layers().bfloat16())
    for name, choice in (("same", "base"), ("wide", "float32")):
        config = SODAConfig(target_modules=["0", "2"], basis_dtype=choice)
        model.add_adapter(name, config)
    factors = model.base_model.model[0].soda_factors
    assert factors["default"] is factors["same"] and factors["default"] is not factors["wide"]


@pytest.mark.parametrize("kind", [KeptGradient, kept_gradient])
def test_waiting_gradients_are_summed_in_fp32(kind):
    """Additions of 2^-10 of the first would vanish in a bf16 sum."""
    deferral = Deferral()
    kept = kind(deferral)
    assert not kept.is_waiting
    deferral.is_on = True
    for size in (1.0, *[2.0**-10] * 64):
        assert kept.pass_on(torch.full((2, 2), size, dtype=torch.bfloat16)) is None
    assert kept.is_waiting
    deferral.is_on = False
    total = kept.pass_on(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert torch.equal(total, torch.full((2, 2), 1 + 64 * 2.0**-10))
    assert kept.sum is None and not kept.is_waiting


def test_merged_weight_of_the_functional_form():
    layer = randomise(SODALinear.from_linear(nn.Linear(10, 6).half(), basis_dtype="base"))
    weight = soda_weight(layer.basis, layer.spectrum(), layer.rotation_factors())
    assert weight.dtype == torch.float32
    assert_near(weight, dense_soda_weight(copy.deepcopy(layer).double()))
