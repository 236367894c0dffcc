"""Where images come from: TFDS, builders of our own, or a folder of class folders.

A source gives ``{"image", "label", "name"}`` at random access: encoded bytes, or pixels
where ``config.data.in_memory`` decoded them once. Reading needs no TensorFlow.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_collections
import tensorflow_datasets as tfds

from data.builders.digits import Digits
from data.decoding import BrokenImage, resized_centre
from data.files import read_file
from errors import UserError

__all__ = ["Data", "Unreadable", "load", "read"]

BUILDERS = {"digits": Digits}
FOLDER = "folder"
SKIP_DECODING = {"image": tfds.decode.SkipDecoding()}
MOST_TRIED = 1000  # images of a split before none of it counts as readable


class Source(Protocol):
    """Examples at random access."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"image", "label", "name"}``, or Unreadable."""


class Opened(Source, Protocol):
    """A source of what lies on a disk."""

    def digest(self) -> str:
        """Another one if there are other images, as far as is told without reading."""


class Data(NamedTuple):
    """A prepared data set.

    Attributes:
        train: Random-access source of training examples.
        test: Random-access source of test examples.
        num_classes: Number of labels.
        skipped_train: Training examples that are not among them, as broken.
        skipped_test: Test examples that are not among them, as broken.
        identity: What tells, after a restart, whether it is still the same: of train
            and test the number of images and a digest.
    """

    train: Source
    test: Source
    num_classes: int
    skipped_train: int = 0
    skipped_test: int = 0
    identity: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({})


class Unreadable(UserError):  # noqa: N818  it is about the image
    """An image that cannot be read: what is the matter, and what to do."""

    def __str__(self) -> str:
        return ": ".join(self.args)


def load(config: ml_collections.ConfigDict) -> Data:
    """Opens the data set that ``config.data`` names; prepares it if that needs no net.

    Raises:
        UserError: If the data set is unknown, not prepared yet, or does not fit the
            configuration.
    """
    data = _open_folder(config) if config.data.name == FOLDER else _open_tfds(config)
    if not len(data.test):
        raise UserError(
            f"config.data.test_split {config.data.test_split!r} of "
            f"{config.data.name!r} has no image: name a split to test on"
        )
    if config.data.in_memory:
        train, test = (_decoded(source, len(source), config) for source in data[:2])
        skipped = len(data.train) - len(train), len(data.test) - len(test)
        data = data._replace(
            train=train, test=test, skipped_train=skipped[0], skipped_test=skipped[1]
        )
    else:
        for source in data[:2]:
            _decoded(source, 1, config)
    if len(data.train) < config.batch_size:
        left_out = f", without {data.skipped_train:,} that cannot be read"
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the "
            f"{len(data.train):,} training images of {config.data.name!r}"
            f"{left_out if data.skipped_train else ''}: make it smaller"
        )
    return data


def _data(train: Opened, test: Opened, num_classes: int) -> Data:
    """A data set that was opened, with what tells whether it is the same."""
    identity = {
        name: {"images": len(source), "digest": source.digest()}
        for name, source in (("train", train), ("test", test))
    }
    return Data(train, test, num_classes, identity=identity)


