"""A StiefelAdam step of a whole adapter's factors, against a loop over them and stacked PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import CLOCK, Result, deliver
from stiefel_providers import SDXL, STIEFEL_PROVIDERS, StiefelCase

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CASES = [StiefelCase(SDXL, device) for device in DEVICES]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("name", STIEFEL_PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stiefel_step(
    benchmark: Any, measured: Callable[..., dict[str, Result]], case: StiefelCase, name: str
) -> None:
    deliver(benchmark, f"stiefel {case}", measured("stiefel", case, STIEFEL_PROVIDERS)[name])
