"""Engines that run an ONNX file on the CPU, each behind the same call, for timing."""

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import EXPERIMENTS

from workdir.files import draft_of

__all__ = ["ENGINES", "Run", "convert_for_mnn", "onnx_runtime"]

Run = Callable[[np.ndarray], np.ndarray]
"""From images to logits."""


def convert_for_mnn(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes MNN's file of an ONNX file, in which kernels of 60 % zeros run sparse.

    Raises:
        RuntimeError: If MNN cannot convert it.
    """
    command = [sys.executable, "-m", "shipping.mnn_process", "convert"]
    with draft_of(target) as draft:
        ended = subprocess.run(
            [*command, str(source.absolute()), str(draft.absolute())],
            cwd=EXPERIMENTS,
            capture_output=True,
            text=True,
            check=False,
        )
        if not draft.exists():
            raise RuntimeError(f"MNN could not convert {source}: {ended.stdout[-500:]}")


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
