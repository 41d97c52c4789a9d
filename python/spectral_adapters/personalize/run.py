"""``spectral-adapters personalize`` from settings to report."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_adapters.checkpoint import latest_checkpoint
from spectral_adapters.diffusers import ADAPTER_WEIGHTS, load_adapter
from spectral_adapters.personalize import (
    adapters,
    data,
    emoji,
    evaluation,
    pipelines,
    report,
    similarity,
)
from spectral_adapters.personalize.settings import (
    RECORD,
    Settings,
    UsageError,
    flag,
    read_record,
    usage_errors,
)
from spectral_adapters.personalize.trainer import (
    CHECKPOINTS,
    SUPPORTED,
    Outcome,
    Trainer,
    check_pipeline,
    encode,
    make_accelerator,
    rate_factor,
)

if TYPE_CHECKING:
    from torch import Tensor

SHEET = "sheet.png"
SAMPLES = "samples"
#: What a run writes, the record last.
WRITTEN = (CHECKPOINTS, SAMPLES, "unet", SHEET, "report.json", "report.md", RECORD)

#: steps, guidance and batch size: for the shipped base model, and as diffusers has them.
EMOJI_SAMPLING = (20, 3.0, 50)
FOLDER_SAMPLING = (50, 7.5, 4)

#: Exit codes; of a signal, as shells count them.
FINISHED, FAILED, SIGNALLED = 0, 1, 128


@dataclass(frozen=True)
class HeldOut:
    """What the report compares.

    Attributes:
        pictures: prompts, and true drawings where ``has_truth``.
        title: of the comparison in the report.
        base_prompts: what the base model is asked for in a style of its own, by style.
    """

    pictures: data.Pictures
    has_truth: bool
    title: str | None
    base_prompts: dict[str, tuple[str, ...]]


class Stopwatch:
    """Seconds since it was made, and seconds by stage."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        return time.perf_counter() - self.began


def personalize(settings: Settings) -> int:
    """Train an adapter, save it and report.

    Writes into ``settings.output``: ``unet/`` (the adapter, in PEFT's format), ``run.json`` (the
    settings), ``checkpoints/`` (for resuming), ``samples/``, ``sheet.png``, ``report.json`` and
    ``report.md``.

    Returns:
        0; 1 if something became infinite or NaN, or the result could not be reported or written;
        130 or 143 if SIGINT or SIGTERM ended training.

    Raises:
        UsageError: with a message of one line, for anything that the user can put right.
    """
    settings = settings.checked()
    watch = Stopwatch()
    output = Path(str(settings.output))
    _check_output(settings, output)
    accelerator = make_accelerator(settings)

    with watch.stage("load"):
        pipe = load_pipeline(settings)
        pipe.to(accelerator.device)
    size = image_size(pipe, settings.resolution)
    sampling = sampling_of(settings, size)
    levels = pipe.scheduler.config.num_train_timesteps
    if sampling.steps > levels:
        raise UsageError(
            f"--sample-steps must be at most {levels}, the steps of the pipeline's scheduler; "
            f"got {sampling.steps}"
        )
    checkpoint = find_checkpoint(output) if settings.resume else None
    with usage_errors():
        training = training_pictures(settings, size)
        if settings.resume:
            _check_unchanged(settings, output, training)
        held_out = held_out_pictures(settings, training, size)
        if held_out.has_truth:
            similarity.load_network()

    # Before anything is drawn: options that do not fit the weights are found here.
    with watch.stage("adapter"):
        add_adapter(pipe, settings, checkpoint)
    with watch.stage("encode"):
        conditions = encode(pipe, training, flip=settings.flip)
    prior = None
    prompts = prior_prompts(settings, training)
    if prompts:
        with watch.stage("prior"), evaluation.without_adapter(pipe.unet):
            prior = evaluation.draw_prior(pipe, prompts, sampling)
    with watch.stage("adapter"):
        trainer = Trainer(pipe, conditions, settings, output, accelerator, prior)
    if checkpoint is not None:
        with usage_errors("cannot resume: "):
            trainer.resume(checkpoint)
    elif accelerator.is_main_process:
        _clear(output)
    if accelerator.is_main_process:
        settings.save(output, images_digest=training.digest)
        if settings.warmup_steps >= settings.steps:
            most = rate_factor(settings.steps - 1, settings)
            print(
                f"--warmup-steps {settings.warmup_steps} is not over after {settings.steps} steps: "
                f"the learning rate comes to {most:.0%} of the one asked for",
                file=sys.stderr,
            )

    grid_prompts = settings.sample_prompts or held_out.pictures.captions[: settings.sheet_rows]

    def sample(step: int) -> None:
        if accelerator.is_main_process:
            images = evaluation.draw(pipe, grid_prompts, sampling)
            page = report.sheet(grid_prompts, {f"step {step}": images}, blocks=4)
            (output / SAMPLES).mkdir(exist_ok=True)
            report.save_png(page, output / SAMPLES / f"step-{step:06d}.png")

    outcome = trainer.run(sample)
    if accelerator.is_main_process:
        if outcome.reason == "finished":
            try:
                _report(pipe, settings, training, held_out, outcome, watch, sampling)
            except KeyboardInterrupt:
                print(_farewell(dataclasses.replace(outcome, reason="interrupted"), output))
                return SIGNALLED + signal.SIGINT
            except Exception as error:  # the adapter is saved, whatever it is
                print(_farewell(dataclasses.replace(outcome, reason="unreported"), output))
                print(f"  {type(error).__name__}: {error}")
                return FAILED
        else:
            print(_farewell(outcome, output))
    if outcome.reason == "interrupted":
        return SIGNALLED + outcome.signal
    return FINISHED if outcome.reason == "finished" else FAILED


