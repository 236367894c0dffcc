"""Fewer nodes for the same numbers: BatchNorm into convolutions, means, softmax.

Every pattern is one of operators and constants; names and layers do not matter.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx

from shipping.onnx_graph import Graph

__all__ = ["fold"]

Node = onnx.NodeProto
PRODUCTS = {"Conv": (1, 0), "Gemm": (1, 1)}
"""Which axis of the result, and which of the weights, is that of the channels."""


def fold(graph: Graph, end: str) -> str:
    """Simplifies a graph in place.

    Args:
        graph: The graph.
        end: Name of its result.

    Returns:
        The name of its result.
    """
    for simplify in (
        _reshapes,
        _means,
        _layer_norms,
        _kept_axes,
        _softmax,
        _affine,
        _biases,
        _reshapes,
    ):
        simplify(graph, _Uses(graph, end))
        _drop_unused(graph, end)
    return end


class _Uses:
    """Who makes and who reads each array; it follows what is folded."""

    def __init__(self, graph: Graph, end: str):
        self.end = end
        self.makers = {node.output[0]: node for node in graph.nodes}
        self.readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, name: str) -> Node | None:
        """The one node that reads an array, if there is one and nobody else."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name != self.end else None

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that makes an array, if it is one of these."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in ops else None


def _drop_unused(graph: Graph, end: str) -> None:
    """Ends nodes and constants that nothing reads."""
    needed = {end}
    kept = []
    for node in reversed(graph.nodes):
        if node.output[0] in needed:
            needed.update(node.input)
            kept.append(node)
    graph.nodes[:] = reversed(kept)
    for name in graph.constants.keys() - needed:
        del graph.constants[name]
        graph.sources.pop(name, None)


def _means(graph: Graph, uses: _Uses) -> None:
    """A sum over axes, divided by how many there are, is a mean."""
    for node in graph.nodes:
        total = uses.maker(node.input[0], "ReduceSum")
        if (
            node.op_type != "Div"
            or total is None
            or node.input[1] not in graph.constants
        ):
            continue
        shape, axes = graph.shapes[total.input[0]], graph.constants[total.input[1]]
        sizes = [shape[axis] for axis in axes]
        divisor = graph.constants[node.input[1]]
        if any(isinstance(n, str) for n in sizes) or divisor.ndim:
            continue
        if divisor == np.prod(sizes) and uses.only_reader(total.output[0]):
            node.op_type = "ReduceMean"
            node.input[:] = total.input
            node.attribute.extend(total.attribute)


def _kept_axes(graph: Graph, uses: _Uses) -> None:
    """Axes that a reduction ends, and that come back with size 1, do not end."""
    for node in graph.nodes:
        ops = ("ReduceMean", "ReduceSum", "ReduceMax")
        reduction = uses.maker(node.input[0], *ops)
        if node.op_type != "Reshape" or reduction is None:
            continue
        shape = list(graph.shapes[reduction.input[0]])
        for axis in graph.constants[reduction.input[1]]:
            shape[axis] = 1
        if (
            tuple(shape) == graph.shapes[node.output[0]]
            and uses.only_reader(node.input[0]) is node
        ):
            node.op_type = reduction.op_type
            node.input[:] = reduction.input
            node.attribute.append(onnx.helper.make_attribute("keepdims", 1))


EXPONENTIAL = ("Exp", ("Sub", "x", ("ReduceMax", "x", "axes")))
SOFTMAX = ("Div", "exponential", ("ReduceSum", "exponential", "axes"))
VARIANCE = ("Sub", ("ReduceMean", ("Mul", "x", "x"), "axes"), ("Mul", "mean", "mean"))
DEVIATION = ("Sqrt", ("Add", ("Reshape", ("Relu", VARIANCE)), "epsilon"))
FACTOR = ("Mul", ("Reciprocal", DEVIATION), "scale")
LAYER_NORM = ("Add", ("Mul", ("Sub", "x", ("Reshape", "mean")), FACTOR), "bias")
"""Patterns: operators with their inputs, and names for arrays."""


