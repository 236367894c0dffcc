"""How many reads of the weights an exact threshold costs, on ResNet-50's kernels.

python experiments/benchmarks/selection.py

Times the selection next to one read of the weights, ``np.partition`` and ``jnp.sort``,
interleaved in one run, on random weights of He-normal scale. Only the ratios mean
anything: they are printed as a table in Markdown. ``--weights=200000000`` times one
flat array of that many weights instead.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from harness import run_main

import imagenet_st3
from job.costs import abstract_variables, kernels_of
from models import create_model
from paths import kernels
from st3jax.selection import threshold

WEIGHTS = flags.DEFINE_integer("weights", 0, "Weights of one flat array; 0: ResNet-50.")
REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Timed calls of each row.")
SORT = flags.DEFINE_bool("sort", True, "Whether to time jnp.sort, once.")
SPARSITY = 0.9


def resnet50_kernels() -> tuple[list[jax.Array], list[int]]:
    """Random weights in the shapes of ResNet-50's 54 kernels, and what one costs."""
    config = imagenet_st3.get_config()
    model = create_model(config, 1000)
    variables, _ = abstract_variables(model, config)
    shapes = {k: v.shape for k, v in kernels(variables["params"]).items()}
    costs = kernels_of(model, config).costs
    rng = np.random.default_rng(0)
    leaves = [
        jnp.asarray(
            rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[:-1])),
            jnp.float32,
        )
        for shape in shapes.values()
    ]
    return leaves, [costs[path] for path in shapes]


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Times all rows and prints the table."""
    del argv
    if WEIGHTS.value:
        rng = np.random.default_rng(0)
        leaves = [jnp.asarray(rng.standard_normal(WEIGHTS.value, np.float32))]
        costs = [1]
    else:
        leaves, costs = resnet50_kernels()
    n = sum(leaf.size for leaf in leaves)
    flat = np.abs(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    fraction = np.float32(SPARSITY)
    select = jax.jit(lambda leaves, near: threshold(leaves, fraction, near=near))
    budget = jax.jit(
        lambda leaves, near: threshold(leaves, fraction, near=near, costs=costs)
    )
    start = time.perf_counter()
    compiled = select.lower(leaves, np.float32(-1)).compile()
    compile_seconds = time.perf_counter() - start
    t = np.float32(select(leaves, np.float32(-1)))
    position = int(float(fraction) * (n - 1))
    below, up_to = (flat < t).sum(), (flat <= t).sum()  # ties and interpolation between
    assert below <= position + 1 <= up_to, "not the exact threshold"

    cheap = np.float32(budget(leaves, np.float32(-1))) * np.float32(1.002)

    read = jax.jit(lambda leaves: sum(jnp.sum(jnp.abs(leaf)) for leaf in leaves))
    rows = {
        "one read, sum of magnitudes": lambda: read(leaves),
        "threshold, no hint": lambda: select(leaves, np.float32(-1)),
        "threshold, hint off by 0.2 %": lambda: select(leaves, t * np.float32(1.002)),
        "threshold, hint off by 30 %": lambda: select(leaves, t * np.float32(1.3)),
        "threshold of multiply-adds, no hint": lambda: budget(leaves, np.float32(-1)),
        "threshold of multiply-adds, hint": lambda: budget(leaves, cheap),
        "np.partition of prepared magnitudes": lambda: np.partition(flat, position),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(REPETITIONS.value + 1):
        for name, call in rows.items():
            once = seconds(call)
            if turn:  # the first turn compiles
                times[name].append(once)
    if SORT.value:
        sort = jax.jit(jnp.sort).lower(flat).compile()
        times["jnp.sort, once"] = [seconds(lambda: sort(flat))]

    base = np.median(times["one read, sum of magnitudes"])
    print(f"{n:,} weights in {len(leaves)} arrays, {REPETITIONS.value} repetitions")
    print(f"compiled in {compile_seconds:.1f} s", end=", ")
    memory = compiled.memory_analysis()
    extra = memory.temp_size_in_bytes / n if memory else float("nan")
    print(f"{extra:.2f} bytes of extra memory a weight\n")
    print("| | median, reads | median, ms |\n|---|---|---|")
    for name, taken in times.items():
        median = np.median(taken)
        print(f"| {name} | {median / base:.1f} | {1e3 * median:.1f} |")


if __name__ == "__main__":
    run_main(main)
