"""The header of a compact file: what there is, and where; nothing of it is believed."""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["DTYPES", "MOST_NAMES", "Leaf", "make_start", "read_start", "shown"]

MAGIC = b"\x89ST3\r\n\x1a\n"
VERSION = 1
START = struct.Struct("<8sIII")  # magic, version, bytes and CRC-32 of the header
DTYPES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64"),
)
MOST_HEADER = 2**23  # bytes: of some 50,000 leaves
MOST_NAMES = 100  # on the way to a leaf
MOST_AXES = 64  # NumPy's own limit
MOST_VALUES = 2**60  # of an array, where an axis of none counts as one


class Leaf(NamedTuple):
    """What a header says of an array.

    Attributes:
        path: Names on the way to it.
        dtype: What it is made of.
        shape: Its shape.
        kept: How many values are stored behind a mask; ``None`` if there is no mask.
        stored: Bytes of its block in the file.
        crc32: Of what the block unpacks to.

    Example:
        >>> Leaf(("a", "b"), np.dtype("float32"), (3, 2), 1, 9, 0).size
        6
    """

    path: tuple[str, ...]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    kept: int | None
    stored: int
    crc32: int

    @property
    def size(self) -> int:
        """How many values it has, zeros included."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes, if it is dense."""
        return self.size * self.dtype.itemsize


def shown(path: Iterable[str]) -> str:
    r"""The names of a path for a sentence, however long and whatever is in them.

    Example:
        >>> print(shown(("params", "\x1b[31m")))
        'params/\x1b[31m'
    """
    text = "/".join(path)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def make_start(
    entries: list[dict[str, Any]], metadata: Mapping[str, Any] | None
) -> bytes:
    """All that comes before the first block.

    Args:
        entries: What the header is to say of each leaf, in the order of their paths.
        metadata: What it says of the whole.

    Raises:
        TypeError: If JSON cannot hold the metadata.
        ValueError: If the header is too large.

    Example:
        >>> make_start([], {"seed": 7})[START.size :]
        b'{"leaves":[],"metadata":{"seed":7}}'
    """
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata is a dict, got {type(metadata).__name__}")
    header = {"leaves": entries, "metadata": dict(metadata or {})}
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        _parsed(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata is a dict that JSON can hold: {error}") from None
    if len(text) > MOST_HEADER:
        raise ValueError(
            f"a header has at most {MOST_HEADER:,} bytes, but paths and metadata make "
            f"{len(text):,}"
        )
    return START.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text


def read_start(
    file: BinaryIO,
) -> tuple[dict[str, Any], dict[tuple[str, ...], Leaf | None]]:
    """The header as it stands there, and what it says of the leaves, checked.

    Args:
        file: An open file, at its beginning; afterwards at the first block.

    Returns:
        The header; and from path to leaf, ``None`` for an empty dict.

    Raises:
        ValueError: If it is no header, or none that fits the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(make_start([{"path": ["a"]}], None)), file.seek(0)
        ...     read_start(file)
        ({'leaves': [{'path': ['a']}], 'metadata': {}}, {('a',): None})
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(START.size)
    if not start.startswith(MAGIC):
        raise ValueError("it does not begin as a file of save_sparse does")
    if len(start) < START.size:
        raise ValueError(f"it is cut after {size:,} bytes")
    _, version, length, crc32 = START.unpack(start)
    if version != VERSION:
        raise ValueError(f"it is of version {version}, and this st3jax reads {VERSION}")
    if length > MOST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {MOST_HEADER:,}")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"it is cut after {size:,} bytes, within its header")
    if zlib.crc32(text) != crc32:
        raise ValueError("its header is damaged: the checksum does not fit")
    header = _parsed(text)
    leaves = _leaves(header["leaves"])
    blocks = sum(leaf.stored for leaf in leaves.values() if leaf)
    if size != START.size + length + blocks:
        raise ValueError(
            f"it has {size:,} bytes, but {START.size + length + blocks:,} by its "
            "header: it is cut, or something was added"
        )
    return header, leaves


def _parsed(text: bytes) -> dict[str, Any]:
    """The header of its text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        header = json.loads(
            text.decode(), object_pairs_hook=once, parse_constant=refuse
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {error}") from None
    kinds = {"leaves": list, "metadata": dict}
    if not isinstance(header, dict) or not all(
        isinstance(header.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError("its header has no list of leaves, or no dict of metadata")
    return header


def _leaves(entries: list[Any]) -> dict[tuple[str, ...], Leaf | None]:
    """All leaves, each in a place of its own."""
    leaves: dict[tuple[str, ...], Leaf | None] = {}
    before: tuple[str, ...] = ()
    for entry in entries:
        path = _path(entry)
        within = before and path[: len(before)] == before
        if path <= before or within:
            raise ValueError(
                f"{shown(path)} follows {shown(before)}: paths are sorted, and none is "
                "within another"
            )
        leaves[path] = _leaf(path, entry) if "dtype" in entry else None
        before = path
    return leaves


def _path(entry: Any) -> tuple[str, ...]:
    path = entry.get("path") if isinstance(entry, dict) else None
    if not (
        isinstance(path, list)
        and 1 <= len(path) <= MOST_NAMES
        and all(isinstance(name, str) for name in path)
    ):
        raise ValueError(f"the path of a leaf is a list of 1 to {MOST_NAMES} texts")
    return tuple(path)


def _leaf(path: tuple[str, ...], entry: dict[str, Any]) -> Leaf:
    """A leaf whose description makes sense by itself."""
    dtype, shape = entry["dtype"], entry.get("shape")
    if dtype not in DTYPES:
        raise ValueError(f"{shown(path)} is of an unknown dtype")
    if not (
        isinstance(shape, list)
        and len(shape) <= MOST_AXES
        and all(_is_count(length) for length in shape)
        and math.prod(max(length, 1) for length in shape) <= MOST_VALUES
    ):
        raise ValueError(f"the shape of {shown(path)} is none that an array can have")
    size, kept = math.prod(shape), entry.get("kept")
    if not (kept is None or (_is_count(kept) and kept <= size)):
        raise ValueError(f"{shown(path)} keeps more values than it has")
    layout = entry.get("layout", "o" * len(shape))
    if not (
        isinstance(layout, str)
        and len(layout) == len(shape)
        and set(layout) <= set("swio")
    ):
        raise ValueError(f"the layout of {shown(path)} does not fit its shape")
    stored, crc32 = entry.get("bytes", -1), entry.get("crc32", -1)
    if not (_is_count(stored) and _is_count(crc32)) or bool(stored) != bool(size):
        raise ValueError(f"the block of {shown(path)} has no size that it can have")
    return Leaf(path, jnp.dtype(dtype), tuple(shape), kept, stored, crc32)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