def _matches(uses: _Uses, name: str, pattern: Any, found: dict[str, str]) -> bool:
    """Whether an array is made as a pattern says; ``found`` has the pattern's names."""
    if isinstance(pattern, str):
        return found.setdefault(pattern, name) == name
    op, *inputs = pattern
    node = uses.maker(name, op)
    return node is not None and all(
        _matches(uses, given, part, found)
        for given, part in zip(node.input, inputs, strict=False)
    )


def _softmax(graph: Graph, uses: _Uses) -> None:
    """exp(x - max x) divided by its sum."""
    for node in graph.nodes:
        found: dict[str, str] = {}
        if not _matches(uses, node.output[0], SOFTMAX, found):
            continue
        axes = graph.constants[found["axes"]]
        if _matches(uses, found["exponential"], EXPONENTIAL, found) and axes.size == 1:
            node.op_type = "Softmax"
            node.input[:] = [found["x"]]
            node.attribute.append(onnx.helper.make_attribute("axis", int(axes[0])))


def _layer_norms(graph: Graph, uses: _Uses) -> None:
    """(x - mean x) scale / sqrt(max(mean x^2 - (mean x)^2, 0) + epsilon) + bias."""
    for node in graph.nodes:
        found: dict[str, str] = {}
        if not (
            _matches(uses, node.output[0], LAYER_NORM, found)
            and _matches(uses, found["mean"], ("ReduceMean", "x", "axes"), found)
        ):
            continue
        shape = graph.shapes[found["x"]]
        names = [found[name] for name in ("axes", "epsilon", "scale", "bias")]
        if any(name not in graph.constants for name in names):
            continue
        axes, epsilon, *vectors = (graph.constants[name] for name in names)
        last = axes.tolist() == [len(shape) - 1]
        if last and all(x.shape[-1:] == (x.size,) for x in vectors):
            node.op_type = "LayerNormalization"
            flat = (
                graph.constant(x.reshape(-1), name)
                for name, x in zip(names[2:], vectors, strict=True)
            )
            node.input[:] = [found["x"], *flat]
            node.attribute.append(
                onnx.helper.make_attribute("epsilon", float(epsilon.reshape(())))
            )


class _Affine(NamedTuple):
    """x * scale + shift, in float64."""

    scale: np.ndarray
    shift: np.ndarray

    def then(self, op: str, constant: np.ndarray, constant_first: bool) -> "_Affine":
        """With another operator after it."""
        c = constant.astype(np.float64)
        if op == "Mul":
            return _Affine(self.scale * c, self.shift * c)
        if op == "Div":
            return _Affine(self.scale / c, self.shift / c)
        if op == "Add":
            return _Affine(self.scale, self.shift + c)
        sign = -1.0 if constant_first else 1.0
        return _Affine(sign * self.scale, sign * (self.shift - c))


def _affine(graph: Graph, uses: _Uses) -> None:
    """Sums and products with constants go into the product before, or are two."""
    done: set[str] = set()
    for node in list(graph.nodes):
        start = _input_of(graph, node)
        if start is None or node.output[0] in done:
            continue
        chain, affine = [node], _after(graph, node, _Affine(np.ones(()), np.zeros(())))
        while following := uses.only_reader(chain[-1].output[0]):
            if _input_of(graph, following) is None:
                break
            chain.append(following)
            affine = _after(graph, following, affine)
        done.update(each.output[0] for each in chain)
        product = uses.maker(start, *PRODUCTS)
        alone = uses.only_reader(start) is node
        if product is not None and alone and _into(graph, uses, product, affine):
            product.output[0] = chain[-1].output[0]
            for each in chain:
                graph.nodes.remove(each)
        elif len(chain) > 2:
            _as_two(graph, start, chain, affine)


def _input_of(graph: Graph, node: Node) -> str | None:
    """What a node adds a constant to or multiplies with one; ``None`` for others."""
    known = [name in graph.constants for name in node.input]
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or sum(known) != 1:
        return None
    name = node.input[known.index(False)]
    if node.op_type == "Div" and known[0]:
        return None
    array = graph.constants[node.input[known.index(True)]]
    floating = np.issubdtype(array.dtype, np.floating)
    same = graph.shapes[name] == graph.shapes[node.output[0]]  # nothing is repeated
    return name if floating and same else None


