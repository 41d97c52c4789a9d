"""Registers, stack and shared memory of every Triton kernel variant, compiled without a GPU.

    python benchmarks/kernel_report.py                      # all three architectures, minutes
    python benchmarks/kernel_report.py --capabilities 90 --json report.json

One line per op, factor sizes and kernel: the largest value over data types, transposition and
scales. Exits with 1 if any variant spills. Compiled kernels stay in Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import triton

from spectral_kernels.triton_kernels._offline import Resources, Variant, compile_variant

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One of every row of the launch tables at least, published presets, and sizes that need masks.
ROTATE = (
    (16,), (32,), (64,), (128,), (8, 8, 10), (6, 8, 16), (4, 16, 20), (4, 8, 64), (32, 40),
    (64, 64), (96, 100), (128, 128), (16, 16, 16), (20, 20, 20), (32, 32, 32), (8, 256),
)  # fmt: skip
GRAM = (
    (16,), (32,), (128,), (8, 8, 10), (6, 8, 16), (4, 16, 20), (4, 8, 64), (32, 40), (64, 33),
    (64, 64), (100, 7), (96, 100), (128, 128), (16, 16, 16), (13, 17, 11), (20, 20, 20),
    (16, 16, 32), (32, 32, 32), (31, 29, 30),
)  # fmt: skip
STIEFEL = ((16,), (64,), (128,))
RANKS = ((1,), (2,), (4,), (5,), (8,), (16,), (32,), (50,), (64,))


def variants() -> list[Variant]:
    """Every factor sizes or rank, data type and option of each kernel."""
    rotate = itertools.product(["kron_rotate"], ROTATE, DTYPES, [False, True], [False, True])
    gram = itertools.product(["kron_gram"], GRAM, DTYPES, [False], [False, True])
    stiefel = itertools.product(["stiefel_adam", "stiefel_sgd"], STIEFEL, [torch.float32])
    add = itertools.product(["low_rank_add"], RANKS, DTYPES, [False], [False, True])
    turn = itertools.product(["turn_thin"], RANKS, DTYPES, [False, True], [False])
    return [Variant(*case) for case in (*rotate, *gram, *stiefel, *add, *turn)]


def launch_text(used: Resources) -> str:
    """What one program takes on, without the sizes the first column already says."""
    launch = used.launch
    hidden = {"sizes", "padded", "groups", "lead", "n", "inner", "r"}
    hidden |= {"num_warps", "num_stages", "max_registers"}
    shown = [f"{key} {value}" for key, value in vars(launch).items() if key not in hidden]
    return ", ".join([*shown, f"warps {launch.num_warps}", f"stages {launch.num_stages}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--json", type=Path, help="write every variant's numbers to this file")
    arguments = parser.parse_args()

    rows: dict[tuple[str, str, str], dict[int, list[Resources]]] = defaultdict(
        lambda: defaultdict(list)
    )
    records = []
    for capability, variant in itertools.product(arguments.capabilities, variants()):
        for used in compile_variant(variant, capability):
            sizes = "x".join(map(str, variant.dims))
            kernel = used.kernel.removeprefix("_").removesuffix("_kernel")
            rows[sizes, kernel, launch_text(used)][capability].append(used)
            records.append(
                {
                    "variant": str(variant),
                    "kernel": kernel,
                    "capability": capability,
                    "registers": used.registers,
                    "stack": used.stack,
                    "shared": used.shared,
                }
            )

    print(f"triton {triton.__version__}: most registers / stack bytes / shared bytes by sm_")
    heads = " | ".join(f"sm_{capability}" for capability in arguments.capabilities)
    print(f"\n| factors | kernel | launch | {heads} |")
    print("|---" * (3 + len(arguments.capabilities)) + "|")
    for (sizes, kernel, launch), by_capability in rows.items():
        cells = [
            " / ".join(
                str(max(getattr(used, field) for used in by_capability[capability]))
                for field in ("registers", "stack", "shared")
            )
            for capability in arguments.capabilities
        ]
        print(f"| {sizes} | {kernel} | {launch} | {' | '.join(cells)} |")

    spilled = [record for record in records if record["stack"]]
    print(f"\n{len(records)} kernels compiled, {len(spilled)} spill")
    for record in spilled:
        print(f"  {record['variant']} sm_{record['capability']}: {record['stack']} bytes of stack")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "kernels": records}, indent=1) + "\n"
        )
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
