"""A smaller dense network that computes the same: channels that do nothing go.

A channel goes if no weight reads it. One that is the same for every image, such as one
without weights behind a ReLU, is first added to the biases of those that read it,
where that is exact. Channels that are tied, as by a residual sum, go together or stay.
Nothing is known here of layers and their names: what counts is the graph.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx

from shipping.channels import Trace, trace
from shipping.constants import ELEMENTWISE, NORM, operand_axis
from shipping.kernels import kernel_of
from shipping.onnx_edits import Graph

__all__ = ["Compacted", "Layer", "Size", "compact"]


class Size(NamedTuple):
    """How large a layer is.

    Attributes:
        inputs: Channels that it reads.
        outputs: Channels that it makes.
        weights: Of its kernel.
        multiply_adds: For one image.
    """

    inputs: int = 0
    outputs: int = 0
    weights: int = 0
    multiply_adds: int = 0


class Layer(NamedTuple):
    """A convolution or a product with a kernel, before and after.

    Attributes:
        name: Of what it makes, in the graph.
        before: Its size in the network that was given.
        after: Its size in the smaller one, all zeros if it is gone.
    """

    name: str
    before: Size
    after: Size


class Compacted(NamedTuple):
    """A smaller network, and what became of its layers.

    Attributes:
        model: The network.
        layers: In the order that they are computed in.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> tuple[int, int]:
        """Weights of all kernels, before and after."""
        return (
            sum(layer.before.weights for layer in self.layers),
            sum(layer.after.weights for layer in self.layers),
        )

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Multiply-adds for one image, before and after, zeros included."""
        return (
            sum(layer.before.multiply_adds for layer in self.layers),
            sum(layer.after.multiply_adds for layer in self.layers),
        )


def compact(model: onnx.ModelProto, multiple: int = 4) -> Compacted:
    """Removes the channels that do nothing, until none is left.

    Args:
        model: A network with its BatchNorms folded, whose kernels are float32; others
            stay as they are. It is not changed.
        multiple: Numbers of channels are rounded up to a multiple of it, by channels
            that do nothing. Engines compute several channels at once, and ONNX Runtime
            is slower with 46 of them than with 48: its fast convolutions take
            multiples of 4. With 1, everything goes that can.

    Returns:
        The smaller network, which passes ``onnx.checker``, and the sizes of its layers.
        Each layer keeps a channel or more. A branch that is the same for every image
        becomes an array.

    Example:
        >>> from onnx import parser
        >>> model = parser.parse_model('''
        ...     <ir_version: 8, opset_import: ["": 17]>
        ...     mlp (float[n, 2] x) => (float[n, 1] y)
        ...     <float[2, 3] up = {1, 0, 2, 3, 0, 4}, float[3] b = {0, 5, 0},
        ...      float[3, 1] down = {1, 2, 0}, float[1] c = {0}>
        ...     { h = Gemm(x, up, b)  a = Relu(h)  y = Gemm(a, down, c) }
        ... ''')
        >>> compacted = compact(model, multiple=1)
        >>> compacted.weights
        (9, 3)
        >>> [layer.after.outputs for layer in compacted.layers]
        [1, 1]
    """
    graph = Graph(model)
    before = _sizes(graph)
    while _shrink(graph, multiple):
        graph.drop_unused()
    after = _sizes(graph)
    smaller = graph.to_model()
    onnx.checker.check_model(smaller, full_check=True)
    layers = [Layer(k, size, after.get(k, Size())) for k, size in before.items()]
    return Compacted(smaller, tuple(layers))


def _sizes(graph: Graph) -> dict[str, Size]:
    """The size of each kernel, by the name of what it makes."""
    shapes, sizes = graph.shapes(), {}
    for node in graph.nodes:
        kernel = kernel_of(graph, shapes, node)
        if kernel is not None:
            outputs, inputs, _ = kernel.weights.shape
            places = math.prod(shapes[node.output[0]]) // outputs
            images = shapes[node.input[0]][0]
            sizes[node.output[0]] = Size(
                inputs * kernel.groups,
                outputs,
                kernel.weights.size,
                kernel.weights.size * places // images,
            )
    return sizes


def _shrink(graph: Graph, multiple: int) -> bool:
    """Removes what can be seen at once; whether there was anything."""
    found = trace(graph)
    if _replace_constants(found):
        return True
    keep = _kept(found, multiple)
    if all(kept.all() for kept in keep.values()):
        return False
    for node in graph.nodes:
        _cut(found, node, keep)
    return True


def _replace_constants(found: Trace) -> bool:
    """Puts arrays in the place of operands that are the same for every image."""
    graph, replaced = found.graph, False
    for node in list(graph.nodes):
        for i in range(2) if _is_pair(found, node) else ():
            name, other = node.input[i], node.input[1 - i]
            if not (_is_constant(found, name) and _is_as_large(found, other, node)):
                continue
            replaced, channels = True, found.channels[name]
            added = node.op_type == "Add" and node.output[0] not in graph.outputs
            if added and not channels.constant.any():
                graph.replace(node.output[0], other)
                break
            sizes = [1] * len(found.shapes[name])
            sizes[channels.axis] = -1
            node.input[i] = ""
            graph.put(node, i, channels.constant.astype(np.float32).reshape(sizes))
    return replaced


def _is_pair(found: Trace, node: onnx.NodeProto) -> bool:
    """Whether a node works on the elements of two activations."""
    pair = [name for name in node.input if name in found.channels]
    return node.op_type in ELEMENTWISE and len(pair) == len(node.input) == 2


def _is_constant(found: Trace, name: str) -> bool:
    return bool(np.isfinite(found.channels[name].constant).all())


def _is_as_large(found: Trace, name: str, node: onnx.NodeProto) -> bool:
    """Whether an activation that is not constant has the shape of a node's output."""
    same = found.shapes[name] == found.shapes.get(node.output[0])
    return same and not _is_constant(found, name)


