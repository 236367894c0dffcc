"""Convolutions, matrix products and pooling, from JAX to ONNX."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.extend.core as jex

from shipping.onnx_graph import Graph, Known, Shape, Tensor, Value, shape_of

__all__ = ["convolution", "max_pool", "product"]


def convolution(graph: Graph, eqn: jex.JaxprEqn, x: Value, kernel: Value) -> Tensor:
    """A ``Conv``: any strides, pads, dilation of the kernel and groups."""
    params = eqn.params
    if any(n != 1 for n in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise NotImplementedError("a transposed convolution")
    axes = params["dimension_numbers"]
    shape = shape_of(eqn.outvars[0].aval)
    inputs = [graph.ordered(x, axes.lhs_spec), graph.ordered(kernel, axes.rhs_spec)]
    return graph.compute(
        "Conv",
        inputs,
        shape,
        axes.out_spec,
        strides=list(params["window_strides"]),
        pads=_pads(params["padding"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        kernel_shape=_window(kernel, axes.rhs_spec),
    )


def _window(kernel: Value, order: Sequence[int]) -> list[int]:
    shape = kernel.array.shape if isinstance(kernel, Known) else kernel.shape
    return [int(shape[axis]) for axis in order[2:]]


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """All at the beginnings, then all at the ends."""
    pads = [int(low) for low, _ in padding] + [int(high) for _, high in padding]
    if min(pads) < 0:
        raise NotImplementedError("negative padding")
    return pads


def max_pool(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    """A ``MaxPool``, channels last in JAX; what is padded is never the largest."""
    params = eqn.params
    window, strides = params["window_dimensions"], params["window_strides"]
    last = len(window) - 1
    dilated = (*params["base_dilation"], params["window_dilation"][0])
    if (window[0], window[last]) != (1, 1) or any(n != 1 for n in dilated):
        raise NotImplementedError("pooling over images, channels or gaps")
    pads = _pads(params["padding"][1:last])
    if any(pad >= n for pad, n in zip(pads, 2 * window[1:last], strict=True)):
        raise NotImplementedError("pooling of padding alone")
    order = (0, last, *range(1, last))
    return graph.compute(
        "MaxPool",
        [graph.ordered(x, order)],
        shape_of(eqn.outvars[0].aval),
        order,
        kernel_shape=list(window[1:last]),
        strides=list(strides[1:last]),
        dilations=list(params["window_dilation"][1:last]),
        pads=pads,
    )


class _Factor(NamedTuple):
    """One side of a product: a value, and what each of its axes is.

    Attributes:
        value: What it is.
        shape: As JAX has it.
        batch: Axes that number matrices.
        ends: Axes that the product sums over.
        free: The others.
    """

    value: Value
    shape: Shape
    batch: list[int]
    ends: list[int]
    free: list[int]

    def sizes(self, axes: Sequence[int]) -> Shape:
        """The sizes of axes."""
        return tuple(self.shape[axis] for axis in axes)

    def moves(self, *order: int) -> bool:
        """Whether its axes are in another order."""
        if isinstance(self.value, Known):
            return False
        return [axis for axis in self.value.order if self.shape[axis] != 1] != [
            axis for axis in order if self.shape[axis] != 1
        ]


def product(graph: Graph, eqn: jex.JaxprEqn, a: Value, b: Value) -> Tensor:
    """A ``Gemm`` of matrices, or a ``MatMul`` of stacks of matrices.

    JAX has the axes of the result as those of the batch, the others of ``a``, the
    others of ``b``. Here the factors change sides where that saves a transposition, and
    weights are on the right.
    """
    ends, batches = eqn.params["dimension_numbers"]
    left, right = (
        _factor(value, shape_of(atom.aval), batch, end)
        for value, atom, batch, end in zip(
            (a, b), eqn.invars, batches, ends, strict=True
        )
    )
    shape = shape_of(eqn.outvars[0].aval)
    stacked, rows = len(left.batch), len(left.free)
    order = list(range(len(shape)))
    if _price(right, left) < _price(left, right):
        left, right = right, left
        first, second = order[stacked : stacked + rows], order[stacked + rows :]
        order = [*order[:stacked], *second, *first]
    keeps = not stacked and isinstance(right.value, Known)  # the axes of the rows
    row_shape, column_shape = left.sizes(left.free), right.sizes(right.free)
    flat = (
        *left.sizes(left.batch),
        *(row_shape if keeps else (_size(row_shape),)),
        _size(column_shape),
    )
    depth = _size(left.sizes(left.ends))
    inputs = [
        _laid_out(graph, left, left.free, left.ends, (*flat[:-1], depth)),
        _laid_out(
            graph, right, right.ends, right.free, (*flat[:stacked], depth, flat[-1])
        ),
    ]
    op = "Gemm" if keeps and len(flat) == 2 else "MatMul"
    name = graph.reshape(graph.node(op, inputs, flat), tuple(shape[n] for n in order))
    return Tensor(name, shape, tuple(order))


def _factor(
    value: Value, shape: Shape, batch: Sequence[int], ends: Sequence[int]
) -> _Factor:
    free = [axis for axis in range(len(shape)) if axis not in (*batch, *ends)]
    return _Factor(value, shape, list(batch), list(ends), free)


def _price(left: _Factor, right: _Factor) -> int:
    """Transpositions of a product with these sides; weights on the left cost more."""
    return (
        left.moves(*left.batch, *left.free, *left.ends)
        + right.moves(*right.batch, *right.ends, *right.free)
        + 3 * isinstance(left.value, Known)
    )


def _laid_out(
    graph: Graph, factor: _Factor, rows: list[int], columns: list[int], flat: Shape
) -> str:
    """The factor as a stack of matrices with these axes."""
    order = [*factor.batch, *rows, *columns]
    value = factor.value
    if isinstance(value, Known):
        array = value.array.transpose(order).reshape([int(n) for n in flat])
        return graph.ordered(value._replace(array=array), range(array.ndim))
    kept = [axis for axis, n in enumerate(factor.shape) if n != 1]
    value = graph.reshaped(value, factor.sizes(kept))
    name = graph.ordered(value, [kept.index(axis) for axis in order if axis in kept])
    return graph.reshape(name, flat)


def _size(shape: Shape) -> int | str:
    """How many there are; a text if that depends on the batch."""
    known = math.prod(n for n in shape if not isinstance(n, str))
    unknown = [n for n in shape if isinstance(n, str)]
    if not unknown:
        return known
    return "*".join(unknown if known == 1 else [*unknown, str(known)])
