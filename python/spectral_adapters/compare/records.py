"""The results: one line of JSON per run, appended as soon as the run has ended."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RECORDS = "runs.jsonl"

#: What tells runs apart.
KEY = ("task", "digest", "method", "budget", "kind", "rate", "seed")

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
