"""The images of a run: which there are, and which of them can be read.

A source gives ``{"image", "label", "name"}`` at random access: encoded bytes, or pixels
where ``config.data.in_memory`` decoded them once.
"""

import os
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from data.builders.digits import Digits
from data.decoding import resized_centre
from data.folders import open_folder
from data.records import open_tfds
from data.source import Opened, Source, Unreadable, read
from errors import UserError

__all__ = ["Data", "load"]

BUILDERS = {"digits": Digits}
MOST_TRIED = 1000  # images of a split before none of it counts as readable


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


def load(config: ml_collections.ConfigDict) -> Data:
    """Opens the data set that ``config.data`` names; prepares it if that needs no net.

    Raises:
        UserError: If the data set is unknown, not prepared yet, or does not fit the
            configuration.
    """
    name = config.data.name
    opened = (
        open_folder(config)
        if name == "folder"
        else open_tfds(config, BUILDERS.get(name))
    )
    data = _with_identity(*opened)
    if not len(data.test):
        raise UserError(
            f"config.data.test_split {config.data.test_split!r} of "
            f"{config.data.name!r} has no image: name a split to test on"
        )
    if config.data.in_memory:
        _check_memory(data, config)
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


def _with_identity(train: Opened, test: Opened, num_classes: int) -> Data:
    """A data set that was opened, with what tells whether it is the same."""
    identity = {
        name: {"images": len(source), "digest": source.digest()}
        for name, source in (("train", train), ("test", test))
    }
    return Data(train, test, num_classes, identity=identity)


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
