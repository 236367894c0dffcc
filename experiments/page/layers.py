"""Zeros, multiply-adds and dead channels, kernel by kernel."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from page.words import share, union

__all__ = ["layer_rows"]


def layer_rows(reports: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each kernel, one for each kernel stacked in it, and one for all."""
    for path in union(report["layers"] for report in reports):
        layers = [report["layers"].get(path) for report in reports]
        first = next(layer for layer in layers if layer)
        yield {
            "name": path.removesuffix("/kernel"),
            "shape": "\N{MULTIPLICATION SIGN}".join(map(str, first["shape"])),
            "weights": first["weights"],
            "cells": [layer and _cells(layer) for layer in layers],
            "kind": "kernel",
        }
        yield from _slices(layers)
    yield {
        "name": "all",
        "shape": "",
        "weights": reports[0]["weights"],
        "cells": [_total(report) for report in reports],
        "kind": "total",
    }


def _cells(layer: dict[str, Any]) -> dict[str, Any]:
    weights, zeros = layer["weights"], layer["zeros"]
    cost = layer["multiply_adds_per_weight"]
    return {
        "zeros": share(zeros, weights),
        "left": cost * (weights - zeros),
        "dense": cost * weights,
        "outputs": (layer["dead_outputs"], layer["outputs"]),
        "inputs": (layer["unread_inputs"], layer["inputs"]),
    }


def _slices(layers: Sequence[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    """The kernels that are stacked in a leaf, each by its place."""
    each = [_stacked(layer) if layer else {} for layer in layers]
    for place in union(each):
        cells = [cells.get(place) for cells in each]
        yield {
            "name": place,
            "shape": "",
            "weights": next(cell["weights"] for cell in cells if cell),
            "cells": cells,
            "kind": "slice",
        }


def _stacked(layer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """From the place of a stacked kernel, such as ``[3]``, to its numbers."""
    each = np.asarray(layer.get("zeros_of_each", 0))
    weights, cost = (
        layer["weights"] // max(each.size, 1),
        layer["multiply_adds_per_weight"],
    )
    return {
        "".join(f"[{i}]" for i in place): {
            "weights": weights,
            "zeros": share(int(zeros), weights),
            "left": cost * (weights - int(zeros)),
            "dense": cost * weights,
        }
        for place, zeros in np.ndenumerate(each)
        if place
    }


def _total(report: dict[str, Any]) -> dict[str, Any]:
    sums = {
        name: sum(layer[name] for layer in report["layers"].values())
        for name in ("dead_outputs", "outputs", "unread_inputs", "inputs")
    }
    return {
        "zeros": report["sparsity"],
        "left": report["multiply_adds"],
        "dense": report["dense_multiply_adds"],
        "outputs": (sums["dead_outputs"], sums["outputs"]),
        "inputs": (sums["unread_inputs"], sums["inputs"]),
    }
