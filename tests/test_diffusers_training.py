"""Training of pipelines as diffusers' example scripts do it, with the edits of our table.

``tests/example_scripts.py`` runs the scripts themselves; this is the same with a loop of our own.
"""

import pytest
import torch
from torch.nn.functional import mse_loss

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import accelerate
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline

from spectral_adapters.diffusers import (
    load_adapter,
    register_checkpoint_hooks,
    save_adapter,
)
from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
)

PIPELINES = {"SD": tiny_pipeline, "SDXL": tiny_xl_pipeline, "SD3": tiny_sd3_pipeline}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "SODA": lambda: SODAConfig(target_modules=TARGETS),
    "SVDiff": lambda: SVDiffConfig(target_modules=TARGETS),
    "A": lambda: SpectralAdapterAConfig(target_modules=TARGETS, r=2),
    "R": lambda: SpectralAdapterRConfig(target_modules=TARGETS, r=4),
    "LiDB": lambda: LiDBConfig(target_modules=TARGETS),
}


def denoiser_of(pipe):
    return "transformer" if "transformer" in pipe.components else "unet"


def conditions(pipe):
    """Text conditions as keyword arguments of the denoiser."""
    with torch.no_grad():
        if denoiser_of(pipe) == "transformer":
            embeddings, _, pooled, _ = pipe.encode_prompt("a cat", None, None)
            return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
        if hasattr(pipe, "text_encoder_2"):
            embeddings, _, pooled, _ = pipe.encode_prompt("a cat")
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
            return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}
        embeddings, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
        return {"encoder_hidden_states": embeddings}


def train(pipe, config, steps, *, checkpoint=None, resume=None):
    """Some steps with accelerate; returns the folder-ready denoiser by name."""
    name = denoiser_of(pipe)
    denoiser = pipe.components[name].requires_grad_(False)
    denoiser.add_adapter(config)
    accelerator = accelerate.Accelerator(cpu=True)
    register_checkpoint_hooks(accelerator, {name: denoiser})
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    prepared, optimizer = accelerator.prepare(denoiser, optimizer)
    known, first = conditions(pipe), 0
    if resume is not None:
        accelerator.load_state(resume)
        first = int((resume / "step").read_text())
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        target = torch.randn(1, 4, 8, 8, generator=generator)
        output = prepared(latents, timestep=torch.tensor([500]), **known, return_dict=False)[0]
        accelerator.backward(mse_loss(output, target))
        optimizer.step()
        optimizer.zero_grad()
        if checkpoint is not None and step == 1:
            accelerator.save_state(checkpoint)
            (checkpoint / "step").write_text("2")
    return {name: accelerator.unwrap_model(prepared)}


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_train_resume_save_load(build, config, tmp_path):
    base = drawn(build(tmp_path / "base"))
    images = []
    for folder, resume in (("once", None), ("twice", tmp_path / "checkpoint")):
        checkpoint = tmp_path / "checkpoint" if resume is None else None
        pipe = build(tmp_path / f"{folder} trained")
        modules = train(pipe, config(), 3, checkpoint=checkpoint, resume=resume)
        save_adapter(modules, tmp_path / folder)
        fresh = build(tmp_path / f"{folder} fresh")
        load_adapter(fresh, tmp_path / folder)
        images += [drawn(pipe), drawn(fresh)]
    assert not torch.allclose(images[0], base, atol=1e-4)
    for other in images[1:]:
        assert torch.equal(other, images[0])
    assert not list((tmp_path / "checkpoint").glob("model*"))


def test_checkpoint_hooks_lose_nothing(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ValueError, match="no component has 'default'"):
        register_checkpoint_hooks(accelerator, {"unet": pipe.unet})
    pipe.unet.add_adapter(CONFIGS["A"]())
    register_checkpoint_hooks(accelerator, {"unet": pipe.unet, "vae": pipe.vae})
    accelerator.prepare(pipe.unet)
    accelerator.save_state(tmp_path / "fine")
    assert (tmp_path / "fine" / "unet" / "adapter_model.safetensors").is_file()
    accelerator.prepare(pipe.text_encoder)
    with pytest.raises(ValueError, match=r"components must hold every prepared model.*CLIPText"):
        accelerator.save_state(tmp_path / "refused")


def test_checkpoint_hooks_refuse_another_config_and_change_nothing(tmp_path):
    def prepared(**options):
        torch.manual_seed(0)
        modules = {"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)}
        modules = {name: torch.nn.Sequential(module) for name, module in modules.items()}
        for name, module in modules.items():
            config = SODAConfig(target_modules=["0"], **(options if name == "b" else {}))
            inject_adapter_in_model(config, module)
            with torch.no_grad():
                module[0].soda_delta["default"].add_(torch.rand(8))
        accelerator = accelerate.Accelerator(cpu=True)
        register_checkpoint_hooks(accelerator, modules)
        accelerator.prepare(*modules.values())
        return accelerator, modules

    accelerator, _ = prepared()
    accelerator.save_state(tmp_path)
    other, modules = prepared(rotation="right")
    modules["a"][0].soda_delta["default"].data.mul_(2.0)
    before = modules["a"][0].soda_delta["default"].detach().clone()
    with pytest.raises(ValueError, match=r"rotation must be 'left'.*got 'right'"):
        other.load_state(tmp_path)
    assert torch.equal(modules["a"][0].soda_delta["default"], before)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_checkpoint_of_stable_diffusion_holds_only_trained_numbers(config, tmp_path):
    """The attention of a UNet of SD-1.5's size: 128 layers, 3.4 GB in fp32; the file has MB."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet.add_adapter(config())
    save_adapter({"unet": unet}, tmp_path)
    file = tmp_path / "unet" / "adapter_model.safetensors"
    tensors = load_file(file)
    trained = [p for p in unet.parameters() if p.requires_grad]
    fingerprints = [key for key in tensors if key.endswith("fingerprint")]
    assert len(fingerprints) == 128 and len(tensors) == 128 + len(trained)
    numbers = sum(parameter.numel() for parameter in trained)
    assert sum(tensor.numel() for tensor in tensors.values()) == numbers + 128 * 161
    assert file.stat().st_size < 4 * numbers + 400 * len(tensors) < 4e6
