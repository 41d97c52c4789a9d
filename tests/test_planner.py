"""The planner: the cost model of DESIGN section 4, calibration, that its choice is what runs."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from spectral_adapters import SODALinear, cli, functional, planner
from spectral_adapters.planner import DEFAULT_RATES, PLANS, Rates, choose_plan, plan_costs

LEFT = {"decomposition": "svd", "rotation": "left"}


def test_units_of_the_design_table():
    n = 4096
    costs = plan_costs(10**6, n, n, (64, 64), **LEFT)
    assert costs["factored"] == pytest.approx(4, rel=0.05)
    assert costs["merged"] == pytest.approx(3, rel=0.05)
    costs = plan_costs(n, n, n, (64, 64), **LEFT)
    assert costs["merged"] == pytest.approx(3 + 2, rel=0.05)
    forward = plan_costs(10**6, n, n, (64, 64), **LEFT, backward=False)
    assert forward["factored"] == pytest.approx(2, rel=0.05)
    assert forward["merged"] == pytest.approx(1, rel=0.05)


def test_choice_follows_the_tokens():
    n, factors = 1280, (32, 40)
    chosen = [choose_plan(m, n, n, factors, **LEFT).name for m in (16, 77, 2000, 100_000)]
    assert chosen == ["tokens", "tokens", "factored", "merged"]


def test_a_plan_can_be_forced_and_is_reported():
    choice = choose_plan(77, 1280, 1280, (32, 40), **LEFT, plan="merged")
    assert choice.name == "merged" and choice.reason == "forced"
    assert set(choice.units) == set(PLANS)
    assert "units: factored" in str(choice)


@pytest.mark.parametrize("tokens", [1, 2000, 100_000])
def test_the_chosen_plan_is_the_one_that_runs(monkeypatch, tokens):
    layer = SODALinear(64, 64)
    seen = []
    original = functional.remembered_plan

    def spy(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    built = []
    monkeypatch.setattr(functional, "remembered_plan", spy)
    product = functional._merged_product
    monkeypatch.setattr(functional, "_merged_product", lambda *a: built.append(1) or product(*a))
    layer(torch.randn(tokens, 64))
    assert len(seen) == 1 and seen[0].name == layer.plan_for(tokens).name
    assert bool(built) == (seen[0].name == "merged")


def test_mismatching_factors_are_refused():
    with pytest.raises(ValueError, match="factors must have product 12"):
        plan_costs(5, 12, 20, (3, 5), **LEFT)


def test_plans_of_a_right_rotation():
    n, right = 4096, {"decomposition": "qr", "rotation": "right"}
    costs = plan_costs(n, n, n, (64, 64), **right, has_base=True)
    assert costs["merged"] == pytest.approx(3, rel=0.1)  # W0 + diag(d) Q is no product
    assert plan_costs(n, n, n, (64, 64), **right)["merged"] == pytest.approx(4, rel=0.1)


def test_a_rotation_alone_costs_two_products():
    n, right = 4096, {"decomposition": "svd", "rotation": "right", "has_base": True}
    options = {"fixed_spectrum": True}
    costs = plan_costs(10**5, n, n, (64, 64), **right, **options)
    assert costs["tokens"] == pytest.approx(2.2, rel=0.1)
    assert choose_plan(10**5, n, n, (64, 64), **right, **options).name == "tokens"
    assert choose_plan(10**5, n, n, (64, 64), **right).name == "merged"


def test_shared_builds_cost_their_share():
    n, factors = 1280, (32, 40)
    once = plan_costs(n, n, n, factors, **LEFT)
    shared = plan_costs(n, n, n, factors, **LEFT, uses=4)
    assert once["merged"] - shared["merged"] == pytest.approx(0.75 * 2, rel=0.2)
    assert shared["factored"] < once["factored"] and shared["tokens"] == once["tokens"]
    assert choose_plan(n, n, n, factors, **LEFT).name != "merged"
    assert choose_plan(n, n, n, factors, **LEFT, uses=8).name == "merged"


def test_rates_decide():
    slow = replace(DEFAULT_RATES["cpu"], rotation=50.0, gram=50.0, source="slow rotations")
    arguments = (1500, 1280, 1280, (32, 40))
    assert choose_plan(*arguments, **LEFT).name == "factored"
    assert choose_plan(*arguments, **LEFT, rates=slow).name == "merged"
    assert "slow rotations" in choose_plan(*arguments, **LEFT, rates=slow).reason


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(planner, "_chosen", {})
    return tmp_path / "spectral-kernels" / "planner.json"


def _in_a_new_process(monkeypatch):
    monkeypatch.setattr(planner, "_chosen", {})


CPU = torch.device("cpu")


def test_calibration_is_kept_and_read(own_cache, monkeypatch):
    assert planner.rates_for(CPU, torch.float32) == DEFAULT_RATES["cpu"]
    rates = planner.calibrate("cpu", torch.float32)
    assert min(rates.rotation, rates.gram, rates.build, rates.call) > 0
    assert "measured" in rates.source and planner.rates_for(CPU, torch.float32) == rates
    _in_a_new_process(monkeypatch)
    assert planner.rates_for(CPU, torch.float32) == rates
    assert planner.rates_for(CPU, torch.float64) == DEFAULT_RATES["cpu"]
    planner.calibrate("cpu", torch.float64, save=False)
    _in_a_new_process(monkeypatch)
    assert planner.rates_for(CPU, torch.float64) == DEFAULT_RATES["cpu"]
    assert list(own_cache.parent.iterdir()) == [own_cache]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_has_defaults_for_short_and_long_numbers(own_cache, dtype):
    expected = "cuda" if dtype == torch.float32 else "cuda, 16 bits"
    assert planner.rates_for(torch.device("cuda"), dtype) == DEFAULT_RATES[expected]


@pytest.fixture
def tensor_cores(monkeypatch):
    """An extension whose kernels take two factors up to 32 x 48."""
    module = types.ModuleType("spectral_kernels._C")
    module._layers_use_tile = lambda n1, n2: n1 <= 32 and n2 <= 48
    monkeypatch.setitem(sys.modules, "spectral_kernels._C", module)


def test_rates_are_those_of_what_rotates(own_cache, tensor_cores):
    def source(factors, dtype=torch.bfloat16, device="cuda"):
        return planner.rates_for(torch.device(device), dtype, factors).source

    assert source((32, 40)) == DEFAULT_RATES["cuda, tensor cores"].source
    for factors in ((32, 64), (4, 8, 10), None):
        assert source(factors) == DEFAULT_RATES["cuda, 16 bits"].source
    assert source((32, 40), torch.float16) == DEFAULT_RATES["cuda, 16 bits"].source
    assert source((32, 40), torch.float32) == DEFAULT_RATES["cuda"].source
    assert source((32, 40), torch.float32, "cpu") == DEFAULT_RATES["cpu"].source
    planner.set_rates("cuda", torch.bfloat16, Rates(1.0, 2.0, 3.0, 4.0, "mine"))
    assert source((32, 40)) == source((32, 64)) == "mine"
    planner.set_rates("cuda", torch.bfloat16, None)
    assert source((32, 40)) == DEFAULT_RATES["cuda, tensor cores"].source


def test_both_kinds_of_rates_are_kept(own_cache, tensor_cores, monkeypatch):
    """Calibration measures what rotates on tensor cores and what does not."""
    measured = {}

    def measure(device, dtype, sizes, on_tensor_cores):
        measured[on_tensor_cores] = Rates(1.0, 2.0, 3.0, 4.0, f"measured with {sizes}")
        return measured[on_tensor_cores]

    monkeypatch.setattr(planner, "_device_name", lambda _: "a GPU")
    monkeypatch.setattr(planner, "_measure", measure)
    assert planner.calibrate("cuda", torch.bfloat16) == measured[True]
    _in_a_new_process(monkeypatch)
    for factors, on_tensor_cores in (((32, 40), True), ((32, 64), False)):
        rates = planner.rates_for(torch.device("cuda"), torch.bfloat16, factors)
        assert rates == measured[on_tensor_cores]
    planner.calibrate("cuda", torch.float16)
    assert planner.rates_for(torch.device("cuda"), torch.float16, (32, 40)) == measured[False]


def test_tensor_cores_decide():
    """What an H200's layers took least time with (benchmarks/results/h200-2026-11-28.json)."""
    rates = DEFAULT_RATES["cuda, tensor cores"]
    for tokens, n, factors, best in (
        (77, 1280, (32, 40), "tokens"),
        (1024, 1280, (32, 40), "tokens"),
        (4096, 1280, (32, 40), "factored"),
        (4096, 640, (20, 32), "factored"),
    ):
        assert choose_plan(tokens, n, n, factors, **LEFT, rates=rates, has_base=True).name == best


