"""Digests of a checkpoint's files: what tells damage from whatever else goes wrong."""

import hashlib
import json
import pathlib

from workdir.files import replace_file

__all__ = ["find_damage", "write_digests"]

_LIST = "files.json"
# Written once more afterwards, and not needed to read the rest.
_LATER = (_LIST, "commit_success.txt", "_CHECKPOINT_METADATA")


def write_digests(checkpoint: pathlib.Path) -> None:
    """Leaves a list of all files in the folder of a checkpoint, with their digests."""
    digests = {
        str(path.relative_to(checkpoint)): _digest(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in _LATER
    }
    replace_file(
        checkpoint / _LIST,
        json.dumps({"blake2b": digests, "of_this_list": _of_list(digests)}, indent=1),
    )


def find_damage(checkpoint: pathlib.Path) -> str | None:
    """What is not as it was written; ``None`` if nothing is, or nothing can be proved.

    Raises:
        OSError: If a file cannot be read, which is no damage.
    """
    try:
        listed = json.loads((checkpoint / _LIST).read_bytes())
        digests = listed["blake2b"]
        whole = listed["of_this_list"] == _of_list(digests)
        whole = whole and all(map(_is_inside, digests))
    except (FileNotFoundError, RecursionError, ValueError, LookupError, TypeError):
        whole = False
    for name, digest in digests.items() if whole else ():
        try:
            if not (checkpoint / name).is_file() and (checkpoint / name).exists():
                return f"{name} is no ordinary file"
            if _digest(checkpoint / name) != digest:
                return f"{name} holds other bits than were written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def _is_inside(name: str) -> bool:
    path = pathlib.PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _of_list(digests: dict[str, str]) -> str:
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode()).hexdigest()
