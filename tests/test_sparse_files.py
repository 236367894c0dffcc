"""Compact files: every bit comes back, and nothing in a file is believed."""

import json
import os
import pathlib
import random
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
import zlib
from unittest import mock

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

import st3jax
from st3jax.stored.header import DTYPES, MAGIC, MOST_HEADER

NAMES = st.text("ab/\0é_\ud800", max_size=3) | st.just("__class__")


def leaves(tree):
    """From path to what every bit of an array is; empty dicts are there, too."""
    found, nodes = {}, [((), tree)]
    while nodes:
        path, node = nodes.pop()
        if isinstance(node, dict):
            nodes += [((*path, key), inner) for key, inner in node.items()]
            found[path] = "dict"
        else:
            assert type(node) is np.ndarray, path
            found[path] = (node.dtype.name, node.shape, node.tobytes())
    return found


def same(a, b):
    return leaves(a) == leaves(jax.tree.map(np.asarray, b))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.st3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


# Every bit comes back.


@st.composite
def arrays(draw):
    """Arrays of any bits, of which some or nearly all are zero."""
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    x *= rng.random((*shape, 1)) >= draw(st.sampled_from([0, 0.02, 0.5, 0.98, 1]))
    return (x % 2 if dtype.name == "bool" else x).reshape(-1).view(dtype).reshape(shape)


TREES = st.dictionaries(
    NAMES,
    st.recursive(
        arrays(), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
    ),
    max_size=4,
)


@given(TREES)
@settings(deadline=None, max_examples=150)
def test_a_tree_comes_back_to_the_bit(folder, tree):
    size = st3jax.save_sparse(folder / "any.st3", tree)
    assert size == (folder / "any.st3").stat().st_size
    assert same(st3jax.load_sparse(folder / "any.st3"), tree)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_only_what_has_no_bit_set_is_a_zero(path, dtype):
    """Negative zeros, subnormal numbers and NaN of any payload are values."""
    dtype = jnp.dtype(dtype)
    uint = np.dtype(f"u{dtype.itemsize}")
    sign = 1 << 8 * dtype.itemsize - 1
    one = int(np.ones((), dtype).view(uint))
    inf = int(np.array(np.inf, dtype).view(uint))
    bits = [sign, 1, sign | 1, inf, inf | 1, sign | inf | 3, inf | inf >> 1, one]
    x = np.array(bits + 1000 * [0], uint).view(dtype)
    with np.errstate(invalid="ignore"):  # some of them signal
        assert np.isnan(x).sum() == 3
    st3jax.save_sparse(path, {"x": x})
    assert st3jax.load_sparse(path)["x"].tobytes() == x.tobytes()
    assert st3jax.read_header(path)["leaves"][0]["kept"] == 8


def test_arrays_of_jax_and_numpy_however_they_lie_in_memory(path):
    x = np.arange(60, dtype=np.int32).reshape(3, 4, 5) % 3
    nan = np.array([0x7FC00001, 0x7F800001, 1], ">u4").view(">f4")
    tree = {
        "jax": jnp.asarray(x),
        "bfloat16": jnp.eye(9, dtype=jnp.bfloat16),
        "fortran": np.asfortranarray(x),
        "view": x[::-1, 1::2].T,
        "scalar": np.float32(3),
        "none": np.zeros((3, 0), np.int8),
    }
    st3jax.save_sparse(path, tree | {"big": x.astype(">i4"), "nan": nan})
    loaded = st3jax.load_sparse(path)
    assert loaded.pop("big").tobytes() == x.tobytes()
    assert loaded["nan"].dtype == "<f4"
    assert loaded.pop("nan").view("<u4").tolist() == [0x7FC00001, 0x7F800001, 1]
    assert same(loaded, tree)
    assert all(x.flags.writeable for x in loaded.values())


def test_the_variables_of_a_sharded_model(path):
    devices = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    kernel = jnp.arange(80.0).reshape(16, 5) % 3
    parts = jax.device_put(kernel, jax.sharding.NamedSharding(devices, spec))
    variables = flax.core.freeze({"params": {"kernel": parts}, "batch_stats": {}})
    st3jax.save_sparse(path, variables)
    loaded = st3jax.load_sparse(path)
    assert loaded.keys() == {"params", "batch_stats"}
    assert same(loaded, {"params": {"kernel": kernel}, "batch_stats": {}})


