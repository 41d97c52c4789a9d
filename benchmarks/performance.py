"""The measured part of ``docs/performance.md``, written from the newest results.

``python benchmarks/report.py --write-docs`` calls this. What stands between the two markers in the
page is replaced; everything else there is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import (
    RATIOS,
    Entry,
    Verdict,
    in_graphs,
    margin,
    markdown,
    ratio_of,
    ratio_table,
    verdicts_of,
)

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
START = "<!-- measured: python benchmarks/report.py --write-docs -->"
END = "<!-- end of what is measured -->"
NOT_MEASURED = "not measured yet"

#: Which file of the benchmarks measures an entry on the CPU.
COMMANDS = {
    "soda_linear": "python benchmarks/report.py -k test_soda_linear",
    "low_rank": "python benchmarks/report.py -k test_low_rank",
    "unet_step": "python benchmarks/report.py -k test_unet",
    "cayley_model": "python benchmarks/report.py -k test_cayley_model",
    "stiefel": "python benchmarks/report.py -k test_stiefel",
}
GPU_COMMAND = "bash benchmarks/gpu_run.sh"


@dataclass(frozen=True)
class Line:
    """One line of the table of targets.

    Attributes:
        what: in words.
        cpu, gpu: its targets in words.
        entry: the benchmark.
        ratios: titles of its ratios.
        floor: title of the ratio that compares with the physical floor, and what the floor is.
    """

    what: str
    cpu: str
    gpu: str
    entry: str
    ratios: tuple[str, ...]
    floor: tuple[str, str]


_GEMMS = ("ours / GEMMs", "times the bare GEMMs")
_FROZEN = ("SODA / frozen", "times the frozen model")

LINES = (
    Line(
        "naive / ours, one layer",
        "≥ 16, 7, 2.5, 1.4 at n=1280, M=77, 256, 1024, 4096",
        "≥ 8 at n=1280, M ≤ 1024; ≥ 3 at 4096",
        "soda_linear",
        ("naive / ours",),
        _GEMMS,
    ),
    Line(
        "best plain PyTorch / ours",
        "≥ 1.1",
        "≥ 1.5 at n=1280, ≥ 1.2 at n ≥ 2048",
        "soda_linear",
        ("plain / ours",),
        ("plain / GEMMs", "most that is possible: plain by the bare GEMMs"),
    ),
    Line(
        "the same compiled / ours",
        "≥ 1.1",
        "≥ 1.5 at n=1280, ≥ 1.2 at n ≥ 2048",
        "soda_linear",
        ("compiled / ours",),
        _GEMMS,
    ),
    Line(
        "ours / bare GEMMs of the plan",
        "≤ 1.15 for M ≥ 256, n ≥ 640",
        "≤ 1.10 at n ≥ 2048, ≤ 1.2 at n=1280, M=4096",
        "soda_linear",
        ("ours / GEMMs",),
        _GEMMS,
    ),
    Line(
        "plan auto / best fixed plan",
        "≤ 1.05",
        "≤ 1.05",
        "soda_linear",
        ("auto / best plan",),
        _GEMMS,
    ),
    Line(
        "A and R / PEFT LoRA r=8, one layer",
        "≤ 1.05",
        "≤ 1.0",
        "low_rank",
        ("A / LoRA", "R / LoRA", "PEFT A / LoRA", "PEFT R / LoRA"),
        ("LoRA / frozen", "LoRA itself, times the frozen layer"),
    ),
    Line(
        "A and R / PEFT LoRA r=8, UNet step",
        "≤ 1.05",
        "≤ 1.0",
        "unet_step",
        ("A / LoRA", "R / LoRA"),
        ("LoRA / frozen", "LoRA itself, times the frozen model"),
    ),
    Line(
        "SODA / PEFT LoRA r=8, UNet step",
        "≤ 1.5",
        "≤ 1.0",
        "unet_step",
        ("SODA / LoRA",),
        _FROZEN,
    ),
    Line("SODA / PEFT OFT, UNet step", "≤ 1.1", "≤ 0.7", "unet_step", ("SODA / OFT",), _FROZEN),
    Line(
        "Cayley of a whole SDXL adapter: loop of solves / ours",
        "≥ 10",
        "",
        "cayley_model",
        ("loop / ours",),
        ("ours / GEMMs", "times batched products of the same operations"),
    ),
    Line(
        "the same: model-batched inv_ex / ours",
        "≥ 3",
        "≥ 5",
        "cayley_model",
        ("inv_ex / ours", "inv_ex / ours, own parameters"),
        ("ours / GEMMs", "times batched products of the same operations"),
    ),
    Line(
        "the same: ours in milliseconds",
        "",
        "< 0.1",
        "cayley_model",
        ("ours in a CUDA graph, ms",),
        ("ours / GEMMs", "times batched products of the same operations"),
    ),
    Line(
        "StiefelAdam step of the same factors: loop / ours",
        "≥ 20",
        "",
        "stiefel",
        ("loop / ours",),
        ("ours / copies", "times reading and writing everything once"),
    ),
    Line(
        "the same: ours in milliseconds",
        "",
        "< 0.3",
        "stiefel",
        ("ours, ms",),
        ("ours / copies", "times reading and writing everything once"),
    ),
    Line(
        "memory of the UNet step: naive / SODA",
        "≥ 1.5",
        "",
        "unet_step",
        ("memory: naive / SODA",),
        ("memory: SODA / frozen", "times the frozen model's"),
    ),
    Line(
        "the same: A and R / LoRA",
        "",
        "≤ 1.05",
        "unet_step",
        ("memory: A / LoRA", "memory: R / LoRA"),
        ("memory: SODA / frozen", "SODA, times the frozen model's"),
    ),
    Line(
        "the same: SODA / (LoRA + one copy of the adapted weights)",
        "",
        "≤ 1",
        "unet_step",
        ("memory: SODA / (LoRA + adapted weights)",),
        ("memory: SODA / frozen", "times the frozen model's"),
    ),
)


def write_docs(*sources: Path, page: Path = PAGE) -> None:
    """Replace the measured part of the page.

    Args:
        sources: results to use, of ``report.py`` and ``gpu_bench.py``; by default the newest of
            each in ``benchmarks/results``.
        page: has both markers.

    Raises:
        ValueError: the page lacks a marker, or there are no results.
    """
    documents = [json.loads(path.read_text()) for path in sources] or newest(HERE / "results")
    if not documents:
        raise ValueError("no results to write about; run benchmarks/report.py first")
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have the lines {START!r} and {END!r} once each")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n\n{render(documents)}\n\n{END}{after}", encoding="utf-8")


def newest(folder: Path) -> list[dict[str, Any]]:
    """The newest results of each entry on each kind of device, by the file they are in."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    documents = [document for document in documents if document.get("entries")]
    taken: set[tuple[str, str]] = set()
    found = []
    for document in sorted(documents, key=lambda document: document["date"], reverse=True):
        entries = [entry for entry in document["entries"] if _kind(entry) not in taken]
        taken.update(map(_kind, entries))
        if entries:
            found.append({**document, "entries": entries})
    return found


