"""How the asked sparsity grows over training: a ramp is an ordinary Optax schedule."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from st3jax.checks import check_fraction, check_positive, check_steps
from st3jax.selection.wide import wide

__all__ = [
    "LAST_STEP",
    "Sparsity",
    "at_step",
    "polynomial_ramp",
    "ramp_ends",
]

Sparsity: TypeAlias = float | optax.Schedule | Mapping[str, float | optax.Schedule]
"""A fraction, a schedule of fractions, or one of them for each path."""


LAST_STEP = 2**31 - 1
"""Where schedules have come to their end."""


@wide
def at_step(sparsity: Sparsity, count: jax.typing.ArrayLike) -> Any:
    """The sparsity after ``count`` completed steps, or that of each path.

    Args:
        sparsity: A fraction, a schedule of fractions, or one of them for each path.
        count: Integer scalar. Schedules are evaluated in 64 bits, as exact as it is.

    Returns:
        A scalar, or one for each path.

    Example:
        >>> ramp = polynomial_ramp(0.8, begin=0, end=2, power=1)
        >>> {k: float(v) for k, v in at_step({"head/*": 0.5, "*": ramp}, 1).items()}
        {'head/*': 0.5, '*': 0.4}
    """
    count = jnp.asarray(count).astype(jnp.int64)

    def value(sparsity: Any) -> jax.Array:
        s = sparsity(count) if callable(sparsity) else sparsity
        return jnp.asarray(s).astype(jnp.float64)

    if isinstance(sparsity, Mapping):  # not by jax.tree.map, which sorts the paths
        return {path: value(s) for path, s in sparsity.items()}
    return value(sparsity)


@wide
def ramp_ends(sparsity: Sparsity, count: jax.Array) -> jax.Array:
    """Whether the sparsity, or that of a path, comes to its last value at a step.

    Example:
        >>> ramp = polynomial_ramp(0.8, begin=0, end=7)
        >>> [bool(ramp_ends(ramp, jnp.array(c))) for c in (6, 7, 8)]
        [False, True, False]
    """
    count = jnp.asarray(count).astype(jnp.int64)
    before, now, last = (
        jnp.stack(jax.tree.leaves(at_step(sparsity, c)))
        for c in (count - 1, count, LAST_STEP)
    )
    return jnp.any((now == last) & (before != last))


def polynomial_ramp(
    final: float, begin: int, end: int, power: float = 3
) -> optax.Schedule:
    r"""Sparsity that rises from 0 to ``final``, fast at first and slower and slower.

    After :math:`c` completed steps,

    .. math::
        s(c) = \text{final} \left(1 - \left(1 -
        \frac{c - \text{begin}}{\text{end} - \text{begin}}\right)^{\text{power}}\right)

    between ``begin`` and ``end``, 0 before and ``final`` after.

    Args:
        final: Sparsity at the end, a fraction in [0, 1].
        begin: Step up to which nothing is pruned.
        end: Step from which the sparsity is ``final``, after ``begin``.
        power: Exponent above 0; 3 in the published results, 2 in the authors' first
            description, 1 for a straight line.

    Returns:
        An Optax schedule: a function from step count to sparsity.

    Raises:
        ValueError: If ``final`` is not in [0, 1], ``end`` is not after ``begin``, a
            step is negative, or ``power`` is not above 0.
        TypeError: If an argument is not a number.

    Example:
        >>> ramp = polynomial_ramp(0.9, begin=100, end=300)
        >>> [round(float(ramp(step)), 4) for step in (0, 100, 200, 300, 1000)]
        [0.0, 0.0, 0.7875, 0.9, 0.9]

    References:
        Zhu and Gupta, arXiv:1710.01878, equation 1; arXiv:2212.01076, section 3.
    """
    check_fraction(final, "final sparsity")
    check_steps(begin, "begin", 0)
    check_steps(end, "end", 0)
    if end <= begin:
        raise ValueError(
            f"the ramp ends at step {end}, not after it begins at step {begin}; for a "
            "sparsity that is there at once, pass the number itself"
        )
    check_positive(power, "power")

    ramp = optax.polynomial_schedule(
        init_value=0.0,
        end_value=final,
        power=power,
        transition_steps=int(end) - int(begin),
        transition_begin=int(begin),
    )

    def sparsity(count: jax.typing.ArrayLike) -> jax.Array:
        # Compiled division can leave a remainder at the end, and its fractional power
        # may not be a number.
        return jnp.where(jnp.asarray(count) >= end, final, ramp(count))

    return sparsity