def load_pipeline(settings: Settings) -> Any:
    """Return the base pipeline, frozen.

    Raises:
        UsageError: it cannot be loaded, or not be trained.
    """
    import torch

    base = str(settings.base)
    index = Path(base) / "model_index.json"
    if index.is_file() and '"unet"' not in index.read_text(encoding="utf-8"):
        raise UsageError(f"--base {base} has no unet: {SUPPORTED}")
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.mixed_precision]
    pipe = pipelines.open_base(base, torch_dtype=dtype)
    check_pipeline(pipe)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def image_size(pipe: Any, resolution: int | None) -> tuple[int, int]:
    """Return height and width of the images to train on and to draw.

    Raises:
        UsageError: a resolution that the autoencoder cannot halve often enough.
    """
    factor = pipe.vae_scale_factor
    if resolution is not None:
        if resolution % factor:
            raise UsageError(f"--resolution must be a multiple of {factor}; got {resolution}")
        return resolution, resolution
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * factor, width * factor


def training_pictures(settings: Settings, size: tuple[int, int]) -> data.Pictures:
    """Return what is trained on."""
    if settings.images is not None:
        return data.load_folder(settings.images, size, caption=settings.caption)
    return data.openmoji(settings.names, size)


def held_out_pictures(
    settings: Settings, training: data.Pictures, size: tuple[int, int]
) -> HeldOut:
    """Return what the report compares; the training images themselves if nothing is held out."""
    if settings.eval_images is not None:
        pictures = data.load_folder(settings.eval_images, size, otherwise=settings.caption)
        if len(pictures) < 2:
            raise UsageError(f"--eval-images {settings.eval_images} must hold at least 2 images")
        return HeldOut(pictures, True, f"{len(pictures)} held-out images", {})
    if settings.style is None or settings.eval_split == "none":
        return HeldOut(training, False, None, {})
    pictures = data.held_out(settings.eval_split, settings.eval_count, size, training)
    style = settings.base_style
    prompts = tuple(emoji.caption(name, style) for name in pictures.names)
    title = f"{len(pictures)} held-out names ({settings.eval_split})"
    return HeldOut(pictures, True, title, {style: prompts})


