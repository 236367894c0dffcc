"""How far the threshold moves from one training step to the next.

python experiments/benchmarks/threshold_movement.py

Trains ``digits_st3.py`` and compares the threshold after each step with two guesses:
the threshold before, and a straight line through the two before. The table says how far
off they are, in parts of the ramp, and how often the first window of the selection
(``MARGIN`` to both sides of the guess) holds the threshold.
``--settings.num_epochs=200 --settings.sparsity.end_epoch=160`` makes a longer ramp.
"""

import functools
import itertools

import jax
import ml_collections
import numpy as np
from flax import jax_utils
from harness import EXPERIMENTS, run_main
from ml_collections import config_flags

import train
from data import input_pipeline
from job import steps
from job.build import build
from models.layers import BATCH_AXIS
from st3jax.selection.quantile import MARGIN

CONFIG = config_flags.DEFINE_config_file(
    "settings", str(EXPERIMENTS / "digits_st3.py"), "Configuration file."
)


def thresholds(config: ml_collections.ConfigDict) -> tuple[np.ndarray, int, int]:
    """The threshold after each step, and when the ramp begins and ends."""
    job = build(config)
    config = job.config
    state = steps.create_train_state(config, job.model, job.tx)
    state = jax_utils.replicate(state, axis_name=BATCH_AXIS)
    step = jax.pmap(
        functools.partial(steps.train_step, config=config),
        BATCH_AXIS,
        donate_argnums=0,
    )
    batches = input_pipeline.train_batches(job.data, config, start=0)
    found = []
    for _ in range(job.steps):
        state, _ = step(state, train.split_over_devices(next(batches)))
        found.append(jax.tree.leaves(state.opt_state.thresholds)[0][0])
    sparsity = config.sparsity
    begin, end = sparsity.begin_epoch, sparsity.end_epoch
    return (
        np.stack(jax.device_get(found)),
        round(begin * job.steps_per_epoch),
        round(end * job.steps_per_epoch),
    )


def main(argv: list[str]) -> None:
    """Trains and prints the table."""
    del argv
    t, begin, end = thresholds(CONFIG.value)
    frozen = int(np.argmax(np.append(t[end:], 0) == 0)) + end
    edges = np.linspace(begin + 3, end, 5).astype(int)
    parts = {
        f"ramp, steps {low - begin}-{high - begin}": slice(low, high)
        for low, high in itertools.pairwise(edges)
    }
    parts["after the ramp"] = slice(end, frozen)
    guesses = {"the one before": t[1:-1], "a straight line": 2 * t[1:-1] - t[:-2]}
    print(f"a ramp of {end - begin} steps, window of {MARGIN} keys to both sides\n")
    print("| | guess | median, % | 95th percentile, % | in the window |")
    print("|---|---|---|---|---|")
    for name, part in parts.items():
        now = t[part]
        for guess, values in guesses.items():
            then = values[part.start - 2 : part.stop - 2]
            off = 100 * np.abs(then / now - 1)
            keys = np.abs(then.view(np.int32) - now.view(np.int32))  # as floats count
            print(
                f"| {name} | {guess} | {np.median(off):.3f} "
                f"| {np.percentile(off, 95):.3f} | {np.mean(keys < MARGIN):.0%} |"
            )


if __name__ == "__main__":
    run_main(main)
