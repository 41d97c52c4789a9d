"""Stand-alone adapter modules: drop-in replacements for layers of ``torch.nn``."""

from spectral_adapters.modules.low_rank import SpectralAdapterALinear, SpectralAdapterRLinear
from spectral_adapters.modules.soda import SODAConv2d, SODALinear
from spectral_adapters.modules.svdiff import SVDiffLinear

__all__ = [
    "SODAConv2d",
    "SODALinear",
    "SVDiffLinear",
    "SpectralAdapterALinear",
    "SpectralAdapterRLinear",
]