def _digest(lines: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decoded(
    source: Source, wanted: int, config: ml_collections.ConfigDict
) -> list[dict[str, Any]]:
    """So many examples, with pixels as large as the network's input.

    Raises:
        Unreadable: At the first image that cannot be read and is not to be left out.
        UserError: If none can be read.
    """
    size, channels = config.data.image_size, len(config.data.mean)
    most = config.data.max_pixels
    examples: list[dict[str, Any]] = []
    faults: list[str] = []
    for index in range(len(source)):
        if len(examples) == wanted or (not examples and index == MOST_TRIED):
            break
        try:
            examples.append(
                read(source, index, lambda x: resized_centre(x, channels, size, most))
            )
        except Unreadable as error:
            if config.data.broken_images == "stop":
                raise
            faults.append(error.args[0])
    if faults and not examples:
        raise UserError(
            f"config.data.broken_images is 'skip', but none of {len(faults):,} images "
            f"can be read: {faults[0]}"
        )
    return examples


def read(source: Source, index: int, pixels: Callable[[Any], Any]) -> dict[str, Any]:
    """An example, with what ``pixels`` makes of its image.

    Raises:
        Unreadable: If the source, or ``pixels``, cannot read it.
    """
    example = source[index]
    try:
        return {**example, "image": pixels(example["image"])}
    except BrokenImage as error:
        raise _unreadable(example["name"], error, "replace it") from None


def _unreadable(name: str, error: Exception, mend: str) -> Unreadable:
    """What ends a run at an image that cannot be read."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return Unreadable(
        f"the image {name} cannot be read ({reason})",
        f"{mend}, or leave such images out with --config.data.broken_images=skip",
    )


class _Folder:
    """Images in class folders; the label is the class's place in sorted order."""

    def __init__(self, root: pathlib.Path, classes: Sequence[str], max_pixels: int):
        self.root = root
        self.max_pixels = max_pixels
        there = _visible(root, folders=True)
        self.files = [
            (f"{name}/{file}", label)
            for label, name in enumerate(classes)
            if name in there
            for file in sorted(_visible(root / name, folders=False))
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self.files[index]
        path = str(self.root / file)
        try:
            image = read_file(path, self.max_pixels)
        except BrokenImage as error:
            raise _unreadable(path, error, "replace it") from None
        return {"image": image, "label": label, "name": path}

    def digest(self) -> str:
        """Of names, labels and sizes of all files."""
        return _digest(
            (file, label, _bytes_in(self.root / file)) for file, label in self.files
        )


def _bytes_in(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # told when it is read
        return None


def _visible(folder: pathlib.Path, folders: bool) -> list[str]:
    """Names of the folders, or of all else, in a folder; hidden ones left out.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if _is_folder(entry) == folders and not entry.name.startswith(".")
            ]
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be read ({error.strerror or error}): see "
            "whether it is there, and whether you may list it"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False


def _open_folder(config: ml_collections.ConfigDict) -> Data:
    root = pathlib.Path(config.data.dir)
    splits = [root / config.data.train_split, root / config.data.test_split]
    for split in splits:
        if not os.path.isdir(split) or not _visible(split, folders=True):
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
    most = config.data.max_pixels
    train, test = (_Folder(split, classes, most) for split in splits)
    return _data(train, test, len(classes))


class _Records:
    """A split of TFDS, with a name for each example."""

    def __init__(self, source: Any, split: str, builder: Any):
        self.source = source
        self.place = f"of the split {split!r} in {builder.data_path}"
        self.info = builder.info

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"number {index} {self.place}"
        try:
            example = self.source[index]
            file = example.get("file_name", b"").decode(errors="replace")
            image, label = example["image"], example["label"]
        except Exception as error:  # what TFDS raises of a damaged file is anything
            raise _unreadable(name, error, "prepare the data set again") from None
        return {"image": image, "label": label, "name": file or name}

    def digest(self) -> str:
        """Of name and version of the data set, its labels and its splits.

        Not of its files: the same images may have been packed anew elsewhere.
        """
        splits = sorted(
            (name, split.num_examples) for name, split in self.info.splits.items()
        )
        return _digest([self.info.full_name, self.info.features["label"].names, splits])


@contextlib.contextmanager
def _opening(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Says in a sentence what TFDS finds wrong with the files of a data set."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged descriptions make it raise anything
        reason = " ".join(str(error).split())[-300:] or type(error).__name__
        raise UserError(
            f"the data set {config.data.name!r} in {config.data.dir or 'its folder'} "
            f"cannot be opened ({reason}): copy it again, or prepare it again"
        ) from None


def _open_tfds(config: ml_collections.ConfigDict) -> Data:
    name = config.data.name
    with _opening(config):
        builder = _builder(config)
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
        _records(builder, split)
        for split in (config.data.train_split, config.data.test_split)
    )
    return _data(train, test, features["label"].num_classes)


def _records(builder: Any, split: str) -> _Records:
    """A split whose files are there."""
    source = builder.as_data_source(split, decoders=SKIP_DECODING)
    for part in builder.info.splits[split].file_instructions:
        path = pathlib.Path(part.filename)
        if not path.is_file() or not path.stat().st_size:
            raise UserError(
                f"{path} is {'empty' if path.is_file() else 'missing'}: copy the data "
                "set again, or prepare it again"
            )
    return _Records(source, split, builder)


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
