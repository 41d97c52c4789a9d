"""Checks every op on this machine's GPU against float64, and times everything there is.

    python benchmarks/gpu_bench.py --output benchmarks/results
    python benchmarks/gpu_bench.py --device cpu --smoke     # that it runs; its times mean nothing

Every section is a process of its own, so that what breaks one leaves the others alone, and what
was measured before a section failed or ran out of time is kept. The kernels are timed as CUDA
graphs over inputs that together exceed the L2 cache; whole steps by CUDA events as they are called,
with the cache emptied before. A provider that is wrong is reported as wrong, gets no time, and
makes the exit status 1, as does a section that fails.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import quantiles
from typing import Any

import report
import torch
from measure import WRONG, measure
from providers import (
    CAYLEY_PROVIDERS,
    LOW_RANK_PROVIDERS,
    PLAIN,
    SODA_PROVIDERS,
    CayleyCase,
    LowRankCase,
    SODACase,
    Unavailable,
    in_cuda_graphs,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from spectral_kernels.ops import OPS
from spectral_kernels.ops.kron import kron_gram_reference, kron_rotate_reference
from spectral_kernels.triton_kernels import _launch

Call = Callable[..., Sequence[Tensor]]

#: Largest difference over the largest expected magnitude of an output, by the output's dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}

ROUNDS = 50

#: Arguments that are in fp32 whatever the others are, by op and position.
ALWAYS_FP32 = {"stiefel_adam_": {4}}

#: Providers that a GPU needs no time for: slow, and no rival.
SKIPPED = {"solve loop", "loop", "naive SODA"}

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
    if takes_tensor_cores(dims, dtype, device):
        rotate = torch.ops.spectral_products.kron_rotate_on_tensor_cores
        providers["tensor cores"] = lambda x: [rotate(x, factors, *ROTATE_OPTIONS)]
    return Entry("kron_rotate", rows, dims, dtype, draw, providers, oracle)


def takes_tensor_cores(dims: tuple[int, ...], dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels on tensor cores are there and take these rows."""
    fits = len(dims) == 2 and max(dims) <= 64 and dims[1] % 2 == 0 and prod(dims) % 8 == 0
    built = hasattr(torch.ops.spectral_products, "kron_gram_on_tensor_cores")
    return fits and built and device == "cuda" and dtype == torch.bfloat16


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
    if takes_tensor_cores(dims, dtype, device):
        gram = torch.ops.spectral_products.kron_gram_on_tensor_cores
        providers["tensor cores"] = lambda a, b: gram(a, b, sizes, scale)
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
    return disagreement(actual, expected)


def disagreement(
    actual: Sequence[Tensor], expected: Sequence[Tensor], coarsest: float = 0.0
) -> float:
    """Largest error of any output in units of its tolerance; NaN is infinite.

    The tolerance is that of the output's dtype, but no less than ``coarsest``.
    """
    worst = 0.0
    for value, oracle in zip(actual, expected, strict=True):
        if value.shape != oracle.shape:
            return float("inf")
        if value.numel() == 0:
            continue
        difference = (value.double() - oracle).abs().amax()
        error = float(difference / oracle.abs().amax().clamp_min(1e-30))
        error /= max(TOLERANCE[value.dtype], coarsest)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def check_op(name: str, sample: tuple[Any, ...], device: str) -> float:
    """Error of a raw op on one sample in units of the tolerance, its outputs poisoned before.

    Ops that change their arguments are compared in what they leave there.
    """
    if name == "cayley_bwd":
        # Its formula holds for rotations only; the samples are there for their shapes.
        sample = (sample[0], [rotation_like(matrix) for matrix in sample[1]])

    def moved(value: Any) -> Any:
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    def widened(value: Any) -> Any:
        is_wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(device, torch.float64, copy=True) if is_wide else moved(value)

    kept = ALWAYS_FP32.get(name, set())
    arguments = tree_map(moved, sample)
    wide = [tree_map(moved if i in kept else widened, value) for i, value in enumerate(sample)]
    with poisoned_memory():
        outputs = getattr(torch.ops.spectral, name)(*arguments)
    expected = OPS[name].reference(*wide)
    if outputs is None:
        outputs, expected = arguments, wide
    actual, oracle = _tensors(outputs), _tensors(expected)
    # Mixed arguments: what comes out is no more precise than any that went in.
    coarsest = max((TOLERANCE.get(tensor.dtype, 0.0) for tensor in _tensors(sample)), default=0.0)
    return disagreement(actual, oracle, coarsest)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def rotation_like(matrix: Tensor) -> Tensor:
    """Some rotations [..., n, n] made of any matrices of that shape."""
    skew = (matrix - matrix.mT).double() / 2
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(identity - skew, identity + skew).to(matrix.dtype)


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


