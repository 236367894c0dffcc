"""The weights in an ONNX graph, in one layout: convolutions and products alike."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from shipping.onnx_edits import Graph, attribute

__all__ = ["Kernel", "is_vector", "kernel_of", "pads"]


class Kernel(NamedTuple):
    """The weights of a convolution or of a product.

    Attributes:
        node: Where they are, as its input 1.
        weights: [outputs, inputs of a group, taps].
        to_stored: From such an array to the layout that the node has.
        groups: Of a convolution.
        axis: Of the node's input, the channels that it sums over.
        out_axis: Of its output, the channels that it makes.
        padded: Whether it reads zeros from beyond the border.
    """

    node: onnx.NodeProto
    weights: np.ndarray
    to_stored: Callable[[np.ndarray], np.ndarray]
    groups: int
    axis: int
    out_axis: int
    padded: bool


def kernel_of(
    graph: Graph, shapes: dict[str, tuple[int, ...]], node: onnx.NodeProto
) -> Kernel | None:
    """The kernel of a node that has one; None of all others."""
    if len(node.input) < 2 or node.domain not in ("", "ai.onnx"):
        return None
    weights, rank = graph.arrays.get(node.input[1]), len(shapes.get(node.input[0], ()))
    if weights is None or weights.dtype != np.float32 or node.output[0] not in shapes:
        return None
    if not is_vector(graph, node.input[2:3]):
        return None
    if node.op_type == "Conv" and weights.ndim == rank:
        shape = weights.shape
        return Kernel(
            node,
            weights.reshape(*shape[:2], -1),
            lambda new: new.reshape(*new.shape[:2], *shape[2:]),
            attribute(node, "group", 1),
            axis=1,
            out_axis=1,
            padded=pads(node),
        )
    plain = node.op_type == "MatMul" and rank >= 2
    gemm = node.op_type == "Gemm" and not attribute(node, "transA", 0)
    gemm = gemm and attribute(node, "alpha", 1) == 1 == attribute(node, "beta", 1)
    if weights.ndim != 2 or not (plain or gemm):
        return None
    transposed = gemm and attribute(node, "transB", 0)
    return Kernel(
        node,
        (weights if transposed else weights.T)[:, :, None],
        lambda new: new[:, :, 0] if transposed else new[:, :, 0].T,
        groups=1,
        axis=rank - 1,
        out_axis=rank - 1,
        padded=False,
    )


def is_vector(graph: Graph, names: Sequence[str]) -> bool:
    """Whether each of these, if it is there at all, is an array along its last axis."""
    arrays = [graph.arrays.get(name) for name in names if name]
    return all(x is not None and x.size == (x.shape or (1,))[-1] for x in arrays)


def pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution or pooling reads beyond the border."""
    auto = attribute(node, "auto_pad", b"NOTSET")
    return auto not in (b"NOTSET", b"VALID") or (
        auto == b"NOTSET" and any(attribute(node, "pads", []))
    )
