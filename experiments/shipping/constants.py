"""What operations on single elements make of channels that are constant."""

from collections.abc import Sequence

import jax
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from shipping.onnx_edits import attribute

__all__ = ["ELEMENTWISE", "NORM", "by_channel", "evaluated", "operand_axis"]

NORM = "BatchNormalization"
"""It works on elements, too, with vectors that have one number for each channel."""

ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu"),
        *("HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min"),
        *("Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu"),
        *("Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh"),
    )
)
"""Operations on each element alone, of operands that are broadcast."""


def operand_axis(node: onnx.NodeProto, ndim: int, axis: int, rank: int) -> int:
    """The axis of an operand that meets one of the result; below 0 if it has none."""
    return 0 if node.op_type == NORM else axis - (rank - ndim)


def by_channel(array: np.ndarray, axis: int) -> np.ndarray:
    """The value of an array for each channel, NaN where it has several; or a scalar."""
    if array.ndim == 0:
        return array.astype(np.float64)
    if axis < 0:
        array, axis = array[None], 0
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    same = (rows == rows[:, :1]).all(1)
    return np.where(same, rows[:, 0].astype(np.float64), np.nan)


def evaluated(
    node: onnx.NodeProto, values: Sequence[np.ndarray | None], channels: int
) -> np.ndarray:
    """What a node makes of constants, float64 [channels]; NaN where one is unknown."""
    known = np.full(channels, True)
    feeds = {}
    for name, value in zip(node.input, values, strict=True):
        if value is not None:
            known &= np.isfinite(value)
            feeds[name] = value
    if not known.any():
        return np.full(channels, np.nan)
    with np.errstate(all="ignore"):
        try:
            result = _formula(node, feeds)
        except Exception:  # an operation that the evaluator lacks
            return np.full(channels, np.nan)
    result = np.broadcast_to(np.asarray(result, np.float64), channels)
    return np.where(known & np.isfinite(result), result, np.nan)


def _formula(node: onnx.NodeProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The result of one node, by the formula of its operation."""
    if node.op_type == NORM:
        x, scale, bias, mean, var = (feeds[name] for name in node.input)
        return (x - mean) / np.sqrt(
            var + attribute(node, "epsilon", 1e-5)
        ) * scale + bias
    if node.op_type == "Gelu":
        tanh = attribute(node, "approximate", b"none") == b"tanh"
        return np.asarray(jax.nn.gelu(feeds[node.input[0]], approximate=tanh))
    result: list[np.ndarray] = ReferenceEvaluator(node).run(None, feeds)  # type: ignore
    return result[0]
