"""Budgets: what the share asked for is a share of, weights or multiply-adds."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from st3jax.checks import check_choice, check_cost
from st3jax.selection.tally import sharded_over

__all__ = ["BUDGETS", "check_budget", "check_costs", "largest_share", "total_cost"]

BUDGETS = ("weights", "multiply_adds")

Costs = Mapping[str, int]
"""From the path of a leaf to the multiply-adds that one of its weights takes part in,
a whole number."""


def check_budget(budget: str, costs: Costs | None) -> None:
    """Raises unless a budget and its costs fit together.

    Raises:
        ValueError: If the budget is unknown, or needs costs and has none.
        TypeError: If the costs are not a mapping.

    Example:
        >>> check_budget("multiply_adds", None)
        Traceback (most recent call last):
        ValueError: budget 'multiply_adds' and costs go together, got budget \
'multiply_adds' and costs None: costs={'Dense_0/kernel': 1, ...} gives the \
multiply-adds of one weight of each leaf
    """
    check_choice(budget, "budget", BUDGETS)
    if (budget == "multiply_adds") != (costs is not None):
        raise ValueError(
            "budget 'multiply_adds' and costs go together, got budget "
            f"{budget!r} and costs {costs!r}: costs={{'Dense_0/kernel': 1, ...}} gives "
            "the multiply-adds of one weight of each leaf"
        )
    if costs is not None and not isinstance(costs, Mapping):
        raise TypeError(
            "costs is a mapping from the path of a leaf to the multiply-adds of one of "
            f"its weights, got {type(costs).__name__}"
        )


def check_costs(costs: Costs, leaves: Mapping[str, Any]) -> None:
    """Raises unless every prunable leaf has a cost.

    Args:
        costs: From path to cost.
        leaves: The prunable leaves.

    Raises:
        ValueError: With the path of a leaf whose cost is missing or negative.
        TypeError: If a cost is not a whole number.

    Example:
        >>> check_costs({}, {"head/kernel": jnp.ones((2, 3))})
        Traceback (most recent call last):
        ValueError: costs has no entry for the leaf 'head/kernel' (it has none at all)
    """
    for path in leaves:
        if path not in costs:
            listed = ", ".join(repr(path) for path in list(costs)[:3]) or "none at all"
            raise ValueError(
                f"costs has no entry for the leaf '{path}' (it has {listed})"
            )
    for path, cost in costs.items():
        check_cost(cost, f"the cost of '{path}'")


def total_cost(costs: Costs, leaves: Mapping[str, Any], axis_name: Any = None) -> int:
    """What all these leaves cost together; what has no entry costs nothing.

    Example:
        >>> total_cost({"a": 10}, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)})
        60
    """
    sizes = {
        path: math.prod(jnp.shape(leaf)) * _shards(leaf, axis_name)
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


def _shards(leaf: Any, axis_name: Any) -> int:
    """Of how many shards this is one; outside of ``shard_map`` a leaf is whole."""
    try:
        return math.prod(map(lax.axis_size, sharded_over(leaf, axis_name)))
    except NameError:
        return 1
