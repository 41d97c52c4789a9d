"""Times the kernels on this machine's GPU, after checking every one of them against float64.

    python benchmarks/gpu_bench.py --output benchmarks/results
    python benchmarks/gpu_bench.py --device cpu --smoke     # that it runs; its times mean nothing

``kron_rotate`` and ``kron_gram`` are timed as CUDA graphs over inputs that together exceed the L2
cache, so neither Python nor the cache is measured; whole Cayley and SODALinear steps are timed as
they are called. A provider that is wrong is reported as wrong, gets no time, and makes the exit
status 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from measure import measure
from providers import CAYLEY_PROVIDERS, SODA_PROVIDERS, CayleyCase, SODACase
from stiefel_providers import SDXL, STIEFEL_PROVIDERS, StiefelCase
from torch import Tensor

from spectral_kernels import backend_report
from spectral_kernels.ops.kron import kron_gram_reference, kron_rotate_reference
from spectral_kernels.triton_kernels import _launch

Call = Callable[..., Sequence[Tensor]]

#: Largest difference over the largest expected magnitude of an output, by the output's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

ROUNDS = 50
ROTATE_OPTIONS = (False, None, None)


@dataclass
class Entry:
    """One op on one shape: how to draw inputs, who computes it, and what is right."""

    op: str
    rows: int
    dims: tuple[int, ...]
    dtype: torch.dtype
    draw: Callable[[], tuple[Any, ...]]
    providers: dict[str, Call]
    oracle: Call

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.rows} x {'x'.join(map(str, self.dims))} {dtype}"


@dataclass
class Timing:
    """Seconds per call of one provider, or why there are none; ``mode`` says how it was called."""

    error: float = 0.0
    problem: str = ""
    mode: str = ""
    seconds: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        out: dict[str, Any] = {"error": self.error, "problem": self.problem, "mode": self.mode}
        if self.seconds:
            tenths = quantiles(self.seconds, n=10, method="inclusive")
            out["seconds"] = {"20": tenths[1], "50": tenths[4], "80": tenths[7]}
            out["rounds"] = len(self.seconds)
        return out


def rotate_entry(rows: int, dims: tuple[int, ...], dtype: torch.dtype, device: str) -> Entry:
    """A rotation by random orthogonal factors."""
    k = prod(dims)
    factors = [torch.linalg.qr(torch.randn(n, n, device=device))[0].contiguous() for n in dims]
    dense = factors[0]
    for factor in factors[1:]:
        dense = torch.kron(dense, factor)
    dense = dense.to(dtype)
    compiled = torch.compile(kron_rotate_reference, dynamic=False)

    def draw() -> tuple[Any, ...]:
        return (torch.randn(rows, k, device=device).to(dtype),)

    def oracle(x: Tensor) -> Sequence[Tensor]:
        y = x.double().reshape(-1, *dims)
        for axis, factor in enumerate(factors, start=1):
            y = torch.tensordot(y, factor.double(), ([axis], [0])).movedim(-1, axis)
        return [y.reshape(x.shape)]

    def op(x: Tensor) -> Sequence[Tensor]:
        return [torch.ops.spectral.kron_rotate(x, factors, *ROTATE_OPTIONS)]

    def with_tf32x3(x: Tensor) -> Sequence[Tensor]:
        with dot_precision("tf32x3"):
            return op(x)

    providers: dict[str, Call] = {
        "op": op,
        "op, tf32x3": with_tf32x3,
        "reference": lambda x: [kron_rotate_reference(x, factors, *ROTATE_OPTIONS)],
        "reference compiled": lambda x: [compiled(x, factors, *ROTATE_OPTIONS)],
        "dense GEMM": lambda x: [x @ dense],
        "floor: copy": lambda x: [x.clone()],
    }
    return Entry("kron_rotate", rows, dims, dtype, draw, providers, oracle)


def gram_entry(rows: int, dims: tuple[int, ...], dtype: torch.dtype, device: str) -> Entry:
    """All Grams and the column sums of two random inputs, one of them scaled."""
    k, sizes = prod(dims), list(dims)
    scale = torch.rand(k, device=device) + 0.5
    compiled = torch.compile(kron_gram_reference, dynamic=False)

    def draw() -> tuple[Any, ...]:
        return tuple(torch.randn(rows, k, device=device).to(dtype) for _ in range(2))

    def oracle(a: Tensor, b: Tensor) -> Sequence[Tensor]:
        a, b = a.double(), b.double()
        left, right = a.reshape(-1, *dims), (b * scale.double()).reshape(-1, *dims)
        outputs = []
        for axis in range(1, len(dims) + 1):
            others = [i for i in range(len(dims) + 1) if i != axis]
            outputs.append(torch.tensordot(left, right, (others, others)))
        return [*outputs, (a * b).sum(0)]

    def op(a: Tensor, b: Tensor) -> Sequence[Tensor]:
        return torch.ops.spectral.kron_gram(a, b, sizes, scale)

    def with_tf32x3(a: Tensor, b: Tensor) -> Sequence[Tensor]:
        with dot_precision("tf32x3"):
            return op(a, b)

    providers: dict[str, Call] = {
        "op": op,
        "op, tf32x3": with_tf32x3,
        "reference": lambda a, b: kron_gram_reference(a, b, sizes, scale),
        "reference compiled": lambda a, b: compiled(a, b, sizes, scale),
        # As many bytes as reading both.
        "floor: copy": lambda a, b: [b.copy_(a)],
    }
    return Entry("kron_gram", rows, dims, dtype, draw, providers, oracle)


@contextmanager
def dot_precision(precision: str) -> Iterator[None]:
    """Run the Triton kernels with another ``tl.dot`` precision: an experiment, not an option."""
    usual = _launch.DOT_PRECISION
    _launch.DOT_PRECISION = precision
    try:
        yield
    finally:
        _launch.DOT_PRECISION = usual


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an output that is not written cannot pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def check(entry: Entry, call: Call) -> float:
    """Largest error on fresh inputs in units of the tolerance: above 1 is wrong."""
    inputs = entry.draw()
    expected = entry.oracle(*inputs)
    call(*inputs)  # compiles, where there is something to compile
    with poisoned_memory():
        actual = call(*inputs)
    worst = 0.0
    for value, oracle in zip(actual, expected, strict=True):
        if value.shape != oracle.shape:
            return float("inf")
        if value.numel() == 0:
            continue
        difference = (value.double() - oracle).abs().amax()
        error = float(difference / oracle.abs().amax().clamp_min(1e-30)) / TOLERANCE[value.dtype]
        worst = max(worst, error if error == error else float("inf"))
    return worst


def run_entry(entry: Entry, device: str, rounds: int) -> dict[str, Timing]:
    """Check every provider, then time the right ones turn by turn."""
    timings = {name: Timing() for name in entry.providers}
    timed: dict[str, tuple[Callable[[], None], int]] = {}
    inputs = input_sets(entry, device)
    for name, call in entry.providers.items():
        if not name.startswith("floor"):
            timings[name].error = check(entry, call)
            if timings[name].error > 1:
                timings[name].problem = f"wrong: {timings[name].error:.1f} times the tolerance"
                continue
        timed[name], timings[name].mode = callable_over(call, inputs, device)
    order = list(timed)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            run, calls = timed[name]
            timings[name].seconds.append(elapsed(run, device) / calls)
    return timings


def input_sets(entry: Entry, device: str) -> list[tuple[Any, ...]]:
    """Enough inputs that walking through them leaves nothing of the first in the L2 cache."""
    sets = [entry.draw()]
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        size = sum(tensor.numel() * tensor.element_size() for tensor in sets[0])
        sets += [entry.draw() for _ in range(2 * cache // size + 1)]
    return sets


def callable_over(
    call: Call, inputs: list[tuple[Any, ...]], device: str
) -> tuple[tuple[Callable[[], None], int], str]:
    """(run, calls per run) and how: one CUDA graph over all inputs, or call by call."""

    def walk() -> None:
        for arguments in inputs:
            call(*arguments)

    walk()
    if device != "cuda":
        return (walk, len(inputs)), "eager"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    graph.replay()
    return (graph.replay, len(inputs)), "graph"


def elapsed(run: Callable[[], None], device: str) -> float:
    """Seconds of one run: by CUDA events on the device, by the clock on the CPU."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def entries(device: str, smoke: bool) -> Iterator[Entry]:
    """What is timed: the published presets, the balanced factors of common widths, both dtypes."""
    if smoke:
        yield rotate_entry(9, (6, 8, 16), torch.bfloat16, device)
        yield gram_entry(9, (6, 8, 16), torch.float32, device)
        return
    for make in (rotate_entry, gram_entry):
        for rows in (308, 8192):
            for dims in ((8, 8, 10), (6, 8, 16), (32, 40), (4, 8, 64), (64, 64)):
                yield make(rows, dims, torch.bfloat16, device)
        yield make(8192, (32, 40), torch.float32, device)
        yield make(8192, (16, 16, 16), torch.bfloat16, device)
        yield make(1024, (128, 128), torch.bfloat16, device)


