"""Every method of the family against PEFT's contract: one row per method, one test per promise.

``python tests/contract_table.py`` runs this file and writes ``docs/peft_contract.md`` from what
passed. A new method is one row of ``METHODS``.
"""

import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import TOLERANCE, relative_error
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils import AuxiliaryTrainingWrapper  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import spectral_adapters.peft  # noqa: E402
from spectral_adapters.columns import random_columns  # noqa: E402
from spectral_adapters.peft import (  # noqa: E402
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
    adapter_columns,
    export_lora,
    fuse_and_unload,
    merge_and_unload,
    merge_changes,
    rename_adapter,
    to_lora,
    weight_changes,
)


@dataclass(frozen=True)
class Method:
    """A row of the matrix: a config and what is true of the method."""

    config: type
    options: dict[str, Any]
    #: Belongs to one base weight.
    of_weight: bool = True
    #: May sit on a quantised base layer.
    low_rank: bool = True

    def __call__(self, **options):
        """A config for the test models; ``init_weights=False`` is not the identity."""
        return self.config(**{"target_modules": ["0", "2"], **self.options, **options})


METHODS = {
    "SODA": Method(SODAConfig, {}, low_rank=False),
    "SVDiff": Method(SVDiffConfig, {}, low_rank=False),
    "Spectral Adapter A": Method(SpectralAdapterAConfig, {"r": 2}),
    "Spectral Adapter R": Method(SpectralAdapterRConfig, {"r": 3}),
    "LiDB": Method(LiDBConfig, {"r": 2, "a": 5, "b": 4}, of_weight=False),
}
WEIGHTS = "adapter_model.safetensors"

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))


def conv1d():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 4, 3, groups=2), nn.Flatten()
    )


def conv2d():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.Flatten(),
    )


def conv3d():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv3d(6, 4, 3, dilation=2), nn.Flatten()
    )


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=3), nn.Tanh(), nn.Linear(6, 5))


def hf_conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(8, 20))


MODELS = {
    "Linear": mlp,
    "Conv1d": conv1d,
    "Conv2d": conv2d,
    "Conv3d": conv3d,
    "Embedding": embedding,
    "HF Conv1D": hf_conv1d,
}
every_kind = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def inputs(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    first = model[0]
    if isinstance(first, nn.Embedding):
        return torch.randint(11, (5, 7), generator=generator)
    spatial = {nn.Conv1d: (8,), nn.Conv2d: (8, 8), nn.Conv3d: (6, 6, 6)}.get(type(first))
    shape = (5, 12) if spatial is None else (5, 4, *spatial)
    return torch.randn(shape, generator=generator).to(dtype)


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def steps(model, x, count=3, lr=0.05):
    """Some optimizer steps towards a target that the base does not reach."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    torch.manual_seed(7)
    target = torch.randn_like(model(x).detach().float())
    for _ in range(count):
        optimizer.zero_grad()
        (model(x).float() - target).square().mean().backward()
        optimizer.step()
    return model


def trained(method, build=mlp, dtype=torch.float32, **options):
    base = build().to(dtype)
    x = inputs(base, dtype)
    return steps(get_peft_model(base, method(**options)), x).eval()


@every_kind
@every_method
def test_identity_at_the_start_and_every_parameter_moves(method, build):
    """A fresh adapter is the base model; three steps move every parameter."""
    x = inputs(build())
    expected = build()(x)
    model = get_peft_model(build(), method())
    assert relative_error(model(x), expected) <= (0 if method.low_rank else 1e-5)
    assert all(
        torch.count_nonzero(layer.get_delta_weight("default")) == 0 for layer in layers(model)
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    steps(model, x)
    for name, parameter in model.named_parameters():
        assert (name in before) == parameter.requires_grad
        if name in before:
            assert not torch.equal(parameter, before[name]), name
    assert not torch.equal(model(x), expected)


@every_kind
@every_method
def test_random_start(method, build):
    """``init_weights=False`` is not the base model."""
    x = inputs(build())
    assert not torch.allclose(get_peft_model(build(), method(init_weights=False))(x), build()(x))


@every_kind
@every_method
def test_merge_and_unmerge(method, build):
    """Merging after a forward merges; unmerging gives the weight back to the last bit."""
    model = trained(method, build)
    x = inputs(build())
    y = model(x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    assert relative_error(model(x), y) <= 1e-5
    with model.disable_adapter():
        assert torch.equal(model(x), build()(x))
    model.merge_adapter()
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(model(x), y)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert relative_error(plain(x), y) <= 1e-5


@every_kind
@every_method
def test_save_and_load(method, build, tmp_path):
    """The file holds the trained numbers and nothing else of size; loading gives the same model."""
    model = trained(method, build)
    x = inputs(build())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    prefix = model.base_model.prefix
    numbers = {key: t for key, t in stored.items() if not key.endswith(f"{prefix}fingerprint")}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in numbers.values()) == count
    assert all(f".{prefix}" in key for key in stored)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(again(x), model(x))


@every_method
def test_save_factors(method, tmp_path):
    """``save_factors=True`` loads on any base and makes the change that was trained."""
    model = trained(method, save_factors=True)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = nn.Sequential(
        *(
            type(part)(*part.weight.shape[::-1]) if isinstance(part, nn.Linear) else part
            for part in mlp()
        )
    )
    loaded = PeftModel.from_pretrained(other, tmp_path)
    for here, there in zip(layers(loaded), layers(model), strict=True):
        expected = there.get_delta_weight("default")
        torch.testing.assert_close(here.get_delta_weight("default"), expected)


@pytest.fixture(scope="module")
def in_a_fresh_process(tmp_path_factory):
    """Outputs of every method's adapter in a process where the SVD returns other signs, by method.

    One process for all: importing PEFT is what takes the time.
    """
    folder = tmp_path_factory.mktemp("fresh")
    models = {name: trained(method) for name, method in METHODS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    torch.save({"base": mlp().state_dict(), "x": inputs(mlp())}, folder / "base.pt")
    code = f"""
import torch
from pathlib import Path
from torch import nn
import spectral_adapters.peft
from peft import PeftModel
svd = torch.linalg.svd
def flipped(matrix, full_matrices=True):
    u, s, vh = svd(matrix, full_matrices=full_matrices)
    signs = torch.where(torch.arange(len(s)) % 2 == 0, -1.0, 1.0).to(s)
    return u * signs, s, vh * signs[:, None]
torch.linalg.svd = flipped
data = torch.load({str(folder / "base.pt")!r})
found = {{}}
for name in {list(METHODS)!r}:
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))
    base.load_state_dict(data["base"])
    model = PeftModel.from_pretrained(base, Path({str(folder)!r}) / name)
    found[name] = model(data["x"]).detach()
