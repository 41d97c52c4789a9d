"""Bytes that adapted models keep and exchange on several GPUs, by formulas.

``python benchmarks/scaling_plan.py`` prints the plan for a transformer of 12 billion parameters;
``--write-docs`` puts it into ``docs/scaling.md``. Nothing here is measured.
``tests/test_scaling.py`` holds the formulas against the bytes of real models and real collective
calls in two processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectral_adapters.factors import balanced_factors

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
START = "<!-- computed: python benchmarks/scaling_plan.py --write-docs -->"
END = "<!-- end of what is computed -->"

FP32, BF16 = 4, 2
#: Bytes per trained number beside itself: an fp32 gradient and AdamW's two moments.
GRADIENT, MOMENTS = 4, 8
GPU = 80e9


@dataclass(frozen=True)
class Stored:
    """A tensor of the model.

    Attributes:
        shape: whole.
        itemsize: bytes of a number.
        kind: "base", "factors" or "trained".
        at_root: gathered once per step, for the rotation bank.
        gathered: bytes of a number as it is sent, where that differs.
    """

    shape: tuple[int, ...]
    itemsize: int
    kind: str
    at_root: bool = False
    gathered: int | None = None

    def bytes(self, ranks: int = 1) -> int:
        """Of the largest shard: dimension 0 is cut into as equal parts as there are ranks."""
        return math.ceil(self.shape[0] / ranks) * math.prod(self.shape[1:]) * self.itemsize

    def sent(self, ranks: int) -> int:
        """Bytes of the whole tensor in a collective call, padded to equal shards."""
        size = self.itemsize if self.gathered is None else self.gathered
        return ranks * self.bytes(ranks) // self.itemsize * size


def adapter(method: str, rows: int, columns: int, *, basis: int = BF16, r: int = 16):
    """What a method adds to a weight [rows, columns], as tensors.

    Args:
        method: "SODA" (svd, left, balanced factors), "Spectral Adapter A", "Spectral Adapter R",
            "LoRA"; "none" adds nothing.
        basis: bytes of a number of SODA's frozen U and V.
        r: rank of the others.
    """
    k = min(rows, columns)
    if method == "SODA":
        packed = [(n * (n - 1) // 2,) for n in balanced_factors(k) if n > 1]
        yield from (Stored(s, size, "factors") for s, size in _svd(rows, columns, k, basis))
        yield from (Stored(shape, FP32, "trained", at_root=True) for shape in ((k,), *packed))
    elif method in ("Spectral Adapter A", "Spectral Adapter R"):
        yield from (Stored(s, size, "factors") for s, size in _svd(rows, columns, r, FP32))
        if method == "Spectral Adapter A":
            yield from (Stored((size, r), FP32, "trained") for size in (rows, columns))
        else:
            yield from (Stored((r * (r - 1) // 2,), FP32, "trained", at_root=True),) * 2
    elif method == "LoRA":
        yield from (Stored(shape, FP32, "trained") for shape in ((r, columns), (rows, r)))
    elif method != "none":
        raise ValueError(f"method must be one that has a formula; got {method!r}")


def _svd(rows: int, columns: int, k: int, size: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    return ((rows, k), size), ((k,), FP32), ((k, columns), size)


def stored(tensors: Iterable[Stored], ranks: int = 1) -> dict[str, int]:
    """Bytes on one rank by kind; "states" are gradients and AdamW's moments."""
    found = {"base": 0, "factors": 0, "trained": 0, "states": 0}
    for tensor in tensors:
        size = tensor.bytes(ranks)
        found[tensor.kind] += size
        if tensor.kind == "trained":
            found["states"] += size // tensor.itemsize * (GRADIENT + MOMENTS)
    return found


def all_reduce(tensors: Iterable[Stored]) -> int:
    """Bytes that DDP reduces per step: the gradients of what is trained."""
    return sum(t.bytes() for t in tensors if t.kind == "trained")


def all_gather(units: Sequence[Sequence[Stored]], root: Sequence[Stored], ranks: int) -> int:
    """Bytes that FSDP2 gathers per step: each unit forward and backward, the root's once."""
    once = [*root, *(t for unit in units for t in unit if t.at_root)]
    twice = [t for unit in units for t in unit if not t.at_root]
    return sum(t.sent(ranks) for t in once) + 2 * sum(t.sent(ranks) for t in twice)


