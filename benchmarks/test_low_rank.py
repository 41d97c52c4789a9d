"""Forward and backward of Spectral Adapters A and R against a LoRA of the same rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import CLOCK, Result, deliver
from providers import LOW_RANK_PROVIDERS, LowRankCase

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CASES = [
    LowRankCase(n, tokens, device)
    for device in DEVICES
    for n in (320, 640, 1280)
    for tokens in (77, 256, 1024, 4096)
]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("name", LOW_RANK_PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(
    benchmark: Any, measured: Callable[..., dict[str, Result]], case: LowRankCase, name: str
) -> None:
    deliver(benchmark, f"low_rank {case}", measured("low_rank", case, LOW_RANK_PROVIDERS)[name])
