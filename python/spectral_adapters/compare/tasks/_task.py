"""What every task gives, and the training loop of those that have none of their own."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_adapters.compare.methods import Shape, Tuned
from spectral_adapters.rotation_bank import RotationBank


@dataclass(frozen=True)
class Metric:
    """A figure that a task measures.

    Attributes:
        key: name in the records.
        label: name in tables.
        scale: what it is multiplied by in tables, 100 for per cent.
        digits: after the point, in tables.
        higher_is_better: None where neither is.
    """

    key: str
    label: str
    scale: float = 1.0
    digits: int = 3
    higher_is_better: bool | None = True


@dataclass
class Trained:
    """How training went.

    Attributes:
        losses: mean training loss over each twentieth of the steps.
        seconds_per_step: median.
        diverged: the loss or a gradient was not finite, and training stopped there.
        curve: scores on the way, by the number of steps taken.
    """

    losses: list[float]
    seconds_per_step: float
    diverged: bool = False
    curve: dict[int, dict[str, float]] = field(default_factory=dict)


class Task(ABC):
    """A base model, data in three parts, and a score.

    Subclasses take the options of their entry in the plan as keyword arguments and load data and
    base model when they are made.

    Attributes:
        steps: of training.
        fold: of the runs that choose a learning rate, which of ``folds`` is held out.
    """

    title: ClassVar[str]

    #: The first is the one that learning rates are chosen by.
    metrics: ClassVar[tuple[Metric, ...]]

    #: The metric that says how much of the base model is kept, if there is one.
    kept: ClassVar[str | None] = None

    #: Where the development split is a part of what is learned from: how many such parts there
    #: are. A rate is chosen by the mean over all of them.
    folds: ClassVar[int] = 1

    steps: int
    fold: int = 0

    @abstractmethod
    def fresh(self) -> nn.Module:
        """The base model that is adapted, a copy for one run."""

    def reference(self) -> nn.Module:
        """The base model as it is measured beside the adapters."""
        return self.fresh().eval()

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """The layers that are adapted: [out, in] of their weights by name in the model."""

    @abstractmethod
    def train(self, tuned: Tuned, rate: float, seed: int, *, final: bool = False) -> Trained:
        """Train what ``tuned`` has at a largest learning rate of ``rate``.

        Args:
            final: not one of the runs that choose the rate; measure on "dev" on the way, too.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The metrics of a model on "dev" or "test"."""

    def pictures(self, model: nn.Module) -> Tensor | None:
        """What a sheet shows of a model, [N, 3, H, W] in [0, 1]; None if nothing can be seen."""
        return None

    def picture_names(self) -> Sequence[str]:
        """What the pictures show."""
        return ()


def linear_shapes(model: nn.Module, endings: Iterable[str]) -> dict[str, Shape]:
    """The linear layers of a model whose names end so, [out, in] by name.

    Raises:
        ValueError: an ending that no linear layer has.
    """
    wanted, found = tuple(endings), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(
            name == ending or name.endswith("." + ending) for ending in wanted
        ):
            found[name] = (module.out_features, module.in_features)
    for ending in wanted:
        if not any(name == ending or name.endswith("." + ending) for name in found):
            raise ValueError(f"targets must end names of linear layers; {ending!r} ends none")
    return found


def rate_factor(step: int, steps: int, warmup: float = 0.1) -> float:
    """The learning rate of a step as a share of the largest: linear warm-up, half a cosine."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / (first + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def fit(
    tuned: Tuned,
    loss_of: Callable[[int], Tensor],
    steps: int,
    rate: float,
    *,
    others: Sequence[nn.Parameter] = (),
    other_rate: float = 0.0,
    max_norm: float = 1.0,
    watch: Mapping[int, Callable[[], dict[str, float]]] | None = None,
) -> Trained:
    """Minimise ``loss_of(step)``: AdamW (StiefelAdam), warm-up, cosine, gradients clipped.

    Args:
        others: trained beside the adapter at ``other_rate``, such as a new head.
        watch: what to measure after that many steps.
    """
    optimizer = tuned.optimizer(rate, others, other_rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    everything = [values for group in optimizer.param_groups for values in group["params"]]
    losses: list[float] = []
    seconds: list[float] = []
    curve: dict[int, dict[str, float]] = {}
    diverged = False
    tuned.model.train()
    RotationBank.of(tuned.model)
    for step in range(steps):
        began = time.perf_counter()
        loss = loss_of(step)
        penalty = 0.0 if tuned.penalty is None else tuned.penalty()
        (loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(everything, max_norm)
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(loss)):
            diverged = True
            break
        for group, largest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = largest * rate_factor(step, steps)
        optimizer.step()
        if tuned.after_step is not None:
            tuned.after_step(step)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
        if watch is not None and step + 1 in watch:
            tuned.model.eval()
            curve[step + 1] = watch[step + 1]()
            tuned.model.train()
    tuned.model.eval()
    return Trained(twentieths(losses), median(seconds), diverged, curve)


def twentieths(values: Sequence[float]) -> list[float]:
    """Means of twenty equal parts of a list, or of fewer if it is shorter."""
    count = min(20, len(values))
    cuts = [index * len(values) // count for index in range(count + 1)] if count else []
    return [round(sum(values[a:b]) / (b - a), 5) for a, b in pairwise(cuts)]


def median(values: Sequence[float]) -> float:
    """The middle one; 0 of none."""
    return sorted(values)[len(values) // 2] if values else 0.0


def debian_package(name: str, cache: Path) -> Path:
    """The files of a Debian package, unpacked in the cache folder at first use.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched; the message says what to do.
    """
    import shutil
    import subprocess
    import tempfile

    folder = cache / name
    if folder.is_dir():
        return folder
    advice = (
        f"the Debian package {name} is needed: on Debian or Ubuntu it is fetched with apt-get; "
        f"elsewhere unpack it (ar x, tar xf data.tar.*) into {folder}"
    )
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FileNotFoundError(advice)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        fetched = subprocess.run(
            ["apt-get", "download", name], cwd=scratch, capture_output=True, text=True
        )
        files = list(Path(scratch).glob("*.deb"))
        if fetched.returncode or not files:
            raise FileNotFoundError(f"{advice}; apt-get said: {fetched.stderr.strip()[-300:]}")
        part = Path(scratch) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", str(files[0]), str(part)], check=True)
        part.rename(folder)
    return folder
