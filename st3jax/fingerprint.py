"""One integer that names the weights which a state has last seen.

Thresholds belong to the weights that they were made for. A state carries the name of
those, so that weights which are others are told apart before they are shipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3jax.selection.keys import to_key
from st3jax.selection.tally import AxisName, sharded_over
from st3jax.trees import Static, named_leaves

__all__ = ["fingerprint", "first_fingerprint", "is_seen"]


def first_fingerprint() -> jax.Array:
    """That of a state which has seen no weights yet."""
    return jnp.zeros([], jnp.int32)


def fingerprint(
    state: Any, params: Any, frozen: jax.Array, axis_name: AxisName = None
) -> jax.Array:
    """The sum of the bit patterns of all prunable weights, or of those not zero.

    Integers wrap, so that the sum is the same in any order, on any devices. Once the
    mask is fixed it is the zeros that count, whatever the other weights are. Leaves
    that are exchanged, and stacked kernels with thresholds of their own, do not add up
    to the same.

    Args:
        state: State of a method: its ``per_leaf`` says which leaves are prunable.
        params: Pytree of arrays of the parameters' structure.
        frozen: bool [], whether the mask is fixed.
        axis_name: Axes of ``shard_map`` that weights are sharded over by hand.

    Returns:
        int32 [].
    """
    leaves, layouts = named_leaves(params), dict(getattr(state, "layouts", NONE).value)
    total = first_fingerprint()
    for i, (path, value) in enumerate(named_leaves(state.per_leaf).items()):
        w = leaves[path]
        apart = 0 < jnp.ndim(value) < jnp.ndim(w)
        own = _of_leaf(w, frozen, layouts[path] if apart else "")
        axes = sharded_over(w, axis_name)
        total += (2 * i + 1) * (lax.psum(own, axes) if axes else own)
    return total


NONE = Static(())
"""Layouts of a state that has none."""


@functools.partial(jax.jit, static_argnums=2)  # of leaves of one shape, traced once
def _of_leaf(w: jax.Array, frozen: jax.Array, layout: str) -> jax.Array:
    """Of the kernels that a layout tells apart, each times an odd factor."""
    bits = lax.bitcast_convert_type(w, jnp.dtype(f"int{8 * w.dtype.itemsize}"))
    # Exponents once more: those of 512 weights times two would wrap to the same.
    exponents = (bits >> jnp.finfo(w.dtype).nmant).astype(jnp.int32)
    if bits.dtype == jnp.int64:
        bits += bits >> 32
    number = jnp.where(frozen, 1, bits.astype(jnp.int32) + exponents)
    named = jnp.where(to_key(w) != 0, number, 0)
    within = tuple(axis for axis in range(w.ndim) if layout[axis : axis + 1] != "s")
    each = jnp.sum(named, within, dtype=jnp.int32).reshape(-1)
    factors = 2 * np.arange(each.size, dtype=np.int32) + 1
    return jnp.sum(each * factors, dtype=jnp.int32)


def is_seen(state: Any, params: Any) -> bool:
    """Whether these are the weights that a state has last seen, as far as one can tell.

    Nothing can be told while a program is traced, of a batch of states, and of a state
    that has seen none. Where no zeros were asked for, any weights will do.
    """
    asked = getattr(state, "sparsity", None)
    known = [state.seen, state.frozen, *jax.tree.leaves(params)]
    if not all(_is_array(x) for x in known) or state.seen.ndim:
        return True
    if int(state.seen) == 0 or (asked is not None and float(asked) == 0):
        return True
    return int(fingerprint(state, params, state.frozen)) == int(state.seen)


def _is_array(x: Any) -> bool:
    concrete = isinstance(x, jax.Array | np.ndarray | np.generic)
    return concrete and not isinstance(x, jax.core.Tracer)
