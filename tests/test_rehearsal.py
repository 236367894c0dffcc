"""``imagenet_st3.py`` as it is, on a few images in ImageNet's layout."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from programs import two_processes

import imagenet_st3
import prepare
from workdir.monitor import read_metrics

EXPERIMENTS = pathlib.Path(imagenet_st3.__file__).parent
PROGRAM = pathlib.Path(two_processes.__file__).with_name("train_checked.py")
SIZES = [  # sixteen steps of a network that compiles in seconds
    "--config.model.depth=18",
    "--config.model.width=16",
    "--config.batch_size=16",
    "--config.data.image_size=32",
    "--config.data.workers=1",
    "--config.num_epochs=3",
    "--config.learning_rate.warmup_epochs=1",
    "--config.sparsity.begin_epoch=0.25",
    "--config.sparsity.end_epoch=2.0",
    "--config.fine_tune_epochs=1",
    "--config.log_every_steps=2",
    "--config.eval_every_epochs=2",
]
WEIGHTS = 827_696
pytestmark = pytest.mark.usefixtures("quickly_compiled")


def run(fate, data_dir, workdir):
    """The command of the README, on two simulated devices."""
    arguments = [
        *(sys.executable, PROGRAM, fate),
        f"--config={imagenet_st3.__file__}",
        *(f"--config.data.dir={data_dir}", *SIZES, f"--workdir={workdir}"),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (EXPERIMENTS.parent, EXPERIMENTS))),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(data_dir / "compiled"),
    }
    ended = subprocess.run(
        arguments, env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_job_runs_from_its_first_step_to_its_report(tmp_path):
    images = {"train": 64, "validation": 20, "test": 4}
    prepare.prepare_imagenet_rehearsal(str(tmp_path / "data"), images, seed=0)
    workdir = tmp_path / "run"
    stopped = run("terminate2", tmp_path / "data", workdir)
    assert "asked to stop: saved after step 3 of 16" in stopped
    output = run("end", tmp_path / "data", workdir)
    assert re.search(r"steps\s+│ 3 to 16, 4 an epoch", output)

    report = json.loads((workdir / "report.json").read_text())
    zeros = int(0.9 * (WEIGHTS - 1)) + 1
    assert report["weights"] == WEIGHTS
    assert report["weights"] - report["nonzero_weights"] == zeros
    assert report["layers"]["head/kernel"]["shape"] == [128, 1000]
    assert 0 <= report["test_accuracy"] <= 1
    assert (workdir / "course.png").exists()

    rows = read_metrics(workdir)
    tests = [row for row in rows if "test_accuracy" in row]
    assert [row["step"] for row in tests] == [8, 16]
    assert ["dense_test_accuracy" in row for row in tests] == [True, False]
    ramp = {row["step"]: row["sparsity"] for row in rows}
    assert 0 < ramp[3] < ramp[4] < ramp[6] < ramp[8]
    assert ramp[8] == pytest.approx(0.9, abs=1e-6)  # and weights that tie
    assert ramp[12] == ramp[16] == pytest.approx(ramp[8], abs=1e-6)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert all(loss < 20 for loss in losses)
    assert all(0 <= row["input_wait"] <= 1 for row in rows if "input_wait" in row)
