"""Language: the supersense (person, food, event, ...) of a noun from its gloss."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

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
from spectral_adapters.personalize.emoji import cache_dir
from spectral_adapters.personalize.pipelines import load_text_encoder

#: WordNet's numbers of the supersenses of nouns (its manual page lexnames(5WN)). Left out: 3, the
#: mixed bag "Tops", and the four with the fewest glosses: 12, 16, 19 and 25.
CLASSES = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    13: "food",
    14: "group",
    15: "location",
    17: "object",
    18: "person",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    26: "state",
    27: "substance",
    28: "time",
}
PER_CLASS = {"test": 100, "dev": 50, "train": 300}
TOKENS = 40


@cache
def wordnet() -> Path:
    """The folder with ``data.noun``.

    Raises:
        FileNotFoundError: the package wordnet-base cannot be had.
    """
    package = debian_package("wordnet-base", cache_dir().parent / "debian")
    return package / "usr" / "share" / "wordnet"


@cache
def glosses(split: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Definitions of nouns and the index of their class in :data:`CLASSES`.

    A balanced split by a hash of the gloss: "train" (300 of each class), "dev" (50) and "test"
    (100), disjoint. Glosses that occur twice are left out.
    """
    found: dict[int, list[str]] = {number: [] for number in CLASSES}
    seen: dict[str, int] = {}
    lines = (wordnet() / "data.noun").read_text(encoding="latin-1").splitlines()
    for line in lines:
        if line.startswith(" "):
            continue
        fields, _, text = line.partition(" | ")
        # The definition without its examples.
        gloss = text.split('; "')[0].strip()
        seen[gloss] = seen.get(gloss, 0) + 1
        number = int(fields.split()[1])
        if number in found and gloss:
            found[number].append(gloss)
    texts: list[str] = []
    labels: list[int] = []
    for label, here in enumerate(found.values()):
        once = [gloss for gloss in here if seen[gloss] == 1]
        ranked = sorted(once, key=lambda gloss: hashlib.sha256(gloss.encode()).hexdigest())
        start = 0
        for name, count in PER_CLASS.items():
            if name == split:
                texts += ranked[start : start + count]
                labels += [label] * len(ranked[start : start + count])
            start += count
    return tuple(texts), tuple(labels)


class Classifier(nn.Module):
    """MiniLM, the mean of its token states, and a linear layer to the classes."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 and bool [B, T] -> [B, classes]."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.to(states.dtype)[..., None]
        return self.head((states * weights).sum(1) / weights.sum(1))


class Supersenses(Task):
    """Accuracy on 2,100 held-out glosses of 21 supersenses.

    Args:
        train_size: glosses to learn from, of 6,300; as many of each class.
        epochs, batch_size: of training.
        head_rate: learning rate of the new head, the same for all methods.
        targets: endings of the names of the adapted layers.
    """

    title = "Language: supersenses of nouns"
    metrics = (Metric("accuracy", "accuracy, %", 100, 1), Metric("loss", "loss", 1, 3, False))

    def __init__(
        self,
        train_size: int = 6300,
        epochs: int = 2,
        batch_size: int = 32,
        head_rate: float = 5e-3,
        targets: Sequence[str] = ("query", "value"),
    ) -> None:
        most = PER_CLASS["train"] * len(CLASSES)
        if not len(CLASSES) <= train_size <= most:
            raise ValueError(f"train_size must be from {len(CLASSES)} to {most}; got {train_size}")
        encoder, self.tokenizer = load_text_encoder(max_length=TOKENS)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base = Classifier(encoder, len(CLASSES)).to(self.device)
        self.batch_size, self.head_rate = batch_size, head_rate
        self.targets = tuple(targets)
        each = train_size // len(CLASSES)
        self.data = {name: self._encoded(name) for name in PER_CLASS}
        tokens, labels = self.data["train"]
        keep = [i for i in range(len(labels)) if i % PER_CLASS["train"] < each]
        self.data["train"] = ([tokens[i] for i in keep], labels[keep])
        self.steps = epochs * (len(keep) // batch_size)

    def _encoded(self, split: str) -> tuple[list[list[int]], Tensor]:
        texts, labels = glosses(split)
        ids = self.tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
        return ids, torch.tensor(labels)

    def fresh(self) -> Classifier:
        return copy.deepcopy(self.base)

    def reference(self) -> Classifier:
        """The base model under a head that was trained alone, as it is beside the adapters."""
        model = self.fresh().requires_grad_(False)
        self.train(Tuned(model, {}, None, None), 0.0, seed=0)
        return model

    def shapes(self) -> dict[str, Shape]:
        return linear_shapes(self.base, self.targets)

    def _batch(self, split: str, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels = self.data[split]
        chosen = [torch.tensor(tokens[row]) for row in rows]
        padded = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in chosen])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return padded.to(self.device), mask.to(self.device), labels[list(rows)].to(self.device)

    def train(self, tuned: Tuned, rate: float, seed: int, *, final: bool = False) -> Trained:
        model = cast(Classifier, tuned.model)
        model.head.requires_grad_(True)
        head = {id(values) for values in model.head.parameters()}
        tuned.trained = {n: v for n, v in tuned.trained.items() if id(v) not in head}
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        batches: list[list[int]] = []

        def loss_of(step: int) -> Tensor:
            nonlocal batches
            batches = batches or self._epoch(generator)
            tokens, mask, labels = self._batch("train", batches.pop())
            return cross_entropy(model(tokens, mask), labels)

        points = {self.steps * part // 8 for part in (1, 2, 4, 6)}
        return fit(
            tuned,
            loss_of,
            self.steps,
            rate,
            others=list(model.head.parameters()),
            other_rate=self.head_rate,
            watch={step: lambda: self.evaluate(model, "dev") for step in points} if final else None,
        )

    def _epoch(self, generator: torch.Generator) -> list[list[int]]:
        """Full batches of all examples in a random order, those of one batch of similar length.

        Sorted by length are sixteen batches at a time, so that half as much padding is computed.
        """
        lengths = torch.tensor([len(ids) for ids in self.data["train"][0]])
        order = torch.randperm(len(lengths), generator=generator)
        parts = [part[lengths[part].argsort()] for part in order.split(16 * self.batch_size)]
        batches = [batch.tolist() for part in parts for batch in part.split(self.batch_size)]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        places = torch.randperm(len(full), generator=generator).tolist()
        return [full[place] for place in places]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        tokens, _ = self.data[split]
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        right, loss = 0, 0.0
        for start in range(0, len(order), 100):
            ids, mask, wanted = self._batch(split, order[start : start + 100])
            scores = model(ids, mask)
            right += int((scores.argmax(1) == wanted).sum())
            loss += float(cross_entropy(scores, wanted, reduction="sum"))
        return {"accuracy": right / len(order), "loss": loss / len(order)}