def _kept(found: Trace, multiple: int) -> dict[str, np.ndarray]:
    """Which channels of each activation something comes of: at least one of each."""
    roots = found.ties.roots()
    needed = np.full(len(roots), False)
    needed[roots[found.ties.pinned()]] = True
    edges = list(_reading(found, roots))[::-1]
    count, before = int(needed.sum()), -1
    while count != before:
        for reads, inputs, outputs in edges:
            needed[inputs[reads[needed[outputs]].any(0)]] = True
        count, before = int(needed.sum()), count
    channels = {name: roots[x.labels] for name, x in found.channels.items()}
    for node in found.graph.nodes:
        if kernel_of(found.graph, found.shapes, node):
            _round_up(needed, channels[node.output[0]], multiple)
    return {name: needed[labels] for name, labels in channels.items()}


def _round_up(needed: np.ndarray, labels: np.ndarray, multiple: int) -> None:
    """Keeps more channels of an activation, until they are a multiple or all."""
    for label in labels[~needed[labels]]:
        count = needed[labels].sum()
        if count and not count % multiple:
            break
        needed[label] = True


def _reading(
    found: Trace, roots: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each kernel which output reads which input, and what these are tied to."""
    for node in found.graph.nodes:
        kernel = kernel_of(found.graph, found.shapes, node)
        source = found.channels.get(node.input[0]) if kernel else None
        if kernel and source and source.axis == kernel.axis and kernel.groups == 1:
            outputs = found.channels[node.output[0]].labels
            reads = kernel.weights.any(2)
            yield reads, roots[source.labels], roots[outputs]


def _cut(found: Trace, node: onnx.NodeProto, keep: dict[str, np.ndarray]) -> None:
    """Takes from a node's arrays what belongs to channels that go."""
    kept = keep.get(node.output[0])
    if kept is None:
        return
    graph, made = found.graph, found.channels[node.output[0]]
    kernel = kernel_of(graph, found.shapes, node)
    if kernel is not None:
        source = found.channels.get(node.input[0])
        weights = kernel.weights[kept]
        if kernel.groups > 1:
            groups = kernel.groups * len(weights) // len(kept)
            next(x for x in node.attribute if x.name == "group").i = groups
        elif source is not None and source.axis == kernel.axis:
            weights = weights[:, keep[node.input[0]]]
        graph.put(node, 1, kernel.to_stored(weights))
        for name in node.input[2:]:
            if name and graph.arrays[name].shape[-1:] == kept.shape:
                graph.put(node, 2, graph.arrays[name][..., kept])
    elif node.op_type == "Reshape":
        sizes = graph.arrays[node.input[1]].copy()
        if sizes[made.axis] > 0:
            sizes[made.axis] = kept.sum()
            graph.put(node, 1, sizes)
    elif node.op_type in ELEMENTWISE or node.op_type == NORM:
        rank = len(found.shapes[node.output[0]])
        for i, name in enumerate(node.input):
            array = graph.arrays.get(name)
            if array is None:
                continue
            axis = operand_axis(node, array.ndim, made.axis, rank)
            if axis >= 0 and array.shape[axis] == len(kept) > 1:
                graph.put(node, i, array.compress(kept, axis))
