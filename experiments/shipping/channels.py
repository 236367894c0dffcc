"""The channels of an ONNX graph: which belong together, and which are constant.

Each activation is followed along one axis, that of its channels. A convolution or a
product with a kernel makes new channels; what works on each channel alone passes them
on; a sum ties those of its operands. What is not known here is a barrier: the channels
that reach it stay.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import onnx

from shipping.constants import ELEMENTWISE, NORM, by_channel, evaluated, operand_axis
from shipping.kernels import Kernel, is_vector, kernel_of, pads
from shipping.onnx_edits import IMAGES, Graph, attribute, reads

__all__ = ["Channels", "Trace", "trace"]

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
_MEANS = ("ReduceMax", "ReduceMean", "ReduceMin")


class Channels(NamedTuple):
    """The channels of one activation.

    Attributes:
        axis: Where they are.
        labels: int [C], a number for each, by which ``Ties`` knows it.
        constant: float64 [C], the value of each that is the same everywhere, for any
            image; NaN for the others.
    """

    axis: int
    labels: np.ndarray
    constant: np.ndarray


class Ties:
    """Which channels go only together, and which stay."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pinned: set[int] = set()

    def new(self, count: int) -> np.ndarray:
        """So many channels, each alone."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def tie(self, some: np.ndarray, others: np.ndarray) -> None:
        """Ties each of some to the one of others in its place."""
        for a, b in zip(some.tolist(), others.tolist(), strict=True):
            self._parent[self._root(a)] = self._root(b)

    def pin(self, labels: np.ndarray) -> None:
        """Says that channels stay."""
        self._pinned.update(labels.tolist())

    def roots(self) -> np.ndarray:
        """Int [all channels]: one channel that stands for all that each is tied to."""
        return np.array([self._root(i) for i in range(len(self._parent))], int)

    def pinned(self) -> np.ndarray:
        """The numbers of the channels that stay."""
        return np.array(sorted(self._pinned), int)

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i


@dataclasses.dataclass
class Trace:
    """What is known of a graph's channels.

    Attributes:
        graph: The graph.
        shapes: Of what is in it.
        ties: Which channels go together.
        channels: From name to the channels of activations that have any.
    """

    graph: Graph
    shapes: dict[str, tuple[int, ...]]
    ties: Ties
    channels: dict[str, Channels]


def trace(graph: Graph) -> Trace:
    """Follows channels through the graph, and takes constants into biases on the way.

    What a constant channel adds to the outputs of a kernel is added to its bias, and
    the kernel's weights for it become zero. Where the kernel sees zeros beyond a border
    in place of the constant, nothing is changed.
    """
    found = Trace(graph, graph.shapes(), Ties(), {})
    for node in graph.nodes:
        made = None
        if node.domain in ("", "ai.onnx") and len(node.output) == 1:
            made = _follow(found, node)
        if made is None:
            for name in reads(node):
                if name in found.channels:
                    found.ties.pin(found.channels[name].labels)
        else:
            found.channels[node.output[0]] = made
    for name in graph.outputs:
        if name in found.channels:
            found.ties.pin(found.channels[name].labels)
    return found


def _follow(found: Trace, node: onnx.NodeProto) -> Channels | None:
    """The channels of a node's output; None if nothing is known of it."""
    kernel = kernel_of(found.graph, found.shapes, node)
    if kernel is not None:
        return _through_kernel(found, kernel)
    if node.output[0] not in found.shapes:
        return None
    if node.op_type in ELEMENTWISE or node.op_type == NORM:
        return _through_elementwise(found, node)
    if node.op_type == "Concat":
        return _joined(found, node)
    source = found.channels.get(node.input[0]) if node.input else None
    if source is None:
        return None
    if node.op_type in _POOLS:
        return _pooled(node, source)
    if node.op_type in _MEANS:
        return _averaged(found, node, source)
    if node.op_type == "Transpose":
        axes = attribute(node, "perm", [])
        return source._replace(axis=axes.index(source.axis)) if axes else None
    return _reshaped(found, node, source) if node.op_type in _RESHAPES else None


