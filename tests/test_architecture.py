"""Arrows point one way (DESIGN section 6), imports are free, and the export lists are frozen."""

import ast
import subprocess
import sys
from pathlib import Path

import spectral_adapters
import spectral_kernels

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "python" / "spectral_adapters"

#: Layer of each module, low to high. A module imports only from layers below its own, or from
#: itself.
LAYERS = [
    {"_files", "_processes", "_validation"},
    {"factors", "activations", "planner", "autograd"},
    {"functional"},
    {"decomposition", "rotation_bank", "columns"},
    {"absorption", "quantization", "spectra"},
    {"modules", "optim", "fusion", "sharding"},
    {"peft"},
    {"checkpoint"},
    {"diffusers"},
    {"personalize"},
    {"compare"},
    {"cli"},
    {"__main__"},
]


def _layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def _imports(path: Path):
    """Absolute names imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_point_one_way():
    for path in ADAPTERS.rglob("*.py"):
        module = path.relative_to(ADAPTERS).with_suffix("").parts[0]
        if module == "__init__":
            continue
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "spectral_adapters" or len(parts) == 1:
                continue
            target = parts[1]
            if target == module or not (
                (ADAPTERS / target).exists() or (ADAPTERS / f"{target}.py").exists()
            ):
                continue
            assert _layer(target) < _layer(module), f"{path} imports {name} from a higher layer"


def test_kernels_know_nothing_of_adapters_nor_of_integrations():
    for path in (ROOT / "spectral_kernels").rglob("*.py"):
        for name in _imports(path):
            root = name.split(".")[0]
            assert root not in {"spectral_adapters", "peft", "diffusers", "transformers"}, path


def test_integrations_are_imported_only_where_they_integrate():
    allowed = {"peft", "diffusers", "personalize", "compare", "cli", "__main__"}
    for path in ADAPTERS.rglob("*.py"):
        module = path.relative_to(ADAPTERS).with_suffix("").parts[0]
        for name in _imports(path):
            if name.split(".")[0] in {"peft", "diffusers", "transformers", "accelerate"}:
                assert module in allowed, f"{path} imports {name}"


def test_import_is_free():
    code = (
        "import sys, torch, spectral_adapters\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'peft', 'diffusers', 'transformers', 'accelerate', 'matplotlib'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_export_lists_are_frozen():
    assert sorted(spectral_adapters.__all__) == [
        "RotationBank",
        "SODAConv2d",
        "SODALinear",
        "SVDiffLinear",
        "SpectralAdapterALinear",
        "SpectralAdapterRLinear",
        "StiefelAdam",
        "StiefelSGD",
        "functional",
    ]
    assert sorted(spectral_kernels.__all__) == ["BackendReport", "OpBackend", "backend_report"]
    assert sorted(spectral_adapters.functional.__all__) == [
        "SpectralBasis",
        "cayley",
        "kron_gram",
        "kron_rotate",
        "low_rank_factors",
        "low_rank_linear",
        "low_rank_spectral_linear",
        "rotated_linear",
        "soda_delta_weight",
        "soda_linear",
        "soda_weight",
    ]
