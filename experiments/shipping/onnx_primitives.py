"""What each primitive of JAX is in ONNX: a function for each, in one table.

A function takes the graph, the equation and its inputs, of which at least one is a
:class:`Tensor`, and gives the one result. ``onnx_products.py`` has convolutions, matrix
products and pooling.
"""

from collections.abc import Callable
from typing import Any

import jax.extend.core as jex
import numpy as np
import onnx

from shipping.onnx_graph import Graph, Known, Shape, Tensor, Value, shape_of
from shipping.onnx_products import convolution, max_pool, product

__all__ = ["PRIMITIVES", "Rule"]

Rule = Callable[..., Tensor]


def _shape(eqn: jex.JaxprEqn) -> Shape:
    return shape_of(eqn.outvars[0].aval)


def _dtype(atom: Any) -> np.dtype:
    return np.dtype(atom.aval.dtype)


def _elementwise(op: str) -> Rule:
    """An operator that has a number for each number, or pair of numbers."""

    def rule(graph: Graph, eqn: jex.JaxprEqn, *given: Value) -> Tensor:
        shape = _shape(eqn)
        tensors = [x for x in given if isinstance(x, Tensor)]
        whole = [x for x in tensors if x.shape == shape]
        order = (whole or tensors)[0].order  # of those that are not broadcast
        names = [graph.ordered(x, order) for x in given]
        return graph.compute(op, names, shape, order)

    return rule


def _maximum(graph: Graph, eqn: jex.JaxprEqn, *given: Value) -> Tensor:
    """With 0 it is a ReLU, with minus infinity nothing."""
    known = next((x.array for x in given if isinstance(x, Known)), None)
    x = next(x for x in given if isinstance(x, Tensor))
    if known is not None and x.shape == _shape(eqn):
        if (known == -np.inf).all():
            return x
        if (known == 0).all():
            return _elementwise("Relu")(graph, eqn, x)
    return _elementwise("Max")(graph, eqn, *given)


def _same(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    del graph, eqn
    return x


def _square(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    return _elementwise("Mul")(graph, eqn, x, x)


def _rsqrt(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    root = _elementwise("Sqrt")(graph, eqn, x)
    return _elementwise("Reciprocal")(graph, eqn, root)


def _integer_pow(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    power = eqn.params["y"]
    if power == 2:
        return _square(graph, eqn, x)
    exponent = Known(np.array(power, _dtype(eqn.outvars[0])))
    return _elementwise("Pow")(graph, eqn, x, exponent)


def _convert(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    before, after = _dtype(eqn.invars[0]), _dtype(eqn.outvars[0])
    if before == after:
        return x
    kind = onnx.helper.np_dtype_to_tensor_dtype(after)
    return graph.compute("Cast", [x.name], x.shape, x.order, to=kind)


def _reduce(op: str) -> Rule:
    """An operator over some axes, which end."""

    def rule(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
        ended = [int(axis) for axis in eqn.params["axes"]]
        left = [axis for axis in range(len(x.shape)) if axis not in ended]
        order = [left.index(axis) for axis in x.order if axis in left]
        axes = graph.integers(sorted(x.order.index(axis) for axis in ended))
        return graph.compute(op, [x.name, axes], _shape(eqn), order, keepdims=0)

    return rule


def _transpose(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    """No node: only the order is another."""
    del graph
    moved = list(eqn.params["permutation"])
    return Tensor(x.name, _shape(eqn), tuple(moved.index(axis) for axis in x.order))


def _reshape(graph: Graph, eqn: jex.JaxprEqn, x: Tensor) -> Tensor:
    return graph.reshaped(x, _shape(eqn))


def _broadcast(graph: Graph, eqn: jex.JaxprEqn, x: Tensor, *sizes: Value) -> Tensor:
    """New axes, of size 1 or larger."""
    del sizes  # the batch's, which the equation knows
    shape, dimensions = _shape(eqn), list(map(int, eqn.params["broadcast_dimensions"]))
    kept = tuple(
        x.shape[dimensions.index(axis)] if axis in dimensions else 1
        for axis in range(len(shape))
    )
    x = graph.reshaped(x, kept)
    if kept == shape:
        return x
    if any(isinstance(n, str) and n != k for n, k in zip(shape, kept, strict=True)):
        raise NotImplementedError("an array repeated for each image of the batch")
    sizes_there = (1 if isinstance(shape[a], str) else shape[a] for a in x.order)
    to = graph.integers(int(n) for n in sizes_there)
    return graph.compute("Expand", [x.name, to], shape, x.order)


PRIMITIVES: dict[str, Any] = {
    "abs": _elementwise("Abs"),
    "add": _elementwise("Add"),
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": convolution,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "div": _elementwise("Div"),
    "dot_general": product,
    "erf": _elementwise("Erf"),
    "exp": _elementwise("Exp"),
    "integer_pow": _integer_pow,
    "log": _elementwise("Log"),
    "logistic": _elementwise("Sigmoid"),
    "max": _maximum,
    "min": _elementwise("Min"),
    "mul": _elementwise("Mul"),
    "neg": _elementwise("Neg"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": max_pool,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "sqrt": _elementwise("Sqrt"),
    "square": _square,
    "squeeze": _reshape,
    "stop_gradient": _same,
    "sub": _elementwise("Sub"),
    "tanh": _elementwise("Tanh"),
    "transpose": _transpose,
}
"""From the name of a primitive to what writes it."""
