"""Carries out a plan: searches learning rates on the development split, then runs what counts.

A *cell* is one method at one budget on one task. Its runs stand on each other: what a search finds
says what is run next. All runs that stand on nothing that is not on record are shared out over
processes, those of the first cells first; every run is recorded when it ends, and a run that is on
record is not done again.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spectral_adapters.compare.cells import (
    Cell,
    cells_of,
    load_task,
    new_record,
    prepare_output,
    start_worker,
)
from spectral_adapters.compare.costs import are_measured, costly_cells, measure_costs
from spectral_adapters.compare.methods import BASE, FULL, Schedule, Tuned, tune
from spectral_adapters.compare.plan import START, Plan, PlannedTask
from spectral_adapters.compare.records import (
    SWEEP_SEED,
    Record,
    append_record,
    chosen_rate,
    key_of,
    latest,
    read_records,
    sweep_seeds,
    worth_of,
)
from spectral_adapters.compare.tasks import Task


def compare(
    plan: Plan,
    output: Path,
    *,
    workers: int = 1,
    minutes: float | None = None,
    only: Callable[[Cell], bool] = lambda cell: True,
    say: Callable[[str], None] = print,
) -> bool:
    """Carry out what is left of a plan.

    Args:
        plan: from :func:`spectral_adapters.compare.plan.read_plan`.
        output: gets ``runs.jsonl`` and ``sheets/``.
        workers: processes; the machine's threads are shared out over them.
        minutes: start no further run after this time.
        only: which cells.
        say: told of every cell that is finished.

    Returns:
        Whether everything asked for is on record now.
    """
    prepare_output(output)
    ends = math.inf if minutes is None else time.time() + 60 * minutes
    cells = [cell for cell in cells_of(plan) if only(cell)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    # A fresh process per worker: forked ones would share the parent's threads and locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (threads,)) as pool:
        finished = _share_out(pool, workers, cells, plan.rates, output, ends, say)
        if plan.merge is not None and finished:
            subject, style = plan.tasks[plan.merge["subject"]], plan.tasks[plan.merge["style"]]
            pairs = [c for c in cells if c.task is subject and c.method not in (BASE, FULL)]
            merging = [pool.submit(merge_cell, subject, style, c, output, ends) for c in pairs]
            merged = [job.result() for job in merging]
            finished = all(merged)
    if plan.cost is not None and finished and all(map(only, costly_cells(plan))):
        left = None if minutes is None else (ends - time.time()) / 60
        finished = are_measured(plan, output) or measure_costs(plan, output, minutes=left, say=say)
    return finished


class Run(NamedTuple):
    """A run of a cell."""

    kind: str
    rate: float | None
    seed: int


def _share_out(
    pool: Executor,
    workers: int,
    cells: Sequence[Cell],
    rates: Sequence[float],
    output: Path,
    ends: float,
    say: Callable[[str], None],
) -> bool:
    """Do what is left of the cells, as many runs at a time as there are workers.

    Returns:
        Whether all of it is on record now.
    """
    began = time.time()
    under_way: dict[Future[None], tuple[int, Run]] = {}
    made: Counter[int] = Counter()
    told: set[int] = set()

    def tell(number: int, state: str) -> None:
        told.add(number)
        finished = sum(not runs for runs in left)
        minutes = (time.time() - began) / 60
        say(
            f"[{finished}/{len(cells)}, {minutes:.1f} min] {cells[number]}: "
            f"{made[number]} runs{state}"
        )

    while True:
        done = latest(read_records(output))
        left = [runs_left(cell, rates, done) for cell in cells]
        for job in [(number, run) for number, runs in enumerate(left) for run in runs]:
            if len(under_way) < workers and time.time() < ends and job not in under_way.values():
                number, run = job
                under_way[pool.submit(carry_out, cells[number], run, output)] = job
        for number in sorted(made.keys() - told - {number for number, _ in under_way.values()}):
            if not left[number]:
                tell(number, "")
        if not under_way:
            break
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            number, _ = under_way.pop(future)
            future.result()
            made[number] += 1
    for number in sorted(made.keys() - told):
        tell(number, ", not finished")
    return not any(left)


def runs_left(
    cell: Cell, rates: Sequence[float], done: Mapping[tuple[Any, ...], Record]
) -> list[Run]:
    """The runs of a cell that stand on nothing that is not on record; none if all of it is.

    The learning rate: three in the middle of ``rates`` are tried with seeds of their own, and as
    long as the best of all is at an end, the next one beyond it. It is chosen by the mean of the
    first metric on the development split, of equals the lowest. Then a run for each seed, measured
    once on the test split.
    """

    def on_record(run: Run) -> Record | None:
        return done.get(key_of(new_record(cell, *run)))

    def lacking(runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if on_record(run) is None]

    if cell.method == BASE:
        return lacking([Run("final", None, SWEEP_SEED)])
    low = (len(rates) - START) // 2
    high = low + START
    while True:
        worth: dict[float, float] = {}
        left: list[Run] = []
        for rate in rates[low:high]:
            sweeps = [Run("sweep", rate, seed) for seed in sweep_seeds(cell.task)]
            found = [record for run in sweeps if (record := on_record(run)) is not None]
            if any(record.get("trained") is None for record in found):
                return []  # the method has no such size
            worth[rate] = sum(worth_of(cell.task, record) for record in found) / len(sweeps)
            left += lacking(sweeps)
        if left:
            return left
        best = max(worth, key=lambda rate: worth[rate])
        if best == rates[low] and low > 0:
            low -= 1
        elif best == rates[high - 1] and high < len(rates):
            high += 1
        else:
            return lacking(Run("final", best, seed) for seed in cell.task.seeds)


def carry_out(cell: Cell, run: Run, output: Path) -> None:
    """Do a run and record it."""
    record = new_record(cell, *run)
    append_record(output, {**record, **run_folds(cell, *run, output)})


def prepare(task: Task, method: str, budget: int, seed: int) -> Tuned | None:
    """A fresh base model with a method's adapter; None if the method has no such size."""
    return tune(task.fresh(), method, task.shapes(), budget, Schedule(task.steps, seed))


