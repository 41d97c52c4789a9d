"""Forward and backward of SODALinear against its rivals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import CLOCK, Result, deliver
from providers import SODA_PROVIDERS, SODACase

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CASES = [
    SODACase(n, tokens, device)
    for device in DEVICES
    for n in (320, 640, 1280)
    for tokens in (77, 256, 1024, 4096)
]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("name", SODA_PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(
    benchmark: Any, measured: Callable[..., dict[str, Result]], case: SODACase, name: str
) -> None:
    deliver(benchmark, f"soda_linear {case}", measured("soda_linear", case, SODA_PROVIDERS)[name])
