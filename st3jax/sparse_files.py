"""Compact files: a tree of arrays with zeros in one file, to the bit, and back.

``docs/files.md`` has the layout: a header in JSON, and a block for each leaf, in which
a bit for each weight says whether it is zero, and the bytes of the others follow.
"""

import contextlib
import os
import pathlib
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from st3jax.checks import as_mapping, check_choice, check_cost, is_concrete
from st3jax.layout.letters import Layouts
from st3jax.layout.settle import check_layout, said_of
from st3jax.stored.blocks import as_dense, as_sparse, bits_of, packed, unpacked
from st3jax.stored.header import (
    DTYPES,
    MOST_NAMES,
    Leaf,
    make_start,
    read_start,
    shown,
)
from st3jax.trees import is_boxed

__all__ = ["load_sparse", "read_header", "save_sparse"]

LEAST_BOUND = 2**30  # bytes
MOST_RATIO = 1000  # of all arrays to their file, where that is more


def save_sparse(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    layout: Layouts | None = None,
) -> int:
    """Saves a tree of arrays in one compact file, where zeros cost next to nothing.

    Every bit comes back: a zero is what has no bit set, so negative zeros, subnormal
    numbers and any NaN are stored as they are. A leaf with hardly any zeros is stored
    without a mask. Equal arguments make equal files. The file is complete before it has
    its name, and then replaces one that was there.

    Args:
        path: The file to write.
        tree: Nested dicts with texts as keys, such as Flax's ``variables``, of arrays
            of JAX or NumPy: bool, integers of 8 to 64 bits, float16, bfloat16, float32,
            float64.
        metadata: What the file says of itself; a dict that JSON can hold.
        layout: What each axis of a leaf is, for whoever reads the header: from its
            path, where ``*`` stands for any text, to letters as
            :func:`st3jax.layouts` tells them. The first that matches counts.

    Returns:
        The size of the file, bytes.

    Raises:
        TypeError: If the tree holds anything else (lists, numbers, boxes of Flax, other
            dtypes), or metadata what JSON cannot hold.
        ValueError: If a path has more than 100 names, a layout fits no leaf, or the
            header has more than 8 MiB.
        OSError: If the file cannot be written.
        ImportError: If zstandard is not installed.

    Example:
        >>> import tempfile
        >>> kernel = np.zeros((1000, 100), np.float32)
        >>> kernel[0] = 1.0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_sparse(f"{folder}/model.st3", {"kernel": kernel})
        ...     tree = load_sparse(f"{folder}/model.st3")
        >>> size < kernel.nbytes / 1000, np.array_equal(tree["kernel"], kernel)
        (True, True)
    """
    leaves = _leaves_of(tree)
    letters = _letters_of(leaves, layout)
    entries: list[dict[str, Any]] = []
    blocks: list[bytes] = []
    for names, leaf in leaves.items():
        entry: dict[str, Any] = {"path": names}
        if leaf is not None:
            kept, content, block = packed(bits_of(leaf))
            entry |= {"dtype": leaf.dtype.name, "shape": leaf.shape}
            entry |= {"layout": letters[names]} if names in letters else {}
            entry |= {} if kept is None else {"kept": kept}
            entry |= {"bytes": len(block), "crc32": zlib.crc32(content)}
            blocks.append(block)
        entries.append(entry)
    return _write_whole(pathlib.Path(path), [make_start(entries, metadata), *blocks])


