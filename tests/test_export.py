"""Adapters of pipelines as LoRA files and merged checkpoints: the same images without us."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import peft
from tiny_pipelines import tiny_pipeline, tiny_xl_pipeline

from spectral_adapters import cli
from spectral_adapters.diffusers import (
    export_lora,
    export_merged,
    load_adapter,
    save_adapter,
)
from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
)
from spectral_adapters.peft import export_lora as export_component

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
EXACT = [
    SpectralAdapterAConfig(target_modules=TARGETS, r=3, init_weights=False),
    SpectralAdapterRConfig(target_modules=TARGETS, r=3, init_weights=False),
    LiDBConfig(target_modules=TARGETS, r=2, init_weights=False),
]
FULL_RANK = [
    SODAConfig(target_modules=TARGETS, init_weights=False),
    SVDiffConfig(target_modules=TARGETS, init_weights=False),
]
PIPELINES = {"SD": tiny_pipeline, "SDXL": tiny_xl_pipeline}


def name(config):
    return config.method


def adapted(build, folder, config, text_encoders=True):
    pipe = build(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(2)
    pipe.unet.add_adapter(config)
    if text_encoders:
        options = {"target_modules": ["q_proj", "out_proj"], "init_weights": False}
        if hasattr(config, "r"):
            options["r"] = config.r
        pipe.text_encoder.add_adapter(type(config)(**options))
    return pipe


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat",
        num_inference_steps=3,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("config", EXACT, ids=name)
def test_exact_lora_files_give_the_same_images(config, build, tmp_path):
    pipe = adapted(build, tmp_path / "a", config)
    plain = build(tmp_path / "b")
    before, expected = drawn(plain), drawn(pipe)
    assert not torch.allclose(before, expected, atol=1e-3)
    for file_format in ("diffusers", "kohya"):
        errors = export_lora(pipe, tmp_path / file_format, file_format=file_format)
        assert set(errors) == {"unet", "text_encoder"}
        plain.load_lora_weights(tmp_path / file_format, adapter_name=file_format)
        torch.testing.assert_close(drawn(plain), expected, rtol=0, atol=2e-5)
        plain.unload_lora_weights()
        torch.testing.assert_close(drawn(plain), before, rtol=0, atol=0)


@pytest.mark.parametrize("config", FULL_RANK, ids=name)
def test_full_rank_methods_are_cut_or_merged(config, tmp_path):
    pipe = adapted(tiny_pipeline, tmp_path / "a", config)
    expected = drawn(pipe)
    with pytest.raises(ValueError, match="rank must be given"):
        export_lora(pipe, tmp_path / "lora")
    distances = []
    for rank in (1, 4, 16):
        errors = export_lora(pipe, tmp_path / f"lora{rank}", rank=rank)
        plain = tiny_pipeline(tmp_path / f"base{rank}")
        plain.load_lora_weights(tmp_path / f"lora{rank}")
        distances.append(float((drawn(plain) - expected).square().mean()))
        assert max(errors["unet"].values()) < (1e-6 if rank == 16 else 1)
    assert distances[2] < 1e-9 < distances[0]
    export_merged(pipe, tmp_path / "merged")
    loaded = type(pipe).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(drawn(loaded), expected, rtol=0, atol=2e-5)
    assert not hasattr(loaded.unet, "peft_config")
    with pytest.raises(ValueError, match="no component has 'default'"):
        export_merged(pipe, tmp_path / "again")


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("config", [*EXACT, *FULL_RANK], ids=name)
def test_adapter_folders_give_the_same_images(config, build, tmp_path):
    pipe = adapted(build, tmp_path / "a", config)
    save_adapter(pipe, tmp_path / "adapter")
    fresh = build(tmp_path / "b")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(drawn(fresh), drawn(pipe))


def test_command_line(tmp_path, capsys):
    base = tiny_pipeline(tmp_path / "a")
    base.save_pretrained(tmp_path / "base")
    config = SpectralAdapterAConfig(target_modules=TARGETS, r=3, init_weights=False)
    pipe = adapted(tiny_pipeline, tmp_path / "b", config, text_encoders=False)
    expected = drawn(pipe)
    save_adapter(pipe, tmp_path / "adapter")
    common = ["export", "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    for file_format in cli.EXPORT_FORMATS:
        output = tmp_path / file_format
        assert cli.main([*common, "--output", str(output), "--format", file_format]) == 0
        if file_format == "peft":
            from peft import PeftModel

            plain = tiny_pipeline(tmp_path / "for peft")
            plain.unet = PeftModel.from_pretrained(plain.unet, output / "unet")
        elif file_format == "merged":
            plain = type(pipe).from_pretrained(output)
        else:
            plain = tiny_pipeline(tmp_path / f"for {file_format}")
            plain.load_lora_weights(output)
        torch.testing.assert_close(drawn(plain), expected, rtol=0, atol=2e-5)
    assert "layers, exact" in capsys.readouterr().out
    assert cli.main([*common, "--output", str(tmp_path / "cut"), "--rank", "1"]) == 0
    assert "relative error of the change" in capsys.readouterr().out
    bad = [*common, "--output", str(tmp_path / "x")]
    assert cli.main([*bad, "--format", "merged", "--rank", "3"]) == cli.USAGE_ERROR
    assert cli.main([*bad, "--rank", "0"]) == cli.USAGE_ERROR
    assert "rank must be an int of at least 1; got 0" in capsys.readouterr().err
    bad[4] = str(tmp_path / "nowhere")
    assert cli.main(bad) == cli.USAGE_ERROR
    assert "folder must hold an adapter" in capsys.readouterr().err


def test_exported_config_means_the_adapted_modules_alone(tmp_path):
    def model():
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        return torch.nn.Sequential(torch.nn.Linear(8, 8), inner, torch.nn.Linear(8, 4))

    config = SpectralAdapterAConfig(target_modules=r"0|2", r=2, init_weights=False)
    adapted_model, x = peft.get_peft_model(model(), config), torch.randn(3, 8)
    export_component(adapted_model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    names = {name for name, _ in loaded.named_modules() if name.endswith("lora_A")}
    assert names == {f"base_model.model.{index}.lora_A" for index in (0, 2)}
    torch.testing.assert_close(loaded(x), adapted_model(x), rtol=0, atol=1e-5)


def test_exported_files_need_nothing_of_us(tmp_path):
    config = SpectralAdapterRConfig(target_modules=TARGETS, r=3, init_weights=False)
    pipe = adapted(tiny_pipeline, tmp_path / "a", config, text_encoders=False)
    export_lora(pipe, tmp_path / "lora")
    tiny_pipeline(tmp_path / "b").save_pretrained(tmp_path / "base")
    code = f"""
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(tmp_path / "base")!r})
pipe.load_lora_weights({str(tmp_path / "lora")!r})
assert not any(name.startswith("spectral") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_to_save_are_merged_and_no_lora_file_drops_them(tmp_path):
    pipe = tiny_pipeline(tmp_path / "base")
    config = SpectralAdapterAConfig(
        target_modules=["to_q"], r=3, init_weights=False, modules_to_save=["conv_out"]
    )
    pipe.unet.add_adapter(config)
    pipe.unet.conv_out.modules_to_save["default"].weight.data += 1
    images = drawn(pipe)
    with pytest.raises(ValueError, match=r"without modules_to_save.* has \['conv_out'\]"):
        export_lora(pipe, tmp_path / "lora")
    export_merged(pipe, tmp_path / "merged")
    names = set(pipe.unet.state_dict())
    assert not any("modules_to_save" in name or "original_module" in name for name in names)
    assert torch.allclose(drawn(type(pipe).from_pretrained(tmp_path / "merged")), images, atol=1e-4)
