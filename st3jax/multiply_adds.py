"""Multiply-adds of any model, counted in its traced computation.

Every convolution and matrix product of an activation with a kernel is found in the
jaxpr, whatever layers it was written with, and attributed to the parameter that the
kernel was made from.
"""

import collections
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from st3jax.traced.walk import find_uses
from st3jax.trees import named_leaves

__all__ = ["multiply_adds"]


def multiply_adds(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, int]:
    """How many multiply-adds one weight of each parameter takes part in.

    A layer with ``m`` of them per weight and ``k`` weights that are not zero costs
    ``m * k`` multiply-adds. For a dense layer, ``m`` is the number of rows that it is
    applied to; for a convolution, the number of output positions, those at a padded
    border included; for experts that inputs are sent to, the average, rounded down.
    Kernels that are joined for one product share it. Products of activations with one
    another (as in attention), of parameters with one another, and elementwise products
    are not counted.

    Args:
        fn: The model, a function of ``params`` and ``inputs``. It is traced, not run.
        params: Pytree of arrays or of abstract arrays (``jax.ShapeDtypeStruct``).
        *inputs: Example inputs, arrays or abstract arrays. Counts are for all examples
            in them: pass one for the cost of one.

    Returns:
        From path to count, for every parameter that is multiplied with an activation.
        It fits ``costs`` of :func:`st3jax.st3` and :func:`st3jax.prune`.

    Raises:
        ValueError: If a parameter is used in a loop whose number of turns depends on
            data, since it has no fixed cost.

    Example:
        >>> import jax
        >>> params = {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 8), "float32")}
        >>> images = jax.ShapeDtypeStruct((1, 32, 32, 4), "float32")
        >>> def model(params, images):
        ...     return jax.lax.conv_general_dilated(
        ...         images, params["kernel"], window_strides=(2, 2), padding="SAME",
        ...         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        >>> multiply_adds(model, params, images)
        {'kernel': 256}
    """
    uses = find_uses(fn, params, *inputs)
    endless = [use.path for use in uses if use.cost is None]
    if endless:
        raise ValueError(
            f"parameter '{min(endless)}' is used in a loop whose number of turns "
            "depends on data, so its multiply-adds cannot be counted"
        )
    totals: dict[str, Fraction] = collections.defaultdict(Fraction)
    for use in uses:
        totals[use.path] += use.cost or 0
    leaves = named_leaves(params)
    return {path: totals[path] // x.size for path, x in leaves.items() if totals[path]}