def test_equal_trees_make_equal_files_whatever_their_order(tmp_path):
    x, y = np.eye(50, dtype=np.float32), np.ones(3)
    st3jax.save_sparse(tmp_path / "a", {"x": x, "y": {"b": y, "a": x}})
    st3jax.save_sparse(tmp_path / "b", {"y": {"a": x, "b": y}, "x": x})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_zeros_cost_little_and_what_has_none_is_stored_without_a_mask(path):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(300, 300)).astype(np.float32)
    tree = {"kernel": np.where(abs(kernel) > 1.645, kernel, 0), "dense": kernel}
    size = st3jax.save_sparse(path, tree)
    assert same(st3jax.load_sparse(path), tree)
    dense, kept = st3jax.read_header(path)["leaves"]
    assert "kept" not in dense
    assert kept["kept"] == np.count_nonzero(tree["kernel"])
    assert kept["bytes"] < kernel.nbytes / 8.5  # of 90 % zeros
    assert dense["bytes"] < kernel.nbytes
    assert size - kept["bytes"] - dense["bytes"] < 300


def test_a_mask_of_many_parts(path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, 1_000_003, np.uint8) * rng.integers(1, 256, 1_000_003)
    tree = {"x": bits.astype(np.uint16), "end": np.zeros(1_000_003, np.uint16)}
    tree["end"][-1] = 1
    st3jax.save_sparse(path, tree)
    assert same(st3jax.load_sparse(path), tree)
    assert all("kept" in leaf for leaf in st3jax.read_header(path)["leaves"])


# What a file says of itself.


def test_the_header_has_metadata_and_layouts(path):
    tree = {"params": {"a": {"kernel": np.eye(5)}, "b": {"kernel": np.ones((2, 2, 3))}}}
    metadata = {"seed": 7, "method": "st3", "mean": [0.5, 1e-9], "deep": {"é": None}}
    layout = {"*/a/kernel": "oi", "*kernel": "sio"}
    st3jax.save_sparse(path, tree, metadata=metadata, layout=layout)
    header = st3jax.read_header(path)
    assert header["metadata"] == metadata
    a, b = header["leaves"]
    block = a.pop("bytes"), a.pop("crc32")
    assert a == {
        "path": ["params", "a", "kernel"],
        "dtype": "float64",
        "shape": [5, 5],
        "layout": "oi",
        "kept": 5,
    }
    assert 0 < block[0] < 100
    assert b["layout"] == "sio"
    assert same(st3jax.load_sparse(path), tree)


def test_layouts_as_the_model_tells_them(path):
    model = nn.Dense(3)
    x = jnp.ones((1, 5))
    variables = model.init(jax.random.key(0), x)
    told = st3jax.layouts(model.apply, variables, x)
    st3jax.save_sparse(path, variables, layout=told)
    by_path = {leaf["path"][-1]: leaf for leaf in st3jax.read_header(path)["leaves"]}
    assert by_path["kernel"]["layout"] == "io"
    assert "layout" not in by_path["bias"]


def test_a_view_of_other_bytes_as_truth_values(path):
    bytes_of_old = np.array([0, 1, 2, 255], np.uint8).view(bool)
    st3jax.save_sparse(path, {"mask": bytes_of_old})
    assert st3jax.load_sparse(path)["mask"].tolist() == [False, True, True, True]


def test_a_layout_reaches_every_path_that_reads_the_same(path):
    tree = {"a/b": np.eye(3), "a": {"b": np.eye(4)}}
    st3jax.save_sparse(path, tree, layout={"a/b": "io"})
    leaves = st3jax.read_header(path)["leaves"]
    assert [leaf["layout"] for leaf in leaves] == ["io", "io"]


# As sparse arrays of JAX.


