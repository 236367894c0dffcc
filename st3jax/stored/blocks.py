"""The blocks of a compact file: which values are not zero, and what they are."""

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st3jax.stored.header import Leaf, shown

__all__ = ["as_dense", "as_sparse", "bits_of", "packed", "unpacked", "zstandard"]

LEVEL = 3  # of zstd
FRAME = b"\x28\xb5\x2f\xfd"  # begins one that is not skipped
CHUNK = 2**14  # bytes of a mask that are taken apart at once


def zstandard() -> Any:
    """The library that compresses, which st3jax can be imported without.

    Raises:
        ImportError: If it is not installed.

    Example:
        >>> zstandard().__name__
        'zstandard'
    """
    try:
        import zstandard
    except ImportError:
        raise ImportError(
            "compact files are compressed with zstandard, which is not installed: "
            "pip install zstandard"
        ) from None
    return zstandard


def bits_of(leaf: Any) -> np.ndarray:
    """The values of an array in C order, as unsigned integers of the same bits.

    Example:
        >>> bits_of(np.array([[-0.0, 1.0]], np.float32)).tolist()
        [2147483648, 1065353216]
    """
    array = np.ascontiguousarray(leaf).reshape(-1)
    if array.dtype == bool:
        array = array.view(np.uint8) != 0  # a view of other bytes is true, too
    if array.dtype.byteorder == ">":
        array = array.byteswap()
    return array.view(f"<u{array.itemsize}")


def packed(bits: np.ndarray) -> tuple[int | None, bytes, bytes]:
    """A block: a mask and what it keeps, or all values if that is less.

    Args:
        bits: As of :func:`bits_of`.

    Returns:
        How many values the mask keeps, ``None`` if there is no mask; the content; and
        the same compressed, which is the block.

    Example:
        >>> kept, content, _ = packed(np.uint16([0] * 8 + [0x1234, 0, 0x5678]))
        >>> kept, content.hex(" ")
        (2, '00 05 34 78 12 56')
    """
    is_kept = bits != 0
    kept: int | None = int(np.count_nonzero(is_kept))
    mask = np.packbits(is_kept, bitorder="little").tobytes()
    content = mask + _shuffled(bits[np.flatnonzero(is_kept)])
    if len(content) >= bits.nbytes:
        kept, content = None, _shuffled(bits)
    compressor = zstandard().ZstdCompressor(level=LEVEL)
    return kept, content, compressor.compress(content) if content else b""


def _shuffled(bits: np.ndarray) -> bytes:
    """All first bytes, then all second ones: those that are alike lie together."""
    return bits.view(np.uint8).reshape(-1, bits.itemsize).T.tobytes()


