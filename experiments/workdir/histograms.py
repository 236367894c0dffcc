"""How raw and effective weights are distributed, just before the mask is fixed.

From then on the two are the same, and there is no threshold any more; before the ramp
has ended the threshold still moves. So there is one moment to look at: the last step
before.
"""

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

import st3jax
from job.build import Job
from job.rates import cycles
from job.steps import TrainState, effective_params
from page.runs import HISTOGRAMS
from paths import by_path, kernels
from workdir.files import replace_file, writing

__all__ = ["record", "recorded_after"]

BINS = 61
"""At most; an odd number, so that the one in the middle is around zero."""

REACH = 0.999
"""Share of the weights, by magnitude, that the bins reach to."""


def recorded_after(job: Job) -> int:
    """The step whose weights are recorded: the last before the mask is fixed."""
    epochs = cycles(job.config) * job.config.num_epochs
    return max(1, epochs * job.steps_per_epoch - 1)


def record(workdir: pathlib.Path, job: Job, state: TrainState) -> None:
    """Leaves ``histograms.json`` in the workdir: of each kernel, and its thresholds.

    A run that is resumed later does not come by that step again, and finds the file.

    Args:
        workdir: Where to write.
        job: What is trained.
        state: The state of one device.

    Raises:
        UserError: If it cannot be written.
    """
    seen = effective_params(job.config, state.params, state.opt_state)
    raw, effective = jax.device_get((kernels(state.params), kernels(seen)))
    thresholds = _thresholds(job, state.opt_state)
    content = {
        "step": int(state.step),
        "kernels": {
            path: {
                **_histogram(raw[path], effective[path]),
                "thresholds": thresholds.get(path, []),
            }
            for path in raw
        },
    }
    with writing(workdir):
        replace_file(workdir / HISTOGRAMS, json.dumps(content) + "\n")


def _histogram(raw: np.ndarray, effective: np.ndarray) -> dict[str, Any]:
    """Counts between ``-limit`` and ``limit``; of effective weights without zeros.

    What is not finite is in no bin: the loop ends at it, in a sentence.
    """
    raw, left = (np.asarray(x, np.float32) for x in (raw, effective))
    raw, left = raw[np.isfinite(raw)], left[np.isfinite(left) & (left != 0)]
    reaches = [np.quantile(np.abs(x), REACH) for x in (raw, left) if x.size]
    limit = float(max(reaches, default=0)) or 1.0
    bins = min(BINS, 2 * math.isqrt(raw.size) + 1)
    counts = [np.histogram(x, bins, (-limit, limit))[0] for x in (raw, left)]
    return {
        "limit": limit,
        "raw": counts[0].tolist(),
        "effective": counts[1].tolist(),
        "zeros": int(np.sum(effective == 0)),
        "weights": int(effective.size),
    }


def _thresholds(job: Job, opt_state: Any) -> dict[str, list[float]]:
    """The thresholds on magnitudes by path: the least and the largest of stacked ones.

    None where a method has no such number, or one that is about groups of weights.
    """
    if job.config.sparsity.method == "none" or job.config.sparsity.pattern:
        return {}
    state: Any = st3jax.find_state(opt_state)
    if isinstance(state, st3jax.ThresholdState):
        found = by_path(state.thresholds)
    elif isinstance(state, st3jax.STRState):
        found = by_path(jax.tree.map(jax.nn.sigmoid, state.thresholds))
    else:
        return {}
    ends = {path: (float(t.min()), float(t.max())) for path, t in found.items()}
    return {path: sorted({*t}) for path, t in ends.items() if t[0] > 0}
