"""What is compared with what: a YAML file, checked. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_adapters.personalize.settings import UsageError

#: Learning rates that a search may come to, and how many of the middle it starts with.
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
START = 3
SEEDS = (1, 2, 3)
#: Most seeds that a learning rate may be tried with.
MOST_SWEEPS = 9

#: Kinds of tasks that a pipeline draws.
PICTURED = ("style", "subject")

_KEYS = {"title", "seeds", "rates", "tasks", "cost", "merge"}
_TASK_KEYS = {"kind", "options", "methods", "budgets", "seeds", "sweeps"}
_COST_KEYS = {"task", "budget", "steps", "rounds"}
_MERGE_KEYS = {"subject", "style"}


@dataclass(frozen=True)
class PlannedTask:
    """A task of a plan.

    Attributes:
        name: in the plan and in the records.
        kind: one of ``compare.tasks.TASKS``.
        options: of the task.
        methods: budgets by the name of the method, in the plan's order.
        seeds: of the runs that count.
        sweeps: seeds per learning rate in the search for it.
        digest: of kind and options as the plan has them; records of other ones do not count.
    """

    name: str
    kind: str
    options: dict[str, Any]
    methods: dict[str, tuple[int, ...]]
    seeds: tuple[int, ...]
    sweeps: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """A comparison; see :func:`read_plan`."""

    title: str
    rates: tuple[float, ...]
    tasks: dict[str, PlannedTask]
    cost: dict[str, Any] | None
    merge: dict[str, str] | None


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    A plan has ``tasks``: by name, the ``kind`` of task (default: its name), its ``options``,
    ``methods`` (a list, or budgets by method), ``budgets`` (for methods without their own) and
    ``sweeps`` (seeds per learning rate in the search, 1 by default);
    ``seeds``, ``rates`` (ascending); ``cost``: the task, budget, steps and rounds that time and
    memory are measured with; ``merge``: the tasks ``subject`` and ``style`` whose results are put
    into one model. An option ``base`` is a folder relative to the plan.

    Raises:
        UsageError: naming the file and the entry.
    """
    import yaml

    place = Path(path)
    try:
        given = yaml.safe_load(place.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"plan {place} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"plan {place} cannot be read: {' '.join(str(error).split())}") from error
    where = f"plan {place}"
    _check_keys(where, given, _KEYS)
    if not given.get("tasks"):
        raise UsageError(f"{where}: tasks must name at least one task")
    _check_table(f"{where}: tasks", given["tasks"])
    seeds = _numbers(f"{where}: seeds", given.get("seeds", SEEDS), int)
    rates = _numbers(f"{where}: rates", given.get("rates", RATES), float)
    if list(rates) != sorted(set(rates)) or rates[0] <= 0 or len(rates) < START:
        raise UsageError(
            f"{where}: rates must be at least {START}, above 0 and ascending; got {list(rates)}"
        )
    tasks = {
        name: _task(f"{where}: tasks: {name}", name, entry or {}, seeds, place.parent)
        for name, entry in given["tasks"].items()
    }
    cost = given.get("cost")
    if cost is not None:
        _check_keys(f"{where}: cost", cost, _COST_KEYS)
        if cost.get("task") not in tasks:
            raise UsageError(f"{where}: cost: task must be one of {', '.join(tasks)}")
        cost = {"budget": 20_000, "steps": 20, "rounds": 3, **cost}
        for key in sorted(_COST_KEYS - {"task"}):
            if not isinstance(cost[key], int) or isinstance(cost[key], bool) or cost[key] < 1:
                raise UsageError(
                    f"{where}: cost: {key} must be an int of at least 1; got {cost[key]!r}"
                )
    merge = given.get("merge")
    if merge is not None:
        _check_keys(f"{where}: merge", merge, _MERGE_KEYS)
        for role in sorted(_MERGE_KEYS):
            task = tasks.get(merge.get(role))
            if task is None or task.kind != role:
                raise UsageError(f"{where}: merge: {role} must name a task of that kind")
    return Plan(str(given.get("title", place.stem)), rates, tasks, cost, merge)


def _task(where: str, name: str, given: Any, seeds: tuple[int, ...], folder: Path) -> PlannedTask:
    from spectral_adapters.compare.methods import BASE, FULL, METHODS
    from spectral_adapters.compare.tasks import TASKS

    _check_keys(where, given, _TASK_KEYS)
    kind = given.get("kind", name)
    if kind not in tuple(TASKS):
        raise UsageError(f"{where}: kind must be one of {', '.join(TASKS)}; got {kind!r}")
    _check_table(f"{where}: options", given.get("options") or {})
    options = dict(given.get("options") or {})
    if kind in PICTURED and not isinstance(options.get("base"), str):
        raise UsageError(f"{where}: options must have base, the folder of a pipeline")
    text = json.dumps([kind, options], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if isinstance(options.get("base"), str):
        options["base"] = str((folder / options["base"]).resolve())
    common = _numbers(f"{where}: budgets", given.get("budgets", [20_000]), int)
    wanted = given.get("methods") or [BASE, *METHODS]
    if isinstance(wanted, str) or not isinstance(wanted, (Mapping, Sequence)):
        raise UsageError(f"{where}: methods must be a list or a table; got {wanted!r}")
    if not isinstance(wanted, Mapping):
        wanted = dict.fromkeys(map(str, wanted))
    methods: dict[str, tuple[int, ...]] = {}
    for method, budgets in wanted.items():
        if method not in (BASE, FULL, *METHODS):
            raise UsageError(
                f"{where}: methods must be among {', '.join((BASE, FULL, *METHODS))}; "
                f"got {method!r}"
            )
        if method in (BASE, FULL):
            methods[method] = (0,)
        else:
            own = budgets if budgets is not None else common
            methods[method] = _numbers(f"{where}: methods: {method}", own, int)
    own_seeds = _numbers(f"{where}: seeds", given.get("seeds", seeds), int)
    sweeps = _numbers(f"{where}: sweeps", given.get("sweeps", 1), int)
    if len(sweeps) > 1 or not 1 <= sweeps[0] <= MOST_SWEEPS:
        raise UsageError(f"{where}: sweeps must be 1 to {MOST_SWEEPS}; got {given['sweeps']!r}")
    return PlannedTask(name, kind, options, methods, own_seeds, sweeps[0], digest)


def _check_table(where: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} must be a table; got {type(given).__name__}")


def _check_keys(where: str, given: Any, allowed: set[str]) -> None:
    _check_table(where, given)
    unknown = sorted(str(key) for key in given if key not in allowed)
    if unknown:
        raise UsageError(
            f"{where}: {', '.join(unknown)}: unknown; known are {', '.join(sorted(allowed))}"
        )


def _numbers(where: str, given: Any, kind: type) -> tuple[Any, ...]:
    values = given if isinstance(given, (list, tuple)) else [given]
    found = []
    for value in values:
        try:
            # YAML takes 1e-3 for a string.
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool) or (kind is int and number != value):
            raise UsageError(f"{where} must hold numbers ({kind.__name__}); got {value!r}")
        if number < 0:
            raise UsageError(f"{where} must hold no negative numbers; got {value!r}")
        found.append(number)
    if not found:
        raise UsageError(f"{where} must not be empty")
    return tuple(found)
