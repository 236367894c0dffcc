"""What an update costs where layers are stored as one array, next to the same apart.

python experiments/benchmarks/stacked.py

Times the update of ``st3(sgd, 0.9)`` on ``--layers`` kernels of ``--inputs`` by
``--outputs``: as one scanned array with a layout, and as a kernel for each layer. Both
are called in turn, ``--repetitions`` times; prints medians in milliseconds and their
ratio as a table in Markdown, for the three distributions.
"""

import statistics
import time
from typing import Any

import jax
import optax
from absl import flags
from harness import run_main

import st3jax

LAYERS = flags.DEFINE_integer("layers", 12, "Kernels in the stack.")
INPUTS = flags.DEFINE_integer("inputs", 512, "Of a kernel.")
OUTPUTS = flags.DEFINE_integer("outputs", 2048, "Of a kernel.")
REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Updates of each kind.")


def milliseconds(update: Any, state: Any, params: Any) -> float:
    """How long one update takes."""
    start = time.perf_counter()
    jax.block_until_ready(update(params, state, params))
    return 1e3 * (time.perf_counter() - start)


def row(distribution: str) -> str:
    """Both ways to store the same weights, in turn."""
    shape = (LAYERS.value, INPUTS.value, OUTPUTS.value)
    w = jax.random.normal(jax.random.key(0), shape)
    trees = {
        "one array": {"blocks": {"kernel": w}},
        "apart": {f"block{i}": {"kernel": w[i]} for i in range(len(w))},
    }
    runs = {}
    for name, params in trees.items():
        layout = {"*": "sio"} if name == "one array" else None
        tx = st3jax.st3(optax.sgd(0.1), 0.9, distribution=distribution, layout=layout)
        update = jax.jit(tx.update)
        _, state = update(params, tx.init(params), params)  # warm, as in training
        runs[name] = (update, state, params)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPETITIONS.value):
        for name, run in runs.items():
            times[name].append(milliseconds(*run))
    stacked, apart = (statistics.median(times[name]) for name in trees)
    return f"| {distribution} | {stacked:.0f} | {apart:.0f} | {stacked / apart:.2f} |"


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    print("| distribution | one array, ms | apart, ms | ratio |\n|---|---|---|---|")
    for distribution in ("global", "uniform", "erk"):
        print(row(distribution), flush=True)


if __name__ == "__main__":
    run_main(main)
