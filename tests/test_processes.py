"""Processes on one machine, joined by ``jax.distributed``: selection and training."""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from programs import two_processes
from workdirs import few_files

import digits_st3
from data import sources
from workdir import checkpoints
from workdir.lock import only_run

PROGRAMS = pathlib.Path(two_processes.__file__).parent
EXPERIMENTS = pathlib.Path(digits_st3.__file__).parent
pytestmark = pytest.mark.usefixtures("quickly_compiled")
TRAIN = [PROGRAMS / "train_checked.py"]
SETTINGS = [  # 66 steps, so gentle that rounding errors stay small
    f"--config={digits_st3.__file__}",
    "--config.model.width=4",
    "--config.learning_rate.peak=0.01",
    "--config.num_epochs=2",
    "--config.fine_tune_epochs=1",
    "--config.sparsity.begin_epoch=0.5",
    "--config.sparsity.end_epoch=1.5",
    "--config.eval_every_epochs=3",
    "--config.checkpoint_every_epochs=0.5",
]


@contextlib.contextmanager
def reserved_address():
    """An address that nobody else gets: it is bound here, and shared with gRPC."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("localhost", 0))
        yield f"localhost:{reserved.getsockname()[1]}"


def start(arguments, devices, limited=()):
    # Without programs that one of two finds compiled: they have to be ready together.
    shared = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*limited, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **shared,
            "XLA_FLAGS": flags,
            "PYTHONPATH": os.pathsep.join(map(str, (EXPERIMENTS.parent, EXPERIMENTS))),
        },
    )


def finish(started):
    """(exit status, output, errors) of each process, none of which may hang."""
    ends = [process.communicate(timeout=1200) for process in started]
    return [
        (process.returncode, *end) for process, end in zip(started, ends, strict=True)
    ]


def test_two_processes_end_with_the_thresholds_of_one():
    program = PROGRAMS / "two_processes.py"
    with reserved_address() as address:
        ends = finish([start([program, address, str(i)], devices=2) for i in range(2)])
    outputs = []
    for status, stdout, stderr in ends:
        assert status == 0, stderr
        outputs.append(stdout.splitlines()[-1])
    alone = two_processes.bits(*two_processes.train(two_processes.PARAMS))
    assert outputs == [alone, alone]


def train_in_two(fates, workdir, data_dir, limited=()):
    """Starts ``train.py`` twice, with two devices each."""
    with reserved_address() as address:
        started = [
            start(
                [
                    *(*TRAIN, fate, *SETTINGS, f"--config.data.dir={data_dir}"),
                    *(f"--workdir={workdir}", f"--coordinator={address}"),
                    *("--processes=2", f"--process={i}"),
                ],
                devices=2,
                limited=limited,
            )
            for i, fate in enumerate(fates)
        ]
        return finish(started)


def last_state(workdir):
    with checkpoints.open_checkpoints(workdir) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=args)["state"]


def fingerprints(output):
    return re.findall(r"replicas agree: (\w+)", output)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the data set is prepared."""
    config = digits_st3.get_config()
    config.data.dir = str(tmp_path_factory.mktemp("tfds"))
    sources.load(config)
    return config.data.dir


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, data_dir):
    """The workdir and the ends of a run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, train_in_two(["end", "end"], workdir, data_dir)


def test_replicas_in_two_processes_are_the_same_bits(of_two):
    (one, first, error), (two, second, _) = of_two[1]
    assert (one, two) == (0, 0), error
    assert len(fingerprints(first)) > 5
    assert fingerprints(first)[-1] == fingerprints(second)[-1]
    assert "test accuracy" in first
    assert "test accuracy" not in second
    assert "the network to ship: " in first
    assert (of_two[0] / "model.st3").exists()


def test_two_processes_end_where_one_with_four_devices_does(of_two, tmp_path, data_dir):
    arguments = [*TRAIN, "end", *SETTINGS, f"--config.data.dir={data_dir}"]
    ((status, _, error),) = finish(
        [start([*arguments, f"--workdir={tmp_path}"], devices=4)]
    )
    assert status == 0, error
    alone, shared = last_state(tmp_path), last_state(of_two[0])
    assert alone["step"] == shared["step"] == 66
    for name in ("params", "batch_stats"):
        a, b = (jax.tree.leaves(state[name]) for state in (alone, shared))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_a_process_that_is_told_to_stop_stops_both_and_they_go_on(
    of_two, tmp_path, data_dir
):
    ends = train_in_two(["end", "terminate12"], tmp_path, data_dir)
    steps = set()
    for status, output, error in ends:
        assert status == 0, error
        steps |= set(re.findall(r"asked to stop: saved after step (\d+) of 66", output))
    assert len(steps) == 1

    (alive, output, error), (dead, *_) = train_in_two(
        ["end", "kill9"], tmp_path, data_dir
    )
    assert dead == -9
    assert alive != 0
    assert re.search("one of the 2 processes seems to be lost|another task died", error)

    ends = train_in_two(["end", "end"], tmp_path, data_dir)
    for status, _, error in ends:
        assert status == 0, error
    assert fingerprints(ends[0][1])[-1] == fingerprints(of_two[1][0][1])[-1]


def test_a_disk_that_is_full_ends_both(tmp_path, data_dir):
    with few_files(tmp_path, 40) as limited:
        (one, _, error), (two, _, lost) = train_in_two(
            ["end", "end"], tmp_path / "run", data_dir, limited
        )
    assert one == 1
    assert re.search(r"error: writing to .* failed \((No space|File too)", error)
    assert two != 0
    assert re.search("one of the 2 processes seems to be lost|another task died", lost)


def test_two_processes_with_other_images_are_told(tmp_path, data_dir):
    images = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (images / split / name).mkdir(parents=True)
            for i in range(64):
                Image.new("L", (8, 8)).save(images / split / name / f"{i}.png")
    other = shutil.copytree(images, tmp_path / "other")
    (other / "train" / "a" / "0.png").unlink()
    fields = ["--config.data.name=folder", "--config.data.in_memory=False"]
    with reserved_address() as address:
        started = [
            start(
                [
                    *(*TRAIN, "end", *SETTINGS, *fields, f"--config.data.dir={folder}"),
                    *(f"--workdir={tmp_path / 'run'}", f"--coordinator={address}"),
                    *("--processes=2", f"--process={i}"),
                ],
                devices=2,
            )
            for i, folder in enumerate((images, other))
        ]
        ends = finish(started)
    assert not (tmp_path / "run").exists()
    for status, _, error in ends:
        assert status == 1
        assert re.search(r"the images of process \d are not those of process \d", error)


def test_what_one_process_finds_wrong_is_told_by_both(tmp_path, data_dir):
    with only_run(tmp_path / "run"):
        ends = train_in_two(["end", "end"], tmp_path / "run", data_dir)
    for status, _, error in ends:
        assert status == 1
        assert "error: another run (on " in error
        assert "Fatal Python error" not in error
