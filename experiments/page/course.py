"""Figures over the steps of the training."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from page.drawing import RULE, RUNS, Line, panel
from page.runs import Run
from page.words import labels, percent

__all__ = ["panels"]


def panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Figures over steps; none without rows of metrics."""
    if not any(run.rows for run in runs):
        return []
    marks = sorted({mark for run in runs for mark in _fixed(run.report)})
    coloured = list(zip(runs, RUNS, strict=False))
    dense = [
        _line(run, "dense_test_accuracy", colour, 100)._replace(style="--")
        for run, colour in coloured
    ]
    accuracies = [_line(run, "test_accuracy", colour, 100) for run, colour in coloured]
    targets = [_target(run.report) for run in runs]
    zeros = [_line(run, "sparsity", colour, 100) for run, colour in coloured]
    losses = [_line(run, "train_loss", colour) for run, colour in coloured]
    accuracy = panel("accuracy", [*dense, *accuracies], _ends(accuracies), marks)
    course = panel("zeros", [*targets, *zeros], (-2.0, 102.0), marks)
    loss = panel("loss", losses, (0.0, _highest(losses)), marks)
    within = map(_dense_within, runs, labels(runs))
    notes = [note for notes in within for note in notes]
    return [
        {"title": "Test accuracy, %", "svg": accuracy, "notes": notes},
        {"title": "Zero weights, %", "svg": course, "notes": []},
        {"title": "Training loss", "svg": loss, "notes": []},
    ]


def _line(run: Run, name: str, colour: str, factor: float = 1) -> Line:
    rows = [row for row in run.rows if name in row]
    return Line(
        [row["step"] for row in rows], [factor * row[name] for row in rows], colour
    )


def _dense_within(run: Run, label: str) -> Iterator[str]:
    """The raw weights of the same run, as long as they were other ones."""
    rows = [row for row in run.rows if "dense_test_accuracy" in row]
    if rows:
        dense, sparse = rows[-1]["dense_test_accuracy"], rows[-1]["test_accuracy"]
        yield (
            f"After step {rows[-1]['step']:,}{f' of {label}' if label else ''}: "
            f"{percent(sparse)}, and {percent(dense)} with the raw, dense weights"
        )


def _fixed(report: dict[str, Any]) -> list[int]:
    """Where the mask was fixed, if the run went on from there."""
    fixed = report["fine_tuning_begins"]
    sparse = report["config"]["sparsity"]["method"] != "none"
    return [fixed] if sparse and fixed < report["steps"] else []


def _target(report: dict[str, Any]) -> Line:
    """The ramp, where one number is asked for of all weights together."""
    asked = report["config"]["sparsity"]
    ramp = [asked[name] for name in ("final", "begin_epoch", "end_epoch", "power")]
    of_others = asked["layers"] or asked["dense"] or asked["budget"] == "multiply_adds"
    if None in ramp or of_others:
        return Line([], [], RULE)
    final, begin, end, power = ramp
    epoch = report["steps_per_epoch"]
    begin, end = round(begin * epoch), round(end * epoch)
    with np.errstate(all="raise"):  # numbers that are none of a run
        steps = np.linspace(0, report["steps"], 400)
        done = np.clip((steps - begin) / (end - begin), 0, 1)
        shares = 100 * final * (1 - (1 - done) ** power)
    return Line(steps.tolist(), shares.tolist(), RULE, width=5)


def _ends(lines: Sequence[Line]) -> tuple[float | None, float | None]:
    """Not down to the first steps, which would flatten all that follows."""
    values = [y for line in lines for y in line.ys]
    if not values:
        return None, None
    least = min(line.ys[-1] for line in lines if line.ys)
    lowest = min(least - 5, float(np.quantile(values, 0.1)) - 2)
    return max(0.0, lowest), 100.5


def _highest(lines: Sequence[Line]) -> float | None:
    values = [y for line in lines for y in line.ys]
    return 1.05 * float(np.quantile(values, 0.98)) if values else None
