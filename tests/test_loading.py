"""Folders of adapters that do not fit: what is refused is named, and leaves no trace."""

import json
import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, inject_adapter_in_model

from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
    load_adapter,
    restore_adapter,
    save_adapter,
)

TARGETS = {"target_modules": ["0", "2"]}


def base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 3))


def adapted(config, *, model=None, name="default"):
    """A model whose adapter is not the identity."""
    model = inject_adapter_in_model(config, base() if model is None else model, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs():
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(2))


def everything(model):
    """What a load could have changed: structure, numbers, and what is active, trained or hooked."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    structure = [(name, type(module)) for name, module in model.named_modules()]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    rest = [
        (
            list(getattr(module, "active_adapters", ())),
            list(vars(module)),
            list(module._forward_pre_hooks),
        )
        for module in model.modules()
    ]
    configs = list(getattr(model, "peft_config", ["none"]))
    return state, (structure, trained, rest, configs, model(inputs()).tolist())


def assert_unchanged(before, model):
    after = everything(model)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name


OPTIONS = [
    (SODAConfig, {}, {"rotation": "right"}),
    (SODAConfig, {}, {"rotation": None}),
    (SODAConfig, {}, {"decomposition": "qr"}),
    (SODAConfig, {}, {"parametrization": "stiefel"}),
    (SODAConfig, {}, {"spectrum_activation": "softplus"}),
    (SODAConfig, {}, {"basis_dtype": "float32"}),
    (SVDiffConfig, {}, {"spectrum_activation": "identity"}),
    (SpectralAdapterAConfig, {"r": 4}, {"columns": "bottom"}),
    (SpectralAdapterAConfig, {"r": 4}, {"offset": 4}),
    (SpectralAdapterAConfig, {"r": 4, "columns": "random"}, {"seed": 1}),
    (SpectralAdapterRConfig, {"r": 4}, {"columns_pattern": {"0": [5, 6, 7, 8]}}),
    (LiDBConfig, {}, {"seed": 1}),
]


@pytest.mark.parametrize(
    ("kind", "options", "other"), OPTIONS, ids=[f"{k.method} {o}" for k, _, o in OPTIONS]
)
def test_an_option_that_changes_the_meaning_is_named(kind, options, other, tmp_path):
    save_adapter(adapted(kind(**TARGETS, **options)), tmp_path)
    model = adapted(kind(**TARGETS, **{**options, **other}))
    before = everything(model)
    ((name, value),) = other.items()
    saved = getattr(kind(**TARGETS, **options), name)
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        restore_adapter(model, tmp_path)
    assert f"{name} must be {saved!r}, as it was for" in str(error.value)
    assert str(error.value).endswith(f"got {value!r}")
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("kind", "options", "other"),
    [
        (
            SODAConfig,
            {},
            {
                "plan": "merged",
                "init_weights": False,
                "factors": {12: (3, 4)},
                "target_modules": "[02]",
            },
        ),
        (SODAConfig, {}, {"recompute": True}),
        (SpectralAdapterAConfig, {"r": 4}, {"seed": 1, "r": None, "rank_pattern": {"0|2": 4}}),
        (LoraConfig, {"r": 4}, {"lora_dropout": 0.1}),
    ],
    ids=["SODA", "recompute", "A", "LoRA"],
)
def test_other_options_may_differ(kind, options, other, tmp_path):
    saved = adapted(kind(**TARGETS, **options)).eval()
    save_adapter(saved, tmp_path)
    model = adapted(kind(**{**TARGETS, **options, **other})).eval()
    restore_adapter(model, tmp_path)
    assert torch.allclose(model(inputs()), saved(inputs()), atol=1e-5)


def test_another_method_is_named(tmp_path):
    save_adapter(adapted(SODAConfig(**TARGETS)), tmp_path)
    with pytest.raises(ValueError, match=r"peft_type must be 'SODA'.*got 'SVDIFF'"):
        restore_adapter(adapted(SVDiffConfig(**TARGETS)), tmp_path)


REFUSALS = {
    "shape": (lambda: adapted(SODAConfig(**TARGETS, factors_pattern={"2": (2, 6)})), ValueError),
    "second base": (
        lambda: adapted(SODAConfig(**TARGETS), model=nn.Sequential(*base()[:2], *base(1)[2:])),
        RuntimeError,
    ),
    "layer": (lambda: adapted(SODAConfig(target_modules=["0", "2", "3"])), ValueError),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_restore_changes_nothing(case, tmp_path):
    build, error = REFUSALS[case]
    save_adapter(build(), tmp_path)
    model = adapted(SODAConfig(**TARGETS))
    before = everything(model)
    with pytest.raises(error):
        restore_adapter(model, tmp_path)
    assert_unchanged(before, model)


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_first_adapter_is_taken_out(case, tmp_path):
    build, error = REFUSALS[case]
    save_adapter(build(), tmp_path)
    if case == "layer":
        # One that lacks what its config asks for.
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["target_modules"] = ["0"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    elif case == "shape":
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["factors_pattern"] = None
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = base()
    model[3].weight.requires_grad_(False)
    before = everything(model)
    with pytest.raises(error):
        load_adapter(model, tmp_path)
    assert_unchanged(before, model)
    save_adapter(adapted(SODAConfig(**TARGETS)), tmp_path / "good")
    load_adapter(model, tmp_path / "good")
    assert not torch.allclose(model(inputs()), base()(inputs()), atol=1e-3)


def test_a_refused_third_adapter_leaves_the_active_one(tmp_path):
    save_adapter(adapted(SODAConfig(**TARGETS), model=base(1)), tmp_path)
    model = adapted(SODAConfig(**TARGETS), name="a")
    adapted(SODAConfig(**TARGETS), model=model, name="b")
    assert model[0].active_adapters == ["b"]
    before = everything(model)
    with pytest.raises(RuntimeError, match="refused"):
        load_adapter(model, tmp_path, "c")
    assert_unchanged(before, model)
    model(inputs()).sum().backward()
    assert model[0].soda_delta["b"].grad is not None


def test_a_config_that_does_not_fit_a_later_layer(tmp_path):
    config = SpectralAdapterAConfig(**TARGETS, r=10, rank_pattern={"0": 4})
    save_adapter(adapted(config), tmp_path)
    model = nn.Sequential(*base()[:2], nn.Linear(12, 8))
    before = everything(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2: r .* must be at most the rank 8"):
            load_adapter(model, tmp_path)
        assert_unchanged(before, model)


def test_a_refused_foreign_adapter_leaves_no_trace(tmp_path):
    config = LoraConfig(**TARGETS, modules_to_save=["3"], init_lora_weights=False)
    save_adapter(inject_adapter_in_model(config, base()), tmp_path)
    model = nn.Sequential(*base()[:2], nn.Linear(12, 8), nn.Linear(8, 3))
    before = everything(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapter(model, tmp_path)
    assert_unchanged(before, model)
    wider = adapted(LoraConfig(**TARGETS, r=4))
    before = everything(wider)
    with pytest.raises(RuntimeError, match="size mismatch"):
        restore_adapter(wider, tmp_path)
    assert_unchanged(before, wider)


@pytest.mark.parametrize("kind", [SODAConfig, LoraConfig])
def test_modules_that_are_trained_whole_are_loaded(kind, tmp_path):
    config = kind(**TARGETS, modules_to_save=["3"])
    saved = adapted(config)
    save_adapter(saved, tmp_path / "whole")
    loaded, restored = (
        base(),
        inject_adapter_in_model(kind(**TARGETS, modules_to_save=["3"]), base()),
    )
    load_adapter(loaded, tmp_path / "whole")
    restore_adapter(restored, tmp_path / "whole")
    for model in (loaded, restored):
        assert torch.allclose(model(inputs()), saved(inputs()), atol=1e-5)
    save_adapter(adapted(kind(**TARGETS)), tmp_path / "less")
    before = everything(restored)
    with pytest.raises(ValueError, match=r"less lacks '3\.weight'"):
        restore_adapter(restored, tmp_path / "less")
    assert_unchanged(before, restored)


def test_a_unet_that_refused_an_adapter_is_saved_as_before(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel
    from tiny_pipelines import unet

    other, model = unet(), unet()
    other.add_adapter(SODAConfig(target_modules=["to_q"]))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "soda_delta" in name:
                parameter.fill_(0.1)
    save_adapter(other, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="refused"):
        load_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "unet")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    # It has room for another one.
    model.add_adapter(SODAConfig(target_modules=["to_q"]))


def test_components_get_an_adapter_all_or_none(tmp_path):
    pytest.importorskip("diffusers")
    from spectral_adapters import diffusers

    diffusers.save_adapter(
        {"text": adapted(SODAConfig(**TARGETS)), "unet": adapted(SODAConfig(**TARGETS))}, tmp_path
    )
    text, befores = base(), everything(base())
    for others, error in (({}, ValueError), ({"unet": base(1)}, RuntimeError)):
        with pytest.raises(error):
            diffusers.load_adapter({"text": text, **others}, tmp_path)
        assert_unchanged(befores, text)
    pipe = {"text": text, "unet": base()}
    diffusers.load_adapter(pipe, tmp_path)
    assert sorted(diffusers.adapted_components(pipe)) == ["text", "unet"]


def test_bad_arguments_are_named(tmp_path):
    save_adapter(adapted(SODAConfig(**TARGETS)), tmp_path / "good")
    for name in ("x.y", "", 3):
        with pytest.raises(ValueError, match="adapter_name must be a non-empty str without a dot"):
            load_adapter(base(), tmp_path / "good", name)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        load_adapter("model", tmp_path / "good")
    for text in ("", "{", "[]", "{}", '{"peft_type": "NONE"}'):
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "good", broken, dirs_exist_ok=True)
        (broken / "adapter_config.json").write_text(text)
        for act in (load_adapter, restore_adapter):
            model = base() if act is load_adapter else adapted(SODAConfig(**TARGETS))
            with pytest.raises(ValueError, match=r"adapter_config\.json is no whole config"):
                act(model, broken)
    (broken / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"):
        load_adapter(base(), broken)
