"""Three concepts trained apart on the demo's base model, drawn together: every way to fuse them.

    python benchmarks/fusion_sheet.py               # results/fusion-*.json, docs/images/fusion.png
    python benchmarks/fusion_sheet.py --table FILE  # such a result as Markdown
    python benchmarks/fusion_sheet.py --smoke --results FOLDER --image FILE

The concepts are three OpenMoji drawings of things that no emoji up to version 15 shows, so the base
model has seen neither them nor their style: one red, one green, one brown. Each has a nonsense word
for a name and a style-free caption, and is trained from that one drawing beside pictures that the
base model drew of other names; the three know nothing of each other. All methods get the same
pictures, noise, steps and adapted modules, and that learning rate of a sweep at which the first
concept's adapter alone draws it best; one seed also the next lower rate, because what is best alone
need not be best to fuse.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import LoraConfig
from report import conditions, markdown, now, slug
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from spectral_adapters.columns import ColumnAllocator
from spectral_adapters.diffusers import fuse_adapters, load_adapter
from spectral_adapters.peft import (
    SODAConfig,
    SpectralAdapterAConfig,
    adapter_moments,
    init_orthogonal_lora,
    weight_changes,
)
from spectral_adapters.personalize import emoji, evaluation, report, similarity
from spectral_adapters.personalize.adapters import TEXT
from spectral_adapters.personalize.data import Pictures
from spectral_adapters.personalize.evaluation import Sampling
from spectral_adapters.personalize.pipelines import load_pipeline
from spectral_adapters.personalize.run import EMOJI_SAMPLING
from spectral_adapters.personalize.settings import Settings
from spectral_adapters.personalize.trainer import Trainer, encode, encode_captions, make_accelerator

HERE = Path(__file__).parent
BASE = HERE.parent / "examples" / "emoji_base" / "model"
SIZE = (64, 64)

#: By name: the code point of the drawing, and what it is.
CONCEPTS = {
    "zorp": ("E14A", "a red racing helmet"),
    "tupa": ("E344", "a green wheelbarrow"),
    "blick": ("1FA8E", "a brown treasure chest"),
}
CAPTION = "an emoji of {}"
TOGETHER = CAPTION.format("{}, {} and {}".format(*CONCEPTS))
PROMPTS = (*map(CAPTION.format, CONCEPTS), TOGETHER)
#: What the base model can make of three things that it knows: the same form of prompt.
KNOWN = ("dog", "pizza", "automobile")
RANK = 8

#: Everybody's columns, and rows of the orthogonal matrix, from one register each.
COLUMNS = ColumnAllocator(rank=112, r=RANK)
ROWS = ColumnAllocator(rank=384, r=RANK)
for _concept in CONCEPTS:
    # In one order, however many adapters an earlier run has left to train.
    COLUMNS.allocate(_concept)
    ROWS.allocate(_concept)


@dataclass(frozen=True)
class Plan:
    """How much is trained and drawn; everything else is the same at all sizes."""

    seeds: int = 3
    noises: int = 3
    steps: int = 100
    batch_size: int = 2
    prior: int = 48
    sampling_steps: int = 20
    rates: int | None = None


SMOKE = Plan(seeds=1, noises=1, steps=1, batch_size=1, prior=2, sampling_steps=1, rates=1)


def _spectral_a(unet: Any, concept: str) -> None:
    unet.add_adapter(
        SpectralAdapterAConfig(target_modules=list(TEXT), columns=COLUMNS.allocate(concept))
    )


def _soda(unet: Any, concept: str) -> None:
    unet.add_adapter(SODAConfig(target_modules=list(TEXT), factors={112: (112,)}))


def _lora(unet: Any, concept: str) -> None:
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(TEXT))
    )


def _orthogonal(unet: Any, concept: str) -> None:
    _lora(unet, concept)
    init_orthogonal_lora(unet, ROWS.allocate(concept))


#: Gives a denoiser the adapter of a concept; and the learning rates that are tried.
FAMILIES: dict[str, tuple[Callable[[Any, str], None], tuple[float, ...]]] = {
    "A": (_spectral_a, (1e-3, 3e-3, 1e-2, 3e-2)),
    "SODA": (_soda, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LoRA": (_lora, (1e-3, 3e-3, 1e-2, 3e-2)),
    "orthogonal LoRA": (_orthogonal, (1e-2, 3e-2, 1e-1, 3e-1)),
}
#: By title: the method of ``spectral-adapters fuse``, and whose adapters it fuses.
METHODS = {
    "spectral": ("spectral", "A"),
    "geodesic": ("geodesic", "SODA"),
    "delta, SODA": ("delta", "SODA"),
    "delta, LoRA": ("delta", "LoRA"),
    "fedavg": ("fedavg", "LoRA"),
    "gradient": ("gradient", "LoRA"),
    "orthogonal": ("orthogonal", "orthogonal LoRA"),
}
#: A LoRA of all three drawings at once: what no fusion needs to know of.
JOINTLY = "trained together"


class Studio:
    """The base pipeline, the true drawings, and what is trained on them so far.

    Args:
        plan: sizes.
        work: adapters are kept here; those of an earlier run are not trained again.
    """

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self.pipe: Any = load_pipeline(BASE)
        for module in self.pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        self._unet = copy.deepcopy(self.pipe.unet)
        items = [emoji.Emoji(key, chr(int(key, 16)), name) for name, (key, _) in CONCEPTS.items()]
        self.truths = emoji.load_images(items, emoji.TARGET_STYLE, SIZE[0])
        self.features = similarity.image_features(self.truths)
        self.accelerator = make_accelerator(Settings(cpu=True))
        known = [item.name for item in emoji.split("pretrain")]
        names = [known[index * len(known) // plan.prior] for index in range(plan.prior)]
        self.prior = evaluation.draw_prior(
            self.pipe, [CAPTION.format(name) for name in names], self.sampling()
        )

    def sampling(self) -> Sampling:
        _, guidance, batch = EMOJI_SAMPLING
        return Sampling(self.plan.sampling_steps, guidance, batch, SIZE, seed=0)

    def reset(self) -> Any:
        """The pipeline as it was loaded."""
        self.pipe.unet = copy.deepcopy(self._unet)
        return self.pipe

    def train(self, family: str, rate: float, seed: int, concepts: Sequence[str]) -> Path:
        """An adapter of one concept, or of several at once; returns its folder."""
        name = "-".join((family, f"{rate:g}", str(seed), str(self.plan.steps), *concepts))
        folder = self.work / slug(name)
        if (folder / "unet").is_dir():
            return folder
        pipe = self.reset()
        chosen = [list(CONCEPTS).index(concept) for concept in concepts]
        captions = tuple(PROMPTS[index] for index in chosen)
        data = encode(pipe, Pictures(tuple(concepts), captions, self.truths[chosen]))
        settings = Settings(
            steps=self.plan.steps,
            batch_size=self.plan.batch_size,
            learning_rate=rate,
            seed=seed,
            cpu=True,
            warmup_steps=min(20, self.plan.steps - 1),
            checkpoint_every=self.plan.steps,
        )
        torch.manual_seed(seed)
        FAMILIES[family][0](pipe.unet, "+".join(concepts))
        outcome = Trainer(pipe, data, settings, folder, self.accelerator, self.prior).run()
        if outcome.reason != "finished":
            raise RuntimeError(f"{name}: {outcome.reason} {outcome.trouble or ''}")
        return folder

    def draw(self, prompts: Sequence[str] = PROMPTS) -> Tensor:
        """Pictures [prompts, noises, 3, H, W]; noise depends on the place alone."""
        every = [prompt for prompt in prompts for _ in range(self.plan.noises)]
        images = evaluation.draw(self.pipe, every, self.sampling())
        return images.unflatten(0, (len(prompts), self.plan.noises))

    def compare(self, images: Tensor) -> Tensor:
        """Similarity [prompts, noises, concepts] of pictures to the true drawings."""
        found = similarity.image_features(images.flatten(0, 1)) @ self.features.T
        return found.unflatten(0, images.shape[:2])

    def alone(self, folder: Path) -> Tensor:
        """What one adapter draws of all prompts."""
        load_adapter(self.reset(), folder)
        return self.draw()

    def moments(self, folder: Path, prompt: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """An adapter's changes by layer, and the second moments of what they see of a prompt."""
        load_adapter(self.reset(), folder)
        # Without guidance, or the empty caption would be part of every concept.
        one = replace(self.sampling(), steps=1, guidance_scale=1.0)
        with adapter_moments(self.pipe.unet, ["default"]) as found:
            evaluation.draw(self.pipe, [prompt], one)
        return weight_changes(self.pipe.unet), dict(found)

    def interference(self, folders: Sequence[Path]) -> list[float]:
        """``|sum of dW_j X_i, j not i| / |dW_i X_i|`` over all layers, by concept i.

        How much the other adapters change of what a concept's own prompt becomes, by how much its
        own does.
        """

        def effect(change: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> float:
            parts = [((d.double() @ seen[name]) * d).sum() for name, d in change.items()]
            return float(sum(parts)) ** 0.5

        found = [self.moments(f, p) for f, p in zip(folders, PROMPTS, strict=False)]
        changes = [change for change, _ in found]
        ratios = []
        for index, (own, seen) in enumerate(found):
            others = [change for place, change in enumerate(changes) if place != index]
            total = {name: sum(other[name] for other in others) for name in own}
            ratios.append(effect(total, seen) / effect(own, seen))
        return ratios

    def fuse(self, method: str, folders: Sequence[Path]) -> tuple[Tensor, dict[str, Any]]:
        """What the fusion of adapters draws, and the report of it."""
        with tempfile.TemporaryDirectory() as scratch:
            moments = None
            if method == "gradient":
                moments = [Path(scratch) / f"{name}.safetensors" for name in CONCEPTS]
                for path, folder, prompt in zip(moments, folders, PROMPTS, strict=False):
                    _, seen = self.moments(folder, prompt)
                    save_file({f"unet.{name}": moment for name, moment in seen.items()}, path)
            fusion = fuse_adapters(
                self.reset(),
                Path(scratch) / "fused",
                folders,
                method=method,
                merged=method not in ("spectral", "geodesic"),
                moments=moments,
            )
        # The names are those of folders; the concepts are in the same order.
        pairs = [f"{a}, {b}" for a, b in combinations(CONCEPTS, 2)]
        return self.draw(), {
            "norms": dict(zip([*CONCEPTS, "fused"], fusion.report.norms.values(), strict=True)),
            "crosstalk": dict(zip(pairs, fusion.report.crosstalk.values(), strict=True)),
        }


def sweep(studio: Studio) -> dict[str, dict[float, float]]:
    """Own similarity of the first concept at seed 0, by family and learning rate."""
    found: dict[str, dict[float, float]] = {}
    first = next(iter(CONCEPTS))
    for family, (_, rates) in FAMILIES.items():
        found[family] = {}
        for rate in rates[: studio.plan.rates]:
            table = studio.compare(studio.alone(studio.train(family, rate, 0, [first])))
            found[family][rate] = float(table[0, :, 0].mean())
            print(f"{family}, {rate:g}: {found[family][rate]:.3f}", flush=True)
    return found


def collage(truths: Tensor) -> Tensor:
    """Three drawings [3, 3, H, W] at half size in one [1, 3, H, W], one above two."""
    half = interpolate(truths, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)
    page = torch.ones_like(truths[:1])
    side = half.shape[-1]
    for image, (top, left) in zip(half, ((0, side // 2), (side, 0), (side, side)), strict=True):
        page[0, :, top : top + side, left : left + side] = image
    return page


def summary(table: Tensor, base: Tensor, before: Tensor) -> dict[str, Any]:
    """Figures of one model at all seeds, as (mean, standard deviation over seeds and noises).

    Args:
        table: similarity [seeds, prompts, noises, concepts] of its drawings.
        base: of the base model's.
        before: of the drawings of each concept's prompt by its own adapter alone.
    """
    count = len(CONCEPTS)
    diagonal = torch.arange(count)
    own = table[:, diagonal, :, diagonal]  # [concepts, seeds, noises]
    others = (table[:, :count].sum(-1) - own.movedim(0, 1)) / (count - 1)
    joint = table[:, count]
    gain = own - base[:, diagonal, :, diagonal]
    gain_before = before[:, diagonal, :, diagonal] - base[:, diagonal, :, diagonal]
    nearest = table[:, :count].argmax(-1) == diagonal[:, None]
    kept = gain.mean((0, 2)) / gain_before.mean((0, 2))
    return {
        "own": spread(own.mean(0)),
        "kept": spread(kept),
        "others": spread(others.mean(1)),
        "own is nearest": rounded(nearest.float().mean()),
        "joint": {name: spread(joint[..., i]) for i, name in enumerate(CONCEPTS)},
        "joint, mean": spread(joint.mean(-1)),
        "joint, least": spread(joint.amin(-1)),
        "joint, nearest": {
            name: rounded((joint.argmax(-1) == i).float().mean()) for i, name in enumerate(CONCEPTS)
        },
    }


def spread(values: Tensor) -> tuple[float, float]:
    found = values.flatten().tolist()
    return round(mean(found), 4), round(stdev(found), 4) if len(found) > 1 else 0.0


def rounded(values: Tensor) -> Any:
    return [rounded(row) for row in values] if values.ndim else round(float(values), 4)


def compare(
    studio: Studio, base: Tensor, rates: Mapping[str, float], seeds: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures of all models and fusions, and the drawings of the first seed by title.

    Args:
        studio: where to draw.
        base: what the base model draws, [prompts, noises, 3, H, W].
        rates: learning rates by family.
        seeds: of training.
    """
    tables: dict[str, list[Tensor]] = {}
    fusions: dict[str, list[dict[str, Any]]] = {}
    between: dict[str, list[list[float]]] = {}
    shown = {"base": base}
    for seed in range(seeds):
        folders: dict[str, list[Path]] = {}
        pictures: dict[str, Tensor] = {}
        for family in FAMILIES:
            folders[family] = [studio.train(family, rates[family], seed, [c]) for c in CONCEPTS]
            for concept, folder in zip(CONCEPTS, folders[family], strict=True):
                pictures[f"{family}: {concept}"] = studio.alone(folder)
            between.setdefault(family, []).append(studio.interference(folders[family]))
        for title, (method, family) in METHODS.items():
            pictures[title], fused = studio.fuse(method, folders[family])
            fusions.setdefault(title, []).append(fused)
        jointly = studio.train("LoRA", rates["LoRA"], seed, list(CONCEPTS))
        pictures[JOINTLY] = studio.alone(jointly)
        for title, images in pictures.items():
            tables.setdefault(title, []).append(studio.compare(images))
        shown = shown if seed else {**shown, **pictures}
        print(f"seed {seed} drawn", flush=True)
    stacked = {title: torch.stack(found) for title, found in tables.items()}
    table = studio.compare(base)
    bases = table.expand(seeds, *table.shape)
    before = {}
    for family in FAMILIES:
        own = [stacked[f"{family}: {c}"][:, i] for i, c in enumerate(CONCEPTS)]
        before[family] = torch.stack([*own, bases[:, len(CONCEPTS)]], 1)
    models = {"base": summary(bases, bases, before["LoRA"])}
    for family in FAMILIES:
        found = summary(before[family], bases, before[family])
        # There is no one model of which this were the joint drawing, but three.
        models[f"{family}, each alone"] = {k: v for k, v in found.items() if "joint" not in k} | {
            f"joint, {concept} alone": [
                spread(stacked[f"{family}: {concept}"][:, len(CONCEPTS), :, i])
                for i in range(len(CONCEPTS))
            ]
            for concept in CONCEPTS
        }
    for title, (_, family) in {**METHODS, JOINTLY: ("", "LoRA")}.items():
        models[title] = summary(stacked[title], bases, before[family])
    return {
        "rates": dict(rates),
        "seeds": seeds,
        "models": models,
        "fusions": fusions,
        "interference": between,
    }, shown


def run(plan: Plan, work: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document to keep, and the drawings of the first seed by title."""
    began = time.perf_counter()
    studio = Studio(plan, work)
    base = studio.draw()
    known = references(studio)
    tried = sweep(studio)
    best = {family: max(found, key=found.__getitem__) for family, found in tried.items()}
    gentler = {}
    for family, found in tried.items():
        lower = [rate for rate in found if rate < best[family]]
        gentler[family] = max(lower, default=best[family])
    chosen, shown = compare(studio, base, best, plan.seeds)
    lower, _ = compare(studio, base, gentler, 1)
    return {
        "date": now(),
        **conditions(),
        "plan": asdict(plan),
        "concepts": {name: list(about) for name, about in CONCEPTS.items()},
        "prompts": list(PROMPTS),
        "modules": list(TEXT),
        "sweep": {
            family: {f"{r:g}": rounded(torch.tensor(v)) for r, v in found.items()}
            for family, found in tried.items()
        },
        "references": known,
        "chosen rates": chosen,
        "next lower rates": lower,
        "seconds": round(time.perf_counter() - began),
    }, shown


def shared_states(pipe: Any) -> list[list[float]]:
    """Share of the text states of prompt i, by energy, in the span of those of prompt j."""
    states, _ = encode_captions(pipe, PROMPTS[: len(CONCEPTS)], SIZE)
    spans = [torch.linalg.qr(found.double().mT)[0] for found in states]
    return [
        [
            round(float((found.double() @ span).norm() / found.double().norm()) ** 2, 4)
            for span in spans
        ]
        for found in states
    ]


def references(studio: Studio) -> dict[str, Any]:
    """What the figures can be compared with."""
    studio.reset()
    truths = studio.features @ studio.features.T
    through = evaluation.reconstruct(studio.pipe, studio.truths)
    page = evaluation.reconstruct(studio.pipe, collage(studio.truths))
    known = [*map(CAPTION.format, KNOWN), CAPTION.format("{}, {} and {}".format(*KNOWN))]
    drawn = studio.draw(known)
    features = similarity.image_features(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
    to_each = torch.einsum("nd,cnd->nc", features[-1], features[:-1])
    return {
        "true drawings, to one another": rounded(truths),
        "through the autoencoder, own": spread(
            similarity.feature_similarity(through, studio.truths)
        ),
        "collage of the three through the autoencoder": rounded(
            (similarity.image_features(page) @ studio.features.T)[0]
        ),
        "text states of a prompt in the span of another's": shared_states(studio.pipe),
        "base, three names that it knows": {
            "names": list(KNOWN),
            "joint, mean": spread(to_each.mean(-1)),
            "joint, least": spread(to_each.amin(-1)),
        },
    }


def draw_sheet(shown: Mapping[str, Tensor]) -> Any:
    """Rows: each concept's own prompt, then all three in one, at several noises."""
    first = [images[: len(CONCEPTS), 0] for images in shown.values()]
    joint = [images[len(CONCEPTS), :3] for images in shown.values()]
    columns = dict(zip(shown, map(torch.cat, zip(first, joint, strict=True)), strict=True))
    rows = [*PROMPTS[: len(CONCEPTS)], *[TOGETHER] * len(joint[0])]
    kept = {
        title.removeprefix("A: ") if title.startswith("A: ") else title: images
        for title, images in columns.items()
        if ":" not in title or title.startswith("A: ")
    }
    return report.sheet(rows, kept, blocks=1)


def table(found: Mapping[str, Any]) -> str:
    """A table of docs/fusion.md, of what :func:`compare` found."""

    def cell(pair: Sequence[float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"

    rows = []
    for title, figures in found["models"].items():
        reports = found["fusions"].get(title, [])
        talk = [pair[0] for fused in reports for pair in fused["crosstalk"].values()]
        _, family = METHODS.get(title, ("", ""))
        between = [ratio for ratios in found["interference"].get(family, []) for ratio in ratios]
        norms = [fused["norms"][concept] for fused in reports for concept in CONCEPTS]
        rows.append(
            [
                title,
                cell(figures["own"]),
                f"{figures['kept'][0]:.0%}",
                cell(figures["others"]),
                f"{figures['own is nearest']:.0%}",
                cell(figures.get("joint, mean")),
                cell(figures.get("joint, least")),
                f"{mean(norms):.0f}" if norms else "",
                f"{mean(talk):.2f}" if talk else "",
                f"{mean(between):.2f}" if between else "",
            ]
        )
    head = ["", "own", "kept", "others", "own nearest", "joint, mean", "joint, least"]
    return markdown([*head, "norm of one", "crosstalk", "interference"], rows)


def tables(document: Mapping[str, Any]) -> str:
    """Both tables of a result."""
    parts = ("chosen rates", "next lower rates")
    return "\n\n".join(
        f"{part}: {document[part]['rates']}\n\n{table(document[part])}" for part in parts
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the adapters")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs/images/fusion.png")
    options = parser.parse_args()
    if options.table is not None:
        print(tables(json.loads(options.table.read_text())))
        return
    with tempfile.TemporaryDirectory() as scratch:
        document, shown = run(SMOKE if options.smoke else Plan(), options.work or Path(scratch))
    facts = document["machine"]
    path = options.results / f"fusion-{slug(facts['cpu'])}-{document['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    report.save_png(draw_sheet(shown), options.image)
    print(tables(document))
    print(f"written: {path}, {options.image}")


if __name__ == "__main__":
    main()
