"""The batched Cayley transform against solving, forward alone and with its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import CLOCK, Result, deliver
from providers import CAYLEY_PROVIDERS, CayleyCase

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CASES = [
    CayleyCase(256, n, backward, device)
    for device in DEVICES
    for n in (16, 64)
    for backward in (False, True)
]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("name", CAYLEY_PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotations(
    benchmark: Any, measured: Callable[..., dict[str, Result]], case: CayleyCase, name: str
) -> None:
    deliver(benchmark, f"cayley {case}", measured("cayley", case, CAYLEY_PROVIDERS)[name])
