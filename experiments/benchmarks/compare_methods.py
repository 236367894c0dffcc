"""Sparse-training methods side by side, on Fashion-MNIST.

apt-get install dataset-fashion-mnist
python experiments/prepare.py --name=fashion_mnist
python experiments/benchmarks/compare_methods.py

Trains ``fashion_mnist_st3.py`` with each method, at each sparsity, for each seed, and
an ablation of ST-3's ingredients. Every run is a process of ``train.py`` and prints a
line when it ends. Rows are appended to ``--results``/compare_methods.csv: what is there
is not run again, and a run that was stopped goes on where it was. What a step takes is
timed before, in turn with dense steps. The learning rate is chosen first, for
the dense network, by training images that are held out, and kept for all. ``--quick``
is a smaller study. ``compare_tables.py`` makes tables and figures of the rows.
"""

import csv
import json
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from harness import EXPERIMENTS, run_main
from step_timing import Step, in_turn

import fashion_mnist_st3

RESULTS = EXPERIMENTS / "results"

FOLDER = flags.DEFINE_string("results", str(RESULTS), "Where rows are kept.")
AT_ONCE = flags.DEFINE_integer(
    "at_once", 2, "Runs at the same time, each on a core of its own."
)
QUICK = flags.DEFINE_bool("quick", False, "One seed, 95 % alone, fewer images.")

METHODS: dict[str, dict[str, Any]] = {
    "ST-3": {"sparsity.method": "st3"},
    "ST-3-sigma": {"sparsity.method": "st3", "sparsity.criterion": "l1_sigma"},
    "GMP": {"sparsity.method": "gmp"},
    "hard STE": {"sparsity.method": "ste"},
    "ProbMask": {"sparsity.method": "probmask"},
    # No fine-tuning is published for these two: as many epochs, one schedule.
    "GraNet": {"sparsity.method": "granet", "num_epochs": 6},
    # Half of what is left a cycle, where a fifth is published: 4 to 7 cycles, not 9 to
    # 19.
    "LRR": {"sparsity.method": "lrr", "num_epochs": 6, "lrr.keep": 0.5},
}
SPARSITIES = (0.95, 0.9, 0.98, 0.8)
SEEDS = (0, 1, 2)
RATES = (0.05, 0.1, 0.2, 0.4)
HELD_OUT = {"data.train_split": "train[:90%]", "data.test_split": "train[90%:]"}
FEWER = {"data.train_split": "train[:40%]"}
STEPS = 41  # timed, of each method
ABLATED, ABLATION_SEEDS, POWERS = 0.95, (0, 1), (3.0, 2.0, 1.0)
FIELDS = (
    "row", "asked_sparsity", "seed", "accuracy", "zeros", "weights", "multiply_adds",
    "dense_multiply_adds", "epochs", "learning_rate",
)  # fmt: skip


class Run(NamedTuple):
    """One training run.

    Attributes:
        row: Which row of the table it belongs to.
        sparsity: What is asked for, 0 for the dense network.
        seed: Its seed.
        fields: Fields of the configuration that it changes.
    """

    row: str
    sparsity: float
    seed: int
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """A name for its folder."""
        row = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.row)
        return f"{row}-{self.sparsity:g}-seed{self.seed}"


def ablation_row(
    soft: bool, rescale: bool, straight_through: bool, power: float
) -> str:
    """The row of one combination of ingredients; with all of them, it is ST-3."""
    if soft and rescale and straight_through and power == 3:
        return "ST-3"
    return ", ".join(
        (
            "soft" if soft else "hard",
            "rescaled" if rescale else "not rescaled",
            "straight-through" if straight_through else "masked gradient",
            f"power {power:g}",
        )
    )


def sweep() -> Iterator[Run]:
    """The dense network at each learning rate, tested on held-out training images."""
    for rate in RATES:
        fields = {"sparsity.method": "none", "learning_rate.peak": rate, **HELD_OUT}
        yield Run(f"learning rate {rate:g}", 0.0, 100, fields)


def compared(sparsities: Sequence[float], seeds: Sequence[int]) -> Iterator[Run]:
    """Each method at each sparsity for each seed."""
    for sparsity in sparsities:
        for row, fields in METHODS.items():
            for seed in seeds:
                yield Run(row, sparsity, seed, {**fields, "sparsity.final": sparsity})


def ablation() -> Iterator[Run]:
    """Every combination of ST-3's ingredients that is not ST-3 itself."""
    for power in POWERS:
        for soft in (True, False):
            for rescale in (True, False):
                for straight_through in (True, False):
                    row = ablation_row(soft, rescale, straight_through, power)
                    fields = {
                        "sparsity.final": ABLATED,
                        "sparsity.soft": soft,
                        "sparsity.rescale": rescale,
                        "sparsity.straight_through": straight_through,
                        "sparsity.power": power,
                    }
                    if row != "ST-3":
                        for seed in ABLATION_SEEDS:
                            yield Run(row, ABLATED, seed, fields)


