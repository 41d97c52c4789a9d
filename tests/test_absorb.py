"""Absorbing: the adapted weight becomes the base, its factorisation stays one, generation by
generation."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import TOLERANCE, assert_near, dense_soda_weight, randomise, relative_error
from torch import nn

from spectral_adapters import (
    RotationBank,
    SODAConv2d,
    SODALinear,
    SpectralAdapterRLinear,
    SVDiffLinear,
)
from spectral_adapters.decomposition import decompose
from spectral_adapters.functional import SpectralBasis
from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
    absorb,
)

METHODS = [(d, r) for d in ("svd", "qr") for r in ("left", "right", None)]
GENERATIONS = 10


def departure(basis: SpectralBasis, decomposition: str, rotation: str | None) -> float:
    """Largest entry of Q^T Q - I of the factors that have to be orthonormal."""
    orthonormal = {
        "svd": [basis.left, basis.right.mT],
        "qr": [basis.left] if rotation == "left" else [basis.right.mT],
    }[decomposition]
    return max(
        float((q.double().mT @ q.double() - torch.eye(q.shape[1])).abs().max()) for q in orthonormal
    )


def product_of(basis: SpectralBasis) -> torch.Tensor:
    left = basis.left.double()
    if basis.singular_values is not None:
        left = left * basis.singular_values
    return left @ basis.right.double()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize("parametrization", ["cayley", "stiefel"])
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_ten_generations(decomposition, rotation, parametrization, shape):
    """1e-5 is what is promised; rounding to fp32 is what is reached."""
    base = nn.Linear(*shape)
    options = {"decomposition": decomposition, "rotation": rotation}
    layer = SODALinear.from_linear(base, parametrization=parametrization, **options)
    x = torch.randn(5, shape[0])
    for _ in range(GENERATIONS):
        randomise(layer)
        expected = dense_soda_weight(layer).detach()
        y = layer(x)
        assert layer.absorb() is layer
        assert torch.count_nonzero(layer.get_delta_weight()) == 0
        assert all(p.requires_grad for p in (layer.delta, *layer.rotation))
        assert relative_error(product_of(layer.basis), expected) <= 1e-6
        assert departure(layer.basis, decomposition, rotation) <= 1e-6
        assert_near(layer(x), y.double(), factor=2)


def test_the_basis_is_what_a_decomposition_finds():
    """Canonical order and signs, also of a spectrum that was trained below zero."""
    layer = randomise(SODALinear(24, 20))
    with torch.no_grad():
        layer.delta[3] = -3 * layer.singular_values[3]
    layer.absorb()
    found = decompose(layer.merged_weight().detach().double(), "svd", None)
    for own, exact in zip(layer.basis, found, strict=True):
        assert relative_error(own, exact) <= 1e-4
    assert bool((layer.singular_values.diff() <= 0).all()) and layer.singular_values[-1] >= 0

    layer = randomise(SODALinear(24, 20, decomposition="qr"))
    layer.absorb()
    found = decompose(layer.merged_weight().detach().double(), "qr", "left")
    assert relative_error(layer.left, found.left) <= 1e-4
    assert relative_error(layer.right, found.right) <= 1e-4


def test_the_next_task_trains_from_there():
    model = nn.Sequential(SODALinear(12, 12), nn.Tanh(), SODALinear(12, 6))
    RotationBank.attach(model)
    x, target = torch.randn(30, 12), torch.randn(30, 6)
    losses = []
    for _ in range(2):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        before = model(x)
        model[0].absorb()
        model[2].absorb()
        assert_near(model(x), before.double(), factor=2)
    assert losses[39] < losses[20] < losses[19] * 1.05 < losses[0] * 1.05


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_spectrum_activations(activation):
    for cls in (SVDiffLinear, SODALinear):
        layer = cls.from_linear(nn.Linear(12, 10), spectrum_activation=activation)
        with torch.no_grad():
            layer.delta.normal_(0, 0.5)
        expected = layer.merged_weight()
        layer.absorb()
        assert relative_error(layer.merged_weight(), expected) <= 1e-6


def test_convolutions():
    layer = randomise(SODAConv2d(4, 6, 3))
    x = torch.randn(2, 4, 7, 7)
    y = layer(x)
    layer.absorb()
    assert_near(layer(x), y.double(), factor=2)


def test_a_half_precision_basis_is_widened():
    layer = randomise(SODALinear.from_linear(nn.Linear(12, 10).bfloat16(), basis_dtype="base"))
    expected = layer.merged_weight()
    layer.absorb()
    assert layer.left.dtype == torch.float32
    assert departure(layer.basis, "svd", "left") <= 1e-4
    assert relative_error(layer.merged_weight(), expected) <= TOLERANCE[torch.bfloat16]


def test_state_dicts_know_what_was_absorbed():
    """Without factors, a state loads where the same was absorbed, and nowhere else."""
    base = nn.Linear(12, 10)
    make = partial(SODALinear.from_linear, base, save_factors=False)
    first = randomise(make())
    saved = copy.deepcopy(first.state_dict())
    first.absorb()
    second = copy.deepcopy(randomise(first).state_dict())

    again = make()
    again.load_state_dict(saved)
    again.absorb()
    again.load_state_dict(second)
    assert torch.equal(again.merged_weight(), first.merged_weight())
    for other in (make(), randomise(make()).absorb()):
        with pytest.raises(RuntimeError, match="it was trained on another base weight"):
            other.load_state_dict(second)


def test_rotated_columns():
    base = nn.Linear(30, 20)
    original = base.weight.detach().clone()
    layer = SpectralAdapterRLinear.from_linear(base, r=4, algorithm="full")
    for _ in range(GENERATIONS):
        with torch.no_grad():
            for packed in (layer.rotation_left, layer.rotation_right):
                packed.normal_(0, 0.3)
        expected = layer.merged_weight().detach()
        assert layer.absorb() is layer
        assert torch.count_nonzero(layer.get_delta_weight()) == 0
        assert relative_error(layer.base.weight, expected) <= 1e-6
        assert departure(layer.basis, "svd", None) <= 1e-6
        # Singular triples of the new weight: W v = s u.
        turned = layer.base.weight.double() @ layer.right.double().mT
        assert relative_error(turned, layer.left.double() * layer.singular_values) <= 1e-5
    assert torch.equal(base.weight, original)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 4))


def trained(model: PeftModel, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


TARGETS = ["0", "2"]
CONFIGS = {
    "soda": lambda: SODAConfig(target_modules=TARGETS),
    "soda right": lambda: SODAConfig(target_modules=TARGETS, rotation="right"),
    "soda qr": lambda: SODAConfig(target_modules=TARGETS, decomposition="qr"),
    "svdiff": lambda: SVDiffConfig(target_modules=TARGETS),
    "r": lambda: SpectralAdapterRConfig(target_modules=TARGETS, r=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_peft_model_goes_on_from_an_absorbed_adapter(method, dtype, tmp_path):
    x = torch.randn(6, 12, dtype=dtype)
    model = trained(get_peft_model(mlp().to(dtype), CONFIGS[method]()))
    model.save_pretrained(tmp_path / "first")
    before = model(x)
    absorb(model)
    assert relative_error(model(x), before) <= 4 * TOLERANCE[dtype]
    for layer in model.base_model.model[::2][:2]:
        assert torch.count_nonzero(layer.get_delta_weight("default")) == 0
    trained(model, seed=2)
    model.save_pretrained(tmp_path / "second")
    after = model(x)
    assert relative_error(after, before) > 1e-2

    loaded = PeftModel.from_pretrained(mlp().to(dtype), tmp_path / "first", is_trainable=True)
    absorb(loaded)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    assert relative_error(loaded(x), after) <= 4 * TOLERANCE[dtype]
    # The second adapter belongs to what the first one made of the base.
    with pytest.raises(RuntimeError, match="trained on another base weight"):
        PeftModel.from_pretrained(mlp().to(dtype), tmp_path / "second")


def test_with_its_factors_the_next_adapter_loads_on_the_saved_base(tmp_path):
    config = SODAConfig(target_modules=TARGETS, save_factors=True)
    model = trained(get_peft_model(mlp(), config))
    absorb(model)
    weights = copy.deepcopy(model.get_base_model())
    x = torch.randn(6, 12)
    trained(model, seed=2).save_pretrained(tmp_path)
    base = mlp()
    for index in TARGETS:
        base[int(index)].weight.data.copy_(weights[int(index)].base_layer.weight)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(loaded(x), model(x)) <= 1e-5


def test_what_is_tied_to_an_absorbed_weight_stays_as_it_was():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model = trained(get_peft_model(Tied(), SODAConfig(target_modules=["table"])))
    ids = torch.arange(11)
    before, head = model(ids), model.base_model.model.head.weight.detach().clone()
    absorb(model)
    assert relative_error(model(ids), before) <= 1e-5
    assert torch.equal(model.base_model.model.head.weight, head)


def test_what_cannot_be_absorbed():
    def refused(model, match, error=ValueError):
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=match):
            absorb(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name

    for config in (SpectralAdapterAConfig(r=2), LiDBConfig()):
        config.target_modules = set(TARGETS)
        refused(get_peft_model(mlp(), config), "cannot be absorbed, since the fact", TypeError)
    with pytest.raises(TypeError, match="must have spectral adapters"):
        absorb(get_peft_model(mlp(), LoraConfig(target_modules=TARGETS)))

    def make():
        return trained(get_peft_model(mlp(), CONFIGS["soda"]()))

    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\]"):
        absorb(make(), "other")
    model = make()
    model.add_adapter("other", CONFIGS["soda"]())
    refused(model, r"\['other'\] belong to the base weight as it is; delete them first")
    model = make()
    model.base_model.model[2].set_scale("default", 0.5)
    refused(model, "2: the adapter 'default' cannot be absorbed: its scale is 0.5, not 1")
    model = make()
    model.merge_adapter()
    refused(model, r"\['default'\] are merged; unmerge them first")
    model = trained(
        get_peft_model(mlp(), SODAConfig(target_modules=TARGETS, base_dtype="bfloat16"))
    )
    refused(model, "its factors are not those of the base weight as it is here")
