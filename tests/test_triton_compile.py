"""Every Triton kernel compiles, without a GPU, for three architectures and within a budget.

Also the plans that decide which kernel runs. ``benchmarks/kernel_report.py`` prints the full table.
"""

import itertools
import os
import subprocess
import sys
from math import prod

import pytest
import torch

from spectral_kernels.triton_kernels import (
    LIMITS,
    LOW_RANK_LIMITS,
    STIEFEL_LIMITS,
    supports,
)
from spectral_kernels.triton_kernels._launch import (
    MAX_AXIS,
    MAX_BLOCKS,
    MAX_INNER,
    MAX_RANK,
    AxisLaunch,
    TileLaunch,
    plan_gram,
    plan_rotate,
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# op, factor sizes, dtype, transposed, scaled. One or two per row of each launch table; dtypes and
# options take turns, so that each meets one, two and three axes.
VARIANTS = [
    ("kron_rotate", (16,), BF16, False, True),
    ("kron_rotate", (32,), F16, True, False),
    ("kron_rotate", (61,), F32, False, True),
    ("kron_rotate", (128,), BF16, True, True),
    ("kron_rotate", (8, 8, 10), BF16, False, True),
    ("kron_rotate", (32, 40), BF16, False, False),
    ("kron_rotate", (32, 40), F32, True, True),
    ("kron_rotate", (64, 64), F16, True, True),
    ("kron_rotate", (128, 128), F32, False, True),
    ("kron_rotate", (16, 16, 16), F16, False, True),
    ("kron_rotate", (32, 32, 32), F32, True, True),
    ("kron_rotate", (8, 256), BF16, True, True),
    ("kron_gram", (32,), F16, False, True),
    ("kron_gram", (7, 61), F32, False, True),
    ("kron_gram", (8, 8, 10), BF16, False, True),
    ("kron_gram", (32, 40), BF16, False, False),
    ("kron_gram", (64, 64), BF16, False, True),
    ("kron_gram", (16, 16, 16), BF16, False, False),
    ("kron_gram", (96, 100), F16, False, True),
    ("kron_gram", (100, 7), F32, False, True),
    ("kron_gram", (20, 20, 20), BF16, False, True),
    ("stiefel_adam", (16,), F32, False, False),
    ("stiefel_adam", (40,), F32, False, False),
    ("stiefel_adam", (128,), F32, False, False),
    ("stiefel_sgd", (13,), F32, False, False),
    ("stiefel_sgd", (20,), F32, False, False),
    ("stiefel_sgd", (100,), F32, False, False),
    ("low_rank_add", (1,), F32, False, True),
    ("low_rank_add", (8,), BF16, False, False),
    ("low_rank_add", (8,), BF16, False, True),
    ("low_rank_add", (8,), F32, False, False),
    ("low_rank_add", (3,), F16, False, True),
    ("low_rank_add", (4,), BF16, False, True),
    ("low_rank_add", (50,), F32, False, True),
    ("low_rank_add", (64,), F16, False, True),
    ("turn_thin", (8,), BF16, False, False),
    ("turn_thin", (17,), F32, True, False),
    ("turn_thin", (64,), F16, True, False),
    ("turn_thin", (64,), F32, False, False),
]

# No spilled register, at least 8 resident warps per multiprocessor by the register file, and the
# shared memory that every architecture since sm_80 grants a program.
REGISTER_FILE = 65536
MIN_WARPS = 8
MAX_SHARED = 99 * 1024


needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter makes nothing to compile"
)


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: "-".join(map(str, case)))
def test_compiles_within_budget(case, capability):
    pytest.importorskip("triton")
    from spectral_kernels.triton_kernels._offline import Variant, compile_variant

    kernels = list(compile_variant(Variant(*case), capability))
    assert kernels
    for used in kernels:
        assert used.stack == 0, used
        assert used.shared <= MAX_SHARED, used
        granted = -(-used.registers // 8) * 8 * 32 * used.launch.num_warps
        assert REGISTER_FILE // granted * used.launch.num_warps >= MIN_WARPS, used


@pytest.fixture
def launches(monkeypatch):
    """What the host functions launch: compiled for sm_90 on Triton's launch path, and not run."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class AbsentDevice:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, grid, run(self, *args, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", AbsentDevice())
    return compiled


@needs_compiler
def test_host_functions_launch_what_compiles(launches):
    from spectral_kernels.triton_kernels.kron_gram import kron_gram
    from spectral_kernels.triton_kernels.kron_rotate import kron_rotate

    scale = torch.ones(1280)
    for rows in (1, 16, 33):
        x = torch.randn(rows, 1280)
        misaligned = torch.randn(rows * 1280 + 1)[1:].view(rows, 1280)
        kron_rotate(x.to(BF16), [torch.eye(32), torch.eye(40)], True, scale, None)
        kron_rotate(x, [torch.eye(5), torch.eye(256)], False, None, scale)
        kron_gram(x.to(F16), x, [32, 40], None)
        kron_gram(misaligned, x, [32, 40], scale)
    names = [name.removeprefix("_kron_").removesuffix("_kernel") for name, _, _ in launches]
    assert names == ["rotate_tile", "rotate_axis", "rotate_axis", "gram", "gram"] * 3
    grids = [grid for _, grid, _ in launches]
    # One program per row; 6 blocks of 32 of the 165 x 2 of the 256 columns; 33 rows x 2 of the 256
    # neighbours; 5 shares of 8 rows.
    assert grids[10:] == [(33,), (12,), (66,), (5,), (5,)]
    # The number of rows must not be compiled in.
    kernels = [kernel for _, _, kernel in launches]
    assert all(kernels[i] is kernels[i + 5] is kernels[i + 10] for i in range(5))


@needs_compiler
def test_a_model_of_factors_is_few_launches(launches):
    from spectral_kernels.triton_kernels.stiefel import stiefel_adam_, stiefel_sgd_

    def lists(shapes, moments):
        zeros = [[torch.zeros(shape) for shape in shapes] for _ in range(1 + moments)]
        return [torch.eye(shape[-1]).expand(shape).clone() for shape in shapes], *zeros

    model = [(20, 20), (3, 40, 40), (0, 7, 7), (32, 32), (12, 12), (100, 100)]
    for shapes in (model, model * 5):
        counts = [torch.zeros(()) for _ in shapes]
        stiefel_adam_(*lists(shapes, 2), counts, 1e-3, 0.9, 0.99, 1e-8, -1.0)
        stiefel_sgd_(*lists(shapes, 1), 1e-3, 0.9, -1.0)
        stiefel_sgd_(*lists(shapes, 0), [], 1e-3, 0.0, -1.0)
    names = [name.removesuffix("_kernel") for name, _, _ in launches]
    assert names == (["_count"] + ["_stiefel"] * 9) * 2
    assert [grid for _, grid, _ in launches[10:14]] == [(1,), (5,), (25,), (5,)]
    # Neither the number of matrices nor the place of their rows in the table is compiled in.
    kernels = [kernel for _, _, kernel in launches]
    assert all(kernels[i] is kernels[i + 10] for i in range(10))


@needs_compiler
def test_low_rank_host_functions_launch_what_compiles(launches):
    from spectral_kernels.triton_kernels import low_rank

    left, scale, right = torch.randn(60, 8), torch.rand(8), torch.randn(8, 300)
    shifts, turns = (torch.randn(60, 8), torch.randn(300, 8)), (torch.eye(8), torch.eye(8))
    weight = torch.randn(60, 300)
    for rows in (1, 16, 33):
        x, grad = torch.randn(rows, 300), torch.randn(rows, 60)
        low_rank.low_rank_linear_fwd(x, None, weight, None, right, left, 1.0)
        low_rank.low_rank_linear_bwd(grad, x, weight, x[:, :8], right, left, 1.0, True, True)
        basis = (left, scale, right)
        thin = torch.randn(rows, 16)
        low_rank.spectral_a_linear_fwd(x, grad, None, None, *basis, *shifts, 1.0)
        low_rank.spectral_a_linear_bwd(grad, x, None, thin, *basis, *shifts, 1.0, True, True)
        low_rank.spectral_r_linear_fwd(x, None, weight, None, *basis, *turns, 1.0)
        low_rank.spectral_r_linear_bwd(grad, weight, x[:, :8], *basis, *turns, 1.0, True, True)
    names = [name.removeprefix("_").removesuffix("_kernel") for name, _, _ in launches]
    turned = ["turn_thin", "low_rank_add"]
    assert names == (["low_rank_add"] * 4 + turned * 2) * 3
    # 2 blocks of 32 of the 33 rows, times 1 block of the outputs or 3 of the inputs.
    assert [grid for _, grid, _ in launches][16:] == [
        (2,),
        (6,),
        (2,),
        (6,),
        (1,),
        (2,),
        (1,),
        (6,),
    ]
    # Neither the number of rows nor of outputs must be compiled in.
    kernels = [kernel for _, _, kernel in launches]
    assert all(kernels[i] is kernels[i + 8] is kernels[i + 16] for i in range(8))


def all_dims():
    """Factor sizes up to k = 16384 and beyond: all kinds of one, two, three and more factors."""
    sizes = (1, 2, 3, 7, 8, 10, 16, 17, 31, 32, 40, 64, 100, 127, 128, 129, 256, 1021)
    for f in (1, 2, 3):
        yield from itertools.product(sizes, repeat=f)
    yield from itertools.product((1, 2, 5, 16, 37, 200), repeat=4)
    yield (2,) * 12
    yield (3, 5, 7, 11, 13, 2)


def test_rotate_plans_cover_every_size_within_limits():
    for dims in all_dims():
        plan = plan_rotate(dims)
        assert sum(plan.groups, ()) == dims
        sizes = [prod(group) for group in plan.groups]
        first = plan.passes[0]
        if isinstance(first, TileLaunch):
            assert len(plan.passes) == 1
            assert list(first.sizes)[: len(sizes)] == sizes
            inner = first.padded[1] * first.padded[2]
            assert inner <= MAX_INNER and max(first.padded[1:]) <= MAX_AXIS
            assert all(p >= n for p, n in zip(first.padded, first.sizes, strict=True))
            assert first.block * first.tokens * inner <= 4096
        else:
            assert [launch.n for launch in plan.passes] == sizes[::-1]
            for launch in plan.passes:
                assert isinstance(launch, AxisLaunch)
                assert launch.lead * launch.n * launch.inner == prod(dims)
            assert plan.passes[0].inner == 1 and plan.passes[-1].lead == 1


def test_gram_plans_cover_every_size_they_accept():
    accepted = 0
    for dims in all_dims():
        plan = plan_gram(dims)
        supported, reason = supports("kron_gram", [BF16, F32], dims)
        assert supported == (plan is not None) and reason
        if plan is None:
            continue
        accepted += 1
        assert sum(plan.groups, ()) == dims
        assert plan.blocks <= MAX_BLOCKS and min(p for p in plan.padded if p > 1) % plan.blocks == 0
        assert plan.blocks * plan.columns >= prod(dims)
        assert all(n <= p <= MAX_AXIS for n, p in zip(plan.sizes, plan.padded, strict=True))
    assert accepted > 1000


@pytest.mark.parametrize(
    ("dims", "passes"),
    [((32, 40), 1), ((8, 8, 10), 1), ((6, 8, 16), 1), ((4, 16, 20), 1), ((4, 8, 64), 1),
     ((128, 128), 1), ((16, 16, 16), 1), ((8, 256), 2), ((64, 64, 64), 3), ((1021,), 1)],
)  # fmt: skip
def test_number_of_rotation_passes(dims, passes):
    assert len(plan_rotate(dims).passes) == passes


def test_registering_overrides_the_ops_and_imports_nothing():
    """In a process of its own, for the registration lasts; works the same without CUDA."""
    code = (
        "import sys, torch\n"
        "from spectral_kernels.ops import LIBRARY\n"
        "from spectral_kernels.triton_kernels import register\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "from spectral_kernels.triton_kernels import OVERRIDDEN\n"
        "ops = [f'spectral::{op}' for op in OVERRIDDEN]\n"
        "if torch.version.cuda is None:\n"
        "    leave = [op for op in OVERRIDDEN if has(f'spectral::{op}', 'CUDA')]\n"
        "    assert set(register(LIBRARY, leave)) == set(OVERRIDDEN) - set(leave)\n"
        "assert all(has(op, 'CUDA') for op in ops)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'spectral_kernels.triton_kernels.kron_rotate' not in sys.modules\n"
        "assert 'spectral_kernels.triton_kernels.stiefel' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_supports_says_why_not():
    assert supports("kron_rotate", [BF16], [32, 40]) == (True, "one pass")
    assert supports("kron_rotate", [F16], [8, 256])[1].startswith("2 passes")
    for op in ("kron_rotate", "kron_gram"):
        supported, reason = supports(op, [torch.float64], [4, 4])
        assert not supported and "float64" in reason
        assert not supports(op, [F32], [])[0]
        assert not supports(op, [F32], [4, 0])[0]
    supported, reason = supports("kron_gram", [F32, F32], [3, 200])
    assert not supported and str(MAX_AXIS) in reason and str(MAX_AXIS) in LIMITS
    assert not supports("kron_gram", [F32, F32], [128, 128, 128])[0]
    assert supports("stiefel", [F32], [MAX_AXIS]) == (True, "one program")
    assert not supports("stiefel", [F32], [MAX_AXIS + 1])[0] and str(MAX_AXIS) in STIEFEL_LIMITS
    supported, reason = supports("stiefel", [torch.float64], [4])
    assert not supported and "float64" in reason and "float64" in STIEFEL_LIMITS
    assert supports("low_rank_linear_fwd", [BF16, F32], [8])[0]
    assert not supports("spectral_a_linear_bwd", [F32, torch.float64], [8])[0]
    supported, reason = supports("spectral_r_linear_fwd", [F32], [MAX_RANK + 1])
    assert not supported and str(MAX_RANK) in reason and str(MAX_RANK) in LOW_RANK_LIMITS
    with pytest.raises(ValueError, match="'cayley'"):
        supports("cayley", [F32], [4])
