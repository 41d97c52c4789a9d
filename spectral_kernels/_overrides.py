"""Loading what overrides the references: the compiled extension and the Triton kernels.

Each loader records in one sentence what it found, so that ``backend_report`` can tell; nothing is
retried and nothing falls back in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from spectral_kernels.ops import LIBRARY
from spectral_kernels.ops._registry import NAMESPACE


@dataclass(frozen=True)
class Override:
    """One optional part: whether it is in use, why, and what it says of its build."""

    loaded: bool
    reason: str
    build: dict[str, Any]


STATUS: dict[str, Override] = {}

#: Ops that Triton runs on CUDA.
TRITON_OPS: list[str] = []


def load_overrides() -> None:
    """Load the extension and register Triton once; later calls do nothing."""
    if not STATUS:
        STATUS["extension"] = _load_extension()
        STATUS["triton"] = _register_triton()


def _load_extension() -> Override:
    if importlib.util.find_spec("spectral_kernels._C") is None:
        return Override(
            False,
            "spectral_kernels._C was not built: no compiler, no torch at build time, "
            "or SPECTRAL_BUILD_EXT=0",
            {},
        )
    try:
        extension = importlib.import_module("spectral_kernels._C")
    except ImportError as error:
        return Override(False, f"spectral_kernels._C was built but does not load: {error}", {})
    return Override(True, "spectral_kernels._C is loaded", dict(extension.build_info()))


def _register_triton() -> Override:
    if torch.version.cuda is None:
        return Override(False, "this PyTorch is built without CUDA, so Triton has no device", {})
    if importlib.util.find_spec("triton") is None:
        return Override(False, "the package triton is not installed", {})
    from spectral_kernels import triton_kernels

    # What the extension has is called from C++ and waits less for its host.
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    leave = [op for op in triton_kernels.OVERRIDDEN if has_kernel(f"{NAMESPACE}::{op}", "CUDA")]
    TRITON_OPS.extend(triton_kernels.register(LIBRARY, leave))
    return Override(True, f"Triton {version('triton')} kernels are registered for CUDA", {})
