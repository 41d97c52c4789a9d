"""``backend_report()``: which implementation each op would run here, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from spectral_kernels._overrides import STATUS, TRITON_OPS
from spectral_kernels.ops import OPS
from spectral_kernels.triton_kernels import OVERRIDDEN

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class OpBackend:
    """What runs one op on one device type: "reference", "c++", "cuda" or "triton"."""

    op: str
    device: str
    implementation: str
    reason: str


class BackendReport(Mapping[str, OpBackend]):
    """Maps each op's name to what would run on this machine's default device; prints as a table.

    ``report.rows`` holds one entry per op and device type, also for devices that are not here.
    """

    def __init__(self, rows: list[OpBackend], device: str, notes: list[str]) -> None:
        self.rows = rows
        self.device = device
        self.notes = notes
        self._here = {row.op: row for row in rows if row.device == device}

    def __getitem__(self, op: str) -> OpBackend:
        return self._here[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._here)

    def __len__(self) -> int:
        return len(self._here)

    def __str__(self) -> str:
        table = [("op", "device", "runs", "why")]
        table += [(row.op, row.device, row.implementation, row.reason) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))
            + "  "
            + line[3]
            for line in table
        ]
        return "\n".join([*lines, "", f"default device here: {self.device}", *self.notes])

    __repr__ = __str__


#: Ops whose GPU code is C++ on the host.
_PRODUCTS = ("rotated_linear", "soda_linear", "low_rank_linear", "spectral_")


def backend_report() -> BackendReport:
    """Say for every op which implementation the dispatcher would run, per device type, and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [_row(name, target) for name in OPS for target in _DISPATCH_KEYS]
    notes = [f"torch {torch.__version__}"]
    notes += [f"{part}: {override.reason}" for part, override in STATUS.items()]
    build = STATUS["extension"].build
    if build:
        notes.append("extension build: " + ", ".join(f"{k}={v}" for k, v in build.items()))
    return BackendReport(rows, device, notes)


def _row(name: str, device: str) -> OpBackend:
    qualified = OPS[name].qualified_name
    if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, _DISPATCH_KEYS[device]):
        if device == "cuda" and name in TRITON_OPS:
            return OpBackend(name, device, "triton", f"registered; {OVERRIDDEN[name]}")
        if device == "cuda" and name.startswith(_PRODUCTS):
            return OpBackend(name, device, "c++", "PyTorch's products, called from C++")
        implementation = "c++" if device == "cpu" else "cuda"
        return OpBackend(name, device, implementation, "compiled into spectral_kernels._C")
    return OpBackend(name, device, "reference", _why_reference(name, device))


def _why_reference(name: str, device: str) -> str:
    if device == "cuda" and name in OVERRIDDEN:
        return STATUS["triton"].reason
    extension = STATUS["extension"]
    if not extension.loaded:
        return extension.reason
    return f"the extension was built without {device.upper()} code for this op"