def test_leaves_as_sparse_arrays(path):
    rng = np.random.default_rng(0)
    tree = {
        "matrix": rng.random((50, 40), np.float32) * (rng.random((50, 40)) > 0.9),
        "bfloat16": jnp.asarray(
            rng.random((8, 9)) * (rng.random((8, 9)) > 0.9), "bfloat16"
        ),
        "window": rng.integers(0, 9, (3, 3, 4, 5)) * (rng.random((3, 3, 4, 5)) > 0.7),
        "zeros": np.zeros((7, 3), np.float16),
        "truth": np.eye(40, dtype=bool),
        "vector": np.zeros(100, np.float32),
        "dense": rng.random((5, 5), np.float32),
    }
    tree["window"] = tree["window"].astype(np.int32)
    st3jax.save_sparse(path, tree)
    for name, kind, axes in (("bcoo", sparse.BCOO, {2, 4}), ("bcsr", sparse.BCSR, {2})):
        loaded = st3jax.load_sparse(path, sparse=name)
        for key, x in loaded.items():
            found = (
                kind
                if tree[key].ndim in axes and key not in ("dense", "truth")
                else np.ndarray
            )
            assert type(x) is found, key
        whole = {
            key: np.asarray(x.todense() if hasattr(x, "todense") else x)
            for key, x in loaded.items()
        }
        assert same(whole, tree)
        assert loaded["matrix"].nse == np.count_nonzero(tree["matrix"])
        product = jax.jit(lambda x, m: m @ x)(np.ones(40, np.float32), loaded["matrix"])
        np.testing.assert_allclose(product, tree["matrix"].sum(1), rtol=1e-5)


def test_a_sparse_array_keeps_its_bits_or_is_refused(path):
    st3jax.save_sparse(path, {"a": {"x": np.eye(9)}})
    sentence = "'a/x' is of dtype float64, and JAX is set to 32 bits"
    with pytest.raises(ValueError, match=sentence):
        st3jax.load_sparse(path, sparse="bcoo")
    with jax.enable_x64(True):
        x = st3jax.load_sparse(path, sparse="bcsr")["a"]["x"]
        assert x.dtype == "float64"
        assert np.array_equal(x.todense(), np.eye(9))


def test_the_kinds_of_sparse_arrays_are_told(path):
    st3jax.save_sparse(path, {})
    assert st3jax.load_sparse(path, sparse="bcoo") == {}
    with pytest.raises(ValueError, match="sparse is one of 'bcoo', 'bcsr', got 'coo'"):
        st3jax.load_sparse(path, sparse="coo")


# What cannot be saved is told, and costs nothing that was there.


def nested(depth):
    tree = {"x": np.ones(3)}
    for _ in range(depth):
        tree = {"d": tree}
    return tree


