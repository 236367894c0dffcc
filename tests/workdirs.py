"""Runs on the smallest network, and their workdirs, for tests of what may go wrong."""

import contextlib
import gc
import io
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from training import last_state, leaves, same_bits, tiny

import train
from data import input_pipeline
from workdir import checkpoints, monitor

STEPS = 66
SPEED = ("images_per_second", "input_wait")
# What Orbax leaves behind where it fails: of many arrays that cannot be read it raises
# for one, and its loop is closed when the others want to tell; and of arrays of which
# one is of a kind that it does not know, it never asks for the metadata of the others.
WHERE_DISKS_FAIL = [
    pytest.mark.usefixtures("collect_garbage"),
    pytest.mark.usefixtures("quickly_compiled"),
    pytest.mark.filterwarnings(
        "ignore:(?s)Exception ignored in. None.*Event loop is closed"
        ":pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings(
        r"ignore:coroutine '\w+Handler\.metadata' was never awaited:RuntimeWarning"
    ),
]


@pytest.fixture
def collect_garbage():
    """What a test leaves behind is told under its own filters, not in a later test."""
    yield
    gc.collect()


def small(step):
    """A state with the bits that are lost most easily."""
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "kernel": jax.random.normal(key, (17, 3)),
        "half": jnp.arange(5, dtype=jnp.bfloat16) * step,
        "special": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]),
        "empty": {},
    }


def read(workdir):
    """What a start finds, and what it says."""
    said = io.StringIO()
    with checkpoints.open_checkpoints(workdir) as manager:
        state = checkpoints.restore(manager, small(0), Console(file=said, width=999))
    return leaves(state), said.getvalue()


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory):
    """A workdir with the checkpoints of steps 2 and 3; the one of step 1 is gone."""
    workdir = tmp_path_factory.mktemp("saves")
    with checkpoints.open_checkpoints(workdir) as manager:
        for step in (1, 2, 3):
            checkpoints.save(manager, step, small(step))
        checkpoints.wait(manager)
    assert {x.name for x in (workdir / "checkpoints").iterdir()} == {"2", "3"}
    return workdir


@contextlib.contextmanager
def copied(workdir):
    """A copy of a workdir, next to it."""
    copy = workdir.with_name(f"{workdir.name}-copy")
    shutil.copytree(workdir, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def flip(path, byte, bit=4):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where data sets and compiled programs are kept: nothing compiles twice."""
    folder = tmp_path_factory.mktemp("kept")
    options = {
        "jax_compilation_cache_dir": str(folder / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(value))
        # On some processors XLA refuses, with a page of their features, what it kept.
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def overrides(folder):
    """What all runs here change: eleven steps between saves."""
    return {"checkpoint_every_epochs": 0.5, "data.dir": str(folder / "data")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, overrides):
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train.train_and_evaluate(tiny(**overrides), workdir)
    return workdir


def expect_the_same_end(workdir, undisturbed):
    """The same bits in every array and network, and the same results of tests."""
    (step, state), (end, expected) = last_state(workdir), last_state(undisturbed)
    assert step == end == STEPS
    assert len(state) > 80
    assert same_bits(state, expected)
    tests = [row for row in metrics(undisturbed) if "test_loss" in row]
    assert [row for row in metrics(workdir) if "test_loss" in row] == tests
    assert len(tests) == 3
    for name in ("model.st3", "model.safetensors"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()


def metrics(workdir):
    """The rows of metrics, without what is never the same."""
    return [
        {name: value for name, value in row.items() if name not in SPEED}
        for row in monitor.read_metrics(workdir)
    ]


def names(workdir):
    """What is in the folder of checkpoints."""
    folder = workdir / "checkpoints"
    return {x.name for x in folder.iterdir()} if folder.is_dir() else set()


def at_step(monkeypatch, number, act):
    """From now on ``act`` is done to the batch of this step."""
    train_batches = input_pipeline.train_batches

    def patched(data, config, start, *stop):
        with contextlib.closing(train_batches(data, config, start, *stop)) as batches:
            for step, batch in enumerate(batches, start + 1):
                yield act(batch) if step == number else batch

    monkeypatch.setattr(input_pipeline, "train_batches", patched)


@contextlib.contextmanager
def few_files(folder, number):
    """A file system with room for so many files, or else for files of few bytes.

    Yields:
        What the command that starts a run begins with.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64m,nr_inodes={number}", "st3jax"]
    mounted = not subprocess.run([*mount, folder], capture_output=True).returncode
    try:
        yield [] if mounted else ["prlimit", f"--fsize={64 * number}", "--"]
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