torch.save(found, {str(folder / "y.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "y.pt")
    return {name: (found[name], model(inputs(mlp())).detach()) for name, model in models.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_process_with_other_signs(name, in_a_fresh_process):
    """Reload in a fresh process, where the SVD returns other signs: the same outputs."""
    found, expected = in_a_fresh_process[name]
    # Not to the last bit: GEMMs round by the alignment of memory, which another process has.
    assert relative_error(found, expected) <= 1e-6


@every_method
def test_another_base_weight(method, tmp_path):
    """An adapter of one base weight is refused on another, by layer and with the remedy."""
    model = trained(method)
    model.save_pretrained(tmp_path)
    other = mlp()
    other[0].weight.data += 0.1
    if method.of_weight:
        with pytest.raises(
            RuntimeError, match=r"0: the adapter 'default' is refused.*another base"
        ):
            PeftModel.from_pretrained(other, tmp_path)
    else:
        loaded = PeftModel.from_pretrained(other, tmp_path)
        for here, there in zip(layers(loaded), layers(model), strict=True):
            assert torch.equal(here.get_delta_weight("default"), there.get_delta_weight("default"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@every_kind
@every_method
def test_half_precision_bases(method, build, dtype):
    """Training on fp16 and bf16 bases: fp32 trained numbers, outputs as exact as the base's."""
    base = build().to(dtype)
    x = inputs(base, dtype)
    fresh = get_peft_model(copy.deepcopy(base), method())(x)
    assert relative_error(fresh, base(x)) <= (0 if method.low_rank else 4 * TOLERANCE[dtype])
    model = steps(get_peft_model(base, method()), x).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    y = model(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(model).double()(x if x.dtype == torch.int64 else x.double())
    assert relative_error(y, exact) <= 4 * TOLERANCE[dtype]


@every_method
def test_a_wider_base(method, tmp_path):
    """An adapter of a bf16 base loads on an fp32 copy of it."""
    model = trained(method, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    wide = mlp().bfloat16().float()
    loaded = PeftModel.from_pretrained(wide, tmp_path)
    for here, there in zip(layers(loaded), layers(model), strict=True):
        torch.testing.assert_close(
            here.get_delta_weight("default"), there.get_delta_weight("default")
        )


@every_method
def test_casts_keep_the_factors(method):
    """``model.to(bfloat16)`` and back: trained numbers and frozen factors keep their digits."""
    model = trained(method)
    expected = [layer.get_delta_weight("default") for layer in layers(model)]
    model.to(torch.bfloat16).to(torch.float32)
    for layer, delta in zip(layers(model), expected, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=0, atol=1e-7)


@every_method
def test_several_adapters(method):
    """Add, switch, combine, delete; disable really disables."""
    x = inputs(mlp())
    torch.manual_seed(3)
    model = get_peft_model(mlp(), method(init_weights=False)).eval()
    model.add_adapter("second", method(init_weights=False, target_modules=["0"]))
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    plain = mlp()
    for layer, linear in ((layers(model)[0], plain[0]), (layers(model)[1], plain[2])):
        for name in layer.configs:
            linear.weight.data += layer.get_delta_weight(name)
    assert relative_error(both, plain(x)) <= 1e-5
    with model.disable_adapter():
        assert torch.equal(model(x), mlp()(x))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert all("second" not in layer.configs for layer in layers(model))
    assert not any("second" in name for name, _ in model.named_parameters())
    assert not any("second" in key for key in model.state_dict())


@every_method
def test_rename(method, tmp_path):
    """``rename_adapter``: the same model, the same optimizer, under another name."""
    model = trained(method, modules_to_save=["4"])
    model.add_adapter("other", method(init_weights=False))
    x, names = inputs(mlp()), list(model.state_dict())
    y, optimizer = model(x), torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    (model(x) - 1).square().mean().backward()
    rename_adapter(model, "default", "first")
    assert model.active_adapters == ["first"] and list(model.peft_config) == ["first", "other"]
    assert torch.equal(model(x), y)
    renamed = [name.replace(".default", ".first") for name in names]
    assert sorted(model.state_dict()) == sorted(renamed)
    optimizer.step()
    changed = model(x)
    assert not torch.equal(changed, y)
    model.set_adapter("other")
    model.set_adapter("first")
    assert torch.equal(model(x), changed)
    model.save_pretrained(tmp_path, selected_adapters=["first"])
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "first")
    assert relative_error(loaded(x), changed) <= TOLERANCE[torch.float32]
    model.delete_adapter("first")
    rename_adapter(model, "other", "default")
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\]"):
        rename_adapter(model, "first", "second")
    with pytest.raises(ValueError, match="the model has 'default'"):
        rename_adapter(model, "default", "default")
    with pytest.raises(ValueError, match=r"new must be a non-empty str without a dot; got 'a.b'"):
        rename_adapter(model, "default", "a.b")
    lora = get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"'default' is one of PeftType\.LORA"):
        rename_adapter(lora, "default", "first")


@every_kind
@every_method
def test_mixed_batches(method, build):
    """``adapter_names``: each row of a batch through an adapter of its own."""
    x = inputs(build())
    torch.manual_seed(3)
    model = get_peft_model(build(), method(init_weights=False), adapter_name="one").eval()
    model.add_adapter("two", method(init_weights=False))
    names = ["one", "__base__", "two", "one", "two"]
    mixed = model(x, adapter_names=names)
    with model.disable_adapter():
        expected = {"__base__": model(x)}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = model(x)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row])
    assert model(x[:0], adapter_names=[]).shape == mixed[:0].shape


def tiny_decoder():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def tiny_encoder_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=50, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [tiny_decoder, tiny_encoder_decoder])
def test_mixed_batches_in_beam_search(build):
    """``generate(adapter_names=..., num_beams=...)``: all beams of a row go through its adapter."""
    config = partial(METHODS["LiDB"], target_modules="all-linear", init_weights=False, r=8)
    model = get_peft_model(build(), config(task_type="CAUSAL_LM"), adapter_name="one")
    model.add_adapter("two", config(task_type="CAUSAL_LM"))
    model.eval()
    for layer in layers(model):
        layer.set_scale("one", 20.0)
        layer.set_scale("two", 20.0)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    x = torch.tensor([[3, 4, 5]]).expand(4, -1)
    names = ["one", "__base__", "two", "one"]
    mixed = model.generate(input_ids=x, adapter_names=names, **options)
    with model.disable_adapter():
        expected = {"__base__": model.generate(input_ids=x[:1], **options)}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = model.generate(input_ids=x[:1], **options)
    assert not torch.equal(expected["one"], expected["two"])
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], expected[name][0])


