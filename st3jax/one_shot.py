"""One-shot pruning: exact global magnitude pruning of any pytree, no training loop."""

from collections.abc import Mapping
from typing import Any

import jax

from st3jax import ops
from st3jax.rule.costs import Costs
from st3jax.rule.patterns import weight_thresholds
from st3jax.rule.rule import check_final_sparsity, make_rule
from st3jax.rule.thresholds import leaf_thresholds
from st3jax.trees import Prunable, is_kernel, map_where_prunable

__all__ = ["prune"]


def prune(
    params: Any,
    sparsity: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike],
    *,
    criterion: str = "l1",
    distribution: str = "global",
    budget: str = "weights",
    costs: Costs | None = None,
    pattern: str | None = None,
    block_shape: tuple[int, ...] | None = None,
    prunable: Prunable = is_kernel,
) -> Any:
    r"""Sets the smallest weights to zero, by default those of all layers together.

    Of :math:`n` prunable weights with distinct scores, exactly
    :math:`\lfloor s (n - 1) \rfloor + 1` become zero (none for :math:`s = 0`); weights
    that tie with the last of them become zero too.

    Args:
        params: Pytree of arrays.
        sparsity: Share of the prunable weights to be zero, in [0, 1], or a mapping from
            path patterns (``"*head*"``) to the shares of single layers. Under ``jit``,
            close over a mapping: an argument's patterns would be sorted.
        criterion: ``"l1"`` compares magnitudes, ``"l1_sigma"`` compares them relative
            to the width of their layer.
        distribution: ``"global"``, ``"uniform"`` or ``"erk"``; see :func:`st3jax.st3`.
        budget: ``"weights"``, or ``"multiply_adds"`` for a share of those instead.
        costs: For ``"multiply_adds"``, from path to the multiply-adds of one weight.
        pattern: ``None``, ``"N:M"`` such as ``"2:4"``, or ``"block"``.
        block_shape: Shape of a block on the last axes of a leaf.
        prunable: Predicate on (path, leaf).

    Returns:
        Pytree of the structure, shapes and dtypes of ``params``.

    Raises:
        ValueError: If an argument is out of its range, if no leaf is prunable, or if
            costs or a pattern do not fit the leaves.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> params = {"kernel": jax.numpy.array([[1.0], [-2.0], [3.0], [-4.0]])}
        >>> prune(params, 0.5)["kernel"].ravel().tolist()
        [0.0, 0.0, 3.0, -4.0]
        >>> prune(params, 0.5, pattern="1:2")["kernel"].ravel().tolist()
        [0.0, -2.0, 0.0, -4.0]

    References:
        Section 3 of arXiv:2212.01076 for the threshold.
    """
    rule = make_rule(
        criterion=criterion,
        distribution=distribution,
        budget=budget,
        costs=costs,
        pattern=pattern,
        block_shape=block_shape,
        prunable=prunable,
        axis_name=None,
    )
    check_final_sparsity(rule, sparsity)

    def hard(path: str, t: jax.Array, w: jax.Array) -> jax.Array:
        return ops.hard_threshold(w, weight_thresholds(rule.pattern, path, w, t))

    thresholds = leaf_thresholds(params, sparsity, rule)
    return map_where_prunable(hard, thresholds, params)