def _kind(entry: Entry) -> tuple[str, str]:
    return entry["entry"], entry["case"]["device"]


def render(documents: Sequence[dict[str, Any]]) -> str:
    """Conditions, the table of targets, what is missed, and all ratios."""
    entries = [entry for document in documents for entry in document["entries"]]
    parts = [_conditions(document) for document in documents]
    head = ["what", "target, CPU", "CPU", "target, GPU", "GPU", "the floor beside it", "command"]
    parts.append(markdown(head, [_row(line, entries) for line in LINES]))
    parts.append(_missing(entries))
    for entry in RATIOS:
        for device in ("cpu", "cuda"):
            rows = [e for e in entries if _kind(e) == (entry, device)]
            if rows:
                parts.append(f"### {entry}, {device}: ratios of medians\n\n{ratio_table(rows)}")
    return "\n\n".join(part for part in parts if part)


def _conditions(document: dict[str, Any]) -> str:
    facts = document["machine"]
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    versions = ", ".join(
        f"{name} {document['versions'][name]}"
        for name in ("torch", "peft", "diffusers")
        if name in document["versions"]
    )
    names = ", ".join(dict.fromkeys(entry["entry"] for entry in document["entries"]))
    return f"{names}: {document['date'][:10]}, {device}; {versions}; commit {document['commit']}."


