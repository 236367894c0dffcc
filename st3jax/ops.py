"""Thresholding of weights with straight-through gradients.

The contract of every function here: the gradient of the result with respect to ``w`` is
the identity, for kept and for zeroed weights alike; thresholds and scales are not
differentiated. A weight is kept where its magnitude is strictly above the threshold.
Zeroed weights are ``+0.0``, and a kept weight never rounds to zero. While a threshold
is not above zero it is off. Output channels are the last axis, or where a layout says
(see :mod:`st3jax.layout.letters`). float16 and bfloat16 are computed in float32 and
returned as they came.

Source: Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and
Soft-Thresholding all you need for Sparse Training?", WACV 2023, arXiv:2212.01076.
"""

import math

import jax
import jax.numpy as jnp

from st3jax.selection.keys import choose, is_positive, score_dtype, to_key

__all__ = [
    "channel_scale",
    "hard_threshold",
    "is_kept",
    "rescale",
    "smallest_kept",
    "soft_threshold",
    "straight_through",
]


def smallest_kept(dtype: jnp.dtype) -> float:
    """The least magnitude of a kept weight, so that only zeroed weights are zero.

    Args:
        dtype: A floating-point dtype.

    Returns:
        A positive number that survives rescaling and flushing of subnormal numbers.

    Example:
        >>> smallest_kept(jnp.dtype(jnp.float16))
        5.960464477539063e-08
    """
    if dtype == jnp.float16:
        return float(jnp.finfo(dtype).smallest_subnormal)
    return 2 * float(jnp.finfo(dtype).smallest_normal)


@jax.custom_vjp
def _soft_threshold(w: jax.Array, t: jax.Array) -> jax.Array:
    wide = w.astype(t.dtype)
    size = jnp.maximum(jnp.abs(wide) - t, smallest_kept(w.dtype))
    # Keys of the weight itself: a compiler may not have rounded the wide one yet.
    shrunk = jnp.where(_is_kept(w, t), jnp.copysign(size, wide), 0)
    return choose(is_positive(t), shrunk.astype(w.dtype), w)


@jax.custom_vjp
def _hard_threshold(w: jax.Array, t: jax.Array) -> jax.Array:
    return choose(_is_kept(w, t), w, jnp.zeros_like(w))


@jax.custom_vjp
def _rescale(x: jax.Array, scale: jax.Array) -> jax.Array:
    scaled = (x.astype(scale.dtype) * scale).astype(x.dtype)
    return choose(to_key(scaled) == 0, x, scaled)


@jax.custom_vjp
def _straight_through(w: jax.Array, seen: jax.Array) -> jax.Array:
    del w
    return seen