def prior_prompts(settings: Settings, training: data.Pictures) -> tuple[str, ...]:
    """Return what the base model draws for prior preservation.

    For a folder it is one caption; for a style, names in the base style, none of them held out.
    """
    if settings.style is None:
        return (settings.prior_caption or "",) * settings.prior_count
    reserved = {item.name for split in ("dev", "test") for item in emoji.split(split)}
    reserved.update(training.names)
    names = [item.name for item in emoji.split("pretrain") if item.name not in reserved]
    count = min(settings.prior_count, len(names))
    chosen = [names[index * len(names) // count] for index in range(count)]
    return tuple(emoji.caption(name, settings.base_style) for name in chosen)


def find_checkpoint(output: Path) -> Path:
    """Return the newest whole checkpoint of a run.

    Raises:
        UsageError: there is none.
    """
    with usage_errors("cannot resume: "):
        checkpoint = latest_checkpoint(output / CHECKPOINTS)
    if checkpoint is None:
        raise UsageError(f"nothing to resume: {output / CHECKPOINTS} holds no checkpoint")
    return checkpoint


def add_adapter(pipe: Any, settings: Settings, checkpoint: Path | None) -> None:
    """Give the denoiser a new adapter, or that of a checkpoint."""
    import torch
    from accelerate.utils import set_seed

    set_seed(settings.seed)
    if checkpoint is not None:
        try:
            load_adapter(pipe, checkpoint, is_trainable=True)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise UsageError(f"cannot resume {checkpoint}: {error}") from error
    else:
        config = adapters.make_config(settings, pipe.unet)
        try:
            pipe.unet.add_adapter(config)
        except ValueError as error:
            raise UsageError(f"--method {settings.method}: {error}") from error
    for values in pipe.unet.parameters():
        if values.requires_grad:
            # What is trained is fp32 whatever the precision of the base.
            values.data = values.data.to(torch.float32)


def sampling_of(settings: Settings, size: tuple[int, int]) -> evaluation.Sampling:
    """Return how images are drawn, by the options or by the kind of data."""
    steps, guidance, batch = EMOJI_SAMPLING if settings.images is None else FOLDER_SAMPLING
    if settings.sample_steps is not None:
        steps = settings.sample_steps
    if settings.guidance_scale is not None:
        guidance = settings.guidance_scale
    if settings.sample_batch_size is not None:
        batch = settings.sample_batch_size
    return evaluation.Sampling(steps, guidance, batch, size, settings.seed)


def _check_output(settings: Settings, output: Path) -> None:
    """Refuse to write where something else is, and make the folder."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is not a folder")
    for name in ("base", "images", "eval_images"):
        other = getattr(settings, name)
        if other is not None and Path(other).resolve() == output.resolve():
            raise UsageError(f"--output {output} is the folder of {flag(name)}; choose another one")
    if (output / "model_index.json").exists():
        raise UsageError(f"--output {output} holds a pipeline; choose another folder")
    if (output / RECORD).is_file():
        if not (settings.resume or settings.overwrite):
            raise UsageError(
                f"--output {output} holds a run already: continue it with --resume, replace it "
                "with --overwrite, or choose another folder"
            )
    else:
        for name in WRITTEN:
            if (output / name).exists():
                raise UsageError(
                    f"--output {output} holds {name}, which no run wrote (there is no {RECORD}); "
                    "choose another folder"
                )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error


def _check_unchanged(settings: Settings, output: Path, training: data.Pictures) -> None:
    """Refuse to resume on other images; older records do not say which they were."""
    if read_record(output).get("images_digest") not in (None, training.digest):
        raise UsageError(
            f"--images {settings.images}: images or captions are not those that {output} was "
            "started with; bring them back, or start again with --overwrite"
        )


def _clear(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    import shutil

    if not (output / RECORD).is_file():
        return
    for name in WRITTEN:
        if (output / name).is_dir():
            shutil.rmtree(output / name, ignore_errors=True)
        else:
            (output / name).unlink(missing_ok=True)


def _farewell(outcome: Outcome, output: Path) -> str:
    """Say where the adapter is and how to go on."""
    saved = "its adapter could not be saved"
    if outcome.place is not None:
        saved = f"the adapter of step {outcome.step} is in {outcome.place}"
    again = f"\n  spectral-adapters personalize --resume --output {output}"
    if outcome.reason == "interrupted":
        return f"interrupted; {saved}. Continue with:{again}"
    if outcome.reason == "unsaved":
        return (
            f"step {outcome.step} could not be saved in {output}; {saved}. Make room, then "
            f"continue from the last checkpoint with:{again}"
        )
    if outcome.reason == "unreported":
        return f"the report could not be made; {saved}. Put right what is told below, then:{again}"
    return (
        f"{outcome.trouble}; {saved}. Try a lower --learning-rate, a smaller --max-grad-norm, or "
        "with --mixed-precision fp16 bf16 instead."
    )


def _report(
    pipe: Any,
    settings: Settings,
    training: data.Pictures,
    held_out: HeldOut,
    outcome: Outcome,
    watch: Stopwatch,
    sampling: evaluation.Sampling,
) -> None:
    """Draw before and after, compare, and write sheet and report."""
    output = Path(str(settings.output))
    pictures = held_out.pictures
    asked = settings.style or "before"
    before = f"base, “{asked}”" if settings.style else "before"
    columns: dict[str, Tensor] = {}
    with evaluation.without_adapter(pipe.unet):
        for style, prompts in held_out.base_prompts.items():
            title = f"base, “{style}”"
            columns[title] = evaluation.draw(pipe, prompts, sampling, label=title)
        columns[before] = evaluation.draw(pipe, pictures.captions, sampling, label=before)
    columns["adapted"] = evaluation.draw(pipe, pictures.captions, sampling, label="adapted")

    scores: dict[str, Any] = {}
    references: dict[str, Any] = {}
    if held_out.has_truth:
        scores = evaluation.score_columns(columns, pictures.images)
        others = pictures.images.roll(1, 0)
        references = evaluation.score_columns(
            {
                "the truth through the autoencoder": evaluation.reconstruct(pipe, pictures.images),
                "another true drawing": others,
            },
            pictures.images,
        )
    count = min(settings.sheet_rows, len(pictures))
    rows = [index * len(pictures) // count for index in range(count)]
    shown = {title: images[rows] for title, images in columns.items()}
    shown["truth" if held_out.has_truth else "training image"] = pictures.images[rows]
    labels = pictures.names if settings.style else pictures.captions
    page = report.sheet([labels[row] for row in rows], shown)
    report.save_png(page, output / SHEET)

    config = pipe.unet.peft_config["default"]
    trained = sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad)
    total = sum(p.numel() for p in pipe.unet.parameters())
    found = report.Report(
        method=f"{adapters.describe(config)} on {' '.join(settings.target_modules)}",
        trained_parameters=trained,
        base_parameters=total - trained,
        adapter_bytes=(output / "unet" / ADAPTER_WEIGHTS).stat().st_size,
        images=len(training),
        steps=outcome.step,
        batch_size=settings.batch_size * settings.gradient_accumulation,
        loss=outcome.loss,
        seconds_per_step=outcome.seconds_per_step,
        setup_seconds=watch.stages,
        total_seconds=watch.total(),
        peak_memory_bytes=outcome.peak_memory,
        orthogonality_error=outcome.orthogonality_error,
        held_out=held_out.title,
        scores=scores,
        references=references,
    )
    found.save(output)
    print(found.as_markdown())
    print(f"adapter: {output / 'unet'}   sheet: {output / SHEET}   report: {output / 'report.md'}")
