"""Tables and plots from the records of a comparison."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spectral_adapters._files import write_text
from spectral_adapters.compare.costs import newest_costs
from spectral_adapters.compare.methods import BASE, FULL, LABELS, METHODS
from spectral_adapters.compare.plan import Plan, PlannedTask
from spectral_adapters.compare.records import (
    RECORDS,
    Record,
    chosen_rate,
    latest,
    read_records,
    sweep_seeds,
)
from spectral_adapters.compare.tasks import Metric, task_class

#: The generated part of a report lies between these; what is around them stays.
BEGIN, END = "<!-- generated from the records -->", "<!-- end of the generated part -->"
REFERENCE = "lora"


@dataclass
class Result:
    """The runs of one cell that count.

    Attributes:
        method, budget: the cell.
        trained: numbers that were trained; None where the method has no such size.
        layers: how many layers have some; None where all of the model is trained.
        rate: the learning rate that was chosen; None if the search is not on record.
        at_end: that rate is the first or last one that the plan knows.
        values: by metric, a value per seed.
        curves: scores on the development split on the way, a dict per seed.
    """

    method: str
    budget: int
    trained: int | None
    layers: int | None = None
    rate: float | None = None
    at_end: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)
    curves: list[dict[int, dict[str, float]]] = field(default_factory=list)

    def mean(self, key: str) -> float:
        """Of a metric over the seeds; NaN without any."""
        return mean(self.values[key]) if self.values.get(key) else math.nan

    def spread(self, key: str) -> float | None:
        """Standard deviation of a metric over the seeds; None of fewer than two."""
        values = self.values.get(key, [])
        return stdev(values) if len(values) > 1 else None


def results_of(plan: Plan, task: PlannedTask, records: Iterable[Record]) -> list[Result]:
    """The results of a task in the plan's order; cells without any finished seed are left out."""
    here = [r for r in records if r["task"] == task.name and r["digest"] == task.digest]
    found = []
    for method, budgets in task.methods.items():
        for budget in budgets:
            cell = [r for r in here if (r["method"], r["budget"]) == (method, budget)]
            finals = [r for r in cell if r["kind"] == "final" and not r.get("diverged")]
            if method != BASE:
                rate = chosen_rate(task, cell)
                finals = [r for r in finals if r["seed"] in task.seeds and r["rate"] == rate]
            if any(r["kind"] == "sweep" and r.get("trained") is None for r in cell):
                found.append(Result(method, budget, None))
            elif finals:
                result = Result(
                    method,
                    budget,
                    finals[0]["trained"],
                    finals[0].get("layers"),
                    finals[0]["rate"],
                    finals[0]["rate"] in (plan.rates[0], plan.rates[-1]),
                )
                for record in finals:
                    for key, value in record["scores"].items():
                        result.values.setdefault(key, []).append(value)
                    curve = record.get("curve") or {}
                    result.curves.append({int(step): s for step, s in curve.items()})
                found.append(result)
    return found


def write_report(plan: Plan, output: Path, report: Path) -> None:
    """Write the generated part of a Markdown report, ``results.csv``, and plots beside the report.

    Args:
        plan: what was compared.
        output: the folder with the records; ``results.csv`` goes there.
        report: the Markdown file; made if it is not there. Plots go to ``images/`` beside it.
    """
    records = list(latest(read_records(output)).values())
    if not records:
        raise ValueError(f"output must hold records to report; {output / RECORDS} has none")
    images = report.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []
    rows: list[dict[str, Any]] = []
    for task in plan.tasks.values():
        results = results_of(plan, task, records)
        if not results:
            continue
        cls = task_class(task.kind)
        parts.append(f"## {cls.title}\n")
        parts.append(_task_tables(task, results, cls.metrics))
        rows += _rows(task, results, cls.metrics)
        parts += _plots(task, results, cls.metrics, images)
        parts += _tradeoff(task, results, records, images)
        merged = [r for r in records if r["task"] == task.name and r["kind"] == "merged"]
        if merged:
            parts.append(_merged_table(merged, cls.metrics))
        sheet = _sheet(task, results, output, images)
        if sheet:
            parts.append(sheet)
    notes = _notes({row["method"] for row in rows})
    if notes:
        parts.append(notes)
    costs = [r for r in newest_costs(plan, records) if r["trained"] is not None]
    if costs:
        parts.append(_cost_table(plan, costs))
    _write_csv(output / "results.csv", rows)
    text = report.read_text(encoding="utf-8") if report.is_file() else f"# {plan.title}\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(report, f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}")


def _label(result: Result) -> str:
    return LABELS[result.method]


