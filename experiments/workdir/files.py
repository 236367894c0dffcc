"""Writing files so that a kill, or a full disk, costs nothing that was there."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from errors import UserError

__all__ = ["cause", "draft_of", "replace_file", "writing"]

# What an operating system says of a disk, in the words that libraries pass on.
_SAID = [
    os.strerror(number)
    for number in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
        *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE),
        *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT),
    )
]


@contextlib.contextmanager
def draft_of(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write in the place of another, which it replaces when it is whole."""
    draft = path.with_name(f"{path.name}.draft")
    if draft.is_symlink():  # or what it leads to would be written over
        draft.unlink()
    yield draft
    with draft.open("rb") as file:
        os.fsync(file.fileno())  # or a power cut could leave an empty file
    os.replace(draft, path)


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old or the new one, whole."""
    with draft_of(path) as draft:
        draft.write_text(text)


def cause(error: BaseException) -> str:
    """Why something could not be read or written, in the operating system's words.

    Libraries wrap them in text about their own insides, or in other errors.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for each in chain:
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
    text = " ".join(map(str, chain))
    words = next((words for words in _SAID if words in text), None)
    first = (str(error).strip().splitlines() or [""])[0]
    return words or f"{type(error).__name__}: {first[:200]}"


@contextlib.contextmanager
def writing(folder: Any) -> Iterator[None]:
    """Says in a sentence why something could not be written to a folder.

    Raises:
        UserError: If the disk is full, for instance.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = cause(error)
        full = reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        name = getattr(error, "filename", None)
        place = f" at {name}" if name and not full else ""
        raise UserError(
            f"writing to {folder} failed ({reason}{place}): the checkpoints before are "
            f"intact; {'make room' if full else 'mend that'}, and the same command "
            "goes on from the last one"
        ) from error
