"""``python -m spectral_kernels`` prints the backend report."""

import sys
from pathlib import Path

from spectral_kernels import backend_report
from spectral_kernels._overrides import STATUS

print(backend_report())

here = Path(__file__).resolve().parent
if not STATUS["extension"].loaded and (here.parent / "setup.py").is_file():
    # `python -m` at the root of a checkout finds the sources first, which hold no extension.
    for other in (Path(folder) / here.name for folder in sys.path):
        if other.is_dir() and other.resolve() != here:
            print(f"these are the sources; of {other} tells: python -P -m spectral_kernels")
            break
