"""Eight simulated devices, programs compiled once a run, and a bound on memory."""

import gc
import os
import tempfile
from unittest import mock

import hypothesis
import pytest

# The same examples everywhere, however busy the machine.
hypothesis.settings.load_profile("ci")

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
HALF_WRITTEN = "ignore:Error reading persistent compilation cache entry"


def pytest_configure(config):
    """Sets what JAX reads when it is imported, for workers and subprocesses too.

    Many tests compile what others have compiled, so all processes of a run share one
    folder of programs, which ends with the run unless someone has named another. Of
    two processes one may meet what the other is writing, or has not finished as it was
    killed: JAX warns, and compiles it.
    """
    environ = os.environ
    if EIGHT_DEVICES not in environ.get("XLA_FLAGS", ""):
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}"
    if "JAX_COMPILATION_CACHE_DIR" not in environ:
        programs = tempfile.TemporaryDirectory(
            prefix="st3jax-", ignore_cleanup_errors=True
        )
        config.add_cleanup(programs.cleanup)
        environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    environ["PYTHONWARNINGS"] = HALF_WRITTEN
    config.addinivalue_line("filterwarnings", HALF_WRITTEN)


@pytest.fixture(scope="module", autouse=True)
def clear_caches():
    """Programs of a file are of no use to the next, and fill the memory."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()  # so that no file is told of what another left behind


@pytest.fixture(scope="module")
def quickly_compiled():
    """Programs of a file and of its subprocesses, for tests of what is around a step.

    They have the same operations, but machine code that took less time to make.
    """
    import jax

    with mock.patch.dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="1"):
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
