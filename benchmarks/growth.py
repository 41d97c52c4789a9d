"""How time and memory of a training step grow with tokens, width and number of layers.

    python benchmarks/growth.py      # docs/images/growth_*.png and results/growth-<machine>.json
    python benchmarks/growth.py --smoke --images FOLDER --results FOLDER

Each figure has one quantity per axis, both logarithmic, and one line per method. All methods take
turns at each point, and those that disagree with their oracle are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from adapted import METHODS, Adapt, Base, held_bytes, with_plain
from measure import WRONG, measure
from providers import (
    PLAIN,
    SODA_PROVIDERS,
    TOLERANCES,
    Candidate,
    SODACase,
    Tensors,
    plain_merged,
    plain_tokens,
)
from torch import Tensor, nn

HERE = Path(__file__).parent

BEST_PLAIN = "best plain PyTorch"
#: Label, colour and marker; the colours differ in brightness too.
LINES = {
    "ours": ("SODA, this project (plan auto)", "#0b5394", "o"),
    BEST_PLAIN: ("SODA, best plain PyTorch", "#38a169", "s"),
    "naive": ("SODA, naive (dense R and W')", "#c53030", "^"),
    "LoRA": ("LoRA r=8 (PEFT)", "#805ad5", "D"),
}


@dataclass(frozen=True)
class LayersCase:
    """One training step of ``layers`` square layers [n, n] in a row, with AdamW."""

    layers: int
    n: int
    tokens: int
    device: str

    def __str__(self) -> str:
        return f"L{self.layers}-n{self.n}-M{self.tokens}-{self.device}"

    def build(self) -> LayersProblem:
        return LayersProblem(self)

    def note(self) -> str:
        return ""


class LayersProblem:
    """A frozen chain of linear layers, tokens [M, n], and a target [M, n]."""

    def __init__(self, case: LayersCase) -> None:
        self.case = case
        torch.manual_seed(0)
        chain = nn.Sequential(*(nn.Linear(case.n, case.n) for _ in range(case.layers)))
        names = [str(i) for i in range(case.layers)]
        self.base = Base(chain.to(case.device), names)
        self.x = torch.randn(case.tokens, case.n, device=case.device)
        self.target = torch.randn(case.tokens, case.n, device=case.device)

    def loss(self, model: nn.Module) -> Tensor:
        return (model(self.x) - self.target).square().mean()


def chain_step(adapt: Adapt) -> Callable[[LayersProblem], Candidate]:
    """A training step; a fresh adapter must give the frozen chain's loss."""

    def provider(problem: LayersProblem) -> Candidate:
        model = adapt(problem.base)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)

        def step() -> Tensors:
            optimizer.zero_grad()
            loss = problem.loss(model)
            loss.backward()
            optimizer.step()
            return [loss.detach()[None]]

        def oracle() -> Tensors:
            with torch.no_grad():
                return [problem.loss(problem.base.model)[None]]

        held = held_bytes(model, problem.base)
        return Candidate(step, oracle, tolerance=TOLERANCES["float32"], held_bytes=held)

    return provider


#: Which line a provider belongs to; the fastest of a line is drawn.
SINGLE = {"ours auto": "ours", **dict.fromkeys(PLAIN, BEST_PLAIN), "naive": "naive"}
SINGLE["PEFT LoRA r=8"] = "LoRA"
CHAINS: dict[str, tuple[str, Callable[[LayersProblem], Candidate]]] = {
    "SODA": ("ours", chain_step(METHODS["SODA"])),
    "plain tokens": (BEST_PLAIN, chain_step(with_plain(plain_tokens))),
    "plain merged": (BEST_PLAIN, chain_step(with_plain(plain_merged))),
    "naive": ("naive", chain_step(METHODS["naive SODA"])),
    "PEFT LoRA r=8": ("LoRA", chain_step(METHODS["PEFT LoRA r=8"])),
}


@dataclass(frozen=True)
class Sweep:
    """One variable, everything else fixed."""

    name: str
    label: str
    fixed: str
    cases: Mapping[int, Any]
    providers: Mapping[str, tuple[str, Callable[[Any], Candidate]]]


