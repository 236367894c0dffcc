"""Seeds: random keys as plain arrays, which a state can hold and a checkpoint keep."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["key_of", "numbers_for", "seed_of"]


def seed_of(key: Any) -> jax.Array:
    """Two numbers that stand for a random key of any kind.

    Args:
        key: One JAX random key, such as ``jax.random.key(0)``.

    Returns:
        uint32 [2].

    Raises:
        TypeError: If it is not one random key.

    Example:
        >>> seed_of(jax.random.key(0)).shape
        (2,)
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == jnp.uint32 and len(shape or ()) == 1):
        raise TypeError(f"key is one random key, as jax.random.key(0), got {key!r}")
    return jax.random.bits(key, (2,), jnp.uint32)


def key_of(seed: jax.Array, *numbers: jax.typing.ArrayLike) -> jax.Array:
    """The random key of a seed and of some numbers, the same on every platform.

    Args:
        seed: uint32 [2].
        *numbers: Integers, such as a step and the place of a leaf.

    Returns:
        A JAX random key.

    Example:
        >>> seed = seed_of(jax.random.key(0))
        >>> bool(key_of(seed, 1) == key_of(seed, 2))
        False
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def numbers_for(
    key: jax.Array, leaves: dict[str, Any], each: int = 1
) -> dict[str, jax.Array]:
    """Random numbers for every weight, of one key.

    A leaf's are drawn in two axes, whatever it has: in four they take ten times as long
    to compile, as JAX counts each axis by itself, and in one no sharding of a leaf's
    first or last axis could go through.

    Args:
        key: A JAX random key.
        leaves: From path to an array, or what has its shape.
        each: How many numbers a weight gets.

    Returns:
        From path to float32 ``[each, ...]``, uniform in [0, 1).

    Example:
        >>> numbers = numbers_for(jax.random.key(0), {"kernel": jnp.ones((3, 2))}, 2)
        >>> numbers["kernel"].shape
        (2, 3, 2)
    """
    # All keys at once: each by itself would be compiled by itself.
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold_in(key, np.arange(len(leaves), dtype=np.uint32))
    return {
        path: _numbers(keys[i], jnp.shape(leaf), each)
        for i, (path, leaf) in enumerate(leaves.items())
    }


def _numbers(key: jax.Array, shape: tuple[int, ...], each: int) -> jax.Array:
    rows, width = math.prod(shape[:-1]), math.prod(shape[-1:])
    numbers = jax.random.uniform(key, (rows, width * each), jnp.float32)
    return jnp.moveaxis(numbers.reshape(*shape, each), -1, 0)
