"""Updates that land where a fixed mask allows: exactly on zero, or anywhere else.

An Optax update is added to a weight, and the sum rounds. Zeros have to come out exact,
and a kept weight must not become zero by rounding, or the mask would change.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from st3jax.ops import smallest_kept
from st3jax.selection.keys import to_key
from st3jax.selection.tally import are_whole

__all__ = ["clear_state", "hold_mask", "pin", "step_onto"]


def clear_state(inner_state: Any, kept: Any) -> Any:
    """The state of an optimizer, zero at every weight that is not kept.

    Momentum that a weight had before it was removed must not move it later.

    Args:
        inner_state: State of any optimizer.
        kept: Tree of the parameters' structure: a boolean array where a leaf is
            prunable; other leaves are left alone.

    Returns:
        The state. What is in it at the path of a prunable leaf, and of its shape, is
        changed, such as the trace of momentum or both moments of Adam.

    Example:
        >>> kept = {"kernel": jnp.array([[True, False]])}
        >>> state = {"trace": {"kernel": jnp.ones((1, 2))}}
        >>> clear_state(state, kept)["trace"]["kernel"].tolist()
        [[1.0, 0.0]]
    """
    masks = dict(jax.tree_util.tree_leaves_with_path(kept))

    def clear(path: Any, s: Any) -> Any:
        ends = (path[start:] for start in range(len(path)))
        keep = next((masks[end] for end in ends if end in masks), None)
        if keep is None or keep.dtype != bool or jnp.shape(s) != keep.shape:
            return s
        return jnp.where(keep, s, jnp.zeros_like(s))

    return jax.tree_util.tree_map_with_path(clear, inner_state)


@jax.jit  # of arrays of one shape, traced once; so the next ones
def pin(update: jax.Array, count: jax.Array) -> jax.Array:
    """The update, rounded to its dtype before anything is added to it.

    A compiler may contract ``w - rate * g`` to one operation that rounds once, where
    thresholds are computed, and not where the caller adds the update. The weights then
    differ in the last bit, and with them the number of weights below the threshold. So
    the bits go through an operation that nothing can be contracted across.

    Args:
        update: Any shape and floating-point dtype.
        count: int32 [], not negative; ``count >> 31`` is zero, unknown to the compiler.

    Returns:
        The update, unchanged.

    Example:
        >>> pin(jnp.array([0.5, -2.0]), jnp.array(7)).tolist()
        [0.5, -2.0]
    """
    update = jnp.asarray(update)
    integer = jnp.dtype(f"int{8 * update.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(update, integer)
    bits ^= (count >> 31).astype(integer)
    return _in_order(jax.lax.bitcast_convert_type(bits, update.dtype))


def _in_order(update: jax.Array) -> jax.Array:
    """The update as its weights are stored, where it would be in another order.

    A GPU's convolutions leave gradients in an order that they like. Without a word all
    that is made of them and of the weights is computed in that order, between copies
    from one to the other: several of each weight, in a step.
    """

    def ordered(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    if not are_whole():  # some partitioners would gather it first
        return update
    return jax.lax.platform_dependent(
        update, cuda=ordered, rocm=ordered, default=lambda x: x
    )


def _land(w: jax.Array, update: jax.Array) -> jax.Array:
    """Where an update leads, as ``optax.apply_updates`` adds it."""
    wide = jnp.promote_types(w.dtype, update.dtype)
    return (w.astype(wide) + update.astype(wide)).astype(w.dtype)


def _off_zero(w: jax.Array, update: jax.Array, sign: jax.Array) -> jax.Array:
    """The update, moved as little as needed if it would land on zero."""
    step = jnp.maximum(jnp.abs(w) * jnp.finfo(w.dtype).eps, smallest_kept(w.dtype))
    aside = (jnp.copysign(step, sign) - w).astype(update.dtype)
    return jnp.where(to_key(_land(w, update)) == 0, aside, update)


@jax.jit
def hold_mask(w: jax.Array, update: jax.Array, hold: jax.Array) -> jax.Array:
    """The update under a fixed mask: zeros stay zero, others never become zero.

    Args:
        w: Weights, any shape and floating-point dtype.
        update: What the optimizer wants to add, same shape.
        hold: bool [], whether the mask is fixed.

    Returns:
        The update to add, in the wider of the two dtypes.

    Example:
        >>> w, update = jnp.array([0.0, 1.0, 1.0]), jnp.array([0.5, 0.5, -1.0])
        >>> [x != 0 for x in (w + hold_mask(w, update, jnp.array(True))).tolist()]
        [False, True, True]
    """
    update = update.astype(jnp.promote_types(w.dtype, update.dtype))
    held = jnp.where(to_key(w) == 0, 0, _off_zero(w, update, w))
    return jnp.where(hold, held, update)


@functools.partial(jax.jit, static_argnames="dtype")
def step_onto(w: jax.Array, target: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The update that takes a weight to its target.

    Args:
        w: Weights, any shape and floating-point dtype.
        target: Where to go, same shape and dtype.
        dtype: Dtype of the update, at least as wide as that of ``w``.

    Returns:
        Array ``u`` such that ``w + u`` is zero exactly where the target is, and equal
        to the target up to rounding elsewhere.

    Example:
        >>> w, target = jnp.array([0.3, 0.3]), jnp.array([0.0, 0.1])
        >>> (w + step_onto(w, target, jnp.float32)).round(6).tolist()
        [0.0, 0.10000000149011612]
    """
    update = target.astype(dtype) - w.astype(dtype)
    return jnp.where(
        to_key(target) == 0, -w.astype(dtype), _off_zero(w, update, target)
    )
