"""Exact selection: which threshold removes exactly this fraction?

Scores are magnitudes: non-negative, minus zero equal to zero, NaN above infinity. The
threshold is the quantile of all scores of all leaves together, without sorting them:
the bit patterns of the two neighbouring order statistics are found by counting how many
scores lie below a candidate. Counts are integers, and the few scalars that add them up
have 64 bits, whether JAX runs in 64-bit mode or not. No float arithmetic decides
anything but the interpolation between the two neighbours.

Where arrays are whole on a CPU, :mod:`st3jax.selection.digit_search` needs a few reads
of them; elsewhere :mod:`st3jax.selection.bit_search` finds some bits with each read,
and nothing but counts crosses devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from st3jax.checks import check_cost, check_fraction
from st3jax.selection import bit_search, digit_search
from st3jax.selection.keys import from_key, joined_keys, score_dtype, to_key, widened
from st3jax.selection.tally import AxisName, Tally, are_whole, sharded_over
from st3jax.selection.wide import wide

__all__ = ["threshold"]

FEW = 1 << 17
"""Up to so many scores, the simple search is as fast as any."""
JOIN = 1 << 20
"""So many scores, or a sixteenth of all, can be copied for little."""
MARGIN = 1 << 16
"""How far a threshold is taken to move between two steps, in keys: about 0.5 %."""
MOST = 1 << 53
"""The position among so many is computed in float64, exact to one."""


def threshold(
    scores: Any,
    fraction: jax.typing.ArrayLike,
    *,
    near: jax.typing.ArrayLike | None = None,
    needed: jax.typing.ArrayLike = True,
    costs: Any = None,
    axis_name: AxisName = None,
) -> jax.Array:
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

    With costs, every score counts as many times as it costs: :math:`n` is the sum of
    all costs, and pruning the scores ``<= t`` removes at least
    :math:`\lfloor p \rfloor + 1` of it, with no score that could have been left.

    Args:
        scores: Pytree of arrays of any shapes and floating-point dtypes, weights or
            scores: only magnitudes count. NaN sorts above infinity.
        fraction: Scalar in [0, 1], concrete or traced. The position is computed in
            float64.
        near: Scalar that the threshold may be close to, such as the one a step before.
            It changes the time taken, never the result.
        needed: Boolean scalar, concrete or traced. Where it is false the result has no
            meaning, and most of the work is left out on a CPU. A GPU does it anyway,
            since its host would have to wait for the answer at every step.
        costs: Pytree of whole numbers in the structure of ``scores``: what one score of
            each leaf counts for, such as its multiply-adds; 1 by default. Only their
            ratios matter.
        axis_name: Axes of ``shard_map`` that scores are sharded over, if any: the
            threshold is then that of the shards of all devices together. A leaf that
            is the same along such an axis counts once, unless ``check_vma=False``.

    Returns:
        Scalar threshold, float64 if a leaf is float64 and float32 otherwise. NaN if
        the order statistic itself is NaN.

    Raises:
        ValueError: If there is no score, ``fraction`` is not in [0, 1], or costs are
            negative, all zero or add up to more than 2**53.
        TypeError: If a leaf is not of a floating-point dtype, or a cost not a whole
            number.

    Example:
        >>> scores = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([[2.0], [-4.0]])}
        >>> threshold(scores, 0.5).item()
        2.5
        >>> threshold(scores, 0.4, costs={"a": 1, "b": 10}).item()  # 11 of 22
        2.0

    References:
        The threshold rule of arXiv:2212.01076, section 3.
    """
    check_fraction(fraction, "fraction")
    dtype = score_dtype(*(jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(scores)))
    leaves, costs = _leaves_and_costs(scores, costs)
    if not sum(leaf.size for leaf in leaves):
        raise ValueError(
            "there is no score to select a threshold from: scores are empty"
        )
    tally = Tally(costs, tuple(sharded_over(leaf, axis_name) for leaf in leaves))
    size = tally.size(leaves)
    if size > MOST:
        raise ValueError(
            f"the costs of all scores add up to {size}, more than 2**53, the most that "
            "can be counted: give them in larger units"
        )
    if dtype == jnp.float64:
        leaves = [widened(leaf) for leaf in leaves]
    near = jnp.asarray(-1 if near is None else near).astype(dtype)
    rank, gap = _position(fraction, size)
    low, high = _neighbours(leaves, rank, near, jnp.asarray(needed), tally)
    return _interpolate(low, high, gap.astype(dtype))