def unpacked(leaf: Leaf, block: bytes) -> tuple[np.ndarray | None, np.ndarray]:
    """A block taken apart, if it is what the header says of it.

    Args:
        leaf: What the header says.
        block: The bytes in the file.

    Returns:
        The mask, a bit for each value, uint8 [bytes], or ``None``; and the values as
        of :func:`bits_of`.

    Raises:
        ValueError: If the block is damaged.

    Example:
        >>> kept, content, block = packed(np.uint16([0] * 8 + [0x1234, 0, 0x5678]))
        >>> dtype = np.dtype("int16")
        >>> leaf = Leaf(("a",), dtype, (11,), 2, len(block), zlib.crc32(content))
        >>> [x.tolist() for x in unpacked(leaf, block)]
        [[0, 5], [4660, 22136]]
    """
    width, count = leaf.dtype.itemsize, leaf.size if leaf.kept is None else leaf.kept
    ahead = 0 if leaf.kept is None else -(-leaf.size // 8)
    content = _decompressed(leaf, block, ahead + count * width) if block else b""
    data = np.frombuffer(content, np.uint8)
    mask, planes = data[:ahead], data[ahead:].reshape(width, count)
    if ahead:
        outside = leaf.size % 8 and mask[-1] >> leaf.size % 8
        if outside or int(np.bitwise_count(mask).sum(dtype=np.int64)) != count:
            raise ValueError(f"the mask of {shown(leaf.path)} has other bits set")
    if leaf.dtype == bool and (planes > 1).any():
        raise ValueError(f"{shown(leaf.path)} has values that are no truth values")
    values = np.empty((count, width), np.uint8)
    for byte, plane in enumerate(planes):
        values[:, byte] = plane
    return mask if ahead else None, values.reshape(-1).view(f"<u{width}")


def _decompressed(leaf: Leaf, block: bytes, length: int) -> bytes:
    """A block's content; memory is taken for the length that is expected alone."""
    library, where = zstandard(), shown(leaf.path)
    if not block.startswith(FRAME):
        raise ValueError(f"the block of {where} is damaged: it is no frame of zstd")
    try:
        if library.get_frame_parameters(block).content_size != length:
            raise ValueError(f"the block of {where} says that it is of another length")
        content = library.ZstdDecompressor().decompress(block, allow_extra_data=False)
    except library.ZstdError as error:
        raise ValueError(f"the block of {where} is damaged: {error}") from None
    if len(content) != length or zlib.crc32(content) != leaf.crc32:
        raise ValueError(f"{where} is damaged: the checksum does not fit")
    return content


def as_dense(leaf: Leaf, mask: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """The leaf with its zeros.

    Example:
        >>> leaf = Leaf(("a",), np.dtype("int16"), (2, 2), 1, 0, 0)
        >>> as_dense(leaf, np.uint8([4]), np.uint16([7])).tolist()
        [[0, 0], [7, 0]]
    """
    dense = values
    if mask is not None:
        dense = np.zeros(leaf.size, values.dtype)
        for begin, places, used in _places(mask):
            dense[begin:][places] = values[used : used + len(places)]
    return dense.view(leaf.dtype).reshape(leaf.shape)


def as_sparse(leaf: Leaf, mask: np.ndarray, values: np.ndarray, kind: str) -> Any:
    """The leaf as an array of JAX that knows where its values are.

    Args:
        leaf: Of two or more axes.
        mask: As of :func:`unpacked`.
        values: As of :func:`unpacked`.
        kind: ``"bcoo"``, or ``"bcsr"`` for a leaf of two axes.

    Raises:
        ValueError: If JAX, as it is set, cannot hold the leaf's dtype.

    Example:
        >>> leaf = Leaf(("a",), np.dtype("int16"), (2, 2), 1, 0, 0)
        >>> as_sparse(leaf, np.uint8([4]), np.uint16([7]), "bcoo").indices.tolist()
        [[1, 0]]
    """
    from jax.experimental import sparse

    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise ValueError(
            f"{shown(leaf.path)} is of dtype {leaf.dtype}, and JAX is set to 32 bits: "
            "let it have 64, or load dense"
        )
    flat = np.empty(len(values), np.int64)
    for begin, places, used in _places(mask):
        flat[used : used + len(places)] = begin + places
    where = np.empty((len(flat), len(leaf.shape)), np.int32)
    for axis in reversed(range(len(leaf.shape))):
        flat, where[:, axis] = np.divmod(flat, leaf.shape[axis])
    data = jnp.asarray(values.view(leaf.dtype))
    order = {"indices_sorted": True, "unique_indices": True}
    if kind == "bcoo":
        return sparse.BCOO((data, jnp.asarray(where)), shape=leaf.shape, **order)
    counts = np.bincount(where[:, 0], minlength=leaf.shape[0])
    ends = np.append(0, np.cumsum(counts)).astype(np.int32)
    columns = jnp.asarray(where[:, 1])
    return sparse.BCSR((data, columns, jnp.asarray(ends)), shape=leaf.shape, **order)


def _places(mask: np.ndarray) -> Iterator[tuple[int, np.ndarray, int]]:
    """A mask's bits by chunk: its begin, places from there, how many came before."""
    used = 0
    for begin in range(0, len(mask), CHUNK):
        bits = np.unpackbits(mask[begin : begin + CHUNK], bitorder="little")
        places = np.flatnonzero(bits)
        yield 8 * begin, places, used
        used += len(places)
