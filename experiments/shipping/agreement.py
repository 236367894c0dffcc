"""Whether what was exported is the network: to the bit, or by its logits."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from errors import UserError
from paths import by_path
from shipping.network import Network

__all__ = [
    "TOLERANCE",
    "Exported",
    "any_batch",
    "check_logits",
    "check_variables",
    "draft_folder",
    "expected_logits",
]

TOLERANCE = 1e-5
"""Of the logits' largest difference, relative to the largest of them."""


class Exported(NamedTuple):
    """What was written, and how it was found to be the network.

    Attributes:
        paths: The files.
        zeros: Zeros in all arrays of the network, and in the files.
        error: The relative error of the logits; ``None`` if they were not computed.
        notes: What else a person should know, in sentences.
        call: Lines of Python from ``images`` and ``weights`` to ``logits``, where they
            depend on the network.
    """

    paths: list[pathlib.Path]
    zeros: int
    error: float | None
    notes: tuple[str, ...] = ()
    call: str = ""


@contextlib.contextmanager
def draft_folder(folder: pathlib.Path, names: Sequence[str]) -> Iterator[pathlib.Path]:
    """Where files of these names are written, which go to the folder at the end.

    If an error is raised before, nothing of them does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as draft:
        yield pathlib.Path(draft)
        for name in names:
            path = pathlib.Path(draft, name)
            with path.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave an empty file
            os.replace(path, folder / name)


@contextlib.contextmanager
def any_batch() -> Iterator[None]:
    """Says in a sentence that a network cannot be traced for a batch of any size.

    Raises:
        UserError: If it cannot.
    """
    try:
        yield
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        raise UserError(
            "the network cannot take a batch of any size: "
            f"{str(error).splitlines()[0]}; write x.shape[0] for len(x), and -1 or the "
            "number itself where a shape is computed from it"
        ) from error


def expected_logits(network: Network) -> np.ndarray:
    """What JAX computes of the network's images, in full float32.

    Raises:
        UserError: If that is no array of numbers that are finite.
    """
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(network.apply)(network.variables, network.images)
    if not isinstance(logits, jax.Array):
        raise UserError(
            f"the network gives a {type(logits).__name__}, and an export has one "
            "array: let apply return the logits alone"
        )
    if not np.isfinite(logits).all():
        raise UserError(
            "the network itself gives numbers that are not finite: see in which of its "
            "weights they are; nothing was written"
        )
    return np.asarray(logits)


def check_logits(what: str, found: np.ndarray, expected: np.ndarray) -> float:
    """The relative error of logits.

    Raises:
        UserError: If it is above 1e-5, or a number is none.
    """
    if found.shape != expected.shape:
        raise UserError(
            f"{what} gives logits of shape {found.shape}, JAX {expected.shape}: "
            "nothing was written"
        )
    least = np.finfo(np.float32).tiny
    largest = max(np.abs(expected).max(), least)
    error = float(np.abs(found - expected).max() / largest)
    if not error <= TOLERANCE:
        raise UserError(
            f"{what} gives other logits than JAX: they differ by {error:.1e} of the "
            f"largest, more than {TOLERANCE:g}, with equal weights; nothing was written"
        )
    return error


def check_variables(what: str, found: Any, network: Network) -> int:
    """How many zeros there are; every array has the bits of the network's.

    Raises:
        UserError: With the first that has not.
    """
    arrays, zeros = by_path(found), 0
    for path, leaf in by_path(network.variables).items():
        array, own = arrays.get(path), np.asarray(leaf)
        zeros += int(np.sum(own == 0))
        if array is None:
            raise UserError(f"{what} has nothing of {path}: nothing was written")
        if (array.shape, array.dtype) != (own.shape, own.dtype):
            raise UserError(
                f"{what} has {path} as {array.dtype}{[*array.shape]}, which is "
                f"{own.dtype}{[*own.shape]} in JAX: nothing was written"
            )
        if array.tobytes() != own.tobytes():
            counts = [int(np.sum(x == 0)) for x in (array, own)]
            raise UserError(
                f"{what} has other numbers in {path} than JAX, {counts[0]:,} zeros for "
                f"{counts[1]:,}: nothing was written"
            )
    return zeros
