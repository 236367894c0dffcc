"""Accuracy of dense and sparse networks on digits, as means over seeds.

python experiments/benchmarks/digits_table.py

Runs ``digits_st3.py`` for each row and seed, one after another, in folders under
``runs/digits_table``; what is already there is not run again. Prints a table in
Markdown and writes it to that folder: the mean over the seeds, the least and the
largest, and the sample standard deviation. Another kind of processor gives other cells.
"""

import pathlib
import sys
from typing import Any

import jax
from absl import flags
from harness import run_main, seeds_row

import digits_st3
import train
from errors import Stopped

FOLDER = pathlib.Path("runs", "digits_table")
SEEDS = (0, 1, 2, 3, 4)
ROWS: dict[str, dict[str, Any]] = {
    "dense": {"method": "none"},
    "ST-3, 90 %": {"final": 0.9},
    "ST-3, 95 %": {"final": 0.95},
    "ST-3, 98 %": {"final": 0.98},
    "ST-3-sigma, 90 %": {"final": 0.9, "criterion": "l1_sigma"},
    "ST-3-sigma, 95 %": {"final": 0.95, "criterion": "l1_sigma"},
    "ST-3-sigma, 98 %": {"final": 0.98, "criterion": "l1_sigma"},
    "uniform, 90 %": {"final": 0.9, "distribution": "uniform"},
    "ERK, 90 %": {"final": 0.9, "distribution": "erk"},
    "2:4": {"final": 0.5, "pattern": "2:4", "dense": ("stem/*",)},
    "1:4": {"final": 0.75, "pattern": "1:4", "dense": ("stem/*",)},
    "blocks of 4x1, 75 %": {
        "final": 0.75,
        "pattern": "4x1",
        "dense": ("stem/*",),
    },
}

ROWS_RUN = flags.DEFINE_integer("rows", len(ROWS), "So many rows, from the first.")


def run(row: str, seed: int) -> dict[str, Any]:
    """The report of one run."""
    config = digits_st3.get_config()
    config.seed = seed
    config.sparsity.update(ROWS[row])
    name = row.replace(", ", "-").replace(" %", "")
    report = train.train_and_evaluate(config, FOLDER / f"{name}-seed{seed}")
    jax.clear_caches()  # of 60 runs, the programs would fill what a process may map
    return report


def markdown() -> str:
    """Runs all rows and makes the table of them: percents of the test images."""
    rows = list(ROWS)[: ROWS_RUN.value]
    reports = {(row, seed): run(row, seed) for row in rows for seed in SEEDS}
    lines = ["| | zeros | mean | from | to | ± |", "|---|---|---|---|---|---|"]
    for row in rows:
        own = [reports[row, seed] for seed in SEEDS]
        percents = [100 * report["test_accuracy"] for report in own]
        zeros = {report["weights"] - report["nonzero_weights"] for report in own}
        lines.append(seeds_row(row, zeros, percents))
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Runs all rows and prints the table."""
    del argv
    try:
        table = markdown()
    except Stopped as stopped:
        sys.exit(str(stopped))
    (FOLDER / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    run_main(main)