def _figure(result: Result, metric: Metric) -> str:
    value, spread = result.mean(metric.key), result.spread(metric.key)
    if math.isnan(value):
        return ""
    text = f"{value * metric.scale:.{metric.digits}f}"
    if spread is not None:
        text += f" ± {spread * metric.scale:.{metric.digits}f}"
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _task_tables(task: PlannedTask, results: Sequence[Result], metrics: Sequence[Metric]) -> str:
    """One table per budget, the base model and full fine-tuning in each."""
    first = metrics[0]
    references = [r for r in results if r.method in (BASE, FULL)]
    text = ""
    for budget in sorted({r.budget for r in results if r.method not in (BASE, FULL)}):
        here = [r for r in results if r.budget == budget and r.method not in (BASE, FULL)]
        sign = -1 if first.higher_is_better else 1
        ranked = sorted(
            [r for r in here if r.trained is not None],
            key=lambda r: sign * r.mean(first.key),
        )
        lora = next((r for r in ranked if r.method == REFERENCE), None)
        rows = []
        for result in [*ranked, *references]:
            rate = "" if result.rate is None else f"{result.rate:g}{'*' if result.at_end else ''}"
            rows.append(
                [
                    _label(result),
                    "" if not result.trained else f"{result.trained:,}{_off(result)}",
                    rate,
                    *(_figure(result, metric) for metric in metrics),
                    _against(result, lora, first),
                    str(len(next(iter(result.values.values()), []))),
                ]
            )
        for result in here:
            if result.trained is None:
                rows.append([_label(result), "cannot", "", *[""] * len(metrics), "", ""])
        head = ["method", "trained", "rate", *(m.label for m in metrics), "against LoRA", "seeds"]
        text += f"**{budget:,} trained parameters**\n\n{_table(head, rows)}\n"
    return text


def _off(result: Result) -> str:
    """A mark where the budget was missed by more than 2 %."""
    if result.budget and result.trained is not None:
        return "" if abs(result.trained / result.budget - 1) <= 0.02 else " (!)"
    return ""


def _against(result: Result, lora: Result | None, metric: Metric) -> str:
    """Difference to LoRA with the standard error of a difference of means."""
    if lora is None or result is lora or result.method == BASE:
        return ""
    ours, theirs = result.values.get(metric.key, []), lora.values.get(metric.key, [])
    if not ours or not theirs:
        return ""
    text = f"{(mean(ours) - mean(theirs)) * metric.scale:+.{metric.digits}f}"
    if len(ours) > 1 and len(theirs) > 1:
        error = math.sqrt(stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs))
        text += f" ± {error * metric.scale:.{metric.digits}f}"
    return text


def _rows(
    task: PlannedTask, results: Sequence[Result], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    return [
        {
            "task": task.name,
            "method": result.method,
            "budget": result.budget,
            "trained": result.trained,
            "layers": result.layers,
            "rate": result.rate,
            "metric": metric.key,
            "mean": result.mean(metric.key),
            "sd": result.spread(metric.key),
            "seeds": len(result.values.get(metric.key, [])),
        }
        for result in results
        for metric in metrics
        if result.trained is not None
    ]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["task"])
        writer.writeheader()
        writer.writerows(rows)


def _merged_table(merged: Sequence[Record], metrics: Sequence[Metric]) -> str:
    """Subject and style in one model."""
    cells: dict[tuple[str, int], Result] = {}
    for record in merged:
        key = (record["method"], record["budget"])
        result = cells.setdefault(key, Result(*key, trained=record["budget"]))
        for name, value in record["scores"].items():
            result.values.setdefault(name, []).append(value)
    shown = [m for m in metrics if any(m.key in r.values for r in cells.values())]
    rows = [
        [_label(r), f"{r.budget:,}", *(_figure(r, m) for m in shown)]
        for r in sorted(cells.values(), key=lambda r: -r.mean(shown[0].key))
    ]
    head = ["method", "budget", *(m.label for m in shown)]
    return (
        "**Subject and style in one model**: the five tested faces asked for in OpenMoji's style, "
        "by `W0 + ΔW_subject + ΔW_style`, against OpenMoji's own drawings.\n\n" + _table(head, rows)
    )


def _notes(shown: Collection[str]) -> str:
    """What a reader must know of methods that are shown."""
    found = [f"* {m.label}: {m.note}." for name, m in METHODS.items() if name in shown and m.note]
    return "## Notes on methods\n\n" + "\n".join(found) + "\n" if found else ""


