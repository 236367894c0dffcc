"""Both searches find the same two neighbouring keys that sorting finds, anywhere."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from st3jax.selection import bit_search, digit_search
from st3jax.selection.keys import from_key, to_key
from st3jax.selection.quantile import threshold
from st3jax.selection.tally import Tally

N = 1_100_000  # enough for a sample to be taken
MARGIN = 1 << 16
rng = np.random.default_rng(0)


def special(values):
    x = rng.standard_normal(N).astype(np.float32)
    x[: len(values)] = values
    return rng.permutation(x)


normal = rng.standard_normal(N).astype(np.float32)
ARRAYS = {
    "normal": normal,
    "ties": rng.integers(-3, 4, N).astype(np.float32),
    "mostly zero": normal * (rng.random(N) < 0.4),
    "all equal": np.full(N, -2.5, np.float32),
    "all zero": np.full(N, -0.0, np.float32),
    "two neighbours": np.nextafter(np.float32(1), np.float32(2), dtype=np.float32)
    * (rng.random(N) < 0.5)
    + (rng.random(N) < 0.0),
    "74 decades": (10.0 ** rng.uniform(-37, 37, N)).astype(np.float32),
    "subnormal": (normal * 1e-42).astype(np.float32),
    "one outlier": special([3e38]),
    "not finite": special([np.inf] * 1000 + [np.nan] * 1000),
    "all NaN": np.full(N, np.nan, np.float32),
}
SEARCHES = {
    "bits, as for a CPU": functools.partial(bit_search.neighbours, platform="cpu"),
    "bits, as for a TPU": functools.partial(bit_search.neighbours, platform="tpu"),
    "bits, as for a GPU": functools.partial(bit_search.neighbours, platform="cuda"),
    "bits, as for one GPU": functools.partial(
        bit_search.neighbours, platform="cuda", whole=True
    ),
    "bits, as for one with ROCm": functools.partial(
        bit_search.neighbours, platform="rocm", whole=True
    ),
    "digits": functools.partial(digit_search.neighbours, margin=MARGIN),
}
NEEDED = np.True_
COSTS = {  # of the four leaves
    "of layers": (5, 7, 49, 12_544),
    "far apart": (1, 3, 1_000_003, 2),
    "huge": (1, 1, 9_007, 1 << 34),
}


def in_leaves(x):
    """Leaves of several ranks, an empty one and a scalar among them."""
    return [
        jnp.asarray(x[:1].reshape(())),
        jnp.zeros((0, 3), jnp.float32),
        jnp.asarray(x[1:50_001].reshape(10, 50, 100)),
        jnp.asarray(x[50_001:]),
    ]


@pytest.fixture(autouse=True, scope="module")
def few_are_many():
    """So that a GPU's branches are there for arrays that are quickly searched."""
    with mock.patch.object(bit_search, "MANY", 1000):
        yield


def search(name, costs=None):
    @jax.jit
    def found(leaves, rank, near=-1.0, needed=NEEDED):
        tally = Tally(costs or (1,) * len(leaves), ((),) * len(leaves))
        near = jnp.float32(near)
        with jax.enable_x64(True):
            rank = rank.astype(jnp.int64)
            return SEARCHES[name](leaves, rank, near, needed, tally)

    return found


