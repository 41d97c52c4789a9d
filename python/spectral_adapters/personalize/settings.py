"""Every option of ``spectral-adapters personalize``, once: name, default, meaning.

The command line is generated from :class:`Settings`; so are the record in ``run.json`` and the
check that a resumed run continues the run that was interrupted. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD = "run.json"

METHODS = ("soda", "svdiff", "spectral-a", "spectral-r", "lidb", "lora")

#: The best of the few that were tried on the development names with the shipped base model and
#: ``--target-modules text``; the table is in docs/personalize.md.
LEARNING_RATES = {
    "soda": 1e-2,
    "svdiff": 1e-2,
    "spectral-a": 2e-3,
    "spectral-r": 1e-3,
    "lidb": 1e-2,
    "lora": 3e-3,
}

#: Images that the base model keeps of what it draws itself, with a built-in style.
STYLE_PRIOR = 64

#: Names that ``target_modules`` understands besides the endings of module names.
TARGET_PRESETS = ("text", "attention", "transformer", "convolution", "all")


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message is one line that says what."""


@contextlib.contextmanager
def usage_errors(prefix: str = "") -> Iterator[None]:
    """Turn errors of files, names and packages into one line for the user.

    Missing packages stay ``ModuleNotFoundError``: the command line says what to install.
    """
    try:
        yield
    except (UsageError, ModuleNotFoundError):
        raise
    except (ValueError, OSError, ImportError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(prefix + first[0]) from error


def _option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    trajectory: bool = True,
) -> Any:
    """A field of :class:`Settings`; ``trajectory`` says that it decides what is learned."""
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "metavar": metavar,
        "trajectory": trajectory,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Options of one run; :meth:`checked` says what is wrong with them.

    Fields whose default is None are chosen by the method, by the data or by the pipeline.
    """

    base: str | None = _option(
        None,
        "pipeline to adapt: a folder, or a hub id",
        group="what",
        metavar="FOLDER|ID",
    )
    output: str | None = _option(
        None, "folder for everything written", group="what", metavar="FOLDER", trajectory=False
    )
    resume: bool = _option(
        False,
        "continue the run in --output from its newest whole checkpoint; options not given are "
        "those it was started with",
        group="what",
        trajectory=False,
    )
    overwrite: bool = _option(
        False, "start again even if --output holds a run", group="what", trajectory=False
    )

    images: str | None = _option(
        None,
        "folder of training images, captioned by metadata.jsonl or by NAME.txt beside each image",
        group="data",
        metavar="FOLDER",
    )
    caption: str | None = _option(
        None,
        "one caption for all images of --images; also for those of --eval-images without their own",
        group="data",
        metavar="TEXT",
    )
    style: str | None = _option(
        None, "built-in data instead of a folder", group="data", choices=("openmoji",)
    )
    names: tuple[str, ...] | None = _option(
        None, "emoji to train on: names, characters or code points (default: five)", group="data"
    )
    resolution: int | None = _option(
        None, "side of the training images in pixels (default: the pipeline's)", group="data"
    )
    flip: bool = _option(False, "also train on mirrored images", group="data")
    prior_images: int | None = _option(
        None,
        "images that the base model draws first and that training keeps (prior preservation); "
        "default: 64 names in the base style for --style, none for --images",
        group="data",
    )
    prior_caption: str | None = _option(
        None, 'what --prior-images show with --images, like "a photo of a dog"', group="data"
    )
    prior_weight: float | None = _option(
        None, "weight of the prior images' loss (default: 1)", group="data"
    )

    method: str = _option("soda", "kind of adapter", group="method", choices=METHODS)
    target_modules: tuple[str, ...] = _option(
        ("all",),
        f"modules to adapt: {', '.join(TARGET_PRESETS)}, or endings of module names",
        group="method",
        metavar="NAME",
    )
    decomposition: str | None = _option(
        None, "soda: svd (default) or qr", group="method", choices=("svd", "qr")
    )
    rotation: str | None = _option(
        None, "soda: side of the rotation", group="method", choices=("left", "right", "none")
    )
    factors: tuple[str, ...] | None = _option(
        None,
        "soda: Kronecker factors by rotated dimension, like 640=8x8x10; others are balanced",
        group="method",
        metavar="DIM=AxB",
    )
    parametrization: str | None = _option(
        None,
        "soda: cayley (AdamW, default) or stiefel (StiefelAdam)",
        group="method",
        choices=("cayley", "stiefel"),
    )
    spectrum_activation: str | None = _option(
        None,
        "soda, svdiff: activation of the spectrum",
        group="method",
        choices=("identity", "relu", "softplus"),
    )
    rank: int | None = _option(
        None,
        "rank, or number of singular triples (default: lora, spectral-a 4, spectral-r 48, lidb 1)",
        group="method",
    )
    columns: str | None = _option(
        None,
        "spectral-a, spectral-r: end of the spectrum to adapt, or columns drawn from all (default: "
        "spectral-a random, spectral-r top)",
        group="method",
        choices=("top", "bottom", "random"),
    )

    steps: int = _option(400, "optimizer steps", group="training")
    batch_size: int = _option(8, "images per micro-batch and process", group="training")
    gradient_accumulation: int = _option(1, "micro-batches per step", group="training")
    learning_rate: float | None = _option(
        None,
        "largest learning rate (default: the method's, "
        f"{', '.join(f'{method} {rate:g}' for method, rate in LEARNING_RATES.items())})",
        group="training",
    )
    spectrum_learning_rate: float | None = _option(
        None, "soda: rate of the spectrum (default: --learning-rate)", group="training"
    )
    schedule: str = _option(
        "cosine", "learning rate after warm-up", group="training", choices=("cosine", "constant")
    )
    warmup_steps: int = _option(20, "steps of linear warm-up", group="training")
    weight_decay: float = _option(0.0, "decoupled weight decay", group="training")
    max_grad_norm: float = _option(
        1.0, "gradients are clipped to this norm; 0 for never", group="training"
    )
    caption_dropout: float = _option(
        0.0, "share of training captions replaced by the empty one", group="training"
    )
    mixed_precision: str = _option(
        "no", "precision of base and activations", group="training", choices=("no", "fp16", "bf16")
    )
    gradient_checkpointing: bool = _option(
        False, "recompute activations to save memory", group="training", trajectory=False
    )
    cpu: bool = _option(False, "do not use a GPU", group="training")
    seed: int = _option(0, "seed of everything random", group="training")

    checkpoint_every: int = _option(
        100, "steps between checkpoints", group="output", trajectory=False
    )
    keep_checkpoints: int = _option(
        2, "checkpoints that are kept, the newest", group="output", trajectory=False
    )
    sample_every: int = _option(
        0, "steps between sample grids; 0 for none", group="output", trajectory=False
    )
    sample_prompts: tuple[str, ...] | None = _option(
        None,
        "prompts of the grids of --sample-every (default: held-out or training captions)",
        group="output",
        metavar="TEXT",
        trajectory=False,
    )
    sample_steps: int | None = _option(
        None,
        "denoising steps of a sample (default: 20, or 50 for --images)",
        group="output",
        trajectory=False,
    )
    guidance_scale: float | None = _option(
        None,
        "classifier-free guidance (default: 3, or 7.5 for --images)",
        group="output",
        trajectory=False,
    )
    sample_batch_size: int | None = _option(
        None,
        "images sampled together (default: 50, or 4 for --images)",
        group="output",
        trajectory=False,
    )

    eval_split: str = _option(
        "test",
        "held-out names that --style is measured on",
        group="evaluation",
        choices=("test", "dev", "none"),
        trajectory=False,
    )
    eval_count: int = _option(
        100,
        "number of held-out names, evenly spaced in the split",
        group="evaluation",
        trajectory=False,
    )
    eval_images: str | None = _option(
        None,
        "folder of held-out captioned images that --images is measured on",
        group="evaluation",
        metavar="FOLDER",
        trajectory=False,
    )
    base_style: str = _option(
        "noto",
        "style of the base model drawn for comparison with --style",
        group="evaluation",
        trajectory=False,
    )
    sheet_rows: int = _option(8, "names on the sheet", group="evaluation", trajectory=False)

    def checked(self) -> Settings:
        """Return self if the options fit together.

        Raises:
            UsageError: naming the option.
        """
        if not self.base:
            raise UsageError("--base is missing: a pipeline folder or a hub id")
        if not self.output:
            raise UsageError("--output is missing: a folder for the adapter and the report")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        if (self.images is None) == (self.style is None):
            raise UsageError("give the training images by one of --images FOLDER and --style NAME")
        folder_only = ("caption", "eval_images", "prior_caption")
        style_only = ("names", "eval_split", "eval_count", "base_style")
        for name in style_only if self.style is None else folder_only:
            if getattr(self, name) != getattr(Settings, name):
                needed = "--style" if self.style is None else "--images"
                raise UsageError(f"{flag(name)} needs {needed}")
        for name in ("caption", "prior_caption"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UsageError(f"{flag(name)} must not be empty; got {value!r}")
        for name in sorted({name for names in METHOD_OPTIONS.values() for name in names}):
            if name not in METHOD_OPTIONS[self.method] and getattr(self, name) is not None:
                owners = " or ".join(m for m, names in METHOD_OPTIONS.items() if name in names)
                raise UsageError(
                    f"{flag(name)} is an option of --method {owners}, not of {self.method}"
                )
        for name in ("factors", "parametrization"):
            if self.rotation == "none" and getattr(self, name) is not None:
                raise UsageError(f"{flag(name)} is of the rotation; got --rotation none")
        if self.sample_prompts is not None and not self.sample_every:
            raise UsageError("--sample-prompts needs --sample-every, whose grids show them")
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            self._check_at_least(name, 1)
        for name in ("rank", "sample_steps", "sample_batch_size", "resolution"):
            if getattr(self, name) is not None:
                self._check_at_least(name, 1)
        for name in (
            "prior_images",
            "prior_weight",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "sample_every",
            "seed",
            "guidance_scale",
        ):
            if getattr(self, name) is not None:
                self._check_at_least(name, 0)
        for name in ("learning_rate", "spectrum_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise UsageError(f"{flag(name)} must be above 0; got {rate}")
        if self.images is not None and bool(self.prior_images) != bool(self.prior_caption):
            raise UsageError("with --images, --prior-images and --prior-caption need each other")
        if self.prior_weight is not None and not self.prior_count:
            raise UsageError("--prior-weight needs --prior-images")
        if not 0 <= self.caption_dropout <= 1:
            raise UsageError(f"--caption-dropout must be in [0, 1]; got {self.caption_dropout}")
        self._check_at_least("eval_count", 2)
        self._check_at_least("sheet_rows", 1)
        return self

    @property
    def prior_count(self) -> int:
        """How many images of its own the base model keeps."""
        if self.prior_images is not None:
            return self.prior_images
        return 0 if self.style is None else STYLE_PRIOR

    def _check_at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if not least <= value < float("inf"):
            raise UsageError(f"{flag(name)} must be at least {least}; got {value}")

    def save(self, folder: Path, **more: Any) -> None:
        """Write :data:`RECORD`: the options, with absolute places, and ``more``."""
        record = {**dataclasses.asdict(self), **more}
        for name in ("resume", "overwrite", "output"):
            del record[name]
        for name in (*PLACES, "learning_rate"):
            record[name] = _in_force(name, record[name], record)
        from spectral_adapters._files import write_text

        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


#: Options that are folders; ``base`` may be a hub id.
PLACES = ("base", "images", "eval_images")

#: Options that only one method has.
METHOD_OPTIONS = {
    "soda": (
        "decomposition",
        "rotation",
        "factors",
        "parametrization",
        "spectrum_activation",
        "spectrum_learning_rate",
    ),
    "svdiff": ("spectrum_activation",),
    "spectral-a": ("rank", "columns"),
    "spectral-r": ("rank", "columns"),
    "lidb": ("rank",),
    "lora": ("rank",),
}


def flag(name: str) -> str:
    """``"sample_every"`` -> ``"--sample-every"``."""
    return "--" + name.replace("_", "-")


def value_type(option: dataclasses.Field[Any]) -> tuple[type, bool]:
    """Return a field's scalar type, and whether it holds several."""
    hint = typing.get_type_hints(Settings)[option.name]
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if typing.get_origin(hint) is tuple:
        return members[0], True
    if members and typing.get_origin(members[0]) is tuple:
        return typing.get_args(members[0])[0], True
    return (members[0] if members else hint), False