def _cost_table(plan: Plan, costs: Sequence[Record]) -> str:
    assert plan.cost is not None
    order = {name: index for index, name in enumerate(LABELS)}
    seconds = {r["method"]: r["seconds"] for r in costs}
    lora = seconds.get("lora", {}).get("step")
    rows = [
        [
            LABELS[r["method"]],
            f"{r['trained']:,}",
            "{step:.3f} ({least:.3f} to {most:.3f})".format(
                step=r["seconds"]["step"],
                least=min(r["seconds"]["steps"]),
                most=max(r["seconds"]["steps"]),
            ),
            "" if lora is None else f"{r['seconds']['step'] / lora:.2f}",
            f"{r['seconds']['setup']:.2f}",
            f"{r['memory'] / 1e6:.0f}",
            f"{r['bytes'] / 1e3:,.0f}",
        ]
        for r in sorted(costs, key=lambda r: order[r["method"]])
    ]
    head = ["method", "trained", "s per step", "of LoRA's", "set-up, s", "memory, MB", "file, kB"]
    title = task_class(plan.tasks[plan.cost["task"]].kind).title
    machine, versions = costs[0].get("machine", ""), costs[0].get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"## Cost\n\n{title}, {plan.cost['steps']} steps of each method in a process of its own, "
        f"one after the other, {plan.cost['rounds']} rounds in one run ({costs[0]['run'][:10]}; "
        f"{machine}; {named}). Step: median, and of the rounds the least and the most. Set-up: "
        "decompositions and injection, nothing cached. Memory: what the process grew by, from the "
        f"loaded base model to the peak. File: the adapter's tensors.\n\n{_table(head, rows)}"
    )


def _plots(
    task: PlannedTask, results: Sequence[Result], metrics: Sequence[Metric], images: Path
) -> list[str]:
    """Score by budget, where there are several; learning curves, where there are any."""
    parts = []
    first = metrics[0]
    budgets = sorted({r.budget for r in results if r.budget})
    if len(budgets) > 1:
        sized = [r.method for r in results if r.budget and r.trained]
        if len(sized) > len(set(sized)):  # some method has a line
            name = f"results_{task.name}_budgets.png"
            _budget_plot(task, results, first, images / name)
            parts.append(f"![{first.label} by budget](images/{name})\n")
        parts.append(_grid(results, first, budgets))
    if any(curve for result in results for curve in result.curves):
        name = f"results_{task.name}_curves.png"
        _curve_plot(results, first, budgets[0] if len(budgets) == 1 else None, images / name)
        parts.append(f"![learning curves](images/{name})\n")
    return parts


def _grid(results: Sequence[Result], metric: Metric, budgets: Sequence[int]) -> str:
    """Methods by budgets; a dash where a method cannot go, nothing where it was not run."""
    cells = {(r.method, r.budget): r for r in results}
    rows = []
    for method in METHODS:
        if not any((method, budget) in cells for budget in budgets):
            continue
        row = [LABELS[method]]
        for budget in budgets:
            result = cells.get((method, budget))
            if result is None:
                row.append("")
            else:
                row.append("–" if result.trained is None else _figure(result, metric))
        rows.append(row)
    head = [metric.label, *(f"{budget:,}" for budget in budgets)]
    return _table(head, rows)


def _look(method: str) -> dict[str, Any]:
    """The same line in all plots, and no two methods the same."""
    import matplotlib

    cycle, number = divmod(list(METHODS).index(method), 10)
    look = {"marker": "os^D"[cycle], "linestyle": ("-", "--", ":", "-.")[cycle]}
    return look | {"color": matplotlib.colormaps["tab10"](number)}