def run_folds(
    cell: Cell, kind: str, rate: float | None, seed: int, output: Path | None = None
) -> Record:
    """:func:`run_once`; for the choice of a rate once for every fold that the task has.

    The scores are then means over the folds; all else that is recorded is of the first one.
    """
    task = load_task(cell.task)
    found = []
    for fold in range(task.folds if kind == "sweep" else 1):
        task.fold = fold
        found.append(run_once(cell, kind, rate, seed, output))
        if found[-1]["trained"] is None or found[-1].get("diverged"):
            return found[-1]
    scores = [record["scores"] for record in found]
    means = {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}
    return {**found[0], "scores": _rounded(means)}


def run_once(
    cell: Cell, kind: str, rate: float | None, seed: int, output: Path | None = None
) -> Record:
    """Train and measure one adapter."""
    task = load_task(cell.task)
    split = "dev" if kind == "sweep" else "test"
    began = time.perf_counter()
    if cell.method == BASE:
        model = task.reference()
        scores = task.evaluate(model, split)
        _keep_pictures(task, cell, model, output)
        return {"trained": 0, "split": split, "scores": _rounded(scores)}
    tuned = prepare(task, cell.method, cell.budget, seed)
    if tuned is None:
        return {"trained": None}
    setup = time.perf_counter() - began
    assert rate is not None
    trained = task.train(tuned, rate, seed, final=kind == "final")
    middle = time.perf_counter()
    scores = {} if trained.diverged else task.evaluate(tuned.model, split)
    if kind == "final" and seed == cell.task.seeds[0] and not trained.diverged:
        _keep_pictures(task, cell, tuned.model, output)
    if kind == "final" and not trained.diverged:
        _keep_changes(task, cell, tuned.model, rate, seed, output)
    return {
        "trained": tuned.count,
        "layers": None if tuned.sizes is None else len(tuned.sizes.layers),
        "split": split,
        "scores": _rounded(scores),
        "diverged": trained.diverged,
        "losses": trained.losses,
        "curve": {str(step): _rounded(found) for step, found in trained.curve.items()},
        "seconds": {
            "setup": round(setup, 3),
            "train": round(middle - began - setup, 2),
            "evaluate": round(time.perf_counter() - middle, 2),
            "step": round(trained.seconds_per_step, 4),
        },
    }


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in scores.items()}


