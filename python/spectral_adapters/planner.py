"""Which of the equal-valued plans of a SODA product is cheapest here (DESIGN section 4).

The plans give the same numbers and differ in what is multiplied by what:

* ``"tokens"`` rotates the activations: four GEMMs and two rotations over the tokens;
* ``"factored"`` rotates the frozen basis once, then four GEMMs;
* ``"merged"`` builds the dense ``W'`` and uses it like any linear layer: three GEMMs and the build.

Costs are counted in floating-point operations of a large GEMM. What other work costs in these,
:class:`Rates` says: by default constants measured once, after :func:`calibrate` those of this
machine. Nothing is measured unless asked for, so equal programs take equal plans.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from spectral_adapters._validation import check_choice
from spectral_kernels.ops.kron import eager_op, tensor_cores_take

PLANS = ("factored", "merged", "tokens")


@dataclass(frozen=True)
class Rates:
    """What work costs on a device, in operations of a large GEMM over the tokens.

    Attributes:
        rotation: one operation of a Kronecker rotation.
        gram: one operation of its gradient sums.
        build: one operation of the products that build ``W'`` and contract its gradient.
        call: one more op, whatever its size.
        source: where these numbers come from.
    """

    rotation: float
    gram: float
    build: float
    call: float
    source: str


#: By type of device and, for "cuda", whether products run in 16 bits and rotations on tensor cores.
#: On the CPU as measured on two processors with AVX-512, fp32. On CUDA from the times of kernels on
#: an H100 (benchmarks/results/h100-first-run-2026-11-27.json); 10 us a call. On tensor cores from
#: the layers' steps on an H200 (benchmarks/results/h200-2026-11-28.json): what a step as a CUDA
#: graph takes at n = 1280 with 4,096 tokens more than with 77, less its GEMMs, is 22 us for each of
#: two rotations and the Gram, where a GEMM does 564e12 operations a second.
DEFAULT_RATES = {
    "cpu": Rates(2.0, 2.0, 1.0, 3e6, "default for CPUs"),
    "cuda": Rates(3.7, 8.1, 1.0, 4.7e8, "default for CUDA, from an H100"),
    "cuda, 16 bits": Rates(76.0, 148.0, 1.0, 6.6e9, "default for CUDA in 16 bits, from an H100"),
    "cuda, tensor cores": Rates(16.0, 16.0, 1.0, 6.6e9, "default for tensor cores, from an H200"),
}

_chosen: dict[tuple[str, torch.dtype, bool], Rates] = {}


@dataclass(frozen=True)
class PlanChoice:
    """The plan to run, why, and the cost of every plan in units of ``2 * tokens * out * in``."""

    name: str
    reason: str
    units: dict[str, float]

    def __str__(self) -> str:
        costs = ", ".join(f"{plan} {cost:.2f}" for plan, cost in self.units.items())
        return f"{self.name} ({self.reason}; units: {costs})"


def plan_costs(
    tokens: int,
    out_features: int,
    in_features: int,
    factors: tuple[int, ...] | None,
    *,
    decomposition: str,
    rotation: str | None,
    backward: bool = True,
    uses: int = 1,
    has_base: bool = False,
    fixed_spectrum: bool = False,
    rates: Rates = DEFAULT_RATES["cpu"],
) -> dict[str, float]:
    """Cost of each plan in units of one GEMM ``2 * tokens * out * in`` (DESIGN section 4).

    Args:
        tokens: rows of the flattened activation, M.
        out_features, in_features: shape of the weight; the rank is their minimum.
        factors: sizes of the rotation's factors, or None without a rotation.
        decomposition: ``"svd"`` or ``"qr"``.
        rotation: ``"left"``, ``"right"`` or None.
        backward: count the backward pass too (training) or the forward alone.
        uses: forward passes that share one build, as in gradient accumulation.
        has_base: the base weight itself is there and need not be multiplied from its factors.
        fixed_spectrum: the spectrum is not trained and the weight with it is kept, if the base
            weight is there: a right rotation of the tokens then needs one dense product.
        rates: what work other than large GEMMs costs.

    Raises:
        ValueError: the factors do not multiply up to the rotated dimension.
    """
    tokens = max(tokens, 1)
    rank = min(out_features, in_features)
    unit = 2.0 * tokens * out_features * in_features
    dense = 2.0 * out_features * in_features * rank * rates.build
    products = 2.0 * tokens * rank * (in_features + out_features)
    turn = gram = 0.0  # per row
    if factors is not None:
        width = rank if rotation == "left" else in_features
        if prod(factors) != width:
            raise ValueError(f"factors must have product {width}; got {factors!r}")
        operations = 2.0 * width * sum(factors)
        turn, gram = operations * rates.rotation, operations * rates.gram

    once_dense = rotation == "right" and has_base and fixed_spectrum
    token_products = unit if once_dense else products
    basis_rows = out_features if rotation == "left" else rank
    # The backward rotates the tokens' gradients or the basis again, or finds it kept; not counted
    # as kept, so that a layer takes equal plans with and without a bank.
    again = min(tokens, basis_rows)
    builds = 1.0
    if decomposition == "qr" and rotation != "left":
        # W0 + diag(delta) Q is elementwise; only a layer that has no W0 pays one product for it.
        builds = 0.0 if has_base else 1.0
    costs = {
        "factored": products + basis_rows * turn / uses + 3 * rates.call,
        "merged": unit
        + (builds * dense + out_features * turn + 4 * rates.call) / uses
        + rates.call,
        "tokens": token_products + tokens * turn + 3 * rates.call,
    }
    if backward:
        contractions = 0.0 if decomposition == "qr" and rotation != "left" else 1.0
        # A left rotation's gradient is that of the basis, a right one turns the weight's back.
        turned_back = out_features * turn if rotation == "right" else 0.0
        costs["factored"] += products + again * turn + tokens * gram + 3 * rates.call
        costs["merged"] += (
            2 * unit
            + (contractions * dense + out_features * gram + turned_back + 3 * rates.call) / uses
            + 2 * rates.call
        )
        costs["tokens"] += token_products + tokens * (turn + gram) + 3 * rates.call
    return {plan: cost / unit for plan, cost in costs.items()}


def choose_plan(
    tokens: int,
    out_features: int,
    in_features: int,
    factors: tuple[int, ...] | None,
    *,
    decomposition: str,
    rotation: str | None,
    plan: str = "auto",
    backward: bool = True,
    uses: int = 1,
    has_base: bool = False,
    fixed_spectrum: bool = False,
    rates: Rates = DEFAULT_RATES["cpu"],
) -> PlanChoice:
    """The cheapest plan for these sizes, or ``plan`` itself when it is not ``"auto"``.

    Arguments as in :func:`plan_costs`.

    Raises:
        ValueError: an unknown plan, or factors that do not multiply up.
    """
    check_choice("plan", plan, ("auto", *PLANS))
    units = plan_costs(
        tokens,
        out_features,
        in_features,
        factors,
        decomposition=decomposition,
        rotation=rotation,
        backward=backward,
        uses=uses,
        has_base=has_base,
        fixed_spectrum=fixed_spectrum,
        rates=rates,
    )
    if plan != "auto":
        return PlanChoice(plan, "forced", units)
    best = "factored"
    for name in units:  # no min(), whose key Dynamo cannot look into where sizes are symbols
        if units[name] < units[best]:
            best = name
    return PlanChoice(best, f"cheapest by the cost model, {rates.source}", units)


#: :func:`choose_plan`, remembered: a layer asks the same at every step.
remembered_plan = lru_cache(maxsize=4096)(choose_plan)


def rates_for(
    device: torch.device, dtype: torch.dtype, factors: Sequence[int] | None = None
) -> Rates:
    """The rates for products in ``dtype`` on ``device``: set, calibrated, or the defaults.

    Args:
        device, dtype: of the activations' products.
        factors: sizes of the rotation's factors, which decide what rotates.
    """
    on_tensor_cores = tensor_cores_take(device.type, dtype, factors)
    key = (device.type, dtype, on_tensor_cores)
    if key not in _chosen:
        is_short = device.type != "cpu" and dtype.itemsize == 2
        kind = "cpu" if device.type == "cpu" else "cuda, 16 bits" if is_short else "cuda"
        default = DEFAULT_RATES["cuda, tensor cores" if on_tensor_cores else kind]
        if torch.compiler.is_compiling():
            return default  # no file is read while tracing; layers ask when they are made, too
        _chosen[key] = _read(device, dtype, on_tensor_cores) or default
    return _chosen[key]


def set_rates(device: torch.device | str, dtype: torch.dtype, rates: Rates | None) -> None:
    """Use these rates from now on, whatever rotates; None goes back to the calibrated or default
    ones.

    Raises:
        TypeError, ValueError: no rates, or one of them is not positive.
    """
    kind = torch.device(device).type
    if rates is not None:
        if not isinstance(rates, Rates):
            raise TypeError(f"rates must be Rates or None; got {rates!r}")
        _check(rates)
    for on_tensor_cores in (False, True):
        _chosen.pop((kind, dtype, on_tensor_cores), None)
        if rates is not None:
            _chosen[kind, dtype, on_tensor_cores] = rates


@torch.no_grad()
def calibrate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, save: bool = True
) -> Rates:
    """Measure the rates of this machine, use them from now on, and keep them on disk.

    Takes about a second; measure on a quiet machine. Where some factors are rotated on tensor cores
    and others are not, both are measured.

    Args:
        device: where to measure.
        dtype: of the activations' products: fp32, fp64, bf16 or fp16.
        save: write them to :func:`calibration_file`, where later processes find them.

    Returns:
        The rates of the balanced factors of 1024.

    Raises:
        ValueError: ``dtype`` is not floating-point.
        OSError: the file cannot be written.
    """
    device = torch.device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type; got {dtype}")
    # Of each kind that there is, one.
    kinds = {tensor_cores_take(device.type, dtype, sizes): sizes for sizes in ([16, 64], [32, 32])}
    for on_tensor_cores, sizes in kinds.items():
        rates = _measure(device, dtype, sizes, on_tensor_cores)
        _chosen[device.type, dtype, on_tensor_cores] = rates
        if save:
            _write(_key(device, dtype, on_tensor_cores), rates)
    return rates


def _measure(
    device: torch.device, dtype: torch.dtype, factor_sizes: list[int], on_tensor_cores: bool
) -> Rates:
    small_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    n = prod(factor_sizes)
    x, weight = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    factors = [torch.eye(size, device=device, dtype=small_dtype) for size in factor_sizes]
    small = torch.zeros(1, 4, device=device, dtype=dtype)
    small_factors = [torch.eye(2, device=device, dtype=small_dtype)] * 2
    rotate, gram = (eager_op(name, device.type) for name in ("kron_rotate", "kron_gram"))
    call = _seconds(lambda: rotate(small, small_factors, False, None, None), device)
    if on_tensor_cores:
        products = torch.ops.spectral_products
        rotate = products.kron_rotate_on_tensor_cores
        gram = products.kron_gram_on_tensor_cores

    gemm = _seconds(lambda: x @ weight, device) / (2 * n**3)
    operations = 2 * n * n * sum(factor_sizes)
    return Rates(
        rotation=_seconds(lambda: rotate(x, factors, False, None, None), device)
        / (operations * gemm),
        gram=_seconds(lambda: gram(x, weight, factor_sizes, None), device) / (operations * gemm),
        build=_seconds(lambda: weight @ weight, device) / (2 * n**3 * gemm),
        call=call / gemm,
        source=f"measured with {str(dtype).removeprefix('torch.')} on {_device_name(device)}",
    )


def calibration_file() -> Path:
    """Where calibrated rates are kept: in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "spectral-kernels", "planner.json")


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Median seconds of one run, until its results are there."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 3):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return median(times[3:])  # the first ones compile and wake threads


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpu.read_text().splitlines() if cpu.exists() else ())
        if line.startswith("model name")
    ]
    return f"{names[0] if names else device.type}, {torch.get_num_threads()} threads"


