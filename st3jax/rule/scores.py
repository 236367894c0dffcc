"""Scores: how weights of different layers are made comparable.

A score is ``|w|`` times a factor that is the same for a whole leaf, so a threshold on
scores is a threshold on weights, divided by the factor.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from st3jax.checks import check_choice
from st3jax.layout.letters import kernel_shape
from st3jax.selection.keys import from_key, key_dtype, score_dtype, to_key

__all__ = ["CRITERIA", "scaled", "score_factor", "scores", "unscaled"]

CRITERIA = ("l1", "l1_sigma")


def score_factor(criterion: str, shape: tuple[int, ...]) -> float:
    r"""The factor that turns the magnitudes of a leaf into scores.

    ``"l1"``: 1, magnitudes are compared as they are. ``"l1_sigma"``:
    :math:`\sqrt{\sum \text{shape}}`, magnitudes are compared in units of
    :math:`\sigma = 1 / \sqrt{\sum \text{shape}}`, which spreads the zeros more evenly
    over layers (ST-3-sigma).

    Args:
        criterion: ``"l1"`` or ``"l1_sigma"``.
        shape: Shape of one kernel, as :func:`st3jax.layout.letters.kernel_shape` has
            it: the window, all inputs, all outputs.

    Returns:
        Positive factor.

    Raises:
        ValueError: If the criterion is unknown.

    Example:
        >>> score_factor("l1_sigma", (3, 3, 4, 6))
        4.0

    References:
        arXiv:2212.01076, section 3; the normalisation of ERK layer densities.
    """
    check_choice(criterion, "criterion", CRITERIA)
    return 1.0 if criterion == "l1" else math.sqrt(sum(shape) or 1)


def scores(
    w: jax.typing.ArrayLike, criterion: str = "l1", *, layout: str | None = None
) -> jax.Array:
    """The scores of one leaf: magnitude times the leaf's factor.

    Args:
        w: Weights, any shape and floating-point dtype.
        criterion: ``"l1"`` or ``"l1_sigma"``.
        layout: A letter for each axis; by default the leaf is one kernel.

    Returns:
        Array of the shape of ``w``, float64 for float64 weights and float32 otherwise.

    Example:
        >>> scores(jnp.array([[-1.0], [2.0], [0.5]]), "l1_sigma").tolist()
        [[2.0], [4.0], [1.0]]
    """
    w = jnp.asarray(w)
    size = jnp.abs(w.astype(score_dtype(w.dtype)))
    shape = w.shape if layout is None else kernel_shape(layout, w.shape)
    return scaled(size, score_factor(criterion, shape))


def scaled(size: jax.Array, factor: float) -> jax.Array:
    """Magnitudes times a factor, subnormal numbers being zero on every platform.

    Args:
        size: Magnitudes, float32 or float64.
        factor: Positive factor.

    Returns:
        Array of the shape and dtype of ``size``.

    Example:
        >>> scaled(jnp.array([1.0, 1e-40]), 2.0).tolist()
        [2.0, 0.0]
    """
    if factor == 1.0:
        return size
    least = jnp.asarray(jnp.finfo(size.dtype).smallest_normal, size.dtype)
    return jnp.where(to_key(size) < to_key(least), 0, size) * factor


def unscaled(t: jax.Array, factors: np.ndarray) -> jax.Array:
    """The thresholds on weights that cut exactly where ``t`` cuts scores.

    Division alone rounds, and a weight right at the threshold could fall on the other
    side. The result is the largest number whose product with the factor, as rounded,
    does not exceed ``t``.

    Args:
        t: Scalar threshold on scores, float32 or float64.
        factors: Positive factor of each leaf, from :func:`score_factor`: [leaves].

    Returns:
        Thresholds of the dtype of ``t``, [leaves].

    Example:
        >>> unscaled(jnp.float32(3.0), np.array([1.0, 2.0])).tolist()
        [3.0, 1.5]
    """
    each = jnp.asarray(factors).astype(t.dtype)[:, None]
    integer = key_dtype(t.dtype)
    least = to_key(jnp.asarray(jnp.finfo(t.dtype).smallest_normal, t.dtype))
    nearest = jnp.maximum(to_key(t / each), least) + jnp.asarray(
        [[-2, -1, 0, 1, 2]], integer
    )
    below = to_key(from_key(nearest) * each) <= to_key(t)
    cut = from_key(jnp.max(nearest, axis=1, initial=least - 1, where=below))
    return jnp.where(each[:, 0] == 1, t, cut)
