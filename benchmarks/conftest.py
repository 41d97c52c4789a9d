"""Options, the one measurement per case that its tests share, and the report at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from measure import Case, Result, measure
from report import describe, tables, write

ENTRIES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spectral benchmarks")
    group.addoption("--seconds", type=float, default=6.0, help="time per case, all providers")
    group.addoption("--results", type=Path, help="folder to write the JSON and the tables to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENTRIES] = []


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[..., dict[str, Result]]:
    """``measured(entry, case, providers)``: results of all providers, measured once per case."""
    done: dict[tuple[str, Case], dict[str, Result]] = {}

    def get(entry: str, case: Case, providers: Mapping[str, Any]) -> dict[str, Result]:
        if (entry, case) not in done:
            results = measure(case, providers, request.config.getoption("--seconds"))
            done[entry, case] = results
            request.config.stash[ENTRIES].append(describe(entry, case, results))
        return done[entry, case]

    return get


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    entries = config.stash[ENTRIES]
    if not entries:
        return
    terminalreporter.write_line(tables(entries))
    folder = config.getoption("--results")
    if folder is not None:
        terminalreporter.write_line(f"written to {write(entries, folder)}")
