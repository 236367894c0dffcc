"""What Flax NNX's own modules say of their kernels' axes."""

import itertools
from collections.abc import Iterator
from typing import Any

from flax import nnx

__all__ = ["module_layouts"]


def module_layouts(model: Any) -> dict[str, str]:
    """From the path of each kernel of a known module to its layout.

    Modules know how many axes their kernel has; more of them, as of modules made under
    ``nnx.vmap``, are stacked. Where several axes could be, it is the one that is so in
    other kernels of the model.

    Raises:
        ValueError: If nothing tells which axis of a kernel is the stacked one.

    Example:
        >>> module_layouts(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
        {'kernel': 'wwio'}
    """
    possible = dict(_possible(model))
    clear = [each for each in possible.values() if len(each) == 1]
    places = {place for each in clear for place in each.values() if place}
    return {path: _chosen(path, each, places) for path, each in possible.items()}


def _possible(model: Any) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """The layouts that each kernel may have, with the places of its stacked axes."""
    for path, module in nnx.iter_graph(model):
        kernel = getattr(module, "kernel", None)
        own = _of_module(module)
        if own is not None and isinstance(kernel, nnx.Variable):
            name = "/".join(map(str, (*path, "kernel")))
            yield name, _stacked(own, kernel[...].shape)


def _chosen(
    path: str, possible: dict[str, tuple[int, ...]], places: set[tuple[int, ...]]
) -> str:
    """The one layout that a kernel can have where others are stacked."""
    fitting = [letters for letters, place in possible.items() if place in places]
    if len(possible) > 1 and len(fitting) != 1:
        raise ValueError(
            f"which axes of '{path}' are stacked is not clear, as they have one size "
            f"(it may be {' or '.join(map(repr, possible))}; s: stacked kernels): "
            "trace the model with st3jax.layouts(lambda model, x: model(x), model, x), "
            "or give all layouts by hand"
        )
    return fitting[0] if len(possible) > 1 else next(iter(possible))


def _of_module(module: Any) -> tuple[str, tuple[int, ...]] | None:
    """The layout and the shape of one kernel of a module, if it is a known one."""
    match module:
        case nnx.Linear():
            return "io", (module.in_features, module.out_features)
        case nnx.LinearGeneral():
            batch = tuple(module.batch_axis.values())
            inputs, outputs = map(tuple, (module.in_features, module.out_features))
            letters = "s" * len(batch) + "i" * len(inputs) + "o" * len(outputs)
            return letters, batch + inputs + outputs
        case nnx.Einsum():
            return _of_einsum(module.einsum_str), tuple(module.kernel_shape)
        case nnx.Conv() | nnx.ConvTranspose():
            shape = tuple(module.kernel_shape)
            swapped = getattr(module, "transpose_kernel", False)
            return "w" * (len(shape) - 2) + ("oi" if swapped else "io"), shape
    return None


def _of_einsum(equation: str) -> str:
    """Of the second operand: what it shares with the first, the result, or both."""
    operands, result = equation.replace(" ", "").replace("...", "").split("->")
    first, kernel = operands.split(",")
    both = {axis for axis in kernel if axis in first and axis in result}
    return "".join(
        "s" if axis in both else "o" if axis in result else "i" for axis in kernel
    )


def _stacked(
    own: tuple[str, tuple[int, ...]], shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """All layouts of a kernel with more axes than one has, and its stacked places."""
    letters, alone = own
    more = len(shape) - len(letters)
    found: dict[str, tuple[int, ...]] = {}
    for places in itertools.combinations(range(len(shape)), max(more, 0)):
        rest = [size for axis, size in enumerate(shape) if axis not in places]
        if tuple(rest) == alone:
            axes = iter(letters)
            each = ("s" if i in places else next(axes) for i in range(len(shape)))
            found.setdefault("".join(each), places)
    return found or {"s" * more + letters: tuple(range(more))}
