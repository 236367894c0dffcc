"""Size of a compact file, and time to write and to load it, next to other formats.

python experiments/benchmarks/file_sizes.py

Variables of ResNet-50 as they are initialised (25.5 million kernel weights, He normal),
with the smallest of all layers set to zero by ``st3jax.prune``: written to a file of
each format and loaded again, in turns within one run, and compared to the bit.

* ``st3``: ``st3jax.save_sparse``, which waits for the disk; the others do not;
* ``npz``: ``numpy.savez_compressed``, dense;
* ``safetensors``: dense, and not compressed.

Sizes are in millions of bytes. Milliseconds are medians over ``--rounds`` on the clock,
ratios are medians of the ratios in each round. Of times only ratios mean anything.
"""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from harness import run_main
from rich.console import Console
from rich.table import Table
from safetensors import numpy as safetensors

import imagenet_st3
import st3jax
from models import create_model
from paths import by_path

ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed turns of each format.")
SPARSITIES = flags.DEFINE_list("sparsities", ["0", "0.8", "0.9", "0.95", "0.98"], "")
Variables = dict[str, Any]


def fresh_variables() -> Variables:
    """ResNet-50's, as they are initialised."""
    config = imagenet_st3.get_config()
    init = jax.jit(
        functools.partial(create_model(config, 1000).init, train=False),
        # It runs once: compiling fast matters more than running fast.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return init(jax.random.key(config.seed), jnp.zeros((1, 32, 32, 3)))


def pruned(variables: Variables, sparsity: float) -> Variables:
    """The same with that share of its kernel weights zero, on the host."""
    params = st3jax.prune(variables["params"], sparsity)
    return jax.device_get({**variables, "params": params})


def load_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays by their names."""
    with np.load(path) as file:
        return dict(file)


FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "st3": (st3jax.save_sparse, st3jax.load_sparse),
    "npz": (
        lambda path, tree: np.savez_compressed(path, **by_path(tree)),
        load_npz,
    ),
    "safetensors": (
        lambda path, tree: safetensors.save_file(by_path(tree), path),
        safetensors.load_file,
    ),
}


def milliseconds(fn: Callable[..., Any], *args: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    fn(*args)
    return 1e3 * (time.perf_counter() - start)


def in_turn(
    folder: pathlib.Path, tree: Variables, rounds: int
) -> dict[str, dict[str, np.ndarray]]:
    """Milliseconds of writing and of loading in each round; one before warms up."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"write": [], "load": []} for name in FORMATS
    }
    for _ in range(1 + rounds):
        for name, (save, load) in FORMATS.items():
            path = folder / f"model.{name}"
            path.unlink(missing_ok=True)
            times[name]["write"].append(milliseconds(save, path, tree))
            times[name]["load"].append(milliseconds(load, path))
    return {
        name: {what: np.array(x[1:]) for what, x in both.items()}
        for name, both in times.items()
    }


def same_bits(tree: Variables, loaded: Any) -> bool:
    """Whether all arrays are the same to the bit."""
    a, b = by_path(tree), by_path(loaded)
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def add_rows(table: Table, variables: Variables, sparsity: float) -> None:
    """All formats at one sparsity."""
    tree = pruned(variables, sparsity)
    dense = sum(x.nbytes for x in jax.tree.leaves(tree))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        times = in_turn(folder, tree, ROUNDS.value)
        for format_, both in times.items():
            path = folder / f"model.{format_}"
            if not same_bits(tree, FORMATS[format_][1](path)):
                raise AssertionError(f"{format_} has other bits")
            size = path.stat().st_size
            ratios = [np.median(both[x] / times["npz"][x]) for x in ("write", "load")]
            table.add_row(
                f"{100 * sparsity:g} %",
                format_,
                f"{size / 1e6:.2f}",
                f"{dense / size:.1f}",
                f"{np.median(both['write']):,.0f}",
                f"{np.median(both['load']):,.0f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                end_section=format_ == list(FORMATS)[-1],
            )


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    table = Table(title="ResNet-50, one threshold for all layers", title_justify="left")
    for heading in ("zeros", "format"):
        table.add_column(heading)
    for heading in ("MB", "dense /\nfile", "write,\nms", "load,\nms"):
        table.add_column(heading, justify="right")
    for heading in ("write /\nnpz", "load /\nnpz"):
        table.add_column(heading, justify="right")
    variables = fresh_variables()
    for sparsity in SPARSITIES.value:
        add_rows(table, variables, float(sparsity))
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