def _after(graph: Graph, node: Node, affine: _Affine) -> _Affine:
    first = node.input[0] in graph.constants
    constant = graph.constants[node.input[0 if first else 1]]
    return affine.then(node.op_type, constant, first)


def _into(graph: Graph, uses: _Uses, product: Node, affine: _Affine) -> bool:
    """Folds into weights and bias; not if one of their zeros would come or go."""
    axis, weight_axis = PRODUCTS[product.op_type]
    weights = graph.constants.get(product.input[1])
    shared = len(uses.readers[product.input[1]]) > 1
    if weights is None or shared or len(product.input) > 2:
        return False
    channels = weights.shape[weight_axis]
    along_channels = (1, channels)
    for array in affine:
        here = array.shape[axis] if array.ndim else 1
        if array.size != here or here not in along_channels:
            return False
    scale, shift = (np.broadcast_to(x.reshape(-1), channels) for x in affine)
    shape = [1] * weights.ndim
    shape[weight_axis] = channels
    folded = (weights * scale.reshape(shape)).astype(weights.dtype) + 0
    if not np.array_equal(folded == 0, weights == 0) or not np.isfinite(folded).all():
        return False
    graph.constants[product.input[1]] = folded
    bias = f"{_place(product)}/bias"
    product.input.append(graph.constant(shift.astype(weights.dtype), bias))
    return True


def _place(node: Node) -> str:
    """Where in the network a node is."""
    return node.name.rpartition("/")[0]


def _as_two(graph: Graph, start: str, chain: list[Node], affine: _Affine) -> None:
    """Three or more operators become one product and one sum."""
    first, last = chain[0], chain[-1]
    rank = len(graph.shapes[start])
    place = _place(first)
    dtype = graph.constants[
        next(name for name in first.input if name in graph.constants)
    ].dtype

    def constant(array: np.ndarray, name: str) -> str:
        shaped = array.reshape(array.shape or (1,) * rank)
        return graph.constant(shaped.astype(dtype), f"{place}/{name}")

    product, total = chain[-2], last
    product.op_type, total.op_type = "Mul", "Add"
    product.output[0] = graph.unique(f"{place}/folded")  # another array than before
    graph.shapes[product.output[0]] = graph.shapes[start]
    product.input[:] = [start, constant(affine.scale, "folded_scale")]
    total.input[:] = [product.output[0], constant(affine.shift, "folded_shift")]
    for each in chain[:-2]:
        graph.nodes.remove(each)


def _reshapes(graph: Graph, uses: _Uses) -> None:
    """Of two reshapes in a row the second is enough, and none if nothing changes."""
    for node in graph.nodes:
        if node.op_type != "Reshape":
            continue
        before = uses.maker(node.input[0], "Reshape")
        if before is not None:
            node.input[0] = before.input[0]
        name, result = node.input[0], node.output[0]
        if graph.shapes[name] == graph.shapes[result] and result != uses.end:
            for reader in uses.readers.get(result, ()):
                reader.input[:] = [name if x == result else x for x in reader.input]


def _biases(graph: Graph, uses: _Uses) -> None:
    """A bias comes before the columns of a product are split: engines fuse it there."""
    for node in graph.nodes:
        split = uses.maker(node.input[0], "Reshape")
        product = split and uses.maker(split.input[0], "MatMul")
        bias = graph.constants.get(node.input[-1])
        if node.op_type != "Add" or not split or not product or bias is None:
            continue
        *rows, columns = graph.shapes[product.output[0]]
        shape = graph.shapes[split.output[0]]
        columns_alone = bias.shape == (*[1] * len(rows), *shape[len(rows) :])
        if (
            columns_alone
            and bias.size == columns
            and list(shape[: len(rows)]) == rows
            and uses.only_reader(split.output[0]) is node
        ):
            target, total = split.input[1], graph.unique(f"{_place(product)}/sum")
            vector = graph.constant(bias.reshape(-1), node.input[1])
            split.op_type, node.op_type = "Add", "Reshape"
            split.input[:] = [product.output[0], vector]
            split.output[0], split.name = total, total
            graph.shapes[total] = graph.shapes[product.output[0]]
            node.input[:] = [total, target]