def _identity_bwd(other: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g, jnp.zeros_like(other)


_soft_threshold.defvjp(lambda w, t: (_soft_threshold(w, t), t), _identity_bwd)
_hard_threshold.defvjp(lambda w, t: (_hard_threshold(w, t), t), _identity_bwd)
_rescale.defvjp(lambda x, scale: (_rescale(x, scale), scale), _identity_bwd)
_straight_through.defvjp(lambda w, seen: (seen, None), lambda _, g: (g, None))


def _is_kept(w: jax.Array, t: jax.Array) -> jax.Array:
    return to_key(w) > jnp.where(is_positive(t), to_key(t), -1)


def _fitting(x: jax.typing.ArrayLike, w: jax.Array, name: str) -> jax.Array:
    """A threshold or scale in the dtype to compute in, a scalar or of as many axes."""
    x = jnp.asarray(x).astype(score_dtype(w.dtype))
    if x.ndim > w.ndim or jnp.broadcast_shapes(x.shape, w.shape) != w.shape:
        raise ValueError(
            f"{name} has shape {x.shape}, which does not broadcast to that of the "
            f"weights, {w.shape}"
        )
    return x if not x.ndim else x.reshape((1,) * (w.ndim - x.ndim) + x.shape)


def soft_threshold(w: jax.typing.ArrayLike, t: jax.typing.ArrayLike) -> jax.Array:
    r"""Shrinks every weight towards zero by ``t``; the small ones become zero.

    .. math::
        f(w) = (w - \operatorname{sign}(w)\, t) \; [\,|w| > t\,],
        \qquad \frac{\partial L}{\partial w} := \frac{\partial L}{\partial f}

    Unlike the hard threshold, this is continuous in ``w`` and in ``t``, so a weight
    passes zero without a jump.

    Args:
        w: Weights, any shape and floating-point dtype.
        t: Threshold on ``|w|``, a scalar or an array that broadcasts to ``w``; off
            (the result is ``w``) where it is not above zero.

    Returns:
        Array of the shape and dtype of ``w``. NaN and infinity stay what they are.

    Example:
        >>> soft_threshold(jnp.array([-3.0, -1.0, 0.5, 2.0]), 1.0).tolist()
        [-2.0, 0.0, 0.0, 1.0]
        >>> jax.grad(lambda w: (soft_threshold(w, 1.0) * jnp.arange(4.0)).sum())(
        ...     jnp.array([-3.0, -1.0, 0.5, 2.0])).tolist()
        [0.0, 1.0, 2.0, 3.0]

    References:
        arXiv:2212.01076, section 3.
    """
    w = jnp.asarray(w)
    return _soft_threshold(w, _fitting(t, w, "t"))


def hard_threshold(w: jax.typing.ArrayLike, t: jax.typing.ArrayLike) -> jax.Array:
    r"""Sets the weights of magnitude up to ``t`` to zero and leaves the others.

    .. math::
        f(w) = w \; [\,|w| > t\,],
        \qquad \frac{\partial L}{\partial w} := \frac{\partial L}{\partial f}

    Args:
        w: Weights, any shape and floating-point dtype.
        t: Threshold on ``|w|``, a scalar or an array that broadcasts to ``w``; off
            (the result is ``w``) where it is not above zero.

    Returns:
        Array of the shape and dtype of ``w``.

    Example:
        >>> hard_threshold(jnp.array([-3.0, -1.0, 0.5, 2.0]), 1.0).tolist()
        [-3.0, 0.0, 0.0, 2.0]

    References:
        arXiv:2212.01076, section 3.
    """
    w = jnp.asarray(w)
    return _hard_threshold(w, _fitting(t, w, "t"))


def channel_scale(
    w: jax.typing.ArrayLike, t: jax.typing.ArrayLike, *, layout: str | None = None
) -> jax.Array:
    r"""The factor that makes up for the magnitude an output channel lost.

    .. math::
        r = \frac{\operatorname{mean}(|w|\,[\,|w| > t\,]) + 10^{-6}}
                 {\operatorname{mean}(|w|) + 10^{-6}},
        \qquad \text{scale} = \frac{1.01}{r + 0.01}

    with the means over all axes but the last, or over the window and the inputs that a
    layout names.

    Args:
        w: Raw weights, any floating-point dtype.
        t: Threshold on ``|w|``, a scalar or an array that broadcasts to ``w``.
        layout: A letter for each axis: ``s`` stacked kernels, ``w`` window, ``i``
            inputs, ``o`` outputs. By default outputs are the last axis, and all others
            are averaged over.

    Returns:
        Array of shape ``w.shape[-1:]``; with a layout of the shape of ``w`` with 1 in
        place of windows and inputs. float64 for float64 weights and float32 otherwise,
        between 1 (nothing lost) and 101; 1 where ``t`` is off, and for a channel that
        is not finite.

    Example:
        >>> w = jnp.array([[1.0, 3.0], [1.0, 1.0]])
        >>> [round(float(x), 2) for x in channel_scale(w, 2.0)]  # the first lost all
        [100.99, 1.33]
        >>> channel_scale(w.T, 2.0, layout="oi").shape
        (2, 1)

    References:
        arXiv:2212.01076, section 3.
    """
    w = jax.lax.stop_gradient(jnp.asarray(w))
    t = jax.lax.stop_gradient(_fitting(t, w, "t"))
    size = jnp.abs(w.astype(t.dtype))
    axes = _averaged(layout, w.ndim)
    count = max(math.prod(w.shape[axis] for axis in axes), 1)
    keep = layout is not None
    kept = jnp.where(_is_kept(w, t), size, 0)
    before, after = (x / count for x in _two_sums(size, kept, axes, keep))
    # Two sums may round differently although no threshold took anything.
    idle = ~is_positive(t)
    if t.ndim:
        idle = jnp.broadcast_to(idle, w.shape).all(axes, keepdims=keep)
    # Also where the mean is not finite: one bad weight must not spoil its channel.
    intact = idle | (after == before) | jnp.isnan(before)
    r = jnp.where(intact, 1, (after + 1e-6) / (before + 1e-6))
    return 1.01 / (r + 0.01)


def _two_sums(
    x: jax.Array, y: jax.Array, axes: tuple[int, ...], keep: bool
) -> tuple[jax.Array, jax.Array]:
    """The sums of two arrays of one shape; on a GPU in one reduction.

    In two, its compiler would write the second array to memory.
    """

    def at_once(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        zero = jnp.zeros([], x.dtype)
        first, second = jax.lax.reduce(
            (x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes
        )
        if keep:
            return jnp.expand_dims(first, axes), jnp.expand_dims(second, axes)
        return first, second

    def apart(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x.sum(axes, keepdims=keep), y.sum(axes, keepdims=keep)

    return jax.lax.platform_dependent(x, y, cuda=at_once, rocm=at_once, default=apart)


def _averaged(layout: str | None, ndim: int) -> tuple[int, ...]:
    """The axes of one channel's own weights."""
    if layout is None:
        return tuple(range(ndim - 1))
    return tuple(axis for axis, letter in enumerate(layout) if letter in "wi")


def rescale(x: jax.typing.ArrayLike, scale: jax.typing.ArrayLike) -> jax.Array:
    r"""Multiplies each output channel by its scale, with identity gradient.

    .. math::
        f(x) = x \cdot \text{scale},
        \qquad \frac{\partial L}{\partial x} := \frac{\partial L}{\partial f}

    Args:
        x: Thresholded weights, any floating-point dtype.
        scale: Array that broadcasts to ``x``, from :func:`channel_scale`.

    Returns:
        Array of the shape and dtype of ``x``.

    Example:
        >>> rescale(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([2.0, 3.0])).tolist()
        [[2.0, 0.0], [0.0, 6.0]]

    References:
        arXiv:2212.01076, section 3.
    """
    x = jnp.asarray(x)
    return _rescale(x, _fitting(scale, x, "scale"))


def is_kept(w: jax.typing.ArrayLike, t: jax.typing.ArrayLike) -> jax.Array:
    r"""Where a threshold keeps weights: :math:`|w| > t`, everywhere while it is off.

    Args:
        w: Weights, any shape and floating-point dtype.
        t: Threshold on ``|w|``, a scalar or an array that broadcasts to ``w``.

    Returns:
        bool array of the shape of ``w``.

    Example:
        >>> is_kept(jnp.array([-3.0, 1.0, 0.5]), 1.0).tolist()
        [True, False, False]
    """
    w = jnp.asarray(w)
    return _is_kept(w, _fitting(t, w, "t"))


def straight_through(w: jax.Array, seen: jax.Array) -> jax.Array:
    r"""What the model sees in place of weights, with the gradient of the weights.

    .. math::
        f(w) = \text{seen}, \qquad
        \frac{\partial L}{\partial w} := \frac{\partial L}{\partial f}

    Args:
        w: Raw weights, any shape and floating-point dtype.
        seen: What was made of them, same shape and dtype.

    Returns:
        ``seen``.

    Example:
        >>> w = jnp.array([-3.0, 0.5])
        >>> jax.grad(lambda w: straight_through(w, jnp.sign(w)).sum())(w).tolist()
        [1.0, 1.0]

    References:
        arXiv:1308.3432.
    """
    return _straight_through(w, jax.lax.stop_gradient(seen))
