"""Costs: a sparsity can be a share of multiply-adds instead of weights."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from st3jax.checks import check_cost
from st3jax.selection.tally import sharded_over
from st3jax.trees import all_paths

__all__ = ["Costs", "check_costs", "largest_share", "shards_of", "total_cost"]

Costs = Mapping[str, int]
"""From the path of a leaf to the multiply-adds that one of its weights takes part in,
a whole number."""


def check_costs(costs: Costs, leaves: Mapping[str, Any], params: Any) -> None:
    """Raises unless every prunable leaf has a cost, and every cost a leaf.

    Args:
        costs: From path to cost.
        leaves: The prunable leaves.
        params: Pytree of all parameters.

    Raises:
        ValueError: With the path of a leaf whose cost is missing or negative, or with
            one that is no leaf's.
        TypeError: If a cost is not a whole number.

    Example:
        >>> params = {"head/kernel": jnp.ones((2, 3))}
        >>> check_costs({}, params, params)
        Traceback (most recent call last):
        ValueError: costs has no entry for the leaf 'head/kernel' (it has none at all)
    """
    for path in leaves:
        if path not in costs:
            listed = ", ".join(repr(path) for path in list(costs)[:3]) or "none at all"
            raise ValueError(
                f"costs has no entry for the leaf '{path}' (it has {listed})"
            )
    places = all_paths(params)
    for path, cost in costs.items():
        check_cost(cost, f"the cost of '{path}'")
        if path not in places:
            listed = ", ".join(repr(place) for place in places[:3])
            raise ValueError(
                f"costs has an entry for '{path}', which is no parameter: there are "
                f"{listed} and others"
            )


def total_cost(costs: Costs, leaves: Mapping[str, Any], axis_name: Any = None) -> int:
    """What all these leaves cost together; what has no entry costs nothing.

    Example:
        >>> total_cost({"a": 10}, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)})
        60
    """
    sizes = {
        path: math.prod(jnp.shape(leaf)) * shards_of(leaf, axis_name)
        for path, leaf in leaves.items()
    }
    return sum(size * int(costs.get(path, 0)) for path, size in sizes.items())


def largest_share(
    costs: Costs, prunable: Mapping[str, Any], leaves: Mapping[str, Any], axis_name: Any
) -> float:
    """The share of all multiply-adds that the prunable leaves take part in."""
    part = total_cost(costs, prunable, axis_name)
    if not part:
        raise ValueError(
            "the prunable leaves take part in none of the multiply-adds: their costs "
            "are all 0"
        )
    return part / total_cost(costs, leaves, axis_name)


def shards_of(leaf: Any, axis_name: Any) -> int:
    """Of how many shards this is one; outside of ``shard_map`` a leaf is whole.

    Example:
        >>> shards_of(jnp.ones(3), None)
        1
    """
    try:
        return math.prod(map(lax.axis_size, sharded_over(leaf, axis_name)))
    except NameError:
        return 1
