"""Pictures: a drawing style from five drawings, and a subject from four."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_adapters.compare.methods import Shape, Tuned
from spectral_adapters.compare.tasks._task import Metric, Task, Trained, fit, linear_shapes
from spectral_adapters.personalize import data, emoji, evaluation, similarity
from spectral_adapters.personalize.adapters import TEXT
from spectral_adapters.personalize.run import (
    EMOJI_SAMPLING,
    image_size,
    load_pipeline,
    prior_prompts,
)
from spectral_adapters.personalize.settings import Settings
from spectral_adapters.personalize.trainer import Conditions, Trainer, encode, make_accelerator

#: Of the nine cat faces, every second is learned from; the others are the test.
CATS_LEARNED = emoji.CAT_FACES[1::2]
CATS_TESTED = emoji.CAT_FACES[0::2]


class _Pictures(Task):
    """Training and drawing with the emoji base model."""

    def __init__(
        self,
        base: str,
        steps: int,
        batch_size: int,
        prior_images: int,
        drawing_steps: int,
        targets: Sequence[str],
    ) -> None:
        self.steps, self.batch_size = steps, batch_size
        self._given = Settings(
            base=base,
            output=tempfile.gettempdir(),
            style=emoji.TARGET_STYLE,
            steps=steps,
            batch_size=batch_size,
            flip=True,
            prior_images=prior_images,
            cpu=not torch.cuda.is_available(),
        )
        self.pipe = load_pipeline(self._given)
        self.accelerator = make_accelerator(self._given)
        self.pipe.to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.base: nn.Module = self.pipe.unet
        self.size = image_size(self.pipe, None)
        self.targets = tuple(targets)
        _, guidance, batch = EMOJI_SAMPLING
        self.sampling = evaluation.Sampling(drawing_steps, guidance, batch, self.size, 0)
        similarity.load_network()
        self._prior: Conditions | None = None

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def shapes(self) -> dict[str, Shape]:
        return linear_shapes(self.base, self.targets)

    def _draw(self, model: nn.Module, prompts: Sequence[str]) -> Tensor:
        self.pipe.unet = model
        try:
            return evaluation.draw(self.pipe, prompts, self.sampling)
        finally:
            self.pipe.unet = self.base

    def _fit(self, tuned: Tuned, pictures: data.Pictures, rate: float, seed: int) -> Trained:
        """Train on pictures, the base model keeping what it draws itself (prior preservation)."""
        if self._prior is None:
            # The same for every run: names that are neither learned nor measured.
            prompts = prior_prompts(self._given, pictures)
            self._prior = evaluation.draw_prior(self.pipe, prompts, self.sampling)
        conditions = encode(self.pipe, pictures, flip=True)
        settings = Settings(**{**self._given.__dict__, "seed": seed, "learning_rate": rate})
        self.pipe.unet = tuned.model
        try:
            trainer = Trainer(
                self.pipe,
                conditions,
                settings,
                Path(tempfile.gettempdir()),
                self.accelerator,
                self._prior,
            )
            return fit(tuned, trainer.loss, self.steps, rate)
        finally:
            self.pipe.unet = self.base


class Style(_Pictures):
    """OpenMoji's style from five of its drawings, measured on names that were not learned.

    Args:
        base: folder of the emoji base model.
        steps, batch_size: of training; each step also holds as many images of the prior.
        prior_images: what the base model keeps of its own.
        drawing_steps: denoising steps of a drawing.
        dev_count, test_count: names that are drawn, evenly spaced in the lists.
        targets: endings of the names of the adapted layers; keys and values of the text.
    """

    title = "Style: five OpenMoji drawings"
    metrics = (
        Metric("similarity", "similarity to the true drawing"),
        Metric("content", "similarity to the base drawing"),
        Metric("own_truth", "own truth is nearest, %", 100, 1),
        Metric("pixels", "pixel distance", 1, 3, False),
    )
    kept = "content"

    def __init__(
        self,
        base: str,
        steps: int = 200,
        batch_size: int = 8,
        dev_count: int = 60,
        test_count: int = 300,
        prior_images: int = 64,
        drawing_steps: int = 12,
        targets: Sequence[str] = TEXT,
    ) -> None:
        super().__init__(base, steps, batch_size, prior_images, drawing_steps, targets)
        self.counts = {"dev": dev_count, "test": test_count}
        self.learned = data.openmoji(None, self.size)
        self._truth: dict[str, tuple[data.Pictures, Tensor, Tensor]] = {}

    def _truths(self, split: str) -> tuple[data.Pictures, Tensor, Tensor]:
        """Drawings of the split, their features, and those of what the base draws in its style."""
        if split not in self._truth:
            true = data.held_out(split, self.counts[split], self.size, self.learned)
            prompts = [emoji.caption(name, "noto") for name in true.names]
            drawn = self._draw(self.base, prompts)
            self._truth[split] = (
                true,
                similarity.image_features(true.images),
                similarity.image_features(drawn),
            )
        return self._truth[split]

    def train(self, tuned: Tuned, rate: float, seed: int, *, final: bool = False) -> Trained:
        return self._fit(tuned, self.learned, rate, seed)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        true, wanted, based = self._truths(split)
        drawn = self._draw(model, true.captions)
        found = similarity.image_features(drawn)
        score = evaluation.score(found, wanted)
        return {
            "similarity": score.mean,
            "content": float((found * based).sum(1).mean()),
            "own_truth": score.own_truth,
            "pixels": float((drawn - true.images).abs().mean()),
        }

    def picture_names(self) -> tuple[str, ...]:
        return self._shown().names

    def pictures(self, model: nn.Module) -> Tensor:
        return self._draw(model, self._shown().captions)

    def _shown(self) -> data.Pictures:
        return data.held_out("test", 8, self.size, self.learned)


class Subject(_Pictures):
    """One cat from four of its faces, measured on the other five.

    The nine are absent from the base model's training. Learning rates are chosen by learning from
    three of the four and drawing the fourth, for each of the four.

    Args:
        base: folder of the emoji base model.
        steps, batch_size: of training.
        noises: drawings of each face.
        prior_images: what the base model keeps of its own.
        drawing_steps: denoising steps of a drawing.
        targets: endings of the names of the adapted layers.
    """

    title = "Subject: four faces of a cat"
    folds = len(CATS_LEARNED)
    metrics = (
        Metric("similarity", "similarity to the true drawing"),
        Metric("own_truth", "own truth is nearest, %", 100, 1),
        Metric("content", "similarity of other names to the base drawing"),
        Metric("pixels", "pixel distance", 1, 3, False),
    )
    kept = "content"

    def __init__(
        self,
        base: str,
        steps: int = 150,
        batch_size: int = 4,
        noises: int = 8,
        prior_images: int = 64,
        drawing_steps: int = 12,
        targets: Sequence[str] = TEXT,
    ) -> None:
        super().__init__(base, steps, batch_size, prior_images, drawing_steps, targets)
        self.noises = noises
        emoji.fetch_style("noto")
        self.learned = self._faces(CATS_LEARNED, "noto")
        self.others = [emoji.caption(item.name, "noto") for item in emoji.split("dev")[::10]]
        self._based: Tensor | None = None

    def _faces(self, keys: Sequence[str], style: str) -> data.Pictures:
        return data.emoji_pictures(emoji.get(keys), self.size, style)

    def train(self, tuned: Tuned, rate: float, seed: int, *, final: bool = False) -> Trained:
        keys = [key for key in CATS_LEARNED if final or key != CATS_LEARNED[self.fold]]
        return self._fit(tuned, self._faces(keys, "noto"), rate, seed)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        keys = [CATS_LEARNED[self.fold]] if split == "dev" else CATS_TESTED
        scores = self._score(model, keys, "noto")
        if self._based is None:
            self._based = similarity.image_features(self._draw(self.base, self.others))
        found = similarity.image_features(self._draw(model, self.others))
        return {**scores, "content": float((found * self._based).sum(1).mean())}

    def evaluate_merged(self, model: nn.Module) -> dict[str, float]:
        """The tested faces in OpenMoji's style, by a model that has learned both."""
        return self._score(model, CATS_TESTED, emoji.TARGET_STYLE)

    def _score(self, model: nn.Module, keys: Sequence[str], style: str) -> dict[str, float]:
        true = self._faces(keys, style)
        # Nearest among all nine.
        everything = similarity.image_features(self._faces(emoji.CAT_FACES, style).images)
        places = torch.tensor([emoji.CAT_FACES.index(key) for key in keys])
        places = places.repeat_interleave(self.noises)
        drawn = self._draw(model, [c for c in true.captions for _ in range(self.noises)])
        table = similarity.image_features(drawn) @ everything.T
        wanted = true.images.repeat_interleave(self.noises, 0)
        return {
            "similarity": float(table.gather(1, places[:, None]).mean()),
            "own_truth": float((table.argmax(1) == places).float().mean()),
            "pixels": float((drawn - wanted).abs().mean()),
        }

    def picture_names(self) -> tuple[str, ...]:
        return self._faces(CATS_TESTED, "noto").names

    def pictures(self, model: nn.Module) -> Tensor:
        return self._draw(model, self._faces(CATS_TESTED, "noto").captions)


def weight_changes(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """What an adapted or trained model adds to the weights of its base, by parameter name.

    Adapters are merged for this, and taken out again.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.merge()
    try:
        adapted = {
            name.replace(".base_layer.", "."): values for name, values in model.named_parameters()
        }
        changes = {
            name: (adapted[name] - values).detach().clone()
            for name, values in base.named_parameters()
        }
    finally:
        for layer in layers:
            layer.unmerge()
    return {name: change for name, change in changes.items() if bool(change.any())}


def with_changes(base: nn.Module, *changes: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with the sum of changes added to its weights."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for change in changes:
            for name, values in change.items():
                parameters[name].add_(values)
    return model
