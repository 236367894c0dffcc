"""Where images come from: TFDS, builders of our own, or a folder of class folders.

A source gives ``{"image", "label", "name"}`` at random access: encoded bytes, or pixels
where ``config.data.in_memory`` decoded them once. Reading needs no TensorFlow.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import ml_collections
import tensorflow_datasets as tfds

from data.builders.digits import Digits
from data.decoding import BrokenImage, resized_centre
from errors import UserError

__all__ = ["Data", "load"]

BUILDERS = {"digits": Digits}
FOLDER = "folder"
SKIP_DECODING = {"image": tfds.decode.SkipDecoding()}


class Source(Protocol):
    """Examples at random access."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"image", "label", "name"}``."""


class Data(NamedTuple):
    """A prepared data set.

    Attributes:
        train: Random-access source of training examples.
        test: Random-access source of test examples.
        num_classes: Number of labels.
    """

    train: Source
    test: Source
    num_classes: int


def load(config: ml_collections.ConfigDict) -> Data:
    """Opens the data set that ``config.data`` names; prepares it if that needs no net.

    Raises:
        UserError: If the data set is unknown, not prepared yet, or does not fit the
            configuration.
    """
    opened = _open_folder(config) if config.data.name == FOLDER else _open_tfds(config)
    if config.data.in_memory:
        train, test = (_decoded(source, config) for source in opened[:2])
        opened = opened._replace(train=train, test=test)
    if not len(opened.test):
        raise UserError(
            f"config.data.test_split {config.data.test_split!r} of "
            f"{config.data.name!r} has no image: name a split to test on"
        )
    if len(opened.train) < config.batch_size:
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the "
            f"{len(opened.train):,} training images of {config.data.name!r}: make it "
            "smaller"
        )
    return opened


def _decoded(source: Source, config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """Every example with its pixels, as large as the network's input."""
    examples = []
    for i in range(len(source)):
        example = source[i]
        try:
            image = resized_centre(
                example["image"], len(config.data.mean), config.data.image_size
            )
        except BrokenImage as error:
            if config.data.broken_images == "stop":
                raise broken(example["name"], error) from None
            continue
        examples.append({**example, "image": image})
    return examples


def broken(name: str, error: BrokenImage) -> UserError:
    """What ends a run at an image that cannot be read."""
    return UserError(
        f"the image {name} cannot be read ({error}): replace it, or leave such images "
        "out with --config.data.broken_images=skip"
    )


class _Folder:
    """Images in class folders; the label is the class's place in sorted order."""

    def __init__(self, root: pathlib.Path, classes: Sequence[str]):
        self.root = root
        self.files = [
            (f"{name}/{file}", label)
            for label, name in enumerate(classes)
            if (root / name).is_dir()
            for file in sorted(_visible(root / name, folders=False))
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self.files[index]
        path = self.root / file
        return {"image": path.read_bytes(), "label": label, "name": str(path)}


def _visible(folder: pathlib.Path, folders: bool) -> list[str]:
    """Names of the folders, or of the files, in a folder; hidden ones left out."""
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if entry.is_dir() == folders and not entry.name.startswith(".")
        ]


def _open_folder(config: ml_collections.ConfigDict) -> Data:
    root = pathlib.Path(config.data.dir)
    splits = [root / config.data.train_split, root / config.data.test_split]
    for split in splits:
        if not split.is_dir() or not _visible(split, folders=True):
            raise UserError(
                f"there are no class folders in {split}: config.data.dir holds "
                "<split>/<class>/<image>, and config.data.train_split and test_split "
                "name the splits"
            )
    classes = sorted(_visible(splits[0], folders=True))
    strangers = sorted(set(_visible(splits[1], folders=True)) - set(classes))
    if strangers:
        raise UserError(
            f"the class {strangers[0]!r} is in {splits[1]} but not in {splits[0]}: "
            "every class to test on is one to train on"
        )
    train, test = (_Folder(split, classes) for split in splits)
    return Data(train, test, len(classes))


class _Records:
    """A split of TFDS, with a name for each example."""

    def __init__(self, source: Any, split: str):
        self.source = source
        self.split = split

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        file = example.get("file_name", b"").decode()
        name = file or f"number {index} of the split {self.split!r}"
        return {"image": example["image"], "label": example["label"], "name": name}


def _open_tfds(config: ml_collections.ConfigDict) -> Data:
    builder = _builder(config)
    name = config.data.name
    if name in BUILDERS:
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download
            builder.download_and_prepare()
    else:
        builder = _prepared(builder, config)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"the data set {name!r} has no image and label, but {', '.join(features)}: "
            "choose one for classification"
        )
    channels = features["image"].shape[-1]
    for field in ("mean", "std"):
        if len(config.data[field]) != channels:
            raise UserError(
                f"config.data.{field} has {len(config.data[field])} numbers, but the "
                f"images of {name!r} have {channels} channels: one for each"
            )
    train, test = (
        _Records(builder.as_data_source(split, decoders=SKIP_DECODING), split)
        for split in (config.data.train_split, config.data.test_split)
    )
    return Data(train, test, features["label"].num_classes)


def _prepared(builder: Any, config: ml_collections.ConfigDict) -> Any:
    """The builder of the files that are there, whatever formats they come in."""
    name, path = config.data.name, builder.data_path
    if not builder.is_prepared():
        raise UserError(
            f"the data set {name!r} is not prepared in {path}: name the folder that "
            "holds it with --config.data.dir=..., or prepare it once"
            f"{_preparation(name, config.data.dir)}"
        )
    # TFDS's own class forgets formats that were added later.
    builder = tfds.builder_from_directory(path)
    formats = {x.value for x in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{path} holds files of the format {', '.join(sorted(formats))}, which "
            "cannot be read in any order: convert them once with python experiments/"
            f"prepare.py --name=from_tfrecord --source={path} --data_dir=..., and name "
            "that folder with --config.data.dir=..."
        )
    return builder


def _preparation(name: str, data_dir: str) -> str:
    """How a data set is prepared: the end of a sentence."""
    if name == "fashion_mnist":
        where = f" --data_dir={data_dir}" if data_dir else ""
        return f" with python experiments/prepare.py --name={name}{where}"
    if name.startswith("imagenet2012"):
        return ", as docs/imagenet.md says"
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        ". TFDS does that with TensorFlow, in an environment of its own: python -m "
        "venv tf && tf/bin/pip install tensorflow-cpu tensorflow-datasets array_record "
        'importlib_resources && tf/bin/python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}, file_format='array_record')"
        '.download_and_prepare()"'
    )


def _builder(config: ml_collections.ConfigDict) -> Any:
    tfds.disable_progress_bar()
    data_dir = config.data.dir or None
    if config.data.name in BUILDERS:
        builder = BUILDERS[config.data.name]
        return builder(data_dir=data_dir, file_format="array_record")
    try:
        return tfds.builder(config.data.name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"config.data.name is 'digits', 'folder' or a data set of TFDS, got "
            f"{config.data.name!r}"
        ) from None
