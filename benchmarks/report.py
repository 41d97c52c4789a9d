"""Run the benchmarks, print the ratios beside their targets, and keep the numbers.

``python benchmarks/report.py`` measures everything (options go to pytest: ``--seconds 2``,
``-k n1280``) and writes ``benchmarks/results/<machine>-<date>.json`` and ``.md``. Its exit status
is not zero if a provider disagrees with its float64 oracle, which leaves it without time or ratio.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spectral_kernels import backend_report

HERE = Path(__file__).parent
PACKAGES = ("torch", "spectral-kernels", "peft", "triton", "numpy")
PERCENTILES = ("min", "20", "50", "80")

OURS = ("ours factored", "ours merged", "ours tokens")
PLAIN = ("plain tokens", "plain factored", "plain merged")
GEMMS = ("GEMMs factored", "GEMMs merged")

Entry = dict[str, Any]


def _anything(case: dict[str, Any]) -> None:
    return None


@dataclass(frozen=True)
class Ratio:
    """A column: the fastest of ``over`` by the fastest of ``under``, by medians, with a target.

    ``target`` gives the bound for a case on two CPU cores, or None where there is none.
    """

    title: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    target: Callable[[dict[str, Any]], float | None] = _anything
    at_least: bool = True


_NAIVE = {77: 14.0, 256: 6.0, 1024: 2.3, 4096: 1.3}

RATIOS: dict[str, list[Ratio]] = {
    "soda_linear": [
        Ratio(
            "naive / ours",
            ("naive",),
            OURS,
            lambda case: _NAIVE[case["tokens"]] if case["n"] == 1280 else None,
        ),
        Ratio("plain / ours", PLAIN, OURS, lambda case: 1.0),
        Ratio("compiled / ours", ("plain compiled",), OURS),
        Ratio(
            "ours / LoRA",
            OURS,
            ("PEFT LoRA r=8",),
            lambda case: 2.1 if case["tokens"] < 2 * case["n"] else 1.6,
            at_least=False,
        ),
        Ratio("ours / OFT", OURS, ("PEFT OFT b=32",)),
        Ratio("ours / GEMMs", OURS, GEMMS),
        Ratio("auto / best plan", ("ours auto",), OURS),
    ],
    "low_rank": [
        Ratio(f"{name} / LoRA", (name,), ("PEFT LoRA r=8",), lambda case: 1.05, at_least=False)
        for name in ("A", "R", "PEFT A", "PEFT R")
    ],
    "cayley": [
        Ratio(
            "loop / ours",
            ("solve loop",),
            ("ours",),
            lambda case: 12.0 if case["n"] == 16 else None,
        ),
        Ratio("batched / ours", ("solve batched",), ("ours",), lambda case: 3.0),
        Ratio("inverse / ours", ("inverse batched",), ("ours",)),
        Ratio("compiled / ours", ("inverse batched, compiled",), ("ours",)),
        Ratio("ours / GEMMs", ("ours",), ("GEMMs",)),
    ],
    "stiefel": [
        Ratio("loop / ours", ("loop",), ("ours",), lambda case: 20.0),
        Ratio("batched / ours", ("batched plain",), ("ours",)),
        Ratio("ours / copies", ("ours",), ("copies",)),
    ],
}


def describe(entry: str, case: Any, results: dict[str, Any]) -> Entry:
    """A measured case as plain data."""
    providers: dict[str, Any] = {}
    for name, result in results.items():
        if not result.seconds:
            providers[name] = {"problem": result.problem}
            continue
        milliseconds = {k: 1e3 * v for k, v in result.percentiles().items()}
        providers[name] = {
            "milliseconds": milliseconds,
            "rounds": len(result.seconds),
            "peak_mib": result.peak_bytes / 2**20,
            "error": result.error,
        }
    return {
        "entry": entry,
        "name": str(case),
        "note": case.note(),
        "case": asdict(case),
        "providers": providers,
    }


def tables(entries: Sequence[Entry]) -> str:
    """Ratios and times of all entries as Markdown."""
    parts = []
    for entry, ratios in RATIOS.items():
        rows = [row for row in entries if row["entry"] == entry]
        if not rows:
            continue
        head = ["case", "ours runs", *(ratio.title for ratio in ratios)]
        body = [[row["name"], row["note"], *(_cell(row, r) for r in ratios)] for row in rows]
        parts.append(f"\n### {entry}: ratios of medians\n\n{_markdown(head, body)}")
        names = list(rows[0]["providers"])
        body = [[row["name"], *(_times(row["providers"][name]) for name in names)] for row in rows]
        parts.append(
            f"\n### {entry}: milliseconds, median (20th to 80th percentile)\n\n"
            + _markdown(["case", *names], body)
        )
        body = [[row["name"], *(_peak(row["providers"][name]) for name in names)] for row in rows]
        parts.append(
            f"\n### {entry}: peak memory of a step, MiB\n\n" + _markdown(["case", *names], body)
        )
    return "\n".join(parts)


def ratio_of(entry: Entry, ratio: Ratio) -> float | None:
    """The ratio, or None if a provider it needs has no time."""
    fastest = []
    for names in (ratio.over, ratio.under):
        times = [entry["providers"][name].get("milliseconds") for name in names]
        if None in times:
            return None
        fastest.append(min(time["50"] for time in times))
    return fastest[0] / fastest[1]


def _cell(entry: Entry, ratio: Ratio) -> str:
    value = ratio_of(entry, ratio)
    if value is None:
        return "refused"
    target = ratio.target(entry["case"]) if entry["case"]["device"] == "cpu" else None
    if target is None:
        return f"{value:.2f}"
    met = value >= target if ratio.at_least else value <= target
    sign = "≥" if ratio.at_least else "≤"
    return f"{value:.2f} ({sign} {target:g}: {'met' if met else '**missed**'})"


def _times(provider: dict[str, Any]) -> str:
    if "problem" in provider:
        return provider["problem"]
    low, middle, high = (provider["milliseconds"][key] for key in PERCENTILES[1:])
    return f"{middle:.4g} ({low:.4g}–{high:.4g})"


def _peak(provider: dict[str, Any]) -> str:
    return "" if "problem" in provider else f"{provider['peak_mib']:.1f}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(entries: Sequence[Entry], folder: Path) -> Path:
    """Keep the numbers as JSON and the tables as Markdown; returns the JSON's path."""
    now = datetime.datetime.now(datetime.UTC)
    document = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": _versions(),
        "commit": _commit(),
        "backends": {op: row.implementation for op, row in backend_report().items()},
        "entries": list(entries),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_slug(document['machine'])}-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    facts = [document["machine"], document["versions"], document["backends"]]
    lines = [", ".join(f"{key}: {value}" for key, value in part.items()) for part in facts]
    title = f"# Benchmarks of {now:%Y-%m-%d}, commit {document['commit']}"
    path.with_suffix(".md").write_text("\n\n".join([title, *lines]) + "\n" + tables(entries) + "\n")
    return path


def machine() -> dict[str, Any]:
    """What the timings were taken on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _slug(facts: dict[str, Any]) -> str:
    text = f"{facts.get('gpu', facts['cpu'])} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _commit() -> str:
    """The commit of the checkout, marked if files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + (" with changes" if changed else "")


def main(arguments: Sequence[str]) -> int:
    """Run pytest on this folder; its exit status."""
    import pytest

    options = ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=name", "-q"]
    return pytest.main([str(HERE), *options, "--results", str(HERE / "results"), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
