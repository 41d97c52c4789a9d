"""Frozen bases in int8, float8 and nf4: what is computed is exact for the basis that is kept."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from support import TOLERANCE, assert_near, dense_soda_weight, randomise, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import bitsandbytes as bnb
import torchao.quantization
from peft import PeftModel, get_peft_model

from spectral_adapters import SODAConv2d, SODALinear
from spectral_adapters.decomposition import decompose
from spectral_adapters.peft import SODAConfig, absorb, to_lora
from spectral_adapters.quantization import (
    QUANTIZED_DTYPES,
    QuantizedBasis,
    QuantizedMatrix,
)

KINDS = list(QUANTIZED_DTYPES)
#: Bits per number of a matrix [rows, columns], scales included.
BITS = {
    "int8": lambda rows, columns: 8 + 40 / columns,
    "float8": lambda rows, columns: 8 + 32 / columns,
    "nf4": lambda rows, columns: 4.5 + 512 / (rows * columns),
}
#: Error of a Gaussian matrix, relative to its norm: half a step over the square root of 3, and for
#: int8 with a scale of about 3 to 4 standard deviations over 127 steps.
ERROR = {"int8": 0.012, "float8": 0.035, "nf4": 0.12}
every_kind = pytest.mark.parametrize("kind", KINDS)


def linear(out: int = 36, columns: int = 48, **options: object) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, out, **options)


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))


def adapted(base: nn.Module, kind: str, **options: object) -> PeftModel:
    config = {"target_modules": ["0", "2"], "basis_dtype": kind, **options}
    return get_peft_model(base, SODAConfig(**config))


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "soda_delta")]


def saved_and_loaded(value: object) -> object:
    # Not by pickle, which torch's float8 tensors do not survive.
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def turn(model: nn.Module, adapter: str = "default") -> None:
    """Move what is trained away from the identity."""
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in layers(model):
            layer.soda_delta[adapter].normal_(0, 0.2)
            for parameter in layer.soda_rotation[adapter]:
                parameter.normal_(0, 0.2)


@every_kind
@pytest.mark.parametrize("shape", [(36, 48), (48, 36), (40, 40), (4, 2)])
def test_a_matrix_keeps_what_its_format_can_hold(kind, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    matrix[1] = 0
    basis = QuantizedBasis.of(decompose(matrix.double().float(), "svd", None), kind)
    quantized = type(basis.left)(matrix)
    assert quantized.shape == matrix.shape
    assert quantized.nbytes == pytest.approx(
        BITS[kind](*shape) * matrix.numel() / 8, rel=0.02, abs=4
    )
    dense = quantized.dequantized()
    assert dense.dtype == torch.float32
    assert torch.count_nonzero(dense[1].abs() > 1e-20) == 0
    if min(shape) > 2:
        assert 0 < (dense - matrix).norm() <= ERROR[kind] * matrix.norm()
    for leading in ((), (0,), (3,), (2, 5)):
        x = torch.randn(*leading, shape[1], requires_grad=True)
        y = quantized(x)
        assert_near(y, x.double() @ dense.double().mT)
        y.sin().sum().backward()
        exact = (x.double() @ dense.double().mT).cos() @ dense.double()
        assert_near(x.grad, exact)


@every_kind
@pytest.mark.parametrize("rotation", ["left", None])
@pytest.mark.parametrize("shape", [(36, 48), (48, 36)])
def test_values_and_gradients_against_fp64(kind, rotation, shape):
    layer = SODALinear.from_linear(linear(*shape), rotation=rotation, basis_dtype=kind)
    randomise(layer)
    x = torch.randn(20, shape[1], requires_grad=True)
    y = layer(x)
    y.sin().sum().backward()
    wide = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    dense = SimpleNamespace(
        left=wide.basis.left,
        right=wide.basis.right,
        decomposition="svd",
        rotation_side=rotation,
        spectrum=wide.spectrum,
        rotation_factors=wide.rotation_factors,
    )
    exact = exact_x @ dense_soda_weight(dense).mT + wide.bias
    exact.sin().sum().backward()
    assert_near(y, exact)
    assert_near(x.grad, exact_x.grad)
    for actual, expected in zip(
        [layer.delta, *layer.rotation], [wide.delta, *wide.rotation], strict=True
    ):
        assert_near(actual.grad, expected.grad, factor=3)
    assert_near(layer.merged_weight(), dense_soda_weight(dense))
    assert_near(layer.to_linear()(x), exact)


@every_kind
def test_stiefel_and_activations(kind):
    for options in ({"parametrization": "stiefel"}, {"spectrum_activation": "softplus"}):
        layer = randomise(SODALinear.from_linear(linear(), basis_dtype=kind, **options))
        x = torch.randn(7, 48)
        assert_near(layer(x), x.double() @ layer.merged_weight().double().mT + layer.bias)


@every_kind
def test_nothing_dense_is_kept(kind):
    """Neither in the layer, nor in the graph between forward and backward."""
    base = linear(256, 256, bias=False)
    layer = SODALinear.from_linear(base, basis_dtype=kind)
    frozen = [p for name, p in layer.named_parameters() if name.startswith(("left", "right"))]
    assert sum(p.nbytes for p in frozen) <= 2.05 * BITS[kind](256, 256) * 256 * 256 / 8
    assert layer.quantized_basis.nbytes == sum(p.nbytes for p in frozen) + 4 * 256
    model = adapted(nn.Sequential(base), kind, target_modules=["0"])
    held = layers(model)[0].soda_factors["default"].basis
    assert isinstance(held, QuantizedBasis) and held.nbytes == layer.quantized_basis.nbytes

    for module in (layer, model):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            module(torch.randn(3, 256, requires_grad=True))
        # The base layer's own weight is no copy.
        others = [t for t in saved if t.data_ptr() != base.weight.data_ptr()]
        assert others and all(tensor.numel() < 256 * 256 // 2 for tensor in others)


@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [
        ("int8", torchao.quantization.Int8Tensor, "__torch_function__"),
        ("float8", torchao.quantization.Float8Tensor, "__torch_function__"),
        ("nf4", bnb, "matmul_4bit"),
    ],
)
def test_the_library_s_product_is_taken(kind, owner, name, monkeypatch):
    layer = SODALinear.from_linear(nn.Linear(128, 64), basis_dtype=kind)
    calls = []
    original = getattr(owner, name)

    def spy(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy if owner is bnb else staticmethod(spy))
    layer(torch.randn(3, 128))
    if owner is not bnb:
        calls = [args for args in calls if args[0] is torch.nn.functional.linear]
    assert len(calls) == 2


@every_kind
def test_peft_starts_at_the_base_layer_exactly(kind):
    base = two_layers()
    x = torch.randn(9, 32)
    expected = base(x)
    model = adapted(copy.deepcopy(base), kind)
    assert torch.equal(model(x), expected)
    turn(model)
    assert relative_error(model(x), expected) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@every_kind
def test_peft_gradients_are_those_of_the_change_of_the_weight(kind):
    model = adapted(two_layers(), kind)
    turn(model)
    layer = layers(model)[0]
    x = torch.randn(9, 32, requires_grad=True)
    y = layer(x)
    trained = [layer.soda_delta["default"], *layer.soda_rotation["default"]]
    found = torch.autograd.grad(y.sin().sum(), [x, *trained])
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    exact = x.double() @ weight.double().mT + layer.base_layer.bias.double()
    wanted = torch.autograd.grad(exact.sin().sum(), [x, *trained])
    assert_near(y, exact)
    for actual, expected in zip(found, wanted, strict=True):
        assert_near(actual, expected.double(), factor=3)


@every_kind
def test_peft_small_changes_are_not_lost(kind):
    """A rotation by 1e-4, far below the rounding of the basis."""
    model = adapted(two_layers(), kind)
    layer = layers(model)[0]
    assert torch.count_nonzero(layer.get_delta_weight("default")) == 0
    with torch.no_grad():
        for parameter in layer.soda_rotation["default"]:
            parameter.normal_(0, 1e-4)
    frozen = layer.soda_factors["default"].basis.dequantized()
    from spectral_adapters.functional import cayley

    sizes = layer.factor_sizes["default"]
    factors = [
        cayley(p.detach().double()[None], n)[0]
        for p, n in zip(layer.soda_rotation["default"], sizes, strict=True)
    ]
    left, values, right = (tensor.double() for tensor in frozen)
    wide = torch.kron(*factors)
    exact = (left @ (wide - torch.eye(len(wide), dtype=torch.float64)) * values) @ right
    assert relative_error(layer.get_delta_weight("default"), exact) <= 5e-3
    x = torch.randn(9, 32)
    change = layer(x) - layer.base_layer(x)
    assert relative_error(change, x.double() @ exact.mT) <= 5e-3


@every_kind
def test_peft_merges_what_it_computes(kind):
    model = adapted(two_layers(), kind)
    turn(model)
    x = torch.randn(9, 32)
    y = model(x)
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert_near(model(x), y.double(), factor=2)
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(model(x), y)
    lora = to_lora(model, rank=32)
    for layer in layers(model):
        down = lora.state_dict[f"{layer.name}.lora_A.weight"].double()
        up = lora.state_dict[f"{layer.name}.lora_B.weight"].double()
        assert relative_error(up @ down, layer.get_delta_weight("default")) <= 1e-5
    assert_near(model.merge_and_unload()(x), y.double(), factor=2)


@every_kind
def test_peft_absorbs(kind):
    """The base weight takes the change exactly; the basis of the next task is quantised anew."""
    model = adapted(two_layers(), kind)
    turn(model)
    x = torch.randn(9, 32)
    y = model(x)
    absorb(model, "default")
    assert_near(model(x), y.double(), factor=2)
    layer = layers(model)[0]
    assert isinstance(layer.soda_factors["default"].basis, QuantizedBasis)
    left, values, right = layer.soda_factors["default"].basis.dequantized()
    weight = layer.base_layer.weight
    assert (left * values @ right - weight).norm() <= 4 * ERROR[kind] * weight.norm()
    alone = randomise(SODALinear.from_linear(linear(), basis_dtype=kind))
    before = alone.merged_weight()
    alone.absorb()
    assert (alone.merged_weight() - before).norm() <= 4 * ERROR[kind] * before.norm()


@every_kind
def test_peft_saves_and_loads(kind, tmp_path):
    model = adapted(two_layers(), kind)
    turn(model)
    x = torch.randn(9, 32)
    y = model(x)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert size <= trained + 2000  # names and fingerprints
    assert torch.equal(PeftModel.from_pretrained(two_layers(), tmp_path)(x), y)
    other = two_layers()
    with torch.no_grad():
        other[0].weight.add_(0.01)
    with pytest.raises(RuntimeError, match="is refused, it was trained on another base weight"):
        PeftModel.from_pretrained(other, tmp_path)


@every_kind
def test_peft_adapters_load_on_the_same_basis_in_another_format(kind, tmp_path):
    model = adapted(two_layers(), kind)
    turn(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "basis_dtype": "float32"}))
    loaded = PeftModel.from_pretrained(two_layers(), tmp_path)
    for quantised, dense in zip(layers(model), layers(loaded), strict=True):
        exact = dense.get_delta_weight("default")
        error = (quantised.get_delta_weight("default") - exact).norm() / exact.norm()
        assert 0 < error <= 2 * ERROR[kind]


@every_kind
def test_peft_adapters_share_a_basis(kind):
    model = adapted(two_layers(), kind)
    model.add_adapter("same", SODAConfig(target_modules=["0", "2"], basis_dtype=kind))
    model.add_adapter("dense", SODAConfig(target_modules=["0", "2"]))
    factors = layers(model)[0].soda_factors
    assert factors["default"] is factors["same"] and factors["default"] is not factors["dense"]
    for name in ("default", "same", "dense"):
        turn(model, name)
    x = torch.randn(9, 32)
    for names in (["default", "same"], ["default", "dense"]):
        model.base_model.set_adapter(names)
        for layer in layers(model):
            layer.set_scale("default", 0.5)
        weights = [
            layer.base_layer.weight + sum(layer.get_delta_weight(name) for name in names)
            for layer in layers(model)
        ]
        h = torch.tanh(x @ weights[0].mT + layers(model)[0].base_layer.bias)
        expected = h @ weights[1].mT + layers(model)[1].base_layer.bias
        assert_near(model(x), expected.double(), factor=2)


def quantised_base(library: str) -> nn.Sequential:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    if library == "torchao":
        config = torchao.quantization.Int8WeightOnlyConfig
        base = nn.Sequential(plain)
        torchao.quantization.quantize_(base, config())
        base.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: config())
        )
        return base
    if library == "bnb 8bit":
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer.to("cpu"))


@every_kind
@pytest.mark.parametrize("library", ["bnb 4bit", "bnb 8bit", "torchao"])
def test_peft_on_a_quantised_base(library, kind, tmp_path):
    """SODA as QLoRA does it: trained, merged, unmerged, reloaded."""
    base = quantised_base(library)
    x = torch.randn(5, 64)
    expected = base(x)
    model = adapted(base, kind, target_modules=["0"])
    assert torch.equal(model(x), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    target, losses = torch.randn(5, 64), []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()  # in which bitsandbytes multiplies 8-bit weights otherwise than in training
    y = model(x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised_base(library), tmp_path)
    assert torch.equal(again(x), y)
    before = layers(model)[0].base_layer.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert relative_error(model(x), y) < (0.05 if library != "bnb 4bit" else 0.3)
    model.unmerge_adapter()
    assert layers(model)[0].base_layer.weight is before
    torch.testing.assert_close(model(x), y)


def test_a_quantised_base_takes_no_dense_basis():
    model = adapted(quantised_base("bnb 4bit"), "int8", target_modules=["0"])
    with pytest.raises(ValueError, match="needs the dense weight at every step; use"):
        model.add_adapter("other", SODAConfig(target_modules=["0"]))


@every_kind
def test_half_precision_and_autocast(kind):
    for dtype in (torch.bfloat16, torch.float16):
        base = two_layers().to(dtype)
        x = torch.randn(9, 32, dtype=dtype)
        expected = base(x)
        model = adapted(base, kind)
        assert torch.equal(model(x), expected)
        turn(model)
        y = model(x)
        assert y.dtype == dtype
        merged = copy.deepcopy(model).merge_and_unload()
        assert_near(y, merged.double()(x.double()), factor=3)
    model = adapted(two_layers(), kind)
    turn(model)
    x = torch.randn(9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert_near(y, model(x).double())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    layer = SODALinear.from_linear(linear(), basis_dtype=kind)
    x = torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(layer(x), layer.to_linear().double()(x.double()))
    assert layer(x.double()).dtype == torch.float64


@every_kind
def test_casts_copies_and_pickles_keep_the_basis(kind):
    layer = randomise(SODALinear.from_linear(linear(), basis_dtype=kind))
    x = torch.randn(5, 48)
    y = layer(x)
    kept = {name: p.clone() for name, p in layer.named_parameters() if name.startswith("left")}
    for module in (
        copy.deepcopy(layer),
        copy.deepcopy(layer).to("cpu", torch.bfloat16),
        copy.deepcopy(layer).half(),
        copy.deepcopy(layer).double(),
        saved_and_loaded(layer),
    ):
        here = dict(module.named_parameters())
        for name, tensor in kept.items():
            assert here[name].dtype == tensor.dtype
            assert torch.equal(here[name].view(torch.uint8), tensor.view(torch.uint8))
        assert torch.equal(module(x), y) or (
            module.delta.dtype == torch.float64 and relative_error(module(x), y) < 1e-6
        )
    assert all(p.device.type == "meta" for p in copy.deepcopy(layer.left).to("meta").parameters())
    model = adapted(two_layers(), kind)
    turn(model)
    x = torch.randn(5, 32)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    factors = layers(copy.deepcopy(model).half())[0].soda_factors["default"]
    assert factors.basis.left.dtype == torch.float32
    assert factors.basis.nbytes == layers(model)[0].soda_factors["default"].basis.nbytes


@every_kind
@pytest.mark.parametrize("save_factors", [True, False])
def test_state_dicts(kind, save_factors):
    options = {"basis_dtype": kind, "save_factors": save_factors}
    layer = randomise(SODALinear.from_linear(linear(), **options))
    x = torch.randn(5, 48)
    state = saved_and_loaded(layer.state_dict())
    assert any(name.startswith("left.") for name in state) == save_factors
    fresh = SODALinear.from_linear(linear(), **options)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))
    torch.manual_seed(5)
    other = SODALinear.from_linear(nn.Linear(48, 36), **options)
    if save_factors:
        other.load_state_dict(state)
        assert torch.equal(other(x), layer(x))
    else:
        with pytest.raises(RuntimeError, match="it was trained on another base weight"):
            other.load_state_dict(state)


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(kind, use_reentrant):
    model = adapted(two_layers(), kind)
    turn(model)
    x = torch.randn(9, 32, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(x).sum().backward()
    expected = [p.grad.clone() for p in trained]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@every_kind
def test_compiles_in_one_graph(kind):
    layer = randomise(SODALinear.from_linear(linear(), basis_dtype=kind))
    x = torch.randn(7, 48)
    trained = [layer.delta, *layer.rotation]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).sum(), trained)
    for actual, expected in zip(found, torch.autograd.grad(layer(x).sum(), trained), strict=True):
        assert_near(actual, expected.double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_on_cuda(kind, dtype):
    base = nn.Sequential(linear(160, 192)).to("cuda", dtype)
    model = adapted(base, kind, target_modules=["0"])
    x = torch.randn(40, 192, device="cuda", dtype=dtype)
    assert torch.equal(model(x), base(x))
    turn(model)
    layer = layers(model)[0]
    trained = [layer.soda_delta["default"], *layer.soda_rotation["default"]]
    outer = torch.randn(40, 160, device="cuda")
    change = layer(x).float() - layer.base_layer(x).float()
    found = torch.autograd.grad((layer(x) * outer).sum(), trained)
    delta = layer.get_delta_weight("default")
    wanted = torch.autograd.grad(((x.float() @ delta.mT) * outer).sum(), trained)
    for actual, expected in [(change, x.float() @ delta.mT), *zip(found, wanted, strict=True)]:
        assert relative_error(actual, expected) <= 5 * TOLERANCE[dtype]


def test_prepared_a_part_at_a_time(monkeypatch):
    """The dense factors of a whole model are never there at once."""
    from spectral_adapters import spectra
    from spectral_adapters.peft import _layer

    sizes = []
    original = spectra.factorise_all
    monkeypatch.setattr(
        spectra,
        "factorise_all",
        lambda requests, **options: sizes.append(len(requests)) or original(requests, **options),
    )
    monkeypatch.setattr(_layer, "_DENSE_FACTORS", 12000)
    adapted(two_layers(), "int8")
    assert sizes == [1, 1]
    sizes.clear()
    adapted(two_layers(), "base")
    assert sizes == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decomposition": "qr"}, "decomposition must be 'svd' with basis_dtype='int8'; got 'qr'"),
        ({"rotation": "right"}, "rotation must be 'left' or None with .*; got 'right'"),
        ({"plan": "merged"}, "plan must be 'auto' or 'tokens' with .*; got 'merged'"),
        ({"plan": "factored"}, "plan must be 'auto' or 'tokens' with .*; got 'factored'"),
        ({"recompute": True}, "recompute must be False with .*; got True"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        SODALinear.from_linear(linear(), basis_dtype="int8", **options)
    with pytest.raises(ValueError, match=message):
        SODAConfig(basis_dtype="int8", **options)


def test_refused_layers_and_weights():
    with pytest.raises(ValueError, match="'float32' or 'base' for a convolution; got 'nf4'"):
        SODAConv2d.from_conv2d(nn.Conv2d(4, 6, 3), basis_dtype="nf4")
    for base in (nn.Conv2d(4, 6, 3), nn.Embedding(7, 4)):
        kind = type(base).__name__
        with pytest.raises(ValueError, match=f"0: basis_dtype must be .* for a {kind}; got 'int8'"):
            adapted(nn.Sequential(base), "int8", target_modules=["0"])
    message = "basis_dtype must be 'float32' or 'base' for a float64 weight; got 'float8'"
    with pytest.raises(ValueError, match=message):
        SODALinear.from_linear(linear(dtype=torch.float64), basis_dtype="float8")
    with pytest.raises(ValueError, match=message):
        adapted(two_layers().double(), "float8")
    with pytest.raises(ValueError, match="save_factors must be False with basis_dtype='nf4'"):
        SODAConfig(basis_dtype="nf4", save_factors=True)


@every_kind
def test_a_missing_package_is_named(kind, monkeypatch):
    package = QUANTIZED_DTYPES[kind]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"'{kind}' needs {package}: pip install {package}"):
        SODALinear.from_linear(linear(), basis_dtype=kind)


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, torch\n"
        "from spectral_adapters import SODALinear\n"
        "SODALinear(6, 4)\n"
        "found = {'torchao', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_repr_and_plan():
    layer = SODALinear.from_linear(linear(), basis_dtype="int8")
    assert "basis=int8" in repr(layer) and isinstance(layer.left, QuantizedMatrix)
    assert layer.plan_for(10**6).name == "tokens"
    assert TOLERANCE[torch.float32] < relative_error(layer.merged_weight(), linear().weight) < 0.05
