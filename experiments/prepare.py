"""Prepares data sets without a download and without TensorFlow.

Fashion-MNIST, from the files of a Debian package:

apt-get install dataset-fashion-mnist
python experiments/prepare.py --name=fashion_mnist

A few synthetic images in the layout of TFDS's ImageNet, to try everything that touches
its files before the real ones are there:

python experiments/prepare.py --name=imagenet_rehearsal --data_dir=rehearsal

Any data set that TFDS prepared as TFRecord, as files that can be read in any order:

python experiments/prepare.py --name=from_tfrecord --source=... --data_dir=...
"""

import contextlib
import io
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data.builders.fashion_mnist import SOURCE, FashionMnist
from data.builders.from_tfrecord import convert
from data.builders.imagenet_rehearsal import ImagenetRehearsal, is_rehearsal
from errors import UserError

FORMAT = "array_record"
TRAIN = "python experiments/train.py --config=experiments"
FASHION_MNIST = f"{TRAIN}/fashion_mnist_st3.py"
IMAGENET = f"{TRAIN}/imagenet_st3.py"


def prepare_fashion_mnist(source: str, data_dir: str | None) -> str:
    """Writes Fashion-MNIST from the idx files in a folder, unless it is there.

    Args:
        source: The folder.
        data_dir: Where TFDS keeps its data sets; None for TFDS's own default.

    Returns:
        What is there now, and the next command: a line each.

    Raises:
        UserError: If a file is missing or damaged, or if something else is there.
    """
    options = {"data_dir": data_dir, "file_format": FORMAT}
    there = opened(FashionMnist.name, data_dir)
    if not there:
        write(FashionMnist(source=source, **options))
    return report(FashionMnist.name, data_dir, there is not None, FASHION_MNIST)


def prepare_imagenet_rehearsal(
    data_dir: str | None, images: Mapping[str, int], seed: int
) -> str:
    """Writes synthetic images as TFDS's ``imagenet2012``, unless they are there.

    Args:
        data_dir: A folder that is not where TFDS looks for ImageNet.
        images: Number of images of each split.
        seed: The same seed gives the same images.

    Returns:
        What is there now, and the next command: a line each.

    Raises:
        UserError: If no folder is given, or one that could be ImageNet's.
    """
    if not data_dir:
        raise UserError(
            "--data_dir is missing: name a folder of its own for the rehearsal, so "
            "that nobody takes it for ImageNet"
        )
    refuse_imagenet(data_dir)
    options = {"data_dir": data_dir, "file_format": FORMAT}
    there = opened(ImagenetRehearsal.name, data_dir)
    if not there:
        write(ImagenetRehearsal(images=images, seed=seed, **options))
    return report(ImagenetRehearsal.name, data_dir, there is not None, IMAGENET)


def prepare_from_tfrecord(source: str | None, data_dir: str | None) -> str:
    """Writes the records of a data set again, in files that have random access.

    Args:
        source: The folder of one version of the data set.
        data_dir: Where TFDS will look for it.

    Returns:
        What is there now.

    Raises:
        UserError: If a folder is missing, or is not what it should be.
    """
    if not source or not data_dir:
        raise UserError(
            "--name=from_tfrecord needs --source=... and --data_dir=...: the folder of "
            "one version of the data set, and another one to write it to"
        )
    path = convert(pathlib.Path(source).expanduser(), pathlib.Path(data_dir))
    return f"converted: {path}; use it with --config.data.dir={shlex.quote(data_dir)}"


def refuse_imagenet(data_dir: str) -> None:
    """Raises a UserError if the folder holds an ImageNet, or if TFDS looks there."""
    default = pathlib.Path(tfds.core.constants.DATA_DIR).expanduser()
    if pathlib.Path(data_dir).resolve() == default.resolve():
        raise UserError(
            f"{data_dir} is where TFDS looks for ImageNet: name another folder for the "
            "rehearsal"
        )
    folder = pathlib.Path(data_dir) / ImagenetRehearsal.name
    for version in folder.iterdir() if folder.is_dir() else ():
        if not version.name.startswith("incomplete.") and not is_rehearsal(version):
            raise UserError(
                f"{version} is not a rehearsal, and stays as it is: name another "
                "folder with --data_dir=..."
            )


def opened(name: str, data_dir: str | None) -> Any:
    """The data set's builder if it is there, or None.

    Raises:
        UserError: If it is there, but cannot be read without TensorFlow.
    """
    mend = "remove that folder, or name another one with --data_dir=..."
    path = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
    try:
        path = tfds.builder(name, data_dir=data_dir).data_path
        if not path.exists():
            return None
        builder = tfds.builder_from_directory(path)
    except Exception:  # damaged descriptions make TFDS raise anything
        raise UserError(f"{path} holds no whole data set: {mend}") from None
    formats = {x.value for x in builder.info.available_file_formats()}
    if FORMAT not in formats:
        raise UserError(
            f"{path} holds files of the format {', '.join(sorted(formats))}, which "
            f"cannot be read without TensorFlow: {mend}"
        )
    return builder


def write(builder: Any) -> None:
    """Lets TFDS write a data set: under another name until it is whole."""
    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download
        builder.download_and_prepare()


def report(name: str, data_dir: str | None, before: bool, command: str) -> str:
    """A line about what is on the disk, and one with the command to run next."""
    builder = opened(name, data_dir)
    splits = sorted(builder.info.splits.values(), key=lambda x: -x.num_examples)
    images = ", ".join(f"{x.num_examples:,} {x.name}" for x in splits)
    path = pathlib.Path(builder.data_path)
    size = sum(file.stat().st_size for file in path.iterdir())
    folder = f" --config.data.dir={shlex.quote(data_dir)}" if data_dir else ""
    return (
        f"{name} {'was there already' if before else 'is prepared'}: {images} images, "
        f"{size / 1e6:.0f} MB in {path}\n"
        f"next: {command}{folder}"
    )


NAME = flags.DEFINE_enum(
    "name",
    None,
    ["fashion_mnist", "imagenet_rehearsal", "from_tfrecord"],
    "The data set, or where it comes from.",
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where it is written; by default where TFDS keeps its data sets."
)
SOURCE_DIR = flags.DEFINE_string(
    "source",
    None,
    "The folder of Fashion-MNIST's four files, by default that of Debian's package; "
    "for from_tfrecord the folder of one version of a data set.",
)
IMAGES = {
    split: flags.DEFINE_integer(
        f"{split}_images", number, f"The rehearsal's {split} images.", lower_bound=1
    )
    for split, number in {"train": 512, "validation": 128, "test": 16}.items()
}
SEED = flags.DEFINE_integer("seed", 0, "The rehearsal's images.", lower_bound=0)


def main(argv: list[str]) -> None:
    """Reads the flags and prepares."""
    tfds.disable_progress_bar()
    data_dir = DATA_DIR.value and str(pathlib.Path(DATA_DIR.value).expanduser())
    try:
        if argv[1:]:
            raise UserError(f"unknown argument {argv[1]!r}: --help lists the flags")
        if NAME.value == "fashion_mnist":
            print(prepare_fashion_mnist(SOURCE_DIR.value or SOURCE, data_dir))
        elif NAME.value == "from_tfrecord":
            print(prepare_from_tfrecord(SOURCE_DIR.value, data_dir))
        else:
            images = {split: flag.value for split, flag in IMAGES.items()}
            print(prepare_imagenet_rehearsal(data_dir, images, SEED.value))
    except (UserError, OSError, RuntimeError) as error:  # the last of array_record
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    flags.mark_flag_as_required("name")
    app.run(main)
