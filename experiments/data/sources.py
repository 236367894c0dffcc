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
        _check_memory(opened, config)
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


def _check_memory(data: Data, config: ml_collections.ConfigDict) -> None:
    """Raises if decoded images are more than the memory holds."""
    size, channels = config.data.image_size, len(config.data.mean)
    need = (len(data.train) + len(data.test)) * size**2 * channels
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise UserError(
            f"config.data.in_memory keeps {need / 1e9:,.1f} GB of pixels, and there "
            f"are {memory / 1e9:,.1f} GB of memory: set it to false, or make "
            f"config.data.image_size smaller, which is {size}"
        )


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
    splits = [_split_folder(config, name) for name in ("train_split", "test_split")]
    for split in splits:
        if not _class_folders(split):
            raise UserError(
                f"there are no class folders in {split}: config.data.dir holds "
                "<split>/<class>/<image>, and config.data.train_split and test_split "
                "name the splits"
            )
    if splits[0].samefile(splits[1]):
        raise _overlap(config)
    classes = sorted(_class_folders(splits[0]))
    strangers = sorted(set(_class_folders(splits[1])) - set(classes))
    if strangers:
        raise UserError(
            f"the class {strangers[0]!r} is in {splits[1]} but not in {splits[0]}: "
            "every class to test on is one to train on"
        )
    train, test = (_Folder(split, classes) for split in splits)
    return Data(train, test, len(classes))


def _split_folder(config: ml_collections.ConfigDict, field: str) -> pathlib.Path:
    """Where the images of a split are: inside ``config.data.dir``."""
    name = pathlib.PurePath(os.path.normpath(config.data[field]))
    if name.is_absolute() or name.parts[:1] in ((), ("..",)):
        raise UserError(
            f"config.data.{field} is the name of a folder in config.data.dir, got "
            f"{config.data[field]!r}"
        )
    return pathlib.Path(os.path.expanduser(config.data.dir)) / name


def _class_folders(split: pathlib.Path) -> list[str]:
    """Names of the classes; none where there is no such folder."""
    try:
        return _visible(split, folders=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"the folder {split} of config.data.dir cannot be read ({error.strerror})"
        ) from None


def _overlap(config: ml_collections.ConfigDict) -> UserError:
    """What is wrong where images to train on are images to test on."""
    return UserError(
        f"config.data.test_split {config.data.test_split!r} has images of config.data."
        f"train_split {config.data.train_split!r}: test on other images than those to "
        "train on"
    )


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
    name = config.data.name
    if name in BUILDERS:
        builder = _digits(config)
    else:
        builder = _prepared(_builder(config), config)
    features = _features(builder, name)
    channels = features["image"].shape[-1]
    for field in ("mean", "std"):
        if len(config.data[field]) != channels:
            raise UserError(
                f"config.data.{field} has {len(config.data[field])} numbers, but the "
                f"images of {name!r} have {channels} channels: one for each"
            )
    _check_splits(builder, config)
    train, test = (
        _Records(builder.as_data_source(split, decoders=SKIP_DECODING), split)
        for split in (config.data.train_split, config.data.test_split)
    )
    return Data(train, test, features["label"].num_classes)


def _features(builder: Any, name: str) -> dict[str, Any]:
    """What an example has: one image and one label."""
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    features = builder.info.features
    has = dict(features) if hasattr(features, "keys") else {}
    if not all(isinstance(has.get(key), kind) for key, kind in kinds.items()):
        raise UserError(
            f"the data set {name!r} has no image and label, but {', '.join(has)}: "
            "choose one for classification"
        )
    return has


def _check_splits(builder: Any, config: ml_collections.ConfigDict) -> None:
    """Raises unless both splits have images, and none has those of the other."""
    there = ", ".join(map(repr, builder.info.splits))
    parts = []
    for field in ("train_split", "test_split"):
        split = config.data[field]
        try:
            files = builder.info.splits[split].file_instructions
        except Exception:  # TFDS has many ways to say so
            files = []
        if not any(file.take > 0 for file in files):
            raise UserError(
                f"config.data.{field} is one of {there}, or a part of it that has "
                f"images, such as 'train[:90%]', got {split!r}"
            )
        parts.append(
            {file.filename: range(file.skip, file.skip + file.take) for file in files}
        )
    train, test = parts
    for file in train.keys() & test.keys():
        if range(
            max(train[file].start, test[file].start),
            min(train[file].stop, test[file].stop),
        ):
            raise _overlap(config)


def _digits(config: ml_collections.ConfigDict) -> Any:
    """The builder of a data set that is made here."""
    tfds.disable_progress_bar()
    make, data_dir = BUILDERS[config.data.name], config.data.dir
    try:
        builder = make(data_dir=data_dir or None, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download
            builder.download_and_prepare()
    except Exception as error:  # whatever kind of path it is
        raise UserError(
            f"config.data.dir is a folder that can hold {config.data.name!r}, got "
            f"{data_dir!r} ({_first_line(error)})"
        ) from None
    return builder


def _first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.rpartition('}": ')[2][:200]  # TFDS begins with how it was called


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
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:
        raise UserError(
            f"the data set {name!r} in {path} cannot be opened ({_first_line(error)}): "
            "prepare it anew, or name another folder with --config.data.dir=..."
        ) from None
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
    name = config.data.name
    try:
        return tfds.builder(name, data_dir=config.data.dir or None)
    except Exception as error:  # a name that is none, a version, what is not installed
        unknown = isinstance(error, tfds.core.DatasetNotFoundError)
        raise UserError(
            f"config.data.name is 'digits', 'folder' or a data set of TFDS, got "
            f"{name!r}{'' if unknown else f' ({_first_line(error)})'}"
        ) from None
