"""Run the benchmarks, print the ratios beside their targets, and keep the numbers.

``python benchmarks/report.py`` measures everything (options go to pytest: ``--seconds 2``,
``-k n1280``) and writes ``benchmarks/results/<machine>-<date>.json`` and ``.md``. Its exit status
is not zero if a provider disagrees with its oracle, which leaves it without time or ratio.
``python benchmarks/report.py --write-docs`` measures nothing and brings ``docs/performance.md`` up
to date with the newest results in that folder, or with the files that are named.
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from providers import IN_GRAPH

from spectral_kernels import backend_report

HERE = Path(__file__).parent
PACKAGES = (
    "torch", "spectral-kernels", "peft", "diffusers", "transformers", "triton", "numpy", "torchao",
    "bitsandbytes",
)  # fmt: skip
PERCENTILES = ("min", "20", "50", "80")

OURS = ("ours factored", "ours merged", "ours tokens")
PLAIN = ("plain tokens", "plain factored", "plain merged")
GEMMS = ("GEMMs factored", "GEMMs merged")

Entry = dict[str, Any]


def _anything(case: dict[str, Any]) -> None:
    return None


Target = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Ratio:
    """A column: the least of ``over`` by the least of ``under``, by medians, with targets.

    Attributes:
        title: the head of the column.
        over, under: names of providers; with nothing under, the value of ``over`` itself.
        target: the bound for a case on two CPU cores, or None where there is none.
        at_least: whether the bound is a lower one.
        gpu: the bound for a case on an H100-class GPU.
        of: "50" for the median milliseconds of a step, "peak_mib" for its memory.
        beside: name of a fact of the case to add to what is under.
        devices: where there is such a ratio.
    """

    title: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    target: Target = _anything
    at_least: bool = True
    gpu: Target = _anything
    of: str = "50"
    beside: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def bound(self, entry: Entry) -> float | None:
        """The target for a measured case."""
        case = entry["case"]
        return (self.target if case["device"] == "cpu" else self.gpu)(case)

    def is_met(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound


def always(bound: float) -> Target:
    """The same target for every case."""
    return lambda case: bound


def _in_bf16(target: Target) -> Target:
    return lambda case: target(case) if case["dtype"] == "bfloat16" else None


_NAIVE = {77: 16.0, 256: 7.0, 1024: 2.5, 4096: 1.4}


def _naive_on_gpu(case: dict[str, Any]) -> float | None:
    if case["n"] != 1280:
        return None
    return 8.0 if case["tokens"] <= 1024 else 3.0


def _plain_on_gpu(case: dict[str, Any]) -> float | None:
    if case["n"] >= 2048:
        return 1.2
    return 1.5 if case["n"] == 1280 else None


def _gemms_on_gpu(case: dict[str, Any]) -> float | None:
    if case["n"] >= 2048:
        return 1.10
    return 1.2 if case["n"] == 1280 and case["tokens"] == 4096 else None


_LORA, _OFT = ("PEFT LoRA r=8",), ("PEFT OFT b=32",)


def in_graphs(ratio: Ratio) -> Ratio:
    """The same ratio of the same steps as CUDA graphs."""
    over, under = (tuple(name + IN_GRAPH for name in names) for names in (ratio.over, ratio.under))
    title = f"{ratio.title}, CUDA graphs"
    return replace(ratio, title=title, over=over, under=under, devices=("cuda",))


RATIOS: dict[str, list[Ratio]] = {
    "soda_linear": [
        Ratio(
            "naive / ours",
            ("naive",),
            OURS,
            lambda case: _NAIVE.get(case["tokens"]) if case["n"] == 1280 else None,
            gpu=_in_bf16(_naive_on_gpu),
        ),
        Ratio("plain / ours", PLAIN, OURS, always(1.1), gpu=_in_bf16(_plain_on_gpu)),
        Ratio(
            "compiled / ours",
            ("plain compiled",),
            OURS,
            always(1.1),
            gpu=_in_bf16(_plain_on_gpu),
        ),
        Ratio(
            "ours / LoRA",
            OURS,
            _LORA,
            lambda case: 2.1 if case["tokens"] < 2 * case["n"] else 1.6,
            at_least=False,
        ),
        Ratio("ours / OFT", OURS, _OFT),
        Ratio(
            "ours / GEMMs",
            OURS,
            GEMMS,
            lambda case: 1.15 if case["tokens"] >= 256 and case["n"] >= 640 else None,
            at_least=False,
            gpu=_in_bf16(_gemms_on_gpu),
        ),
        Ratio(
            "auto / best plan",
            ("ours auto",),
            OURS,
            always(1.05),
            at_least=False,
            gpu=always(1.05),
        ),
        # What is left to gain over plain PyTorch if nothing but the products took time.
        Ratio("plain / GEMMs", PLAIN, GEMMS),
    ],
    "low_rank": [
        *(
            Ratio(
                f"{name} / LoRA",
                (name,),
                _LORA,
                always(1.05),
                at_least=False,
                gpu=_in_bf16(always(1.0)),
            )
            for name in ("A", "R", "PEFT A", "PEFT R")
        ),
        Ratio("LoRA / frozen", _LORA, ("frozen linear",)),
    ],
    "unet_step": [
        Ratio("SODA / LoRA", ("SODA",), _LORA, always(1.5), at_least=False, gpu=always(1.0)),
        Ratio("SODA / OFT", ("SODA",), _OFT, always(1.1), at_least=False, gpu=always(0.7)),
        Ratio("SVDiff / LoRA", ("SVDiff",), _LORA),
        *(
            Ratio(
                f"{name} / LoRA",
                (f"{name} r=8",),
                _LORA,
                always(1.05),
                at_least=False,
                gpu=always(1.0),
            )
            for name in ("A", "R")
        ),
        Ratio("naive / SODA", ("naive SODA",), ("SODA",)),
        Ratio(
            "SODA / LoRA, checkpointing",
            ("SODA, checkpointing",),
            ("PEFT LoRA r=8, checkpointing",),
        ),
        Ratio("LoRA / frozen", _LORA, ("frozen",)),
        Ratio("SODA / frozen", ("SODA",), ("frozen",)),
        Ratio("memory: naive / SODA", ("naive SODA",), ("SODA",), always(1.5), of="peak_mib"),
        *(
            Ratio(
                f"memory: {name} / LoRA",
                (f"{name} r=8",),
                _LORA,
                at_least=False,
                gpu=always(1.05),
                of="peak_mib",
            )
            for name in ("A", "R")
        ),
        Ratio(
            "memory: SODA / (LoRA + adapted weights)",
            ("SODA",),
            _LORA,
            at_least=False,
            gpu=always(1.0),
            of="peak_mib",
            beside="adapted_mib",
        ),
        Ratio("memory: SODA / frozen", ("SODA",), ("frozen",), of="peak_mib"),
    ],
    "cayley": [
        Ratio(
            "loop / ours",
            ("solve loop",),
            ("ours",),
            lambda case: 12.0 if case["n"] == 16 else None,
        ),
        Ratio("batched / ours", ("solve batched",), ("ours",), always(3.0)),
        Ratio("inverse / ours", ("inverse batched",), ("ours",)),
        Ratio("compiled / ours", ("inverse batched, compiled",), ("ours",)),
        Ratio("ours / GEMMs", ("ours",), ("GEMMs",)),
    ],
    "stiefel": [
        Ratio("loop / ours", ("loop",), ("ours",), always(20.0)),
        Ratio("batched / ours", ("batched plain",), ("ours",)),
        Ratio("ours / copies", ("ours",), ("copies",)),
        Ratio("ours, ms", ("ours",), (), at_least=False, gpu=always(0.3)),
    ],
    "cayley_model": [
        Ratio(
            "loop / ours",
            ("solve loop",),
            ("ours, own parameters",),
            always(10.0),
        ),
        Ratio("inv_ex / ours", ("inv_ex",), ("ours",), always(3.0), gpu=always(5.0)),
        Ratio(
            "inv_ex / ours, own parameters",
            ("inv_ex, own parameters",),
            ("ours, own parameters",),
            always(3.0),
            gpu=always(5.0),
        ),
        Ratio("compiled / ours", ("inv_ex, compiled",), ("ours",)),
        Ratio("ours / GEMMs", ("ours",), ("GEMMs",)),
        Ratio(
            "ours in a CUDA graph, ms",
            ("ours, CUDA graph",),
            (),
            at_least=False,
            gpu=always(0.1),
            devices=("cuda",),
        ),
    ],
}


#: Ratios that a GPU has once more of CUDA graphs, where no call from Python is waited for.
_TWICE = {
    "soda_linear": ("plain / ours", "ours / LoRA", "ours / OFT", "ours / GEMMs", "plain / GEMMs"),
    "low_rank": ("A / LoRA", "R / LoRA", "PEFT A / LoRA", "PEFT R / LoRA", "LoRA / frozen"),
    "stiefel": ("ours / copies", "ours, ms"),
    "unet_step": (
        *("SODA / LoRA", "SODA / OFT", "SVDiff / LoRA", "A / LoRA", "R / LoRA"),
        *("LoRA / frozen", "SODA / frozen"),
    ),
}
for _entry, _titles in _TWICE.items():
    RATIOS[_entry] += [in_graphs(ratio) for ratio in RATIOS[_entry] if ratio.title in _titles]


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
            "held_mib": result.held_bytes / 2**20,
            "error": result.error,
        }
    return {
        "entry": entry,
        "name": str(case),
        "note": case.note(),
        "case": asdict(case),
        "facts": case.facts() if hasattr(case, "facts") else {},
        "providers": providers,
    }


def tables(entries: Sequence[Entry]) -> str:
    """Ratios and times of all entries as Markdown."""
    parts = []
    for entry in RATIOS:
        rows = [row for row in entries if row["entry"] == entry]
        if not rows:
            continue
        parts.append(f"\n### {entry}: ratios of medians\n\n{ratio_table(rows)}")
        names = list(rows[0]["providers"])
        for title, cell in (
            ("milliseconds, median (20th to 80th percentile)", _times),
            ("peak memory of a step, MiB", _peak),
            ("held between steps beside the base model, MiB", _held),
        ):
            body = [
                [row["name"], *(cell(row["providers"][name]) for name in names)] for row in rows
            ]
            if any(text for row in body for text in row[1:]):
                table = markdown(["case", *names], body)
                parts.append(f"\n### {entry}: {title}\n\n{table}")
    verdicts = verdicts_of(entries)
    if verdicts:
        parts.append(f"\n### Targets\n\n{targets(verdicts)}")
    return "\n".join(parts)


def ratio_table(rows: Sequence[Entry]) -> str:
    """The ratios of measured cases of one entry as Markdown."""
    devices = {row["case"]["device"] for row in rows}
    ratios = [r for r in RATIOS[rows[0]["entry"]] if devices & set(r.devices)]
    head = ["case", "ours runs", *(ratio.title for ratio in ratios)]
    return markdown(
        head, [[row["name"], row["note"], *(_cell(row, r) for r in ratios)] for row in rows]
    )


def ratio_of(entry: Entry, ratio: Ratio) -> float | None:
    """The ratio, or None if a provider it needs was not measured."""
    least = []
    for names in (ratio.over, ratio.under):
        values = [_value(entry["providers"].get(name, {}), ratio.of) for name in names]
        if None in values:
            return None
        least.append(min((value for value in values if value is not None), default=0.0))
    over, under = least
    if ratio.beside is not None:
        under += entry["facts"][ratio.beside]
    return over / under if ratio.under else over


def _value(provider: dict[str, Any], of: str) -> float | None:
    if "milliseconds" not in provider:
        return None
    return provider["milliseconds"][of] if of in PERCENTILES else provider[of]


def _cell(entry: Entry, ratio: Ratio) -> str:
    if entry["case"]["device"] not in ratio.devices:
        return ""
    value = ratio_of(entry, ratio)
    if value is None:
        return "refused"
    bound = ratio.bound(entry)
    if bound is None:
        return f"{value:.2f}"
    sign = "≥" if ratio.at_least else "≤"
    return (
        f"{value:.2f} ({sign} {bound:g}: {'met' if ratio.is_met(value, bound) else '**missed**'})"
    )


@dataclass(frozen=True)
class Verdict:
    """A target on one measured case; no value where a provider it needs was not measured."""

    entry: Entry
    ratio: Ratio
    bound: float
    value: float | None

    @property
    def is_met(self) -> bool:
        return self.value is not None and self.ratio.is_met(self.value, self.bound)

    def __str__(self) -> str:
        sign = "≥" if self.ratio.at_least else "≤"
        value = "refused" if self.value is None else f"{self.value:.2f}"
        where = f"{self.entry['entry']} {self.entry['name']}"
        return f"{where}: {self.ratio.title} {value} ({sign} {self.bound:g})"


def verdicts_of(entries: Sequence[Entry]) -> list[Verdict]:
    """Every target that applies to the measured cases."""
    verdicts = []
    for entry in entries:
        for ratio in RATIOS.get(entry["entry"], []):
            bound = ratio.bound(entry)
            if bound is not None and entry["case"]["device"] in ratio.devices:
                verdicts.append(Verdict(entry, ratio, bound, ratio_of(entry, ratio)))
    return verdicts


def targets(verdicts: Sequence[Verdict]) -> str:
    """How many are met, and those that are not, worst first."""
    missed = [v for v in verdicts if not v.is_met]
    missed.sort(key=lambda v: 0.0 if v.value is None else margin(v))
    lines = [f"{len(verdicts) - len(missed)} met, {len(missed)} missed"]
    return "\n".join([*lines, *(f"- {verdict}" for verdict in missed)])


def margin(verdict: Verdict) -> float:
    """Below 1 for a missed target, the less the worse."""
    assert verdict.value is not None
    share = verdict.value / verdict.bound
    return share if verdict.ratio.at_least else 1 / share


def _times(provider: dict[str, Any]) -> str:
    if "problem" in provider:
        return provider["problem"]
    low, middle, high = (provider["milliseconds"][key] for key in PERCENTILES[1:])
    return f"{middle:.4g} ({low:.4g}–{high:.4g})"


def _peak(provider: dict[str, Any]) -> str:
    # The replay of a graph takes no memory that the recording did not.
    return f"{provider['peak_mib']:.1f}" if provider.get("peak_mib") else ""


def _held(provider: dict[str, Any]) -> str:
    held = provider.get("held_mib", 0)
    return f"{held:.1f}" if held else ""


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(entries: Sequence[Entry], folder: Path) -> Path:
    """Keep the numbers as JSON and the tables as Markdown; returns the JSON's path."""
    date = now()
    document = {"date": date, **conditions(), "entries": list(entries)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_slug(document['machine'])}-{date[:10]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    facts = [document["machine"], document["versions"], document["backends"]]
    lines = [", ".join(f"{key}: {value}" for key, value in part.items()) for part in facts]
    title = f"# Benchmarks of {date[:10]}, commit {document['commit']}"
    path.with_suffix(".md").write_text("\n\n".join([title, *lines]) + "\n" + tables(entries) + "\n")
    return path


def now() -> str:
    """The time in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def conditions() -> dict[str, Any]:
    """What the numbers depend on beside the code of the benchmark."""
    return {
        "machine": machine(),
        "versions": _versions(),
        "commit": _commit(),
        "backends": {op: row.implementation for op, row in backend_report().items()},
    }


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
    return slug(text)


def slug(text: str) -> str:
    """Text as part of a file's name."""
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
    """Run pytest on this folder, or write the documentation; the exit status."""
    if "--write-docs" in arguments:
        from performance import write_docs

        paths = [Path(argument) for argument in arguments if argument != "--write-docs"]
        write_docs(*paths)
        return 0
    import pytest

    options = ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=name", "-q"]
    return pytest.main([str(HERE), *options, "--results", str(HERE / "results"), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
