"""The example scripts of diffusers with the edits of ``docs/diffusers_scripts.md``, run.

``python tests/example_scripts.py SOURCES [METHOD ...]`` takes the scripts from a source tree of
diffusers of the installed version, makes the edits, and runs each script on a tiny pipeline with
random weights: three steps, a checkpoint after two, resumption from it in a fresh process, the
adapter loaded into a fresh pipeline. Resumed and uninterrupted runs must draw the same images.
It prints the table of results; nothing of diffusers is kept here.

torchvision has no build for every machine; a stand-in with the few transforms that the scripts use
takes its place where it is missing. ``text_to_image`` needs the package ``datasets``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline

from spectral_adapters.diffusers import load_adapter

METHODS = {
    "SODA": "SODAConfig({})",
    "SVDiff": "SVDiffConfig({})",
    "Spectral Adapter A": "SpectralAdapterAConfig(r=4, {})",
    "Spectral Adapter R": "SpectralAdapterRConfig(r=4, {})",
    "LiDB": "LiDBConfig({})",
}
IMPORTS = """\
from spectral_adapters.diffusers import load_adapter, register_checkpoint_hooks, save_adapter
from spectral_adapters.peft import (
    LiDBConfig, SODAConfig, SpectralAdapterAConfig, SpectralAdapterRConfig, SVDiffConfig,
)
"""

Edit = tuple[str, str]


def edits(config: str, components: str) -> list[Edit]:
    """Patterns and replacements: the rows of the table in docs/diffusers_scripts.md."""
    return [
        (r"(?m)^from peft import LoraConfig.*\n", rf"\g<0>{IMPORTS}"),
        (
            r"= LoraConfig\((?:[^()]|\n)*?target_modules=([^\n]+),\n\s*\)",
            "= " + config.format(r"target_modules=\1"),
        ),
        (
            r"accelerator\.register_save_state_pre_hook\(save_model_hook\)\n"
            r"\s*accelerator\.register_load_state_pre_hook\(load_model_hook\)",
            f"register_checkpoint_hooks(accelerator, {components})",
        ),
        (
            r"\w+\.save_lora_weights\(\n\s*save_directory=args\.output_dir(?:[^()]|\n)*\)",
            f"save_adapter({components}, args.output_dir)",
        ),
        (r"= convert_state_dict_to_diffusers\(", "= ("),
        (
            r"pipeline\.load_lora_weights\(args\.output_dir[^)]*\)",
            "load_adapter(pipeline, args.output_dir)",
        ),
    ]


@dataclass(frozen=True)
class Script:
    """One script, the pipeline it trains, its options, and edits of its own."""

    path: str
    build: Any
    components: str
    options: tuple[str, ...] = ()
    dataset_option: str = "--instance_data_dir"
    more: tuple[tuple[str, str], ...] = field(default=())


SCRIPTS = [
    Script(
        "examples/dreambooth/train_dreambooth_lora.py",
        tiny_pipeline,
        '{"unet": unet, "text_encoder": text_encoder}',
        ("--train_text_encoder", "--instance_prompt=a cat"),
    ),
    Script(
        "examples/dreambooth/train_dreambooth_lora_sdxl.py",
        tiny_xl_pipeline,
        '{"unet": unet, "text_encoder": text_encoder_one, "text_encoder_2": text_encoder_two}',
        ("--train_text_encoder", "--instance_prompt=a cat"),
        more=((r"return LoraConfig\(\*\*base_config\)", "return {}"),),
    ),
    Script(
        "examples/dreambooth/train_dreambooth_lora_sd3.py",
        tiny_sd3_pipeline,
        '{"transformer": transformer}',
        ("--instance_prompt=a cat", "--upcast_before_saving"),
    ),
    Script(
        "examples/text_to_image/train_text_to_image_lora.py",
        tiny_pipeline,
        '{"unet": unet}',
        dataset_option="--train_data_dir",
    ),
]

# Enough of torchvision.transforms for the scripts, on PIL images.
TORCHVISION = """
import enum, random
import numpy, torch
from PIL import Image

class InterpolationMode(enum.Enum):
    BILINEAR, LANCZOS, NEAREST, BICUBIC = "bilinear", "lanczos", "nearest", "bicubic"

class Lambda:
    def __init__(self, function): self.function = function
    def __call__(self, image): return self.function(image)

