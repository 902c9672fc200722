"""The environment of every test run: one thread, no network services, no cluster but the test's own."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Set before anything imports torch, ray or mlflow, which read these once; Ray's workers inherit them.
os.environ |= {
    "OMP_NUM_THREADS": "1",  # torch as well: tests are small, and trials share the cores
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "RAY_AUTH_MODE": "disabled",  # otherwise Ray writes a token into the home directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
}
# A developer's own cluster or tracking server is not for tests to use.
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)

# A shared machine is slow now and then, which is no failure. The rest stays hypothesis's own, here or in CI.
settings.register_profile("house", settings(deadline=None))
settings.load_profile("house")


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors are made in double precision, where two correct implementations agree to many digits."""
    import torch  # after the environment above

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
