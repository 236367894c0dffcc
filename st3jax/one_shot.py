"""One-shot pruning: exact pruning of any pytree by magnitude or by scores, no loop."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st3jax import ops
from st3jax.checks import as_mapping, check_predicate
from st3jax.layout.letters import Layouts
from st3jax.layout.settle import settle
from st3jax.rule.costs import Costs
from st3jax.rule.patterns import spread, stays
from st3jax.rule.rule import check_final_sparsity, check_fits, make_rule
from st3jax.rule.thresholds import leaf_thresholds, select
from st3jax.selection.keys import choose, score_dtype, widened
from st3jax.trees import (
    Prunable,
    is_kernel,
    map_named,
    named_leaves,
    per_leaf_tree,
    prunable_leaves,
)

__all__ = ["prune"]


def prune(
    params: Any,
    sparsity: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike],
    *,
    criterion: str = "l1",
    distribution: str = "global",
    costs: Costs | None = None,
    pattern: str | tuple[int, ...] | None = None,
    scores: Any = None,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
) -> Any:
    r"""Sets the smallest weights to zero, by default those of all layers together.

    Of :math:`n` prunable weights with distinct scores, exactly
    :math:`\lfloor s (n - 1) \rfloor + 1` become zero (none for :math:`s = 0`); weights
    that tie with the last of them become zero too.

    Args:
        params: Pytree of arrays.
        sparsity: Share of the prunable weights to be zero, in [0, 1], or a mapping from
            paths (``"*head*"``, the first that matches counts) to the shares of single
            layers. Under ``jit``, close over a mapping: an argument's would be sorted.
        criterion: ``"l1"`` compares magnitudes, ``"l1_sigma"`` compares them relative
            to the width of their layer.
        distribution: ``"global"``, ``"uniform"`` or ``"erk"``; see :func:`st3jax.st3`.
        costs: From path to the multiply-adds of one weight, for a share of those
            instead of weights.
        pattern: ``None``, ``"N:M"`` such as ``"2:4"``, or the shape of a block, such as
            ``(4, 8)`` for 4 inputs by 8 outputs.
        scores: Your own scores in place of magnitudes: a pytree in the structure of
            ``params`` with a floating-point array in the shape of each prunable leaf,
            anything elsewhere. The smallest go, compared by magnitude, NaN last; all
            said of ties, layers, N:M and blocks counts for scores. Weights that stay
            keep their bits. With ``criterion="l1"`` only.
        prunable: Predicate on (path, leaf).
        layout: What the axes of leaves are, see :func:`st3jax.st3`.

    Returns:
        Pytree of the structure, shapes and dtypes of ``params``.

    Raises:
        ValueError: If an argument is out of its range, if no leaf is prunable, or if
            costs, a pattern or scores do not fit the leaves.
        TypeError: If a prunable leaf or its scores are not of a floating-point dtype.

    Example:
        >>> params = {"kernel": jax.numpy.array([[1.0], [-2.0], [3.0], [-4.0]])}
        >>> prune(params, 0.5)["kernel"].ravel().tolist()
        [0.0, 0.0, 3.0, -4.0]
        >>> prune(params, 0.5, pattern="1:2")["kernel"].ravel().tolist()
        [0.0, -2.0, 0.0, -4.0]
        >>> scores = {"kernel": jax.numpy.array([[9.0], [0.0], [0.1], [5.0]])}
        >>> prune(params, 0.5, scores=scores)["kernel"].ravel().tolist()
        [1.0, 0.0, 0.0, -4.0]

    References:
        Section 3 of arXiv:2212.01076 for the threshold.
    """
    by_path = as_mapping(sparsity)
    sparsity = sparsity if by_path is None else by_path
    check_predicate(prunable)
    rule = make_rule(
        criterion=criterion, distribution=distribution, costs=costs, pattern=pattern
    )
    check_final_sparsity(rule, sparsity)
    leaves = prunable_leaves(params, prunable)
    layouts = settle(leaves, params, layout, rule.needs(sparsity))
    check_fits(rule, leaves, layouts, params, sparsity)

    if scores is None:
        own = leaves
    else:
        _check_criterion(criterion)
        own = _scores_of(leaves, scores)

    def hard(path: str, t: jax.Array, w: jax.Array) -> jax.Array:
        w = jnp.asarray(w)
        if scores is None:
            return ops.hard_threshold(w, spread(rule.pattern, w, t, layouts[path]))
        kept = stays(rule.pattern, own[path], t, layouts[path])
        raw = jax.lax.stop_gradient(w)
        return ops.straight_through(w, choose(kept, raw, jnp.zeros_like(raw)))

    selected = select(rule, own, layouts, params, sparsity)
    thresholds = leaf_thresholds(rule, own, layouts, selected)
    return map_named(hard, per_leaf_tree(params, thresholds), params)


def _check_criterion(criterion: str) -> None:
    """Raises if magnitudes are to be scaled where others stand in their place."""
    if criterion != "l1":
        raise ValueError(
            f"criterion {criterion!r} makes scores of magnitudes, and scores=... are "
            "there already: leave out one of them"
        )


def _scores_of(leaves: dict[str, Any], scores: Any) -> dict[str, jax.Array]:
    """The scores of each prunable leaf, all in one dtype."""
    given, found = named_leaves(scores), {}
    for path, w in leaves.items():
        if path not in given:
            listed = ", ".join(repr(path) for path in list(given)[:3])
            raise ValueError(
                f"scores have no leaf '{path}' (they have {listed or 'none at all'}): "
                "give them the structure of params, or leave it out with prunable=..."
            )
        if np.shape(given[path]) != np.shape(w):
            raise ValueError(
                f"the scores of '{path}' have the shape {np.shape(given[path])}, but "
                f"its weights {np.shape(w)}: there is one for each weight"
            )
        dtype = jnp.result_type(given[path])
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"the scores of '{path}' are of dtype {dtype}, but scores are "
                "floating-point numbers: convert them with astype"
            )
        found[path] = jax.lax.stop_gradient(jnp.asarray(given[path]))
    if score_dtype(*(each.dtype for each in found.values())) == jnp.float64:
        return {path: widened(each) for path, each in found.items()}
    return found