def _budget_plot(task: PlannedTask, results: Sequence[Result], metric: Metric, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        points = [r for r in results if r.method == method and r.trained]
        if len(points) < 2:
            continue
        points.sort(key=lambda r: r.trained or 0)
        axes.errorbar(
            [r.trained or 0 for r in points],
            [r.mean(metric.key) * metric.scale for r in points],
            [(r.spread(metric.key) or 0) * metric.scale for r in points],
            label=LABELS[method],
            **_look(method),
            markersize=3,
            linewidth=1,
            capsize=2,
        )
    for result in results:
        if result.method in (BASE, FULL):
            height = result.mean(metric.key) * metric.scale
            axes.axhline(height, color="grey", linestyle=":" if result.method == BASE else "--")
            axes.annotate(_label(result), (0.01, height), xycoords=("axes fraction", "data"))
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(metric.label)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def _curve_plot(results: Sequence[Result], metric: Metric, budget: int | None, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    wanted = budget
    if wanted is None:
        sizes = [r.budget for r in results if r.budget]
        wanted = max(set(sizes), key=sizes.count)
    for result in results:
        curves = [curve for curve in result.curves if curve]
        if result.budget != wanted or not curves or result.method not in METHODS:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        heights = [mean(c[step][metric.key] for c in curves) * metric.scale for step in steps]
        axes.plot(steps, heights, label=_label(result), **_look(result.method), ms=3)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"{metric.label}, development split")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def _tradeoff(
    task: PlannedTask, results: Sequence[Result], records: Iterable[Record], images: Path
) -> list[str]:
    """What is gained against what is kept of the base model, by the rates of the search."""
    cls = task_class(task.kind)
    sizes = [r.budget for r in results if r.budget and r.rate is not None]
    if cls.kept is None or not sizes:
        return []
    budget = max(dict.fromkeys(sizes), key=sizes.count)
    gained, kept = cls.metrics[0], next(m for m in cls.metrics if m.key == cls.kept)
    searches = _searches(task, records, budget)
    chosen = {
        r.method: r.rate
        for r in results
        if r.budget == budget and r.rate is not None and r.rate in searches[r.method]
    }
    lines = {
        method: {
            rate: (
                mean(scores[kept.key] for scores in found) * kept.scale,
                mean(scores[gained.key] for scores in found) * gained.scale,
            )
            for rate, found in sorted(searches[method].items())
        }
        for method in chosen
    }
    if not any(len(points) > 1 for points in lines.values()):
        return []
    name = f"results_{task.name}_tradeoff.png"
    _tradeoff_plot(lines, chosen, gained, kept, images / name)
    return [
        f"![{gained.label} against {kept.label}](images/{name})\n",
        f"Every line is a method at {budget:,} numbers over the learning rates of its search, on "
        "the development split, means over the search's seeds; the chosen rate is ringed and the "
        "rates at both ends are named.\n",
    ]


def _searches(
    task: PlannedTask, records: Iterable[Record], budget: int
) -> dict[str, dict[float, list[dict[str, float]]]]:
    """Scores of the planned search at a budget, by method and rate; what diverged is left out."""
    found: dict[str, dict[float, list[dict[str, float]]]] = defaultdict(dict)
    for record in records:
        cell = (record["task"], record["digest"], record["kind"], record.get("budget"))
        if cell != (task.name, task.digest, "sweep", budget) or record.get("diverged"):
            continue
        if record["seed"] in sweep_seeds(task) and record.get("scores"):
            found[record["method"]].setdefault(record["rate"], []).append(record["scores"])
    return found


def _tradeoff_plot(
    lines: Mapping[str, Mapping[float, tuple[float, float]]],
    chosen: Mapping[str, float],
    gained: Metric,
    kept: Metric,
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, points in lines.items():
        across, up = zip(*points.values(), strict=True)
        look = _look(method)
        axes.plot(across, up, label=LABELS[method], **look, ms=3, linewidth=1)
        axes.plot(*points[chosen[method]], marker="o", ms=9, mfc="none", color=look["color"])
        for rate in {min(points), max(points)}:
            axes.annotate(
                f"{rate:g}",
                points[rate],
                textcoords="offset points",
                xytext=(4, 3),
                fontsize=6,
                color=look["color"],
            )
    for metric, axis in ((kept, axes.xaxis), (gained, axes.yaxis)):
        axis.set_label_text(metric.label)
        if metric.higher_is_better is False:  # better is up and to the right
            axis.set_inverted(True)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def _sheet(task: PlannedTask, results: Sequence[Result], output: Path, images: Path) -> str | None:
    """The rows of pictures that the runs kept, one below the other; None if there are none.

    At the budget that most methods have; methods without it at their largest, which is named.
    """
    from PIL import Image, ImageDraw, ImageFont

    from spectral_adapters.personalize.report import save_png

    folder = output / "sheets" / task.name
    cells = {(r.method, r.budget): folder / f"{r.method}-{r.budget}.png" for r in results}
    kept = {cell: place for cell, place in cells.items() if place.is_file()}
    common = Counter(budget for _, budget in kept if budget).most_common(1)
    usual = common[0][0] if common else 0
    rows = []
    for method in dict.fromkeys(method for method, _ in kept):
        own = [budget for name, budget in kept if name == method]
        budget = usual if usual in own else max(own)
        label = LABELS[method] if budget in (0, usual) else f"{LABELS[method]}, {budget:,}"
        with Image.open(kept[method, budget]) as opened:
            rows.append((label, opened.convert("RGB")))
    name = f"results_{task.name}_sheet.png"
    shown = f"![drawings by method](images/{name})\n"
    if not rows:
        # Another checkout has the records and the page, not the single drawings.
        return shown if (images / name).is_file() else None
    width = max(row.width for _, row in rows)
    height = rows[0][1].height
    page = Image.new("RGB", (190 + width, len(rows) * (height + 4)), "#ffffff")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for index, (label, row) in enumerate(rows):
        top = index * (height + 4)
        pen.text((184, top + height // 2), label, "#202020", font, anchor="rm")
        page.paste(row, (190, top))
    save_png(page, images / name)
    return shown
