"""The role of every axis of every parameter, read off the traced computation."""

from collections.abc import Callable
from typing import Any

from st3jax.traced.walk import find_uses

__all__ = ["read_axes"]


def read_axes(
    fn: Callable[..., Any], params: Any, *inputs: Any
) -> dict[str, list[str]]:
    """What each axis of each parameter is in the products that it takes part in.

    One letter for each axis: ``s`` stacked, that is sliced by a scan, indexed or a
    batch of products; ``w`` the window of a convolution; ``i`` contracted with the
    input; ``o`` an axis of the output; ``?`` one that nothing is known about, or that
    is several of these at once.

    Args:
        fn: The model, a function of ``params`` and ``inputs``. It is traced, not run.
        params: Pytree of arrays or of abstract arrays (``jax.ShapeDtypeStruct``).
        *inputs: Example inputs, arrays or abstract arrays.

    Returns:
        From path to the different readings, sorted, for every parameter that is
        multiplied with an activation.

    Example:
        >>> import jax
        >>> params = {"layers": jax.ShapeDtypeStruct((6, 4, 4), "float32")}
        >>> x = jax.ShapeDtypeStruct((5, 4), "float32")
        >>> def model(params, x):
        ...     return jax.lax.scan(
        ...         lambda x, kernel: (x @ kernel, None), x, params["layers"])[0]
        >>> read_axes(model, params, x)
        {'layers': ['sio']}
    """
    readings: dict[str, set[str]] = {}
    for use in find_uses(fn, params, *inputs):
        readings.setdefault(use.path, set()).add(use.axes)
    return {path: sorted(found) for path, found in sorted(readings.items())}