def _key(device: torch.device, dtype: torch.dtype, on_tensor_cores: bool = False) -> str:
    """What rates belong to: they are measured anew for another device or version."""
    versions = f"torch {torch.__version__}, spectral-kernels {version('spectral-kernels')}"
    return f"{_device_name(device)}; {dtype}; {versions}{'; tensor cores' * on_tensor_cores}"


def _check(rates: Rates) -> None:
    for field in fields(Rates):
        value = getattr(rates, field.name)
        if field.name == "source":
            valid = isinstance(value, str)
        else:
            valid = isinstance(value, (int, float)) and 0 < value < float("inf")
        if not valid:
            raise ValueError(f"rates.{field.name} must be positive and finite; got {value!r}")


def _read(device: torch.device, dtype: torch.dtype, on_tensor_cores: bool) -> Rates | None:
    path = calibration_file()
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text()).get(_key(device, dtype, on_tensor_cores))
        rates = None if stored is None else Rates(**stored)
        if rates is not None:
            _check(rates)
        return rates
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} holds no usable calibration, the planner goes by its defaults: {error}; "
            "delete it or run spectral-adapters calibrate",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _write(key: str, rates: Rates) -> None:
    """Add rates to the file; whoever reads it sees the old file or the new one."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        stored = {}
    stored = {**(stored if isinstance(stored, dict) else {}), key: asdict(rates)}
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(stored, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
