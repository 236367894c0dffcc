"""``model.mnn``: for MNN, which runs kernels faster with more than 60 % zeros."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import onnx

from errors import UserError
from shipping import agreement
from shipping.network import Network
from shipping.onnx_file import Kernel, agreed_model, kernels_of

__all__ = ["export"]

if importlib.util.find_spec("MNN") is None:  # it is imported in a process of its own
    raise ImportError("No module named 'MNN'")

SPARSE_ABOVE = 0.6
"""Share of zeros above which MNN runs a kernel sparse."""


def export(
    network: Network, folder: pathlib.Path, compacted: bool = False
) -> agreement.Exported:
    """Writes the network for MNN, once MNN agrees with JAX.

    Args:
        network: The network.
        folder: Where to write ``model.mnn``, or ``model_compact.mnn``.
        compacted: Whether to leave out the channels that do nothing.

    Raises:
        UserError: If it does not, or cannot convert the network; nothing is in the
            folder then.
    """
    model, zeros, _, notes = agreed_model(network, compacted)
    name = "model_compact.mnn" if compacted else "model.mnn"
    with agreement.draft_folder(folder, [name]) as draft:
        error = convert(model, network, draft / name)
    warnings = dense_kernels(kernels_of(model))
    return agreement.Exported([folder / name], zeros, error, notes + warnings)


def dense_kernels(kernels: list[Kernel]) -> tuple[str, ...]:
    """A sentence about kernels that MNN runs dense, if there are any."""
    dense = [x for x in kernels if x.zeros <= SPARSE_ABOVE * x.weights]
    if not dense:
        return ()
    share = sum(x.multiply_adds for x in dense) / sum(x.multiply_adds for x in kernels)
    names = ", ".join(x.name.removesuffix("/kernel") for x in dense[:3])
    return (
        f"MNN runs {len(dense)} of {len(kernels)} kernels dense, as no more than "
        f"{SPARSE_ABOVE:.0%} of their weights are zero ({names}"
        f"{', ...' if len(dense) > 3 else ''}): they have {share:.0%} of all "
        "multiply-adds",
    )


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
