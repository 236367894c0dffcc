"""Kills a training run again and again, and compares what it ends with, bit by bit.

python experiments/benchmarks/kill_and_resume.py

Trains a short ``digits_st3.py`` undisturbed, then again with SIGKILL at random moments,
each time started anew by the same command. Half of the kills come at any moment from
the start on, half of them a moment after the program began to save. A run that reaches
its end in spite of that is compared with the undisturbed one: every leaf of the last
checkpoint, and every row of ``metrics.jsonl`` without the fields about speed. Then
another begins, until there were ``--kills`` of them, and the last one is left to end.

Everything is in ``runs/kill_and_resume``, which is removed first. What is compiled is
kept there for the next start. Exits with status 1 if anything differs.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from harness import run_main
from short_run import command, differences, environment, result

from workdir.monitor import read_metrics

KILLS = flags.DEFINE_integer("kills", 50, "How often the runs are killed.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments.")

FOLDER = pathlib.Path("runs", "kill_and_resume")
MOST_SAVES = 6  # a kill that waits for a save lets pass fewer than this
SAVE_SECONDS = 0.1  # at most so long after it began


class Moment(NamedTuple):
    """When to kill: ``seconds`` after a save began, the first one counting as 1.

    Counted from the start of the program if ``save`` is 0.
    """

    save: int
    seconds: float


class Counts(NamedTuple):
    """How many kills left a save unfinished, and how many came before any step."""

    unfinished: int = 0
    before_first_step: int = 0


def moments(kills: int, seed: int, duration: float) -> list[Moment]:
    """Random moments for runs that take ``duration`` seconds."""
    rng = np.random.default_rng(seed)
    return [
        Moment(int(rng.integers(1, MOST_SAVES)), rng.uniform(0, SAVE_SECONDS))
        if kill % 2
        else Moment(0, rng.uniform(0, duration))
        for kill in range(kills)
    ]


def saves(workdir: pathlib.Path, finished: bool) -> set[str]:
    """Names of the checkpoints that are finished, or of those that are not."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return {name for name in names if name.isdigit() == finished}


def train(workdir: pathlib.Path, moment: Moment | None = None) -> bool:
    """Starts the run, and kills it at a moment; whether it ended before that.

    Raises:
        SystemExit: If the run fails by itself, or finds a checkpoint damaged.
    """
    log = workdir.with_suffix(".txt")
    with log.open("w") as output:
        process = subprocess.Popen(
            command(workdir, FOLDER / "data"),
            stdout=output,
            stderr=output,
            env=environment(FOLDER / "cache"),
        )
        if moment:
            _kill(process, workdir, moment)
        status = process.wait()
    if "is damaged" in log.read_text() or status not in (0, -9):
        sys.exit(f"{log.read_text()}\nfailed in {workdir}, with status {status}")
    return status == 0


def _kill(process: Any, workdir: pathlib.Path, moment: Moment) -> None:
    """Kills the process at the moment, unless it ends before that."""
    began, seen = time.monotonic(), 0
    there = saves(workdir, finished=False)
    while process.poll() is None:
        if seen >= moment.save and time.monotonic() - began >= moment.seconds:
            process.kill()
            return
        before, there = there, saves(workdir, finished=False)
        if there - before and seen < moment.save:
            began, seen = time.monotonic(), seen + 1
        time.sleep(0.001)


def killed(workdir: pathlib.Path, moment: Moment) -> Counts | None:
    """Trains up to a kill; None if the run ended before that."""
    metrics = workdir / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else b""
    start = max(map(int, saves(workdir, finished=True)), default=0)
    if train(workdir, moment):
        return None
    rows = read_metrics(workdir)
    if not rows or rows[-1]["step"] <= start or metrics.read_bytes() == before:
        return Counts(before_first_step=1)  # and what is unfinished was so before
    return Counts(unfinished=bool(saves(workdir, finished=False)))


def main(argv: list[str]) -> None:
    """Kills, compares and prints a summary."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to the runs
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    train(FOLDER / "undisturbed")
    expected = result(FOLDER / "undisturbed")
    began = time.monotonic()
    train(FOLDER / "run0")  # nothing to compile, and compared as well
    duration = time.monotonic() - began
    differing = differences(expected, FOLDER / "run0")

    counts: list[Counts] = []
    run, starts = 1, 0
    plan = moments(KILLS.value, SEED.value, duration)
    while len(counts) < len(plan):
        workdir = FOLDER / f"run{run}"
        count = killed(workdir, plan[len(counts)])
        starts += 1
        if count:
            counts.append(count)
        else:
            differing += differences(expected, workdir)
            print(f"run {run} ended after {starts} starts; {differing} differing")
            run, starts = run + 1, 0
    train(FOLDER / f"run{run}")
    differing += differences(expected, FOLDER / f"run{run}")

    unfinished, early = (sum(column) for column in zip(*counts, strict=True))
    leaves, rows = map(len, expected)
    print(
        f"{len(counts)} kills: {unfinished} left an unfinished save, {early} came "
        f"before the first step\n{run} killed runs compared with the undisturbed one, "
        f"each in {leaves} leaves and {rows} rows of metrics: {differing} differing"
    )
    sys.exit(bool(differing))


if __name__ == "__main__":
    run_main(main)
