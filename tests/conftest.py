"""Eight simulated devices for every test, and an empty cache for every file."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def clear_caches():
    """Programs of a file are of no use to the next, and fill the memory."""
    yield
    jax.clear_caches()