@every_method
def test_scale(method):
    """``set_scale``, ``scale_layer``, ``unscale_layer``: W0 + scale dW."""
    model = trained(method)
    x = inputs(mlp())
    y = model(x)
    expected = mlp()
    for layer, linear in zip(layers(model), (expected[0], expected[2]), strict=True):
        linear.weight.data += 0.3 * layer.get_delta_weight("default")
        layer.set_scale("default", 0.15)
        layer.scale_layer(2)
    assert relative_error(model(x), expected(x)) <= 1e-5
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(model(x), y)


@every_method
def test_weighted_adapters(method):
    """``add_weighted_adapter`` where the algebra allows it, else a clear error."""
    options = {"spectrum_activation": "identity"} if method.config is SVDiffConfig else {}
    torch.manual_seed(3)
    model = get_peft_model(mlp(), method(init_weights=False, **options), adapter_name="one")
    model.add_adapter("two", method(init_weights=False, **options, target_modules=["0"]))
    add = model.base_model.add_weighted_adapter
    if method.config not in (SVDiffConfig, LiDBConfig):
        with pytest.raises(ValueError, match=r"a weighted sum of .* adapters is no"):
            add(["one", "two"], [0.5, 0.25], "sum")
        assert "sum" not in model.peft_config
        return
    add(["one", "two"], [0.5, 0.25], "sum")
    for layer in layers(model):
        terms = zip((0.5, 0.25), ("one", "two"), strict=True)
        expected = sum(w * layer.get_delta_weight(n) for w, n in terms if n in layer.configs)
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
    with pytest.raises(ValueError, match="must name adapters of this model"):
        add(["three"], [1.0], "other")
    for weights in ([], [float("nan")], 1.0, ["1"]):
        with pytest.raises(ValueError, match="weights must hold one finite number for each of 1"):
            add(["one"], weights, "other")
    with pytest.raises(TypeError, match="adapters must be a list of names"):
        add("one", [1.0], "other")
    with pytest.raises(ValueError, match="must be new"):
        add(["one"], [1.0], "two")
    for name in ("", "o.ther", 3):
        with pytest.raises(ValueError, match="adapter_name must be a non-empty str without a dot"):
            add(["one"], [1.0], name)
    with pytest.raises(TypeError, match=r"has no options \['density'\]"):
        add(["one"], [1.0], "other", density=0.5)
    assert list(model.peft_config) == ["one", "two", "sum"]
    add(["two"], None, "same")
    changes = [layers(model)[0].get_delta_weight(name) for name in ("two", "same")]
    torch.testing.assert_close(*changes)


@pytest.mark.parametrize("name", ["SVDiff", "LiDB"])
def test_weighted_adapters_of_different_modules(name):
    """The sum reaches the layers of every adapter, and keeps the modules that one of them saves."""
    options = {"spectrum_activation": "identity"} if name == "SVDiff" else {}
    config = partial(METHODS[name], init_weights=False, **options)
    torch.manual_seed(3)
    model = get_peft_model(mlp(), config(target_modules=["0"]), adapter_name="one")
    model.add_adapter("two", config(target_modules="2", modules_to_save=["4"]))
    model.add_adapter("three", config(modules_to_save=["4"]))
    last = model.base_model.model[4].modules_to_save
    last["two"].weight.data += 1
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.25], "sum")
    for layer, term in zip(layers(model), [(0.5, "one"), (0.25, "two")], strict=True):
        expected = term[0] * layer.get_delta_weight(term[1])
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
    assert torch.equal(last["sum"].weight, last["two"].weight)
    with pytest.raises(ValueError, match=r"4 is one of \['two', 'three'\]"):
        model.base_model.add_weighted_adapter(["two", "three"], [1.0, 1.0], "other")


@every_method
def test_modules_to_save(method, tmp_path):
    """``modules_to_save`` trains and stores a whole module beside the adapter."""
    model = steps(get_peft_model(mlp(), method(modules_to_save=["4"])), inputs(mlp())).eval()
    model.save_pretrained(tmp_path)
    assert not torch.equal(model.base_model.model[4].weight, mlp()[4].weight)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    y = model(inputs(mlp()))
    assert torch.equal(loaded(inputs(mlp())), y)
    rank = None if method.low_rank else 8
    with pytest.raises(ValueError, match=r"without modules_to_save.*'default' has \['4'\]"):
        to_lora(model, rank=rank)
    export_lora(model, tmp_path / "lora", rank=12)
    lora = PeftModel.from_pretrained(mlp(), tmp_path / "lora")
    assert relative_error(lora(inputs(mlp())), y) <= 1e-5


