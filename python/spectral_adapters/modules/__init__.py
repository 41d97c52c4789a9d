"""Stand-alone adapter modules: drop-in replacements for layers of ``torch.nn``."""

from spectral_adapters.modules.soda import SODAConv2d, SODALinear

__all__ = ["SODAConv2d", "SODALinear"]
