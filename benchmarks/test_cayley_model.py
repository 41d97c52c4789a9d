"""All rotations of an SDXL adapter at once against solving layer by layer and batched inverses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cayley_model import CAYLEY_MODEL_PROVIDERS, CayleyModelCase
from measure import CLOCK, Result, deliver

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CASES = [
    CayleyModelCase(preset, device) for device in DEVICES for preset in ("published", "balanced")
]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("name", CAYLEY_MODEL_PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotations(
    benchmark: Any, measured: Callable[..., dict[str, Result]], case: CayleyModelCase, name: str
) -> None:
    results = measured("cayley_model", case, CAYLEY_MODEL_PROVIDERS)
    deliver(benchmark, f"cayley_model {case}", results[name])