def _through_kernel(found: Trace, kernel: Kernel) -> Channels | None:
    """New channels; those that have no weights left are their biases."""
    outputs = len(kernel.weights)
    source = found.channels.get(kernel.node.input[0])
    labels = found.ties.new(outputs)
    if source is not None and source.axis != kernel.axis:
        found.ties.pin(source.labels)
        source = None
    if kernel.groups > 1:
        if source is None:
            found.ties.pin(labels)
        else:
            _tie_groups(found.ties, kernel, source.labels, labels)
    if source is not None:
        _absorb(found, kernel, source.constant)
        kernel = kernel_of(found.graph, found.shapes, kernel.node) or kernel
    bias = [found.graph.arrays[x] for x in kernel.node.input[2:] if x]
    constant = np.broadcast_to(bias[0].ravel() if bias else np.zeros(1), outputs)
    dead = ~kernel.weights.any((1, 2)) & np.isfinite(constant)
    return Channels(
        kernel.out_axis, labels, np.where(dead, constant, np.nan).astype(float)
    )


def _tie_groups(
    ties: Ties, kernel: Kernel, inputs: np.ndarray, outputs: np.ndarray
) -> None:
    """A group of channels goes as a whole, or groups would differ in size."""
    ins = inputs.reshape(kernel.groups, -1)
    outs = outputs.reshape(kernel.groups, -1)
    for group in (ins, outs):
        ties.tie(group[:, 1:].ravel(), np.repeat(group[:, 0], group.shape[1] - 1))
    ties.tie(ins[:, 0], outs[:, 0])


def _absorb(found: Trace, kernel: Kernel, constant: np.ndarray) -> None:
    """Adds to the bias what constant inputs give, and makes their weights zero."""
    outputs, per_group, _ = kernel.weights.shape
    group = np.arange(outputs) // (outputs // kernel.groups)
    reads = group[:, None] * per_group + np.arange(per_group)  # [outputs, per_group]
    values = constant[reads]
    sums = kernel.weights.astype(np.float64).sum(2)
    given = np.where(np.isnan(values), 0, values) * sums
    known = ~np.isnan(values) & np.isfinite(sums)
    if kernel.padded:
        known &= values == 0
    if not _add_to_bias(found, kernel, np.where(known, given, 0).sum(1)):
        known &= given == 0
    if kernel.weights[known].any():
        weights = np.where(known[:, :, None], 0, kernel.weights)
        stored = kernel.to_stored(weights.astype(kernel.weights.dtype))
        found.graph.put(kernel.node, 1, stored)


def _add_to_bias(found: Trace, kernel: Kernel, more: np.ndarray) -> bool:
    """Adds to what is added to a kernel's outputs; False if there is no place for it.

    A product of matrices becomes a Gemm, which has a bias; one of more axes has the
    vector that is added next, if there is one.
    """
    graph, node = found.graph, kernel.node
    if not more.any():
        return True
    holder, index = node, 2
    if node.op_type == "MatMul":
        users = graph.users(node.output[0])
        if len(users) == 1 and _adds_vector(found, users[0][0], kernel):
            holder, index = users[0][0], 1 - users[0][1]
        elif kernel.axis == 1:
            node.op_type = "Gemm"
        else:
            return False
    name = holder.input[index] if len(holder.input) > index else ""
    old = graph.arrays[name] if name else np.zeros(1, kernel.weights.dtype)
    total = old.astype(np.float64) + more.reshape((1,) * (old.ndim - 1) + (-1,))
    graph.put(holder, index, total.astype(kernel.weights.dtype))
    return True


def _adds_vector(found: Trace, node: onnx.NodeProto, kernel: Kernel) -> bool:
    """Whether a node adds one number to each output of a kernel, and no more."""
    if node.op_type != "Add" or kernel.node.output[0] in found.graph.outputs:
        return False
    arrays = [name for name in node.input if name in found.graph.arrays]
    shape = found.shapes.get(node.output[0])
    same = shape == found.shapes[kernel.node.output[0]]
    return same and len(arrays) == 1 and is_vector(found.graph, arrays)


