"""What compaction gives trained networks: fewer channels, and faster in any engine.

pip install -e '.[export]' && apt-get install dataset-fashion-mnist
python experiments/prepare.py --name=fashion_mnist
python experiments/benchmarks/compaction.py

Trains ``digits_st3.py`` and ``fashion_mnist_st3.py`` at each sparsity, one run after
another, in folders under ``--folder``; what is already there is not trained again.
Each network is exported as ONNX and compacted, and both are tested on every test image
and timed in turn in ONNX Runtime: the CPU time of one thread, the least of many runs.
Prints a table in Markdown of means over seeds and writes it to the folder.
"""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from engines import Run, onnx_runtime
from harness import run_main

import digits_st3
import fashion_mnist_st3
import st3jax
import train
from data import input_pipeline
from errors import Stopped
from job.augmentation import normalise
from job.build import Job, build
from shipping.compact import compact
from shipping.network import Network
from shipping.onnx_writer import to_onnx

FOLDER = flags.DEFINE_string("folder", "runs/compaction", "Where the runs are.")

SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each kind.", 1)

DATA = {"digits": digits_st3, "fashion_mnist": fashion_mnist_st3}

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
BATCHES = (1, 64)
SECONDS = 2.0  # of timing, for each batch
IN_A_ROW = 5


class Measured(NamedTuple):
    """A network, with all its channels or compacted.

    Attributes:
        accuracy: On the test images.
        multiply_adds: For one image.
        fewest: The same, if every channel goes that can.
        weights: Of its kernels.
        times: Milliseconds for each of ``BATCHES``.
    """

    accuracy: float
    multiply_adds: int
    fewest: int
    weights: int
    times: list[float]


def trained(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Any:
    """The variables that a run has left, which is trained if it has not ended."""
    file = workdir / "model.st3"
    if not file.exists():
        train.train_and_evaluate(config, workdir)
        jax.clear_caches()
    return st3jax.load_sparse(file)


def images_of(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The test images as the network takes them, and their labels."""
    batches = list(input_pipeline.test_batches(job.data, job.config))
    images = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
    return np.asarray(normalise(jnp.array(images), job.config)), labels


def measured(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[Measured]:
    """Exports, compacts, tests and times the network of one run: before and after.

    Raises:
        RuntimeError: If compaction has changed a logit by more than 1e-5.
    """
    variables = trained(config, workdir)
    job = build(config)
    images, labels = images_of(job)

    def apply(variables: Any, images: Any) -> Any:
        return job.model.apply(variables, images, train=False)

    network = Network(job.config.model.name, apply, variables, images[:4], {})
    model = to_onnx(network)
    compacted, fewest = compact(model), compact(model, multiple=1).multiply_adds
    runs = [onnx_runtime(x.SerializeToString()) for x in (model, compacted.model)]
    before, after = (run(images) for run in runs)
    error = np.abs(after - before).max() / np.abs(before).max()
    if not error <= 1e-5:
        raise RuntimeError(f"compaction changed the logits of {workdir} by {error:.1e}")
    times = np.transpose([in_turn(runs, images[:batch]) for batch in BATCHES])
    return [
        Measured(
            float((logits.argmax(-1) == labels).mean()),
            compacted.multiply_adds[i],
            fewest[i],
            compacted.weights[i],
            times[i].tolist(),
        )
        for i, logits in enumerate((before, after))
    ]


def in_turn(runs: list[Run], images: np.ndarray) -> list[float]:
    """Least milliseconds of CPU time of each, run in turn."""
    least = [np.inf] * len(runs)
    started = time.monotonic()
    while time.monotonic() - started < SECONDS:
        for i, run in enumerate(runs):
            for _ in range(IN_A_ROW):
                begin = time.process_time()
                run(images)
                least[i] = min(least[i], 1e3 * (time.process_time() - begin))
    return least


def row(data: str, sparsity: float, networks: list[list[Measured]]) -> str:
    """A row of Markdown: means over seeds, before and after."""

    def mean(values: Callable[[Measured], Any]) -> Any:
        return np.mean([[values(x) for x in pair] for pair in networks], 0)

    accuracy = 100 * mean(lambda x: x.accuracy)
    work = mean(lambda x: x.multiply_adds) / 1e6
    fewest = mean(lambda x: x.fewest)
    weights = mean(lambda x: x.weights)
    cells = [
        f"{data}, {100 * sparsity:g} %",
        f"{accuracy[0]:.2f} / {accuracy[1]:.2f}",
        f"{work[0]:.3f} / {work[1]:.3f}",
        f"**{work[1] / work[0]:.2f}**",
        f"{fewest[1] / fewest[0]:.2f}",
        f"{weights[1] / weights[0]:.2f}",
    ]
    for before, after in mean(lambda x: x.times).T:
        cells.append(f"{before:.3f} / {after:.3f}, {before / after:.2f}")
    return "| " + " | ".join(cells) + " |"


def markdown() -> str:
    """Runs all, and makes the table."""
    batches = " | ".join(f"ms for {batch}, times faster" for batch in BATCHES)
    lines = [
        "| zeros | accuracy, % | multiply-adds, millions | kept | without rounding up "
        f"| weights kept | {batches} |",
        "|---" * (6 + len(BATCHES)) + "|",
    ]
    for data, configuration in DATA.items():
        for sparsity in SPARSITIES:
            networks = []
            for seed in range(SEEDS.value):
                config = configuration.get_config()
                config.seed, config.sparsity.final = seed, sparsity
                name = f"{data}-{sparsity:g}-seed{seed}"
                networks.append(measured(config, pathlib.Path(FOLDER.value, name)))
            lines.append(row(data, sparsity, networks))
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Runs all and prints the table."""
    del argv
    try:
        table = markdown()
    except Stopped as stopped:
        sys.exit(str(stopped))
    pathlib.Path(FOLDER.value, "table.md").write_text(table)
    print(f"\n{table}")


if __name__ == "__main__":
    run_main(main)
