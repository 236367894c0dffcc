"""One integer that names the weights which a state has last seen.

Thresholds belong to the weights that they were made for. A state carries the name of
those, so that weights which are others are told apart before they are shipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3jax.selection.keys import to_key
from st3jax.selection.tally import AxisName, sharded_over
from st3jax.trees import named_leaves

__all__ = ["fingerprint", "first_fingerprint", "is_seen"]


def first_fingerprint() -> jax.Array:
    """That of a state which has seen no weights yet."""
    return jnp.zeros([], jnp.int32)


def fingerprint(
    values: Any, params: Any, frozen: jax.Array, axis_name: AxisName = None
) -> jax.Array:
    """The sum of the bit patterns of all prunable weights, or of those not zero.

    Integers wrap, so that the sum is the same in any order, on any devices. Once the
    mask is fixed it is the zeros that count, whatever the other weights are.

    Args:
        values: The tree that says which leaves are prunable.
        params: Pytree of arrays of its structure.
        frozen: bool [], whether the mask is fixed.
        axis_name: Axes of ``shard_map`` that weights are sharded over by hand.

    Returns:
        int32 [].

    Example:
        >>> w = {"kernel": jnp.array([[1.0, -2.0]])}
        >>> one, other = (
        ...     fingerprint(w, params, jnp.array(False))
        ...     for params in (w, {"kernel": jnp.array([[1.0, 2.0]])}))
        >>> bool(one == other)
        False
    """
    leaves = named_leaves(params)
    total = first_fingerprint()
    for i, path in enumerate(named_leaves(values)):
        own = _of_leaf(leaves[path], frozen)
        axes = sharded_over(leaves[path], axis_name)
        # Odd factors: leaves that are exchanged do not add up to the same.
        total += (2 * i + 1) * (lax.psum(own, axes) if axes else own)
    return total


@jax.jit  # of leaves of one shape, traced once
def _of_leaf(w: jax.Array, frozen: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(w, jnp.dtype(f"int{8 * w.dtype.itemsize}"))
    if bits.dtype == jnp.int64:
        bits ^= bits >> 32
    kept = (to_key(w) != 0).astype(jnp.int32)
    named = jnp.where(frozen, kept, bits.astype(jnp.int32))
    return jnp.sum(named, dtype=jnp.int32)


def is_seen(state: Any, values: Any, params: Any, asked: Any = None) -> bool:
    """Whether these are the weights that a state has last seen, as far as one can tell.

    Nothing can be told while a program is traced, of a batch of states, and of a state
    that has seen none. Where no zeros were asked for, any weights will do.

    Example:
        >>> class State:
        ...     seen, frozen = jnp.array(1), jnp.array(False)
        >>> w = {"kernel": jnp.array([[1.0, -2.0]])}
        >>> is_seen(State, w, w)
        False
    """
    known = [state.seen, state.frozen, *jax.tree.leaves(params)]
    if not all(_is_array(x) for x in known) or state.seen.ndim:
        return True
    if int(state.seen) == 0 or (asked is not None and float(asked) == 0):
        return True
    return int(fingerprint(values, params, state.frozen)) == int(state.seen)


def _is_array(x: Any) -> bool:
    concrete = isinstance(x, jax.Array | np.ndarray | np.generic)
    return concrete and not isinstance(x, jax.core.Tracer)
