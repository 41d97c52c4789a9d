"""What the theory says of the methods, checked and drawn: rank, orthogonality, spectra, columns.

``python benchmarks/quality/theory.py --changes benchmarks/quality/results/cpu`` after a comparison
with a style task; without ``--changes`` only what needs no trained adapter. Writes
docs/images/theory_*.png and prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from spectral_adapters.compare.cells import Cell
from spectral_adapters.compare.plan import read_plan
from spectral_adapters.compare.records import chosen_rate, latest, read_records
from spectral_adapters.compare.runner import changes_place, is_of
from spectral_adapters.functional import cayley
from spectral_adapters.optim import StiefelAdam
from spectral_adapters.peft import (
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
)
from spectral_adapters.personalize.pipelines import load_pipeline, load_text_encoder

ROOT = Path(__file__).parents[2]
RANK = 8
TARGETS = r"0"


def weight() -> Tensor:
    """A pretrained weight: the query of MiniLM's fourth layer, [384, 384]."""
    encoder, _ = load_text_encoder()
    return encoder.encoder.layer[3].attention.self.query.weight.detach().clone()


def rank_capacity(base: Tensor, images: Path) -> dict[str, Any]:
    """Singular values of the change that each method makes when it is fitted to a change of full
    rank."""
    torch.manual_seed(0)
    change = torch.randn_like(base) * base.norm() / base.numel() ** 0.5 * 0.3
    configs = {
        f"LoRA r={RANK}": LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
        f"A r={RANK}": SpectralAdapterAConfig(r=RANK, target_modules=TARGETS),
        f"R r={RANK}": SpectralAdapterRConfig(r=RANK, target_modules=TARGETS),
        "SVDiff": SVDiffConfig(target_modules=TARGETS),
        "SODA": SODAConfig(target_modules=TARGETS),
    }
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    found: dict[str, Any] = {}
    for name, config in configs.items():
        model = nn.Sequential(nn.Linear(384, 384, bias=False))
        model[0].weight.data.copy_(base)
        inject_adapter_in_model(config, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        eye = torch.eye(384)
        for _ in range(200):
            loss = (model(eye).T - base - change).square().sum() / change.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made = model[0].get_delta_weight("default").detach().double()
        values = torch.linalg.svdvals(made)
        rank = int((values > 1e-5 * values[0]).sum())
        found[name] = {
            "trained": sum(p.numel() for p in trained),
            "rank": rank,
            "left": round(float(loss.detach()), 4),
        }
        axes.semilogy(
            range(1, 385), (values / values[0]).clamp(min=1e-9), label=f"{name}: rank {rank}"
        )
    axes.set(xlabel="index", ylabel="singular values of the change / largest", ylim=(1e-8, 2))
    axes.set_xscale("log")
    axes.legend()
    figure.savefig(images / "theory_rank.png", dpi=110)
    return found


def orthogonality(images: Path) -> dict[str, Any]:
    """How far rotations are from orthogonal: by the size of the angle, and over training steps."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    first, second = figure.subplots(1, 2)
    torch.manual_seed(0)
    n = 32
    eye = torch.eye(n)
    skew = torch.randn(n, n)
    skew = skew - skew.T
    skew /= torch.linalg.matrix_norm(skew, 2)
    angles = torch.logspace(-3, 1, 25)
    upper = torch.triu_indices(n, n, 1)
    found: dict[str, Any] = {}
    errors: dict[str, list[float]] = {"exact Cayley (ours)": []}
    for size in angles:
        q = size * skew
        # Q = (P - P^T) / 2 with P packed.
        packed = 2 * q[upper[0], upper[1]]
        errors["exact Cayley (ours)"].append(_defect(cayley(packed[None], n)[0]))
        for terms in (2, 5, 10):
            power, total = eye, eye.clone()
            for _ in range(terms):
                power = power @ q
                total = total + power
            key = f"series of {terms} terms"
            errors.setdefault(key, []).append(_defect((eye + q) @ total))
    for name, values in errors.items():
        first.loglog(angles, values, label=name)
        found[name] = {
            "at_0.1": _at(angles, values, 0.1),
            "at_1": _at(angles, values, 1.0),
            "at_10": _at(angles, values, 10.0),
        }
    first.set(xlabel="norm of the skew matrix", ylabel="max|RᵀR - I|", ylim=(1e-8, 1e3))
    first.legend(fontsize=8)

    target = torch.linalg.qr(torch.randn(n, n)).Q
    runs: dict[str, list[float]] = {}
    for name in ("StiefelAdam", "Cayley and Adam", "Adam on the factor itself"):
        defects = []
        if name == "Cayley and Adam":
            parameter = nn.Parameter(torch.zeros(1, n * (n - 1) // 2))
        else:
            parameter = nn.Parameter(torch.eye(n))
        optimizer: Any = (
            StiefelAdam([{"params": [parameter], "manifold": True}], lr=1e-2)
            if name == "StiefelAdam"
            else torch.optim.Adam([parameter], lr=1e-2)
        )
        for _ in range(500):
            rotation = cayley(parameter, n)[0] if len(parameter) == 1 else parameter
            optimizer.zero_grad()
            (rotation - target).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                now = cayley(parameter, n)[0] if len(parameter) == 1 else parameter
                defects.append(max(_defect(now), 1e-9))
        second.semilogy(defects, label=name)
        runs[name] = [max(defects)]
    second.set(xlabel="step", ylabel="max|RᵀR - I|", ylim=(1e-8, 10))
    second.legend(fontsize=8)
    figure.savefig(images / "theory_orthogonality.png", dpi=110)
    return {"by_angle": found, "largest_over_500_steps": {k: v[0] for k, v in runs.items()}}


def _defect(matrix: Tensor) -> float:
    matrix = matrix.detach().double()
    return float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


def _at(angles: Tensor, values: list[float], size: float) -> float:
    return float(f"{values[int((angles - size).abs().argmin())]:.3g}")


def spectra(changes: Path, task: str, budget: int, images: Path) -> dict[str, Any]:
    """Singular values before and after training, and which singular directions the change reads.

    Of the first seed at the rate that the comparison chose.
    """
    planned = read_plan(ROOT / "benchmarks/quality/full.yaml").tasks[task]
    records = list(latest(read_records(changes)).values())
    unet = load_pipeline(ROOT / "examples/emoji_base/model").unet
    weights = {name: values.detach().double() for name, values in unet.named_parameters()}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    first, second = figure.subplots(1, 2)
    found: dict[str, Any] = {}
    for name, label in {
        "soda": "SODA",
        "spectral-a": "A, top",
        "spectral-a-bottom": "A, bottom",
        "spectral-r": "R",
        "lora": "LoRA",
        "oft": "OFT",
    }.items():
        cell = Cell(planned, name, budget)
        rate = chosen_rate(planned, [record for record in records if is_of(record, planned, cell)])
        if rate is None:
            continue
        place = changes_place(cell, rate, planned.seeds[0], changes)
        if not place.exists():
            continue
        learned = load_file(place)
        moved, energy, length = [], [], []
        for key, change in learned.items():
            base = weights[key]
            _, values, right = torch.linalg.svd(base, full_matrices=False)
            after = torch.linalg.svdvals(base + change)
            moved.append((after - values) / values[0])
            energy.append((right @ change.double().T).square().sum(1))
            length.append(float(change.norm() / base.norm()))
        difference = torch.stack(moved).mean(0)
        shares = torch.stack(energy).mean(0)
        whole = torch.stack([change.double().square().sum() for change in learned.values()]).mean()
        shares = shares.cumsum(0) / whole
        first.plot(range(1, len(difference) + 1), difference, label=label)
        second.plot(range(1, len(shares) + 1), shares, label=label)
        found[label] = {
            "size_of_change": round(sum(length) / len(length), 4),
            "top_8_directions": round(float(shares[7]), 3),
            "all_directions_of_the_weight": round(float(shares[-1]), 3),
        }
    if found:
        first.set(xlabel="index", ylabel="change of the singular value / largest")
        second.set(
            xlabel="first k right singular vectors of the base", ylabel="share of |ΔW|² on them"
        )
        first.legend(fontsize=8)
        figure.savefig(images / "theory_spectra.png", dpi=110)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=Path, help="output folder of `spectral-adapters compare`")
    parser.add_argument("--task", default="style")
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    found = {
        "rank": rank_capacity(weight(), options.images),
        "orthogonality": orthogonality(options.images),
    }
    if options.changes is not None:
        found["spectra"] = spectra(options.changes, options.task, options.budget, options.images)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
