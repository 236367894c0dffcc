"""Tables and figures of the rows that ``compare_methods.py`` left.

python experiments/benchmarks/compare_tables.py

Writes ``compare_methods.md``, ``accuracy_sparsity.png`` and ``accuracy_cost.png`` next
to the rows, and prints the tables. A cell without all its runs says how many it has.
"""

import collections
import itertools
import pathlib
import statistics
import sys
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from absl import flags
from compare_methods import (
    ABLATED,
    ABLATION_SEEDS,
    METHODS,
    POWERS,
    SEEDS,
    SPARSITIES,
    ablation_row,
    read_rows,
)
from harness import run_main

mpl.use("Agg")
import matplotlib.pyplot as plt

NAME = flags.DEFINE_enum(
    "study", "compare_methods", ["compare_methods", "compare_methods_quick"], "Which."
)

DENSE, GRID = "#555555", "#dddddd"
STYLES = {
    "ST-3": ("#0072b2", "o"),
    "ST-3-sigma": ("#56b4e9", "s"),
    "GMP": ("#d55e00", "^"),
    "hard STE": ("#e69f00", "v"),
    "ProbMask": ("#009e73", "D"),
    "GraNet": ("#cc79a7", "P"),
    "LRR": ("#000000", "X"),
}

Rows = dict[tuple[str, float], list[dict[str, Any]]]


def by_cell(rows: Iterable[dict[str, str]]) -> Rows:
    """The runs of each row and sparsity, their numbers as numbers."""
    cells = collections.defaultdict(list)
    for row in rows:
        numbers = {k: float(v) for k, v in row.items() if k != "row"}
        cells[row["row"], float(row["asked_sparsity"])].append(numbers)
    return dict(cells)


def asked(cells: Rows) -> list[float]:
    """The sparsities that any method has a run at, in order."""
    return [s for s in sorted(SPARSITIES) if any((m, s) in cells for m in METHODS)]


def mean(runs: list[dict[str, Any]], field: str) -> float:
    """The mean of a field over runs."""
    return statistics.mean(run[field] for run in runs)


def spread(runs: list[dict[str, Any]]) -> float:
    """Sample standard deviation of the accuracies, 0 for one run."""
    values = [run["accuracy"] for run in runs]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy(runs: list[dict[str, Any]], seeds: int) -> str:
    """Mean and spread in percent."""
    if not runs:
        return ""
    text = f"{100 * mean(runs, 'accuracy'):.2f}"
    if len(runs) > 1:
        text += f" ± {100 * spread(runs):.2f}"
    return text if len(runs) >= seeds else f"{text} ({len(runs)} of {seeds} runs)"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def read_ratios(path: pathlib.Path) -> dict[str, float]:
    """What a step of each method takes next to a dense one."""
    steps = {row["row"]: float(row["step_ratio"]) for row in read_rows(path)}
    return {"dense": 1.0, **steps}


def accuracies(cells: Rows, ratios: dict[str, float], seeds: int) -> str:
    """Test accuracy by method and sparsity, epochs and time next to dense."""
    dense = cells[("dense", 0.0)]
    reference = mean(dense, "epochs")
    columns = asked(cells)
    blank = [""] * len(columns)
    lines = [["dense", accuracy(dense, seeds), *blank, f"{reference:.3g}", "1.0"]]
    for method in METHODS:
        runs = [cells.get((method, s), []) for s in columns]
        epochs = [mean(some, "epochs") for some in runs if some]
        if epochs:
            times = [ratios[method] * e / reference for e in epochs]
            lines.append(
                [
                    method,
                    "",
                    *(accuracy(some, seeds) for some in runs),
                    " / ".join(dict.fromkeys(f"{e:.3g}" for e in epochs)),
                    " / ".join(dict.fromkeys(f"{t:.1f}" for t in times)),
                ]
            )
    percent = (f"{100 * s:.0f} %" for s in (0, *columns))
    return table(["", *percent, "epochs", "time"], lines)


def costs(cells: Rows) -> str:
    """Zeros that there are, and multiply-adds that are left, by method and sparsity."""
    columns, lines = asked(cells), []
    for method in METHODS:
        runs = [cells.get((method, s), []) for s in columns]
        if any(runs):
            lines.append([method, *(cost(some) for some in runs)])
    return table(["", *(f"{100 * s:.0f} %" for s in columns)], lines)


def cost(runs: list[dict[str, Any]]) -> str:
    """Zeros and thousands of multiply-adds."""
    if not runs:
        return ""
    zeros = sorted({int(run["zeros"]) for run in runs})
    span = f"{zeros[0]:,}" + (f" to {zeros[-1]:,}" if len(zeros) > 1 else "")
    return f"{span}; {mean(runs, 'multiply_adds') / 1e3:,.0f}"