def _keep_pictures(task: Task, cell: Cell, model: nn.Module, output: Path | None) -> None:
    """Draw the row of the sheet that belongs to a cell."""
    drawn = None if output is None else task.pictures(model)
    if drawn is None or output is None:
        return
    from PIL import Image

    folder = output / "sheets" / cell.task.name
    folder.mkdir(parents=True, exist_ok=True)
    row = (torch.cat(list(drawn), 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(row.cpu().numpy()).save(folder / f"{cell.method}-{cell.budget}.png")


def _keep_changes(
    task: Task, cell: Cell, model: nn.Module, rate: float, seed: int, output: Path | None
) -> None:
    """Keep what was learned of pictures, for subject and style in one model."""
    from spectral_adapters._files import save_tensors
    from spectral_adapters.compare.tasks.style import Style, Subject, weight_changes

    if output is None or not isinstance(task, (Style, Subject)) or cell.method == FULL:
        return
    place = changes_place(cell, rate, seed, output)
    place.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(place, weight_changes(model, task.base))


def changes_place(cell: Cell, rate: float, seed: int, output: Path) -> Path:
    """Where the change of the weights is kept that a run came to."""
    run = f"{cell.method}-{cell.budget}-{seed}-{rate:g}-{cell.task.digest}"
    return output / "changes" / cell.task.name / f"{run}.safetensors"


def merge_cell(
    subject: PlannedTask,
    style: PlannedTask,
    cell: Cell,
    output: Path,
    ends: float = math.inf,
) -> bool:
    """Subject and style in one model, ``W0 + dW_subject + dW_style``, once for every seed.

    A change of the weights that was not kept is trained again, as it is on record.

    Returns:
        Whether all that can be measured is on record now; nothing can where the style has no run.
    """
    from safetensors.torch import load_file

    from spectral_adapters.compare.tasks.style import Subject, with_changes

    state = latest(read_records(output))
    for seed in subject.seeds:
        record = new_record(cell, "merged", None, seed)
        runs = []
        for task in (subject, style):
            here = [r for r in state.values() if is_of(r, task, cell)]
            wanted = ("final", chosen_rate(task, here), seed)
            run = next((r for r in here if (r["kind"], r["rate"], r["seed"]) == wanted), None)
            if run is not None and run.get("trained") is not None and not run["diverged"]:
                runs.append((Cell(task, cell.method, cell.budget), run))
        if len(runs) < 2:
            continue
        rates = [run["rate"] for _, run in runs]
        # A rate may have been chosen anew since.
        if state.get(key_of(record), {}).get("rates") == rates:
            continue
        places = []
        for trained, run in runs:
            if time.time() >= ends:
                return False
            places.append(_changes_of(trained, run, output))
        held = load_task(subject)
        assert isinstance(held, Subject)
        model = with_changes(held.base, *(load_file(place) for place in places)).eval()
        scores = _rounded(held.evaluate_merged(model))
        append_record(output, {**record, "rates": rates, "split": "test", "scores": scores})
    return True


def is_of(record: Record, task: PlannedTask, cell: Cell) -> bool:
    """Whether a record is of a task's cell with the method and budget of another."""
    whose = (record["task"], record["digest"], record["method"], record["budget"])
    return whose == (task.name, task.digest, cell.method, cell.budget)


def _changes_of(cell: Cell, run: Record, output: Path) -> Path:
    """Where the change of the weights is that a run came to."""
    place = changes_place(cell, run["rate"], run["seed"], output)
    if not place.is_file():
        task = load_task(cell.task)
        tuned = prepare(task, cell.method, cell.budget, run["seed"])
        assert tuned is not None
        task.train(tuned, run["rate"], run["seed"], final=True)
        _keep_changes(task, cell, tuned.model, run["rate"], run["seed"], output)
    return place