def load_sparse(
    path: str | os.PathLike[str],
    *,
    sparse: str | None = None,
    max_bytes: int | None = None,
) -> Any:
    """Loads what :func:`save_sparse` saved.

    Nothing in a file is run. One that is damaged, cut or made to harm is told in a
    sentence: before memory is taken, all sizes are checked against each other and
    against the file's own.

    Args:
        path: The file.
        sparse: ``"bcoo"`` for leaves of numbers and two or more axes that are stored
            with a mask as :class:`jax.experimental.sparse.BCOO`, ``"bcsr"`` for those
            of two axes as :class:`jax.experimental.sparse.BCSR`; others are dense.
        max_bytes: How many bytes the arrays may take together, as dense ones, and with
            the places of their values as sparse ones. By default 1 GiB, or 1,000 times
            the file's size where that is more. Loading takes up to four times the
            largest of them besides.

    Returns:
        Nested dicts of NumPy arrays (bfloat16 is that of ml_dtypes), sorted by their
        keys.

    Raises:
        ValueError: If the file is not whole, or asks for more than ``max_bytes``; or
            if JAX, as it is set, cannot hold the 64-bit numbers of a sparse leaf.
        OSError: If the file cannot be read.
        ImportError: If zstandard is not installed.

    Example:
        >>> import tempfile
        >>> kernel = np.diag(np.arange(100, dtype=np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_sparse(f"{folder}/model.st3", {"kernel": kernel})
        ...     tree = load_sparse(f"{folder}/model.st3", sparse="bcoo")
        >>> tree["kernel"]
        BCOO(float32[100, 100], nse=99)
    """
    if sparse is not None:
        check_choice(sparse, "sparse", ("bcoo", "bcsr"))
    with _telling(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _, leaves = read_start(file)
        kinds = {names: _kind(leaf, sparse) for names, leaf in leaves.items() if leaf}
        needed = sum(_needed(x, kinds[names]) for names, x in leaves.items() if x)
        _check_memory(needed, max_bytes, max(LEAST_BOUND, MOST_RATIO * size))
        tree: dict[str, Any] = {}
        for names, leaf in leaves.items():
            *folders, name = names
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            if leaf is None:
                node[name] = {}
                continue
            mask, values = unpacked(leaf, file.read(leaf.stored))
            kind = kinds[names]
            if kind is None or mask is None:
                node[name] = as_dense(leaf, mask, values)
            else:
                node[name] = as_sparse(leaf, mask, values, kind)
        return tree


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of :func:`save_sparse` says of itself; no array is read.

    Args:
        path: The file.

    Returns:
        ``{"leaves": [...], "metadata": {...}}``. A leaf has its ``path`` (names),
        ``dtype``, ``shape``, ``layout`` if it was told, ``kept`` (how many values are
        not zero) if it is stored with a mask, its ``bytes`` in the file, and the
        ``crc32`` of what they unpack to. An empty dict has a ``path`` alone.

    Raises:
        ValueError: If the file is not whole, as far as its header tells.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> tree, told = {"kernel": jax.numpy.eye(8)}, {"kernel": "io"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/model.st3"
        ...     _ = save_sparse(path, tree, metadata={"seed": 7}, layout=told)
        ...     header = read_header(path)
        >>> header["metadata"], header["leaves"][0]["layout"]
        ({'seed': 7}, 'io')
    """
    with _telling(path), open(path, "rb") as file:
        return read_start(file)[0]


@contextlib.contextmanager
def _telling(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says of which file something is told."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be loaded: {error}") from None


def _kind(leaf: Leaf, sparse: str | None) -> str | None:
    """How a leaf is loaded where some are loaded sparse."""
    axes = 0 if leaf.kept is None or leaf.dtype == bool else len(leaf.shape)
    return sparse if axes == 2 or (axes > 2 and sparse == "bcoo") else None


def _needed(leaf: Leaf, kind: str | None) -> int:
    """Bytes of a leaf, dense, or with the places of its values if that is more."""
    places = 4 * len(leaf.shape) * (leaf.kept or 0) if kind else 0
    return leaf.nbytes + places


def _check_memory(needed: int, max_bytes: int | None, bound: int) -> None:
    """Raises if the arrays are larger than they may be."""
    bound = bound if max_bytes is None else check_cost(max_bytes, "max_bytes")
    if needed > bound:
        raise ValueError(
            f"its arrays take {needed:,} bytes, more than {bound:,}: if you trust it, "
            f"pass max_bytes={needed}"
        )


def _leaves_of(tree: Any) -> dict[tuple[str, ...], Any]:
    """All leaves by their names, sorted; ``None`` in the place of an empty dict."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"a tree is a dict of arrays, got {type(tree).__name__}")
    found: dict[tuple[str, ...], Any] = {}

    def visit(node: Any, names: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            _check_leaf(node, names)
            found[names] = node
            return
        if len(names) == MOST_NAMES and node:
            raise ValueError(
                f"a path has at most {MOST_NAMES} names, but there are more after "
                f"{shown(names)}"
            )
        if names and not node:
            found[names] = None
        for key, inner in node.items():
            if not isinstance(key, str):
                raise TypeError(f"keys are texts, got {key!r} in {shown(names)}")
            visit(inner, (*names, key))

    visit(tree, ())
    return dict(sorted(found.items()))


def _check_leaf(leaf: Any, names: tuple[str, ...]) -> None:
    """Raises unless a leaf is an array of a dtype that a file can hold."""
    if is_boxed(leaf):
        raise TypeError(
            f"{shown(names)} is a box of Flax, {type(leaf).__name__}: take arrays out "
            "with flax.linen.unbox(tree), or nnx.as_pure(nnx.state(model))"
        )
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
        raise TypeError(
            f"{shown(names)} is neither a dict nor an array of JAX or NumPy, but "
            f"{type(leaf).__name__}: make dicts of lists, and arrays of numbers"
        )
    if not is_concrete(leaf):
        raise TypeError(
            f"{shown(names)} is only known while a program runs: save what it returns"
        )
    if leaf.dtype.name not in DTYPES:
        raise TypeError(
            f"{shown(names)} is of dtype {leaf.dtype.name}, and a file holds "
            f"{', '.join(DTYPES)}: convert it with astype"
        )


def _letters_of(
    leaves: Mapping[tuple[str, ...], Any], layout: Layouts | None
) -> dict[tuple[str, ...], str]:
    """The layouts that somebody has told, by the names of their leaves."""
    check_layout(layout)
    paths = [("/".join(names), names) for names, x in leaves.items() if x is not None]
    for pattern in as_mapping(layout) or {}:
        if all(said_of(path, {pattern: ""}) is None for path, _ in paths):
            listed = ", ".join(repr(path) for path, _ in paths[:3])
            raise ValueError(
                f"the path {pattern!r} of layout matches no leaf: there are {listed} "
                "and others"
            )
    found = {}
    for path, names in paths:
        letters = said_of(path, layout)
        if letters is not None and len(letters) != np.ndim(leaves[names]):
            raise ValueError(
                f"the layout {letters!r} of {path!r} has {len(letters)} letters, but "
                f"the leaf has {np.ndim(leaves[names])} axes"
            )
        if letters is not None:
            found[names] = letters
    return found


def _write_whole(path: pathlib.Path, parts: Iterable[bytes]) -> int:
    """Writes a file so that a kill leaves either the old or the new one, whole."""
    draft = path.with_name(f".{secrets.token_hex(8)}.draft")
    try:
        with draft.open("xb") as file:
            file.writelines(parts)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return size
