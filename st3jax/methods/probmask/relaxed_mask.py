"""Random masks between 0 and 1 that follow probabilities and can be differentiated."""

import jax
import jax.numpy as jnp

__all__ = ["relaxed_mask", "relaxed_slope"]

SMALL = 1e-20
"""Keeps logarithms and quotients finite at probabilities of 0 and 1."""


def relaxed_mask(
    p: jax.Array, u0: jax.Array, u1: jax.Array, temperature: jax.typing.ArrayLike
) -> jax.Array:
    r"""A random mask between 0 and 1 that can be differentiated with respect to ``p``.

    .. math::
        m = \sigma\!\left(T \left(\log(p + e) - \log(1 - p + e) + \text{noise}\right)
        \right), \qquad
        \text{noise} = -\log\!\left(\frac{\log(u_0 + e)}{\log(u_1 + e)} + e\right)

    with :math:`e = 10^{-20}`. Above one half with probability :math:`p` at any
    :math:`T`; the larger :math:`T`, the closer to 0 and 1. Exactly 1 where
    :math:`p = 1`.

    Args:
        p: Probabilities in [0, 1], float32, any shape.
        u0: Uniform random numbers in [0, 1), same shape and dtype.
        u1: More of them, independent.
        temperature: The factor :math:`T` above 0 (an inverse temperature), a scalar.

    Returns:
        Array of the shape and dtype of ``p``, finite in [0, 1].

    Example:
        >>> p = jnp.array([0.0, 0.5, 1.0])
        >>> u = jnp.full(3, 0.3)
        >>> relaxed_mask(p, u, u, 5.0).tolist()
        [0.0, 0.5, 1.0]

    References:
        arXiv:2105.01571; the Gumbel-softmax of two classes, arXiv:1611.01144.
    """
    noise = -jnp.log(jnp.log(u0 + SMALL) / jnp.log(u1 + SMALL) + SMALL)
    logits = jnp.log(p + SMALL) - jnp.log(_complement(p)) + noise
    return jnp.where(p >= 1, 1, jax.nn.sigmoid(temperature * logits))


def relaxed_slope(m: jax.Array, p: jax.Array, temperature: jax.Array) -> jax.Array:
    r"""The derivative of a relaxed mask with respect to its probabilities.

    .. math::
        \frac{\partial m}{\partial p} =
        T m (1 - m) \left(\frac{1}{p + e} + \frac{1}{1 - p + e}\right)

    Args:
        m: Masks that :func:`relaxed_mask` made of ``p``, float32, any shape.
        p: Probabilities in [0, 1], same shape and dtype.
        temperature: The factor :math:`T` that the masks were made with, a scalar.

    Returns:
        Array of the shape and dtype of ``p``, finite.

    Example:
        >>> p = jnp.array([0.0, 0.5, 1.0])
        >>> relaxed_slope(p, p, jnp.array(5.0))
        Array([0., 5., 0.], dtype=float32)
    """
    return temperature * m * (1 - m) * (1 / (p + SMALL) + 1 / _complement(p))


def _complement(p: jax.Array) -> jax.Array:
    """``1 - p + SMALL``, which a compiler may turn into ``(1 + SMALL) - p``, or 0."""
    return jnp.maximum(1 - p, SMALL)