BOX = nn.Partitioned(jnp.ones(3), ("x",))
REFUSED = {
    "no tree": (np.ones(3), TypeError, "a tree is a dict of arrays, got ndarray"),
    "number": ({"a": {"b": 1.0}}, TypeError, "'a/b' is neither a dict .* but float"),
    "list": ({"a": [np.ones(3)]}, TypeError, "'a' is neither a dict .* but list"),
    "none": ({"a": None}, TypeError, "'a' is neither a dict .* but NoneType"),
    "key": ({"a": {0: np.ones(3)}}, TypeError, "keys are texts, got 0 in 'a'"),
    "box": ({"a": BOX}, TypeError, "'a' is a box of Flax, Partitioned: take arrays"),
    "variable": ({"a": nnx.Param(1.0)}, TypeError, "'a' is a box of Flax, Param"),
    "complex": ({"a": np.ones(3, complex)}, TypeError, "'a' is of dtype complex128"),
    "text": ({"a": np.array(["x"])}, TypeError, "'a' is of dtype str"),
    "object": ({"a": np.array([None])}, TypeError, "'a' is of dtype object"),
    "random key": ({"a": jax.random.key(0)}, TypeError, "'a' is of dtype key"),
    "depth": (nested(100), ValueError, "a path has at most 100 names"),
    "endless": (nested(5000), ValueError, "a path has at most 100 names"),
    "names": ({"n" * 2**23: np.ones(3)}, ValueError, "a header has at most 8,388,608"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_file_cannot_hold_is_told(path, what):
    tree, error, sentence = REFUSED[what]
    with pytest.raises(error, match=f"^{sentence}"):
        st3jax.save_sparse(path, tree)
    assert not path.exists()


def test_the_longest_path_comes_back(path):
    st3jax.save_sparse(path, nested(99))
    assert same(st3jax.load_sparse(path), nested(99))


def test_what_is_only_known_while_a_program_runs_is_told(path):
    with pytest.raises(TypeError, match="'a' is only known while a program runs"):
        jax.jit(lambda x: st3jax.save_sparse(path, {"a": x}))(jnp.ones(3))


ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "metadata",
    [[1], {"a": np.float32(1)}, {"a": float("nan")}, {"a": ENDLESS}, {1: 0, "1": 0}],
)
def test_metadata_that_json_cannot_hold_is_told(path, metadata):
    with pytest.raises(TypeError, match=r"^metadata is a dict"):
        st3jax.save_sparse(path, {}, metadata=metadata)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"kernel": "io"}, "'kernel' of layout matches no leaf: there are 'a/kernel'"),
        ({"*": "i"}, "the layout 'i' of 'a/kernel' has 1 letters, .* 2 axes"),
        ({"*": "xy"}, "the layout of '\\*' has a letter for each axis"),
    ],
)
def test_a_layout_that_does_not_fit_is_told(path, layout, sentence):
    with pytest.raises(ValueError, match=sentence):
        st3jax.save_sparse(path, {"a": {"kernel": np.eye(3)}}, layout=layout)


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_what_was_there(path, monkeypatch, broken):
    st3jax.save_sparse(path, {"x": np.eye(3)})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        st3jax.save_sparse(path, {"x": np.ones(3)})
    assert same(st3jax.load_sparse(path), {"x": np.eye(3)})
    assert os.listdir(path.parent) == [path.name]


def test_a_file_is_as_public_as_any_and_takes_the_place_of_one(path):
    path.write_text("old")
    st3jax.save_sparse(str(path), {"x": np.eye(3)})
    other = path.with_name("other")
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert same(st3jax.load_sparse(str(path)), {"x": np.eye(3)})


def test_without_zstandard_one_sentence_says_what_to_install(path):
    st3jax.save_sparse(path, {"x": np.eye(3)})
    with mock.patch.dict(sys.modules, zstandard=None):
        for call in (
            lambda: st3jax.save_sparse(path, {"x": np.eye(3)}),
            lambda: st3jax.load_sparse(path),
        ):
            with pytest.raises(ImportError, match=r"pip install zstandard$"):
                call()
    code = "import sys; sys.modules['zstandard'] = None; import st3jax"
    subprocess.run([sys.executable, "-c", code], check=True)


# Damaged files: every bit counts.


def small():
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": np.where(rng.random((9, 9)) > 0.8, 2.5, 0).astype(np.float32)},
        "b": rng.integers(1, 99, 5, np.int16),
        "c": {"d": np.array([True, False]), "e": {}},
    }


@pytest.fixture(scope="module")
def whole(folder):
    """The bytes of a file, and the tree in it."""
    path = folder / "whole.st3"
    st3jax.save_sparse(path, small(), metadata={"seed": 1}, layout={"a/*": "io"})
    return path.read_bytes(), small()


def attempt(path, contents, **options):
    """The tree in these bytes, or the reason against it."""
    path.unlink(missing_ok=True)  # some file systems write at once what is replaced
    path.write_bytes(contents)
    try:
        return st3jax.load_sparse(path, **options)
    except ValueError as error:
        said = str(error)
    text = said.removeprefix(f"{path} cannot be loaded: ")
    assert text != said
    assert 0 < len(text) < 250
    assert text.isprintable()
    return text


def test_any_bit_that_is_not_as_it_was_is_noticed(folder, whole):
    contents, tree = whole
    same_tree = 0
    for place in range(len(contents)):
        flipped = bytearray(contents)
        flipped[place] ^= 1 << place % 8
        found = attempt(folder / "flipped.st3", flipped)
        if not isinstance(found, str):  # a bit of zstd's that says nothing
            assert same(found, tree)
            same_tree += 1
    assert same_tree < 10


