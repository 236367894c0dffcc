"""Layouts of any model's kernels, read off its traced computation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from st3jax.layout.letters import Layouts
from st3jax.layout.names import is_layer
from st3jax.layout.settle import check_layout, named_readings, said_of
from st3jax.traced import read_axes
from st3jax.trees import Prunable, is_kernel, named_leaves, prunable_leaves

__all__ = ["layouts"]


def layouts(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
) -> dict[str, str]:
    """What each axis of each kernel is, as the model uses it.

    The axes that a product sums over are inputs, the free ones outputs; batches of
    products, axes that a scan goes over and axes that are indexed stack kernels; a
    convolution names its own. Kernels are followed through casts, transposes, reshapes,
    joins and slices, into ``jit``, ``remat``, ``scan``, ``while``, ``cond`` and
    ``shard_map``, whatever they were written with: Flax, Equinox, Haiku, Keras, or no
    library.

    Args:
        fn: The model, a function of ``params`` and ``inputs``. It is traced, not run.
        params: Pytree of arrays or of abstract arrays, as the optimizer sees it.
        *inputs: Example inputs, arrays or abstract arrays.
        prunable: Predicate on (path, leaf): whose layouts have to be told.
        layout: Those that you know better, by path, where ``*`` stands for any text;
            needed for a leaf that is used in two ways.

    Returns:
        From path to a letter for each axis: ``s`` stacked kernels, ``w`` window of a
        convolution, ``i`` inputs, ``o`` outputs. It is what ``layout`` of
        :func:`st3jax.st3` and :func:`st3jax.prune` takes.

    Raises:
        ValueError: If a prunable leaf is used in two ways, or in one that cannot be
            told, and ``layout`` does not say.

    Example:
        >>> import jax
        >>> params = {"query": jax.ShapeDtypeStruct((64, 4, 16), "float32")}
        >>> tokens = jax.ShapeDtypeStruct((1, 7, 64), "float32")
        >>> def model(params, tokens):
        ...     return jnp.einsum("btd,dhk->bthk", tokens, params["query"])
        >>> layouts(model, params, tokens, prunable=lambda path, leaf: True)
        {'query': 'ioo'}
    """
    check_layout(layout)
    read = read_axes(fn, params, *inputs)
    leaves = prunable_leaves(params, prunable)
    named, found = named_readings(leaves, params), {}
    for path in named_leaves(params):
        said, readings = said_of(path, layout), read.get(path, [])
        if said is not None:
            found[path] = said
        elif _is_told(readings):
            found[path] = readings[0]
        elif path in leaves:
            shape = jnp.shape(leaves[path])
            found[path] = _by_name(path, shape, named[path], readings)
    return found


def _is_told(readings: list[str]) -> bool:
    return len(readings) == 1 and "?" not in readings[0]


def _by_name(
    path: str, shape: tuple[int, ...], possible: tuple[str, ...], readings: list[str]
) -> str:
    """What Flax's names say of a leaf that the computation says nothing of."""
    if not readings and len(possible) == 1 and is_layer(path):
        return possible[0]
    ways = " and ".join(repr(letters) for letters in readings)
    what = (
        f"is used in {len(readings)} ways, as {ways}"
        if len(readings) > 1
        else f"is used as {ways}, where ? is an axis that cannot be told"
        if readings
        else "takes part in no product that can be told"
    )
    raise ValueError(
        f"'{path}' of shape {shape} {what}: say what its axes are with layout="
        f"{{'{path}': '{possible[0]}'}}, a letter for each (s: stacked kernels, w: "
        "window, i: inputs, o: outputs), or leave it out with prunable=..."
    )
