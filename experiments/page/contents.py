"""What the page shows, from what runs have left: in words, numbers and tables."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from page.course import panels
from page.layers import layer_rows
from page.runs import Run
from page.weights import histograms, recorded_after
from page.words import amount, labels, percent, share, union, volume

__all__ = ["contents"]

BLANK: tuple[Any, ...] = (None, "", [], {})


def contents(runs: Sequence[Run]) -> dict[str, Any]:
    """The variables of the template, for one run or for two side by side."""
    reports = [run.report for run in runs]
    return {
        "names": [run.name for run in runs],
        "labels": labels(runs),
        "results": [_result(report) for report in reports],
        "between": _between(runs),
        "about": [_about(report) for report in reports],
        "figures": _figures(runs),
        "panels": panels(runs),
        "layers": list(layer_rows(reports)),
        "histograms": list(histograms(runs)),
        "recorded_after": recorded_after(runs),
        "files": _files(runs),
        "latencies": _latencies(runs),
        "settings": _beside([_flat(report["config"]) for report in reports]),
        "surroundings": _beside(
            [{**report["machine"], **report["versions"]} for report in reports]
        ),
    }


def _result(report: dict[str, Any]) -> str:
    accuracy = f"{percent(report['test_accuracy'])} test accuracy"
    if report["config"]["sparsity"]["method"] == "none":
        return f"{accuracy} with all of {report['weights']:,} kernel weights"
    return (
        f"{accuracy} with {percent(report['sparsity'])} of {report['weights']:,} "
        "kernel weights exactly zero"
    )


def _about(report: dict[str, Any]) -> str:
    config = report["config"]
    method = config["sparsity"]["method"]
    how = "trained dense" if method == "none" else f"trained with {method}"
    return (
        f"{config['model']['name']} on {config['data']['name']}, "
        f"{report['train_images']:,} images, {how}: {report['steps']:,} steps of "
        f"{config['batch_size']:,} images, seed {report['seed']}"
    )


def _between(runs: Sequence[Run]) -> str:
    """How far apart two runs are, where they were tested on as many images."""
    images = {_tested(run.report) for run in runs}
    if len(runs) < 2 or len(images) > 1:
        return ""
    accuracies = [run.report["test_accuracy"] for run in runs]
    apart, number = max(accuracies) - min(accuracies), images.pop()
    higher, lower = labels(runs)
    if accuracies[0] < accuracies[1]:
        higher, lower = lower, higher
    if not apart:
        return f"Both have the same accuracy, on {number:,} images."
    return (
        f"{higher} is {100 * apart:.2f} points above {lower}, "
        f"{round(apart * number):,} of {number:,} images."
    )


def _tested(report: dict[str, Any]) -> int:
    """How many images the accuracy is one of."""
    return report["test_images"] - report["skipped_test_images"]


# The numbers that count.


def _figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What stands at the top: a name, and of each run a number and words about it."""
    told: dict[str, Callable[[Run], tuple[str, str]]] = {
        "Test accuracy": _accuracy,
        "Moving average": _average,
        "Zero weights": _zeros,
        "Multiply-adds left": _multiply_adds,
        "Network in a file": _file,
        "Latency": _latency,
    }
    figures = []
    for name, tell in told.items():
        values = [tell(run) for run in runs]
        if any(number for number, _ in values):
            figures.append({"name": name, "values": values})
    return figures


def _accuracy(run: Run) -> tuple[str, str]:
    accuracy = run.report["test_accuracy"]
    images = _tested(run.report)
    error = math.sqrt(max(accuracy * (1 - accuracy), 0) / max(images, 1))
    return (
        percent(accuracy),
        f"of {images:,} images; their number alone makes it uncertain by "
        f"{100 * error:.2f} points (standard error)",
    )


def _average(run: Run) -> tuple[str, str]:
    if "ema_test_accuracy" not in run.report:
        return "", ""
    return (
        percent(run.report["ema_test_accuracy"]),
        "test accuracy of the moving average of the weights, with the same zeros",
    )


def _zeros(run: Run) -> tuple[str, str]:
    report = run.report
    left, weights = report["nonzero_weights"], report["weights"]
    return percent(report["sparsity"]), f"{left:,} of {weights:,} kernel weights left"


def _multiply_adds(run: Run) -> tuple[str, str]:
    left, dense = run.report["multiply_adds"], run.report["dense_multiply_adds"]
    return (
        percent(share(left, dense)),
        f"{amount(left)} of {amount(dense)} an image",
    )


def _file(run: Run) -> tuple[str, str]:
    size = run.files.get("model.st3")
    if size is None:
        return "", ""
    dense = run.files.get("model.safetensors")
    words = f", {share(size, dense):.3f} of the dense {volume(dense)}" if dense else ""
    return volume(size), f"model.st3{words}"


def _latency(run: Run) -> tuple[str, str]:
    rows = run.latency.get("files", [])
    if not rows:
        return "", ""
    told = _worth_telling(rows)
    return (
        f"{told['milliseconds']:.3g}\N{NO-BREAK SPACE}ms",
        f"an image, {told['file']} in {run.latency['engine']}, one thread",
    )


def _worth_telling(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of ``model.onnx``, unless another file is faster by more than noise."""
    fastest = min(rows, key=lambda row: row["milliseconds"])
    usual = [row for row in rows if row["file"] == "export/model.onnx"]
    if usual and fastest["milliseconds"] > 0.95 * usual[0]["milliseconds"]:
        return usual[0]
    return fastest


# What there is to ship, and what it was made with.


def _files(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Sizes; as a share of the dense file, too, where the run has one."""
    dense = [run.files.get("model.safetensors") for run in runs]
    return [
        {
            "name": name,
            "cells": [
                _size(run.files.get(name), whole)
                for run, whole in zip(runs, dense, strict=True)
            ],
        }
        for name in union(run.files for run in runs)
    ]


def _size(size: int | None, dense: int | None) -> dict[str, Any]:
    known = size is not None and dense
    return {"size": size, "share": share(size or 0, dense or 0) if known else None}


def _latencies(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [{"run": i, **run.latency} for i, run in enumerate(runs) if run.latency]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields that are of use, by the names that the command line has for them."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value not in BLANK:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _beside(tables: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Rows of a name, its value in each run, and whether runs differ in it."""
    rows = []
    for name in union(tables):
        values = [table.get(name, "") for table in tables]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return rows
