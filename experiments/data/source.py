"""What a source of images gives, and what is told of one that cannot be read."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import ml_collections

from data.headers import BrokenImage
from errors import UserError

__all__ = ["Opened", "Source", "Unreadable", "digest", "overlap", "read", "unreadable"]


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


class Unreadable(UserError):  # noqa: N818  it is about the image
    """An image that cannot be read: what is the matter, and what to do."""

    def __str__(self) -> str:
        return ": ".join(self.args)


def read(source: Source, index: int, pixels: Callable[[Any], Any]) -> dict[str, Any]:
    """An example, with what ``pixels`` makes of its image.

    Raises:
        Unreadable: If the source, or ``pixels``, cannot read it.
    """
    example = source[index]
    try:
        return {**example, "image": pixels(example["image"])}
    except BrokenImage as error:
        raise unreadable(example["name"], error, "replace it") from None


def unreadable(name: str, error: Exception, mend: str) -> Unreadable:
    """What ends a run at an image that cannot be read."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return Unreadable(
        f"the image {name} cannot be read ({reason})",
        f"{mend}, or leave such images out with --config.data.broken_images=skip",
    )


def overlap(config: ml_collections.ConfigDict) -> UserError:
    """What is wrong where images to train on are images to test on."""
    return UserError(
        f"config.data.test_split {config.data.test_split!r} has images of config.data."
        f"train_split {config.data.train_split!r}: test on other images than those to "
        "train on"
    )


def digest(lines: Iterable[Any]) -> str:
    """Of facts about the images of a source."""
    found = hashlib.blake2b(digest_size=16)
    for line in lines:
        found.update(f"{line}\n".encode(errors="surrogateescape"))
    return found.hexdigest()