def test_a_file_that_is_cut_or_goes_on_is_told(folder, whole):
    contents, _ = whole
    for length in range(len(contents)):
        found = attempt(folder / "cut.st3", contents[:length])
        assert "is cut" in found if length >= 8 else "does not begin" in found
    for more in (b"\0", contents):
        assert "something was added" in attempt(folder / "cut.st3", contents + more)


def test_a_file_that_is_no_such_file(path):
    np.savez(path.with_suffix(".npz"), x=np.ones(3))
    others = [b"", b"PK", path.with_suffix(".npz").read_bytes(), b"{}", bytes(99)]
    for contents in others:
        assert attempt(path, contents).startswith("it does not begin as a file of")
        with pytest.raises(ValueError, match="does not begin"):
            st3jax.read_header(path)
    with pytest.raises(FileNotFoundError):
        st3jax.load_sparse(path.with_name("missing"))


# Crafted files: checksums fit, and the rest is meant to harm.


def file_of(text, blocks=b"", version=1):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    start = struct.pack("<8sIII", MAGIC, version, len(text), zlib.crc32(text))
    return start + text + blocks


def frame(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


def leaf(content=bytes(64), block=None, **fields):
    """A file of one leaf, sixteen float32, with other fields."""
    block = frame(content) if block is None else block
    entry = {
        "path": ["x"],
        "dtype": "float32",
        "shape": [16],
        "bytes": len(block),
        "crc32": zlib.crc32(content),
    } | fields
    return file_of({"leaves": [entry], "metadata": {}}, block)


def leaves_at(*paths):
    entries = [{"path": path} for path in paths]
    return file_of({"leaves": entries, "metadata": {}})


def patched(block, place, new):
    return block[:place] + new + block[place + len(new) :]


GIGABYTE = bytes(10**9)
BOMB = frame(GIGABYTE)  # 100 kB or less
STREAM = zstandard.ZstdCompressor().compressobj()
UNKNOWN = STREAM.compress(bytes(64)) + STREAM.flush()
del GIGABYTE
PLAIN = frame(bytes(64))  # magic, descriptor, one byte of content size
SAYS = r"says that it is of another length"
CHECKSUM = "the checksum does not fit"
SHAPE = "shape of 'x' is none"
DEEP = b'{"leaves":' + b"[" * 10**6 + b"]" * 10**6 + b',"metadata":{}}'
CRAFTED = {
    "version": (file_of({}, version=2), "of version 2, and this st3jax reads 1"),
    "header of 2 GB": (
        struct.pack("<8sIII", MAGIC, 1, 2**31, 0) + bytes(99),
        "header has 2,147,483,648 bytes, more than 8,388,608",
    ),
    "header longer than the file": (
        struct.pack("<8sIII", MAGIC, 1, 2**20, 0) + bytes(99),
        "cut after 119 bytes, within its header",
    ),
    "header no JSON": (file_of(b"\0" * 20), "header cannot be read"),
    "header no text": (file_of(b"\xff\xfe{}"), "header cannot be read"),
    "header UTF-16": (file_of("{}".encode("utf-16")), "header cannot be read"),
    "header a list": (file_of([]), "no list of leaves"),
    "no metadata": (file_of({"leaves": []}), "no dict of metadata"),
    "no leaves": (file_of({"leaves": {}, "metadata": {}}), "no list of leaves"),
    "deep header": (file_of(DEEP), "header cannot be read"),
    "long number": (
        file_of(b'{"leaves":[],"metadata":{"a":' + b"9" * 5000 + b"}}"),
        "header cannot be read",
    ),
    "no number": (
        file_of(b'{"leaves":[],"metadata":{"a":NaN}}'),
        "NaN is no number of JSON",
    ),
    "key twice": (
        file_of(b'{"leaves":[],"metadata":{"a":1,"a":2}}'),
        "a key stands twice",
    ),
    "millions of leaves": (
        file_of(b'{"metadata":{},"leaves":[{}' + b",{}" * 1_000_000 + b"]}"),
        "the path of a leaf is a list",
    ),
    "no path": (leaf(path=[]), "the path of a leaf is a list"),
    "path of numbers": (leaf(path=[1]), "the path of a leaf is a list"),
    "path a text": (leaf(path="x"), "the path of a leaf is a list"),
    "deep path": (leaf(path=["x"] * 101), "list of 1 to 100 texts"),
    "leaf twice": (leaves_at(["a"], ["a"]), "'a' follows 'a'"),
    "leaf within a leaf": (leaves_at(["a"], ["a", "b"]), "'a/b' follows 'a'"),
    "no order": (leaves_at(["b"], ["a"]), "'a' follows 'b'"),
    "odd name": (leaves_at(["b"], ["\x1b[2J" * 99]), r"'\\x1b\[2J"),
    "unknown dtype": (leaf(dtype="complex64"), "'x' is of an unknown dtype"),
    "object dtype": (leaf(dtype="object"), "'x' is of an unknown dtype"),
    "dtype of fields": (leaf(dtype=[["a", "<f4"]]), "'x' is of an unknown dtype"),
    "dtype an option": (leaf(dtype=None), "'x' is of an unknown dtype"),
    "no shape": (leaf(shape=None), SHAPE),
    "negative shape": (leaf(shape=[-4, -4]), SHAPE),
    "shape of fractions": (leaf(shape=[16.0]), SHAPE),
    "shape of truth values": (leaf(shape=[True, 16]), SHAPE),
    "shape that overflows": (leaf(shape=[2**32, 2**32]), SHAPE),
    "huge shape": (leaf(shape=[10**4000]), SHAPE),
    "huge shape of nothing": (
        leaf(b"", b"", shape=[0, 2**62, 2**62]),
        SHAPE,
    ),
    "many axes": (leaf(shape=[1] * 65), SHAPE),
    "larger shape": (leaf(shape=[17]), SAYS),
    "smaller shape": (leaf(shape=[15]), SAYS),
    "wider dtype": (leaf(dtype="float64"), SAYS),
    "terabytes": (leaf(shape=[2**38]), "arrays take 1,099,511,627,776 bytes"),
    "terabytes behind a mask": (
        leaf(shape=[2**38], kept=0),
        "arrays take 1,099,511,627,776 bytes, more than 1,073,741,824: if you trust",
    ),
    "negative kept": (leaf(kept=-1), "keeps more values than it has"),
    "too many kept": (leaf(kept=17), "keeps more values than it has"),
    "kept a fraction": (leaf(kept=1.5), "keeps more values than it has"),
    "other kept": (leaf(b"\1\1" + bytes(4), kept=1), "mask of 'x' has other bits"),
    "bits after the mask": (
        leaf(b"\0\2" + bytes(4), shape=[9], kept=1),
        "mask of 'x' has other bits",
    ),
    "odd truth value": (leaf(bytes([2] * 16), dtype="bool"), "no truth values"),
    "layout too long": (leaf(layout="io"), "layout of 'x' does not fit"),
    "layout of other letters": (leaf(layout="x"), "layout of 'x' does not fit"),
    "layout no text": (leaf(layout=["i"]), "layout of 'x' does not fit"),
    "other checksum": (leaf(crc32=0), f"'x' is damaged: {CHECKSUM}"),
    "no checksum": (leaf(crc32=None), "the block of 'x' has no size"),
    "no block": (leaf(block=b""), "the block of 'x' has no size"),
    "negative block": (leaf(bytes=-1), "the block of 'x' has no size"),
    "block beyond the end": (leaf(bytes=10**12), "1,000,000,000,1[0-9]{2} by its"),
    "block of nothing": (leaf(b"", shape=[0]), "the block of 'x' has no size"),
    "block no frame": (leaf(block=bytes(64)), "the block of 'x' is damaged"),
    "empty frame": (leaf(block=frame(b"")), SAYS),
    "two frames": (leaf(block=PLAIN + PLAIN), "the block of 'x' is damaged"),
    "rest after a frame": (leaf(block=PLAIN + b"\0"), "the block of 'x' is damaged"),
    "half a frame": (leaf(block=PLAIN[:-3]), "the block of 'x' is damaged"),
    "frame of no size": (leaf(block=UNKNOWN), SAYS),
    "frame that skips": (
        leaf(block=b"\x50\x2a\x4d\x18\x40\0\0\0" + bytes(64)),
        "the block of 'x' is damaged: it is no frame of zstd",
    ),
    "bomb": (leaf(block=BOMB), SAYS),
    "bomb that says less": (
        leaf(block=BOMB.replace((10**9).to_bytes(4, "little"), b"\x40\0\0\0")),
        "the block of 'x' is damaged",
    ),
    "frame that says more": (
        leaf(block=patched(PLAIN, 5, b"\xf0"), shape=[60]),
        "the block of 'x' is damaged",
    ),
    "frame of a dictionary": (
        leaf(
            block=frame(
                bytes(64),
                dict_data=zstandard.ZstdCompressionDict(
                    bytes(range(256)), dict_type=zstandard.DICT_TYPE_RAWCONTENT
                ),
            )[:5]
            + b"\xff" * 9
        ),
        "the block of 'x'",
    ),
}  # fmt: skip


@pytest.fixture
def little_memory():
    """A test that takes little, most of it for a header of 8 MiB or for itself."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_file_is_told(path, what):
    contents, sentence = CRAFTED[what]
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=sentence) as caught:
        st3jax.load_sparse(path)
    assert len(str(caught.value)) < 400


def test_a_leaf_as_it_should_be_is_loaded(path):
    """What the crafted files are made of: else they would be refused for that."""
    path.write_bytes(leaf())
    assert same(st3jax.load_sparse(path), {"x": np.zeros(16, np.float32)})
    path.write_bytes(leaf(b"\0\1" + b"\0\0\x80\x3f", kept=1, layout="o"))
    assert st3jax.load_sparse(path)["x"].tolist() == [0] * 8 + [1] + [0] * 7
    path.write_bytes(leaf(b"", b"", shape=[0, 2**59]))
    assert st3jax.load_sparse(path)["x"].shape == (0, 2**59)


@pytest.mark.usefixtures("little_memory")
def test_thousands_of_leaves_and_odd_names_are_only_that(path):
    tree = {f"{i:05}": {"__class__": np.ones(1, np.int8)} for i in range(5000)}
    tree |= {"__reduce__": {"../../etc": np.zeros(9)}, "": {"": np.ones(2)}}
    st3jax.save_sparse(path, tree)
    assert same(st3jax.load_sparse(path), tree)


@pytest.mark.usefixtures("little_memory")
def test_how_much_memory_a_file_may_ask_for(path):
    contents = leaf(dtype="int8", shape=[2**30 + 8], kept=0)
    assert "1,073,741,832 bytes, more than 1,073,741,824" in attempt(path, contents)
    st3jax.save_sparse(path, {"x": np.zeros(1000, np.int8)})
    with pytest.raises(ValueError, match=r"take 1,000 bytes.* pass max_bytes=1000$"):
        st3jax.load_sparse(path, max_bytes=999)
    assert st3jax.load_sparse(path, max_bytes=1000)["x"].size == 1000
    with pytest.raises(TypeError, match="max_bytes is a whole number"):
        st3jax.load_sparse(path, max_bytes="1 GB")


def test_places_of_a_sparse_array_count_as_memory(path):
    st3jax.save_sparse(path, {"x": np.eye(100, dtype=np.int8)})
    sentence = "take 10,800 bytes, more than 10,000"
    with pytest.raises(ValueError, match=sentence):
        st3jax.load_sparse(path, sparse="bcoo", max_bytes=10_000)
    st3jax.load_sparse(path, max_bytes=10_000)


@pytest.mark.parametrize("kind", [None, "bcoo", "bcsr"])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.87])
def test_loading_takes_four_times_the_largest_array_besides(path, dtype, share, kind):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (1000, 1000)) * (rng.random((1000, 1000)) < share)
    st3jax.save_sparse(path, {"x": x.astype(dtype)})
    assert "kept" in st3jax.read_header(path)["leaves"][0]
    st3jax.load_sparse(path, sparse=kind)  # so that nothing is imported any more
    tracemalloc.start()
    loaded = st3jax.load_sparse(path, sparse=kind)["x"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    needed = x.size * np.dtype(dtype).itemsize
    needed += 8 * np.count_nonzero(x) if kind else 0
    assert peak < 5 * needed + 2e6
    assert loaded.shape == x.shape


# Anything at all.


ODD = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    8,
    9,
    64,
    81,
    2**31,
    2**63,
    1e99,
    "",
    "x",
    "io",
    "bool",
]
ODD += ["float16", "int8", "__class__", [], [1], [0], [9, 9], [3] * 4, ["a"], {}, [[]]]


def mutated(rng, contents):
    """The bytes with a few changed, lost, doubled or moved."""
    contents = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, count = rng.randrange(len(contents)), rng.randrange(1, 20)
        kind = rng.randrange(5)
        if kind < 2:
            contents[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            contents[place : place + 1] = rng.choice([b"\xff", b"\0", b"9", b"]", b","])
        elif kind == 3:
            del contents[place : place + count]
        else:
            contents[place:place] = contents[rng.randrange(len(contents)) :][:count]
        contents = contents or bytearray(b"\0")
    return bytes(contents)


def forged(rng, text, blocks):
    """A file whose checksums fit what was changed in its header or in its blocks."""
    kind = rng.randrange(3)
    if kind == 0:
        return file_of(mutated(rng, text), b"".join(blocks))
    header = json.loads(text)
    entry = rng.choice(header["leaves"])
    if kind == 1:
        entry[rng.choice([*entry, "kept", "layout", "shape"])] = rng.choice(ODD)
    elif "bytes" in entry:
        place = [x for x in header["leaves"] if "bytes" in x].index(entry)
        content = mutated(rng, zstandard.decompress(blocks[place]))
        blocks[place] = (
            mutated(rng, frame(content)) if rng.random() < 0.3 else frame(content)
        )
        entry |= {"bytes": len(blocks[place]), "crc32": zlib.crc32(content)}
    return file_of(header, b"".join(blocks))


def test_ten_thousand_mutated_files_give_a_tree_or_a_reason(folder, whole):
    contents, tree = whole
    length = struct.unpack_from("<I", contents, 12)[0]
    text, rest = contents[20 : 20 + length], contents[20 + length :]
    blocks = []
    for entry in json.loads(text)["leaves"]:
        blocks.append(rest[: entry.get("bytes", 0)])
        rest = rest[len(blocks[-1]) :]
    blocks = [block for block in blocks if block]
    rng, reasons, trees = random.Random(0), set(), 0
    for number in range(10_000):
        options = {"sparse": rng.choice([None, None, "bcoo", "bcsr"])}
        if number % 2:
            found = attempt(folder / "fuzz.st3", mutated(rng, contents))
            assert isinstance(found, str) or same(found, tree)
        else:
            new = forged(rng, text, list(blocks))
            found = attempt(folder / "fuzz.st3", new, max_bytes=10**6, **options)
            trees += isinstance(found, dict)
        if isinstance(found, str):
            reasons.add(found[:20])
    assert trees > 100  # some are forged well
    assert len(reasons) > 20


# The page about the layout.

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "files.md").read_text()
READER = next(
    snippet
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if "def read(path)" in snippet
)


@pytest.fixture(scope="module")
def read():
    names = {}
    exec(compile(READER, "reader", "exec"), names)
    return names["read"]


def test_the_reader_of_the_page_is_short():
    assert len([line for line in READER.splitlines() if line]) <= 30


@given(tree=TREES)
@settings(deadline=None, max_examples=100)
def test_the_reader_of_the_page_reads_any_tree(folder, read, tree):
    st3jax.save_sparse(folder / "page.st3", tree)
    assert same(read(folder / "page.st3"), tree)


def test_the_page_has_what_the_header_says():
    for what in (*("int8", "int64", "uint8", "uint64"), *DTYPES[-4:], "bool"):
        assert f"`{what}`" in PAGE
    assert f"at most {MOST_HEADER:,}" in PAGE
    assert " ".join(f"{byte:02X}" for byte in MAGIC) in PAGE
