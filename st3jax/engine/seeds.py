"""Seeds: random keys as plain arrays, which a state can hold and a checkpoint keep."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["key_of", "seed_of"]


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
