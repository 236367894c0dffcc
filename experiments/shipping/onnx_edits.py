"""An ONNX graph that can be changed: nodes, their arrays, and the shapes between."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["IMAGES", "Graph", "attribute", "reads"]

IMAGES = 7919
"""Stands for a number of images that the graph leaves open: no size divides by it."""

_MOST_OF_A_SHAPE = 64
"""Elements of an array that may say what a shape is."""


class Graph:
    """The graph of a model; the model itself is not changed.

    Attributes:
        nodes: In the order that they are computed in.
        arrays: From name to the weights and constants of the graph.
        outputs: Names of what the graph returns.
    """

    def __init__(self, model: onnx.ModelProto):
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = self._model.graph
        self.arrays = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            value = attribute(node, "value", None)
            if node.op_type == "Constant" and isinstance(value, onnx.TensorProto):
                self.arrays[node.output[0]] = numpy_helper.to_array(value)
            else:
                self.nodes.append(node)
        self.outputs = [output.name for output in graph.output]
        self._inputs = [x for x in graph.input if x.name not in self.arrays]
        self.drop_unused()

    def users(self, name: str) -> list[tuple[onnx.NodeProto, int]]:
        """The nodes that read something, and at which of their inputs."""
        return [
            (node, i)
            for node in self.nodes
            for i, read in enumerate(reads(node))
            if read == name
        ]

    def put(self, node: onnx.NodeProto, index: int, array: np.ndarray) -> None:
        """Gives one input of one node another array; others keep what they share."""
        while len(node.input) <= index:
            node.input.append("")
        name = node.input[index]
        if not name or len(self.users(name)) > 1 or name in self.outputs:
            name = self._fresh(f"{node.output[0]}_{index}")
            node.input[index] = name
        self.arrays[name] = np.ascontiguousarray(array)

    def replace(self, name: str, other: str) -> None:
        """Has every node that reads ``name`` read ``other``."""
        for node, i in self.users(name):
            if i < len(node.input):
                node.input[i] = other

    def drop_unused(self) -> None:
        """Leaves out nodes and arrays that no output comes from."""
        used, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if used.intersection(node.output):
                kept.append(node)
                used.update(reads(node))
        self.nodes = kept[::-1]
        self.arrays = {k: array for k, array in self.arrays.items() if k in used}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that are known, ``IMAGES`` for a number of images left open."""
        model = onnx.ModelProto()
        model.CopyFrom(self._without_graph())
        model.graph.name = "shapes"
        sizes: dict[str, int] = {}
        for value in self._inputs:
            model.graph.input.append(_with_sizes(value, sizes))
        for name, array in self.arrays.items():
            if array.size <= _MOST_OF_A_SHAPE:
                model.graph.initializer.append(numpy_helper.from_array(array, name))
            else:
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                value = helper.make_tensor_value_info(name, kind, array.shape)
                model.graph.input.append(value)
        model.graph.node.extend(self.nodes)
        for name in self.outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        values = [*inferred.input, *inferred.value_info, *inferred.output]
        shapes = {name: array.shape for name, array in self.arrays.items()}
        for value in values:
            dims = value.type.tensor_type.shape.dim
            known = value.type.tensor_type.HasField("shape")
            if known and all(dim.HasField("dim_value") for dim in dims):
                shapes[value.name] = tuple(dim.dim_value for dim in dims)
        return shapes

    def to_model(self) -> onnx.ModelProto:
        """The model with this graph."""
        model = onnx.ModelProto()
        model.CopyFrom(self._without_graph())
        graph = self._model.graph
        model.graph.name, model.graph.doc_string = graph.name, graph.doc_string
        model.graph.input.extend(self._inputs)
        model.graph.output.extend(graph.output)
        model.graph.node.extend(self.nodes)
        for name, array in self.arrays.items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        return model

    def _without_graph(self) -> onnx.ModelProto:
        model = onnx.ModelProto(ir_version=self._model.ir_version)
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.metadata_props.extend(self._model.metadata_props)
        model.producer_name = self._model.producer_name
        model.producer_version = self._model.producer_version
        return model

    def _fresh(self, name: str) -> str:
        taken = self.arrays.keys() | {out for node in self.nodes for out in node.output}
        while name in taken:
            name += "_"
        return name


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of one attribute of a node."""
    for each in node.attribute:
        if each.name == name:
            return helper.get_attribute_value(each)
    return default


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads: its inputs, then what graphs inside it take from outside."""
    yield from node.input
    for each in node.attribute:
        for graph in (each.g, *each.graphs):
            for inner in graph.node:
                yield from reads(inner)
            yield from (output.name for output in graph.output)


def _with_sizes(
    value: onnx.ValueInfoProto, sizes: dict[str, int]
) -> onnx.ValueInfoProto:
    """A graph's input with a number for each size that is left open."""
    value = onnx.ValueInfoProto.FromString(value.SerializeToString())
    for dim in value.type.tensor_type.shape.dim:
        if not dim.HasField("dim_value"):
            name = dim.dim_param or f"unnamed {len(sizes)}"
            dim.dim_value = sizes.setdefault(name, IMAGES + 2 * len(sizes))
    return value
