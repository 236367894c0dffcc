"""Probabilities moved to the nearest ones that a budget allows."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from st3jax.selection.wide import wide

__all__ = ["project"]

TOLERANCE = 1e-7
"""How far the mean probability may be above its budget."""
HALVINGS = 64
"""More than a bisection ever needs; where it ends if a probability is not a number."""

Search: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""Bounds around a shift, the excess there, and how many halvings are left."""


@wide
def project(probabilities: Any, budget: jax.typing.ArrayLike) -> Any:
    r"""The nearest probabilities whose sum is within a budget.

    .. math::
        p \leftarrow \operatorname{clip}(p - v, 0, 1), \qquad
        v = \min \left\{v \ge 0 : \sum \operatorname{clip}(p - v, 0, 1) \le K\right\}

    This is the Euclidean projection on :math:`0 \le p \le 1,\ \sum p \le K`. The sum is
    taken in float64, and :math:`v` is found by bisection, such that the sum is closer
    than :math:`10^{-7} n` to the budget. Where it is within that already, values are
    clipped and nothing else; subnormal numbers may become 0.

    Args:
        probabilities: Pytree of float32 or float64 arrays, :math:`n` numbers in all.
        budget: The most :math:`K` that they may add up to, a scalar of 0 or more.

    Returns:
        Pytree of the same structure, shapes and dtypes.

    Example:
        >>> p = {"a": jnp.array([0.5, 0.75]), "b": jnp.array([0.0])}
        >>> [x.round(6).tolist() for x in jax.tree.leaves(project(p, 1.0))]
        [[0.375, 0.625], [0.0]]

    References:
        arXiv:2105.01571, the projection onto the constraint.
    """
    leaves = jax.tree.leaves(probabilities)
    n = sum(p.size for p in leaves)
    budget = jnp.asarray(budget).astype(jnp.float64)

    def excess(v: jax.Array) -> jax.Array:
        kept = [jnp.clip(p.astype(jnp.float64) - v, 0, 1).sum() for p in leaves]
        return sum(kept[1:], kept[0]) - budget

    def is_off(search: Search) -> jax.Array:
        *_, off, left = search
        return (jnp.abs(off) > 0.5 * TOLERANCE * n) & (left > 0)

    def halve(search: Search) -> Search:
        low, v, high, off, left = search
        low, high = jnp.where(off > 0, v, low), jnp.where(off > 0, high, v)
        v = low + (high - low) / 2
        return low, v, high, excess(v), left - 1

    most = [jnp.max(p, initial=0).astype(jnp.float64) for p in leaves]
    high = jnp.max(jnp.stack(most))
    none = jnp.zeros_like(high)
    off = excess(none)
    off = jnp.where(off <= TOLERANCE * n, 0, off)
    left = jnp.full([], HALVINGS, jnp.int32)
    v = jax.lax.while_loop(is_off, halve, (none, none, high, off, left))[1]
    return jax.tree.map(
        lambda p: jnp.clip(p.astype(jnp.float64) - v, 0, 1).astype(p.dtype),
        probabilities,
    )