def _row(line: Line, entries: Sequence[Entry]) -> list[str]:
    ratios = {ratio.title: ratio for ratio in RATIOS.get(line.entry, [])}
    chosen = [ratios[title] for title in line.ratios]
    graphs = {in_graphs(ratio).title for ratio in chosen}
    cells: dict[str, str] = {}
    floors = []
    for device in ("cpu", "cuda"):
        measured = [e for e in entries if _kind(e) == (line.entry, device)]
        verdicts = [v for v in verdicts_of(measured) if v.ratio in chosen]
        target = line.cpu if device == "cpu" else line.gpu
        cells[device] = _found(verdicts) if target else ""
        recorded = [v for v in verdicts_of(measured) if v.ratio.title in graphs]
        if recorded:
            cells[device] += f"<br>CUDA graphs: {_found(recorded)}"
        cases = {v.entry["name"] for v in verdicts}
        floor = ratios[line.floor[0]]
        values = [ratio_of(entry, floor) for entry in measured if entry["name"] in cases]
        known = [value for value in values if value is not None]
        if known:
            floors.append(f"{device}: {_span(known)}")
    floor_text = "; ".join([*floors, line.floor[1]] if floors else [])
    commands = [COMMANDS[line.entry]] * bool(line.cpu) + [GPU_COMMAND] * bool(line.gpu)
    command = ", ".join(f"`{command}`" for command in commands)
    return [line.what, line.cpu, cells["cpu"], line.gpu, cells["cuda"], floor_text, command]


def _found(verdicts: Sequence[Verdict]) -> str:
    values = [verdict.value for verdict in verdicts if verdict.value is not None]
    if not values:
        return NOT_MEASURED
    met = sum(verdict.is_met for verdict in verdicts)
    state = "met" if met == len(verdicts) else f"**{met} of {len(verdicts)} met**"
    shown = ", ".join(f"{v:.2f}" for v in values) if len(values) <= 4 else _span(values)
    return f"{shown}; {state}"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _missing(entries: Sequence[Entry]) -> str:
    """The missed targets, by how much, and the floor of the same case."""
    verdicts = verdicts_of(entries)
    if not verdicts:
        return ""
    missed = [verdict for verdict in verdicts if not verdict.is_met]
    text = f"### Targets: {len(verdicts) - len(missed)} met, {len(missed)} missed"
    floors = {(line.entry, title): line.floor for line in LINES for title in line.ratios}
    rows = []
    for verdict in sorted(missed, key=_margin):
        floor = ""
        key = (verdict.entry["entry"], verdict.ratio.title)
        if key in floors:
            title, meaning = floors[key]
            ratio = next(ratio for ratio in RATIOS[key[0]] if ratio.title == title)
            value = ratio_of(verdict.entry, ratio)
            floor = "" if value is None else f"{value:.2f} {meaning}"
        rows.append([str(verdict), f"{1 - _margin(verdict):.0%}", floor])
    return "\n\n".join(
        [text, markdown(["missed", "missing", "the floor beside it"], rows)] if rows else [text]
    )


def _margin(verdict: Verdict) -> float:
    """What is left of time (or memory) in a step that just meets the target; below 1 if missed."""
    return 0.0 if verdict.value is None else margin(verdict)