def steps(device: str, smoke: bool) -> Iterator[tuple[str, dict[str, Callable], Any]]:
    """Whole steps, from the shared providers: fp32, forward and backward or the optimizer's."""
    if smoke:
        yield "cayley", CAYLEY_PROVIDERS, CayleyCase(3, 8, True, device)
        yield "stiefel", STIEFEL_PROVIDERS, StiefelCase(((2, 5), (3, 20)), device)
        yield "soda", SODA_PROVIDERS, SODACase(64, 32, device)
        return
    yield "stiefel", STIEFEL_PROVIDERS, StiefelCase(SDXL, device)
    for count, n in ((48, 32), (48, 40), (96, 64), (24, 128)):
        yield "cayley", CAYLEY_PROVIDERS, CayleyCase(count, n, True, device)
    for n, tokens in ((640, 4096), (1280, 308), (1280, 4096), (2048, 8192)):
        yield "soda", SODA_PROVIDERS, SODACase(n, tokens, device)


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Medians and the ratio to the first provider; a wrong provider gets its reason instead."""
    first = next(iter(rows.values())).get("seconds")
    print(f"\n{title}")
    for name, row in rows.items():
        if "seconds" not in row:
            print(f"  {name:<22} {row['problem']}")
            continue
        low, middle, high = (row["seconds"][p] * 1e6 for p in ("20", "50", "80"))
        ratio = f"{middle / 1e6 / first['50']:6.2f}x" if first else "   red"
        print(f"  {name:<22} {middle:10.1f} us  ({low:.1f} .. {high:.1f})  {ratio}")


def environment(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    found: dict[str, Any] = {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": platform.processor() or platform.machine(),
        "backends": {name: row.implementation for name, row in backend_report().items()},
    }
    if device == "cuda":
        import triton

        found["triton"] = triton.__version__
        found["device"] = torch.cuda.get_device_name(0)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="folder for the JSON file; none without it")
    parser.add_argument("--smoke", action="store_true", help="one tiny shape of each")
    parser.add_argument("--seconds", type=float, default=4.0, help="per Cayley or SODA case")
    arguments = parser.parse_args()
    device, smoke = arguments.device, arguments.smoke
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    torch.manual_seed(0)

    report: dict[str, Any] = {**environment(device), "results": {}}
    print(json.dumps({key: value for key, value in report.items() if key != "results"}))
    rounds = 2 if smoke else ROUNDS
    for entry in entries(device, smoke):
        timings = run_entry(entry, device, rounds)
        rows = {name: timing.record() for name, timing in timings.items()}
        report["results"][str(entry)] = rows
        print_table(str(entry), rows)
        torch.compiler.reset()
    for kind, providers, case in steps(device, smoke):
        results = measure(case, providers, 0.0 if smoke else arguments.seconds)
        rows = {}
        for name, result in results.items():
            rows[name] = {"error": result.error, "problem": result.problem, "mode": "eager"}
            if result.seconds:
                rows[name] |= {"seconds": result.percentiles(), "rounds": len(result.seconds)}
        report["results"][f"{kind} {case}"] = rows
        print_table(f"{kind} {case}", rows)

    wrong = [
        f"{title}: {name}"
        for title, rows in report["results"].items()
        for name, row in rows.items()
        if row["problem"].startswith("wrong")
    ]
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = report["device"].lower().replace(" ", "-") if device == "cuda" else "cpu"
        path = arguments.output / f"gpu_bench_{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {path}")
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