@wide
def _position(fraction: jax.typing.ArrayLike, size: int) -> tuple[jax.Array, jax.Array]:
    """The rank below the position of a fraction, and how far the position is above."""
    fraction = jnp.clip(jnp.asarray(fraction).astype(jnp.float64), 0, 1)
    position = fraction * (size - 1)
    rank = jnp.floor(position)
    return rank.astype(jnp.int64), position - rank


def _leaves_and_costs(
    scores: Any, costs: Any
) -> tuple[list[jax.Array], tuple[int, ...]]:
    """The leaves that count at all and what each of their elements counts for."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(scores)]
    if costs is None:
        return leaves, (1,) * len(leaves)
    each = jax.tree.leaves(
        jax.tree.map(lambda _, cost: check_cost(cost), scores, costs)
    )
    unit = math.gcd(*each) or 1
    counted = [(x, c // unit) for x, c in zip(leaves, each, strict=True) if c]
    return [x for x, _ in counted], tuple(c for _, c in counted)


def _neighbours(
    leaves: list[jax.Array],
    rank: jax.Array,
    near: jax.Array,
    needed: jax.Array,
    tally: Tally,
) -> tuple[jax.Array, jax.Array]:
    """The keys of ranks ``rank`` and ``rank + 1``, by the search for the place."""
    whole = are_whole()
    few = sum(leaf.size for leaf in leaves) <= FEW
    if whole:
        leaves, tally = _joined(leaves, tally)

    def by_bits(platform: str) -> Callable[..., Any]:
        return functools.partial(
            bit_search.neighbours, tally=tally, platform=platform, whole=whole
        )

    by_digits = functools.partial(digit_search.neighbours, tally=tally, margin=MARGIN)
    digits_fit = whole and not few and near.dtype == jnp.float32
    return lax.platform_dependent(
        leaves,
        rank,
        near,
        needed,
        cpu=by_digits if digits_fit else by_bits("cpu"),
        cuda=by_bits("cuda"),
        rocm=by_bits("rocm"),
        default=by_bits("tpu"),
    )


def _joined(leaves: list[jax.Array], tally: Tally) -> tuple[list[jax.Array], Tally]:
    """The small leaves of each kind as one array, so that programs stay short."""
    size = sum(leaf.size for leaf in leaves)
    room = max(JOIN, size // 16)
    small = set()
    for i in sorted(range(len(leaves)), key=lambda i: leaves[i].size):
        room -= leaves[i].size
        if room >= 0:
            small.add(i)
    arrays, kinds = [], []
    for kind, alike in tally.kinds().items():
        parts = [leaves[i] for i in alike if i in small]
        joined = [from_key(joined_keys(parts))] if len(parts) > 1 else parts
        own = joined + [leaves[i] for i in alike if i not in small]
        arrays += own
        kinds += [kind] * len(own)
    return arrays, Tally(*(tuple(part) for part in zip(*kinds, strict=True)))


def _interpolate(low: jax.Array, high: jax.Array, gap: jax.Array) -> jax.Array:
    """Between two keys, in value, but never up to the upper one."""
    a, b = from_key(low), from_key(high)
    between = jnp.where(gap > 0, a + gap * (b - a), a)
    key = jnp.clip(to_key(between), low, jnp.maximum(low, high - 1))
    return from_key(key)
