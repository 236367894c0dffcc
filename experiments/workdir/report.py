"""The report at the end of a run: a table, a JSON file and two figures."""

import json
import pathlib
from typing import Any

import matplotlib as mpl
import ml_collections
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import st3jax
from job.build import Job
from job.rates import cycles, total_steps
from workdir.files import draft_of, replace_file, writing
from workdir.monitor import read_metrics, skipped_images

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["print_settings", "write_report"]

ACCURACY, SPARSITY, GRID = "#1f5fa8", "#c8501e", "#dddddd"


def print_settings(console: Console, job: Job, facts: dict[str, Any]) -> None:
    """What is about to run, before it runs: every field that is of use."""
    table = Table(title="settings", show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    table.add_section()
    for name, value in job.config.items():
        if not isinstance(value, ml_collections.ConfigDict):
            text = _shown(value, job.origins.get(name))
        else:
            fields = (
                (key, _shown(item, job.origins.get(f"{name}.{key}")))
                for key, item in value.items()
            )
            text = ", ".join(f"{key} {shown}" for key, shown in fields if shown)
        if text:
            table.add_row(name, text)
    console.print(table)


def _shown(value: Any, method: str | None) -> str:
    """A field's value, and whose it is; nothing if it is of no use."""
    if value in (None, "", ()):
        return ""
    return f"{value} ({method}'s own)" if method else str(value)


def write_report(
    workdir: pathlib.Path,
    console: Console,
    job: Job,
    params: Any,
    tests: dict[str, float],
) -> dict[str, Any]:
    """Prints the table by layer and leaves ``report.json`` and figures in the workdir.

    Args:
        workdir: Where to write.
        console: Where to print.
        job: What was trained.
        params: Effective weights at the end.
        tests: Accuracies and losses on the test images, of the sparse network and of
            the moving average where there is one.

    Returns:
        What ``report.json`` holds.

    Raises:
        UserError: If it cannot be written.
    """
    config, costs = job.config, job.costs
    summary = st3jax.summary(params)
    zeros = {path: int(layer.zeros) for path, layer in summary.layers.items()}
    total = int(summary.zeros)
    accuracies = {name: x for name, x in tests.items() if name.endswith("_accuracy")}
    report = {
        **accuracies,
        "sparsity": total / summary.weights,
        "weights": summary.weights,
        "nonzero_weights": summary.weights - total,
        "multiply_adds": sum(
            costs[path] * (layer.weights - zeros[path])
            for path, layer in summary.layers.items()
        ),
        "dense_multiply_adds": sum(
            costs[path] * layer.weights for path, layer in summary.layers.items()
        ),
        "steps": job.steps,
        "seed": config.seed,
        "skipped_images": (
            skipped_images(read_metrics(workdir)) + job.data.skipped_train
        ),
        "skipped_test_images": (
            int(tests.get("skipped_test_images", 0)) + job.data.skipped_test
        ),
        "layers": {
            path: {
                "shape": list(layer.shape),
                "weights": layer.weights,
                "zeros": zeros[path],
                "multiply_adds_per_weight": costs[path],
            }
            for path, layer in sorted(summary.layers.items(), key=_position)
        },
        "config": json.loads(config.to_json_best_effort()),
    }
    with writing(workdir):
        replace_file(workdir / "report.json", json.dumps(report, indent=2) + "\n")
        _plot_course(workdir, config)
        _plot_layers(workdir, report["layers"])
    _print_layers(console, report)
    console.print(
        f"test accuracy [bold]{tests['test_accuracy']:.2%}[/] with "
        f"[bold]{report['sparsity']:.2%}[/] of {summary.weights:,} kernel weights zero "
        f"({report['nonzero_weights']:,} left), "
        f"{report['multiply_adds'] / 1e6:,.2f} of "
        f"{report['dense_multiply_adds'] / 1e6:,.2f} million multiply-adds an image"
    )
    if "ema_test_accuracy" in tests:
        console.print(
            "the moving average of the weights, with the same zeros: test accuracy "
            f"[bold]{tests['ema_test_accuracy']:.2%}[/]"
        )
    if report["skipped_images"] or report["skipped_test_images"]:
        console.print(
            "images left out, for they could not be read: "
            f"{report['skipped_images']:,} while training, "
            f"{report['skipped_test_images']:,} of the test images"
        )
    console.print(
        f"report.json, course.png and layers.png are in {escape(str(workdir))}",
        soft_wrap=True,  # so that it can be copied
    )
    return report


def _position(item: tuple[str, Any]) -> tuple[bool, bool, str]:
    """Sorts the stem before and the head behind everything else."""
    path, _ = item
    return path.startswith("head"), not path.startswith("stem"), path


def _print_layers(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="kernels", title_justify="left")
    table.add_column("kernel")
    for heading in ("shape", "weights", "zeros", "sparsity", "multiply-\nadds"):
        table.add_column(heading, justify="right")
    for path, layer in report["layers"].items():
        left = layer["weights"] - layer["zeros"]
        table.add_row(
            path.removesuffix("/kernel"),
            "x".join(map(str, layer["shape"])),
            f"{layer['weights']:,}",
            f"{layer['zeros']:,}",
            f"{layer['zeros'] / layer['weights']:.2%}",
            f"{layer['multiply_adds_per_weight'] * left:,}",
        )
    table.add_section()
    zeros = report["weights"] - report["nonzero_weights"]
    table.add_row(
        "all",
        "",
        f"{report['weights']:,}",
        f"{zeros:,}",
        f"{report['sparsity']:.2%}",
        f"{report['multiply_adds']:,}",
    )
    console.print(table)


def _plot_course(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
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


def _plot_layers(workdir: pathlib.Path, layers: dict[str, Any]) -> None:
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
