"""How the counts of single leaves add up: what a weight costs, where its leaf lies."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3jax.selection.wide import wide

__all__ = ["AxisName", "Tally", "are_whole", "sharded_over", "tied_to", "varies"]

AxisName = str | tuple[str, ...] | None


class Tally(NamedTuple):
    """What one element of each array counts for, and which devices share the array.

    Attributes:
        costs: Positive integer for each array, 1 where every element counts the same.
        axes: For each array, the mesh axes of ``shard_map`` that it is sharded over.
    """

    costs: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]

    def kinds(self) -> dict[tuple[int, tuple[str, ...]], list[int]]:
        """The arrays that can be counted as one: alike in cost and axes."""
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, kind in enumerate(zip(self.costs, self.axes, strict=True)):
            alike.setdefault(kind, []).append(i)
        return alike

    def size(self, arrays: list[jax.Array]) -> int:
        """What all elements of all arrays on all devices count for together."""
        parts = zip(arrays, self.costs, self.axes, strict=True)
        return sum(
            array.size * cost * math.prod(map(lax.axis_size, axes))
            for array, cost, axes in parts
        )

    @wide
    def total(self, counts: list[list[jax.Array]]) -> jax.Array:
        """The sums of integer counts, a list of scalars for each array: int64 [K]."""
        masses = {axes: self._mass(counts, axes) for axes in sorted(set(self.axes))}
        sums = [lax.psum(m, axes) if axes else m for axes, m in masses.items()]
        return sum(sums[1:], sums[0])

    def _mass(self, counts: list[list[jax.Array]], axes: tuple[str, ...]) -> jax.Array:
        """The counts of the arrays on these axes, times costs, on this device."""
        chosen = [i for i, own in enumerate(self.axes) if own == axes]
        # One stack of all scalars: one small kernel instead of one for each array.
        stacked = jnp.stack([count for i in chosen for count in counts[i]])
        by_array = stacked.astype(jnp.int64).reshape(len(chosen), -1)
        costs = np.array([[self.costs[i]] for i in chosen], np.int64)
        return jnp.sum(by_array * jnp.broadcast_to(costs, by_array.shape), axis=0)

    def least(self, values: list[jax.Array]) -> jax.Array:
        """The least of scalars, one an array and device."""
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
    tracked = [name for name in names if name in varies(lax.axis_index(name))]
    return tuple(n for n in names if n not in tracked or n in varies(leaf))


def varies(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which a value may differ, as far as they are tracked."""
    return jax.typeof(x).manual_axis_type.varying


def are_whole() -> bool:
    """Whether a traced array is one piece of memory on the device that computes.

    With several devices, ``jit`` may have sharded it, unless all axes of the mesh are
    the caller's own, as under ``shard_map`` and ``pmap``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_hand = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() == 1 or by_hand


def tied_to(turn: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, to be read anew in each turn of a loop.

    What is computed from them alone would otherwise be computed before the loop.
    """
    alike: dict[frozenset[str], list[int]] = {}
    for i, x in enumerate(arrays):  # a barrier makes all that it holds vary alike
        alike.setdefault(varies(x), []).append(i)
    held = list(arrays)
    for places in alike.values():
        tied, _ = lax.optimization_barrier(([arrays[i] for i in places], turn))
        for i, x in zip(places, tied, strict=True):
            held[i] = x
    return held
