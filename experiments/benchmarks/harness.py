"""The way into a benchmark: it sees the experiments, and its ``main`` is run.

A script that is run by its path can import what lies beside it, and nothing else of
this repository. Importing this module adds the folder of the experiments, and in time:
sorted imports have the modules of this folder before those of the experiments.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import app, logging

__all__ = ["EXPERIMENTS", "run_main"]

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent
"""Where ``train.py`` and the configurations are."""

sys.path.insert(0, str(EXPERIMENTS))


def run_main(main: Callable[[list[str]], Any]) -> None:
    """Parses the flags and calls ``main`` with what is left of the command line."""
    logging.set_verbosity(logging.ERROR)
    app.run(main)