def reduce_scatter(tensors: Iterable[Stored], ranks: int) -> int:
    """Bytes that FSDP2 reduces per step."""
    return sum(
        ranks * t.bytes(ranks) // t.itemsize * GRADIENT for t in tensors if t.kind == "trained"
    )


# ---- a transformer of 12 billion parameters


@dataclass(frozen=True)
class Weight:
    """``count`` weights [rows, columns] in each block."""

    name: str
    rows: int
    columns: int
    count: int
    adapted: bool = True


D = 3072
BLOCKS: dict[str, tuple[int, tuple[Weight, ...]]] = {
    "double block": (
        19,
        (
            Weight("query, key, value, output of two streams", D, D, 8),
            Weight("MLP up of two streams", 4 * D, D, 2),
            Weight("MLP down of two streams", D, 4 * D, 2),
            Weight("modulation of two streams", 6 * D, D, 2, adapted=False),
        ),
    ),
    "single block": (
        38,
        (
            Weight("query, key, value", D, D, 3),
            Weight("MLP up", 4 * D, D, 1),
            Weight("output", D, 5 * D, 1),
            Weight("modulation", 3 * D, D, 1, adapted=False),
        ),
    ),
}
ROOT = (
    Weight("context embedding", D, 4096, 1, adapted=False),
    Weight("time, guidance, pooled text: second layers", D, D, 3, adapted=False),
    Weight("time, guidance: first layers", D, 256, 2, adapted=False),
    Weight("pooled text: first layer", D, 768, 1, adapted=False),
    Weight("latent embedding and output", D, 64, 2, adapted=False),
    Weight("output modulation", 2 * D, D, 1, adapted=False),
)

METHODS = ("SODA", "SODA, stand-alone", "Spectral Adapter A", "Spectral Adapter R", "LoRA", "full")
LABELS = {
    "SODA": "SODA, PEFT",
    "Spectral Adapter A": "A, r = 16",
    "Spectral Adapter R": "R, r = 16",
    "LoRA": "LoRA, r = 16",
    "full": "full fine-tuning",
}


def tensors_of(weights: Iterable[Weight], method: str) -> list[Stored]:
    """The tensors of weights in bf16 with a method."""
    found = []
    for weight in weights:
        base = Stored((weight.rows, weight.columns), BF16, "base")
        if method == "full":
            # Trained in fp32, sent in bf16 (MixedPrecisionPolicy(bf16, reduce_dtype=fp32)).
            base = replace(base, itemsize=FP32, kind="trained", gathered=BF16)
        name, alone = method.removesuffix(", stand-alone"), method.endswith("stand-alone")
        added = [] if method == "full" else list(adapter(name, weight.rows, weight.columns))
        here = [base] if not weight.adapted else [*([] if alone else [base]), *added]
        found += here * weight.count
    return found


def model(method: str) -> tuple[list[list[Stored]], list[Stored]]:
    """(units, root) of the transformer with a method."""
    units = [
        tensors_of(weights, method) for count, weights in BLOCKS.values() for _ in range(count)
    ]
    return units, tensors_of(ROOT, method)


def seconds_of_svd(rows: int, columns: int) -> float:
    """Of one float64 SVD by the Gram matrix on one core: a n^3 + b m n^2, n the smaller side.

    a and b are those of 640 x 640 (0.079 s) and 5120 x 640 (0.239 s) in docs/cache.md; they give
    2.6 s for 2048 x 2048, where 2.81 was measured, and 0.13 s for 640 x 2048, measured 0.129.
    """
    n, m = sorted((rows, columns))
    b = (0.239 - 0.079) / ((5120 - 640) * 640**2)
    a = 0.079 / 640**3 - b
    return a * n**3 + b * m * n**2


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bytes(count: float) -> str:
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s)
    return f"{count / size:.3g} {unit}"


def _shapes() -> str:
    rows, total, adapted = [], 0, 0
    parts = [*((f"{n} {name}s", n, w) for name, (n, w) in BLOCKS.items()), ("the rest", 1, ROOT)]
    for where, blocks, weights in parts:
        for weight in weights:
            count = blocks * weight.count
            numbers = count * weight.rows * weight.columns
            total += numbers
            adapted += numbers if weight.adapted else 0
            mark = "yes" if weight.adapted else ""
            shape = f"{weight.rows} x {weight.columns}"
            rows.append([where, weight.name, shape, str(count), f"{numbers / 1e6:,.0f} M", mark])
    rows.append(["sum", "", "", "", f"{total / 1e6:,.0f} M", f"{adapted / 1e6:,.0f} M"])
    return _table(["where", "weights", "shape", "number", "numbers", "adapted"], rows)


