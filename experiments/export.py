"""Writes a trained network in formats that others run, each checked on the spot.

python experiments/export.py --workdir=runs/digits_st3 --format=onnx,mnn

A file is there only if it has the network's zeros and gives the logits that JAX gives,
for test images of the run: the largest difference is at most 1e-5 of the largest logit.
"""

import beginning

if __name__ == "__main__":
    beginning.tell()

import importlib
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import paths
import terminal
from errors import UserError
from shipping import agreement
from shipping.network import Network, read_network
from workdir.files import cause


class Format(NamedTuple):
    """A format to write.

    Attributes:
        module: Of ``shipping``, with ``export(network, folder)``.
        use: What runs ``{file}`` on ``{images}``, or loads it.
        compacts: Whether channels that do nothing can be left out.
    """

    module: str
    use: str
    compacts: bool = False


IMAGES = "images.npy"
RUN_ONNX = """
import numpy as np
import onnxruntime

images = np.load({images!r})
session = onnxruntime.InferenceSession({file!r})
(logits,) = session.run(None, {{"images": images}})
"""
RUN_MNN = """
import MNN
import numpy as np

images = np.load({images!r})
settings = {{"backend": "CPU", "numThread": 1, "precision": "high"}}
manager = MNN.nn.create_runtime_manager((settings,))
network = MNN.nn.load_module_from_file(
    {file!r}, ["images"], ["logits"], runtime_manager=manager
)
given = MNN.expr.const(images, [*images.shape], MNN.expr.NCHW)
logits = MNN.expr.convert(network.forward([given])[0], MNN.expr.NCHW).read()
"""
RUN_JAX = """
python {arguments}
"""
RUN_TORCH = """
import numpy as np
import torch

images = np.load({images!r})
weights = torch.load({file!r}, weights_only=True)
{call}
"""
LOAD_SAFETENSORS = """
import safetensors.numpy

weights = safetensors.numpy.load_file({file!r})
"""
FORMATS = {
    "jax": Format("jax_program", RUN_JAX),
    "onnx": Format("onnx_file", RUN_ONNX, compacts=True),
    "mnn": Format("mnn_file", RUN_MNN, compacts=True),
    "torch": Format("torch_file", RUN_TORCH),
    "safetensors": Format("safetensors_file", LOAD_SAFETENSORS),
}