def kernels(device: str, smoke: bool) -> Iterator[Entry]:
    """What is timed: the published presets, the balanced factors of common widths, both dtypes."""
    if smoke:
        for entry in (
            rotate_entry(9, (6, 8, 16), torch.bfloat16, device),
            gram_entry(9, (6, 8, 16), torch.float32, device),
        ):
            del entry.providers["reference compiled"]
            yield entry
        return
    for make in (rotate_entry, gram_entry):
        for rows in (308, 8192):
            for dims in ((8, 8, 10), (6, 8, 16), (32, 40), (4, 8, 64), (64, 64)):
                yield make(rows, dims, torch.bfloat16, device)
        yield make(8192, (32, 40), torch.float32, device)
        yield make(8192, (16, 16, 16), torch.bfloat16, device)
        yield make(1024, (128, 128), torch.bfloat16, device)


#: What is timed as a CUDA graph too; what waits for the device cannot be recorded.
SODA_GRAPHS = (
    *("ours auto", "ours factored", "ours merged", "ours tokens", *PLAIN),
    *("PEFT LoRA r=8", "PEFT OFT b=32", "GEMMs factored", "GEMMs merged", "frozen linear"),
)

Steps = Iterator[tuple[dict[str, Callable[[Any], Any]], Any]]


def soda_linear(device: str, smoke: bool) -> Steps:
    """Training steps of one layer."""
    cases = [
        *(SODACase(1280, tokens, device, "bfloat16") for tokens in (77, 256, 1024, 4096)),
        # Only there to be compared with the CPU.
        SODACase(1280, 4096, device),
        *(SODACase(2048, tokens, device, "bfloat16") for tokens in (1024, 4096, 8192)),
        SODACase(640, 4096, device, "bfloat16"),
    ]
    graphs = {name: SODA_PROVIDERS[name] for name in SODA_GRAPHS}
    for case in [SODACase(32, 16, device, "bfloat16")] if smoke else cases:
        yield SODA_PROVIDERS | in_cuda_graphs(graphs), case


def low_rank(device: str, smoke: bool) -> Steps:
    """Training steps of Spectral Adapters A and R."""
    sizes = [(32, 8)] if smoke else [(n, m) for n in (640, 1280, 2048) for m in (77, 1024, 4096)]
    for n, tokens in sizes:
        providers = LOW_RANK_PROVIDERS
        yield providers | in_cuda_graphs(providers), LowRankCase(n, tokens, device, "bfloat16")


def cayley(device: str, smoke: bool) -> Steps:
    """Batches of one size."""
    for count, n in [(3, 8)] if smoke else ((48, 32), (48, 40), (96, 64), (24, 128)):
        yield CAYLEY_PROVIDERS, CayleyCase(count, n, True, device)


def cayley_model(device: str, smoke: bool) -> Steps:
    """All rotations of an SDXL adapter."""
    from cayley_model import CAYLEY_MODEL_PROVIDERS, CayleyModelCase

    for preset in ("toy",) if smoke else ("published", "balanced"):
        yield CAYLEY_MODEL_PROVIDERS, CayleyModelCase(preset, device)


def stiefel(device: str, smoke: bool) -> Steps:
    """Optimizer steps of all factors of an SDXL adapter."""
    from stiefel_providers import SDXL, STIEFEL_PROVIDERS, StiefelCase

    graphs = {name: STIEFEL_PROVIDERS[name] for name in ("ours", "copies")}
    providers = STIEFEL_PROVIDERS | in_cuda_graphs(graphs)
    yield providers, StiefelCase(((2, 4), (1, 3)) if smoke else SDXL, device)


