"""A network as a program of ``jax.export``, beside its weights in a compact file.

The program takes the weights as arguments and a batch of any size, and runs on a CPU,
a GPU or a TPU. ``run.py`` runs it, and needs nothing of this project: the reader of the
weights is the one that ``docs/files.md`` shows.
"""

import pathlib
import re
import runpy
import sys
from typing import Any

import jax
import numpy as np
import zstandard
from jax import export as jax_export

import st3jax
from shipping import agreement
from shipping.network import Network

__all__ = ["FILES", "export", "logits", "program", "reader"]

FILES = ("run.py", "model.jax.zst", "model.st3", "read_st3.py")
RUN = pathlib.Path(__file__).with_name("run.py")
DOCS = pathlib.Path(__file__).parents[2] / "docs"
PLATFORMS = ("cpu", "cuda", "tpu")
MOST_BYTES = 2**36  # of a network's own file
SOURCES = "jax_traceback_in_locations_limit"
"""The setting that puts paths of this machine into a program, or not."""


def export(network: Network, folder: pathlib.Path) -> agreement.Exported:
    """Writes the program, the weights, and what runs them, and runs it.

    Raises:
        UserError: If the network cannot take a batch of any size, or what was written
            is not the network; nothing is in the folder then.
    """
    with agreement.draft_folder(folder, FILES) as draft:
        run, packed, weights, read = (draft / name for name in FILES)
        run.write_text(RUN.read_text())
        read.write_text(reader())
        compressor = zstandard.ZstdCompressor(level=19)
        packed.write_bytes(compressor.compress(program(network)))
        st3jax.save_sparse(weights, network.variables, metadata=network.metadata)
        tree = st3jax.load_sparse(weights, max_bytes=MOST_BYTES)
        zeros = agreement.check_variables(weights.name, tree, network)
        found = logits(draft, network.images)
        expected = agreement.expected_logits(network)
        error = agreement.check_logits("the program", found, expected)
    note = f"the program runs in JAX {jax.__version__} and newer ones"
    return agreement.Exported([folder / name for name in FILES], zeros, error, (note,))


def program(network: Network) -> bytes:
    """What :func:`jax.export.deserialize` reads: ``call(variables, images)``.

    Products are computed in full float32 wherever it runs.

    Raises:
        UserError: If the network cannot take a batch of any size.
    """
    (batch,) = jax_export.symbolic_shape("batch")
    weights: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network.variables
    )
    images = jax.ShapeDtypeStruct((batch, *network.images.shape[1:]), np.float32)

    def logits(variables: Any, images: Any) -> Any:
        return network.apply(variables, images)

    before = jax.config.values[SOURCES]
    jax.config.update(SOURCES, 0)
    try:
        with agreement.any_batch(), jax.default_matmul_precision("highest"):
            exporter = jax_export.export(jax.jit(logits), platforms=PLATFORMS)
            return bytes(exporter(weights, images).serialize())
    finally:
        jax.config.update(SOURCES, before)


def reader() -> str:
    """A module whose ``read`` reads a compact file: the one in the documentation."""
    page = (DOCS / "files.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = (snippet for snippet in snippets if "\ndef read(" in snippet)
    return f'"""Reads a compact file, whose layout st3jax documents."""\n\n{code}'


def logits(folder: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """What ``run.py`` computes, by the program that lies there."""
    sys.path.insert(0, str(folder))
    try:
        return runpy.run_path(str(folder / "run.py"))["logits"](images)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("read_st3", None)
