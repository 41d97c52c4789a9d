"""Compiling the kernels for a GPU that is not here, and reading what they need from the cubin.

Used by the compile tests and by ``benchmarks/kernel_report.py``. Must not run under
``TRITON_INTERPRET=1``, where ``triton.jit`` makes no compilable function.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectral_kernels.triton_kernels._launch import (
    Launch,
    TileLaunch,
    plan_gram,
    plan_low_rank,
    plan_rotate,
    plan_stiefel,
    plan_turn,
)
from spectral_kernels.triton_kernels.kron_gram import _kron_gram_kernel
from spectral_kernels.triton_kernels.kron_rotate import (
    _kron_rotate_axis_kernel,
    _kron_rotate_tile_kernel,
)
from spectral_kernels.triton_kernels.low_rank import _low_rank_add_kernel, _turn_thin_kernel
from spectral_kernels.triton_kernels.stiefel import _stiefel_kernel, rule_constants

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}

# Kernel arguments that are numbers; all others are pointers or constexpr.
_SCALARS = {"m": "i32", "n": "i32", "share": "i32", "outer": "i32", "scaling": "fp32"} | {
    f"{name}_stride_{axis}": "i32" for name in ("up", "shift") for axis in "nq"
}
_STIEFEL_NUMBERS = (
    "gradient", "keep", "mix", "keep_square", "mix_square", "log_beta1", "log_beta2", "eps",
    "rate", "bound",
)  # fmt: skip
_TYPES = {**_SCALARS, **dict.fromkeys(_STIEFEL_NUMBERS, "fp32"), "table_ptr": "*i64"}

# Lists of matrices that the op of this name takes.
_STIEFEL_LISTS = {"stiefel_sgd": 3, "stiefel_adam": 4}


@dataclass(frozen=True)
class Variant:
    """One kernel as the host function would launch it for ``dims``, ``dtype`` and these options.

    ``low_rank_add`` and ``turn_thin`` have one dimension, r; ``scales`` is for the former the
    mixing of Spectral Adapter A.
    """

    op: str
    dims: tuple[int, ...]
    dtype: torch.dtype
    transpose: bool = False
    scales: bool = False

    def __str__(self) -> str:
        flags = ["transposed"] * self.transpose + ["scaled"] * self.scales
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([self.op, "x".join(map(str, self.dims)), dtype, *flags])


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: 32-bit registers per thread, bytes of stack per thread and of shared
    memory per program. A stack means that registers were spilled."""

    kernel: str
    launch: Launch
    registers: int
    stack: int
    shared: int


def compile_variant(variant: Variant, capability: int) -> Iterator[Resources]:
    """Compile every kernel of ``variant`` for compute capability ``capability``, e.g. 90."""
    if variant.op == "kron_gram":
        plan = plan_gram(variant.dims)
        if plan is None:
            raise ValueError(f"kron_gram has no kernel for {variant.dims}")
        dtypes = {"a_ptr": variant.dtype, "b_ptr": variant.dtype}
        absent = [] if variant.scales else ["scale_ptr"]
        yield _compile(_kron_gram_kernel, plan, plan.constants(), dtypes, absent, capability)
        return
    if variant.op in _STIEFEL_LISTS:
        stiefel = plan_stiefel(variant.dims[0])
        constants = {**rule_constants(_STIEFEL_LISTS[variant.op]), **stiefel.constants()}
        yield _compile(_stiefel_kernel, stiefel, constants, {}, [], capability)
        return
    if variant.op in ("low_rank_add", "turn_thin"):
        yield _compile_low_rank(variant, capability)
        return
    passes = plan_rotate(variant.dims).passes
    last = len(passes) - 1
    for index, launch in enumerate(passes):
        dtypes = {
            "x_ptr": variant.dtype if index == 0 else torch.float32,
            "y_ptr": variant.dtype if index == last else torch.float32,
        }
        absent = [] if variant.scales and index == 0 else ["before_ptr"]
        absent += [] if variant.scales and index == last else ["after_ptr"]
        constants = {**launch.constants(), "TRANSPOSE": variant.transpose}
        kernel = _kron_rotate_axis_kernel
        if isinstance(launch, TileLaunch):
            kernel = _kron_rotate_tile_kernel
            absent += ["r3_ptr"] if launch.padded[2] == 1 else []
        yield _compile(kernel, launch, constants, dtypes, absent, capability)


def _compile_low_rank(variant: Variant, capability: int) -> Resources:
    (r,) = variant.dims
    if variant.op == "turn_thin":
        turn = plan_turn(r)
        constants = {**turn.constants(), "TRANSPOSE": variant.transpose}
        dtypes = dict.fromkeys(("thin_ptr", "turned_ptr"), variant.dtype)
        return _compile(_turn_thin_kernel, turn, constants, dtypes, [], capability)
    launch = plan_low_rank(r)
    dtypes = dict.fromkeys(("base_ptr", "thin_ptr", "mixed_ptr", "y_ptr"), variant.dtype)
    absent = [] if variant.scales else ["shift_ptr", "scale_ptr", "mixed_ptr"]
    return _compile(_low_rank_add_kernel, launch, launch.constants(), dtypes, absent, capability)


def _compile(
    kernel: Any,
    launch: Launch,
    constants: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    absent: list[str],
    capability: int,
) -> Resources:
    constants = {**constants, **dict.fromkeys(absent)}
    signature = {
        name: "constexpr"
        if name in constants
        else _TYPES.get(name) or POINTERS[dtypes.get(name, torch.float32)]
        for name in kernel.arg_names
    }
    # PyTorch's allocator aligns to 512 bytes, and a launch specialises on 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options(),
    )
    usage = _cubin_usage(compiled.asm["cubin"])
    return Resources(
        kernel.__name__,
        launch,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared,
    )


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """Numbers that ``cuobjdump --dump-resource-usage`` prints, by name."""
    tool = Path(triton.backends.nvidia.__path__[0], "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
