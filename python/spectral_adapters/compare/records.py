"""The results: one line of JSON per run, appended as soon as the run has ended."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spectral_adapters.compare.plan import START, PlannedTask

RECORDS = "runs.jsonl"

#: What tells runs apart.
KEY = ("task", "digest", "method", "budget", "kind", "rate", "seed")

#: The seed of the runs that choose learning rates; not one of those that count. Where a task has
#: more than one sweep, the others have the seeds from 101 on.
SWEEP_SEED = 0
FURTHER_SWEEPS = 101

Record = dict[str, Any]


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the run was: task, method, budget, kind ("sweep", "final", "cost"), rate and seed."""
    return tuple(record.get(name) for name in KEY)


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a run; several processes may do so at once."""
    line = (json.dumps(record) + "\n").encode()
    with (folder / RECORDS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a process was killed while it wrote
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_records(folder: Path) -> list[Record]:
    """All runs of a folder; a line that was cut off is left out."""
    try:
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def latest(records: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    """Runs by what they were; of two of the same, the later one."""
    return {key_of(record): record for record in records}


def sweep_seeds(task: PlannedTask) -> list[int]:
    """The seeds that a learning rate is tried with."""
    return [SWEEP_SEED, *range(FURTHER_SWEEPS, FURTHER_SWEEPS + task.sweeps - 1)]


def chosen_rate(task: PlannedTask, records: Iterable[Record]) -> float | None:
    """The learning rate that the sweeps of a cell chose; None where there is none.

    Of the rates that were tried with all the seeds that the plan has now. While these are too few
    for a search, of all rates, by the seeds that they have in common.
    """
    worth: dict[float, dict[int, float]] = {}
    for record in records:
        is_planned = record["kind"] == "sweep" and record["seed"] in sweep_seeds(task)
        if is_planned and record.get("trained") is not None:
            worth.setdefault(record["rate"], {})[record["seed"]] = worth_of(task, record)
    if not worth:
        return None
    whole = {rate: found for rate, found in worth.items() if len(found) >= task.sweeps}
    worth = whole if len(whole) >= START else worth
    seeds = set.intersection(*(set(found) for found in worth.values()))
    if not seeds:
        return None
    means = {rate: sum(found[s] for s in seeds) / len(seeds) for rate, found in worth.items()}
    # Of equals the lowest, as the search has it.
    best = max(sorted(means), key=lambda rate: means[rate])
    return best if math.isfinite(means[best]) else None


def worth_of(task: PlannedTask, record: Record) -> float:
    """What the learning rate is chosen by; more is better."""
    from spectral_adapters.compare.tasks import task_class

    first = task_class(task.kind).metrics[0]
    value = record["scores"].get(first.key, math.nan)
    if record["diverged"] or not math.isfinite(value):
        return -math.inf
    return value if first.higher_is_better else -value
