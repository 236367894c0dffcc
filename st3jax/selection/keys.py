"""Integer keys: the bit pattern of a magnitude, which orders magnitudes exactly.

For non-negative floating-point numbers the bit pattern, read as an integer, grows
with the number. Comparing keys instead of floats makes three things exact that float
comparison leaves to the platform: subnormal numbers (flushed to zero by some
processors when compared as floats), negative zero (the same key as positive zero) and
NaN (one key, above infinity).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "choose",
    "from_key",
    "is_positive",
    "joined_keys",
    "key_dtype",
    "score_dtype",
    "to_key",
    "widened",
]


def score_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which magnitudes of arrays of these dtypes are compared.

    Args:
        *dtypes: Floating-point dtypes.

    Returns:
        float64 if any of them is float64, else float32.

    Raises:
        TypeError: If one of them is not a floating-point dtype.

    Example:
        >>> score_dtype(jnp.bfloat16, jnp.float32)
        dtype('float32')
    """
    for dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"magnitudes are floating-point numbers, got {dtype}")
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def key_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The integer dtype of the keys of a float32 or float64 array.

    Example:
        >>> key_dtype(jnp.float32)
        dtype('int32')
    """
    return jnp.dtype(jnp.int64 if jnp.dtype(dtype) == jnp.float64 else jnp.int32)


def to_key(x: jax.typing.ArrayLike) -> jax.Array:
    """Maps each element to an integer that orders magnitudes.

    Args:
        x: Array of any shape and floating-point dtype.

    Returns:
        Non-negative integers of the same shape, int64 for float64 and int32 otherwise:
        0 for both zeros, growing with ``|x|``, and one value above infinity for NaN.

    Example:
        >>> to_key(jnp.array([-0.0, 1.0, -1.0])).tolist()
        [0, 1065353216, 1065353216]
    """
    bits = _bits(jnp.asarray(x))
    infinity = _infinity(bits.dtype)
    return jnp.minimum(bits & jnp.iinfo(bits.dtype).max, infinity + 1)


def joined_keys(arrays: Sequence[jax.Array]) -> jax.Array:
    """The keys of all elements of some arrays, one after the other.

    Args:
        arrays: Of any shapes; all float64 or none.

    Returns:
        int64 [n] for float64 arrays, int32 [n] otherwise.

    Example:
        >>> joined_keys([jnp.zeros((1, 2)), jnp.zeros(1, jnp.bfloat16)]).tolist()
        [0, 0, 0]
    """
    flat = [x.reshape(-1) for x in arrays]
    if len({x.dtype for x in flat}) == 1:  # one conversion to compile
        return to_key(jnp.concatenate(flat))
    return jnp.concatenate([to_key(x) for x in flat])


def _bits(x: jax.Array) -> jax.Array:
    """The bit pattern in the dtype in which magnitudes are compared."""
    if x.dtype == jnp.bfloat16:  # the upper half of a float32; converting may flush
        return lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) << 16
    x = x.astype(score_dtype(x.dtype))
    return lax.bitcast_convert_type(x, key_dtype(x.dtype))


def _infinity(integer: jnp.dtype) -> jax.Array:
    dtype = jnp.float64 if integer == jnp.int64 else jnp.float32
    return lax.bitcast_convert_type(jnp.array(jnp.inf, dtype), integer)


def from_key(key: jax.Array) -> jax.Array:
    """The magnitude that a key stands for, the inverse of :func:`to_key`.

    Args:
        key: int32 or int64 array of keys.

    Returns:
        float32 or float64 array of the same shape.

    Example:
        >>> from_key(to_key(jnp.float32(-2.5))).item()
        2.5
    """
    dtype = jnp.float64 if key.dtype == jnp.int64 else jnp.float32
    return lax.bitcast_convert_type(key, dtype)


def choose(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """``jnp.where`` by bit patterns, so that subnormal numbers stay what they are.

    A choice between bfloat16 numbers may be made in float32, and flush them to zero.

    Args:
        condition: Boolean scalar or array of the shape of ``x``.
        x: Array of any floating-point dtype.
        y: What to take elsewhere, an array of the same shape and dtype.

    Returns:
        Array of the same shape and dtype.

    Example:
        >>> x = jnp.array([1e-40, 2.0], jnp.bfloat16)
        >>> to_key(choose(jnp.array([True, False]), x, jnp.zeros_like(x))).tolist()
        [65536, 0]
    """
    integer = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    a, b = (lax.bitcast_convert_type(part, integer) for part in (x, y))
    return lax.bitcast_convert_type(jnp.where(condition, a, b), x.dtype)


def is_positive(x: jax.typing.ArrayLike) -> jax.Array:
    """Whether each element is above zero, subnormal numbers included, NaN excluded.

    Example:
        >>> is_positive(jnp.array([-1.0, 0.0, 1e-45, jnp.nan])).tolist()
        [False, False, True, False]
    """
    bits = _bits(jnp.asarray(x))
    return (bits > 0) & (bits <= _infinity(bits.dtype))


def widened(x: jax.Array) -> jax.Array:
    """The magnitudes of any floating-point array as float64, subnormal ones too.

    Conversion flushes subnormal float32 and bfloat16 numbers to zero on some platforms.
    """
    if x.dtype == jnp.float64:
        return x
    key = to_key(x)
    tiny = key < to_key(jnp.asarray(jnp.finfo(jnp.float32).smallest_normal))
    exact = key.astype(jnp.float64) * 2.0**-149
    return jnp.where(tiny, exact, jnp.abs(x.astype(jnp.float64)))
