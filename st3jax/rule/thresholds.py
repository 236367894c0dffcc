"""Thresholds: one for each prunable leaf, by exact selection over scores.

Where every kernel has a sparsity of its own, a leaf of stacked kernels has a threshold
for each of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st3jax.layout.letters import (
    Layouts,
    each_kernel,
    kernel_shape,
    stack_shape,
    to_kernels,
)
from st3jax.rule.costs import largest_share
from st3jax.rule.distributions import layer_sparsities
from st3jax.rule.patterns import final_sparsity, norms_of_kernels
from st3jax.rule.rule import CLOSE, Rule
from st3jax.rule.scores import scaled, score_factor, scores, unscaled
from st3jax.selection.keys import is_positive, score_dtype
from st3jax.selection.quantile import threshold
from st3jax.selection.ranking import whole
from st3jax.selection.wide import wide
from st3jax.trees import named_leaves

__all__ = ["OFF", "first_thresholds", "leaf_thresholds", "select"]

Leaves = Mapping[str, Any]
OFF = -1.0
"""A threshold that nothing is below: nothing is asked of the leaf."""


def select(
    rule: Rule,
    leaves: Leaves,
    layouts: Layouts,
    params: Any,
    sparsity: Any,
    near: Leaves | None = None,
    *,
    needed: jax.typing.ArrayLike = True,
) -> jax.Array | dict[str, jax.Array]:
    """What leaves a sparsity: one threshold on scores, or one for each kernel.

    Args:
        rule: Which weights go first.
        leaves: The prunable leaves by path.
        layouts: From path to a letter for each axis.
        params: Pytree of all parameters.
        sparsity: Scalar in [0, 1], or a mapping from paths to such scalars.
        near: Thresholds of leaves that these may be close to, such as those a step
            before; they change the time taken, never the result.
        needed: Boolean scalar; where it is false, the result has no meaning.

    Returns:
        float64 if a prunable leaf is float64 and float32 otherwise, -1 where nothing is
        to go. If every kernel has a sparsity of its own, the thresholds on weights by
        path, those of a leaf in the shape of its stacked axes; otherwise [], the
        threshold on scores, or for an N:M pattern the share of the groups' own
        thresholds, from 0 to 1.
    """
    if rule.pattern.kind == "groups":
        return _share(rule, leaves, sparsity)
    if rule.of_each(sparsity):
        return _of_each(rule, leaves, layouts, sparsity, near, needed)
    return _of_all(rule, leaves, layouts, params, sparsity, near, needed)


def first_thresholds(
    rule: Rule, leaves: Leaves, layouts: Layouts, sparsity: Any
) -> dict[str, jax.Array]:
    """Thresholds of the shapes and dtype that later ones have, all of them off.

    Example:
        >>> leaves, layouts = {"kernel": jnp.ones((6, 2, 3))}, {"kernel": "sio"}
        >>> rule = Rule(distribution="uniform")
        >>> first_thresholds(rule, leaves, layouts, 0.5)["kernel"].shape
        (6,)
    """
    own = rule.of_each(sparsity)
    shapes = {
        path: stack_shape(layouts[path], jnp.shape(w)) if own else ()
        for path, w in leaves.items()
    }
    return {
        path: jnp.full(shape, OFF, _dtype(leaves)) for path, shape in shapes.items()
    }


def leaf_thresholds(
    rule: Rule,
    leaves: Leaves,
    layouts: Layouts,
    selected: jax.Array | dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """The thresholds on weights (on norms, for blocks), from what was selected.

    Args:
        rule: Which weights go first.
        leaves: The prunable leaves by path.
        layouts: From path to a letter for each axis.
        selected: The result of :func:`select`.

    Returns:
        Scalar by path, or one for each stacked kernel, of the dtype of ``selected``, -1
        where nothing is to go.

    Example:
        >>> leaves = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
        >>> layouts = {"kernel": "io"}
        >>> t = select(Rule(), leaves, layouts, leaves, 0.5)
        >>> leaf_thresholds(Rule(), leaves, layouts, t)["kernel"].item()
        2.0
    """
    if isinstance(selected, dict):
        return selected
    factors = _factors(rule, leaves, layouts)
    if rule.pattern.kind == "groups" or all(f == 1 for f in factors.values()):
        return dict.fromkeys(leaves, selected)
    each = unscaled(selected, np.array(list(factors.values())))
    each = jnp.where(selected >= 0, each, selected)
    return {path: each[i] for i, path in enumerate(leaves)}


def _of_all(
    rule: Rule,
    leaves: Leaves,
    layouts: Layouts,
    params: Any,
    sparsity: Any,
    near: Leaves | None,
    needed: jax.typing.ArrayLike,
) -> jax.Array:
    """From one selection over all leaves."""
    most, costs = 1.0, None
    if rule.costs is not None:
        costs = {path: int(rule.costs[path]) for path in leaves}
        every = named_leaves(params)
        most = largest_share(rule.costs, leaves, every, rule.axis_name)
    fraction, asked = _of_prunable(sparsity, most)
    factors = _factors(rule, leaves, layouts)
    hints = (t * factors[path] for path, t in (near or {}).items())
    t = threshold(
        {path: _scores(rule, w, layouts[path]) for path, w in leaves.items()},
        fraction,
        near=next(hints, None),
        needed=asked & needed,
        costs=costs,
        axis_name=rule.axis_name,
    )
    return jnp.where(asked, t, OFF)


@wide
def _of_prunable(sparsity: Any, most: float) -> tuple[jax.Array, jax.Array]:
    """The share of what the prunable leaves have, and whether there is one to go."""
    fraction = jnp.asarray(sparsity).astype(jnp.float64)
    asked = is_positive(fraction)
    if most < 1:
        fraction = jnp.where(fraction >= most, 1, fraction / most)
    return fraction, asked


def _of_each(
    rule: Rule,
    leaves: Leaves,
    layouts: Layouts,
    sparsity: Any,
    near: Leaves | None,
    needed: jax.typing.ArrayLike,
) -> dict[str, jax.Array]:
    """From one selection a kernel, each for its own sparsity."""
    shapes = {path: jnp.shape(w) for path, w in leaves.items()}
    each = layer_sparsities(rule.distribution, shapes, sparsity, layouts)
    magnitudes = rule._replace(criterion="l1")  # of one kernel, all factors are equal
    dtype = _dtype(leaves)

    def of_leaf(path: str, w: Any) -> jax.Array:
        stack = stack_shape(layouts[path], shapes[path])
        if not w.size:
            return jnp.full(stack, OFF, dtype)
        asked = _of_prunable(each[path], 1.0)[1]

        def of_kernel(sizes: jax.Array, before: jax.Array) -> jax.Array:
            return threshold(
                sizes,
                each[path],
                near=before,
                needed=asked & needed,
                axis_name=rule.axis_name,
            )

        before = jnp.full(stack, OFF, dtype) if near is None else near[path]
        sizes = _scores(magnitudes, w, layouts[path])
        if stack and rule.pattern.kind != "block":  # norms are those of kernels
            sizes = to_kernels(sizes, layouts[path])
        if stack:  # thresholds of kernels are alike on all devices
            sizes = whole(sizes)
        t = each_kernel(of_kernel, layouts[path])(sizes, before)
        return jnp.where(asked, t.astype(dtype), OFF)

    return {path: of_leaf(path, w) for path, w in leaves.items()}


@wide
def _share(rule: Rule, leaves: Leaves, sparsity: Any) -> jax.Array:
    """The share of the groups' own thresholds: exactly 1 at the end."""
    final = final_sparsity(rule.pattern) or 1.0
    s = jnp.asarray(sparsity).astype(jnp.float64)
    share = jnp.where(s >= final - CLOSE, 1, s / final)
    return jnp.where(is_positive(s), share, OFF).astype(_dtype(leaves))


def _dtype(leaves: Leaves) -> jnp.dtype:
    return score_dtype(*(jnp.result_type(w) for w in leaves.values()))


def _factors(rule: Rule, leaves: Leaves, layouts: Layouts) -> dict[str, float]:
    return {path: _factor(rule, w, layouts[path]) for path, w in leaves.items()}


def _factor(rule: Rule, w: Any, layout: str) -> float:
    return score_factor(rule.criterion, kernel_shape(layout, jnp.shape(w)))


def _scores(rule: Rule, w: jax.Array, layout: str) -> jax.Array:
    """What is compared: weights, or the norms of blocks, times the leaf's factor."""
    w = jnp.asarray(w)
    if rule.pattern.kind == "block":
        norms = norms_of_kernels(rule.pattern, w, layout)
        return scaled(norms, _factor(rule, w, layout))
    # Only magnitudes count, so the weights themselves will do.
    return w if rule.criterion == "l1" else scores(w, rule.criterion, layout=layout)
