"""Eight simulated devices for every test, and an empty cache for every file."""

import gc
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

# The same examples everywhere, however busy the machine.
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="module", autouse=True)
def clear_caches():
    """Programs of a file are of no use to the next, and fill the memory."""
    yield
    jax.clear_caches()
    gc.collect()  # so that no file is told of what another left behind