def given_to(name, x):
    """All, or for a search that does the same with any number a tenth, and the end."""
    return x if name == "digits" else np.append(x[: N // 10], np.fmax.reduce(x))


def ranks(x):
    """The first, the second, and others, up to the last."""
    return sorted({0, 1, x.size - 2, *(int(s * (x.size - 1)) for s in (0.5, 0.9, 1))})


def sorted_keys(x):
    return np.sort(np.asarray(to_key(x)))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_what_sorting_finds(name):
    found = search(name)
    for label, whole in ARRAYS.items():
        x = given_to(name, whole)
        keys = sorted_keys(x)
        for rank in ranks(x):
            low, high = found(in_leaves(x), np.int32(rank))
            expected = keys[rank], keys[min(rank + 1, x.size - 1)]
            assert (int(low), int(high)) == expected, (label, rank)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_what_sorting_finds_with_every_key_as_often_as_it_costs(
    name, costs
):
    found = search(name, COSTS[costs])
    for label, whole in ARRAYS.items():
        x = given_to(name, whole)
        each = np.repeat(COSTS[costs], [leaf.size for leaf in in_leaves(x)])
        order = np.argsort(np.asarray(to_key(x)), kind="stable")
        keys, up_to = np.asarray(to_key(x))[order], np.cumsum(each[order])
        for share in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0):
            rank = int(share * (int(up_to[-1]) - 1))
            after = min(rank + 1, int(up_to[-1]) - 1)
            with jax.enable_x64(True):
                pair = found(in_leaves(x), np.int64(rank))
            low, high = np.searchsorted(up_to, [rank, after], side="right")
            assert tuple(map(int, pair)) == (keys[low], keys[high]), (label, share)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_hint_changes_nothing_but_the_time(name):
    found = search(name)
    for label, whole in ARRAYS.items():
        x = given_to(name, whole)
        keys = sorted_keys(x)
        for rank in ranks(x):
            right = float(from_key(jnp.asarray(keys[rank])))
            for near in (right, right * 1.003, right * 0.5, 1e-30, 3e38, np.nan, -1.0):
                low, high = found(in_leaves(x), np.int32(rank), np.float32(near))
                expected = keys[rank], keys[min(rank + 1, x.size - 1)]
                assert (low, high) == expected, (label, rank, near)


found_by_digits = search("digits")
patterns = st.integers(0, 2**31 - 1)  # of any float32, NaNs included


@settings(max_examples=40, deadline=None)
@given(st.lists(patterns, min_size=1, max_size=6), patterns, st.integers(0, N - 1))
def test_any_bit_patterns_are_searched_from_any_hint(values, near, rank):
    x = np.array(values, np.int32)[np.arange(N) ** 2 % 7919 % len(values)]
    x = x.view(np.float32)
    keys = sorted_keys(x)
    hint = np.array(near, np.int32).view(np.float32)
    low, high = found_by_digits(in_leaves(x), np.int32(rank), hint)
    assert (low, high) == (keys[rank], keys[min(rank + 1, N - 1)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, N - 1), st.floats(0.0, 4.0, width=32))
def test_any_rank_is_found_from_any_hint(rank, near):
    keys = sorted_keys(normal)
    low, high = found_by_digits(in_leaves(normal), np.int32(rank), np.float32(near))
    assert (low, high) == (keys[rank], keys[min(rank + 1, N - 1)])


def test_counters_of_one_byte_do_not_overflow():
    x = np.full(2_000_000, 0.5, np.float32)
    x[:3] = 1.0, 2.0, 3.0
    for rank, expected in ((1_999_996, (0.5, 1.0)), (1_999_998, (2.0, 3.0))):
        keys = found_by_digits([jnp.asarray(x)], np.int32(rank), np.float32(0.5))
        assert tuple(float(from_key(key)) for key in keys) == expected


@pytest.mark.parametrize(("count", "most"), [(8, 1.4), (64, 2.1)])
def test_digits_take_a_byte_or_two_an_element(count, most):
    """One in leaves that are counted alone, two where leaves share a buffer."""
    leaves = [jax.ShapeDtypeStruct((512, 512), jnp.float32) for _ in range(count)]
    rank = jax.ShapeDtypeStruct((), jnp.int32)
    near = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = search("digits").lower(leaves, rank, near).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory <= most * sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize("name", ["digits", "bits, as for a CPU", "bits, as for a TPU"])
def test_a_search_that_is_not_needed_takes_no_turns(name):
    x = given_to(name, normal)
    found, leaves, rank = search(name), in_leaves(x), np.int32(x.size // 2)
    right = sorted_keys(x)[x.size // 2]
    assert found(leaves, rank)[0] == right
    assert found(leaves, rank, needed=np.False_)[0] != right


@pytest.mark.parametrize(
    ("platform", "whole", "hint", "missed", "none"),
    [
        ("cpu", False, 18, 32, 31),
        ("tpu", False, 6, 12, 11),
        ("cuda", True, 6, 12, 12),
        ("cuda", False, 11, 11, 11),
        ("rocm", True, 11, 11, 11),
    ],
)
def test_a_hint_saves_reads(platform, whole, hint, missed, none):
    x = [jnp.asarray(normal[:2000])]
    right = np.sort(np.abs(normal[:2000]))[1800]
    reads = mock.patch.object(bit_search, "_keys", wraps=bit_search._keys)
    for near, expected in ((1.005 * right, hint), (2 * right, missed), (-1.0, none)):
        with reads as counted, jax.disable_jit(), jax.enable_x64(True):
            low, _ = bit_search.neighbours(
                x,
                jnp.int64(1800),
                jnp.float32(near),
                NEEDED,
                Tally((1,), ((),)),
                platform=platform,
                whole=whole,
            )
        assert from_key(low) == right
        assert counted.call_count == expected, near


def test_on_one_gpu_nothing_waits_for_the_host():
    """As it would for a loop of unknown length, or a branch with any loop in it."""
    found = search("bits, as for one GPU")
    text = found.lower([jnp.asarray(normal)], np.int32(1), np.float32(1)).as_text()
    assert "stablehlo.while" not in text
    before, rest = text.split('"stablehlo.case"')
    branch, after = rest.split("\n    }) :")
    read = rf"stablehlo\.reduce.*tensor<{N}xi32>"
    assert [len(re.findall(read, part)) for part in (before, branch, after)] == [
        5,
        6,
        1,
    ]


def test_a_float64_array_is_searched_in_float64():
    with jax.enable_x64(True):
        x = 1.0 + np.arange(1000) * 1e-12
        t = jax.jit(threshold)([jnp.asarray(x)], 0.25)
        assert t == np.quantile(x, 0.25)


LAYOUTS = [P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sharded_threshold_has_the_same_bits_and_moves_only_counts(layout, kind):
    axis_type = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    x = normal[:262_144].reshape(512, 512)
    sharded = jax.device_put(x, NamedSharding(mesh, layout))
    compiled = jax.jit(threshold).lower([sharded], np.float32(0.9)).compile()
    assert compiled([sharded], np.float32(0.9)) == threshold([x], np.float32(0.9))
    moved = re.findall(
        r"= (\S+) (?:all-gather|all-to-all|collective-permute|all-reduce)\(",
        compiled.as_text(),
    )
    assert moved
    for shape in moved:
        sizes = [int(n) for n in re.findall(r"\d+", shape.split("[")[1].split("]")[0])]
        assert np.prod(sizes) <= 64, shape


@pytest.mark.parametrize("rows", [64, 1024], ids=["by bits", "by digits"])
def test_under_shard_map_the_shards_of_all_devices_count(rows):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal[: rows * 256].reshape(rows, 256)
    y = normal[-4096:]

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "i"), P("i"), P()), out_specs=P()
    )
    def select(x, y, near):
        return threshold({"x": x, "y": y}, np.float32(0.9), near=near, axis_name="i")

    expected = threshold({"x": x, "y": y}, np.float32(0.9))
    for near in (-1.0, float(expected), 0.1):
        assert select(x, y, np.float32(near)) == expected


def test_under_pmap_every_replica_has_the_same_bits():
    copies = np.stack([normal] * 2)
    ts = jax.pmap(lambda x: threshold([x], np.float32(0.9)))(copies)
    assert ts[0] == ts[1] == threshold([normal], np.float32(0.9))
