"""Histograms of raw and effective weights."""

from collections.abc import Iterator, Sequence
from typing import Any

from page.drawing import HEIGHT, outline
from page.runs import Run
from page.words import share, union

__all__ = ["histograms", "recorded_after"]


def histograms(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Of each kernel one histogram a run, all of a kernel with the same reach."""
    kernels = [run.histograms.get("kernels", {}) for run in runs]
    order = union([*(run.report["layers"] for run in runs), *kernels])
    for path in order:
        found = [each.get(path) for each in kernels]
        if any(found):
            yield {
                "name": path.removesuffix("/kernel"),
                "drawings": [one and _drawing(one) for one in found],
            }


def recorded_after(runs: Sequence[Run]) -> str:
    """The steps that they are of."""
    steps = (run.histograms["step"] for run in runs if run.histograms)
    return " and ".join(f"{step:,}" for step in dict.fromkeys(steps))


def _drawing(found: dict[str, Any]) -> dict[str, Any]:
    limit, bins = found["limit"], len(found["raw"])
    highest = max([*found["raw"], *found["effective"]])
    thresholds = found["thresholds"]
    return {
        "raw": outline(found["raw"], highest),
        "effective": outline(found["effective"], highest),
        "bins": bins,
        "height": HEIGHT,
        "marks": [
            round(bins * (1 + sign * t / limit) / 2, 2)
            for t in thresholds
            for sign in (-1, 1)
            if t < limit
        ],
        "limit": f"{limit:.2g}",
        "threshold": " to ".join(f"{t:.3g}" for t in thresholds),
        "zeros": share(found["zeros"], found["weights"]),
        "differ": found["raw"] != found["effective"],
    }
