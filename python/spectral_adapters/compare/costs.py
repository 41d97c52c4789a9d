"""What methods cost in time, memory and bytes: all of them in one run, taking turns."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from spectral_adapters.compare.cells import (
    Cell,
    load_task,
    new_record,
    prepare_output,
    start_worker,
)
from spectral_adapters.compare.methods import BASE, FULL, Schedule, tune
from spectral_adapters.compare.plan import Plan
from spectral_adapters.compare.records import SWEEP_SEED, Record, append_record, read_records


def costly_cells(plan: Plan) -> list[Cell]:
    """The cells whose cost a plan asks for; full fine-tuning is one, the base model is not."""
    if plan.cost is None:
        return []
    task, budget = plan.tasks[plan.cost["task"]], plan.cost["budget"]
    return [Cell(task, m, 0 if m == FULL else budget) for m in task.methods if m != BASE]


def newest_costs(plan: Plan, records: Iterable[Record]) -> list[Record]:
    """The records of the last run that measured costs as the plan has them."""
    wanted = {(c.task.name, c.task.digest, c.method, c.budget) for c in costly_cells(plan)}
    costs = [
        r
        for r in records
        if r["kind"] == "cost"
        and (r["task"], r["digest"], r["method"], r["budget"]) in wanted
        and "run" in r  # else of a time when methods were not measured together
    ]
    last = max((r["run"] for r in costs), default="")
    return [r for r in costs if r["run"] == last]


def are_measured(plan: Plan, output: Path) -> bool:
    """Whether one run has measured all that the plan asks for."""
    return len(newest_costs(plan, read_records(output))) == len(costly_cells(plan))


def measure_costs(
    plan: Plan,
    output: Path,
    *,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Measure all methods in rounds of changing order, each every time in a process of its own
    that has all threads; medians over the rounds go to the records when all are done.

    Args:
        plan: with ``cost``.
        output: gets a record per method.
        minutes: start nothing after this time; what was measured until then is lost.
        say: told of every round.

    Returns:
        Whether they were measured.
    """
    assert plan.cost is not None
    prepare_output(output)
    ends = math.inf if minutes is None else time.time() + 60 * minutes
    steps, rounds = plan.cost["steps"], plan.cost["rounds"]
    cells = costly_cells(plan)
    context = multiprocessing.get_context("spawn")
    run = datetime.now(UTC).isoformat(timespec="seconds")
    found: dict[str, list[Record]] = {cell.method: [] for cell in cells}
    for number in range(1, rounds + 1):
        for cell in random.Random(number).sample(cells, len(cells)):
            if time.time() >= ends:
                return False
            with ProcessPoolExecutor(1, context, start_worker, (os.cpu_count() or 1,)) as pool:
                found[cell.method].append(pool.submit(measure_cost, cell, steps).result())
        say(f"costs of {len(cells)} methods: round {number} of {rounds}")
    for cell in cells:
        record = new_record(cell, "cost", None, SWEEP_SEED)
        append_record(output, {**record, "run": run, **_summary(found[cell.method])})
    return True


def _summary(measured: list[Record]) -> Record:
    """One record of several that differ in what was timed."""
    first = measured[0]
    if first["trained"] is None:
        return first
    seconds = {
        key: round(median(m["seconds"][key] for m in measured), 4) for key in first["seconds"]
    }
    steps = [m["seconds"]["step"] for m in measured]
    memory = int(median(m["memory"] for m in measured))
    return {**first, "seconds": {**seconds, "steps": steps}, "memory": memory}


def measure_cost(cell: Cell, steps: int) -> Record:
    """Set-up, seconds per step, memory and file size of one method, in a process of its own.

    Set-up is decomposing and injecting, without the cache of decompositions. Memory is what the
    process grew by from the loaded base model to the peak of training.
    """
    from peft import get_peft_model_state_dict

    os.environ["SPECTRAL_KERNELS_CACHE_LIMIT"] = "0"
    task = load_task(cell.task)
    task.steps = steps
    model = task.fresh()
    before = _resident()
    began = time.perf_counter()
    tuned = tune(model, cell.method, task.shapes(), cell.budget, Schedule(steps, SWEEP_SEED))
    if tuned is None:
        return {"trained": None}
    setup = time.perf_counter() - began
    trained = task.train(tuned, 1e-4, SWEEP_SEED)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cell.method == FULL:
        state = dict(tuned.model.state_dict())
    else:
        bare: Any = tuned.model
        if cell.method == "adalora":
            bare.peft_config["default"].rank_pattern = None  # an injected adapter is saved whole
        state = get_peft_model_state_dict(bare, adapter_name="default")
    return {
        "trained": tuned.count,
        "seconds": {"setup": round(setup, 3), "step": round(trained.seconds_per_step, 4)},
        "memory": peak - before,
        "bytes": sum(v.numel() * v.element_size() for v in state.values()),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }


def _resident() -> int:
    """Bytes of this process that are in memory."""
    if not sys.platform.startswith("linux"):
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    import peft
    import transformers

    return {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
