"""Random configurations: a working layer or a clear error, never a crash or a wrong number.

``SPECTRAL_FUZZ=10000 pytest tests/test_fuzz.py`` tries that many per test; by default a few.
"""

from __future__ import annotations

import copy
import os
import re

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support import TOLERANCE, relative_error
from torch import nn

from spectral_adapters import (
    RotationBank,
    SODAConv2d,
    SODALinear,
    SpectralAdapterALinear,
    SpectralAdapterRLinear,
    SVDiffLinear,
)
from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
    absorb,
)

EXAMPLES = int(os.environ.get("SPECTRAL_FUZZ", "60"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    # The same few every time, unless somebody looks for more.
    derandomize="SPECTRAL_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

sizes = st.integers(1, 20)
floats = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
whole = st.sampled_from([torch.float32, torch.float64])


def option(*good, bad=()):
    """Mostly a good value, now and then a bad one."""
    values = st.sampled_from(good)
    return st.one_of(*[values] * 9, st.sampled_from([*bad, *good])) if bad else values


SODA = {
    "decomposition": option("svd", "qr", bad=("lu", None, 1)),
    "rotation": option("left", "right", None, bad=("up", 0)),
    "factors": st.one_of(
        st.none(), st.none(), st.lists(st.integers(-1, 7), max_size=4).map(tuple), st.just("3x4")
    ),
    "parametrization": option("cayley", "stiefel", bad=("householder",)),
    "spectrum_activation": option("identity", "relu", "softplus", bad=("gelu",)),
    "plan": option("auto", "factored", "merged", "tokens", bad=("fast",)),
    "basis_dtype": option("float32", "base", bad=("int8",)),
    "recompute": option(False, True, bad=(1, "yes")),
}
COLUMNS = {
    "r": st.one_of(st.none(), st.integers(-1, 12), st.just(2.5)),
    "columns": st.one_of(
        option("top", "bottom", bad=("middle",)), st.lists(st.integers(-2, 20), max_size=6)
    ),
    "offset": option(0, 0, 1, 3, bad=(-1, "1")),
    "algorithm": option("randomized", "full", bad=("lanczos",)),
}


def some(options: dict[str, st.SearchStrategy]) -> st.SearchStrategy[dict]:
    """Any part of the options."""
    return st.fixed_dictionaries({}, optional=options)


def is_clear(error: Exception, options: dict) -> bool:
    """Whether an error names an argument and what came, or says what does not go with what."""
    text = str(error)
    names = [*options, "weight", "bias", "factors", "r", "offset", "columns", "groups"]
    return len(text) > 20 and any(re.search(rf"\b{name}\b", text) for name in names)


def train(module: nn.Module, seed: int) -> None:
    """Move what is trained away from the identity; orthogonal factors stay orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            if "rotation" in name and parameter.dim() == 2:
                skew = noise.triu(1) - noise.triu(1).mT
                parameter.copy_(torch.linalg.matrix_exp(skew))
            else:
                parameter.copy_(noise)


def check_product(layer: nn.Module, x: torch.Tensor, dense) -> None:
    """Values and gradients against ``dense``, a copy in fp64 that multiplies with its merged
    weight."""
    x = x.requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    assert y.dtype == x.dtype
    outer = torch.randn(y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, [x, *trained], outer.to(y.dtype))
    wide = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    exact = dense(wide, exact_x)
    leaves = [exact_x, *[p for p in wide.parameters() if p.requires_grad]]
    expected = torch.autograd.grad(exact, leaves, outer)
    allowed = 8 * TOLERANCE[x.dtype]
    assert relative_error(y, exact) <= allowed
    largest = max((float(grad.abs().max()) for grad in expected if grad.numel()), default=0.0)
    for actual, wanted in zip(found, expected, strict=True):
        if wanted.numel():
            assert float((actual.double() - wanted).abs().max()) <= allowed * max(largest, 1e-6)


@fuzzed
@given(st.data())
def test_stand_alone_layers(data):
    rows, columns, dtype = data.draw(sizes), data.draw(sizes), data.draw(floats)
    seed, tokens = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 30))
    cls, table = data.draw(
        st.sampled_from(
            [
                (SODALinear, SODA),
                (SODALinear, SODA),
                (
                    SVDiffLinear,
                    {k: SODA[k] for k in ("spectrum_activation", "plan", "basis_dtype")},
                ),
                (SpectralAdapterALinear, COLUMNS),
                (SpectralAdapterRLinear, COLUMNS),
            ]
        )
    )
    options = data.draw(some(table))
    torch.manual_seed(seed)
    base = nn.Linear(columns, rows, bias=data.draw(st.booleans()), dtype=dtype)
    try:
        layer = cls.from_linear(base, **options)
    except (TypeError, ValueError) as error:
        assert is_clear(error, options), error
        return
    x = torch.randn(tokens, columns, dtype=dtype)
    train(layer, seed)

    def dense(wide, exact_x):
        bias = wide.base.bias if hasattr(wide, "base") else wide.bias
        return nn.functional.linear(exact_x, wide.merged_weight(), bias)

    with_bank = data.draw(st.booleans())
    if with_bank:
        RotationBank.attach(layer)
    check_product(layer, x, dense)
    state = copy.deepcopy(layer.state_dict())
    again = cls.from_linear(base, **options)
    again.load_state_dict(state)
    assert torch.equal(again.merged_weight(), layer.merged_weight())
    if hasattr(layer, "absorb") and data.draw(st.booleans()):
        before = layer.merged_weight().detach().double()
        layer.absorb()
        assert relative_error(layer.merged_weight(), before) <= 8 * TOLERANCE[dtype]


@fuzzed
@given(st.data())
def test_convolutions(data):
    groups = data.draw(st.sampled_from([1, 1, 2]))
    channels = [groups * data.draw(st.integers(1, 4)) for _ in range(2)]
    kernel = data.draw(st.integers(1, 3))
    dtype, seed = data.draw(whole), data.draw(st.integers(0, 9))
    geometry = {
        "stride": data.draw(st.integers(1, 2)),
        "padding": data.draw(st.integers(0, 2)),
        "dilation": data.draw(st.integers(1, 2)),
        "groups": groups,
        "padding_mode": data.draw(st.sampled_from(["zeros", "replicate"])),
    }
    options = data.draw(some({k: v for k, v in SODA.items() if k != "recompute"}))
    torch.manual_seed(seed)
    base = nn.Conv2d(*channels, kernel, dtype=dtype, **geometry)
    try:
        layer = SODAConv2d.from_conv2d(base, **options)
    except (TypeError, ValueError) as error:
        assert is_clear(error, {**options, **geometry}), error
        return
    train(layer, seed)
    x = torch.randn(2, channels[0], 7, 6, dtype=dtype)

    def dense(wide, exact_x):
        conv = copy.deepcopy(base).double().requires_grad_(False)
        weights = {"weight": wide.merged_weight(), "bias": wide.bias}
        return torch.func.functional_call(conv, weights, (exact_x,))

    check_product(layer, x, dense)


METHODS = {
    SODAConfig: SODA,
    SVDiffConfig: {k: SODA[k] for k in ("spectrum_activation", "plan", "basis_dtype")},
    SpectralAdapterAConfig: COLUMNS,
    SpectralAdapterRConfig: COLUMNS,
    LiDBConfig: {
        "r": st.integers(-1, 5),
        "a": st.integers(-1, 8),
        "b": st.integers(-1, 8),
    },
}


@fuzzed
@given(st.data())
def test_peft_models(data):
    """Adapt, train, compare with the merged weights, save, load, absorb."""
    make = data.draw(st.sampled_from(list(METHODS)))
    common = {
        "save_factors": option(False, True, bad=("no",)),
        "base_dtype": option(None, "float32", "bfloat16", bad=("int4",)),
    }
    options = data.draw(some({**METHODS[make], **common}))
    widths = [data.draw(st.integers(2, 12)) for _ in range(3)]
    dtype, seed = data.draw(floats), data.draw(st.integers(0, 9))

    def base() -> nn.Module:
        torch.manual_seed(seed)
        first, second = nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], widths[2])
        return nn.Sequential(first, nn.Tanh(), second).to(dtype)

    try:
        model = get_peft_model(base(), make(target_modules=["0", "2"], **options))
    except (TypeError, ValueError) as error:
        assert is_clear(error, {**options, "a": 0, "b": 0}), error
        return
    x = torch.randn(data.draw(st.integers(1, 20)), widths[0], dtype=dtype)
    model.eval()
    train(model, seed)
    y = model(x)
    assert y.dtype == dtype
    merged = copy.deepcopy(model).double().merge_and_unload()
    exact = merged(x.double())
    # A base that is rounded before it is decomposed has factors of that precision, fp32 at best.
    rounded = options.get("base_dtype") is not None
    allowed = 8 * max(TOLERANCE[dtype], TOLERANCE[torch.float32] if rounded else 0)
    assert relative_error(y, exact) <= allowed
    y.double().square().sum().backward()
    assert all(
        p.grad is None or bool(torch.isfinite(p.grad).all())
        for p in model.parameters()
        if p.requires_grad
    )
    state = get_peft_model_state_dict(model)
    again = get_peft_model(base(), make(target_modules=["0", "2"], **options)).eval()
    set_peft_model_state_dict(again, state)
    assert relative_error(again(x), y) <= allowed
    if data.draw(st.booleans()):
        try:
            absorb(model)
        except (TypeError, ValueError) as error:
            assert "cannot be absorbed" in str(error)
            return
        assert relative_error(model(x), y) <= 2 * allowed
