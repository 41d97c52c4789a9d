"""Where a UNet step's time goes on a GPU: kernels of one CUDA graph, and what the host does.

    python benchmarks/gpu_profile.py --model sdxl --methods "SODA" "PEFT LoRA r=8"

For a method: its step's kernels summed by name, from one replay of the recorded step, and the
operators that the host spends its time in, from one step as it is called. The profiler slows the
host down; shares are what to read.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from providers import Candidate, in_cuda_graph
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from unet_providers import UNET_GRAPHS, UNetCase

CASES = {
    "sd15": UNetCase("sd15", 64, "cuda", "bfloat16", batch=4),
    "sdxl": UNetCase("sdxl", 128, "cuda", "bfloat16"),
}
SHOWN = 30


def kernels(candidate: Candidate) -> dict[str, tuple[float, int]]:
    """Milliseconds on the device and number of launches by kernel, in one step."""
    candidate.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        candidate.step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.self_device_time_total / 1e3
            counts[event.name] += 1
    return {name: (time, counts[name]) for name, time in times.most_common()}


def host(candidate: Candidate) -> dict[str, tuple[float, int]]:
    """Milliseconds of the host by operator, without the operators it calls, in one step."""
    candidate.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        candidate.step()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {row.key: (row.self_cpu_time_total / 1e3, row.count) for row in rows}


def timed(candidate: Candidate, steps: int = 5) -> float:
    """Median milliseconds of a step by CUDA events."""
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        candidate.step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def show(title: str, rows: dict[str, tuple[float, int]]) -> None:
    print(f"{title}: {sum(time for time, _ in rows.values()):.1f} ms")
    for name, (time, count) in list(rows.items())[:SHOWN]:
        print(f"  {time:8.2f} ms {count:6} x {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=CASES, default="sdxl")
    parser.add_argument("--methods", nargs="+", default=["frozen", "PEFT LoRA r=8", "SODA"])
    parser.add_argument("--host", action="store_true", help="what the host does, too")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    problem = CASES[arguments.model].build()
    document: dict[str, Any] = {}
    graphs = []  # their memory is shared as long as one of them lives
    for name in arguments.methods:
        as_called = UNET_GRAPHS[name](problem)
        graphs.append(in_cuda_graph(UNET_GRAPHS[name])(problem))
        parts = {"kernels": kernels(graphs[-1])}
        if arguments.host:
            parts["host"] = host(as_called)
        for part, rows in parts.items():
            show(f"{name}, {part}", rows)
        times = {"as called": timed(as_called), "CUDA graph": timed(graphs[-1])}
        print(f"{name}, ms: {times}")
        document[name] = {**parts, "milliseconds": times}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
