"""The tasks, by the name that a plan calls them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from spectral_adapters.compare.tasks._task import Metric, Task

#: Module and class; imported when first used.
TASKS = {
    "style": ("style", "Style"),
    "subject": ("style", "Subject"),
    "supersenses": ("supersenses", "Supersenses"),
    "text": ("text", "Text"),
}


def task_class(kind: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {kind!r}")
    module, name = TASKS[kind]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def make_task(kind: str, options: Mapping[str, Any]) -> Task:
    """A task with its data and base model loaded.

    Raises:
        ValueError: an unknown task or option.
        ImportError, FileNotFoundError: naming the package that is missing.
    """
    cls = task_class(kind)
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"task {kind}: {error}") from error


__all__ = ["TASKS", "Metric", "Task", "make_task", "task_class"]