def unet_step(device: str, smoke: bool) -> Steps:
    """Training steps of whole UNets."""
    from unet_providers import UNET_GRAPHS, UNET_PROVIDERS, UNetCase

    providers = UNET_PROVIDERS | in_cuda_graphs(UNET_GRAPHS)
    if smoke:
        yield providers, UNetCase("toy", 4, device)
        return
    yield providers, UNetCase("sd15", 64, device, "bfloat16", batch=4)
    yield providers, UNetCase("sdxl", 128, device, "bfloat16")


STEPS: dict[str, Callable[[str, bool], Steps]] = {
    "unet_step": unet_step,
    "soda_linear": soda_linear,
    "cayley_model": cayley_model,
    "stiefel": stiefel,
    "low_rank": low_rank,
    "cayley": cayley,
}

#: Sections in the order they run, what matters most first, and their limits in seconds.
SECTIONS = {
    "ops": 60,
    "unet_step": 300,
    "soda_linear": 120,
    "cayley_model": 60,
    "stiefel": 30,
    "low_rank": 40,
    "cayley": 40,
    "kernels": 150,
}

Document = dict[str, Any]


def run_section(name: str, arguments: argparse.Namespace, document: Document) -> Iterator[None]:
    """Measure one section into ``document``; yields whenever there is something more in it."""
    device, smoke = arguments.device, arguments.smoke
    if name == "ops":
        for op, samples in op_samples().items():
            for number, sample in enumerate(samples):
                error = check_op(op, sample, device)
                problem = f"wrong: {error:.1f} times the tolerance" if error > 1 else ""
                row = {"error": error, "problem": problem}
                document["ops"][f"{op} sample {number}"] = {"op": row}
        yield
        return
    if name == "kernels":
        for entry in kernels(device, smoke):
            timings = run_entry(entry, device, 2 if smoke else ROUNDS)
            rows = {provider: timing.record() for provider, timing in timings.items()}
            document["kernels"][str(entry)] = rows
            yield
            torch.compiler.reset()
        return
    for providers, case in STEPS[name](device, smoke):
        chosen = {
            provider: make
            for provider, make in providers.items()
            if not (smoke and "compiled" in provider) and (smoke or provider not in SKIPPED)
        }
        results = measure(case, chosen, 0.0 if smoke else arguments.seconds)
        document["entries"].append(report.describe(name, case, results))
        yield
        torch.compiler.reset()


def op_samples() -> dict[str, list[tuple[Any, ...]]]:
    """Fresh random arguments for every op, hostile ones included: those of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    print(f"seed of the samples: {torch.seed()}")
    from test_ops import SAMPLES

    return SAMPLES


def section_by_itself(name: str, arguments: argparse.Namespace) -> Document:
    """One section in this process; a failure is noted and ends it."""
    document: Document = {"entries": [], "kernels": {}, "ops": {}, "sections": {name: "ok"}}
    try:
        for _ in run_section(name, arguments, document):
            keep(document, arguments.part)
    except Unavailable as reason:
        document["sections"][name] = f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc()
        document["sections"][name] = f"failed: {type(error).__name__}: {error}"
    keep(document, arguments.part)
    return document


def keep(document: Document, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(document))


def section_in_a_process(name: str, arguments: argparse.Namespace, limit: float) -> Document:
    """One section in a process of its own, and what it had when it ended, however it did."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--only", name, "--part", str(part)]
        command += ["--device", arguments.device, "--seconds", str(arguments.seconds)]
        command += ["--smoke"] * arguments.smoke + ["--wide-tiles"] * arguments.wide_tiles
        try:
            status = subprocess.run(command, timeout=limit, check=False).returncode
            ending = f"failed: the process ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            ending = f"failed: out of time after {limit:.0f} s"
        document: Document = {"entries": [], "kernels": {}, "ops": {}, "sections": {}}
        if part.exists():
            document |= json.loads(part.read_text())
        if ending:
            document["sections"][name] = ending
        return document