def _through_elementwise(found: Trace, node: onnx.NodeProto) -> Channels | None:
    """The channels of the operands, tied; constant where all operands are."""
    shape = found.shapes[node.output[0]]
    axes = set()
    for name in node.input:
        if name in found.channels:
            lacking = len(shape) - len(found.shapes[name])
            axes.add(found.channels[name].axis + lacking)
    if len(axes) != 1:
        return None
    axis = axes.pop()
    values: list[np.ndarray | None] = []
    labels = None
    for name in node.input:
        channels = found.channels.get(name)
        if channels is None:
            array = found.graph.arrays.get(name)
            if array is not None:
                place = operand_axis(node, array.ndim, axis, len(shape))
                values.append(by_channel(array, place))
            elif name and _size_at(found, name, axis - len(shape)) != 1:
                return None
            else:
                values.append(np.array(np.nan) if name else None)
            continue
        if len(channels.labels) != shape[axis]:
            return None
        if labels is not None:
            found.ties.tie(labels, channels.labels)
        labels = channels.labels
        values.append(channels.constant)
    assert labels is not None
    return Channels(axis, labels, evaluated(node, values, shape[axis]))


def _size_at(found: Trace, name: str, axis: int) -> int:
    """The size of what is broadcast along an axis, counted from the end; 0: unknown."""
    shape = found.shapes.get(name)
    if shape is None:
        return 0
    return shape[axis] if -axis <= len(shape) else 1


def _pooled(node: onnx.NodeProto, source: Channels) -> Channels | None:
    """Pooling passes channels on; one with zeros around it, no constant but zero."""
    if source.axis != 1:
        return None
    zeros = node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0)
    if zeros and (pads(node) or attribute(node, "ceil_mode", 0)):
        constant = np.where(source.constant == 0, 0, np.nan)
        return source._replace(constant=constant)
    return source


def _averaged(found: Trace, node: onnx.NodeProto, source: Channels) -> Channels | None:
    """Channels of a mean over other axes."""
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1:
        axes = found.graph.arrays.get(node.input[1])
    if axes is None or len(axes) == 0:
        return None
    rank = len(found.shapes[node.input[0]])
    reduced = {int(axis) % rank for axis in axes}
    if source.axis in reduced:
        return None
    if attribute(node, "keepdims", 1):
        return source
    return source._replace(axis=source.axis - sum(x < source.axis for x in reduced))


def _reshaped(found: Trace, node: onnx.NodeProto, source: Channels) -> Channels | None:
    """Channels in another shape, where their axis is whole, alone or with others.

    Of an axis made of some before it, of the channels, and of some after it, every part
    that belongs to one channel has the label of that channel.
    """
    if node.op_type == "Reshape" and node.input[1] not in found.graph.arrays:
        return None
    before, after = found.shapes[node.input[0]], found.shapes[node.output[0]]
    left, right = math.prod(before[: source.axis]), math.prod(before[source.axis + 1 :])
    count = len(source.labels)
    for axis, size in enumerate(after):
        outside = math.prod(after[:axis]), math.prod(after[axis + 1 :])
        if 0 in outside or left % outside[0] or right % outside[1]:
            continue
        times, each = left // outside[0], right // outside[1]
        if times * count * each == size and times < IMAGES and each < IMAGES:
            which = np.arange(size) // each % count
            return Channels(axis, source.labels[which], source.constant[which])
    return None


def _joined(found: Trace, node: onnx.NodeProto) -> Channels | None:
    """Channels one after another, or tied, if other axes are joined."""
    parts = [found.channels.get(name) for name in node.input]
    shape, axis = found.shapes[node.output[0]], attribute(node, "axis", 0)
    axis %= len(shape)
    known = [part for part in parts if part is not None]
    if len({part.axis for part in known}) != 1 or len(known) < len(parts):
        return None
    if known[0].axis == axis:
        labels = np.concatenate([part.labels for part in known])
        return Channels(axis, labels, np.concatenate([x.constant for x in known]))
    first, constant = known[0], known[0].constant
    for part in known[1:]:
        found.ties.tie(first.labels, part.labels)
        constant = np.where(constant == part.constant, constant, np.nan)
    return first._replace(constant=constant)
