"""Raw ops of spectral fine-tuning: schemas, references, and the C++/CUDA and Triton overrides.

Importing this package declares ``torch.ops.spectral.*``, loads the compiled extension if the
installation has one, and registers the Triton kernels for CUDA. It compiles nothing and creates no
CUDA context. The differentiable functions are in ``spectral_adapters.functional``.
"""

from spectral_kernels import ops as ops
from spectral_kernels._overrides import load_overrides
from spectral_kernels._report import BackendReport, OpBackend, backend_report

__version__ = "0.1.0"
__all__ = ["BackendReport", "OpBackend", "backend_report"]

load_overrides()
