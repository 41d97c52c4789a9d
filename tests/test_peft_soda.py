"""SODA as a PEFT method: what PEFT promises of its own methods, and what an SVD adds to it."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from support import TOLERANCE, relative_error
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import (  # noqa: E402
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from spectral_adapters.factors import PUBLISHED_FACTORS  # noqa: E402
from spectral_adapters.peft import (  # noqa: E402
    SODAConfig,
    load_adapter,
    refresh_factors,
    save_adapter,
)
from spectral_adapters.peft._registration import register  # noqa: E402
from spectral_adapters.peft.soda import SODAModel  # noqa: E402

METHODS = [
    {"decomposition": decomposition, "rotation": rotation}
    for decomposition in ("svd", "qr")
    for rotation in ("left", "right", None)
]
WEIGHTS = "adapter_model.safetensors"


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, attn_pdrop=0, resid_pdrop=0
    )
    return transformers.GPT2Model(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config).eval()


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def inputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (5, 12) if isinstance(model[0], nn.Linear) else (5, 4, 8, 8)
    return torch.randn(shape, generator=generator).to(dtype)


def config(**options) -> SODAConfig:
    """A config that is not the identity at the start."""
    return SODAConfig(**{"target_modules": ["0", "2"], "init_weights": False, **options})


def layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def trained_on(base: nn.Module, **options) -> PeftModel:
    """An adapter that took three optimizer steps from the identity."""
    x = inputs(base, base[0].weight.dtype)
    model = get_peft_model(base, SODAConfig(**{"target_modules": ["0", "2"], **options}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_is_the_base_and_every_parameter_moves(build, method):
    base = build()
    x = inputs(base)
    expected = base(x).detach()
    model = get_peft_model(base, SODAConfig(target_modules=["0", "2"], **method))
    assert relative_error(model(x), expected) <= TOLERANCE[torch.float32]
    for layer in layers(model):
        assert not layer.get_delta_weight("default").any()

    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == ("soda_" not in name), name


def test_only_trained_numbers_and_fingerprints_are_parameters_buffers_or_saved(tmp_path):
    model = get_peft_model(mlp(), config())
    assert {name.split(".")[-2] for name, _ in model.named_buffers()} == {"soda_fingerprint"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".soda_" in name
    }
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    # Weights [20, 12] and [8, 20]: ranks 12 = 3 x 4 and 8 = 2 x 4.
    assert {key.removeprefix("base_model.model."): tuple(v.shape) for key, v in saved.items()} == {
        "0.soda_delta": (12,),
        "0.soda_rotation.0": (3,),
        "0.soda_rotation.1": (6,),
        "0.soda_fingerprint": (161,),
        "2.soda_delta": (8,),
        "2.soda_rotation.0": (1,),
        "2.soda_rotation.1": (6,),
        "2.soda_fingerprint": (161,),
    }


@pytest.mark.parametrize("plan", ["auto", "factored", "merged", "tokens"])
def test_plans_agree_with_the_merged_weight(plan):
    model = get_peft_model(mlp(), config(plan=plan))
    x = inputs(mlp())
    y = model(x).detach()
    assert relative_error(y, model.merge_and_unload()(x)) <= 2 * TOLERANCE[torch.float32]


def test_stiefel_factors_are_square_and_orthogonal():
    model = get_peft_model(mlp(), config(parametrization="stiefel"))
    factors = [p for name, p in model.named_parameters() if "soda_rotation" in name]
    assert [tuple(p.shape) for p in factors] == [(3, 3), (4, 4), (2, 2), (4, 4)]
    for factor in factors:
        assert factor.requires_grad
        assert torch.allclose(factor @ factor.mT, torch.eye(len(factor)), atol=1e-6)
    x = inputs(mlp())
    assert relative_error(model(x).detach(), model.merge_and_unload()(x)) <= 2e-5


def test_factors_of_size_one_have_no_parameter():
    model = get_peft_model(mlp(), config(factors_pattern={"0": (1, 12)}, target_modules=["0"]))
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if "soda_rotation" in n]
    assert shapes == [(66,)]
    x = inputs(mlp())
    assert relative_error(model(x).detach(), model.merge_and_unload()(x)) <= 2e-5


def test_factors_by_dimension_and_by_module():
    options = {"factors": {12: [2, 6], 8: (8,)}, "factors_pattern": {"2": [2, 4]}}
    model = get_peft_model(mlp(), config(**options))
    assert [layer.factor_sizes["default"] for layer in layers(model)] == [(2, 6), (2, 4)]
    assert SODAConfig(factors=PUBLISHED_FACTORS).factors_for("any", 1280) == (4, 16, 20)
    with pytest.warns(RuntimeWarning, match="factors_pattern has the key 'nowhere'"):
        get_peft_model(mlp(), config(factors_pattern={"nowhere": (3, 4)}))


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("save_factors", [False, True])
def test_save_and_load(build, save_factors, tmp_path):
    model = trained_on(build(), save_factors=save_factors)
    x = inputs(build())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(again(x), model(x))
    assert all(p.dtype == torch.float32 and not p.is_meta for p in again.parameters())


def test_the_model_card_says_how_to_load(tmp_path):
    model = get_peft_model(mlp(), config())
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text().count("import spectral_adapters.peft") == 1


def test_direct_injection_and_state_dicts():
    x = inputs(mlp())
    model = inject_adapter_in_model(config(), mlp())
    state = get_peft_model_state_dict(model)
    base = mlp()
    torch.manual_seed(9)
    other = inject_adapter_in_model(config(), base)
    assert not torch.equal(other(x), model(x))
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(other(x), model(x))


def test_a_folder_per_component(tmp_path):
    x = inputs(mlp())
    model = inject_adapter_in_model(config(), mlp())
    save_adapter(model, tmp_path)
    loaded = mlp()
    load_adapter(loaded, tmp_path, "mine")
    assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(x), model(x))
    assert PeftConfig.from_pretrained(str(tmp_path)).base_dtype == "float32"
    with pytest.raises(ValueError, match="adapter_name must be new"):
        load_adapter(loaded, tmp_path, "mine")
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        save_adapter(model, tmp_path, "absent")
    with pytest.raises(TypeError, match="a PeftModel has its own load_adapter"):
        load_adapter(get_peft_model(mlp(), config()), tmp_path, "mine")


def test_a_folder_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    x = inputs(mlp())
    wider = nn.Sequential(*mlp(), nn.Linear(3, 3))
    inject_adapter_in_model(config(target_modules=["0", "2", "5"]), wider, "more")
    save_adapter(wider, tmp_path / "wider", "more")
    save_adapter(inject_adapter_in_model(config(), mlp(seed=1)), tmp_path / "foreign")
    save_adapter(inject_adapter_in_model(config(), mlp()), tmp_path / "good")
    model = mlp()
    with pytest.raises(ValueError, match="must hold an adapter of this model"):
        load_adapter(model, tmp_path / "wider")
    with pytest.raises(RuntimeError, match="0: the adapter 'default' is refused"):
        load_adapter(model, tmp_path / "foreign")
    assert not getattr(model, "peft_config", None)
    assert torch.equal(model(x), mlp()(x))
    load_adapter(model, tmp_path / "good")
    assert not torch.allclose(model(x), mlp()(x), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_another_decomposition_driver_gives_the_same_adapter(method, tmp_path, monkeypatch):
    """Signs, drivers and round-off of the recomputed factorisation do not reach the weights."""
    model = trained_on(mlp(), **method)
    x = inputs(mlp())
    model.save_pretrained(tmp_path)
    svd, qr = torch.linalg.svd, torch.linalg.qr

    def other_svd(matrix, full_matrices):
        # In fp32 and by way of the transpose: another precision, another order of operations.
        v, s, uh = svd(matrix.float().mT.contiguous(), full_matrices=full_matrices)
        signs = torch.where(torch.rand(s.shape) < 0.5, -1.0, 1.0)
        return (uh.mT * signs).double(), s.double(), (v * signs).mT.double()

    def other_qr(matrix, mode):
        q, r = qr(matrix.float(), mode=mode)
        signs = torch.where(torch.rand(len(r)) < 0.5, -1.0, 1.0)
        return (q * signs).double(), (r * signs[:, None]).double()

    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    monkeypatch.setattr(torch.linalg, "qr", other_qr)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    for here, there in zip(layers(loaded), layers(model), strict=True):
        expected = there.get_delta_weight("default")
        assert expected.norm() > 0.05
        error = (here.get_delta_weight("default") - expected).norm() / expected.norm()
        assert 0 < error < 1e-4
    assert relative_error(loaded(x), model(x)) < 1e-4


def test_an_arbitrary_basis_is_refused(tmp_path, monkeypatch):
    """The same base weight, but its factorisation came out differently."""
    trained_on(mlp()).save_pretrained(tmp_path)
    svd = torch.linalg.svd

    def mixed(matrix, full_matrices):
        u, s, vh = svd(matrix, full_matrices=full_matrices)
        turn = torch.eye(len(s), dtype=s.dtype)
        turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=s.dtype)
        return u @ turn, s, turn.mT @ vh

    monkeypatch.setattr(torch.linalg, "svd", mixed)
    with pytest.raises(RuntimeError, match=r"0: the adapter 'default' is refused.*save_factors"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_another_base_is_refused_by_layer_with_a_remedy(tmp_path):
    model = trained_on(mlp())
    model.save_pretrained(tmp_path)
    base = mlp()
    with torch.no_grad():
        base[2].weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"2: the adapter 'default' is refused.*another base"):
        PeftModel.from_pretrained(base, tmp_path)

    other = get_peft_model(mlp(seed=1), config(), adapter_name="other")
    with pytest.raises(RuntimeError, match=r"0: the adapter 'default' is refused"):
        other.load_adapter(tmp_path, "default")
    # What was refused was not loaded either.
    assert not any(p.any() for n, p in other.named_parameters() if "soda_delta.default" in n)


def test_an_untrained_adapter_belongs_to_no_base(tmp_path):
    get_peft_model(mlp(), SODAConfig(target_modules=["0"])).save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(mlp(seed=1), tmp_path)
    x = inputs(mlp())
    assert relative_error(other(x), mlp(seed=1)(x)) <= 1e-5
    other.save_pretrained(tmp_path)
    PeftModel.from_pretrained(mlp(seed=1), tmp_path)


def test_a_checkpoint_without_a_fingerprint_is_refused():
    model = inject_adapter_in_model(config(), mlp())
    state = get_peft_model_state_dict(model)
    del state["2.soda_fingerprint"]
    with pytest.raises(ValueError, match="2: the checkpoint has no soda_fingerprint"):
        set_peft_model_state_dict(model, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_adapter_on_an_fp32_copy_of_the_base(dtype, tmp_path):
    """The base is rounded to the recorded dtype before it is decomposed; W0 itself is not."""
    model = trained_on(mlp().to(dtype))
    model.save_pretrained(tmp_path)
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_dtype"] == name
    x = inputs(mlp())
    for wide in (mlp(), mlp().to(dtype).float()):
        loaded = PeftModel.from_pretrained(wide, tmp_path)
        for here, there in zip(layers(loaded), layers(model), strict=True):
            assert torch.equal(here.get_delta_weight("default"), there.get_delta_weight("default"))
        merged = copy.deepcopy(loaded).merge_and_unload()
        assert relative_error(loaded(x), merged(x)) <= 2e-5
        loaded.save_pretrained(tmp_path / "again")
        PeftModel.from_pretrained(mlp().to(dtype), tmp_path / "again")


def test_an_fp32_adapter_is_refused_on_a_half_precision_base_unless_it_has_its_factors(tmp_path):
    trained_on(mlp()).save_pretrained(tmp_path / "lean")
    with pytest.raises(RuntimeError, match="load the base in float32, or save the adapter with"):
        PeftModel.from_pretrained(mlp().bfloat16(), tmp_path / "lean")

    model = trained_on(mlp(), save_factors=True)
    model.save_pretrained(tmp_path / "portable")
    for base in (mlp().bfloat16(), mlp().half(), mlp(seed=1)):
        x = inputs(base, base[0].weight.dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path / "portable")
        for here, there in zip(layers(loaded), layers(model), strict=True):
            assert torch.equal(here.get_delta_weight("default"), there.get_delta_weight("default"))
        merged = copy.deepcopy(loaded).merge_and_unload()
        assert relative_error(loaded(x), merged(x)) <= 4 * TOLERANCE[x.dtype]


def test_layers_of_different_precision_each_remember_their_own(tmp_path):
    def mixed():
        base = mlp()
        base[2].bfloat16()
        return base

    model = get_peft_model(mixed(), config())
    assert model.peft_config["default"].base_dtype is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    for here, there in zip(layers(loaded), layers(model), strict=True):
        assert torch.equal(here.get_delta_weight("default"), there.get_delta_weight("default"))


def test_casting_the_model_keeps_factors_and_trained_numbers():
    model = get_peft_model(mlp(), config())
    delta = [layer.get_delta_weight("default") for layer in layers(model)]
    for cast in (torch.bfloat16, torch.float16):
        model.to(cast)
        assert model.base_model.model[0].base_layer.weight.dtype == cast
        assert {p.dtype for n, p in model.named_parameters() if "soda_" in n} == {torch.float32}
        for layer, expected in zip(layers(model), delta, strict=True):
            assert torch.equal(layer.get_delta_weight("default"), expected)
        y = model(inputs(mlp(), cast))
        assert y.dtype == cast and torch.isfinite(y).all()
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(inputs(mlp(), torch.float64)).dtype == torch.float64


def test_trained_numbers_are_fp32_on_a_half_precision_base_and_fp64_on_an_fp64_base():
    for base_dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        model = inject_adapter_in_model(config(), mlp().to(base_dtype))
        assert {p.dtype for n, p in model.named_parameters() if "soda_" in n} == {expected}
    model = get_peft_model(mlp().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "soda_" in n} == {torch.bfloat16}
    assert model(inputs(mlp(), torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_base_layer(build, dtype):
    base = build().to(dtype)
    x = inputs(base, dtype)
    exact = copy.deepcopy(base).double()(x.double())
    limit = max(relative_error(base(x), exact), TOLERANCE[dtype])
    model = get_peft_model(base, SODAConfig(target_modules=["0", "2"]))
    assert relative_error(model(x), exact) <= limit


@pytest.mark.parametrize("build", [mlp, convnet])
def test_autocast(build):
    model = get_peft_model(build(), config())
    x = inputs(build())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        layers(model)[0].set_scale("default", 0.5)
        scaled = model(x)
        delta = layers(model)[0].get_delta_weight("default")
    assert y.dtype == scaled.dtype == torch.bfloat16
    assert delta.dtype == torch.float32
    assert torch.equal(delta, layers(model)[0].get_delta_weight("default"))
    layers(model)[0].set_scale("default", 1.0)
    assert relative_error(y, model(x)) < 2 * TOLERANCE[torch.bfloat16]
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_a_base_on_the_meta_device_is_decomposed_when_its_weights_arrive(tmp_path):
    model = trained_on(mlp())
    x = inputs(mlp())
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = mlp()
    loaded = PeftModel.from_pretrained(empty, tmp_path)
    with pytest.raises(ValueError, match="0: the base weight is on the meta device"):
        loaded(x)
    weights = {
        name.replace("0.", "0.base_layer.").replace("2.", "2.base_layer.")
        if name[0] in "02"
        else name: value
        for name, value in mlp().state_dict().items()
    }
    wrong = {name: value + 1 for name, value in weights.items()}
    loaded.base_model.model.load_state_dict(wrong, strict=False, assign=True)
    with pytest.raises(ValueError, match=r"0: the adapter 'default' is refused"):
        loaded(x)
    loaded.base_model.model.load_state_dict(weights, strict=False, assign=True)
    assert torch.equal(loaded(x), model(x))


def test_to_empty_does_not_empty_the_factors():
    model = get_peft_model(mlp(), config())
    basis = layers(model)[0].soda_factors["default"].basis
    model.to_empty(device="cpu")
    assert layers(model)[0].soda_factors["default"].basis is basis


def test_untrained_adapters_follow_a_base_that_is_loaded_later():
    model = get_peft_model(mlp(), SODAConfig(target_modules=["0", "2"]))
    x = inputs(mlp())
    other = get_peft_model(mlp(seed=1), SODAConfig(target_modules=["0", "2"])).state_dict()
    state = {key: value for key, value in other.items() if "soda_" not in key}
    model.load_state_dict(state, strict=False)
    assert relative_error(model(x), mlp(seed=1)(x)) <= 1e-5
    # Resuming from a whole checkpoint is the same base and must not disturb a trained adapter.
    trained = trained_on(mlp())
    y = trained(x)
    trained.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert torch.equal(trained(x), y)


def test_a_trained_adapter_does_not_follow_an_untrained_one_to_another_base():
    model = trained_on(mlp())
    model.add_adapter("fresh", SODAConfig(target_modules=["0", "2"]))
    other = get_peft_model(mlp(seed=1), SODAConfig(target_modules=["0", "2"])).state_dict()
    model.load_state_dict({k: v for k, v in other.items() if "soda_" not in k}, strict=False)
    x = inputs(mlp())
    model.set_adapter("fresh")
    assert relative_error(model(x), mlp(seed=1)(x)) <= 1e-5
    model.set_adapter("default")
    with pytest.raises(ValueError, match="0: the adapter 'default' is refused"):
        model(x)


def test_refresh_factors():
    model = get_peft_model(mlp(), SODAConfig(target_modules=["0", "2"], plan="factored"))
    x = inputs(mlp())
    with torch.no_grad():
        for layer in layers(model):
            layer.base_layer.weight.mul_(2)
    refresh_factors(model)
    with model.disable_adapter():
        base = model(x)
    assert relative_error(model(x), base) <= 1e-5

    trained = trained_on(mlp())
    with torch.no_grad():
        layers(trained)[1].base_layer.weight.mul_(2)
    with pytest.raises(ValueError, match="2: the adapter 'default' is refused"):
        trained.refresh_factors()
    merged = get_peft_model(mlp(), config())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="cannot be refreshed while"):
        refresh_factors(merged)
    with pytest.raises(TypeError, match="has none"):
        refresh_factors(mlp())


def test_switch_combine_scale_and_disable():
    x = inputs(mlp())
    base = mlp()(x)
    model = get_peft_model(mlp(), config(), adapter_name="one")
    model.add_adapter("two", config(rotation="right", target_modules=["0"]))
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model(x)
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-3)
    assert not torch.allclose(outputs["one"], base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), outputs["two"])

    model.base_model.set_adapter(["one", "two"])
    both = model(x)
    dense = mlp()
    for layer, plain in zip(layers(model), (dense[0], dense[2]), strict=True):
        for name in layer.configs:
            plain.weight.data += layer.get_delta_weight(name)
    assert relative_error(both, dense(x)) <= 1e-5

    model.set_adapter("one")
    first = layers(model)[0]
    whole = first.get_delta_weight("one")
    first.set_scale("one", 0.25)
    first.set_scale("absent", 3.0)
    assert torch.allclose(first.get_delta_weight("one"), 0.25 * whole)
    first.scale_layer(2.0)
    assert first.scaling["one"] == 0.5
    first.unscale_layer(2.0)
    assert first.scaling["one"] == 0.25
    for layer in layers(model):
        layer.set_scale("one", 0.0)
    assert torch.equal(model(x), base)
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(model(x), outputs["one"])


def test_equal_factors_are_shared_and_go_with_their_last_adapter():
    model = get_peft_model(mlp(), config(), adapter_name="one")
    model.add_adapter("two", config(rotation="right"))
    model.add_adapter("three", config(decomposition="qr"))
    model.add_adapter("four", config(save_factors=True))
    layer = layers(model)[0]
    assert layer.soda_factors["one"] is layer.soda_factors["two"]
    assert layer.soda_factors["one"] is not layer.soda_factors["three"]
    assert layer.soda_factors["one"] is not layer.soda_factors["four"]
    x = inputs(mlp())
    model.set_adapter("two")
    y = model(x)
    for name in ("one", "three", "four"):
        model.delete_adapter(name)
    assert torch.equal(model(x), y)
    assert list(layer.soda_factors) == ["two"]
    model.delete_adapter("two")
    assert not any("two" in getattr(layer, name) for name in layer.other_param_names)
    assert torch.equal(model.base_model.model(x), mlp()(x))


def test_mixed_batches():
    x = inputs(mlp())
    model = get_peft_model(mlp(), config(), adapter_name="one").eval()
    model.add_adapter("two", config(rotation="right", target_modules=["0"]))
    names = ["one", "__base__", "two", "one", "two"]
    mixed = model(x, adapter_names=names)
    with model.disable_adapter():
        expected = {"__base__": model(x)}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = model(x)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], expected[name][row], atol=1e-6)
    with pytest.raises(ValueError, match="one name for each of the 5 inputs"):
        model(x, adapter_names=["one"])
    with pytest.raises(ValueError, match=r"must name adapters of this model; got \['absent'\]"):
        model(x, adapter_names=["absent"] * 5)
    with pytest.raises(ValueError, match="must be None in training mode"):
        model.train()(x, adapter_names=names)
    assert not any(layer._forward_pre_hooks for layer in layers(model))


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(build, dtype):
    model = get_peft_model(build().to(dtype), config()).eval()
    x = inputs(build(), dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    y = model(x)
    model.merge_adapter()
    assert relative_error(model(x), y) <= 4 * TOLERANCE[dtype]
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(model(x), y)
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(model(x), build().to(dtype)(x))
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert relative_error(plain(x), y) <= 4 * TOLERANCE[dtype]


def test_merging_several_rounds_once_and_unmerges_all():
    model = get_peft_model(mlp().bfloat16(), config(), adapter_name="one")
    model.add_adapter("two", config(rotation="right"))
    layer = layers(model)[0]
    weight = layer.base_layer.weight.detach().clone()
    expected = weight + layer.get_delta_weight("one") + layer.get_delta_weight("two")
    model.merge_adapter(adapter_names=["one", "two"])
    assert torch.equal(layer.base_layer.weight, expected.bfloat16())
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    with pytest.warns(UserWarning, match="unmerged"):
        layer.unmerge()


def test_a_broken_adapter_is_not_merged_safely():
    model = get_peft_model(mlp(), config())
    layer = layers(model)[0]
    weight = layer.base_layer.weight.detach().clone()
    layer.soda_delta["default"].data[0] = torch.nan
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_nothing_is_added_while_merged():
    model = get_peft_model(mlp(), config())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"cannot be added while \['default'\] are merged"):
        model.add_adapter("two", config())
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"0: an adapter cannot be added while"):
        layers(model)[0].update_layer("two", config())


def test_hooked_and_foreign_base_layers_are_called():
    """A base layer with hooks, or of a subclass, computes its own product; the change is added."""
    seen = []
    model = get_peft_model(mlp(), config())
    x = inputs(mlp())
    y = model(x)
    layers(model)[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert relative_error(model(x), y) <= 1e-5
    assert seen

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.Sequential(Doubled(12, 12))
    expected = base(x)
    assert torch.allclose(get_peft_model(base, SODAConfig(target_modules=["0"]))(x), expected)


def test_conversion_to_lora():
    model = get_peft_model(mlp(), config(target_modules=["0"]))
    x = inputs(mlp())
    y = model(x)
    lora_config, state = peft.convert_to_lora(model, rank=12)
    lora = get_peft_model(mlp(), lora_config)
    set_peft_model_state_dict(lora, state)
    assert relative_error(lora(x), y) < 1e-4


def test_deepcopy_and_pickle():
    model = get_peft_model(mlp(), config())
    x = inputs(mlp())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        other(x).sum().backward()
        mine = layers(model)[0].soda_factors["default"].basis.left
        theirs = layers(other)[0].soda_factors["default"].basis.left
        assert theirs.data_ptr() != mine.data_ptr()


@pytest.mark.parametrize("build", [mlp, convnet])
def test_compiles_without_graph_breaks(build):
    model = get_peft_model(build(), config())
    x = inputs(build())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert relative_error(y, model(x)) <= 1e-6
    y.sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).sum().backward()
    for here, parameter in zip(
        found, [p for p in model.parameters() if p.requires_grad], strict=True
    ):
        assert torch.allclose(here, parameter.grad, rtol=1e-4, atol=1e-5)


def test_factors_made_in_inference_mode_serve_training_later():
    x = inputs(mlp())
    model = get_peft_model(mlp(), config(save_factors=True, inference_mode=True))
    with torch.inference_mode():
        model(x)
    model.set_adapter("default")
    for _ in range(2):
        model(x).sum().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        with torch.inference_mode():
            set_peft_model_state_dict(model, get_peft_model_state_dict(model))


def test_gpt2_with_conv1d(tmp_path):
    ids = torch.arange(8).view(2, 4)
    expected = gpt2()(ids).last_hidden_state
    model = get_peft_model(gpt2(), SODAConfig(task_type="FEATURE_EXTRACTION"))
    assert {layer.name.split(".")[-1] for layer in layers(model)} == {"c_attn"}
    assert relative_error(model(ids).last_hidden_state, expected) <= 1e-5
    layer = layers(model)[0]
    assert (layer.in_features, layer.out_features) == (16, 48)
    with torch.no_grad():
        layer.soda_delta["default"].normal_()
    y = model(ids).last_hidden_state
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape == (16, 48)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert torch.equal(loaded(ids).last_hidden_state, y)
    assert relative_error(loaded.merge_and_unload()(ids).last_hidden_state, y) <= 1e-5


def test_bert_all_linear_with_gradient_checkpointing():
    ids = torch.arange(8).view(2, 4)
    model = get_peft_model(bert(), SODAConfig(target_modules="all-linear"))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        output = model.train()(ids)
        (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(grads[0]) > 10
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("save_factors", [False, True])
def test_adapters_of_transformers(save_factors, tmp_path):
    """Its loader assigns parameters and buffers one by one and never calls load_state_dict."""
    ids = torch.arange(8).view(2, 4)
    model = bert()
    options = {"target_modules": ["query", "value"], "save_factors": save_factors}
    model.add_adapter(config(**options), "mine")
    y = model(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = bert()
    loaded.load_adapter(tmp_path, adapter_name="mine")
    assert torch.equal(loaded(ids).last_hidden_state, y)
    other = bert()
    other.encoder.layer[0].attention.self.query.weight.data.mul_(1.5)
    other.load_adapter(tmp_path, adapter_name="mine")
    if save_factors:
        pairs = zip(layers(other), layers(model), strict=True)
        for here, there in pairs:
            assert torch.equal(here.get_delta_weight("mine"), there.get_delta_weight("mine"))
        assert not torch.allclose(other(ids).last_hidden_state, y, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"query: the adapter 'mine' is refused"):
            other(ids)


def test_diffusers_unet(tmp_path):
    sample, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 12)

    def run(model, **options):
        with torch.no_grad():
            return model(sample, torch.tensor([1]), text, **options).sample

    model = unet()
    base = run(model)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    model.add_adapter(SODAConfig(target_modules=targets), "mine")
    assert relative_error(run(model), base) <= 1e-5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "soda_" in name:
                parameter.normal_(0, 0.1)
    y = run(model)
    assert relative_error(run(model, cross_attention_kwargs={"scale": 0.0}), base) <= 1e-6
    assert torch.equal(run(model), y)
    model.disable_adapters()
    assert torch.equal(run(model), base)
    model.enable_adapters()

    save_adapter(model, tmp_path, "mine")
    loaded = unet()
    load_adapter(loaded, tmp_path, "again")
    assert torch.equal(run(loaded), y)
    with warnings.catch_warnings():
        # PEFT warns of every second adapter that is injected into a bare model.
        warnings.simplefilter("ignore", UserWarning)
        loaded.add_adapter(config(target_modules=["to_q"]), "other")
    loaded.set_adapters(["again", "other"], [1.0, 0.0])
    assert relative_error(run(loaded), y) <= 1e-5
    loaded.set_adapters(["again"], [0.5])
    half = run(loaded)
    loaded.set_adapters(["again"], [1.0])
    loaded.fuse_lora(lora_scale=0.5, adapter_names=["again"])
    assert relative_error(run(loaded), half) <= 1e-5
    loaded.unfuse_lora()
    loaded.set_adapters(["again"], [1.0])
    assert torch.equal(run(loaded), y)
    loaded.delete_adapters("other")
    assert torch.equal(run(loaded), y)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"decomposition": "lu"}, ValueError, "decomposition must be one of 'svd', 'qr'; got 'lu'"),
        ({"rotation": "up"}, ValueError, "rotation must be one of"),
        ({"parametrization": "givens"}, ValueError, "parametrization must be one of"),
        ({"spectrum_activation": "exp"}, ValueError, "spectrum_activation must be one of"),
        ({"plan": "fast"}, ValueError, "plan must be one of"),
        ({"base_dtype": "int8"}, ValueError, "base_dtype must be one of"),
        ({"init_weights": "random"}, TypeError, "init_weights must be a bool"),
        ({"factors": 12}, TypeError, "factors must be a tuple of ints"),
        ({"factors": (3, 4.0)}, TypeError, "factors must hold ints"),
        ({"factors": (3, 0)}, ValueError, "factors must hold positive ints"),
        ({"factors": ()}, ValueError, "factors must hold at least one"),
        ({"factors": {"wide": (3, 4)}}, TypeError, "factors must have rotated dimensions"),
        ({"factors_pattern": [(3, 4)]}, TypeError, "factors_pattern must be a dict"),
        ({"factors": (3, 4), "rotation": None}, ValueError, "must be None when rotation is None"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform must be given"),
        (
            {"target_modules": ".*", "layers_to_transform": [0]},
            ValueError,
            "layers_to_transform must be None when target_modules is a str",
        ),
    ],
)
def test_bad_configs_are_refused_by_argument(options, error, text):
    with pytest.raises(error, match=text):
        SODAConfig(**options)


def test_configs_survive_json(tmp_path):
    original = SODAConfig(
        target_modules=["0"],
        factors={12: (3, 4)},
        factors_pattern={"0": (2, 6)},
        base_dtype=torch.bfloat16,
        plan="merged",
    )
    original.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded == original
    assert loaded.peft_type is original.peft_type is peft.PeftType("SODA")


def test_layers_that_cannot_be_adapted_are_refused_by_name():
    base = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"'0', a LayerNorm: it supports torch\.nn\.Linear, trans"):
        get_peft_model(copy.deepcopy(base), SODAConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"'2\.out_proj'.*uses its weight without calling it"):
        get_peft_model(copy.deepcopy(base), SODAConfig(target_modules=["out_proj"]))
    nn.utils.parametrizations.weight_norm(base[1])
    with pytest.raises(
        ValueError, match="'1', a ParametrizedLinear: its weight must be a plain, non"
    ):
        get_peft_model(base, SODAConfig(target_modules=["1"]))
    with pytest.raises(ValueError, match=r"0: factors must have product 12 \(the rank, min"):
        get_peft_model(mlp(), SODAConfig(target_modules=["0"], factors=(5, 5)))
    broken = mlp()
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        get_peft_model(broken, SODAConfig(target_modules=["0"]))


def test_registering_twice_and_registering_what_peft_has():
    before = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("SODA")]
    register("soda", SODAConfig, SODAModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("SODA")] is before
    assert list(peft.PeftType).count("SODA") == 1
    with pytest.raises(RuntimeError, match="already has a method named LORA"):
        register("lora", SODAConfig, SODAModel)
