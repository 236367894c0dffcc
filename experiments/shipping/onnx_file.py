"""``model.onnx``: what ONNX Runtime, OpenVINO and others run."""

import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime

from errors import UserError
from paths import kernels
from shipping import agreement
from shipping.compact import compact
from shipping.network import Network
from shipping.onnx_writer import Written, write

__all__ = [
    "Agreed",
    "Kernel",
    "agreed_model",
    "export",
    "first_difference",
    "kernels_of",
]

FAR = 10 * agreement.TOLERANCE
"""Relative error of a step that is more than rounding."""
PRODUCTS = ("Conv", "Gemm", "MatMul")


class Kernel(NamedTuple):
    """A kernel of an ONNX model.

    Attributes:
        name: Of its array.
        weights: How many it has.
        zeros: How many of them are zero.
        multiply_adds: For one image, zeros included.
    """

    name: str
    weights: int
    zeros: int
    multiply_adds: int


class Agreed(NamedTuple):
    """A model that has been compared with the network.

    Attributes:
        model: The model.
        zeros: In its kernels.
        error: The relative error of its logits.
        notes: What a person should know, in sentences.
    """

    model: onnx.ModelProto
    zeros: int
    error: float
    notes: tuple[str, ...]


def export(
    network: Network, folder: pathlib.Path, compacted: bool = False
) -> agreement.Exported:
    """Writes the network as an ONNX model, once ONNX Runtime agrees with JAX.

    Args:
        network: The network.
        folder: Where to write ``model.onnx``, or ``model_compact.onnx``.
        compacted: Whether to leave out the channels that do nothing.

    Raises:
        UserError: If it does not, with the first step that differs, or if ONNX has
            nothing for a primitive; nothing is in the folder then.
    """
    agreed = agreed_model(network, compacted)
    name = "model_compact.onnx" if compacted else "model.onnx"
    with agreement.draft_folder(folder, [name]) as draft:
        onnx.save(agreed.model, draft / name)
    return agreement.Exported([folder / name], *agreed[1:])


def agreed_model(network: Network, compacted: bool) -> Agreed:
    """An ONNX model of the network that has its zeros and gives its logits.

    Raises:
        UserError: As ``export`` does.
    """
    written = write(network)
    zeros = _check_zeros(written, network)
    expected = agreement.expected_logits(network)
    try:
        onnx.checker.check_model(written.model, full_check=True)
        error = check_batches("the ONNX model", written.model, network, expected)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as wrong:
        first = str(wrong).strip().splitlines()[0]
        raise UserError(f"no valid ONNX model ({first}): nothing was written") from None
    except UserError as wrong:
        raise UserError(f"{wrong}; {first_difference(network)}") from None
    if not compacted:
        return Agreed(written.model, zeros, error, ())
    smaller = compact(written.model)
    error = check_batches("the compact model", smaller.model, network, expected)
    zeros = sum(kernel.zeros for kernel in kernels_of(smaller.model))
    shares = [
        after / before if before else 1.0  # of a network without kernels
        for before, after in (smaller.weights, smaller.multiply_adds)
    ]
    if shares == [1, 1]:
        note = "nothing could be left out: no channel does nothing"
        return Agreed(smaller.model, zeros, error, (note,))
    note = (
        f"the compact network has {shares[0]:.1%} of the weights and {shares[1]:.1%} "
        "of the multiply-adds of the whole one, zeros included"
    )
    return Agreed(smaller.model, zeros, error, (note,))


def check_batches(
    what: str, model: onnx.ModelProto, network: Network, expected: np.ndarray
) -> float:
    """The relative error of logits, for all images at once and for the first alone.

    Raises:
        UserError: If it is above 1e-5.
    """
    session = _session(model)
    errors = []
    for count in (len(expected), 1):
        given = {"images": np.asarray(network.images[:count])}
        (found,) = session.run(None, given)
        errors.append(agreement.check_logits(what, found, expected[:count]))
    return max(errors)


def _session(model: onnx.ModelProto, **options: Any) -> onnxruntime.InferenceSession:
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # errors
    for name, value in options.items():
        setattr(quiet, name, value)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), quiet, providers=["CPUExecutionProvider"]
    )


def _check_zeros(written: Written, network: Network) -> int:
    """How many zeros the kernels have; each has as many as in JAX.

    Raises:
        UserError: With the first that has not.
    """
    counts: dict[str, int] = {}
    for constant in written.model.graph.initializer:
        source = written.sources.get(constant.name)
        if source:
            array = onnx.numpy_helper.to_array(constant)
            counts[source] = counts.get(source, 0) + int(np.sum(array == 0))
    own = kernels(network.variables)
    for path, kernel in own.items():
        zeros = int(np.sum(np.asarray(kernel) == 0))
        if counts.get(path) != zeros:
            raise UserError(
                f"the ONNX model has {counts.get(path, 0):,} zeros in {path}, which "
                f"has {zeros:,} in JAX: nothing was written"
            )
    return sum(counts[path] for path in own)


def first_difference(network: Network) -> str:
    """Where the model first gives something else than JAX, step by step."""
    few = network._replace(images=network.images[:2])
    written = write(few, expecting=True)
    model, made = written.model, {x for n in written.model.graph.node for x in n.output}
    steps = [(what, x) for what, x in written.steps if x.name in made]
    names = list(dict.fromkeys(x.name for _, x in steps if x.name != "logits"))
    model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    session = _session(
        model,
        graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    )
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, {"images": np.asarray(few.images)})
    found = dict(zip(names, results, strict=True))
    for what, tensor in steps:
        array, expected = found[tensor.name], np.asarray(tensor.expected)
        array = array.transpose(np.argsort(tensor.order))
        if array.shape != expected.shape:
            return (
                f"the first difference arises at {tensor.name}, which JAX computes by "
                f"{what!r}: its shape is {array.shape}, not {expected.shape}"
            )
        error = np.abs(array - expected).max() / max(np.abs(expected).max(), 1e-30)
        if not error <= FAR:
            return (
                f"the first difference arises at {tensor.name}, which JAX computes by "
                f"{what!r}: {error:.1e} of the largest"
            )
    return "it grows little by little: no single step differs by more than rounding"


def kernels_of(model: onnx.ModelProto) -> list[Kernel]:
    """The kernels of convolutions and products in an ONNX model, in their order."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.input[1] not in arrays:
            continue
        array, shape = arrays[node.input[1]], shapes[node.output[0]]
        places = shape[2:] if node.op_type == "Conv" else shape[1:-1]
        zeros = int(np.sum(array == 0))
        found.append(
            Kernel(node.input[1], array.size, zeros, math.prod(places) * array.size)
        )
    return found
