"""Which columns of the spectrum which task adapts, so that several adapters can be fused.

Two ways to keep tasks apart. :class:`ColumnAllocator` hands out blocks from the top and remembers
them in a file. :func:`columns_for` needs no communication: a task's name decides its block, and
:func:`collision_probability` says how often two tasks draw the same one. Both count columns from
the largest singular value, as ``SpectralAdapterAConfig(columns=...)`` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_adapters._validation import check_choice

#: How :func:`columns_for` weighs the blocks: linearly falling from the top, or all alike.
BIASES = ("top", "none")

#: Adapter -> layer -> columns.
Columns = Mapping[str, Mapping[str, Sequence[int]]]


def columns_for(task: str | int, rank: int, r: int, *, bias: str = "top") -> list[int]:
    """The block of r columns that a task takes without asking anybody.

    The spectrum is cut into B = rank // r blocks. With ``bias="top"`` block b = 0, ..., B - 1 is
    drawn with probability (B - b) / (B (B + 1) / 2), the top one twice as often as the middle one;
    with ``"none"`` all have 1 / B. Blocks of the same r are equal or
    disjoint. The draw comes from SHA-256 of the task's name and integer arithmetic: it is the same
    on every machine and version. One task draws about the same relative place for every rank; for
    independent draws by layer, make the layer's name part of ``task``.

    Args:
        task: name or number of the task, the seed of the draw.
        rank: of the weight, min(out, in).
        r: number of columns.
        bias: "top" or "none".

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(task, bool) or not isinstance(task, (str, int)):
        raise TypeError(f"task must be a str or an int; got {task!r}")
    weights = _block_weights(rank, r, bias)
    remaining = _draw(str(task), sum(weights))
    block = 0
    while remaining >= weights[block]:
        remaining -= weights[block]
        block += 1
    return list(range(block * r, (block + 1) * r))


def random_columns(name: str, rank: int, r: int, *, seed: int = 0) -> list[int]:
    """r different columns drawn evenly from all, by a name: what ``columns="random"`` takes.

    Like :func:`columns_for` by SHA-256 and integer arithmetic: the same on every machine and
    version.

    Args:
        name: of the layer; every name is a draw of its own.
        rank: of the weight, min(out, in).
        r: number of columns.
        seed: of the draw, at least 0.

    Returns:
        The columns, ascending.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str; got {name!r}")
    _check_columns(rank, r)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an int of at least 0; got {seed!r}")
    # The first r places of a shuffle, of which only what was moved is kept.
    moved: dict[int, int] = {}
    drawn = []
    for place in range(r):
        other = place + _draw(f"{seed}/{place}/{name}", rank - place)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return sorted(drawn)


def collision_probability(rank: int, r: int, tasks: int = 2, *, bias: str = "top") -> float:
    """How probable it is that at least two of some tasks draw the same block.

    With the probabilities p of the blocks it is ``1 - k! e_k(p)`` for k tasks, e_k the elementary
    symmetric polynomial; for two tasks the sum of p squared, about 4 r / (3 rank) with
    ``bias="top"`` and r / rank with ``"none"``.

    Args:
        rank, r, bias: as for :func:`columns_for`.
        tasks: k, the number of tasks.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_positive("tasks", tasks)
    weights = _block_weights(rank, r, bias)
    total = sum(weights)
    # apart[j]: probability that j tasks have blocks of their own among those seen so far.
    apart = [1.0] + [0.0] * tasks
    for weight in weights:
        for j in range(tasks, 0, -1):
            apart[j] += j * apart[j - 1] * weight / total
    return max(0.0, 1.0 - apart[tasks])


def _block_weights(rank: int, r: int, bias: str) -> list[int]:
    _check_columns(rank, r)
    check_choice("bias", bias, BIASES)
    count = rank // r
    return [count - block if bias == "top" else 1 for block in range(count)]