def _memory() -> str:
    rows = []
    for method in METHODS:
        units, root = model(method)
        everything = [*root, *(t for unit in units for t in unit)]
        whole = stored(everything)
        numbers = all_reduce(everything) // FP32
        # DDP's buckets are the gradients (gradient_as_bucket_view=True).
        cells = [LABELS.get(method, method), f"{numbers / 1e6:,.2f} M"]
        cells += [_bytes(whole[kind]) if whole[kind] else "0" for kind in ("base", "factors")]
        cells += [_bytes(whole["trained"] + whole["states"]), _fits(sum(whole.values()))]
        for ranks in (8, 64):
            shard = sum(stored(everything, ranks).values())
            # FSDP2 gathers the next unit while one computes.
            largest = sorted(sum(t.sent(1) for t in unit if not t.at_root) for unit in units)[-2:]
            banked = sum(t.sent(1) for unit in units for t in unit if t.at_root)
            gradients = max(
                sum(t.bytes() for t in unit if t.kind == "trained" and not t.at_root)
                for unit in units
            )
            there = sum(largest) + sum(t.sent(1) for t in root) + 2 * banked + gradients
            cells.append(f"{_bytes(shard)} + {_bytes(there)}")
        rows.append(cells)
    head = ["method", "trained", "base", "factors", "trained, gradients, AdamW", "DDP, per rank"]
    return _table([*head, "FSDP2 on 8", "FSDP2 on 64"], rows)


def _fits(count: float) -> str:
    return _bytes(count) + ("" if count < GPU else ", does not fit")


def _traffic() -> str:
    rows = []
    for method in METHODS:
        units, root = model(method)
        everything = [*root, *(t for unit in units for t in unit)]
        cells = [LABELS.get(method, method)]
        for ranks in (8, 64):
            part = (ranks - 1) / ranks
            cells.append(_bytes(2 * part * all_reduce(everything)))
            gathered = part * all_gather(units, root, ranks)
            cells.append(f"{_bytes(gathered)} + {_bytes(part * reduce_scatter(everything, ranks))}")
        # Within a node of 8 as on 8; between 8 nodes each rank reduces its eighth.
        across = 2 * 7 / 8 * reduce_scatter(everything, 8) / 8
        cells.append(_bytes(across))
        rows.append(cells)
    return _table(
        ["method", "DDP, 8", "FSDP2, 8", "DDP, 64", "FSDP2, 64", "8 x 8, between nodes"], rows
    )


def _start() -> str:
    shapes = [
        (w.rows, w.columns, blocks * w.count)
        for blocks, weights in BLOCKS.values()
        for w in weights
        if w.adapted
    ]
    total = sum(seconds_of_svd(rows, columns) * count for rows, columns, count in shapes)
    slowest = max(seconds_of_svd(rows, columns) for rows, columns, _ in shapes)
    units, _ = model("SODA")
    factors = stored(t for unit in units for t in unit)["factors"]
    matrices = sum(count for _, _, count in shapes)
    rows = [
        # However many cores there are, a matrix is decomposed by one.
        [str(n), f"{matrices / n:.0f}"]
        + [f"{max(total / n / cores, slowest) / 60:.1f}" for cores in (1, 8)]
        for n in (1, 8, 64)
    ]
    head = ["ranks", "matrices per rank", "minutes with 1 core per rank", "with 8 cores per rank"]
    return (
        _table(head, rows)
        + f"\n\n{matrices} matrices, {total / 3600:.2f} core hours; one takes {slowest:.0f} s at "
        f"most. Each rank then receives what the others made, up to {_bytes(factors)} over gloo."
    )


def render() -> str:
    """All tables."""
    return "\n\n".join(
        (
            "**Shapes** (bf16, biases and norms left out):",
            _shapes(),
            "**Memory per rank**, without activations. FSDP2: shards + what is gathered at a time "
            "(two blocks, the root's weights, the rotations with their gradients):",
            _memory(),
            "**Bytes that each rank sends per step**, with ring algorithms: all-reduce (DDP); "
            "all-gather + reduce-scatter (FSDP2):",
            _traffic(),
            "**Start-up of SODA on an empty cache**, extrapolated:",
            _start(),
        )
    )


def write_docs(page: Path = PAGE) -> None:
    """Replace the computed part of the page."""
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have the lines {START!r} and {END!r} once each")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n\n{render()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-docs"]:
        write_docs()
    else:
        print(render())
