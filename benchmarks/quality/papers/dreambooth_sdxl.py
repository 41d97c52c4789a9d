"""Stable Diffusion XL on 4 to 6 pictures of a subject, as in SODA (Zhang et al., WACV 2025).

A preset over ``spectral-adapters personalize``, and a measure of subject and text. Where each
hyperparameter comes from is in README.md beside this file. ``--smoke`` runs the same code on a tiny
random SDXL pipeline and made-up pictures; it proves the path, not the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stand_ins
import torch
import torch.nn.functional as F
from paper_methods import RESULT, Record, count, finish, usage_errors
from torch import Tensor

from spectral_adapters.factors import PUBLISHED_FACTORS
from spectral_adapters.personalize.settings import METHODS, Settings

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"

#: Of the authors' script, but for its loss; README.md says what differs.
PAPER: dict[str, Any] = {
    "target_modules": ("attention",),
    "steps": 1000,
    "batch_size": 1,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "resolution": 1024,
}
#: What only one method has. SODA's are the authors'. Learning rates of SVDiff, LiDB and LoRA, and
#: of R with 40 columns, are those of Zhang & Pilanci's Figure 5, on another model; A's is a choice.
BY_METHOD: dict[str, dict[str, Any]] = {
    "soda": {
        "decomposition": "svd",
        "rotation": "right",
        "parametrization": "stiefel",
        "spectrum_activation": "relu",
        "factors": tuple(
            f"{dimension}={'x'.join(map(str, sizes))}"
            for dimension, sizes in PUBLISHED_FACTORS.items()
        ),
        "learning_rate": 5e-5,
        "spectrum_learning_rate": 5e-5,
    },
    "svdiff": {"spectrum_activation": "relu", "learning_rate": 1e-4},
    "spectral-a": {"rank": 4, "learning_rate": 1e-4},
    "spectral-r": {"rank": 40, "learning_rate": 1e-2},
    "lidb": {"rank": 1, "learning_rate": 1e-4},
    "lora": {"rank": 4, "learning_rate": 1e-4},
}

#: "{}" is the subject.
PROMPTS = (
    "a photo of {}",
    "a photo of {} on a beach at sunset",
    "a photo of {} in the snow",
    "a photo of {} on a wooden table in a kitchen",
    "a photo of {} in front of a waterfall",
    "a watercolour painting of {}",
    "a pencil sketch of {}",
    "{} made of paper",
    "a photo of {} seen from above",
    "a photo of {} among sunflowers",
)

# Means and deviations of the channels that the networks were trained with.
_CLIP_CHANNELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET_CHANNELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main(argv: list[str] | None = None) -> int:
    """Train, reload, draw and measure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", choices=METHODS, default="soda")
    add("--model", default=MODEL, metavar="FOLDER|ID", help="(default: %(default)s)")
    add("--images", metavar="FOLDER", help="4 to 6 pictures, captioned as for personalize or not")
    add("--class-name", metavar="TEXT", help="what the subject is, like dog")
    add("--placeholder", default="sks", metavar="TEXT", help="(default: sks, the authors')")
    add("--output", type=Path, metavar="FOLDER", help="folder for all that is left")
    add("--rank", type=int, metavar="N")
    add("--learning-rate", type=float, metavar="X")
    add("--spectrum-learning-rate", type=float, metavar="X", help="of SODA's singular values")
    add("--steps", type=int, metavar="N", help="(default: 1000)")
    add("--resolution", type=int, metavar="N", help="(default: 1024)")
    add("--prior-images", type=int, metavar="N", help="prior preservation (default: none)")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    add("--gradient-checkpointing", action="store_true")
    add("--samples", type=int, default=8, metavar="N", help="drawings a prompt (default: 8)")
    add("--sample-steps", type=int, default=50, metavar="N", help="(default: 50)")
    add("--prompts", type=Path, metavar="FILE", help="one a line, {} is the subject")
    add("--clip", metavar="FOLDER|ID", help="CLIP for the similarity to subject and text")
    add("--dino", metavar="FOLDER|ID", help="DINOv2 for the similarity to the subject")
    add("--seed", type=int, default=0, metavar="N")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--smoke", action="store_true", help="a tiny random pipeline and made-up pictures, offline")
    add("--count", action="store_true", help="only count trained parameters in SDXL")
    options = parser.parse_args(argv)
    if options.count:
        print(json.dumps(counts()))
        return 0
    check(parser, options)
    if options.smoke:
        make_smoke(options)
    return usage_errors(parser, lambda: run(options))


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be; exit code 2 and one line."""
    if options.output is None:
        parser.error("--output is missing: a folder for the adapter and the result")
    if (options.output / RESULT).exists():
        parser.error(f"--output {options.output} holds a result; give another folder")
    if options.samples < 1:
        parser.error(f"--samples must be at least 1; got {options.samples}")
    own = ("images", "class_name", "clip", "dino")
    if options.smoke:
        given = [name for name in own if getattr(options, name) is not None]
        given += ["model"] if options.model != MODEL else []
        if given:
            name = given[0].replace("_", "-")
            parser.error(f"--smoke makes its own model and pictures; leave --{name} out")
        return
    for name in own[:2]:
        if getattr(options, name) is None:
            parser.error(f"--{name.replace('_', '-')} is missing")


def make_smoke(options: argparse.Namespace) -> None:
    """Write tiny models and pictures into the output folder, and shrink what does not fit them."""
    options.model = options.output / "model"
    stand_ins.sdxl(options.model)
    options.images, options.class_name = str(options.output / "pictures"), "dog"
    stand_ins.photographs(Path(options.images), 4)
    options.clip, options.dino = options.output / "clip", options.output / "dino"
    stand_ins.clip(options.clip)
    stand_ins.dino(options.dino)
    if options.rank is None and "rank" in BY_METHOD[options.method]:
        options.rank = 2
    options.learning_rate = options.learning_rate or 1e-2
    options.steps = options.steps or 4
    options.resolution = options.resolution or 16
    options.samples, options.sample_steps = 1, 2
    options.cpu = True


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of ``personalize``.

    Raises:
        UsageError: options that do not fit together.
    """
    values = {**PAPER, **BY_METHOD[options.method]}
    for name in ("rank", "learning_rate", "spectrum_learning_rate", "steps", "resolution"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    if options.prior_images:
        values["prior_images"] = options.prior_images
        values["prior_caption"] = f"a photo of a {options.class_name}"
    images = Path(options.images)
    has_captions = (images / "metadata.jsonl").is_file() or any(images.glob("*.txt"))
    return Settings(
        base=str(options.model),
        output=str(options.output / "personalize"),
        images=options.images,
        caption=None if has_captions else f"a photo of {subject_of(options)}",
        method=options.method,
        mixed_precision=options.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        sample_steps=options.sample_steps,
        cpu=options.cpu,
        seed=options.seed,
        **values,
    ).checked()


def subject_of(options: argparse.Namespace) -> str:
    return f"{options.placeholder} {options.class_name}"


def run(options: argparse.Namespace) -> int:
    from spectral_adapters.diffusers import load_adapter
    from spectral_adapters.personalize import data, evaluation
    from spectral_adapters.personalize.run import (
        FINISHED,
        image_size,
        load_pipeline,
        personalize,
        sampling_of,
    )

    began = time.perf_counter()
    prompts = prompts_of(options)
    settings = settings_of(options)
    code = personalize(settings)
    if code != FINISHED:
        return code
    report = json.loads(Path(str(settings.output), "report.json").read_text(encoding="utf-8"))

    # A pipeline loaded anew: what is measured is what was saved.
    pipe = load_pipeline(settings)
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    pipe.to(device)
    load_adapter(pipe, str(settings.output))
    size = image_size(pipe, settings.resolution)
    sampling = sampling_of(settings, size)
    truth = data.load_folder(options.images, size, caption=settings.caption).images
    drawn = {"adapted": evaluation.draw(pipe, prompts, sampling, label="adapted")}
    with evaluation.without_adapter(pipe.unet):
        drawn["base"] = evaluation.draw(pipe, prompts, sampling, label="base")
    del pipe
    networks = measures(options, device)
    return finish(
        options.output,
        options.smoke,
        {
            "experiment": "dreambooth_sdxl",
            "method": options.method,
            "model": str(options.model),
            "settings": settings_record(settings),
            "images": len(truth),
            "prompts": len(prompts),
            "loss": report["loss"],
            "trained_parameters": report["trained_parameters"],
            "saved_bytes": report["adapter_bytes"],
            "change": float((drawn["adapted"] - drawn["base"]).abs().max()),
            "metrics": {
                column: {
                    title: measure(images, truth, prompts) for title, measure in networks.items()
                }
                for column, images in drawn.items()
            },
            "seconds": time.perf_counter() - began,
        },
    )


def settings_record(settings: Settings) -> Record:
    """Return what decides what is learned."""
    names = {**PAPER, **BY_METHOD[settings.method]}
    return {name: getattr(settings, name) for name in sorted(names)}


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Return every prompt ``--samples`` times.

    Raises:
        ValueError: a line without "{}".
    """
    lines = list(PROMPTS)
    if options.prompts is not None:
        lines = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
    for line in lines:
        if "{}" not in line:
            raise ValueError(f"--prompts: every line must hold {{}}, the subject; got {line!r}")
    if not lines:
        raise ValueError(f"--prompts {options.prompts} is empty")
    texts = [line.replace("{}", subject_of(options)) for line in lines]
    return [text for text in texts for _ in range(options.samples)]


Measure = Callable[[Tensor, Tensor, list[str]], float]


def measures(options: argparse.Namespace, device: str) -> dict[str, Measure]:
    """Return the measures of drawings ``[N, 3, H, W]``, truths ``[M, 3, H, W]`` and prompts.

    Similarities to the subject are mean cosines over all N M pairs, that to the text over the N.
    """
    found: dict[str, Measure] = {}
    if options.clip is not None:
        clip = Clip(options.clip, device)
        found["clip_image"] = lambda drawn, truth, _: pairs(clip.images(drawn), clip.images(truth))
        # The placeholder means nothing to CLIP.
        found["clip_text"] = lambda drawn, _, prompts: float(
            (
                clip.images(drawn)
                * clip.texts([text.replace(f"{options.placeholder} ", "") for text in prompts])
            )
            .sum(1)
            .mean()
        )
    if options.dino is not None:
        dino = Dino(options.dino, device)
        found["dino_image"] = lambda drawn, truth, _: pairs(dino.images(drawn), dino.images(truth))
    if not found:
        from spectral_adapters.personalize.similarity import image_features

        found["efficientnet_image"] = lambda drawn, truth, _: pairs(
            image_features(drawn), image_features(truth)
        )
    return found


def pairs(drawn: Tensor, truth: Tensor) -> float:
    """Mean cosine over all pairs of unit-length features ``[N, D]`` and ``[M, D]``."""
    return float((drawn @ truth.T).mean())


def prepare(images: Tensor, size: int, channels: tuple[tuple[float, ...], ...]) -> Tensor:
    """Resize square ``[N, 3, H, W]`` in [0, 1] to ``size`` and normalise the channels."""
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in channels)
    return (resized - mean) / deviation


class Clip:
    """Unit-length features of images and texts."""

    def __init__(self, name: str | Path, device: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.device = device
        self.model = CLIPModel.from_pretrained(name).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        pooled = [
            self.model.vision_model(prepare(batch, size, _CLIP_CHANNELS).to(self.device))
            for batch in images.split(32)
        ]
        return _unit([self.model.visual_projection(batch.pooler_output) for batch in pooled])

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
        ).pooler_output
        return _unit([self.model.text_projection(pooled)])


class Dino:
    """Unit-length features of images: the class token."""

    #: DINOv2's own side of an evaluated image; its config names that of the last training stage.
    SIDE = 224

    def __init__(self, name: str | Path, device: str) -> None:
        from transformers import AutoModel

        self.device = device
        self.model = AutoModel.from_pretrained(name).to(device).eval()

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        size = min(self.SIDE, self.model.config.image_size)
        return _unit(
            [
                self.model(prepare(batch, size, _IMAGENET_CHANNELS).to(self.device))
                .last_hidden_state[:, 0]
                .float()
                for batch in images.split(32)
            ]
        )


def _unit(batches: list[Tensor]) -> Tensor:
    return F.normalize(torch.cat(batches).float(), dim=1).cpu()


def counts(methods: Sequence[str] = METHODS) -> Record:
    """Count what methods train in SDXL's UNet, without its weights."""
    from spectral_adapters.personalize.adapters import make_config

    found = {}
    for method in methods:
        values = {**PAPER, **BY_METHOD[method]}
        settings = Settings(base=MODEL, output="-", images="-", method=method, **values).checked()
        with torch.device("meta"):
            unet = stand_ins.sdxl_unet().requires_grad_(False)
            unet.add_adapter(make_config(settings, unet))
        trained, percent = count(unet)
        found[method] = {"trained_parameters": trained, "percent": percent}
    return found


if __name__ == "__main__":
    sys.exit(main())
