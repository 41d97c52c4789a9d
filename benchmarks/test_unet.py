"""A whole training step of Stable Diffusion's UNets: each method against PEFT's LoRA and OFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import CLOCK, Result, deliver
from unet_providers import UNET_PROVIDERS, UNetCase

pytest.importorskip("diffusers")

CASES = [UNetCase("sd15-cut", 32, "cpu"), UNetCase("sdxl-cut", 64, "cpu")]
if torch.cuda.is_available():
    CASES += [
        UNetCase("sd15", 64, "cuda", "bfloat16", batch=4),
        UNetCase("sdxl", 128, "cuda", "bfloat16"),
    ]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("name", UNET_PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(
    benchmark: Any, measured: Callable[..., dict[str, Result]], case: UNetCase, name: str
) -> None:
    deliver(benchmark, f"unet_step {case}", measured("unet_step", case, UNET_PROVIDERS)[name])