Compose = lambda steps: Lambda(lambda image: [image := step(image) for step in steps][-1])
ToTensor = lambda: Lambda(
    lambda image: torch.from_numpy(numpy.array(image, numpy.float32) / 255).permute(2, 0, 1)
)
Normalize = lambda mean, std: Lambda(lambda x: (x - mean[0]) / std[0])
Resize = lambda size, interpolation=None: Lambda(lambda image: image.resize((size, size)))
RandomHorizontalFlip = lambda p=0.5: Lambda(lambda image: image)

def crop(image, top, left, height, width):
    return image.crop((left, top, left + width, top + height))

class CenterCrop(Lambda):
    def __init__(self, size): self.function = lambda image: image.crop((0, 0, size, size))

class RandomCrop(CenterCrop):
    @staticmethod
    def get_params(image, size): return 0, 0, *size
"""


# Not under its own name, by which transformers would find it.
STAND_IN = [
    (r"from torchvision import transforms", "import stand_in as transforms"),
    (r"from torchvision\.transforms\.functional import crop", "from stand_in import crop"),
]


def edited(source: str, script: Script, config: str) -> str:
    """The script with its edits; ``SystemExit`` if one of them finds nothing to change."""
    own = [
        (pattern, new.format(config.format("target_modules=target_modules")))
        for pattern, new in script.more
    ]
    for pattern, replacement in [*edits(config, script.components), *own]:
        source, count = re.subn(pattern, replacement, source)
        optional = pattern.startswith(("= convert_state", "= LoraConfig"))
        if not count and not optional:
            raise SystemExit(f"{script.path}: nothing matches {pattern}")
    return source


def train(file: Path, base: Path, images: Path, output: Path, script: Script, *more: str) -> None:
    """Run an edited script in a process of its own."""
    arguments = [
        f"--pretrained_model_name_or_path={base}",
        f"{script.dataset_option}={images}",
        f"--output_dir={output}",
        *("--resolution=16", "--train_batch_size=1", "--max_train_steps=3", "--seed=0"),
        *("--checkpointing_steps=2", "--learning_rate=1e-2", "--lr_scheduler=constant"),
        *script.options,
        *more,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(file.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(file), *arguments],
        env=environment,
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise SystemExit(f"{script.path}: {done.stderr[-3000:]}")


def drawn(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "height": 16, "width": 16, "generator": generator}
    return pipe("a cat", output_type="pt", **options).images


def prove(script: Script, config: str, sources: Path, folder: Path) -> tuple[float, float]:
    """Largest change of the image by training, and difference of the resumed run's image."""
    file = folder / "script.py"
    file.write_text(edited((sources / script.path).read_text(encoding="utf-8"), script, config))
    if importlib.util.find_spec("torchvision") is None:
        for pattern, replacement in STAND_IN:
            file.write_text(re.sub(pattern, replacement, file.read_text(encoding="utf-8")))
        (folder / "stand_in.py").write_text(TORCHVISION)
    pipe = script.build(folder / "tokenizer")
    before = drawn(pipe)
    pipe.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for index, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"{index}.png")
    lines = '{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a dog"}\n'
    if script.dataset_option == "--train_data_dir":
        (folder / "images" / "metadata.jsonl").write_text(lines)

    images = []
    train(file, folder / "base", folder / "images", folder / "once", script)
    train(file, folder / "base", folder / "images", folder / "twice", script, "--max_train_steps=2")
    train(
        file,
        folder / "base",
        folder / "images",
        folder / "twice",
        script,
        "--resume_from_checkpoint=latest",
    )
    for output in ("once", "twice"):
        fresh = type(pipe).from_pretrained(folder / "base")
        load_adapter(fresh, folder / output)
        images.append(drawn(fresh))
    checkpoint = folder / "once" / "checkpoint-2"
    assert not list(checkpoint.glob("model*")), "the checkpoint holds a whole model"
    return (
        float((images[0] - before).abs().max()),
        float((images[0] - images[1]).abs().max()),
    )


def main(arguments: list[str]) -> None:
    sources, chosen = Path(arguments[0]), arguments[1:] or list(METHODS)
    print("| script | method | change by training | resumed against uninterrupted |")
    print("|---|---|---|---|")
    for script in SCRIPTS:
        for method in chosen:
            with tempfile.TemporaryDirectory() as folder:
                change, difference = prove(script, METHODS[method], sources, Path(folder))
            name = Path(script.path).name
            print(f"| `{name}` | {method} | {change:.3g} | {difference:.3g} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