@every_method
def test_modules_to_save_are_taken_out(method):
    """A merged injected adapter leaves its copies, other ones what was there before."""
    x, kinds = inputs(mlp()), [type(module) for module in mlp()]

    def adapted():
        torch.manual_seed(3)
        model = mlp()
        inject_adapter_in_model(method(init_weights=False), model, "other")
        inject_adapter_in_model(method(init_weights=False, modules_to_save=["4"]), model)
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module.set_adapter("default")
        model[4].modules_to_save["default"].weight.data += 1
        return model.eval()

    model = adapted()
    y = model(x)
    assert not torch.equal(model[4].weight, mlp()[4].weight)
    plain = merge_and_unload(model)
    assert [type(module) for module in plain] == kinds
    assert list(plain.state_dict()) == list(mlp().state_dict())
    assert relative_error(plain(x), y) <= 1e-5
    others = (
        merge_and_unload(adapted(), "other"),
        merge_changes(adapted(), {}),
        fuse_and_unload(adapted(), ["other"], method="delta"),
    )
    for plain in others:
        assert [type(module) for module in plain] == kinds
        assert torch.equal(plain[4].weight, mlp()[4].weight)


@every_method
def test_choice_of_modules(method):
    """``exclude_modules``, "all-linear" (also for a second adapter), regular expressions."""
    model = get_peft_model(mlp(), method(exclude_modules=["2"]))
    assert [layer.name for layer in layers(model)] == ["0"]
    assert len(layers(get_peft_model(mlp(), method(target_modules="0|2")))) == 2
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    bert = get_peft_model(transformers.BertModel(config), method(target_modules="all-linear"))
    assert len(layers(bert)) == 13
    bert.add_adapter("two", method(target_modules="all-linear"))
    assert all("two" in layer.configs for layer in layers(bert))
    chosen = method(target_modules=["query"], layers_to_transform=[1])
    only = get_peft_model(transformers.BertModel(config), chosen)
    assert [layer.name for layer in layers(only)] == ["encoder.layer.1.attention.self.query"]


@every_method
def test_unadaptable_modules_are_refused(method):
    """Other modules, and ``target_parameters``, are refused by name."""
    with pytest.raises(ValueError, match=r"cannot adapt '0', a LayerNorm: it supports"):
        get_peft_model(nn.Sequential(nn.LayerNorm(4)), method(target_modules=["0"]))
    with pytest.raises((TypeError, ValueError), match="target_parameters"):
        method(target_parameters=["0.weight"])
    renormed = nn.Sequential(nn.Embedding(8, 6, max_norm=1.0))
    with pytest.raises(ValueError, match="max_norm"):
        get_peft_model(renormed, method(target_modules=["0"]))


