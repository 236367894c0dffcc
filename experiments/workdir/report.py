"""The report at the end of a run: tables, a JSON file, two figures and a page."""

import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import st3jax
from job.build import Job
from page.write import PAGE, write_page
from paths import by_path
from workdir import histograms
from workdir.channels import dead_channels
from workdir.figures import plot_course, plot_layers
from workdir.files import replace_file, writing
from workdir.monitor import read_metrics, skipped_images
from workdir.surroundings import machine, versions

__all__ = ["print_settings", "write_report"]


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
    report = _content(workdir, job, params, tests)
    with writing(workdir):
        replace_file(workdir / "report.json", json.dumps(report, indent=2) + "\n")
        plot_course(workdir, job.config)
        plot_layers(workdir, report["layers"])
        write_page(workdir / PAGE, [workdir])
    _print_layers(console, report)
    console.print(
        f"test accuracy [bold]{tests['test_accuracy']:.2%}[/] with "
        f"[bold]{report['sparsity']:.2%}[/] of {report['weights']:,} kernel weights "
        f"zero ({report['nonzero_weights']:,} left), "
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
        f"{PAGE}, report.json, course.png and layers.png are in {escape(str(workdir))}",
        soft_wrap=True,  # so that it can be copied
    )
    return report


def _content(
    workdir: pathlib.Path, job: Job, params: Any, tests: dict[str, float]
) -> dict[str, Any]:
    """What ``report.json`` holds: numbers that a resumed run comes to as well."""
    config, costs = job.config, job.costs
    summary = st3jax.summary(params, layout=job.layouts)
    zeros = int(summary.zeros)
    leaves = by_path(params)
    accuracies = {name: x for name, x in tests.items() if name.endswith("_accuracy")}
    layers = {
        path: _layer(leaves[path], layer, costs[path], job.layouts[path])
        for path, layer in sorted(summary.layers.items(), key=_position)
    }
    return {
        **accuracies,
        "sparsity": zeros / summary.weights,
        "weights": summary.weights,
        "nonzero_weights": summary.weights - zeros,
        "multiply_adds": sum(
            costs[path] * (layer["weights"] - layer["zeros"])
            for path, layer in layers.items()
        ),
        "dense_multiply_adds": sum(
            costs[path] * layer["weights"] for path, layer in layers.items()
        ),
        "steps": job.steps,
        "steps_per_epoch": job.steps_per_epoch,
        "fine_tuning_begins": histograms.recorded_after(job) + 1,
        "train_images": len(job.data.train),
        "test_images": len(job.data.test),
        "seed": config.seed,
        "skipped_images": (
            skipped_images(read_metrics(workdir)) + job.data.skipped_train
        ),
        "skipped_test_images": (
            int(tests.get("skipped_test_images", 0)) + job.data.skipped_test
        ),
        "layers": layers,
        "config": json.loads(config.to_json_best_effort()),
        "versions": versions(),
        "machine": machine(),
    }


def _layer(leaf: Any, layer: st3jax.Layer, cost: int, layout: str) -> dict[str, Any]:
    """A kernel; its stacked kernels each, where it holds several."""
    each = np.asarray(layer.each)
    return {
        "shape": list(layer.shape),
        "layout": layout,
        "weights": layer.weights,
        "zeros": int(layer.zeros),
        **({"zeros_of_each": each.tolist()} if each.ndim else {}),
        "multiply_adds_per_weight": cost,
        **dead_channels(np.asarray(leaf), layout),
    }


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
