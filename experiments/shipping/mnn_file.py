"""``model.mnn``: for MNN, which runs kernels faster that are 60 % zeros or more."""

import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np
import onnx

from errors import UserError
from shipping import agreement
from shipping.network import Network
from shipping.onnx_file import agreed_model

__all__ = ["FILES", "Kernel", "export", "kernels_of"]

FILES = ("model.mnn",)
SPARSE_FROM = 0.6
"""Share of zeros from which on MNN runs a kernel sparse."""


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


def export(network: Network, folder: pathlib.Path) -> agreement.Exported:
    """Writes the network for MNN, once MNN agrees with JAX.

    Raises:
        UserError: If it does not, or cannot convert the network; nothing is in the
            folder then.
    """
    model, zeros, _ = agreed_model(network)
    with agreement.draft_folder(folder, FILES) as draft:
        error = convert(model, network, draft / FILES[0])
    return agreement.Exported([folder / FILES[0]], zeros, error)


def convert(model: onnx.ModelProto, network: Network, path: pathlib.Path) -> float:
    """Writes an ONNX model of a network for MNN, and runs it there.

    Returns:
        The relative error of its logits.

    Raises:
        UserError: As ``export`` does.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, images, logits = (
            pathlib.Path(temporary, name)
            for name in ("model.onnx", "images.npy", "logits.npy")
        )
        onnx.save(model, source)
        np.save(images, network.images)
        _call("convert", source, path)
        if not path.exists():
            raise UserError("MNN cannot convert the ONNX model: nothing was written")
        _call("run", path, images, logits)
        if not logits.exists():
            raise UserError("MNN cannot run what it made: nothing was written")
        found = np.load(logits)
    expected = agreement.expected_logits(network)
    together = np.concatenate([expected, expected[:1]])
    return agreement.check_logits("the network in MNN", found, together)


def _call(*arguments: Any) -> None:
    """Does something in a process of MNN's own, whose last words are told.

    Raises:
        UserError: If it ends badly.
    """
    package = pathlib.Path(__file__).parents[1]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "shipping.mnn_process", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        words = (done.stderr + done.stdout).strip().splitlines() or ["without a word"]
        raise UserError(
            f"MNN failed to {arguments[0]} (status {done.returncode}: "
            f"{words[-1][:200]}): nothing was written"
        )


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
        if (
            node.op_type not in ("Conv", "Gemm", "MatMul")
            or node.input[1] not in arrays
        ):
            continue
        array, shape = arrays[node.input[1]], shapes[node.output[0]]
        places = shape[2:] if node.op_type == "Conv" else shape[1:-1]
        zeros = int(np.sum(array == 0))
        found.append(
            Kernel(node.input[1], array.size, zeros, math.prod(places) * array.size)
        )
    return found
