"""``python -m spectral_kernels`` prints the backend report."""

from spectral_kernels import backend_report

print(backend_report())