def table(document: Document) -> str:
    """Everything as one table: medians, and the ratio to the first provider of a case."""
    lines = [f"{'case':<44} {'provider':<30} {'median us':>12} {'20 % .. 80 %':>24} {'ratio':>8}"]
    cases: dict[str, dict[str, Any]] = dict(document["kernels"])
    for entry in document["entries"]:
        cases[f"{entry['entry']} {entry['name']}"] = entry["providers"]
    for case, rows in cases.items():
        first = _microseconds(next(iter(rows.values())))
        for name, row in rows.items():
            times = _microseconds(row)
            if times is None:
                lines.append(f"{case:<44} {name:<30} {row['problem']}")
                continue
            low, middle, high = times
            ratio = f"{middle / first[1]:.2f}" if first else ""
            spread = f"{low:.1f} .. {high:.1f}"
            lines.append(f"{case:<44} {name:<30} {middle:12.1f} {spread:>24} {ratio:>8}")
    wrong = [name for name, rows in document["ops"].items() if rows["op"]["problem"]]
    checked = f"{len(document['ops'])} samples of raw ops against float64, {len(wrong)} wrong"
    return "\n".join([*lines, "", checked, *wrong])


def _microseconds(row: dict[str, Any]) -> tuple[float, float, float] | None:
    """20th, 50th and 80th percentile."""
    if "milliseconds" in row:
        times, unit = row["milliseconds"], 1e3
    elif "seconds" in row:
        times, unit = row["seconds"], 1e6
    else:
        return None
    return times["20"] * unit, times["50"] * unit, times["80"] * unit


def wrong_ones(document: Document) -> list[str]:
    """Whatever disagrees with float64 or the oracle of its case."""
    cases = {**document["kernels"], **document["ops"]}
    cases |= {f"{e['entry']} {e['name']}": e["providers"] for e in document["entries"]}
    return [
        f"{case}: {name}: {row['problem']}"
        for case, rows in cases.items()
        for name, row in rows.items()
        if row.get("problem", "").startswith(WRONG)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="folder for the JSON file; none without it")
    parser.add_argument("--smoke", action="store_true", help="one tiny shape of each, one process")
    parser.add_argument("--seconds", type=float, default=1.5, help="time per case of whole steps")
    parser.add_argument("--minutes", type=float, default=6.0, help="time of all sections together")
    parser.add_argument(
        "--wide-tiles", action="store_true", help="layers use them: see docs/kernels.md"
    )
    parser.add_argument("--only", choices=SECTIONS, help="one section, in this process")
    parser.add_argument("--part", type=Path, help="where --only keeps its numbers")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    torch.manual_seed(0)
    if arguments.wide_tiles:
        from spectral_kernels import _C

        _C._use_wide_tiles(True)
    if arguments.only:
        section_by_itself(arguments.only, arguments)
        return 0

    conditions = report.conditions()
    print(json.dumps(conditions))
    document: Document = {"entries": [], "kernels": {}, "ops": {}, "sections": {}}
    end = time.monotonic() + 60 * arguments.minutes
    path: Path | None = None
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        device = conditions["machine"].get("gpu", "cpu") if arguments.device == "cuda" else "cpu"
        path = arguments.output / f"gpu_bench_{report.slug(device)}.json"
    for name, limit in SECTIONS.items():
        left = end - time.monotonic()
        if arguments.smoke:
            part = section_by_itself(name, arguments)
        elif left < 1:
            part = {"sections": {name: "failed: no time left"}}
        else:
            part = section_in_a_process(name, arguments, min(limit, left))
        print(f"{name}: {part['sections'].get(name)}", flush=True)
        for key, found in part.items():
            document[key] = document[key] + found if key == "entries" else document[key] | found
        if path is not None:  # now: whoever started this may end it at any time
            wide = {"wide_tiles": True} if arguments.wide_tiles else {}
            so_far = {"date": report.now(), **conditions, **wide, **document}
            path.write_text(json.dumps(so_far, indent=1) + "\n")

    print(f"\n{table(document)}\n")
    verdicts = report.verdicts_of(document["entries"])
    if verdicts:
        print(f"targets: {report.targets(verdicts)}")
    if path is not None:
        print(f"written to {path}")
    bad = [f"WRONG {line}" for line in wrong_ones(document)]
    bad += [f"{name} {state}" for name, state in document["sections"].items() if "failed" in state]
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
