"""Builds the extension ``spectral_kernels._C``; pyproject.toml owns everything else.

``SPECTRAL_BUILD_EXT`` says what to build:

* ``auto`` (default): CUDA and CPU code if torch is a CUDA build and an nvcc of the same major
  version is there, else CPU code if a C++ compiler is there, else nothing. A failed compilation
  falls back to the next of these and the installation goes on: every op has a reference in plain
  PyTorch. Neither a GPU nor CUDA is needed on the build host.
* ``0``: nothing. ``cpu``, ``cuda``: that, or an error.

The extension must be compiled against the torch that it will run with. An isolated build (plain
``pip install .``) hides the environment's packages, so its torch is looked up where it is
installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

REQUESTS = ("auto", "0", "cpu", "cuda")
# The first to know license expressions. A new virtual environment of Python 3.11 has an older one,
# and without build isolation nothing else checks build-system.requires.
MINIMUM_SETUPTOOLS = 77
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
CPU_SOURCES = (
    "csrc/bindings.cpp",
    "csrc/cayley_cpu.cpp",
    "csrc/kron_cpu.cpp",
    "csrc/kron_products.cpp",
    "csrc/layer_nodes.cpp",
    "csrc/low_rank_cpu.cpp",
    "csrc/low_rank_products.cpp",
    "csrc/rotated_linear_cpu.cpp",
    "csrc/rotated_linear_products.cpp",
    "csrc/simd_avx2.cpp",
    "csrc/simd_avx512.cpp",
    "csrc/simd_baseline.cpp",
    "csrc/simd_level.cpp",
    "csrc/stiefel_cpu.cpp",
    "csrc/stiefel_table.cpp",
)
CUDA_SOURCES = (
    "csrc/cayley_cuda.cu",
    "csrc/cayley_cuda_binding.cpp",
    "csrc/kron_gram_cuda.cu",
    "csrc/kron_rotate_cuda.cu",
    "csrc/kron_tensor_core_binding.cpp",
    "csrc/low_rank_cuda.cu",
    "csrc/low_rank_kernels_binding.cpp",
)
HEADERS = tuple(
    f"csrc/{name}"
    for name in (
        "cayley_checks.h",
        "cayley_cpu.h",
        "cayley_cpu_kernels.h",
        "cayley_cuda.cuh",
        "cayley_cuda.h",
        "cayley_pivoting.h",
        "gradient_pool.h",
        "kron_cpu.h",
        "kron_cpu_kernels.h",
        "kron_cpu_ops.h",
        "kron_gram_cuda.cuh",
        "kron_gram_cuda.h",
        "kron_products.h",
        "kron_rotate_cuda.cuh",
        "kron_rotate_cuda.h",
        "kron_tensor_core.h",
        "kron_tiles.h",
        "low_rank.h",
        "low_rank_cuda.cuh",
        "low_rank_cuda.h",
        "low_rank_kernels.h",
        "new_kernels.h",
        "rotated_linear.h",
        "simd_level.h",
        "simd_matrix.h",
        "simd_vector.h",
        "stiefel_cpu.h",
        "stiefel_cpu_kernels.h",
        "tensor_core.cuh",
    )
)
# What makes an Extension a CPU or a CUDA one; its name, which setuptools keeps books on, stays.
_BUILD_FIELDS = (
    "sources",
    "include_dirs",
    "define_macros",
    "library_dirs",
    "libraries",
    "runtime_library_dirs",
    "extra_compile_args",
    "extra_link_args",
    "language",
)
REMEDY = "install torch first, then this package"


@dataclass(frozen=True)
class Toolchain:
    """What the build host has; versions as strings, ``None`` for what is missing."""

    torch: str | None
    torch_cuda: str | None
    compiler: str | None
    nvcc: str | None


@dataclass(frozen=True)
class Plan:
    """What to build, ``"none"``, ``"cpu"`` or ``"cuda"``, and why, in one sentence."""

    target: str
    reason: str


def parse_request(environ: Mapping[str, str]) -> str:
    """Return ``SPECTRAL_BUILD_EXT``; raises ``ValueError`` for what is not in ``REQUESTS``."""
    value = environ.get("SPECTRAL_BUILD_EXT", "auto").strip().lower()
    if value not in REQUESTS:
        raise ValueError(f"SPECTRAL_BUILD_EXT must be one of {', '.join(REQUESTS)}; got {value!r}")
    return value


def plan_build(request: str, tools: Toolchain) -> Plan:
    """Decide what to build. Raises ``RuntimeError`` when an explicit request cannot be met."""
    if request == "0":
        return Plan("none", "SPECTRAL_BUILD_EXT=0")
    no_cpu = _why_no_cpu(tools)
    no_cuda = no_cpu or _why_no_cuda(tools)
    if request == "cpu":
        if no_cpu:
            raise RuntimeError(f"SPECTRAL_BUILD_EXT=cpu, but {no_cpu}")
        return Plan("cpu", "SPECTRAL_BUILD_EXT=cpu")
    if request == "cuda":
        if no_cuda:
            raise RuntimeError(f"SPECTRAL_BUILD_EXT=cuda, but {no_cuda}")
        return Plan("cuda", "SPECTRAL_BUILD_EXT=cuda")
    if not no_cuda:
        return Plan("cuda", f"torch is built for CUDA {tools.torch_cuda} and nvcc is {tools.nvcc}")
    if not no_cpu:
        return Plan("cpu", f"no CUDA code, because {no_cuda}")
    return Plan("none", no_cpu)


def _why_no_cpu(tools: Toolchain) -> str:
    if tools.torch is None:
        return f"torch is not importable in the build environment; {REMEDY}"
    if tools.compiler is None:
        return "no C++ compiler was found (CXX, c++, g++ or clang++)"
    return ""


def _why_no_cuda(tools: Toolchain) -> str:
    if tools.torch_cuda is None:
        return f"torch {tools.torch} is built without CUDA"
    if tools.nvcc is None:
        return "no nvcc was found (CUDA_HOME or PATH)"
    if tools.torch_cuda.split(".")[0] != tools.nvcc.split(".")[0]:
        return f"torch is built for CUDA {tools.torch_cuda} but nvcc is {tools.nvcc}"
    return ""


def architecture_list(supported: Iterable[str]) -> str:
    """Default ``TORCH_CUDA_ARCH_LIST``: what this nvcc knows of ours, PTX for what comes later."""
    known = set(supported)
    chosen = [name for name in DEFAULT_ARCHITECTURES if name in known]
    if not chosen:
        raise RuntimeError(
            f"nvcc supports none of {', '.join(DEFAULT_ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST"
        )
    return ";".join(chosen) + "+PTX"


def parse_nvcc_architectures(listing: str) -> list[str]:
    """``nvcc --list-gpu-arch`` ("compute_80\\ncompute_100") to ``["8.0", "10.0"]``."""
    return [f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", listing)]


def _nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None


def _nvcc_output(option: str) -> str:
    nvcc = _nvcc()
    if nvcc is None:
        return ""
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=False).stdout


def _see_installed_torch() -> None:
    """Make the environment's torch importable from an isolated build, after the build's own."""
    if importlib.util.find_spec("torch") is not None:
        return
    for directory in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))):
        if os.path.isdir(os.path.join(directory, "torch")):
            sys.path.append(directory)


def find_toolchain() -> Toolchain:
    """Look for torch, a C++ compiler and nvcc on this machine."""
    _see_installed_torch()
    if importlib.util.find_spec("torch") is None:
        return Toolchain(None, None, None, None)
    import torch
    from torch.utils.cpp_extension import get_cxx_compiler

    release = re.search(r"release (\d+\.\d+)", _nvcc_output("--version"))
    compilers = (get_cxx_compiler(), "c++", "g++", "clang++")
    return Toolchain(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        compiler=next(filter(None, map(shutil.which, compilers)), None),
        nvcc=release.group(1) if release else None,
    )


def _is_gcc(compiler: str) -> bool:
    """Whether the C++ compiler is GCC; Clang also calls itself so, besides its own name."""
    try:
        macros = subprocess.run(
            [compiler, "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return "__GNUC__" in macros and "__clang__" not in macros


def _extension(target: str) -> Any:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, get_cxx_compiler

    # No errno for a negative square root: with it, roots are taken one by one.
    cxx_flags = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"]
    if sys.platform == "linux" and _is_gcc(get_cxx_compiler()):
        # ATen's parallel_for is a template and runs on one thread without this. Not passed to the
        # linker: the calls resolve to the OpenMP runtime that libtorch_cpu has loaded, where a
        # second runtime's idle threads would spin beside those of the GEMMs.
        cxx_flags.append("-fopenmp")
    if target == "cpu":
        return CppExtension(
            "spectral_kernels._C",
            list(CPU_SOURCES),
            depends=list(HEADERS),
            extra_compile_args={"cxx": cxx_flags},
        )
    supported = parse_nvcc_architectures(_nvcc_output("--list-gpu-arch"))
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architecture_list(supported))
    macros = [
        ("SPECTRAL_WITH_CUDA", "1"),
        ("SPECTRAL_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ]
    return CUDAExtension(
        "spectral_kernels._C",
        list(CPU_SOURCES + CUDA_SOURCES),
        depends=list(HEADERS),
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": ["-O3"]},
    )


def _say(message: str) -> None:
    print(f"spectral-kernels: {message}", file=sys.stderr, flush=True)


def _build_command(request: str, target: str) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithFallback(BuildExtension):
        """Under ``auto``, a failed compilation leaves the next smaller build."""

        def build_extensions(self) -> None:
            for attempt in ("cuda", "cpu") if target == "cuda" else ("cpu",):
                if attempt != target:
                    smaller = _extension(attempt)
                    for field in _BUILD_FIELDS:
                        setattr(self.extensions[0], field, getattr(smaller, field))
                try:
                    super().build_extensions()
                    return
                except Exception as error:
                    if request != "auto":
                        raise
                    _say(f"the {attempt} extension did not compile: {error}")
            self.extensions = []
            _say("installing without the extension; every op runs its PyTorch reference")

    return BuildWithFallback


def main() -> None:
    """Run setuptools with the extension that the environment asks for and allows."""
    from setuptools import __version__ as setuptools_version
    from setuptools import setup

    if int(setuptools_version.split(".")[0]) < MINIMUM_SETUPTOOLS:
        raise RuntimeError(
            f"setuptools {MINIMUM_SETUPTOOLS} or newer is needed to read pyproject.toml, got "
            f"{setuptools_version}: pip install -U setuptools"
        )
    request = parse_request(os.environ)
    plan = plan_build(request, find_toolchain())
    if plan.target == "none":
        _say(f"building no extension: {plan.reason}")
        setup()
        return
    _say(f"building the {plan.target} extension: {plan.reason}")
    setup(
        ext_modules=[_extension(plan.target)],
        cmdclass={"build_ext": _build_command(request, plan.target)},
    )


if __name__ == "__main__":
    main()
