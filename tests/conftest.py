"""Every test starts from the same random state, and none sees the caches of who runs it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_cache(tmp_path_factory: pytest.TempPathFactory):
    """Weights are decomposed in every test that says so; the tests of the cache switch it on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("SPECTRAL_KERNELS_CACHE_LIMIT", "0")
        yield
