"""One-shot pruning: exact global magnitude pruning of any pytree, no training loop."""

from typing import Any

import jax
import jax.numpy as jnp

from st3jax import ops
from st3jax.checks import check_fraction
from st3jax.keys import is_positive
from st3jax.thresholds import leaf_thresholds
from st3jax.trees import Prunable, is_kernel, map_where_prunable

__all__ = ["prune"]


def prune(
    params: Any,
    sparsity: jax.typing.ArrayLike,
    *,
    criterion: str = "l1",
    prunable: Prunable = is_kernel,
) -> Any:
    r"""Sets the smallest weights of all layers together to zero.

    Of :math:`n` prunable weights with distinct scores, exactly
    :math:`\lfloor s (n - 1) \rfloor + 1` become zero (none for :math:`s = 0`); weights
    that tie with the last of them become zero too.

    Args:
        params: Pytree of arrays.
        sparsity: Share of the prunable weights to be zero, in [0, 1].
        criterion: ``"l1"`` compares magnitudes, ``"l1_sigma"`` compares them relative
            to the width of their layer.
        prunable: Predicate on (path, leaf).

    Returns:
        Pytree of the structure, shapes and dtypes of ``params``.

    Raises:
        ValueError: If ``sparsity`` is not in [0, 1] or no leaf is prunable.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> params = {"kernel": jax.numpy.array([[1.0, -2.0, 3.0, -4.0]])}
        >>> prune(params, 0.5)["kernel"].tolist()
        [[0.0, 0.0, 3.0, -4.0]]

    References:
        Section 3 of arXiv:2212.01076 for the threshold.
    """
    check_fraction(sparsity, "sparsity")
    thresholds = leaf_thresholds(
        params, sparsity, criterion=criterion, prunable=prunable
    )

    with jax.enable_x64(True):
        asked = is_positive(jnp.asarray(sparsity, jnp.float64))

    def hard(t: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.where(asked, ops.hard_threshold(w, t), w)

    return map_where_prunable(hard, thresholds, params)
