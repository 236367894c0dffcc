"""Accuracy of the transformer on digits, dense and sparse, as means over seeds.

python experiments/benchmarks/transformer_table.py

Runs ``transformer.py`` for each row and seed, one after another; what is already there
under ``runs/transformer_table`` is not run again. Prints a table in Markdown and writes
it to that folder: the mean over the seeds, the least and the largest, and the sample
standard deviation.
"""

import json
import pathlib
from typing import Any

from harness import run_main, seeds_row

import transformer

FOLDER = pathlib.Path("runs", "transformer_table")
SEEDS = (0, 1, 2)
SPARSITIES = (0.0, 0.8, 0.9, 0.95)


def run(sparsity: float, seed: int) -> dict[str, Any]:
    """What came out of one run, with the script's own settings otherwise."""
    file = FOLDER / f"{sparsity}-seed{seed}.json"
    if not file.exists():
        settings: dict[str, Any] = {x.name: x.default for x in transformer.SETTINGS}
        end = transformer.run(**settings | {"sparsity": sparsity, "seed": seed})
        del end["model"]
        FOLDER.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(end))
    return json.loads(file.read_text())


def markdown() -> str:
    """Runs all rows and makes the table of them: percents of the test images."""
    lines = ["| | zeros | mean | from | to | ± |", "|---|---|---|---|---|---|"]
    for sparsity in SPARSITIES:
        ends = [run(sparsity, seed) for seed in SEEDS]
        percents = [100 * end["accuracy"] for end in ends]
        name = f"ST-3, {100 * sparsity:.0f} %" if sparsity else "dense"
        lines.append(seeds_row(name, {end["zeros"] for end in ends}, percents))
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Runs all rows and prints the table."""
    del argv
    table = markdown()
    (FOLDER / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    run_main(main)
