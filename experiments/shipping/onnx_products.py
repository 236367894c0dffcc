"""Convolutions, matrix products and pooling, from JAX to ONNX."""

import math
from collections.abc import Sequence

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
        kernel_shape=[kernel_size for kernel_size in _window(kernel, axes.rhs_spec)],
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
    order = (0, last, *range(1, last))
    return graph.compute(
        "MaxPool",
        [graph.ordered(x, order)],
        shape_of(eqn.outvars[0].aval),
        order,
        kernel_shape=list(window[1:last]),
        strides=list(strides[1:last]),
        dilations=list(params["window_dilation"][1:last]),
        pads=_pads(params["padding"][1:last]),
    )


def product(graph: Graph, eqn: jex.JaxprEqn, a: Value, b: Value) -> Tensor:
    """A ``Gemm`` of matrices, or a ``MatMul`` of stacks of matrices.

    JAX has the axes of the result as those of the batch, the others of ``a``, the
    others of ``b``.
    """
    (ends_a, ends_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    shapes = tuple(shape_of(atom.aval) for atom in eqn.invars)
    free_a, free_b = (
        [axis for axis in range(len(shape)) if axis not in (*ends, *batch)]
        for shape, ends, batch in zip(
            shapes, (ends_a, ends_b), (batch_a, batch_b), strict=True
        )
    )
    shape = shape_of(eqn.outvars[0].aval)
    stacked, rows, columns = len(batch_a), len(free_a), len(free_b)
    order = list(range(len(shape)))
    if isinstance(a, Known) and not stacked:  # weights are on the right
        a, b, ends_a, ends_b, free_a, free_b = b, a, ends_b, ends_a, free_b, free_a
        shapes = shapes[1], shapes[0]
        order = [*order[rows:], *order[:rows]]
        rows, columns = columns, rows
    batch_shape = tuple(shapes[0][axis] for axis in batch_a)
    keeps = not stacked and isinstance(b, Known) and rows > 0
    left = _matrices(graph, a, shapes[0], batch_a, free_a, ends_a, whole_rows=keeps)
    right = _matrices(graph, b, shapes[1], batch_b, ends_b, free_b)
    there = tuple(shape[axis] for axis in order)
    row_shape = there[stacked : stacked + rows]
    column_shape = there[stacked + rows :]
    flat_rows = row_shape if keeps else (_size(row_shape),)
    flat = (*batch_shape, *flat_rows, _size(column_shape))
    gemm = keeps and len(flat) == 2
    name = graph.node("Gemm" if gemm else "MatMul", [left, right], flat)
    if flat != there:
        name = graph.reshape(name, there)
    return Tensor(name, shape, tuple(order))


def _matrices(
    graph: Graph,
    value: Value,
    shape: Shape,
    batch: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
    whole_rows: bool = False,
) -> str:
    """The value as a stack of matrices: these axes of a batch, of rows, of columns.

    Args:
        graph: The graph.
        value: What to write.
        shape: Its shape, as JAX has it.
        batch: Axes of the stack.
        rows: Axes of the rows.
        columns: Axes of the columns.
        whole_rows: Whether to leave the axes of the rows as they are.
    """
    order = (*batch, *rows, *columns)
    row_shape = tuple(shape[axis] for axis in rows)
    flat = (
        *(shape[axis] for axis in batch),
        *(row_shape if whole_rows else (_size(row_shape),)),
        _size(tuple(shape[axis] for axis in columns)),
    )
    if isinstance(value, Known):
        array = value.array.transpose(order).reshape([int(n) for n in flat])
        value = value._replace(array=array)
        return graph.ordered(value, range(array.ndim))
    name = graph.ordered(value, order)
    there = tuple(shape[axis] for axis in order)
    return name if there == flat else graph.reshape(name, flat)


def _size(shape: Shape) -> int | str:
    """How many there are; a text if that depends on the batch."""
    known = math.prod(n for n in shape if not isinstance(n, str))
    unknown = [n for n in shape if isinstance(n, str)]
    return "*".join([*unknown, str(known)]) if unknown else known
