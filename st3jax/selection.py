"""Exact selection: which threshold removes exactly this fraction?

Scores are magnitudes: non-negative, minus zero equal to zero, NaN above infinity. The
threshold is the quantile of all scores of all leaves together, without sorting or
concatenating them: the bit pattern of the wanted order statistic is found from its
highest bit down, each bit by counting how many scores lie below a candidate. Counts
are integers, and the few scalars that add them up have 64 bits, whether JAX runs in
64-bit mode or not. No float arithmetic decides anything but the interpolation between
two neighbouring scores. The work is one read of the scores for each bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from st3jax.checks import check_fraction
from st3jax.keys import from_key, score_dtype, to_key

__all__ = ["threshold"]


def threshold(scores: Any, fraction: jax.typing.ArrayLike) -> jax.Array:
    r"""The quantile of all scores together, exact for any number of them.

    With the scores sorted, :math:`a_0 \le \dots \le a_{n-1}`, and the position
    :math:`p = \text{fraction} \cdot (n - 1)`,

    .. math::
        t = a_{\lfloor p \rfloor} + (p - \lfloor p \rfloor)
            \, (a_{\lfloor p \rfloor + 1} - a_{\lfloor p \rfloor})

    which is numpy's default rule. Pruning the scores ``<= t`` removes exactly
    :math:`\lfloor p \rfloor + 1` of them if no two are equal: the result is rounded
    such that it never reaches :math:`a_{\lfloor p \rfloor + 1}`. Scores equal to
    :math:`a_{\lfloor p \rfloor}` (ties) are pruned together.

    Args:
        scores: Pytree of arrays of any shapes and floating-point dtypes, weights or
            scores: only magnitudes count. NaN sorts above infinity.
        fraction: Scalar in [0, 1], concrete or traced. The position is computed in
            float64.

    Returns:
        Scalar threshold, float64 if a leaf is float64 and float32 otherwise. NaN if
        the order statistic itself is NaN.

    Raises:
        ValueError: If there is no score, or ``fraction`` is not in [0, 1].
        TypeError: If a leaf is not of a floating-point dtype.

    Example:
        >>> scores = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([[2.0], [-4.0]])}
        >>> threshold(scores, 0.5).item()
        2.5

    References:
        The threshold rule of arXiv:2212.01076, section 3.
    """
    check_fraction(fraction, "fraction")
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(scores)]
    n = sum(leaf.size for leaf in leaves)
    if n == 0:
        raise ValueError(
            "there is no score to select a threshold from: scores are empty"
        )
    dtype = score_dtype(*(leaf.dtype for leaf in leaves))
    keys = [to_key(leaf.astype(dtype)) for leaf in leaves]
    with jax.enable_x64(True):
        fraction = jnp.clip(jnp.asarray(fraction).astype(jnp.float64), 0, 1)
        position = fraction * (n - 1)
        rank = jnp.floor(position)
        low, high = _neighbours(keys, rank.astype(jnp.int64))
        gap = (position - rank).astype(dtype)
    return _interpolate(low, high, gap)


def _count(keys: list[jax.Array], candidate: jax.Array) -> jax.Array:
    """How many keys are below the candidate, int64 []."""
    counts = [jnp.sum(key < candidate, dtype=jnp.int32) for key in keys]
    return jnp.sum(jnp.stack(counts).astype(jnp.int64))


def _neighbours(keys: list[jax.Array], rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order statistics ``rank`` and ``rank + 1`` (0-based) of all keys."""
    integer = keys[0].dtype
    bits = jnp.iinfo(integer).bits - 1

    def set_bit(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (jnp.ones([], integer) << (bits - 1 - i).astype(integer))
        return jnp.where(_count(keys, candidate) <= rank, candidate, low)

    # The first bit outside the loop: what the loop carries then varies over the same
    # mesh axes as the keys from its first turn on.
    low = set_bit(jnp.zeros([], jnp.int32), jnp.zeros([], integer))
    low = lax.fori_loop(1, bits, set_bit, low)
    top = jnp.iinfo(integer).max
    above = [jnp.min(key, initial=top, where=key > low) for key in keys]
    high = jnp.min(jnp.stack(above))
    tied = _count(keys, low + 1) > rank + 1
    return low, jnp.where(tied | (high == top), low, high)


def _interpolate(low: jax.Array, high: jax.Array, gap: jax.Array) -> jax.Array:
    """Between two keys, in value, but never up to the upper one."""
    a, b = from_key(low), from_key(high)
    between = jnp.where(gap > 0, a + gap * (b - a), a)
    key = jnp.clip(to_key(between), low, jnp.maximum(low, high - 1))
    return from_key(key)