def _in_force(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """What the value of an option means, as far as the other ``values`` say; to compare by."""
    if name in PLACES and value is not None:
        return str(Path(value).resolve()) if Path(value).exists() else value
    if value is not None:
        return value
    if name == "learning_rate":
        return LEARNING_RATES[values["method"]]
    if name == "spectrum_learning_rate":
        return _in_force("learning_rate", values["learning_rate"], values)
    if name == "prior_images":
        return 0 if values["style"] is None else STYLE_PRIOR
    return {"prior_weight": 1.0, "decomposition": "svd", "parametrization": "cayley"}.get(name)


def _is_of(option: dataclasses.Field[Any], value: Any) -> bool:
    """Whether JSON's value is of an option's type and among its choices."""
    kind, several = value_type(option)
    if several != isinstance(value, list):
        return False
    return all(
        isinstance(member, (int, float) if kind is float else kind)
        and isinstance(member, bool) == (kind is bool)
        and member in (option.metadata["choices"] or (member,))
        for member in (value if several else [value])
    )


def read_record(output: Path) -> dict[str, Any]:
    """Return what the run in ``output`` wrote into :data:`RECORD`.

    Raises:
        UsageError: there is none, or it is not what was written.
    """
    place = output / RECORD
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"nothing to resume: {place} does not exist") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{place} is not JSON ({error}): it was changed") from error
    if not isinstance(record, dict):
        raise UsageError(f"{place} must hold an object; got {record!r}: it was changed")
    for option in dataclasses.fields(Settings):
        value = record.get(option.name, option.default)
        if value != option.default and not _is_of(option, value):
            raise UsageError(f"{place}: {option.name} cannot be {value!r}: it was changed")
    return record


def resumed(given: dict[str, Any], output: Path) -> Settings:
    """Return the settings of the run in ``output``, updated by the options given now.

    Options that decide what is learned must be those of the run, but for ``steps``, which may grow
    where the learning rate does not depend on it.

    Raises:
        UsageError: nothing to resume, or an option that differs.
    """
    record = read_record(output)
    options = {option.name: option for option in dataclasses.fields(Settings)}
    values = {name: record.get(name, option.default) for name, option in options.items()}
    values = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
    for name, value in given.items():
        before = _in_force(name, values[name], values)
        if options[name].metadata["trajectory"] and _in_force(name, value, values) != before:
            if name != "steps":
                raise UsageError(
                    f"{flag(name)} must stay {before!r} to resume {output}; got {value!r}"
                )
            if values["schedule"] != "constant" or value < values["steps"]:
                raise UsageError(
                    f"--steps must stay {values[name]} to resume {output} (it may grow under "
                    f"--schedule constant); got {value}"
                )
        values[name] = value
    return Settings(**values).checked()
