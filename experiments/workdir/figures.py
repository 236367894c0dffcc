"""The two pictures that a run leaves beside its report."""

import pathlib
from typing import Any

import matplotlib as mpl
import ml_collections
import numpy as np

from job.rates import cycles, total_steps
from workdir.files import draft_of
from workdir.monitor import read_metrics

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["plot_course", "plot_layers"]

ACCURACY, SPARSITY, GRID = "#1f5fa8", "#c8501e", "#dddddd"


def plot_course(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Test accuracy and sparsity over steps, and where the mask is fixed."""
    needed = {"test_accuracy", "sparsity"}
    rows = [row for row in read_metrics(workdir) if needed <= row.keys()]
    if not rows:  # somebody has emptied the file
        return
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    accuracy = [100 * row["test_accuracy"] for row in rows]
    axes.plot(steps, accuracy, color=ACCURACY)
    lowest = max(0, min(accuracy[-1] - 20, np.quantile(accuracy, 0.2) - 5))
    axes.set(xlabel="step", xlim=(0, max(steps)), ylim=(lowest, 100.5))
    axes.set_ylabel("test accuracy, %", color=ACCURACY)
    axes.tick_params(axis="y", labelcolor=ACCURACY)
    axes.grid(axis="y", color=GRID)
    right = axes.twinx()
    right.plot(steps, [100 * row["sparsity"] for row in rows], color=SPARSITY)
    right.set_ylabel("zero weights, %", color=SPARSITY)
    right.tick_params(axis="y", labelcolor=SPARSITY)
    right.set_ylim(-2, 102)
    epochs = total_steps(config, steps_per_epoch=1)
    trained = cycles(config) * config.num_epochs
    if epochs > trained:
        fixed = max(steps) * trained / epochs
        axes.axvline(fixed, color="grey", linestyle=":", linewidth=1)
        axes.annotate(
            "mask fixed ", (fixed, 0.03), xycoords=("data", "axes fraction"),
            ha="right", color="grey", fontsize="small",
        )  # fmt: skip
    for side in (axes, right):
        side.spines["top"].set_visible(False)
    _save(figure, workdir / "course.png")


def plot_layers(workdir: pathlib.Path, layers: dict[str, Any]) -> None:
    """The share of zeros of each kernel, in the order of the parameters."""
    names = [path.removesuffix("/kernel") for path in layers]
    shares = [100 * layer["zeros"] / layer["weights"] for layer in layers.values()]
    figure, axes = plt.subplots(
        figsize=(6.4, 0.8 + 0.24 * len(names)), layout="constrained"
    )
    bars = axes.barh(names, shares, color=SPARSITY, height=0.7)
    axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="zero weights, %", xlim=(0, 108))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    _save(figure, workdir / "layers.png")


def _save(figure: Any, path: pathlib.Path) -> None:
    try:
        with draft_of(path) as draft:
            figure.savefig(draft, format="png", dpi=200)
    finally:
        plt.close(figure)
