"""64-bit mode for the few scalars that need it, whatever mode JAX runs in.

A sparsity times a number of weights has to be exact to one weight, which float32 is not
above 2**24 of them. So the scalars that decide about positions have 64 bits: steps,
sparsities, counts. Arrays of weights never do for this reason.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

__all__ = ["wide"]

P = ParamSpec("P")
R = TypeVar("R")


def wide(fn: Callable[P, R]) -> Callable[P, R]:
    """The function, computed in 64-bit mode.

    What it returns stays of 64 bits where it was, so it is for functions whose results
    go to functions of this kind, or are made narrow by them.

    Args:
        fn: A function of scalars.

    Returns:
        The same function.

    Example:
        >>> wide(lambda: jax.numpy.asarray(0.9).dtype.name)()
        'float64'
    """

    @functools.wraps(fn)
    def in_64_bits(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(True):
            return fn(*args, **kwargs)

    return in_64_bits
