"""A short run of ``train.py`` that benchmarks of faults disturb, and its result."""

import os
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from harness import EXPERIMENTS

import digits_st3
from workdir import checkpoints
from workdir.monitor import read_metrics

__all__ = ["command", "differences", "environment", "result", "settings"]

SETTINGS = {
    "model.width": 4,
    "num_epochs": 5,
    "fine_tune_epochs": 1,
    "sparsity.begin_epoch": 1,
    "sparsity.end_epoch": 4,
    "log_every_steps": 1,
    "eval_every_epochs": 2,
    "checkpoint_every_epochs": 0.25,
}
SPEED = ("images_per_second", "input_wait")


def command(workdir: pathlib.Path, data: pathlib.Path, **settings: Any) -> list[str]:
    """What starts a run, and what continues it."""
    fields = {**SETTINGS, "data.dir": data.resolve(), **settings}
    return [
        sys.executable,
        str(EXPERIMENTS / "train.py"),
        f"--config={EXPERIMENTS / 'digits_st3.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def settings(data: pathlib.Path) -> ml_collections.ConfigDict:
    """The configuration of such a run."""
    config = digits_st3.get_config()
    config.update_from_flattened_dict({**SETTINGS, "data.dir": str(data.resolve())})
    return config


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Variables for a run; what is compiled is kept for the next start."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def result(workdir: pathlib.Path) -> tuple[list[Any], list[dict[str, float]]]:
    """What is compared: leaves of the last checkpoint, and rows of metrics."""
    with checkpoints.open_checkpoints(workdir) as manager:
        restored = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(state=ocp.args.StandardRestore()),
        )
    leaves = jax.tree.leaves_with_path(restored["state"])
    rows = [
        {name: value for name, value in row.items() if name not in SPEED}
        for row in read_metrics(workdir)
    ]
    return [(path, x.dtype, x.shape, x.tobytes()) for path, x in leaves], rows


def differences(expected: Any, workdir: pathlib.Path) -> int:
    """How many leaves and rows differ between the ends of two runs."""
    found = result(workdir)
    return sum(
        abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))
        for a, b in zip(expected, found, strict=True)
    )
