"""The benchmark suite at toy sizes: its providers are right, a wrong one gets no ratio."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import measure
import report
from providers import (
    CAYLEY_PROVIDERS,
    LOW_RANK_PROVIDERS,
    SODA_PROVIDERS,
    Candidate,
    CayleyCase,
    LowRankCase,
    SODACase,
    Unavailable,
)
from stiefel_providers import STIEFEL_PROVIDERS, StiefelCase

SODA = SODACase(n=32, tokens=6, device="cpu")  # 32 is OFT's block size
CAYLEY = {backward: CayleyCase(3, 5, backward, "cpu") for backward in (False, True)}


def _fast(names):
    """Compiling takes a C++ compiler and many seconds."""
    return [
        pytest.param(name, marks=pytest.mark.slow if "compiled" in name else ()) for name in names
    ]


@pytest.mark.parametrize("name", _fast(SODA_PROVIDERS))
def test_soda_provider_agrees_with_its_oracle(name):
    try:
        candidate = SODA_PROVIDERS[name](SODA.build())
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert measure.error_of(candidate) <= measure.TOLERANCE


@pytest.mark.parametrize("name", LOW_RANK_PROVIDERS)
def test_low_rank_provider_agrees_with_its_oracle(name):
    try:
        candidate = LOW_RANK_PROVIDERS[name](LowRankCase(n=64, tokens=6, device="cpu").build())
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert measure.error_of(candidate) <= measure.TOLERANCE


@pytest.mark.parametrize("name", _fast(CAYLEY_PROVIDERS))
@pytest.mark.parametrize("backward", [False, True])
def test_cayley_provider_agrees_with_its_oracle(name, backward):
    candidate = CAYLEY_PROVIDERS[name](CAYLEY[backward].build())
    assert measure.error_of(candidate) <= measure.TOLERANCE


@pytest.mark.parametrize("name", STIEFEL_PROVIDERS)
def test_stiefel_provider_agrees_with_its_oracle(name):
    candidate = STIEFEL_PROVIDERS[name](StiefelCase(((2, 5), (3, 8)), "cpu").build())
    assert measure.error_of(candidate) <= measure.TOLERANCE


def _skewed(position, change):
    """The naive provider with one of its outputs changed."""

    def provider(problem):
        right = SODA_PROVIDERS["naive"](problem)

        def comparable(outputs):
            outputs = list(right.comparable(outputs))
            outputs[position] = change(outputs[position])
            return outputs

        return Candidate(right.step, right.oracle, comparable)

    return provider


@pytest.mark.parametrize("position", range(5))  # y, dx, d delta, dP of two factors
@pytest.mark.parametrize("change", [lambda t: t * 1.001, lambda t: t * torch.nan, lambda t: t[:-1]])
def test_a_wrong_provider_is_not_timed(position, change):
    providers = {"ours auto": SODA_PROVIDERS["ours auto"], "naive": _skewed(position, change)}
    results = measure.measure(SODA, providers, seconds=0.01)
    assert len(results["ours auto"].seconds) >= measure.FEWEST_ROUNDS
    assert results["naive"].seconds == [] and results["naive"].problem.startswith("wrong")
    with pytest.raises(pytest.fail.Exception, match="wrong"):
        measure.deliver(None, "", results["naive"])


def test_report_refuses_the_ratio_of_a_wrong_provider(tmp_path):
    names = ["ours factored", "ours merged", "ours tokens", "ours auto", "GEMMs factored"]
    providers = {name: SODA_PROVIDERS[name] for name in (*names, "GEMMs merged")}
    providers["naive"] = _skewed(0, lambda y: 2 * y)
    providers |= {name: _unavailable for name in SODA_PROVIDERS if name not in providers}
    results = measure.measure(SODA, providers, seconds=0.01)
    entry = report.describe("soda_linear", SODA, results)
    cells = {r.title: report.ratio_of(entry, r) for r in report.RATIOS["soda_linear"]}
    assert cells["naive / ours"] is None and cells["plain / ours"] is None
    assert cells["auto / best plan"] > 0 and cells["ours / GEMMs"] > 0
    assert "refused" in report.tables([entry]) and "wrong: relative error" in report.tables([entry])

    path = report.write([entry], tmp_path)
    document = json.loads(path.read_text())
    assert document["entries"] == [entry]
    assert document["versions"]["torch"] == torch.__version__
    assert path.with_suffix(".md").read_text().count("| n32-M6-cpu |") == 3


def _unavailable(problem):
    raise Unavailable("left out")


def test_targets_are_met_or_missed():
    times = {"over": {"milliseconds": {"50": 3.0}}, "under": {"milliseconds": {"50": 2.0}}}
    for device, bound, at_least, cell in [
        ("cpu", 1.4, True, "1.50 (≥ 1.4: met)"),
        ("cpu", 1.6, True, "1.50 (≥ 1.6: **missed**)"),
        ("cpu", 1.4, False, "1.50 (≤ 1.4: **missed**)"),
        ("cuda", 1.6, True, "1.50"),
    ]:
        ratio = report.Ratio("r", ("over",), ("under",), lambda case, b=bound: b, at_least)
        assert report._cell({"case": {"device": device}, "providers": times}, ratio) == cell


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(256, 256)

    def step():
        first = x + x
        second = first + x
        del first
        return [second + x]

    assert measure.peak_memory(step, "cpu") == 2 * x.numel() * x.element_size()


def test_providers_take_turns():
    order = []

    def recorder(name):
        def step():
            order.append(name)
            return [torch.ones(1)]

        return lambda problem: Candidate(step, lambda: [torch.ones(1)])

    results = measure.measure(SODA, {"a": recorder("a"), "b": recorder("b")}, seconds=0.0)
    timed = order[-2 * measure.FEWEST_ROUNDS :]
    assert all({*timed[i : i + 2]} == {"a", "b"} for i in range(0, len(timed), 2))
    assert [len(r.seconds) for r in results.values()] == [measure.FEWEST_ROUNDS] * 2
    assert list(results["a"].percentiles()) == list(report.PERCENTILES)