def export(
    workdir: pathlib.Path,
    formats: list[str],
    out: pathlib.Path | None = None,
    compacted: bool = False,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Writes the network of a run, and says what it wrote and how to run it.

    Args:
        workdir: The run's folder.
        formats: Some of ``FORMATS``.
        out: Where to write; by default to ``export`` in the run's folder.
        compacted: Whether to leave out channels that do nothing.
        data_dir: Where the images of the run are, if not where they were.

    Returns:
        What was written, by format.

    Raises:
        UserError: If something is missing, or a file would not be the network.
    """
    if not formats:
        raise UserError(f"--format is some of {', '.join(FORMATS)}, got none")
    if data_dir and not pathlib.Path(data_dir).expanduser().is_dir():
        raise UserError(
            f"there is no folder {data_dir}: --data_dir is where the run's images are"
        )
    console, folder = Console(), out or workdir / "export"
    modules = {name: _module(name, compacted) for name in formats}
    network = read_network(workdir, data_dir)
    _print_network(console, network)
    options = {"compacted": True} if compacted else {}
    written = {}
    try:
        for name, module in modules.items():
            with console.status(f"writing and checking {name}"):
                written[name] = module.export(network, folder, **options)
        with agreement.draft_folder(folder, [IMAGES]) as draft:
            np.save(draft / IMAGES, np.asarray(network.images, np.float32))
    except OSError as error:
        raise UserError(
            f"writing to {folder} failed ({cause(error)}): choose another folder with "
            "--out=..."
        ) from None
    _print_written(console, written, folder / IMAGES)
    if "torch" in written and ":" in _pattern(network):
        two_four = importlib.import_module("shipping.two_four")
        two_four.print_table(console, network)
    return written


def _pattern(network: Network) -> str:
    """The pattern of the zeros that the run had, if it had one."""
    settings = network.metadata.get("config", {})
    return str(settings.get("sparsity", {}).get("pattern") or "")


def _module(name: str, compacted: bool) -> Any:
    """What writes a format.

    Raises:
        UserError: If there is no such format, or it needs what is not installed.
    """
    if name not in FORMATS:
        raise UserError(f"--format is of {', '.join(FORMATS)}, got {name!r}")
    if compacted and not FORMATS[name].compacts:
        able = " and ".join(key for key, each in FORMATS.items() if each.compacts)
        raise UserError(f"--compact is for {able}, got --format={name}")
    try:
        return importlib.import_module(f"shipping.{FORMATS[name].module}")
    except ImportError as error:
        raise UserError(
            f"--format={name} needs packages that are not here (the first: {error}): "
            "pip install -e '.[export]' installs all of them"
        ) from None


def _print_network(console: Console, network: Network) -> None:
    """What is about to be written, and what it takes."""
    kernels = paths.kernels(network.variables).values()
    zeros = sum(int(np.sum(x == 0)) for x in kernels)
    weights = sum(int(np.size(x)) for x in kernels)
    count, *shape = network.images.shape
    pixels = "pixels from 0 to 1"
    if "mean" in network.metadata:
        mean, std = (_numbers(network.metadata[name]) for name in ("mean", "std"))
        pixels = f"(pixels / 255 - {mean}) / {std} of pixels from 0 to 255"
    console.print(
        f"{network.name}: {zeros:,} of {weights:,} kernel weights are zero\n"
        f"it takes images as float32 [N, {', '.join(map(str, shape))}], {pixels}\n"
        f"each file is compared with JAX on {count} test images of the run",
        soft_wrap=True,
        markup=False,
    )


def _numbers(channels: list[float]) -> str:
    """A number for each channel, or the one that there is."""
    return str(channels[0] if len(channels) == 1 else channels)


def _print_written(
    console: Console, written: dict[str, Any], images: pathlib.Path
) -> None:
    """Files, sizes and what was found; then how to run them."""
    table = Table()
    for heading in ("format", "file"):
        table.add_column(heading)
    for heading in ("bytes", "zeros", "error of logits"):
        table.add_column(heading, justify="right")
    for name, result in written.items():
        for number, path in enumerate(result.paths):
            found = ("", "", "") if number else _found(name, result)
            table.add_row(found[0], path.name, f"{path.stat().st_size:,}", *found[1:])
    table.add_row("test images", images.name, f"{images.stat().st_size:,}")
    console.print(table)
    for name, result in written.items():
        for note in result.notes:
            console.print(f"{name}: {note}", soft_wrap=True, markup=False)
    for name, result in written.items():
        code = lines(name, result, images)
        console.print(f"\n{name}:", style="bold")
        console.print(code, soft_wrap=True, markup=False, emoji=False, highlight=False)


def lines(name: str, result: agreement.Exported, images: pathlib.Path) -> str:
    """What runs a file that was written on images, to be pasted as it stands."""
    paths = [str(result.paths[0]), str(images)]
    return (
        FORMATS[name]
        .use.format(
            file=paths[0],
            images=paths[1],
            arguments=shlex.join(paths),
            call=result.call,
        )
        .strip()
    )


def _found(name: str, result: Any) -> tuple[str, str, str]:
    error = "equal bits" if result.error is None else f"{result.error:.1e}"
    return name, f"{result.zeros:,}", error


def define_flags() -> None:
    """For this program alone: others have flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder of a run that has ended.")
    flags.DEFINE_list(
        "format", None, f"What to write: {', '.join(FORMATS)}, several with commas."
    )
    flags.DEFINE_bool(
        "compact", False, "Leave out channels that do nothing: a smaller dense network."
    )
    flags.DEFINE_string(
        "out", None, "Where to write; by default to export in the workdir.",
        allow_override=True,  # transformer.py, which may be imported, has one, too
    )  # fmt: skip
    flags.DEFINE_string(
        "data_dir", None, "Where the images of the run are, if not where they were."
    )
    flags.mark_flags_as_required(["workdir", "format"])


def main(argv: list[str]) -> None:
    """Reads the flags and writes; whatever happens is told in a sentence."""
    given = flags.FLAGS
    workdir = pathlib.Path(given.workdir)
    try:
        if argv[1:]:
            raise UserError(f"unknown argument {argv[1]!r}: settings are --name=value")
        export(
            workdir,
            given.format,
            pathlib.Path(given.out) if given.out else None,
            given.compact,
            given.data_dir,
        )
    except UserError as error:
        terminal.end(1, f"error: {error}")
    except Exception as error:
        terminal.end(1, f"error: {terminal.tell_crash(error, workdir)}")


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line; what is wrong with it is told in a sentence."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    terminal.keep_streams()
    logging.set_verbosity(logging.ERROR)
    define_flags()
    app.run(main, flags_parser=parse_flags)
