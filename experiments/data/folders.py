"""Images in folders: ``<split>/<class>/<image>``."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from data.files import read_file
from data.headers import BrokenImage
from data.source import Opened, digest, overlap, unreadable
from errors import UserError

__all__ = ["open_folder"]


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
            raise unreadable(path, error, "replace it") from None
        return {"image": image, "label": label, "name": path}

    def digest(self) -> str:
        """Of names, labels and sizes of all files."""
        return digest(
            (file, label, _bytes_in(self.root / file)) for file, label in self.files
        )


def open_folder(config: ml_collections.ConfigDict) -> tuple[Opened, Opened, int]:
    """Sources of images to train and to test on, and how many classes there are.

    Raises:
        UserError: If ``config.data`` names no such folders.
    """
    splits = [_split_folder(config, name) for name in ("train_split", "test_split")]
    for split in splits:
        if not _class_folders(split):
            raise UserError(
                f"there are no class folders in {split}: config.data.dir holds "
                "<split>/<class>/<image>, and config.data.train_split and test_split "
                "name the splits"
            )
    if splits[0].samefile(splits[1]):
        raise overlap(config)
    classes = sorted(_class_folders(splits[0]))
    strangers = sorted(set(_class_folders(splits[1])) - set(classes))
    if strangers:
        raise UserError(
            f"the class {strangers[0]!r} is in {splits[1]} but not in {splits[0]}: "
            "every class to test on is one to train on"
        )
    most = config.data.max_pixels
    train, test = (_Folder(split, classes, most) for split in splits)
    return train, test, len(classes)


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
    return _visible(split, folders=True) if os.path.isdir(split) else []


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
