"""How the counts of single leaves add up: what a weight costs, where its leaf lies."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["AxisName", "Tally", "sharded_over"]

AxisName = str | tuple[str, ...] | None


class Tally(NamedTuple):
    """What one element of each leaf counts for, and which devices share the leaf.

    Attributes:
        costs: Positive integer for each leaf, 1 where every element counts the same.
        axes: For each leaf, the mesh axes of ``shard_map`` that it is sharded over.
    """

    costs: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]

    def size(self, leaves: list[jax.Array]) -> int:
        """What all elements of all leaves on all devices count for together."""
        parts = zip(leaves, self.costs, self.axes, strict=True)
        return sum(
            leaf.size * cost * math.prod(map(lax.axis_size, axes))
            for leaf, cost, axes in parts
        )

    def total(self, counts: list[jax.Array]) -> jax.Array:
        """The sum of integer counts, one a leaf and device: int64 of their shape.

        To be called in 64-bit mode.
        """
        sums = [
            lax.psum(mass, axes) if axes else mass
            for axes, mass in (
                (axes, self._mass(counts, axes)) for axes in sorted(set(self.axes))
            )
        ]
        return sum(sums[1:], sums[0])

    def _mass(self, counts: list[jax.Array], axes: tuple[str, ...]) -> jax.Array:
        """The counts of the leaves on these axes, times costs, on this device."""
        chosen = [i for i, own in enumerate(self.axes) if own == axes]
        stacked = jnp.stack([counts[i] for i in chosen]).astype(jnp.int64)
        costs = [self.costs[i] for i in chosen]
        if set(costs) != {1}:
            each = jnp.array(costs, jnp.int64)
            stacked *= each.reshape(-1, *[1] * (stacked.ndim - 1))
        return stacked.sum(0)

    def least(self, values: list[jax.Array]) -> jax.Array:
        """The least of scalars, one a leaf and device."""
        least = [
            lax.pmin(value, axes) if axes else value
            for value, axes in zip(values, self.axes, strict=True)
        ]
        return jnp.min(jnp.stack(least))


def sharded_over(leaf: jax.Array, axis_name: AxisName) -> tuple[str, ...]:
    """Which of these axes of ``shard_map`` a leaf is sharded over.

    ``shard_map`` tracks over which axes a value varies from device to device, unless it
    is told not to (``check_vma=False``); then a leaf is taken to vary over all of them.
    """
    if axis_name is None:
        return ()
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    tracked = [name for name in names if name in _varies(lax.axis_index(name))]
    return tuple(n for n in names if n not in tracked or n in _varies(leaf))


def _varies(x: jax.Array) -> frozenset[str]:
    return getattr(jax.typeof(x), "vma", frozenset())
