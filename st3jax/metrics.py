"""Counting zeros: what a pruned network has left, layer by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from st3jax.selection.keys import to_key
from st3jax.selection.wide import wide
from st3jax.trees import Prunable, is_kernel, prunable_leaves

__all__ = ["Layer", "Summary", "summary"]


class Layer(NamedTuple):
    """One prunable leaf.

    Attributes:
        shape: Its shape.
        weights: How many weights it has.
        zeros: How many of them are exactly zero, int32 [].
    """

    shape: tuple[int, ...]
    weights: int
    zeros: jax.Array


class Summary(NamedTuple):
    """All prunable leaves of a network.

    Attributes:
        layers: From path to :class:`Layer`, in the tree's order.
        weights: How many weights they have together.
        zeros: How many of them are exactly zero, int32 [], int64 in 64-bit mode.
        sparsity: ``zeros / weights``, float32 [], a fraction in [0, 1].
    """

    layers: dict[str, Layer]
    weights: int
    zeros: jax.Array
    sparsity: jax.Array


def summary(params: Any, *, prunable: Prunable = is_kernel) -> Summary:
    """Counts the exact zeros of each prunable leaf and of all together.

    Subnormal numbers are not zero; both signs of zero are.

    Args:
        params: Pytree of arrays, as the model sees them: the result of
            :func:`st3jax.sparsify`, :func:`st3jax.finalize` or :func:`st3jax.prune`.
        prunable: Predicate on (path, leaf).

    Returns:
        A :class:`Summary`. Its counts are arrays, so it works under ``jit`` too.

    Raises:
        ValueError: If no leaf is prunable.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> report = summary({"fc": {"kernel": jnp.array([[0.0, 1.0, -0.0, 2.0]])}})
        >>> int(report.zeros), report.weights, float(report.sparsity)
        (2, 4, 0.5)
        >>> report.layers["fc/kernel"].shape
        (1, 4)
    """
    layers = {
        path: Layer(leaf.shape, leaf.size, jnp.sum(to_key(leaf) == 0, dtype=jnp.int32))
        for path, leaf in prunable_leaves(params, prunable).items()
    }
    weights = sum(layer.weights for layer in layers.values())
    zeros, sparsity = _total([layer.zeros for layer in layers.values()], weights)
    zeros = zeros.astype(jax.dtypes.canonicalize_dtype(jnp.int64))
    return Summary(layers, weights, zeros, sparsity)


@wide
def _total(counts: list[jax.Array], weights: int) -> tuple[jax.Array, jax.Array]:
    """How many there are together, and which share of all weights, float32 []."""
    zeros = jnp.sum(jnp.stack(counts).astype(jnp.int64))
    return zeros, (zeros.astype(jnp.float64) / weights).astype(jnp.float32)