def study(rate: float) -> list[Run]:
    """All runs, in an order that completes one part of the tables after another."""
    seeds = SEEDS[:1] if QUICK.value else SEEDS
    common = {"learning_rate.peak": rate, **(FEWER if QUICK.value else {})}
    runs = [Run("dense", 0.0, seed, {"sparsity.method": "none"}) for seed in seeds]
    runs += compared(SPARSITIES[:1], seeds)
    if not QUICK.value:
        runs += compared(SPARSITIES[1:-1], seeds)
        runs += ablation()
        runs += compared(SPARSITIES[-1:], seeds)
    return [run._replace(fields={**common, **run.fields}) for run in runs]


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a results file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, str]) -> tuple[str, float, int]:
    """What a row of results is known by."""
    return row["row"], float(row["asked_sparsity"]), int(row["seed"])


class Study:
    """Runs what is missing and appends its rows."""

    def __init__(self, path: pathlib.Path, folder: pathlib.Path):
        """Keeps rows at ``path`` and workdirs in ``folder``."""
        self.path, self.folder = path, folder
        self.cores: queue.Queue[int] = queue.Queue()
        free = sorted(os.sched_getaffinity(0))
        for i in range(AT_ONCE.value):
            self.cores.put(free[i % len(free)])

    def finish(self, runs: list[Run]) -> None:
        """Runs what has no row yet, ``--at_once`` of them together."""
        done = {key(row) for row in read_rows(self.path)}
        missing = [run for run in runs if (run.row, run.sparsity, run.seed) not in done]
        started, failed = time.monotonic(), []
        with futures.ThreadPoolExecutor(AT_ONCE.value) as pool:
            jobs = {pool.submit(self.train, run): run for run in missing}
            for ended, job in enumerate(futures.as_completed(jobs), 1):
                name, row = jobs[job].name, job.result()
                if row is None:
                    failed.append(name)
                    print(f"failed: {name}, see {self.folder / name}.log", flush=True)
                    continue
                self.append(row)
                minutes = (time.monotonic() - started) / 60
                left = minutes / ended * (len(missing) - ended)
                print(
                    f"[{len(runs) - len(missing) + ended}/{len(runs)}] {name}: "
                    f"{float(row['accuracy']):.2%}, {int(row['zeros']):,} zeros; "
                    f"{minutes:.0f} min, about {left:.0f} left",
                    flush=True,
                )
        if failed:
            sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}")

    def train(self, run: Run) -> dict[str, Any] | None:
        """Trains in a process of its own, to the end; its row, or None if it failed."""
        workdir = self.folder / run.name
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            str(EXPERIMENTS / "train.py"),
            f"--config={EXPERIMENTS / 'fashion_mnist_st3.py'}",
            f"--workdir={workdir}",
            f"--config.seed={run.seed}",
            *(f"--config.{name}={value}" for name, value in run.fields.items()),
        ]
        core = self.cores.get()
        try:
            with (self.folder / f"{run.name}.log").open("w") as log:
                pinned = ["taskset", "-c", str(core), *command]
                ended = subprocess.run(pinned, stdout=log, stderr=log, check=False)
        finally:
            self.cores.put(core)
        path = workdir / "report.json"
        if ended.returncode or not path.exists():
            return None
        report = json.loads(path.read_text())
        images = report["steps"] * report["config"]["batch_size"]
        return {
            "row": run.row,
            "asked_sparsity": run.sparsity,
            "seed": run.seed,
            "accuracy": report["test_accuracy"],
            "zeros": report["weights"] - report["nonzero_weights"],
            "weights": report["weights"],
            "multiply_adds": report["multiply_adds"],
            "dense_multiply_adds": report["dense_multiply_adds"],
            "epochs": round(images / 60_000, 1),
            "learning_rate": report["config"]["learning_rate"]["peak"],
        }

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def time_steps(path: pathlib.Path) -> None:
    """What a step of each method takes next to a dense one, both in turn."""
    if path.exists():
        return
    lines: list[tuple[str, str]] = []
    for row, fields in METHODS.items():
        pair = {}
        for name, changed in (("dense", {"sparsity.method": "none"}), (row, fields)):
            config = fashion_mnist_st3.get_config()
            config.update_from_flattened_dict(changed)
            pair[name] = Step(config)
        times = in_turn(pair, STEPS)
        lines.append((row, f"{np.median(times[row] / times['dense']):.3f}"))
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("row", "step_ratio"), *lines])


def best_rate(path: pathlib.Path) -> float:
    """The rate whose dense network was best on held-out training images."""
    rows = {key(row): row for row in read_rows(path)}
    chosen = max(sweep(), key=lambda run: float(rows[run[:3]]["accuracy"]))
    return chosen.fields["learning_rate.peak"]


def main(argv: list[str]) -> None:
    """Sweeps the learning rate, then runs the study with the best."""
    del argv
    name = "compare_methods_quick" if QUICK.value else "compare_methods"
    path = pathlib.Path(FOLDER.value, f"{name}.csv")
    runner = Study(path, pathlib.Path("runs", name))
    path.parent.mkdir(parents=True, exist_ok=True)
    time_steps(path.with_name("compare_steps.csv"))
    if QUICK.value:
        runner.finish(study(rate=0.2))
    else:
        runner.finish(list(sweep()))
        runner.finish(study(best_rate(path)))
    print(f"all rows are in {path}")


if __name__ == "__main__":
    run_main(main)