def ablation(cells: Rows, seeds: int) -> str:
    """Accuracy of every combination of ingredients, by the power of the ramp."""
    combinations = list(itertools.product((True, False), repeat=3))

    def runs(combination: tuple[bool, ...], power: float) -> list[dict[str, Any]]:
        soft, rescale, straight_through = combination
        row = ablation_row(soft, rescale, straight_through, power)
        return cells.get((row, ABLATED), [])[:seeds]

    powers = [p for p in POWERS if any(runs(c, p) for c in combinations)]
    lines = []
    for combination in combinations:
        soft, rescale, straight_through = combination
        some = [runs(combination, power) for power in powers]
        lines.append(
            [
                "soft" if soft else "hard",
                "yes" if rescale else "no",
                "straight-through" if straight_through else "masked",
                *(accuracy(cell, seeds) for cell in some),
            ]
        )
    head = ["threshold", "rescaled", "gradient", *(f"power {p:g}" for p in powers)]
    return table(head, lines)


def longer(cells: list[list[dict[str, Any]]], reference: float) -> str:
    """How many epochs a method trains, if they are more than the dense network's."""
    epochs = [mean(runs, "epochs") for runs in cells]
    least, most = f"{min(epochs):.3g}", f"{max(epochs):.3g}"
    if max(epochs) <= reference:
        return ""
    return f", {least} to {most} epochs" if least != most else f", {most} epochs"


def plot(cells: Rows, path: pathlib.Path, x: str) -> None:
    """Accuracy against what is left: a share of the weights, or multiply-adds."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    dense, columns = cells[("dense", 0.0)], asked(cells)
    axes.axhline(100 * mean(dense, "accuracy"), color=DENSE, lw=1, ls="--")
    axes.annotate(
        "dense", (1, 100 * mean(dense, "accuracy")), xycoords=("axes fraction", "data"),
        xytext=(4, 0), textcoords="offset points", va="center", color=DENSE,
    )  # fmt: skip
    for i, (method, (color, marker)) in enumerate(STYLES.items()):
        runs = [(s, cells[method, s]) for s in columns if (method, s) in cells]
        if not runs:
            continue
        beside = 1.02 ** (i - len(STYLES) // 2)  # markers would hide each other
        left = [
            100 * (1 - s) * beside if x == "weights" else mean(some, x) / 1e3
            for s, some in runs
        ]
        means = [100 * mean(some, "accuracy") for _, some in runs]
        errors = [100 * spread(some) for _, some in runs]
        axes.errorbar(
            left, means, errors, color=color, marker=marker, ms=5, lw=1.5, capsize=2,
            label=method + longer([some for _, some in runs], mean(dense, "epochs")),
        )  # fmt: skip
    axes.set_xscale("log")
    if x == "weights":
        axes.set_xticks(
            [100 * (1 - s) for s in columns], [f"{100 * s:.0f} %" for s in columns]
        )
        axes.set_xticks([], minor=True)
        axes.set_xlabel("share of zero weights")
    else:
        ticks = [
            t
            for t in (20, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
            if min(axes.get_xlim()) < t
        ]
        ticks = [t for t in ticks if t < max(axes.get_xlim())]
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("multiply-adds left, thousands an image")
    axes.set_ylabel("test accuracy, %")
    axes.invert_xaxis()
    axes.grid(color=GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def markdown(cells: Rows, ratios: dict[str, float], quick: bool) -> str:
    """All tables, each under its heading."""
    seeds = 1 if quick else len(SEEDS)
    several = f"mean and sample standard deviation over {seeds} seeds"
    weights = int(cells[("dense", 0.0)][0]["weights"])
    dense = cells[("dense", 0.0)][0]["dense_multiply_adds"]
    parts = [
        f"Test accuracy in percent, {'one seed' if quick else several}; epochs of "
        "60,000 images; time is that of all steps, next to the dense network's.\n",
        accuracies(cells, ratios, seeds),
        f"Zeros of {weights:,} weights; thousands of multiply-adds an image that are "
        f"left, of {dense / 1e3:,.0f}.\n",
        costs(cells),
    ]
    if not quick:
        parts += [
            f"What each ingredient of ST-3 is worth at {100 * ABLATED:.0f} % zeros, "
            f"over {len(ABLATION_SEEDS)} seeds.\n",
            ablation(cells, len(ABLATION_SEEDS)),
        ]
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    """Writes and prints."""
    del argv
    folder = pathlib.Path(flags.FLAGS.results)
    rows = read_rows(folder / f"{NAME.value}.csv")
    if not rows:
        sys.exit(f"there are no rows in {folder}: run compare_methods.py first")
    cells = by_cell(rows)
    ratios = read_ratios(folder / "compare_steps.csv")
    text = markdown(cells, ratios, NAME.value.endswith("quick"))
    (folder / f"{NAME.value}.md").write_text(text)
    if NAME.value == "compare_methods":
        plot(cells, folder / "accuracy_sparsity.png", "weights")
        plot(cells, folder / "accuracy_cost.png", "multiply_adds")
    print(text)


if __name__ == "__main__":
    run_main(main)
