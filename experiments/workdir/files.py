"""Writing files so that a kill, or a full disk, costs nothing that was there."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from errors import UserError

__all__ = ["replace_file", "writing"]


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old or the new one, whole."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave an empty file
    os.replace(draft, path)


@contextlib.contextmanager
def writing(folder: Any) -> Iterator[None]:
    """Says in a sentence why something could not be written to a folder.

    Raises:
        UserError: If the disk is full, for instance.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"writing to {folder} failed ({lines[-1][-200:]}): the checkpoints before "
            "are intact; make room, and the same command goes on from the last one"
        ) from error
