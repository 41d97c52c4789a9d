"""The cells of a comparison, and the processes that work on them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spectral_adapters.compare.methods import LABELS
from spectral_adapters.compare.plan import Plan, PlannedTask
from spectral_adapters.compare.records import Record
from spectral_adapters.compare.tasks import Task, make_task


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one task."""

    task: PlannedTask
    method: str
    budget: int

    def __str__(self) -> str:
        size = f" at {self.budget:,}" if self.budget else ""
        return f"{self.task.name}: {LABELS[self.method]}{size}"


def cells_of(plan: Plan) -> list[Cell]:
    """The cells of a plan in its order, the first budgets of all methods first."""
    found = []
    for task in plan.tasks.values():
        most = max(len(budgets) for budgets in task.methods.values())
        for index in range(most):
            found += [
                Cell(task, method, budgets[index])
                for method, budgets in task.methods.items()
                if index < len(budgets)
            ]
    return found


def prepare_output(output: Path) -> None:
    """Make the folder for records; workers that are started after this show no progress bars."""
    output.mkdir(parents=True, exist_ok=True)
    # Read when tqdm and huggingface_hub are imported.
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def start_worker(threads: int) -> None:
    """Set up a fresh process with so many threads; it ends with the one that started it."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """End this process when the one that started it has been killed, and nobody waits for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _task(name: str, kind: str, options: tuple[tuple[str, Any], ...]) -> Task:
    return make_task(kind, dict(options))


def load_task(task: PlannedTask) -> Task:
    """The task with its data; the same object while a process works on it."""
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in task.options.items()}
    return _task(task.name, task.kind, tuple(sorted(frozen.items())))


def new_record(cell: Cell, kind: str, rate: float | None, seed: int) -> Record:
    """What a run is, without its results."""
    return {
        "task": cell.task.name,
        "digest": cell.task.digest,
        "method": cell.method,
        "budget": cell.budget,
        "kind": kind,
        "rate": rate,
        "seed": seed,
    }
