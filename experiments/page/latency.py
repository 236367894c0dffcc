"""How long exported networks take for an image, where an engine is installed."""

import importlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from errors import UserError
from page.runs import LATENCY, exported
from workdir.files import replace_file
from workdir.surroundings import processor

__all__ = ["measure_latency"]

CALLS = 50
SECONDS = 3.0
"""At most, for each network."""


def measure_latency(workdirs: Sequence[pathlib.Path]) -> str:
    """Times every ONNX file of the runs in turn, and leaves ``latency.json`` in each.

    Args:
        workdirs: Of the runs.

    Returns:
        A sentence about why nothing was timed, or nothing.

    Raises:
        UserError: If a file cannot be run.
        OSError: If the result cannot be written.
    """
    found = [
        (workdir, path)
        for workdir in workdirs
        for path in exported(workdir)
        if path.suffix == ".onnx"
    ]
    if not found:
        return ""
    try:
        engine = importlib.import_module("onnxruntime")
    except ImportError:
        return (
            "the ONNX files under export/ were not timed: ONNX Runtime is not "
            "installed, and pip install -e '.[export]' installs it"
        )
    times = _in_turn([_runner(engine, path) for _, path in found])
    for workdir in dict.fromkeys(workdir for workdir, _ in found):
        content = {
            "engine": f"ONNX Runtime {engine.__version__}",
            "machine": processor(),
            "files": [
                {
                    "file": path.relative_to(workdir).as_posix(),
                    "calls": len(each),
                    "milliseconds": 1000 * statistics.median(each),
                    "fastest": 1000 * min(each),
                }
                for (owner, path), each in zip(found, times, strict=True)
                if owner == workdir
            ],
        }
        replace_file(workdir / LATENCY, json.dumps(content, indent=2) + "\n")
    return ""


def _runner(engine: Any, path: pathlib.Path) -> Callable[[], Any]:
    """What computes the logits of one image, on one thread."""
    options = engine.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # nobody has asked for advice
    try:
        session = engine.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        (image,) = session.get_inputs()
        shape = [size if isinstance(size, int) else 1 for size in image.shape]
        pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)

        def run() -> Any:
            return session.run(None, {image.name: pixels})

        run()
    except Exception as error:  # of a library that raises of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be run by ONNX Runtime ({reason}): export it anew, or move "
            "it away"
        ) from error
    return run


def _in_turn(runners: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each call: one of each network after the other, as machines vary."""
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(CALLS):
        for run, own in zip(runners, times, strict=True):
            if sum(own) < SECONDS:
                start = time.perf_counter()
                run()
                own.append(time.perf_counter() - start)
    return times
