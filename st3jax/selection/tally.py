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

    def total(self, counts: list[list[jax.Array]]) -> jax.Array:
        """The sums of integer counts, a list of scalars for each leaf: int64 [K].

        To be called in 64-bit mode.
        """
        masses = {axes: self._mass(counts, axes) for axes in sorted(set(self.axes))}
        sums = [lax.psum(m, axes) if axes else m for axes, m in masses.items()]
        return sum(sums[1:], sums[0])

    def _mass(self, counts: list[list[jax.Array]], axes: tuple[str, ...]) -> jax.Array:
        """The counts of the leaves on these axes, times costs, on this device."""
        chosen = [i for i, own in enumerate(self.axes) if own == axes]
        # One stack of all scalars: one small kernel instead of one for each leaf.
        stacked = jnp.stack([count for i in chosen for count in counts[i]])
        by_leaf = stacked.reshape(len(chosen), -1).astype(jnp.int64)
        costs = jnp.array([self.costs[i] for i in chosen], jnp.int64)
        return (by_leaf * costs[:, None]).sum(0)

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
    """The mesh axes along which a value may differ, as far as they are tracked."""
    return jax.typeof(x).manual_axis_type.varying
