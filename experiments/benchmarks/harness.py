"""The way into a benchmark: it sees the experiments, and its ``main`` is run.

A script that is run by its path can import what lies beside it, and nothing else of
this repository. Importing this module adds the folder of the experiments, and in time:
sorted imports have the modules of this folder before those of the experiments.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, logging

__all__ = ["EXPERIMENTS", "run_main", "seeds_row"]

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent
"""Where ``train.py`` and the configurations are."""

sys.path.insert(0, str(EXPERIMENTS))


def run_main(main: Callable[[list[str]], Any]) -> None:
    """Parses the flags and calls ``main`` with what is left of the command line."""
    logging.set_verbosity(logging.ERROR)
    app.run(main)


def seeds_row(name: str, zeros: set[int], percents: list[float]) -> str:
    """A row of Markdown: zeros, then mean, least, largest and deviation over seeds."""
    cells = [
        name,
        " / ".join(f"{zero:,}" for zero in sorted(zeros)),
        f"**{np.mean(percents):.2f}**",
        f"{min(percents):.2f}",
        f"{max(percents):.2f}",
        f"{np.std(percents, ddof=1):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"
