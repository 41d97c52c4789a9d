"""The planner: the cost model of DESIGN section 4, and that its choice is what runs."""

import pytest
import torch

from spectral_adapters import SODALinear, functional
from spectral_adapters.planner import PLANS, choose_plan, plan_costs

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
    original = functional.choose_plan

    def spy(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    built = []
    monkeypatch.setattr(functional, "choose_plan", spy)
    product = functional._merged_product
    monkeypatch.setattr(functional, "_merged_product", lambda *a: built.append(1) or product(*a))
    layer(torch.randn(tokens, 64))
    assert len(seen) == 1 and seen[0].name == layer.plan_for(tokens).name
    assert bool(built) == (seen[0].name == "merged")


def test_mismatching_factors_are_refused():
    with pytest.raises(ValueError, match="factors must have product 12"):
        plan_costs(5, 12, 20, (3, 5), **LEFT)
