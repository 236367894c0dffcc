"""One integer that names the weights which a state has last seen.

Thresholds belong to the weights that they were made for. A state carries the name of
those, so that weights which are others are told apart before they are shipped.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3jax.selection.bit_search import JOINED
from st3jax.selection.keys import to_key
from st3jax.selection.tally import AxisName, are_whole, sharded_over
from st3jax.trees import check_same_structure, named_leaves

__all__ = ["check_seen", "fingerprint", "first_fingerprint"]


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
    every, values = named_leaves(params), named_leaves(state.per_leaf)
    leaves = [jnp.asarray(every[path]) for path in values]
    axes = [sharded_over(w, axis_name) for w in leaves]
    apart = [0 < jnp.ndim(t) < jnp.ndim(every[path]) for path, t in values.items()]
    known = dict(state.layouts.value) if any(apart) else {}
    layouts = [known[path] if a else "" for path, a in zip(values, apart, strict=True)]

    def of_each(leaves: list[jax.Array], frozen: jax.Array) -> jax.Array:
        sums = []
        for w, own, layout in zip(leaves, axes, layouts, strict=True):
            one = _of_leaf(w, frozen, layout)
            sums.append(lax.psum(one, own) if own else one)
        return _times_odd(jnp.stack(sums))

    if any(axes) or any(layouts) or not are_whole():
        return of_each(leaves, frozen)
    return lax.platform_dependent(
        leaves, frozen, cuda=_of_joined, rocm=_of_joined, default=of_each
    )


def _of_joined(leaves: list[jax.Array], frozen: jax.Array) -> jax.Array:
    """The same in few sums, each of which costs a GPU two kernels."""
    factors = _odd(len(leaves))
    named = [_named(w, frozen) * n for w, n in zip(leaves, factors, strict=True)]
    parts = [named[i : i + JOINED] for i in range(0, len(named), JOINED)]
    joined = [jnp.concatenate([x.ravel() for x in part]) for part in parts]
    # Read as another dtype, or the compiler would sum the leaves by themselves.
    sums = [jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32) for x in joined]
    return jnp.sum(jnp.stack(sums), dtype=jnp.uint32).astype(jnp.int32)


def _times_odd(sums: jax.Array) -> jax.Array:
    """Their sum, each times a number that no exchange leaves the same."""
    return jnp.sum(sums.reshape(-1) * _odd(sums.size), dtype=jnp.int32)


def _odd(count: int) -> np.ndarray:
    return 2 * np.arange(count, dtype=np.int32) + 1


@functools.partial(jax.jit, static_argnums=2)  # of leaves of one shape, traced once
def _of_leaf(w: jax.Array, frozen: jax.Array, layout: str) -> jax.Array:
    """Of the kernels that a layout tells apart, each times an odd factor."""
    within = tuple(axis for axis in range(w.ndim) if layout[axis : axis + 1] != "s")
    each = jnp.sum(_named(w, frozen), within, dtype=jnp.int32)
    return _times_odd(each) if layout else each


def _named(w: jax.Array, frozen: jax.Array) -> jax.Array:
    """What each weight adds: int32, of its bit pattern."""
    bits = lax.bitcast_convert_type(w, jnp.dtype(f"int{8 * w.dtype.itemsize}"))
    # Exponents once more: those of 512 weights times two would wrap to the same.
    number = bits + (bits >> jnp.finfo(w.dtype).nmant)
    if bits.dtype == jnp.int64:
        number += bits >> 32
    named = jnp.where(bits + bits == 0, 0, jnp.where(frozen, 1, number))  # no sign of 0
    return named.astype(jnp.int32)


def check_seen(state: Any, params: Any, weights: Any) -> None:
    """Raises if raw weights are others than those that a state has last seen.

    Nothing can be told while a program is traced, of a batch of states, and of a state
    that has seen no weights or names none. Others pass if no zeros were asked for, or
    if they come out as sparse as was asked for.

    Args:
        state: State of a method.
        params: The raw weights.
        weights: What the state makes of them.

    Raises:
        ValueError: With what was asked for and what there is.
    """
    if not hasattr(state, "seen"):
        return
    check_same_structure(state.per_leaf, params)
    asked = getattr(state, "sparsity", None)
    if _is_seen(state, params) or (asked is not None and float(asked) == 0):
        return
    before, after = named_leaves(params), named_leaves(weights)
    pairs = [(before[name], after[name]) for name in named_leaves(state.per_leaf)]
    zeros = sum(int(jnp.sum(to_key(w) == 0)) for _, w in pairs)
    total = sum(w.size for _, w in pairs)
    same = all(bool(jnp.array_equal(*pair)) for pair in pairs)
    if asked is not None and _is_as_sparse(zeros, total, float(asked), at_least=same):
        return
    wanted = "" if asked is None else f", where {float(asked):.4g} was asked for"
    raise ValueError(
        "these weights are not those that the optimizer state has last seen: with it "
        f"{zeros} of {total} prunable weights would be zero, a share of "
        f"{zeros / total:.4g}{wanted}. Were they finalized already, averaged, scaled, "
        "cast or changed after the update, or are they of another step or model? What "
        "changes updates or weights (scale, weight decay, schedule_free) goes inside, "
        "as st3(optax.chain(..., optax.scale(-0.1)), ...); an average gets its zeros "
        "by st3jax.prune(average, sparsity)"
    )


def _is_as_sparse(zeros: int, total: int, asked: float, *, at_least: bool) -> bool:
    """Whether there are as many zeros as selection leaves, or more of them."""
    rounding = 1e-6 * total  # the share that a state holds is float32
    low = math.floor(asked * (total - 1) - rounding) + 1
    high = math.floor(asked * (total - 1) + rounding) + 1
    return low <= zeros and (at_least or zeros <= high)


def _is_seen(state: Any, params: Any) -> bool:
    known = [state.seen, state.frozen, *jax.tree.leaves(params)]
    if not all(map(_is_array, known)) or state.seen.ndim or int(state.seen) == 0:
        return True
    return int(fingerprint(state, params, state.frozen)) == int(state.seen)


def _is_array(x: Any) -> bool:
    concrete = isinstance(x, jax.Array | np.ndarray | np.generic)
    return concrete and not isinstance(x, jax.core.Tracer)