def _draw(text: str, below: int) -> int:
    """An integer from 0 to ``below`` - 1 that a text decides, uniform to 2**-64."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return (number * below) >> 64


def _check_columns(rank: Any, r: Any) -> None:
    _check_positive("rank", rank)
    _check_positive("r", r)
    if r > rank:
        raise ValueError(f"r must be at most the rank {rank}; got {r}")


def _check_positive(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1; got {value}")


class ColumnAllocator:
    """Hands out disjoint columns to tasks, from the top of the spectrum.

        allocator = ColumnAllocator(rank=320, r=8, registry="columns.json")
        config = SpectralAdapterAConfig(columns=allocator.allocate("cat"), ...)

    The same columns are then free of collisions in every layer whose rank reaches them: take the
    smallest rank of the adapted layers.

    Args:
        rank: columns that there are to hand out.
        r: how many a task gets, if it asks for no other number.
        registry: JSON file that remembers who has what, shared by processes; each change is made
            under a lock and appears whole. None keeps it in memory.

    Raises:
        TypeError, ValueError: naming the argument; a registry of another rank, or no registry.
    """

    def __init__(self, rank: int, r: int = 8, *, registry: str | Path | None = None) -> None:
        _check_positive("rank", rank)
        _check_positive("r", r)
        self.rank, self.r = rank, r
        self._path = None if registry is None else Path(registry)
        self._tasks: dict[str, list[int]] = {}
        if self._path is not None:
            self._tasks = self._read()

    @property
    def tasks(self) -> dict[str, list[int]]:
        """Columns by task, as the registry has them now."""
        if self._path is not None:
            self._tasks = self._read()
        return {task: list(columns) for task, columns in self._tasks.items()}

    def allocate(self, task: str, r: int | None = None) -> list[int]:
        """The r topmost free columns; a task that has some already gets the same again.

        Raises:
            ValueError: fewer than r columns are free, or the task has another number of them.
        """
        if not isinstance(task, str) or not task:
            raise TypeError(f"task must be a non-empty str; got {task!r}")
        r = self.r if r is None else r
        _check_positive("r", r)
        with self._changing():
            if task not in self._tasks:
                taken = {column for columns in self._tasks.values() for column in columns}
                free = [column for column in range(self.rank) if column not in taken]
                if len(free) < r:
                    raise ValueError(
                        f"r must be at most the number of free columns, {len(free)} of "
                        f"{self.rank}; got {r} for {task!r}"
                    )
                self._tasks[task] = free[:r]
            elif len(self._tasks[task]) != r:
                raise ValueError(
                    f"r must be {len(self._tasks[task])}, which {task!r} has already; got {r}"
                )
            return list(self._tasks[task])

    def release(self, task: str) -> None:
        """Give a task's columns back; ``ValueError`` if it has none."""
        with self._changing():
            if task not in self._tasks:
                raise ValueError(f"task must be one of {sorted(self._tasks)}; got {task!r}")
            del self._tasks[task]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The registry as it is, locked, and written back if nothing went wrong."""
        if self._path is None:
            yield
            return
        import fcntl  # not on every system, and needed only here

        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the file, which is replaced. The lock goes when its owner dies.
        with open(self._path.with_name(self._path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._tasks = self._read()
            yield
            descriptor, part = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"rank": self.rank, "tasks": self._tasks}, file, indent=1)
            os.replace(part, self._path)

    def _read(self) -> dict[str, list[int]]:
        assert self._path is not None
        if not self._path.exists():
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            rank, tasks = content["rank"], content["tasks"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"registry must be a file that this class wrote; {self._path} is none"
            ) from None
        if rank != self.rank:
            raise ValueError(f"rank must be {rank}, that of {self._path}; got {self.rank}")
        if not isinstance(tasks, dict):
            raise ValueError(
                f"registry must be a file that this class wrote; tasks is {tasks!r} in {self._path}"
            )
        for task, columns in tasks.items():
            if not isinstance(columns, list) or not all(type(column) is int for column in columns):
                raise ValueError(
                    f"registry must have a list of columns for every task; {task!r} has "
                    f"{columns!r} in {self._path}"
                )
        return tasks


@dataclass(frozen=True)
class ColumnOverlap:
    """Columns that more than one adapter changes.

    Attributes:
        shared: by layer and column, the adapters that change it.
        fraction: shared columns of all changed ones, over all layers.
    """

    shared: dict[str, dict[int, list[str]]]
    fraction: float

    def __str__(self) -> str:
        if not self.shared:
            return "no column is changed by several adapters"
        head = f"{self.fraction:.1%} of the changed columns are changed by several adapters"
        return "\n  ".join([head, *self.places()])

    def places(self) -> list[str]:
        """One line per layer and group of adapters."""
        lines = []
        for layer, columns in self.shared.items():
            groups: dict[str, list[int]] = {}
            for column, names in columns.items():
                groups.setdefault(" and ".join(names), []).append(column)
            lines += [f"{layer}: columns {found} of {names}" for names, found in groups.items()]
        return lines


def column_overlap(columns: Columns) -> ColumnOverlap:
    """Where adapters change the same columns.

    Args:
        columns: by adapter and layer, as ``spectral_adapters.peft.adapter_columns`` and
            ``saved_columns`` return them for one adapter.
    """
    shared: dict[str, dict[int, list[str]]] = {}
    changed = 0
    for layer in dict.fromkeys(layer for found in columns.values() for layer in found):
        owners: dict[int, list[str]] = {}
        for adapter, found in columns.items():
            for column in found.get(layer, ()):
                owners.setdefault(column, []).append(adapter)
        changed += len(owners)
        several = {c: owners[c] for c in sorted(owners) if len(owners[c]) > 1}
        if several:
            shared[layer] = several
    return ColumnOverlap(shared, sum(map(len, shared.values())) / max(changed, 1))


def check_disjoint(columns: Columns) -> None:
    """Raise ``ValueError`` that names the layers, columns and adapters that collide, if any do."""
    overlap = column_overlap(columns)
    if overlap.shared:
        raise ValueError(
            "adapters must be on different columns; train them on columns of their own, or use "
            f"allow_overlap to add shifts of the same column up; {'; '.join(overlap.places())}"
        )
