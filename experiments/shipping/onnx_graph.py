"""An ONNX graph in the making: nodes, constants, and arrays in another axis order.

JAX has channels last, ONNX has them second. A :class:`Tensor` says how the axes of its
array in the graph are those that JAX has, so that a transposition is written only where
a node needs another order: of a convolutional network, at the input alone.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

__all__ = ["Graph", "Known", "Shape", "Tensor", "Value", "shape_of"]

Shape = tuple[int | str, ...]
"""Sizes; those that depend on the batch are texts, such as ``"b"``."""


class Known(NamedTuple):
    """An array that does not depend on the images.

    Attributes:
        array: What it is.
        path: Of the variable that it is made from, and for one layer of a stack with
            its number; empty if of none.
        source: Path of the variable if it has its values, or those of one layer, in
            their order or another; else empty.
    """

    array: np.ndarray
    path: str = ""
    source: str = ""


class Tensor(NamedTuple):
    """An array that the graph computes.

    Attributes:
        name: Of the array in the graph.
        shape: As JAX has it.
        order: For each axis of the array in the graph, which of JAX's axes it is.
        expected: What it is for certain images, if somebody compares; as JAX has it.
    """

    name: str
    shape: Shape
    order: tuple[int, ...]
    expected: Any = None


Value = Known | Tensor


def shape_of(aval: Any) -> Shape:
    """The shape of what JAX has traced."""
    return tuple(
        int(n) if isinstance(n, int | np.integer) else str(n) for n in aval.shape
    )


class Graph:
    """Nodes and constants.

    Attributes:
        nodes: In the order of the computation.
        constants: By name; float32, int64 and the like.
        shapes: Of every array that a node gives, by name.
        sources: From the name of a constant to the path of the variable that it holds.
        place: Where in the network the next node is, such as ``"stem_norm"``.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.shapes: dict[str, Shape] = {}
        self.sources: dict[str, str] = {}
        self.place = ""
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        """The name, or with a number if it is taken."""
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        free = next(
            x for x in itertools.chain([name], numbered) if x not in self._taken
        )
        self._taken.add(free)
        return free

    def here(self, name: str) -> str:
        """A name at the place where the next node is."""
        return f"{self.place}/{name}" if self.place else name

    def constant(self, array: Any, name: str, source: str = "") -> str:
        """The name under which the graph has an array.

        Args:
            array: The values. Zeros become positive ones.
            name: What to call it.
            source: Path of the variable whose values these are, if they are.
        """
        array = np.asarray(array)
        if np.issubdtype(array.dtype, np.floating):
            array = array + array.dtype.type(0)
        there = self.constants.get(name)
        if there is None or there.dtype != array.dtype or not _same(there, array):
            name = self.unique(name)
            self.constants[name] = array
        if source:
            self.sources[name] = source
        return name

    def node(
        self, op: str, inputs: Iterable[str], shape: Shape, **attributes: Any
    ) -> str:
        """Adds a node, and gives the name of its one output.

        Args:
            op: Operator of ONNX.
            inputs: Names of its inputs.
            shape: Of its output, in the graph's order of axes.
            **attributes: Of the operator.
        """
        name = self.unique(self.here(op.lower()))
        self.nodes.append(
            onnx.helper.make_node(op, list(inputs), [name], name, **attributes)
        )
        self.shapes[name] = shape
        return name

    def compute(
        self,
        op: str,
        inputs: Iterable[str],
        shape: Shape,
        order: Sequence[int],
        **attributes: Any,
    ) -> Tensor:
        """Adds a node whose output is, in this order of axes, of this shape in JAX."""
        there = tuple(shape[axis] for axis in order)
        return Tensor(self.node(op, inputs, there, **attributes), shape, tuple(order))

    def ordered(self, value: Value, order: Sequence[int]) -> str:
        """The name of a value, in this order of JAX's axes; scalars have no order."""
        order = tuple(order)
        if isinstance(value, Known):
            array = value.array
            array = array.transpose(order) if array.ndim else array
            name = value.path or self.here("constant")
            return self.constant(array, name, value.source)
        if value.order == order:
            return value.name
        shape = tuple(value.shape[axis] for axis in order)
        if _without_ones(value, value.order) == _without_ones(value, order):
            return self.reshape(value.name, shape)
        return self.node(
            "Transpose",
            [value.name],
            shape,
            perm=[value.order.index(axis) for axis in order],
        )

    def reshaped(self, x: Tensor, shape: Shape) -> Tensor:
        """The tensor in another shape, as JAX reshapes it.

        Axes of size 1 come and go in any order of axes; others need JAX's order.
        """
        before = [axis for axis, n in enumerate(x.shape) if n != 1]
        after = [axis for axis, n in enumerate(shape) if n != 1]
        if [x.shape[axis] for axis in before] != [shape[axis] for axis in after]:
            name = self.ordered(x, range(len(x.shape)))
            return Tensor(self.reshape(name, shape), shape, tuple(range(len(shape))))
        order = [after[before.index(axis)] for axis in x.order if axis in before]
        for axis in reversed(range(len(shape))):
            if shape[axis] == 1:  # beside the axis that follows it
                follows = order.index(axis + 1) if axis + 1 in order else len(order)
                order.insert(follows, axis)
        name = self.reshape(x.name, tuple(shape[axis] for axis in order))
        return Tensor(name, shape, tuple(order))

    def reshape(self, name: str, shape: Shape) -> str:
        """The array in another shape; what depends on the batch is found by ONNX.

        Raises:
            NotImplementedError: If more than one axis depends on the batch.
        """
        if shape == self.shapes[name]:
            return name
        sizes = [-1 if isinstance(n, str) else n for n in shape]
        if sizes.count(-1) > 1:
            raise NotImplementedError("a shape with the batch in more than one axis")
        label = "shape_" + "x".join("n" if n < 0 else str(n) for n in sizes)
        return self.node(
            "Reshape", [name, self.constant(np.array(sizes, np.int64), label)], shape
        )

    def integers(self, numbers: Iterable[int]) -> str:
        """The name of a constant list of integers, such as axes."""
        values = list(numbers)
        label = "integers_" + "_".join(map(str, values))
        return self.constant(np.array(values, np.int64), label)


def _without_ones(tensor: Tensor, order: Sequence[int]) -> list[int]:
    return [axis for axis in order if tensor.shape[axis] != 1]


def _same(there: np.ndarray, array: np.ndarray) -> bool:
    return there is array or np.array_equal(there, array)