@every_method
def test_gradient_checkpointing_and_hooks(method):
    """Checkpointing gives the same gradients; a hooked base layer is still called."""
    x = inputs(mlp())
    model = trained(method)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).sin().sum(), wanted)
    again = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
    for actual, exact in zip(torch.autograd.grad(again.sin().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(actual, exact)
    seen, y = [], model(x)
    layers(model)[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), y)
    assert seen


@every_kind
@every_method
def test_compile(method, build):
    """One graph, no break, the same outputs and gradients."""
    model = trained(method, build)
    x = inputs(build())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert relative_error(y, model(x)) <= 1e-5
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.sum(), wanted)
    for actual, exact in zip(found, torch.autograd.grad(model(x).sum(), wanted), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


@every_method
def test_autocast_adapter_dtype(method):
    """``autocast_adapter_dtype``: fp32 on a bf16 base, unless False asks for the base's own."""
    x = inputs(mlp(), torch.bfloat16)
    for choice, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(mlp().bfloat16(), method(), autocast_adapter_dtype=choice)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {dtype}
        steps(model, x)
        assert model(x).dtype == torch.bfloat16
        assert {p.dtype for p in trained} == {dtype}


@every_method
def test_unknown_options_are_refused(method):
    """Options of other methods are refused, not ignored."""
    for option in ("bias", "lora_alpha", "lora_dropout", "use_dora", "target_parameters"):
        with pytest.raises(TypeError, match=option):
            method(**{option: 1})


@every_method
def test_autocast(method):
    """Under autocast the output has its dtype, the trained numbers and gradients stay fp32."""
    model = trained(method)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(inputs(mlp()))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@every_method
def test_copies(method):
    """``deepcopy`` and ``pickle``."""
    model = trained(method)
    x = inputs(mlp())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin(x).sum().backward()


@every_method
def test_meta_base(method, tmp_path):
    """A base on the meta device: the adapter waits for its weights."""
    model = trained(method)
    x = inputs(mlp())
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = mlp()
    loaded = PeftModel.from_pretrained(empty, tmp_path)
    weights = {
        name.replace("0.", "0.base_layer.").replace("2.", "2.base_layer.")
        if name[0] in "02"
        else name: value
        for name, value in mlp().state_dict().items()
    }
    loaded.base_model.model.load_state_dict(weights, strict=False, assign=True)
    assert torch.equal(loaded(x), model(x))


@every_method
def test_conversion_to_lora(method):
    """``peft.convert_to_lora``."""
    model = trained(method, target_modules=["0"])
    x = inputs(mlp())
    lora_config, state = peft.convert_to_lora(model, rank=12)
    lora = get_peft_model(mlp(), lora_config)
    peft.set_peft_model_state_dict(lora, state)
    assert relative_error(lora(x), model(x)) < 1e-4


@every_kind
@every_method
def test_export_to_lora(method, build, tmp_path):
    """A LoRA folder that PEFT alone loads: exact for A, R and LiDB, with its error for the rest."""
    model = trained(method, build)
    x = inputs(build())
    refused = {conv1d: ("2", "groups=2"), conv2d: ("0", "padding_mode='reflect'")}
    refused[conv3d] = ("2", r"dilation=\(2, 2, 2\)")
    if build in refused:
        name, what = refused[build]
        with pytest.raises(ValueError, match=f"{name} is a convolution with {what}, which a LoRA"):
            export_lora(model, tmp_path, rank=2)
        if name == "0":
            return
        model = trained(method, build, target_modules=["0"])
    if not method.low_rank:
        with pytest.raises(ValueError, match=r"rank must be given: .* at full rank"):
            export_lora(model, tmp_path)
        rough = to_lora(model, rank=1).errors
        assert all(0.01 < error < 1 for error in rough.values())
    rank = None if method.low_rank else 20
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    errors = export_lora(model, tmp_path, rank=rank)
    assert all(error < 1e-6 for error in errors.values())
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert relative_error(loaded(x), model(x)) <= 1e-5


@every_method
def test_exported_rank(method):
    """A is a LoRA of rank 2r, R and LiDB are of rank r; smaller ranks tell their error."""
    if not method.low_rank:
        pytest.skip("the change has full rank")
    model = trained(method)
    r = method.options["r"]
    exact = to_lora(model)
    assert exact.rank == (2 * r if method.config is SpectralAdapterAConfig else r)
    assert set(exact.errors.values()) == {0.0}
    cut = to_lora(model, rank=1)
    assert cut.rank == 1 and all(0 < error < 1 for error in cut.errors.values())
    for layer in layers(model):
        a, b = (cut.state_dict[f"{layer.name}.lora_{side}.weight"] for side in "AB")
        delta = layer.get_delta_weight("default")
        error = float((b @ a - delta).norm() / delta.norm())
        assert error == pytest.approx(cut.errors[layer.name], rel=1e-3)
    with pytest.raises(ValueError, match="rank must be an int of at least 1; got 0"):
        to_lora(model, rank=0)
    with pytest.raises(ValueError, match=r"adapter_name must be one of \[\]|adapter_name must be"):
        to_lora(model, "absent")


@every_method
def test_merge_and_unload_of_an_injected_adapter(method):
    """The merged model has plain layers and the outputs of the adapter."""
    x = inputs(mlp())
    torch.manual_seed(3)
    model = inject_adapter_in_model(method(init_weights=False), mlp())
    y = model(x)
    plain = merge_and_unload(model)
    assert plain is model and not layers(plain)
    assert list(plain.state_dict()) == list(mlp().state_dict())
    assert relative_error(plain(x), y) <= 1e-5
    assert not plain._forward_pre_hooks and not plain._forward_hooks
    with pytest.raises(ValueError, match=r"adapter_name must be one of \[\]"):
        merge_and_unload(mlp())
    for name in ("merge_and_unload", "unload"):
        plain = getattr(get_peft_model(mlp(), method()), name)()
        assert not plain._forward_pre_hooks and not plain._forward_hooks


class Tied(nn.Module):
    """Two layers, or an embedding and an output layer, with one weight."""

    def __init__(self, first, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = first(9, 9)
        self.last = nn.Linear(9, 9, bias=False)
        self.last.weight = self.first.weight
        self.to(dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [nn.Linear, nn.Embedding])
@every_method
def test_tied_layers(method, first, dtype):
    """Adapters of layers with one weight are merged and unmerged to the last bit."""
    base = Tied(first, dtype)
    torch.manual_seed(3)
    config = method(target_modules=["first", "last"], init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).eval()
    x = torch.arange(9) if first is nn.Embedding else torch.randn(5, 9).to(dtype)
    y, expected, weight = model(x), Tied(first, dtype)(x), base.first.weight.detach().clone()
    for twin in (model, copy.deepcopy(model)):
        twin.merge_adapter()
        twin.unmerge_adapter()
        assert torch.equal(twin.base_model.model.last.weight, weight)
        assert torch.equal(twin(x), y)
        twin.merge_adapter()
        twin = copy.deepcopy(twin)
        with twin.disable_adapter():
            assert torch.equal(twin(x), expected)
        assert torch.equal(twin.base_model.model.first.weight, weight)
    # One of the two alone: what the other has merged stays.
    first_layer, last_layer = layers(model)
    model.merge_adapter()
    first_layer.unmerge()
    merged = (weight + last_layer.get_delta_weight("default")).to(dtype)
    assert torch.equal(last_layer.base_layer.weight, merged)
    first_layer.merge()
    last_layer.unmerge()
    first_layer.unmerge()
    assert torch.equal(last_layer.base_layer.weight, weight)
    # Merged and left there for good, and adapted again.
    model.merge_adapter()
    weight = base.first.base_layer.weight.detach().clone()
    plain = model.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(plain, config)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(plain.last.weight, weight)


def offload(layer):
    """What accelerate does to a layer whose weights it keeps elsewhere between forward passes."""
    hooks = pytest.importorskip("accelerate.hooks")
    weights = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(layer, hook)


@every_kind
@every_method
def test_offloaded_base(method, build):
    """A base that accelerate offloads: the same numbers, merged and unmerged too."""
    model = trained(method, build)
    x = inputs(build())
    y = model(x)
    for layer in layers(model):
        offload(layer.base_layer)
        assert layer.base_layer.weight.is_meta
    for _ in range(2):
        assert relative_error(model(x), y) <= 1e-5
    for layer in layers(model):
        assert not any(value.is_meta for value in layer._frozen("default")._state().values())
        assert not layer.get_delta_weight("default").is_meta
        with pytest.raises(ValueError, match="on the meta device, as offloading leaves it"):
            layer.merge()
        with pytest.raises(ValueError, match=r"moved to the meta device.*offloading"):
            layer._factors["default"].on(torch.device("meta"))
    model.merge_adapter()
    assert relative_error(model(x), y) <= 1e-5
    with model.disable_adapter():
        assert relative_error(model(x), build()(x)) <= 1e-6
    assert not layers(model)[0].merged
    with pytest.raises(ValueError, match=r"those of \['0', '2'\] are on the meta device"):
        merge_changes(model, weight_changes(model))
    assert relative_error(model(x), y) <= 1e-5


@every_method
def test_offloaded_model(method):
    """A whole model that accelerate offloads is refused, with what can be done instead."""
    accelerate = pytest.importorskip("accelerate")
    x = inputs(mlp())
    model = trained(method)
    y, device = model(x), torch.device("cpu")
    whole = accelerate.cpu_offload(copy.deepcopy(model), device)
    with pytest.raises(ValueError, match=r"0: the trained parameters of 'default' .* offload"):
        whole(x)
    accelerate.cpu_offload(model, device, preload_module_classes=["Linear"])
    for _ in range(2):
        assert relative_error(model(x), y) <= 1e-5


@every_method
def test_layerwise_casting(method):
    """diffusers keeps the base in another precision between forward passes."""
    hooks = pytest.importorskip("diffusers.hooks")
    base = mlp().to(torch.bfloat16)
    x = inputs(base, torch.bfloat16)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    torch.manual_seed(3)
    model = inject_adapter_in_model(method(init_weights=False), base).eval()
    y = model(x)
    hooks.apply_layerwise_casting(
        model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    )
    assert model[0].base_layer.weight.dtype == torch.float8_e4m3fn
    assert relative_error(model(x), y) <= 0.02


@every_method
def test_first_use_in_inference_mode(method, tmp_path):
    """What is recorded in inference mode can be loaded over and trained later."""
    model = trained(method)
    x = inputs(mlp())
    other = mlp()
    other[0].weight.data += 1
    later = get_peft_model(other, method())
    prefix = f"{method.config.method.lower()}_"
    base = {name: value for name, value in model.state_dict().items() if prefix not in name}
    later.load_state_dict(base, strict=False)
    with torch.inference_mode():
        later(x)
    later.load_state_dict(model.state_dict())
    assert relative_error(later(x), model(x)) <= 1e-6
    later(x).sum().backward()


@every_method
def test_a_config_for_several_models(method):
    """What is recorded in one model's config does not reach another model."""
    config = method()
    for dtype in (torch.bfloat16, torch.float32):
        model = get_peft_model(mlp().to(dtype), config)
        name = str(dtype).removeprefix("torch.")
        assert model.peft_config["default"].base_dtype == name
        assert all(layer.configs["default"].base_dtype == name for layer in layers(model))
    assert config.base_dtype is None


@pytest.mark.parametrize("plan", ["auto", "tokens", "factored", "merged"])
@pytest.mark.parametrize("name", ["SODA", "SVDiff"])
def test_a_trained_base_weight(name, plan):
    """A base weight that is trained too gets its gradient, and the layer follows it."""
    model = get_peft_model(mlp(), METHODS[name](plan=plan, init_weights=False))
    layer, x = layers(model)[0], inputs(mlp())
    layer.base_layer.requires_grad_(True)
    delta = layer.get_delta_weight("default").detach()
    target = torch.randn(5, 20)
    (layer(x) * target).sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, target.mT @ x)
    torch.testing.assert_close(layer.base_layer.bias.grad, target.sum(0))
    layer.base_layer.weight.data += 0.1
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("bits", [8, 4])
@every_method
def test_bitsandbytes_base(method, bits):
    """8- and 4-bit bases of bitsandbytes: trained, merged, unmerged, or refused with a reason."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    options = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.float32}
    quantised = kind(64, 64, **options)
    quantised.load_state_dict(linear.state_dict())
    base = nn.Sequential(quantised.to("cpu"))
    x = torch.randn(5, 64)
    expected = base(x)
    if not method.low_rank:
        with pytest.raises(ValueError, match=r"needs the dense weight at every step"):
            get_peft_model(base, method(target_modules=["0"]))
        return
    model = get_peft_model(base, method(target_modules=["0"]))
    assert torch.equal(model(x), expected)
    steps(model, x)
    y = model(x)
    assert not torch.allclose(y, expected)
    before = layers(model)[0].base_layer.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert layers(model)[0].base_layer.weight is not before
    assert relative_error(model(x), y) < (0.05 if bits == 8 else 0.3)
    model.unmerge_adapter()
    assert layers(model)[0].base_layer.weight is before
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_packs_its_weight_anew(nested):
    """4-bit weights as bitsandbytes arranges them for its CPU kernel are read as what they are."""
    bnb = pytest.importorskip("bitsandbytes")
    pack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this bitsandbytes has no such arrangement")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, compress_statistics=nested)
    model = get_peft_model(
        nn.Sequential(base.to("cpu")),
        SpectralAdapterAConfig(target_modules=["0"], r=4, init_weights=False),
    )
    layer = layers(model)[0]
    before, change = layer._base_matrix(), layer.get_delta_weight("default")
    weight = base.weight
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    packed = weight.data.clone()
    # The kernel's scales are in bf16.
    torch.testing.assert_close(layer._base_matrix(), before, rtol=2**-8, atol=0)
    assert torch.equal(weight.data, packed) and weight.quant_state.packing_format_for_cpu
    layer.merge()
    merged = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    assert relative_error(merged, before + change) < 0.15
    torch.testing.assert_close(layer._base_matrix(), before, rtol=2**-8, atol=0)
    layer.unmerge()
    assert base.weight is weight and torch.equal(weight.data, packed)


@every_method
@pytest.mark.parametrize(
    ("kind", "options"),
    [("Int8WeightOnlyConfig", {"version": 2}), ("Float8WeightOnlyConfig", {})],
)
def test_torchao_base(method, kind, options):
    """int8 and float8 bases of torchao: trained, merged, unmerged, or refused with a reason."""
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, kind)(**options)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(base, config)
    # What transformers keeps on a model that it loads quantised.
    base.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: config)
    )
    x = torch.randn(5, 64)
    expected = base(x)
    if not method.low_rank:
        with pytest.raises(ValueError, match=r"needs the dense weight at every step"):
            get_peft_model(base, method(target_modules=["0"]))
        return
    model = get_peft_model(base, method(target_modules=["0"]))
    assert torch.equal(model(x), expected)
    steps(model, x)
    y = model(x)
    assert not torch.allclose(y, expected)
    model.merge_adapter()
    assert relative_error(model(x), y) < 0.05
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


def test_a_quantised_weight_is_dequantised_once(monkeypatch):
    """Shapes and ranks of a new adapter do not cost another copy of the weight."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft.utils.quantization_utils import Bnb4bitBackend

    calls = []
    original = Bnb4bitBackend.get_base_weight
    monkeypatch.setattr(
        Bnb4bitBackend, "get_base_weight", lambda *args: calls.append(args) or original(*args)
    )
    base = nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu"))
    model = get_peft_model(base, METHODS["Spectral Adapter A"](target_modules=["0"]))
    assert len(calls) <= 2  # its dtype, then its columns
    calls.clear()
    steps(model, torch.randn(5, 64))
    assert not calls


def test_other_quantised_bases_are_refused(monkeypatch):
    """Libraries that were not tried are named and refused."""
    from peft.utils.quantization_utils import HqqBackend

    monkeypatch.setattr(
        "spectral_adapters.peft._model.resolve_quantization_backend",
        lambda *args, **kwargs: HqqBackend(),
    )
    with pytest.raises(ValueError, match=r"quantised by hqq: it supports bitsandbytes"):
        get_peft_model(mlp(), METHODS["Spectral Adapter A"]())


@every_method
def test_scaled_embeddings(method):
    """Embeddings that multiply what they look up, as those of Bart and Gemma."""
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    torch.manual_seed(0)
    base = nn.Sequential(BartScaledWordEmbedding(11, 6, 3, embed_scale=2.5), nn.Linear(6, 5))
    x = torch.randint(11, (5, 7))
    expected = base(x)
    model = get_peft_model(base, method(target_modules=["0"]))
    assert torch.equal(model(x), expected)
    steps(model, x)
    y = model(x)
    assert not torch.allclose(y, expected)
    model.merge_adapter()
    assert relative_error(model(x), y) <= TOLERANCE[torch.float32]


@every_method
def test_configs_survive_json(method, tmp_path):
    """A config comes back from ``adapter_config.json`` as it was."""
    config = method(exclude_modules=["4"])
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is method.config
    assert loaded.to_dict() == config.to_dict()


def test_rank_pattern_and_columns():
    """Columns and ranks of A and R by layer."""
    for config in (SpectralAdapterAConfig, SpectralAdapterRConfig):
        model = get_peft_model(
            mlp(), config(target_modules=["0", "2"], r=3, rank_pattern={"2": 5}, offset=1)
        )
        assert [layer.r["default"] for layer in layers(model)] == [3, 5]
        values = torch.linalg.svdvals(mlp()[2].weight)[1:6]
        found = layers(model)[1]._factors["default"].basis.singular_values
        torch.testing.assert_close(found, values)
        with pytest.warns(RuntimeWarning, match="rank_pattern has the key 'nowhere'"):
            get_peft_model(mlp(), config(target_modules=["0"], rank_pattern={"nowhere": 2}))
        with pytest.raises(ValueError, match=r"2: r \+ offset must be at most the rank 8"):
            get_peft_model(mlp(), config(target_modules=["2"], r=9))


@pytest.mark.parametrize("config", [SpectralAdapterAConfig, SpectralAdapterRConfig])
def test_random_columns(config, tmp_path):
    """Columns by the module's name and the seed, the same when an adapter is loaded."""
    options = {"target_modules": ["0", "2"], "columns": "random", "r": 3}
    model = get_peft_model(mlp(), config(**options, rank_pattern={"2": 5}, init_weights=False))
    found = adapter_columns(model)
    assert found["0"] == tuple(random_columns("0", min(mlp()[0].weight.shape), 3))
    assert found["2"] == tuple(random_columns("2", 8, 5))
    values = torch.linalg.svdvals(mlp()[2].weight)[list(found["2"])]
    basis = layers(model)[1]._factors["default"].basis
    torch.testing.assert_close(basis.singular_values, values)
    other = get_peft_model(mlp(), config(**options, seed=1))
    assert adapter_columns(other) != adapter_columns(get_peft_model(mlp(), config(**options)))
    listed = config(target_modules=["0"], columns="random", columns_pattern={"0": [4, 1]})
    model.add_adapter("listed", listed)
    assert adapter_columns(model, "listed") == {"0": (4, 1)}

    x = torch.randn(5, mlp()[0].in_features)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(loaded(x), model(x)) and not torch.equal(loaded(x), mlp()(x))
    if config is SpectralAdapterAConfig:
        assert spectral_adapters.peft.saved_columns(tmp_path) == found
    with pytest.raises(ValueError, match=r"0: r \+ offset must be at most the rank"):
        get_peft_model(mlp(), config(target_modules=["0"], columns="random", r=99))


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (SpectralAdapterAConfig, {"r": 0}, ValueError, "r must be an int of at least 1"),
        (SpectralAdapterAConfig, {"columns": "left"}, ValueError, "columns must be one of 'top'"),
        (
            SpectralAdapterAConfig,
            {"columns": [1, 1]},
            ValueError,
            r"columns must hold different indices of at least 0; got \[1, 1\]",
        ),
        (SpectralAdapterAConfig, {"columns": []}, ValueError, "columns must hold different"),
        (
            SpectralAdapterAConfig,
            {"columns_pattern": {"0": [-1]}},
            ValueError,
            r"columns_pattern\['0'\] must hold different indices of at least 0; got \[-1\]",
        ),
        (
            SpectralAdapterAConfig,
            {"columns_pattern": {"0": 3}},
            TypeError,
            r"columns_pattern\['0'\] must hold ints; got 3",
        ),
        (
            SpectralAdapterRConfig,
            {"columns_pattern": {0: [1, 2]}},
            TypeError,
            "columns_pattern must have names of modules for keys; got 0",
        ),
        (
            SpectralAdapterRConfig,
            {"columns_pattern": {"(": [1, 2]}},
            ValueError,
            r"columns_pattern must have names or regular expressions for keys; got '\('",
        ),
        (LiDBConfig, {"rank_pattern": {2: 2}}, TypeError, "rank_pattern must have names of mod"),
        (LiDBConfig, {"rank_pattern": {"*": 2}}, ValueError, "rank_pattern must have names or reg"),
        (
            SODAConfig,
            {"factors_pattern": {"[": (3, 4)}},
            ValueError,
            "factors_pattern must have names or regular",
        ),
        (SpectralAdapterAConfig, {"columns": 3}, TypeError, "columns must be one of 'top'.*got 3"),
        (SpectralAdapterAConfig, {"columns": "left"}, ValueError, "'bottom', 'random'; got 'left'"),
        (
            SpectralAdapterAConfig,
            {"columns": "random", "offset": 1},
            ValueError,
            "offset must be 0 with columns='random'; got 1",
        ),
        (SpectralAdapterRConfig, {"seed": -1}, ValueError, "seed must be an int of at least 0"),
        (SpectralAdapterAConfig, {"columns": "random", "r": 0}, ValueError, "r must be an int"),
        (SpectralAdapterAConfig, {"columns": [0, "1"]}, TypeError, "columns must hold ints"),
        (SpectralAdapterAConfig, {"r": "8"}, ValueError, "r must be an int of at least 1"),
        (SpectralAdapterAConfig, {"offset": -1}, ValueError, "offset must be an int of at least 0"),
        (SpectralAdapterAConfig, {"offset": "1"}, ValueError, "offset must be an int of at least"),
        (SpectralAdapterAConfig, {"algorithm": "qr"}, ValueError, "algorithm must be one of"),
        (SpectralAdapterAConfig, {"rank_pattern": [3]}, TypeError, "rank_pattern must be a dict"),
        (
            SpectralAdapterAConfig,
            {"columns": [1], "rank_pattern": {"0": 1}},
            ValueError,
            "rank_pattern must be None when columns holds indices",
        ),
        (
            LiDBConfig,
            {"rank_pattern": {"0": 0}},
            ValueError,
            r"rank_pattern\['0'\] must be an int of at least 1; got 0",
        ),
        (LiDBConfig, {"a": 0}, ValueError, "a must be an int of at least 1; got 0"),
        (LiDBConfig, {"seed": -1}, ValueError, "seed must be an int of at least 0; got -1"),
        (SVDiffConfig, {"plan": "best"}, ValueError, "plan must be one of"),
        (SVDiffConfig, {"spectrum_activation": "tanh"}, ValueError, "spectrum_activation must be"),
    ],
)
def test_bad_configs_are_refused_by_argument(config, options, error, message):
    """Bad options are refused by argument."""
    with pytest.raises(error, match=message):
        config(target_modules=["0"], **options)