def sweeps(device: str, smoke: bool) -> list[Sweep]:
    """M, n and the number of layers."""
    single = {name: (line, SODA_PROVIDERS[name]) for name, line in SINGLE.items()}
    width, tokens = (32, 8) if smoke else (640, 256)
    many = (4, 8) if smoke else (64, 128, 256, 512, 1024, 2048, 4096)
    widths = (8, 16) if smoke else (160, 320, 640, 1280, 2048)
    layers = (1, 2) if smoke else (1, 2, 4, 8, 16, 32)
    fewest = 4 if smoke else 1024
    return [
        Sweep(
            "tokens",
            "tokens M",
            f"one layer, n = {width}",
            {m: SODACase(width, m, device) for m in many},
            single,
        ),
        Sweep(
            "width",
            "width n of the layer",
            f"one layer, M = {fewest:,} tokens",
            {n: SODACase(n, fewest, device) for n in widths},
            single,
        ),
        Sweep(
            "layers",
            "number of layers",
            f"n = {width}, M = {tokens} tokens, with AdamW",
            {count: LayersCase(count, width, tokens, device) for count in layers},
            CHAINS,
        ),
    ]


def run(sweep: Sweep, seconds: float) -> list[dict[str, Any]]:
    """Measured points: value of the variable, and per line milliseconds and MiB."""
    points = []
    for value, case in sweep.cases.items():
        results = measure(
            case, {name: make for name, (_, make) in sweep.providers.items()}, seconds
        )
        best: dict[str, dict[str, float]] = {}
        for name, result in results.items():
            line, _ = sweep.providers[name]
            if result.seconds:
                milliseconds = 1e3 * result.percentiles()["50"]
                if line not in best or milliseconds < best[line]["milliseconds"]:
                    best[line] = {"milliseconds": milliseconds, "mib": result.peak_bytes / 2**20}
        problems = {name: found.problem for name, found in results.items() if found.problem}
        points.append({sweep.name: value, "case": str(case), "lines": best, "problems": problems})
        print(f"{case}: " + ", ".join(f"{k} {v['milliseconds']:.2f} ms" for k, v in best.items()))
    return points


def draw(sweep: Sweep, points: Sequence[dict[str, Any]], machine: str, path: Path) -> None:
    """Time and memory side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    panels = (("milliseconds", "time per step (ms)"), ("mib", "peak memory of a step (MiB)"))
    values = [point[sweep.name] for point in points]
    for axis, (quantity, label) in zip(axes, panels, strict=True):
        for line, (name, color, marker) in LINES.items():
            known = [p for p in points if line in p["lines"]]
            xs = [p[sweep.name] for p in known]
            ys = [p["lines"][line][quantity] for p in known]
            axis.plot(xs, ys, color=color, marker=marker, markersize=5, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(sweep.label)
        axis.set_ylabel(label)
        axis.grid(which="major", color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"Training step (forward and backward): {sweep.fixed}; both axes logarithmic\n{machine}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per point, all methods")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)

    document = {"date": report.now(), **report.conditions(), "device": options.device}
    facts = document["machine"]
    device = facts["gpu"] if options.device == "cuda" else facts["cpu"]
    machine = f"{device}, {facts['cores']} cores, fp32, PyTorch {torch.__version__}"
    for folder in (options.images, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    suffix = "_gpu" if options.device == "cuda" else ""
    document["sweeps"] = {}
    for sweep in sweeps(options.device, options.smoke):
        points = run(sweep, 0.0 if options.smoke else options.seconds)
        document["sweeps"][sweep.name] = {"fixed": sweep.fixed, "points": points}
        draw(sweep, points, machine, options.images / f"growth_{sweep.name}{suffix}.png")
    path = options.results / f"growth-{report.slug(device)}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path}")
    wrong = [
        f"{point['case']}: {name}: {problem}"
        for found in document["sweeps"].values()
        for point in found["points"]
        for name, problem in point["problems"].items()
        if problem.startswith(WRONG)
    ]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