def test_many_tokens_are_merged_on_a_gpu():
    """There the sums over tokens cost more than the products."""
    rates = DEFAULT_RATES["cuda, 16 bits"]
    for tokens, n, factors in ((16384, 320, (16, 20)), (4096, 640, (20, 32))):
        assert choose_plan(tokens, n, n, factors, **LEFT, rates=rates).name == "merged"
    assert choose_plan(77, 1280, 1280, (32, 40), **LEFT, rates=rates).name != "merged"


def test_rates_can_be_set(own_cache):
    rates = Rates(1.0, 2.0, 3.0, 4.0, "mine")
    planner.set_rates("cpu", torch.float32, rates)
    assert planner.rates_for(CPU, torch.float32) == rates
    assert "mine" in SODALinear(8, 8).plan_for(5).reason
    planner.set_rates("cpu", torch.float32, None)
    assert planner.rates_for(CPU, torch.float32) == DEFAULT_RATES["cpu"]
    with pytest.raises(ValueError, match=r"rates\.gram must be positive and finite; got 0"):
        planner.set_rates("cpu", torch.float32, replace(rates, gram=0))
    with pytest.raises(TypeError, match="rates must be Rates"):
        planner.set_rates("cpu", torch.float32, 2.0)


@pytest.mark.parametrize("content", ["not json", '["a list"]', "{KEY: {}}", "{KEY: null}"])
def test_a_broken_file_is_told(own_cache, content):
    key = json.dumps(planner._key(CPU, torch.float32))
    own_cache.parent.mkdir()
    own_cache.write_text(content.replace("KEY", key))
    if "null" in content:
        assert planner.rates_for(CPU, torch.float32) == DEFAULT_RATES["cpu"]
        return
    with pytest.warns(RuntimeWarning, match="no usable calibration"):
        assert planner.rates_for(CPU, torch.float32) == DEFAULT_RATES["cpu"]


def test_command_line(own_cache, capsys):
    assert cli.main(["calibrate", "--dtype", "float64"]) == 0
    assert "an operation of a rotation costs" in capsys.readouterr().out and own_cache.exists()
    assert cli.main(["calibrate", "--device", "nonsense"]) == 2
    assert "--device nonsense" in capsys.readouterr().err
    own_cache.unlink()
    own_cache.mkdir()
    assert cli.main(["calibrate"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_bad_calibration_arguments(own_cache):
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type; got torch\.int8"):
        planner.calibrate("cpu", torch.int8)
    with pytest.raises(ValueError, match="plan must be one of 'auto'"):
        choose_plan(5, 8, 8, (2, 4), **LEFT, plan="best")
