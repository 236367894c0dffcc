"""Runs the network in ``model.jax.zst`` and ``model.st3``: python run.py images.npy.

Prints of each image the class, then its logits. Needs jax, numpy and zstandard. Images
are float32, normalised as in training.
"""

import pathlib
import sys

import jax
import numpy as np
import zstandard
from jax import export
from read_st3 import read

FOLDER = pathlib.Path(__file__).parent
weights = read(FOLDER / "model.st3")
program = zstandard.decompress((FOLDER / "model.jax.zst").read_bytes())
network = jax.jit(export.deserialize(bytearray(program)).call)


def logits(images: np.ndarray) -> np.ndarray:
    """Of images [N, ...], as many as you like."""
    return np.asarray(network(weights, images))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python run.py images.npy")
    try:
        found = logits(np.load(sys.argv[1]))
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"error: {error}")
    for row in found:
        print(row.argmax(), *row)
