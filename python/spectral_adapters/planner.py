"""Which of the equal-valued plans of a SODA product is cheapest here (DESIGN section 4).

The plans give the same numbers and differ in what is multiplied by what:

* ``"tokens"`` rotates the activations: four GEMMs and two rotations over the tokens;
* ``"factored"`` rotates the frozen basis once, then four GEMMs;
* ``"merged"`` builds the dense ``W'`` and uses it like any linear layer: three GEMMs and the build.

Costs are counted in floating-point operations of a large GEMM; rotations and Grams work on small
matrices and are charged ``SMALL_MATRIX_PENALTY`` times their operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

PLANS = ("factored", "merged", "tokens")

#: Measured on CPU: rotations and Grams run at 1 / 1.3 to 1 / 2.6 of the GEMM's rate.
SMALL_MATRIX_PENALTY = 2.0


@dataclass(frozen=True)
class PlanChoice:
    """The plan to run, why, and the cost of every plan in units of ``2 * tokens * out * in``."""

    name: str
    reason: str
    units: dict[str, float]

    def __str__(self) -> str:
        costs = ", ".join(f"{plan} {cost:.2f}" for plan, cost in self.units.items())
        return f"{self.name} ({self.reason}; units: {costs})"


def plan_costs(
    tokens: int,
    out_features: int,
    in_features: int,
    factors: tuple[int, ...] | None,
    *,
    decomposition: str,
    rotation: str | None,
    backward: bool = True,
    uses: int = 1,
) -> dict[str, float]:
    """Cost of each plan in units of one GEMM ``2 * tokens * out * in`` (DESIGN section 4).

    Args:
        tokens: rows of the flattened activation, M.
        out_features, in_features: shape of the weight; the rank is their minimum.
        factors: sizes of the rotation's factors, or None without a rotation.
        decomposition: ``"svd"`` or ``"qr"``.
        rotation: ``"left"``, ``"right"`` or None.
        backward: count the backward pass too (training) or the forward alone.
    """
    tokens = max(tokens, 1)
    rank = min(out_features, in_features)
    unit = 2.0 * tokens * out_features * in_features
    dense = 2.0 * out_features * in_features * rank
    passes = 2 if backward else 1

    products = passes * 2.0 * tokens * rank * (in_features + out_features)
    per_row, basis_rows, merged_rows = 0.0, 0, 0
    if factors is not None:
        width = rank if rotation == "left" else in_features
        per_row = 2.0 * width * sum(factors) * SMALL_MATRIX_PENALTY
        basis_rows = out_features if rotation == "left" else rank
        merged_rows = out_features
        if prod(factors) != width:
            raise ValueError(f"factors must have product {width}; got {factors!r}")
    gram = per_row * tokens if backward else 0.0

    builds = 2 if backward else 1
    if decomposition == "qr" and rotation == "right":
        # W0 + diag(delta) Q is elementwise; only a layer that has no W0 pays one product for it.
        builds = 1
    merged_gram = per_row * max(in_features, out_features) if backward else 0.0
    return {
        "factored": (products + basis_rows * per_row + gram) / unit,
        "merged": (
            (3 if backward else 1) * unit + builds * dense + merged_rows * per_row + merged_gram
        )
        / unit,
        "tokens": (products + passes * tokens * per_row + gram) / unit,
    }


def choose_plan(
    tokens: int,
    out_features: int,
    in_features: int,
    factors: tuple[int, ...] | None,
    *,
    decomposition: str,
    rotation: str | None,
    plan: str = "auto",
    backward: bool = True,
    uses: int = 1,
) -> PlanChoice:
    """The cheapest plan for these sizes, or ``plan`` itself when it is not ``"auto"``."""
    units = plan_costs(
        tokens,
        out_features,
        in_features,
        factors,
        decomposition=decomposition,
        rotation=rotation,
        backward=backward,
        uses=uses,
    )
    if plan != "auto":
        return PlanChoice(plan, "forced", units)
    best = min(units, key=lambda name: units[name])
    return PlanChoice(best, "cheapest by the cost model", units)
