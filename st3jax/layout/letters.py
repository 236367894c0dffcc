"""Layouts: what each axis of a kernel is, one letter for each.

The method is defined on one matrix or one convolution at a time, and an array may hold
many, or hold one with its axes split or in another order. The letters say which:

- ``s``, stacked: kernels that are independent of each other, such as scanned layers or
  experts;
- ``w``, the window of a convolution;
- ``i``, input channels, which a product sums over; several such axes are one;
- ``o``, output channels, likewise.

So a dense kernel is ``io``, a convolution's ``wwio``, scanned dense kernels ``sio``, an
attention's query ``ioo`` and its output ``iio``, and an ``(out, in)`` weight ``oi``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from st3jax.selection.ranking import whole

__all__ = [
    "Layouts",
    "broadcast",
    "each_kernel",
    "from_kernels",
    "kernel_order",
    "kernel_shape",
    "stack_shape",
    "to_kernels",
]

Layouts = Mapping[str, str]
"""From the path of a leaf to its layout."""


def _sizes(layout: str, shape: tuple[int, ...], letter: str) -> tuple[int, ...]:
    pairs = zip(layout, shape, strict=True)
    return tuple(size for own, size in pairs if own == letter)


def stack_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the stacked axes: how many kernels an array holds.

    Example:
        >>> stack_shape("sio", (6, 64, 256)), stack_shape("io", (64, 256))
        ((6,), ())
    """
    return _sizes(layout, shape, "s")


def kernel_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one kernel: its window, all input channels, all output channels.

    Args:
        layout: A letter for each axis.
        shape: Shape of the array.

    Returns:
        Sizes of the window's axes, then one number each for inputs and outputs, if
        there are such axes.

    Example:
        >>> kernel_shape("ioo", (768, 12, 64)), kernel_shape("sio", (6, 64, 256))
        ((768, 768), (64, 256))
        >>> kernel_shape("oiww", (128, 64, 3, 3))
        (3, 3, 64, 128)
    """
    channels = [letter for letter in "io" if letter in layout]
    joined = tuple(math.prod(_sizes(layout, shape, letter)) for letter in channels)
    return _sizes(layout, shape, "w") + joined


def kernel_order(layout: str) -> list[int]:
    """The axes in the order of a kernel: stacked, window, inputs, outputs.

    Example:
        >>> kernel_order("oiww")
        [2, 3, 1, 0]
    """
    return sorted(range(len(layout)), key=lambda axis: "swio".index(layout[axis]))


def to_kernels(x: jax.Array, layout: str) -> jax.Array:
    """The array as kernels: stacked axes, window, one input axis, one output axis.

    Example:
        >>> to_kernels(jax.numpy.zeros((12, 64, 768)), "iio").shape
        (768, 768)
    """
    shape = stack_shape(layout, x.shape) + kernel_shape(layout, x.shape)
    if kernel_order(layout) == list(range(x.ndim)) and shape == x.shape:
        return x
    return whole(x).transpose(kernel_order(layout)).reshape(shape)


def from_kernels(x: jax.Array, layout: str, like: jax.Array) -> jax.Array:
    """The other way: kernels as an array of the shape of another.

    Example:
        >>> like = jax.numpy.zeros((12, 64, 768))
        >>> from_kernels(to_kernels(like, "iio"), "iio", like).shape
        (12, 64, 768)
    """
    order = kernel_order(layout)
    if order == list(range(like.ndim)) and x.shape == like.shape:
        return _placed_as(x, like)
    split = x.reshape([like.shape[axis] for axis in order])
    found = split.transpose([order.index(axis) for axis in range(len(order))])
    return _placed_as(found, like)


def _placed_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array on the devices of another, where that is part of its type."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = jax.typeof(like).sharding.spec
    return jax.sharding.reshard(x, spec) if mesh.explicit_axes else x


def each_kernel(fn: Callable[..., Any], layout: str) -> Callable[..., Any]:
    """A function of one kernel, mapped over stacked ones, whose axes come first.

    Example:
        >>> each_kernel(jax.numpy.sum, "sio")(jax.numpy.ones((6, 2, 3))).shape
        (6,)
    """
    for _ in range(layout.count("s")):
        fn = jax.vmap(fn)
    return fn


def broadcast(values: jax.Array, layout: str) -> jax.Array:
    """A value for each kernel, with axes of one that make it fit all their weights.

    Args:
        values: Scalar, or an array of :func:`stack_shape`.
        layout: A letter for each axis.

    Returns:
        Array that broadcasts to the weights.

    Example:
        >>> broadcast(jax.numpy.zeros(6), "isoo").shape
        (1, 6, 1, 1)
    """
    if not values.ndim:
        return values
    sizes = iter(values.shape)
    return values.reshape([next(sizes) if letter == "s" else 1 for letter in layout])
