"""``python -m spectral_adapters`` is ``spectral-adapters``."""

import sys

from spectral_adapters.cli import main

sys.exit(main())