@every_method
def test_bad_targets_are_refused_by_argument(method):
    """``target_modules`` and ``exclude_modules`` of a wrong type are named."""
    for option in ("target_modules", "exclude_modules"):
        with pytest.raises(TypeError, match=f"{option} must be a str or hold names of modules; go"):
            get_peft_model(mlp(), method(**{option: 3}))


@pytest.mark.parametrize("columns", [range(1, 4), {3, 1, 2}, (i for i in (1, 2, 3))])
def test_columns_of_any_kind_are_saved_as_lists(columns, tmp_path):
    """Ranges, sets and generators of columns for single modules."""
    config = SpectralAdapterAConfig(target_modules=["0"], columns_pattern={"0": columns})
    model = get_peft_model(mlp(), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert adapter_columns(loaded) == {"0": (1, 2, 3)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_lidb_does_not_depend_on_the_default_dtype(dtype, tmp_path):
    """LiDB's fingerprint is the same whatever torch makes of numbers without a dtype."""
    base, config = mlp(), METHODS["LiDB"](init_weights=False)
    get_peft_model(mlp(), config).save_pretrained(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        PeftModel.from_pretrained(base, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)


def test_lidb_with_another_seed():
    """The refusal says so."""
    config = partial(METHODS["LiDB"], target_modules=["0"], init_weights=False)
    saved = get_peft_model(mlp(), config()).state_dict()
    with pytest.raises(RuntimeError, match=r"another seed .* \w+\(left=5, right=4, seed=1\)"):
        get_peft_model(mlp(), config(seed=1)).load_state_dict(saved)


def test_lidb_on_another_shape(tmp_path):
    """LiDB's trained numbers have the same shapes on every layer; the layer's own counts."""
    config = partial(METHODS["LiDB"], target_modules=["0"], init_weights=False)
    get_peft_model(nn.Sequential(nn.Linear(12, 20)), config()).save_pretrained(tmp_path)
    other = get_peft_model(nn.Sequential(nn.Linear(10, 16)), config())
    with pytest.raises(RuntimeError, match=r"trained on a weight of another shape than \(16, 10\)"):
        other.load_adapter(tmp_path, "default")


def test_rank_pattern_of_lidb():
    """Ranks of LiDB by layer."""
    config = partial(LiDBConfig, target_modules=["0", "2"], r=3, rank_pattern={"2": 5})
    model = get_peft_model(mlp(), config())
    assert [layer.r["default"] for layer in layers(model)] == [3, 5]
    assert [layer.lidb_a["default"].shape[1] for layer in layers(model)] == [3, 5]
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="adapters must have rank_pattern=None"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    with pytest.warns(RuntimeWarning, match="rank_pattern has the key 'nowhere'"):
        get_peft_model(mlp(), LiDBConfig(target_modules=["0"], rank_pattern={"nowhere": 2}))


def test_one_column_cannot_be_rotated():
    """R needs two columns."""
    with pytest.raises(ValueError, match="0: r must be at least 2"):
        get_peft_model(mlp(), SpectralAdapterRConfig(target_modules=["0"], r=1))


def test_two_methods_do_not_share_a_layer():
    """The second is refused by name, and the first goes on."""
    model = inject_adapter_in_model(SODAConfig(target_modules=["0", "2"]), mlp(), "first")
    x = inputs(mlp())
    before = model(x)
    with pytest.raises(ValueError, match=r"0: a SVDIFF adapter cannot be added.*\['SODA'\]"):
        inject_adapter_in_model(SVDiffConfig(target_modules=["0"]), model, "second")
    assert torch.equal(model(x), before)


def test_the_export_list_is_frozen():
    """The public names."""
    assert sorted(spectral_adapters.peft.__all__) == [
        "FUSION_METHODS",
        "LiDBConfig",
        "LoRAExport",
        "SODAConfig",
        "SVDiffConfig",
        "SpectralAdapterAConfig",
        "SpectralAdapterRConfig",
        "absorb",
        "adapter_columns",
        "adapter_moments",
        "changes_to_lora",
        "export_lora",
        "fuse",
        "fuse_and_unload",
        "init_orthogonal_lora",
        "load_adapter",
        "merge_and_unload",
        "merge_changes",
        "refresh_factors",
        "rename_adapter",
        "restore_adapter",
        "save_adapter",
        "saved_columns",
        "to_lora",
        "weight_changes",
    ]
