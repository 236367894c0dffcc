"""Engines that run an ONNX file on the CPU, each behind the same call, for timing."""

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["ENGINES", "Run", "convert_for_mnn", "onnx_runtime"]

Run = Callable[[np.ndarray], np.ndarray]
"""From images to logits."""

CONVERT = """
import sys, MNN, _tools
_tools.mnnconvert(sys.argv[1:])
"""


def convert_for_mnn(source: pathlib.Path, target: pathlib.Path, sparse: bool) -> None:
    """Makes MNN's file of an ONNX file.

    The converter is called inside the package: the command ``mnnconvert`` would install
    telemetry.

    Args:
        source: The ONNX file.
        target: Where MNN's file goes.
        sparse: Whether kernels of 60 % zeros or more run on MNN's sparse kernels.

    Raises:
        RuntimeError: If MNN cannot convert it.
    """
    draft = target.with_name(f"{target.name}.draft")
    options = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(draft)]
    options += ["--bizCode", "st3jax", *(["--detectSparseSpeedUp"] if sparse else [])]
    command = [sys.executable, "-c", CONVERT, "MNNConvert", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if not draft.exists():
        raise RuntimeError(f"MNN could not convert {source}: {ended.stdout[-500:]}")
    draft.replace(target)


def onnx_runtime(model: bytes | pathlib.Path, threads: int = 1) -> Run:
    """ONNX Runtime, whose threads sleep when they have nothing to do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
    )
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino(path: pathlib.Path, images: np.ndarray, threads: int) -> Run:
    """OpenVINO in float32, which is not its default on every processor.

    Its package reports to its maker when it is imported, if it finds what does so.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    model = openvino.Core().read_model(path)
    model.reshape(images.shape)
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])[0]


def mnn(path: pathlib.Path, images: np.ndarray, threads: int) -> Run:
    """MNN in float32; sparse where its file says so."""
    import MNN

    settings = {"backend": "CPU", "numThread": threads, "precision": "normal"}
    manager = MNN.nn.create_runtime_manager((settings,))
    net = MNN.nn.load_module_from_file(str(path), [], [], runtime_manager=manager)

    def run(images: np.ndarray) -> np.ndarray:
        x = MNN.expr.const(images, images.shape, MNN.expr.NCHW, MNN.expr.float)
        result: np.ndarray = net.forward(x).read()
        return result.copy()

    return run


ENGINES: dict[str, Callable[[pathlib.Path, np.ndarray, int], Run]] = {
    "ONNX Runtime": lambda path, images, threads: onnx_runtime(path, threads),
    "OpenVINO": openvino,
    "MNN": mnn,
}
"""By name: from a file, images of the shape to expect and threads to what runs it."""
