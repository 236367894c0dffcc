"""Thresholds: one scalar for each prunable leaf, by exact selection over scores."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from st3jax.rule.costs import largest_share
from st3jax.rule.distributions import layer_sparsities
from st3jax.rule.patterns import block_norms, final_sparsity
from st3jax.rule.rule import CLOSE, Rule, check_fits
from st3jax.rule.scores import scaled, score_factor, scores, weight_threshold
from st3jax.selection.keys import is_positive, score_dtype
from st3jax.selection.quantile import threshold
from st3jax.trees import map_prunable, named_leaves, prunable_leaves

__all__ = ["OFF", "leaf_thresholds"]

GLOBAL = Rule()
"""The smallest magnitudes of all kernels together."""
OFF = -1.0
"""A threshold that nothing is below: nothing is asked of the leaf."""


def leaf_thresholds(
    params: Any, sparsity: Any, rule: Rule = GLOBAL, *, near: Any = None
) -> Any:
    """The thresholds on weights (on norms, for blocks) that leave a sparsity.

    Args:
        params: Pytree of arrays.
        sparsity: Scalar in [0, 1], or a mapping from path patterns to such scalars.
        rule: Which weights go first.
        near: Thresholds that these may be close to, such as those a step before; they
            change the time taken, never the result.

    Returns:
        Tree with a scalar for each prunable leaf (all of one dtype, float64 if a
        prunable leaf is float64 and float32 otherwise), -1 where nothing is to go, and
        ``optax.MaskedNode`` elsewhere. For an N:M pattern the scalar is the share of
        the groups' own thresholds, from 0 to 1.

    Raises:
        ValueError: If the rule does not fit the params, as :func:`check_fits` says.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> params = {"kernel": jax.numpy.array([[1.0, 2.0, 3.0]])}
        >>> float(leaf_thresholds(params, 0.5)["kernel"])
        2.0
    """
    check_fits(rule, params, sparsity)
    leaves = prunable_leaves(params, rule.prunable)
    hints = {} if near is None else named_leaves(near)
    if rule.pattern.kind == "groups":
        found = _of_groups(rule, leaves, sparsity)
    elif isinstance(sparsity, Mapping) or rule.distribution != "global":
        found = _of_each(rule, leaves, sparsity, hints)
    else:
        found = _of_all(rule, params, leaves, sparsity, hints)
    return map_prunable(lambda path, _: found[path], params, rule.prunable)


def _of_all(
    rule: Rule, params: Any, leaves: dict[str, Any], sparsity: Any, hints: dict
) -> dict[str, jax.Array]:
    """From one selection over all leaves."""
    costs = None
    with jax.enable_x64(True):
        fraction = jnp.asarray(sparsity, jnp.float64)
        asked = is_positive(fraction)
        if rule.costs is not None:
            costs = {path: int(rule.costs[path]) for path in leaves}
            every = named_leaves(params)
            most = largest_share(rule.costs, leaves, every, rule.axis_name)
            fraction = jnp.where(fraction >= most, 1, fraction / most)
    factors = {
        path: score_factor(rule.criterion, w.shape) for path, w in leaves.items()
    }
    near = next((t * factors[path] for path, t in hints.items()), None)
    t = threshold(
        {path: _scores(rule, w) for path, w in leaves.items()},
        fraction,
        near=near,
        costs=costs,
        axis_name=rule.axis_name,
    )
    return {
        path: jnp.where(asked, weight_threshold(t, factor), OFF)
        for path, factor in factors.items()
    }


def _of_each(
    rule: Rule, leaves: dict[str, Any], sparsity: Any, hints: dict
) -> dict[str, jax.Array]:
    """From one selection a leaf, each for its own sparsity."""
    shapes = {path: jnp.shape(w) for path, w in leaves.items()}
    with jax.enable_x64(True):
        each = layer_sparsities(rule.distribution, shapes, sparsity)
        asked = {path: is_positive(s) for path, s in each.items()}
    magnitudes = rule._replace(criterion="l1")  # of one leaf, all factors are equal
    dtype = score_dtype(*(jnp.result_type(w) for w in leaves.values()))

    def of_one(path: str, w: Any) -> jax.Array:
        if not w.size:
            return jnp.full([], OFF, dtype)
        t = threshold(
            _scores(magnitudes, w),
            each[path],
            near=hints.get(path),
            axis_name=rule.axis_name,
        )
        return jnp.where(asked[path], t.astype(dtype), OFF)

    return {path: of_one(path, w) for path, w in leaves.items()}


def _of_groups(rule: Rule, leaves: dict[str, Any], sparsity: Any) -> dict[str, Any]:
    """The share of the groups' own thresholds: exactly 1 at the end."""
    final = final_sparsity(rule.pattern) or 1.0
    dtype = score_dtype(*(jnp.result_type(w) for w in leaves.values()))
    with jax.enable_x64(True):
        s = jnp.asarray(sparsity, jnp.float64)
        share = jnp.where(s >= final - CLOSE, 1, s / final)
        t = jnp.where(is_positive(s), share, OFF)
    return dict.fromkeys(leaves, t.astype(dtype))


def _scores(rule: Rule, w: jax.Array) -> jax.Array:
    """What is compared: weights, or the norms of blocks, times the leaf's factor."""
    w = jnp.asarray(w)
    if rule.pattern.kind == "any":
        return scores(w, rule.criterion)
    norms = block_norms(w, rule.pattern.numbers)
    return scaled(norms, score_factor(rule.criterion, w.shape))
