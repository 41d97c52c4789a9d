"""Time per adapted layer that is not in its products: 64 PEFT layers of 16 x 16, four tokens.

On a GPU this is what a small model or batch waits for. One thread, medians; the frozen model's time
is the first row.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spectral_adapters import functional
from spectral_adapters.peft import (
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
)

LAYERS = 64
SIZE = 16
TOKENS = 4
TARGETS = r"\d+"
WARM_UP = 10
CONFIGS = {
    "PEFT LoRA r=8": LoraConfig(r=8, target_modules=TARGETS),
    "SODA tokens": SODAConfig(plan="tokens", target_modules=TARGETS),
    "SODA factored": SODAConfig(plan="factored", target_modules=TARGETS),
    "SODA merged": SODAConfig(plan="merged", target_modules=TARGETS),
    "SVDiff": SVDiffConfig(target_modules=TARGETS),
    "A r=4": SpectralAdapterAConfig(r=4, target_modules=TARGETS),
    "R r=4": SpectralAdapterRConfig(r=4, target_modules=TARGETS),
}
#: Those that are nodes of the graph in C++ with the extension, and Functions in Python without it.
NODES = ("SODA tokens", "SODA factored", "SODA merged", "A r=4", "R r=4")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(LAYERS)]).requires_grad_(False)


def step(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass, after the parameters were changed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    with torch.no_grad():
        torch._foreach_add_(trained, 1e-4) if trained else None
    start = time.perf_counter()
    y = model(x)
    middle = time.perf_counter()
    y.sum().backward()
    return middle - start, time.perf_counter() - middle


def as_functions() -> AbstractContextManager[object]:
    """Without the nodes that layers are in C++."""
    return mock.patch.object(functional, "node_of", lambda *_: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(TOKENS, SIZE, requires_grad=True)
    models: dict[str, nn.Module] = {"frozen": base()}
    models |= {name: get_peft_model(base(), config) for name, config in CONFIGS.items()}
    models |= {f"{name}, Function": models[name] for name in NODES}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(WARM_UP + options.rounds):
        for name, model in models.items():
            with as_functions() if name.endswith("Function") else nullcontext():
                times[name].append(step(model, x))
    figures = {}
    print(f"{'microseconds per layer':24} forward backward")
    for name, found in times.items():
        forward, backward = (
            1e6 * median(part) / LAYERS for part in zip(*found[WARM_UP:], strict=True)
        )
        figures[name] = {"forward": forward, "backward": backward}
        print(f"{name:24} {forward:7.1f} {backward:8.1f}")
    if options.json is not None:
        document = {"layers": LAYERS, "microseconds per layer": figures}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
