"""What Flax NNX's own modules say of their kernels' axes."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

__all__ = ["module_layouts"]


def module_layouts(model: Any) -> dict[str, str]:
    """From the path of each kernel of a known module to its layout.

    Modules know how many axes their kernel has; more of them, as of modules made under
    ``nnx.vmap``, are stacked.

    Example:
        >>> module_layouts(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
        {'kernel': 'wwio'}
    """
    found = {}
    for path, module in nnx.iter_graph(model):
        kernel = getattr(module, "kernel", None)
        own = _of_module(module)
        if own is not None and isinstance(kernel, nnx.Variable):
            name = "/".join(map(str, (*path, "kernel")))
            found[name] = _with_stacks(own, kernel[...].shape)
    return found


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


def _with_stacks(own: tuple[str, tuple[int, ...]], shape: tuple[int, ...]) -> str:
    """The layout of a kernel with more axes than one has: the first that fits."""
    letters, alone = own
    outermost = "s" * (len(shape) - len(letters)) + letters
    return next(_fitting(letters, alone, shape), outermost)


def _fitting(
    letters: str, alone: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[str]:
    """All ways to take axes of a shape for stacked ones, outer ones first."""
    if len(shape) == len(letters):
        yield from [letters] * (alone == shape)
    elif len(shape) > len(letters):
        yield from ("s" + rest for rest in _fitting(letters, alone, shape[1:]))
        if letters and alone[0] == shape[0]:
            rest = _fitting(letters[1:], alone[1:], shape[1:])
            yield from (letters[0] + one for one in rest)
