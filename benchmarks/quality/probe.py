"""A question beside the comparison: a method at given learning rates, on the development split.

    python benchmarks/quality/probe.py benchmarks/quality/full.yaml --task style \\
        --method spectral-a --rates 3e-4 1e-3 3e-3 1e-2

The comparison chooses a rate with one seed; here each rate has all of the plan's. The test split is
not touched. ``--option`` changes an option of the task (``targets=v_proj``); ``--flat`` gives
Spectral Adapter A the mean of its layer's singular values in place of each, ``--spectrum-rate 10``
trains SODA's spectrum at ten times the rate of its rotation. Runs are added to
``--output``/runs.jsonl, those on record are not done again, and a table is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from spectral_adapters.compare.cells import Cell, load_task, start_worker
from spectral_adapters.compare.plan import read_plan
from spectral_adapters.compare.records import append_record, key_of, latest, read_records
from spectral_adapters.compare.runner import prepare

HERE = Path(__file__).parent


def run(cell: Cell, rate: float, seed: int, flat: bool, spectrum_rate: float, output: Path) -> None:
    """Train with one rate and seed, on every fold of the task, and record the mean scores."""
    record = {
        "task": cell.task.name,
        "digest": cell.task.digest,
        "method": cell.method
        + ", flat" * flat
        + f", spectrum x {spectrum_rate:g}" * (spectrum_rate != 1),
        "budget": cell.budget,
        "kind": "probe",
        "rate": rate,
        "seed": seed,
    }
    if key_of(record) in latest(read_records(output)):
        return
    task = load_task(cell.task)
    found: list[dict[str, float]] = []
    diverged, count = False, 0
    for fold in range(task.folds):
        task.fold = fold
        tuned = prepare(task, cell.method, cell.budget, seed)
        assert tuned is not None
        if tuned.method is not None:
            tuned = replace(tuned, method=replace(tuned.method, spectrum_rate=spectrum_rate))
        if flat:
            flatten(tuned.model)
        trained = task.train(tuned, rate, seed)
        diverged, count = diverged or trained.diverged, tuned.count
        if diverged:
            break
        found.append(task.evaluate(tuned.model, "dev"))
    scores = {} if diverged else {k: round(mean(s[k] for s in found), 5) for k in found[0]}
    facts = {"trained": count, "split": "dev", "scores": scores, "diverged": diverged}
    options = {key: value for key, value in cell.task.options.items() if key != "base"}
    append_record(output, {**record, "options": options, **facts})


def flatten(model: Any) -> None:
    """Give every column of an adapter A the mean of the singular values of its layer's columns."""
    from spectral_adapters.peft.spectral_adapter_a import SpectralAdapterALayer

    for layer in model.modules():
        if isinstance(layer, SpectralAdapterALayer):
            frozen = layer._frozen("default")
            values = frozen.basis.singular_values
            frozen.basis = frozen.basis._replace(
                singular_values=torch.full_like(values, values.mean())
            )


def table(output: Path, metrics: Sequence[str] | None = None) -> str:
    """Mean and standard deviation over the seeds of all that is on record."""
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for record in latest(read_records(output)).values():
        options = {k: v for k, v in record["options"].items() if k == "targets"}
        key = (record["task"], json.dumps(options), record["method"], record["budget"])
        groups.setdefault((*key, record["rate"]), []).append(record["scores"])
    lines = []
    for (name, options, method, budget, rate), runs in sorted(groups.items()):
        shown = []
        for metric in metrics or list(runs[0]):
            values = [scores[metric] for scores in runs if metric in scores]
            if values:
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                shown.append(f"{metric} {mean(values):.3f}{spread}")
        where = name if options == "{}" else f"{name} {options}"
        found = "; ".join(shown) or "diverged"
        lines.append(f"{where}, {method}, {budget:,}, {rate:g} ({len(runs)}): {found}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE[,VALUE]")
    parser.add_argument("--flat", action="store_true", help="Spectral Adapter A without its scale")
    parser.add_argument("--spectrum-rate", type=float, default=1.0, metavar="RATIO")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "probes")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    task = read_plan(arguments.plan).tasks[arguments.task]
    changes = {k: v.split(",") for k, _, v in (given.partition("=") for given in arguments.option)}
    if changes:
        text = json.dumps([task.digest, changes], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        task = replace(task, options={**task.options, **changes}, digest=digest)
    cell = Cell(task, arguments.method, arguments.budget)
    arguments.output.mkdir(parents=True, exist_ok=True)
    variant = arguments.flat, arguments.spectrum_rate
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, start_worker, (threads,)) as pool:
        jobs = [
            pool.submit(run, cell, rate, seed, *variant, arguments.output)
            for seed in task.seeds
            for rate in arguments.rates
        ]
        for job in jobs:
            job.result()
    print(table(arguments.output))


if __name__ == "__main__":
    main()
