"""Ranking: exactly so many entries of one array, the largest that may be taken.

Selection over a whole network finds a threshold; here the number is exact, ties
included, at the price of sorting the array.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from st3jax.selection.keys import to_key

__all__ = ["largest", "whole"]


def largest(
    scores: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
    *,
    among: jax.typing.ArrayLike,
) -> jax.Array:
    """The positions of the largest magnitudes, exactly as many as asked for.

    Of equal magnitudes the one at the lower flat index is taken first. Magnitudes are
    compared exactly, subnormal ones included; NaN is the largest of all.

    Args:
        scores: Array of any shape and floating-point dtype.
        count: Integer scalar, concrete or traced: how many to take. All that may be
            taken are if it is more, none if it is negative.
        among: bool array of the shape of ``scores``: which may be taken.

    Returns:
        bool array of the shape of ``scores``, true where a position is taken.

    Raises:
        ValueError: If the two shapes differ.
        TypeError: If ``scores`` are not of a floating-point dtype.

    Example:
        >>> among = jnp.array([True, True, True, False])
        >>> largest(jnp.array([1.0, -3.0, 1.0, 5.0]), 2, among=among).tolist()
        [True, True, False, False]
    """
    scores, among = jnp.asarray(scores), jnp.asarray(among, bool)
    if scores.shape != among.shape:
        raise ValueError(
            f"among has shape {among.shape}, but scores have {scores.shape}: say for "
            "each score whether it may be taken"
        )
    keys = jnp.where(whole(among), to_key(whole(scores)), -1).ravel()
    order = jnp.argsort(-keys, stable=True)
    first = jnp.arange(keys.size) < count
    taken = jnp.zeros(keys.shape, bool).at[order].set(first, unique_indices=True)
    return taken.reshape(scores.shape) & among


def whole(x: jax.Array) -> jax.Array:
    """The array on every device, where the way it is sharded is part of its type.

    Example:
        >>> whole(jnp.ones((2, 3))).shape
        (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.reshard(x, P()) if mesh.explicit_axes else x
