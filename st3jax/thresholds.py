"""Thresholds: one scalar for each prunable leaf, from one global selection."""

from typing import Any

import jax

from st3jax.scores import score_factor, scores, weight_threshold
from st3jax.selection import threshold
from st3jax.trees import (
    Prunable,
    is_kernel,
    map_prunable,
    named_leaves,
    prunable_leaves,
)

__all__ = ["leaf_thresholds"]


def leaf_thresholds(
    params: Any,
    fraction: jax.typing.ArrayLike,
    *,
    criterion: str = "l1",
    prunable: Prunable = is_kernel,
    near: Any = None,
) -> Any:
    """The thresholds on weights that remove exactly ``fraction`` of them globally.

    Args:
        params: Pytree of arrays.
        fraction: Share of all prunable weights to remove, in [0, 1].
        criterion: ``"l1"`` or ``"l1_sigma"``, see :func:`st3jax.scores.score_factor`.
        prunable: Predicate on (path, leaf).
        near: Thresholds that these may be close to, such as those a step before; they
            change the time taken, never the result.

    Returns:
        Tree with a scalar threshold on ``|w|`` for each prunable leaf (all of one
        dtype, float64 if a prunable leaf is float64 and float32 otherwise) and
        ``optax.MaskedNode`` elsewhere.

    Raises:
        ValueError: If no leaf is prunable or ``fraction`` is not in [0, 1].
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> params = {"kernel": jax.numpy.array([[1.0, 2.0, 3.0]])}
        >>> float(leaf_thresholds(params, 0.5)["kernel"])
        2.0
    """
    leaves = prunable_leaves(params, prunable)
    factors = {path: score_factor(criterion, w.shape) for path, w in leaves.items()}
    if near is not None:
        path, before = next(iter(named_leaves(near).items()))
        near = before * factors[path]
    t = threshold(
        {path: scores(w, criterion) for path, w in leaves.items()}, fraction, near=near
    )

    def on_weights(path: str, w: jax.Array) -> jax.Array:
        return weight_threshold(t, factors[path])

    return map_prunable(on_weights, params, prunable)
