"""Data sets of TFDS, and builders of our own, read without TensorFlow."""

import contextlib
import io
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import tensorflow_datasets as tfds

from data.source import Opened, digest, overlap, unreadable
from errors import UserError

__all__ = ["open_tfds"]

SKIP_DECODING = {"image": tfds.decode.SkipDecoding()}


class _Records:
    """A split of TFDS, with a name for each example."""

    def __init__(self, source: Any, split: str, builder: Any):
        self.source = source
        self.place = f"of the split {split!r} in {builder.data_path}"
        labels = builder.info.features["label"].names
        splits = {key: x.num_examples for key, x in builder.info.splits.items()}
        self.facts = [builder.info.full_name, labels, *sorted(splits.items())]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"number {index} {self.place}"
        try:
            example = self.source[index]
            file = example.get("file_name", b"").decode(errors="replace")
            image, label = example["image"], example["label"]
        except Exception as error:  # what TFDS raises of a damaged file is anything
            raise unreadable(name, error, "prepare the data set again") from None
        return {"image": image, "label": label, "name": file or name}

    def digest(self) -> str:
        """Of name and version of the data set, its labels and its splits.

        Not of its files: the same images may have been packed anew elsewhere.
        """
        return digest(self.facts)


def open_tfds(
    config: ml_collections.ConfigDict, make: Callable[..., Any] | None
) -> tuple[Opened, Opened, int]:
    """Sources of images to train and to test on, and how many classes there are.

    Args:
        config: A configuration that names the data set.
        make: The class of its builder, if that prepares it without a network.

    Raises:
        UserError: If ``config.data`` names no data set that is there and fits.
    """
    with _opening(config):
        builder = _made_here(config, make) if make else _prepared(config)
        features = _features(builder, config.data.name)
        _check_channels(features["image"].shape[-1], config)
        _check_splits(builder, config)
        train, test = (
            _records(builder, split)
            for split in (config.data.train_split, config.data.test_split)
        )
    return train, test, features["label"].num_classes


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


def _check_channels(channels: int, config: ml_collections.ConfigDict) -> None:
    for field in ("mean", "std"):
        if len(config.data[field]) != channels:
            raise UserError(
                f"config.data.{field} has {len(config.data[field])} numbers, but the "
                f"images of {config.data.name!r} have {channels} channels: one for each"
            )


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
            raise overlap(config)


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


def _made_here(config: ml_collections.ConfigDict, make: Callable[..., Any]) -> Any:
    """The builder of a data set that is made here."""
    tfds.disable_progress_bar()
    data_dir = config.data.dir
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


def _prepared(config: ml_collections.ConfigDict) -> Any:
    """The builder of the files that are there, whatever formats they come in."""
    builder = _builder(config)
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
    name, data_dir = config.data.name, config.data.dir
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # a name that is none, a version, what is not installed
        unknown = isinstance(error, tfds.core.DatasetNotFoundError)
        folder = re.match(r"\w*", name)[0]  # type: ignore[index]  # matches always
        if folder and not unknown and (pathlib.Path(data_dir) / folder).is_dir():
            raise  # it is there, and damaged
        raise UserError(
            f"config.data.name is 'digits', 'folder' or a data set of TFDS, got "
            f"{name!r}{'' if unknown else f' ({_first_line(error)})'}"
        ) from None
