"""What MNN does, in a process of its own: it prints what it likes, and may crash.

python -m shipping.mnn_process convert model.onnx model.mnn
python -m shipping.mnn_process run model.mnn images.npy logits.npy

The converter is called as a function of the package. Its command, mnnconvert, installs
a package that reports its use.
"""

import sys

import MNN
import numpy as np

__all__ = ["convert", "run"]


def convert(source: str, target: str) -> None:
    """From an ONNX file to one of MNN, sparse where that is faster."""
    import _tools  # of the package MNN

    _tools.mnnconvert(
        [
            *("mnnconvert", "-f", "ONNX", "--modelFile", source, "--MNNModel", target),
            *("--bizCode", "st3jax", "--detectSparseSpeedUp"),
        ]
    )


def run(model: str, images: str, logits: str) -> None:
    """The logits of images [N, ...]: of all at once, and then of the first alone.

    All are in one array [N + 1, classes].
    """
    settings = {"backend": "CPU", "numThread": 1, "precision": "high"}
    manager = MNN.nn.create_runtime_manager((settings,))
    network = MNN.nn.load_module_from_file(
        model, ["images"], ["logits"], runtime_manager=manager
    )
    given, results = np.load(images), []
    for count in (len(given), 1):
        batch = np.ascontiguousarray(given[:count])
        array = MNN.expr.const(batch, [*batch.shape], MNN.expr.NCHW)
        (found,) = network.forward([array])
        results.append(np.array(MNN.expr.convert(found, MNN.expr.NCHW).read()))
    np.save(logits, np.concatenate(results))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "convert":
        convert(*arguments)
    else:
        run(*arguments)
