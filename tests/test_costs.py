"""A share of multiply-adds is met exactly: every weight counts for what it costs."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import st3jax
from st3jax.selection.quantile import threshold

F16, BF16, F32, F64 = map(jnp.dtype, ("float16", "bfloat16", "float32", "float64"))
DTYPES = {
    "float16": (F16,) * 4,
    "bfloat16": (BF16,) * 4,
    "float32": (F32,) * 4,
    "float64": (F64,) * 4,
    "mixed": (F32, BF16, F64, F16),
}
SHAPES = (3, 4), (7,), (), (2, 2)
SIZES = [math.prod(shape) for shape in SHAPES]
MOST = 2**53
COSTS = {
    "equal": (6, 6, 6, 6),
    "of layers": (1024, 64, 1, 16),
    "coprime": (3, 5, 7, 11),
    "with a free leaf": (4, 0, 6, 10),
    "one dear weight": (1, 2, 10_000, 3),
    "far apart": (1, 2**40, 3, 2**33 + 1),
    "up to 2**53": (1, 1, MOST - 23, 1),
}
FRACTIONS = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 1.0])

each_cost = pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
few = settings(deadline=None, max_examples=12)


@pytest.fixture(autouse=True)
def signalling_nans():
    """Numpy warns of them when it converts or compares."""
    with np.errstate(invalid="ignore", over="ignore"):
        yield


@functools.cache
def selecting(costs):
    """The jitted threshold of a list of leaves with these costs."""
    chosen = None if costs is None else list(costs)
    return jax.jit(lambda leaves, fraction: threshold(leaves, fraction, costs=chosen))


def cut(leaves, fraction, costs):
    """The threshold for a fraction that is traced in float64."""
    with jax.enable_x64(True):
        return np.asarray(selecting(costs)(leaves, np.float64(fraction)))


def magnitudes(leaf):
    """Sizes as float64, which holds every one of them exactly."""
    return np.abs(np.asarray(leaf).astype(np.float64)).ravel()


def in_order(leaves, costs):
    """The scores, sorted, and what all of them up to each one cost together."""
    unit = math.gcd(*costs)
    counted = [(magnitudes(x), c // unit) for x, c in zip(leaves, costs, strict=True)]
    sizes = np.concatenate([x for x, _ in counted])
    each = np.concatenate([np.full(x.size, c, np.int64) for x, c in counted])
    sizes, each = sizes[each > 0], each[each > 0]
    order = np.argsort(sizes, kind="stable")
    return sizes[order], np.cumsum(each[order])


def neighbours(leaves, costs, fraction):
    """The scores at the floor of the position and after it, and the rest between them.

    The position is in the multiset that has every score as often as it costs.
    """
    sizes, up_to = in_order(leaves, costs)
    last = int(up_to[-1]) - 1
    position = float(fraction) * last
    k = math.floor(position)
    low, high = np.searchsorted(up_to, [k, min(k + 1, last)], side="right")
    return sizes[low], sizes[high], position - k


def assert_cuts(t, leaves, costs, fraction):
    """A threshold is where the contract says, without any slack in what it cuts."""
    low, high, gap = neighbours(leaves, costs, fraction)
    value = np.float64(t)
    if np.isnan(low):
        assert np.isnan(value)
        return
    assert value >= low
    if high == low:
        assert value == low
    else:
        assert not value >= high
    if np.isfinite(high):
        info = np.finfo(t.dtype)
        slack = 4 * float(info.eps) * high + 2 * float(info.smallest_normal)
        assert abs(value - (low + gap * (high - low))) <= slack


def arrays(numbers, dtypes):
    parts = np.split(numbers, np.cumsum(SIZES)[:-1])
    return [
        part.astype(dtype).reshape(shape)
        for part, dtype, shape in zip(parts, dtypes, SHAPES, strict=True)
    ]


def anything(dtype):
    """All that a dtype can hold: ties, zeros, subnormal numbers, infinity and NaN."""
    bits = hnp.arrays(f"u{dtype.itemsize}", sum(SIZES))
    ties = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0])
    return bits.map(lambda bits: bits.view(dtype)) | hnp.arrays(
        np.float32, sum(SIZES), elements=ties
    )


# The threshold


@pytest.mark.parametrize(
    ("name", "of_leaves"),
    [("float32", costs) for costs in COSTS]
    + [
        (name, costs)
        for name in ("float16", "bfloat16", "float64", "mixed")
        for costs in ("coprime", "with a free leaf", "up to 2**53")
    ],
)
def test_the_threshold_is_that_of_scores_repeated_as_often_as_they_cost(
    name, of_leaves
):
    dtypes, costs = DTYPES[name], COSTS[of_leaves]
    narrowest = F16 if name == "mixed" else dtypes[0]

    @few
    @given(anything(narrowest), FRACTIONS)
    @example(np.linspace(1, 2, sum(SIZES)), 1.0)
    @example(np.linspace(1, 2, sum(SIZES)), 0.0)
    def check(numbers, fraction):
        leaves = arrays(numbers, dtypes)
        assert_cuts(cut(leaves, fraction, costs), leaves, costs, fraction)

    check()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_subnormal_numbers_count_beside_float64(dtype):
    least = np.array(jnp.finfo(dtype).smallest_subnormal, dtype)
    leaves = [np.array([0.0, least, 3 * least], dtype), np.ones(2)]
    for fraction, expected in ((0.0, 0.0), (0.25, least), (0.5, 3 * least), (1, 1.0)):
        with jax.enable_x64(True):
            t = threshold(leaves, fraction, costs=[2, 2])
        assert t.dtype == jnp.float64
        np.testing.assert_array_equal(np.asarray(t), np.float64(expected))


@pytest.mark.parametrize("name", ["equal", "coprime", "with a free leaf"])
def test_the_threshold_is_the_quantile_of_numpy_over_the_repeated_scores(name):
    costs = COSTS[name]
    unit = math.gcd(*costs)

    @few
    @given(st.integers(0, 2**32 - 1), FRACTIONS)
    def check(seed, fraction):
        numbers = np.random.default_rng(seed).normal(size=sum(SIZES))
        leaves = arrays(numbers, DTYPES["float32"])
        pairs = zip(leaves, costs, strict=True)
        repeated = np.concatenate(
            [np.repeat(magnitudes(leaf), cost // unit) for leaf, cost in pairs]
        )
        expected = np.quantile(repeated, fraction)
        np.testing.assert_allclose(cut(leaves, fraction, costs), expected, rtol=1e-6)

    check()


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.integers(0, 2**40), min_size=4, max_size=4).filter(any),
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 1000]),
)
def test_at_least_the_asked_cost_goes_and_no_score_that_could_stay(costs, seed, kinds):
    rng = np.random.default_rng(seed)
    leaves = arrays(rng.integers(1, kinds, sum(SIZES)), DTYPES["float32"])
    unit = math.gcd(*costs)
    scores = [
        (float(size), cost // unit)
        for leaf, cost in zip(leaves, costs, strict=True)
        for size in leaf.ravel()
    ]
    total = sum(cost for _, cost in scores)
    for fraction in (0.0, 0.1, 0.5, float(rng.random()), 0.9, 1.0):
        t = cut(leaves, fraction, tuple(costs))
        asked = math.floor(fraction * (total - 1)) + 1
        pruned = [(size, cost) for size, cost in scores if size <= t]
        largest = max(size for size, cost in pruned if cost)
        assert sum(cost for _, cost in pruned) >= asked
        assert sum(cost for size, cost in pruned if size < largest) < asked


@pytest.mark.parametrize("cost", [1, 7, 3 * 2**40, 2**62])
def test_equal_costs_give_the_bits_of_no_costs(cost):
    @few
    @given(anything(F32), FRACTIONS)
    def check(numbers, fraction):
        leaves = arrays(numbers, DTYPES["float32"])
        weighted = cut(leaves, fraction, (cost,) * 4)
        assert weighted.tobytes() == cut(leaves, fraction, None).tobytes()

    check()


@each_cost
def test_only_the_ratios_of_costs_matter(costs):
    leaves = arrays(np.random.default_rng(0).normal(size=24), DTYPES["float32"])
    for fraction in np.linspace(0, 1, 14):
        expected = cut(leaves, fraction, costs)
        for factor in (3, 2**9):
            larger = tuple(factor * cost for cost in costs)
            assert cut(leaves, fraction, larger) == expected


def test_a_leaf_that_costs_nothing_does_not_count():
    rng = np.random.default_rng(1)
    leaves = arrays(rng.normal(size=24), DTYPES["float32"])
    leaves[1] *= 1e-3
    for fraction in (0.0, 0.2, 0.5, 0.9, 1.0):
        rest = [leaves[0], *leaves[2:]]
        with_free = cut(leaves, fraction, (5, 0, 3, 2))
        without = jax.jit(lambda x, s: threshold(x, s, costs=[5, 3, 2]))
        with jax.enable_x64(True):
            assert with_free == np.asarray(without(rest, np.float64(fraction)))


def test_costs_may_be_numpy_and_jax_numbers_and_whole_floats():
    leaves = arrays(np.random.default_rng(2).normal(size=24), DTYPES["float32"])
    expected = threshold(leaves, 0.6, costs=[2, 3, 5, 7])
    costs = [np.int64(2), jnp.int32(3), 5.0, np.float32(7)]
    assert threshold(leaves, 0.6, costs=costs) == expected


def test_the_position_among_2_to_53_is_exact_to_one():
    """The dear weight takes all but three of the cost; numbers around its ends."""
    leaves = [np.array([2.0], np.float32), np.array([1.0, 3.0, 4.0], np.float32)]
    costs = MOST - 3, 1
    at = {0.0: 1.0, 1 / MOST: 1.0, 2 / MOST: 2.0, 0.5: 2.0, 1.0: 4.0}
    for fraction, expected in at.items():
        low, _, _ = neighbours(leaves, costs, fraction)
        assert low == expected
        assert_cuts(cut(leaves, fraction, costs), leaves, costs, fraction)
    assert 3.0 <= cut(leaves, 1 - 2**-53, costs) < 4.0


@pytest.mark.parametrize(
    "costs", [(MOST - 2, 1), (2**52 + 1, 2**51 + 1), (2**62 + 1, 2), (2**62, 2**61 - 1)]
)
def test_more_than_2_to_53_of_costs_is_refused_in_a_clear_sentence(costs):
    leaves = [jnp.ones(1), jnp.ones(3)]
    with pytest.raises(ValueError, match=r"add up to \d+, more than 2\*\*53"):
        jax.jit(lambda x: threshold(x, 0.5, costs=list(costs))).lower(leaves)


def test_a_cost_beyond_64_bits_is_refused_for_its_size():
    with pytest.raises(ValueError, match=r"more than 2\*\*53"):
        threshold([jnp.ones(1), jnp.ones(3)], 0.5, costs=[2**70 + 1, 2])


def test_threshold_with_costs_works_under_vmap():
    leaves = arrays(np.random.default_rng(3).normal(size=24), DTYPES["float32"])
    costs, fractions = COSTS["coprime"], np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    with jax.enable_x64(True):
        together = jax.vmap(selecting(costs), (None, 0))(leaves, fractions)
    single = [cut(leaves, fraction, costs) for fraction in fractions]
    np.testing.assert_array_equal(together, single)
    several = [np.stack([x, 2 * x, -x]) for x in leaves]
    with jax.enable_x64(True):
        together = jax.vmap(selecting(costs))(several, fractions[1:4])
    single = [cut([x[i] for x in several], fractions[i + 1], costs) for i in range(3)]
    np.testing.assert_array_equal(together, single)


@pytest.mark.parametrize("costs", [COSTS["coprime"], COSTS["up to 2**53"]])
def test_a_concrete_fraction_is_like_a_traced_one(costs):
    leaves = arrays(np.random.default_rng(4).normal(size=24), DTYPES["float32"])
    for fraction in (0.0, 0.37, 1.0):
        concrete = np.asarray(threshold(leaves, fraction, costs=list(costs)))
        assert concrete == cut(leaves, fraction, costs)


# Large arrays, where digits are searched


LARGE = 300_000


def large(kind):
    """Three leaves of different scales, one of them large."""
    rng = np.random.default_rng(5)
    sizes = LARGE, 2_000, 30
    x = [
        rng.normal(size=n).astype(np.float32) * s
        for n, s in zip(sizes, (1, 0.2, 3), strict=True)
    ]
    if kind == "ties":
        x = [np.round(part * 4) for part in x]
    if kind == "not finite":
        x[0][:1000], x[0][1000:2000] = np.inf, np.nan
    return x


LARGE_COSTS = {
    "equal": (5, 5, 5),
    "of layers": (49, 12_544, 1),
    "huge": (1, 2**40, 2**33 + 1),
    "near the limit": (
        2**34,
        2**34 + 1,
        (MOST - (LARGE + 2_000) * 2**34 - 2_000) // 30,
    ),
    "the large leaf is free": (0, 1, 3),
}


@functools.cache
def by_digits(costs):
    """Under ``shard_map`` over one device, where arrays are known to be whole."""
    mesh = jax.make_mesh((1,), ("i",), (AxisType.Auto,), devices=jax.devices()[:1])

    def select(leaves, fraction, near):
        return threshold(leaves, fraction, near=near, costs=list(costs))

    return jax.jit(jax.shard_map(select, mesh=mesh, in_specs=P(), out_specs=P()))


@pytest.mark.parametrize("costs", LARGE_COSTS.values(), ids=LARGE_COSTS)
def test_large_leaves_are_cut_exactly_by_either_search_and_from_any_hint(costs):
    for kind in ("normal", "ties", "not finite"):
        leaves = large(kind)
        for fraction in (0.0, 0.5, 0.9, 0.999, 1.0):
            by_bits = cut(leaves, fraction, costs)
            assert_cuts(by_bits, leaves, costs, fraction)
            for near in (-1.0, float(by_bits) * 1.003, 1e-30, np.nan):
                with jax.enable_x64(True):
                    found = by_digits(costs)(
                        leaves, np.float64(fraction), np.float32(near)
                    )
                assert np.asarray(found).tobytes() == by_bits.tobytes()


@pytest.mark.parametrize("name", ["of layers", "huge"])
def test_the_next_score_follows_only_the_last_copy_of_a_score(name):
    leaves, costs = large("normal"), LARGE_COSTS[name]
    _, up_to = in_order(leaves, costs)
    dear = np.flatnonzero(np.diff(up_to) > 2)
    last = int(up_to[-1]) - 1
    for end in up_to[1:][dear[[0, len(dear) // 2, -2]]]:
        for k in (int(end) - 3, int(end) - 2, int(end) - 1):
            fraction = (k + 0.5) / last
            by_bits = cut(leaves, fraction, costs)
            assert_cuts(by_bits, leaves, costs, fraction)
            with jax.enable_x64(True):
                found = by_digits(costs)(leaves, np.float64(fraction), np.float32(-1))
            assert np.asarray(found).tobytes() == by_bits.tobytes()


def test_the_large_leaves_above_are_searched_by_both_searches():
    leaves, costs = large("normal"), LARGE_COSTS["huge"]
    digits = by_digits(costs).lower(leaves, np.float32(0.5), np.float32(1)).as_text()
    bits = selecting(costs).lower(leaves, np.float32(0.5)).as_text()
    assert f"tensor<{LARGE}xi8>" in digits
    assert f"tensor<{LARGE}xi8>" not in bits


def test_a_leaf_sharded_by_jit_is_cut_with_the_same_bits():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    rng = np.random.default_rng(6)
    leaves = [
        rng.normal(size=(64, 32)).astype(np.float32),
        0.3 * rng.normal(size=(16, 8)).astype(np.float32),
    ]
    for costs in ((3, 49), (1, 2**40)):
        alone = [cut(leaves, s, costs) for s in (0.1, 0.5, 0.9)]
        for specs in ((P("a", "b"), P()), (P(None, "b"), P(("a", "b")))):
            sharded = [
                jax.device_put(x, NamedSharding(mesh, spec))
                for x, spec in zip(leaves, specs, strict=True)
            ]
            together = [cut(sharded, s, costs) for s in (0.1, 0.5, 0.9)]
            np.testing.assert_array_equal(together, alone)


# By hand, under shard_map


def mixed_leaves(rows):
    """To be sharded on rows, on columns and over two axes; one on every device."""
    rng = np.random.default_rng(7)
    shapes = (rows, 16), (8, 24), (16, 4), (5, 7)
    return [
        (s * rng.normal(size=shape)).astype(np.float32)
        for s, shape in zip((1, 0.3, 2, 0.7), shapes, strict=True)
    ]


MIXED = P("i"), P(None, "j"), P(("i", "j")), P()
MIXED_COSTS = {"no": None, "small": (3, 5, 7, 11), "huge": (1, 2**40, 2**33 + 1, 3)}


@pytest.mark.parametrize("costs", MIXED_COSTS.values(), ids=MIXED_COSTS)
@pytest.mark.parametrize("rows", [64, 65_536], ids=["by bits", "by digits"])
def test_shards_and_copies_have_the_threshold_of_whole_arrays(rows, costs):
    mesh = jax.make_mesh((4, 2), ("i", "j"), (AxisType.Auto,) * 2)
    chosen = None if costs is None else list(costs)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(list(MIXED), P(), P()), out_specs=P()
    )
    def select(leaves, fraction, near):
        return threshold(
            leaves, fraction, near=near, costs=chosen, axis_name=("i", "j")
        )

    leaves = mixed_leaves(rows)
    with jax.enable_x64(True):
        args = leaves, np.float64(0.5), np.float32(1)
        assert ("xi8>" in select.lower(*args).as_text()) == (rows > 64)
        for fraction in (0.0, 0.1, 0.5, 0.9, 0.997, 1.0):
            expected = cut(leaves, fraction, costs)
            assert_cuts(expected, leaves, costs or (1,) * 4, fraction)
            for near in (-1.0, float(expected), 0.1):
                found = select(leaves, np.float64(fraction), np.float32(near))
                assert np.asarray(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("costs", [None, (3, 5)])
def test_without_tracking_every_leaf_is_taken_as_sharded(costs):
    mesh = jax.make_mesh((8,), ("i",), (AxisType.Auto,))
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(2, 16, 6)).astype(np.float32)
    chosen = None if costs is None else list(costs)

    def select(tracked):
        function = functools.partial(threshold, costs=chosen, axis_name="i")
        specs = [P("i"), P()], P()
        return jax.jit(
            jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=tracked
            )
        )

    repeated = np.tile(y, (8, 1))
    with jax.enable_x64(True):
        once, often = select(True), select(False)
        for fraction in (0.0, 0.13, 0.5, 0.9, 1.0):
            s = np.float64(fraction)
            assert once([x, y], s) == cut([x, y], fraction, costs)
            assert often([x, y], s) == cut([x, repeated], fraction, costs)
        assert once([x, y], 0.37) != often([x, y], 0.37)


# Pruning


KERNELS = {"Conv_0": (3, 3, 2, 4), "Dense_0": (8, 5), "head": (5, 2)}
USES = {"Conv_0/kernel": 196, "Dense_0/kernel": 14, "head/kernel": 7}
EVERY = {**USES, "embed": 9}


def network(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-1, 1, size=len(KERNELS))
    layers = {
        name: {
            "kernel": (rng.normal(size=shape) * s).astype(dtype),
            "bias": np.zeros(shape[-1:], dtype),
        }
        for (name, shape), s in zip(KERNELS.items(), scale, strict=True)
    }
    return {**layers, "embed": np.ones((4, 6), dtype)}


def kernels(params):
    return [np.asarray(params[name]["kernel"]) for name in KERNELS]


def scores(params, criterion):
    """By brute force, in the precision of the library."""
    factors = [
        math.sqrt(sum(x.shape)) if criterion == "l1_sigma" else 1
        for x in kernels(params)
    ]
    return [
        np.abs(x) * x.dtype.type(f)
        for x, f in zip(kernels(params), factors, strict=True)
    ]


def expected_zeros(params, sparsity, costs, criterion="l1"):
    """Which weights have to go, of each kernel."""
    each = [costs[f"{name}/kernel"] for name in KERNELS]
    prunable = sum(c * x.size for c, x in zip(each, kernels(params), strict=True))
    other = costs.get("embed", 0) * params["embed"].size
    share = Fraction(sparsity) * (prunable + other) / prunable
    sizes = scores(params, criterion)
    low, _, _ = neighbours(sizes, each, float(min(share, 1)))
    return [size <= low for size in sizes]


def assert_zeros(weights, expected):
    for kernel, zero in zip(kernels(weights), expected, strict=True):
        np.testing.assert_array_equal(kernel == 0, zero)


@functools.cache
def pruning(costs, criterion):
    return jax.jit(
        functools.partial(st3jax.prune, costs=dict(costs), criterion=criterion)
    )


def prune(params, sparsity, costs, criterion="l1"):
    """Pruning with a sparsity that is traced in float64."""
    with jax.enable_x64(True):
        pruned = pruning(tuple(costs.items()), criterion)(params, np.float64(sparsity))
        return jax.tree.map(np.asarray, pruned)


def removed(weights, costs):
    return sum(
        costs[f"{name}/kernel"] * int((weights[name]["kernel"] == 0).sum())
        for name in KERNELS
    )


@pytest.mark.parametrize("criterion", ["l1", "l1_sigma"])
@pytest.mark.parametrize("costs", [USES, EVERY], ids=["kernels", "whole model"])
def test_prune_removes_the_asked_share_of_multiply_adds(costs, criterion):
    sizes = {name: math.prod(shape) for name, shape in KERNELS.items()}
    prunable = sum(sizes[name] * USES[f"{name}/kernel"] for name in KERNELS)
    total = prunable + 24 * costs.get("embed", 0)

    @few
    @given(st.integers(0, 2**32 - 1), st.floats(1e-3, 0.98) | st.just(0.9))
    def check(seed, sparsity):
        params = network(seed)
        pruned = prune(params, sparsity, costs, criterion)
        assert_zeros(pruned, expected_zeros(params, sparsity, costs, criterion))
        unit = math.gcd(*USES.values())
        assert removed(pruned, costs) > sparsity * total - unit
        for before, after in zip(kernels(params), kernels(pruned), strict=True):
            np.testing.assert_array_equal(after, np.where(after == 0, 0, before))
        np.testing.assert_array_equal(pruned["embed"], params["embed"])

    check()


def test_a_share_of_the_kernels_is_more_of_them_than_of_the_whole_model():
    params = network(0)
    dear = {**USES, "embed": 500}
    of_kernels, of_model = prune(params, 0.4, USES), prune(params, 0.4, dear)
    assert removed(of_kernels, USES) < removed(of_model, USES)
    share = 0.4 * (sum(math.prod(KERNELS[n]) * USES[f"{n}/kernel"] for n in KERNELS))
    assert removed(of_model, USES) >= share + 0.4 * 500 * 24 - 7


def test_equal_costs_prune_as_no_costs():
    params = network(1)
    same = dict.fromkeys(USES, 12_544)
    for sparsity in (0.1, 0.9):
        expected = st3jax.prune(params, sparsity)
        jax.tree.map(
            np.testing.assert_array_equal, prune(params, sparsity, same), expected
        )


def test_costs_and_sparsities_may_be_those_of_a_configuration():
    """A ConfigDict is no mapping by its type, and forgets the order of its keys."""
    params = network(1)
    expected = st3jax.prune(params, 0.7, costs=USES)
    pruned = st3jax.prune(params, 0.7, costs=ConfigDict(USES))
    jax.tree.map(np.testing.assert_array_equal, pruned, expected)
    shares = {"Conv_0/*": 0.2, "head*": 0.9, "*": 0.5}
    found = [st3jax.prune(params, one) for one in (shares, ConfigDict(shares))]
    jax.tree.map(np.testing.assert_array_equal, *found)
    zeros = [float((x == 0).mean()) for x in kernels(found[1])]
    np.testing.assert_allclose(zeros, [0.2, 0.5, 0.9], atol=0.1)
    for options in ({"costs": USES}, {"sparsity": shares}):
        states = []
        for kind in (dict, ConfigDict):
            chosen = {"sparsity": 0.7} | {k: kind(v) for k, v in options.items()}
            tx = st3jax.st3(SGD, **chosen)
            states.append(jax.jit(tx.update)(params, tx.init(params), params)[1])
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_no_share_prunes_nothing_and_the_whole_share_everything():
    params = network(2)
    none, all_of_it = prune(params, 0.0, USES), prune(params, 1.0, USES)
    jax.tree.map(np.testing.assert_array_equal, none, params)
    assert all((kernel == 0).all() for kernel in kernels(all_of_it))


@pytest.mark.parametrize(("weights", "others"), [(3, 8), (5, 14), (7, 2), (9, 16)])
def test_all_that_the_prunable_leaves_cost_can_be_asked_for(weights, others):
    params = {
        "kernel": jnp.arange(1.0, weights + 1)[None, :],
        "embed": jnp.ones(others),
    }
    costs = {"kernel": 1, "embed": 1}
    share = weights / (weights + others)
    pruned = st3jax.prune(params, share, costs=costs)
    assert not pruned["kernel"].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_leaves_that_cost_nothing_are_refused_in_a_clear_sentence(sparsity):
    free = dict.fromkeys(USES, 0)
    refused = pytest.raises(ValueError, match="multiply-adds")
    with refused:
        st3jax.prune(network(3), sparsity, costs=free)
    with refused:
        pruning(tuple(free.items()), "l1").lower(network(3), sparsity)
    with refused:
        with_costs(free, sparsity).init(network(3))


# Training


BEGIN, END = 2, 6
SHARE = 0.8
RAMP = st3jax.polynomial_ramp(SHARE, BEGIN, END)
SGD = optax.sgd(0.05, momentum=0.9)


def share_at(step):
    left = min(max(END - step, 0), END - BEGIN) / (END - BEGIN)
    return SHARE * (1 - left**3)


def gradients(i, dtype=np.float32):
    return jax.tree.map(lambda w: 0.3 * w, network(100 + i, dtype))


def trajectory(tx, params, steps, update=None):
    """Yields parameters and optimizer state after each step."""
    update = update or jax.jit(tx.update)
    opt_state = tx.init(params)
    for i in range(steps):
        updates, opt_state = update(gradients(i), opt_state, params)
        params = optax.apply_updates(params, updates)
        yield params, opt_state


def with_costs(costs, sparsity=RAMP, **options):
    return st3jax.st3(SGD, sparsity, costs=costs, **options)


@pytest.mark.parametrize(
    ("costs", "options"),
    [
        (USES, {}),
        (EVERY, {"soft": False, "rescale": False}),
        (EVERY, {"criterion": "l1_sigma"}),
    ],
    ids=["kernels", "whole model, hard", "whole model, sigma"],
)
def test_the_ramp_is_followed_in_multiply_adds(costs, options):
    tx = with_costs(costs, **options)
    criterion = options.get("criterion", "l1")
    for i, (params, opt_state) in enumerate(trajectory(tx, network(4), END + 2)):
        weights = st3jax.finalize(params, opt_state)
        share = share_at(i + 1)
        if share == 0:
            jax.tree.map(np.testing.assert_array_equal, weights, params)
        else:
            assert_zeros(weights, expected_zeros(params, share, costs, criterion))


def test_the_mask_of_costs_is_fixed_at_the_freeze():
    tx = with_costs(EVERY, freeze_step=END + 1)
    run = list(trajectory(tx, network(5), END + 4))
    twin = list(trajectory(with_costs(EVERY), network(5), END + 1))
    fixed = [kernel == 0 for kernel in kernels(st3jax.finalize(*twin[-1]))]
    for params, _ in run[END:]:
        assert_zeros(params, fixed)
    assert any(zero.any() for zero in fixed)


def test_costs_are_met_with_float64_weights_of_which_one_leaf_is_free():
    """Its dtype is that of all thresholds, whether it counts or not."""
    costs = {**USES, "head/kernel": 0}
    params = network(6)
    params["head"]["kernel"] = params["head"]["kernel"].astype(np.float64)
    tx = with_costs(costs, 0.7)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        opt_state = tx.init(params)
        _, updated = jax.jit(tx.update)(params, opt_state, params)
        assert jax.tree.structure(updated) == jax.tree.structure(opt_state)
        found = st3jax.find_state(updated).thresholds["Conv_0"]["kernel"]
        assert found.dtype == jnp.float64


def test_training_with_kernels_sharded_by_jit_has_the_bits_of_one_device():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    tx = with_costs(EVERY, rescale=False)

    def spec(path, leaf):
        kernel = st3jax.trees.path_name(path) == "Conv_0/kernel"
        return NamedSharding(mesh, P(None, None, "b", "a") if kernel else P())

    params = jax.device_put(
        network(7), jax.tree_util.tree_map_with_path(spec, network(7))
    )
    alone = trajectory(tx, network(7), END + 2)
    for ours, theirs in zip(trajectory(tx, params, END + 2), alone, strict=True):
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((ours, theirs)))


@pytest.mark.parametrize(
    ("costs", "sparsity"),
    [(USES, RAMP), (EVERY, RAMP), ({**USES, "embed": 60}, 0.9)],
    ids=["kernels", "whole model", "dear embedding"],
)
def test_training_with_shards_by_hand_has_the_bits_of_one_device(costs, sparsity):
    """A kernel is sharded, the others and what is not prunable are copies."""
    mesh = jax.make_mesh((2,), ("i",), (AxisType.Auto,))
    tx = with_costs(costs, sparsity, rescale=False, axis_name="i")
    specs = jax.tree.map(lambda _: P(), network(8))
    specs["Conv_0"]["kernel"] = P(None, None, "i")
    opt_state = tx.init(network(8))
    of_state = optax.tree.map_params(
        tx, lambda _, spec: spec, opt_state, specs, transform_non_params=lambda _: P()
    )
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(specs, of_state, specs),
            out_specs=(specs, of_state),
        )
    )
    alone = with_costs(costs, sparsity, rescale=False)
    ours = trajectory(tx, network(8), END + 1, update)
    theirs = trajectory(alone, network(8), END + 1)
    for pair in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get(pair))


# Bad use


WEIGHT = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


def build(sparsity=0.5, **options):
    return lambda: st3jax.st3(SGD, sparsity, **options)


def init(sparsity=0.5, params=WEIGHT, **options):
    """Only the parameters' shapes are there: nothing can be compiled from them."""
    shapes = jax.eval_shape(lambda: params)
    return lambda: st3jax.st3(SGD, sparsity, **options).init(shapes)


def pruned(sparsity=0.5, **options):
    return lambda: st3jax.prune(WEIGHT, sparsity, **options)


def with_traced_cost(cost):
    return jax.eval_shape(
        lambda cost: st3jax.prune(WEIGHT, 0.5, costs={"kernel": cost}),
        cost,
    )


def costing(cost):
    return init(costs={"kernel": cost})


WHOLE = ("the cost of 'kernel'", "whole number, 0 or more")
OWN = ("costs need distribution 'global'",)
MAPPED = ("a sparsity for each path is a distribution of its own", "costs")
COST = {"kernel": 1}

BAD_USES = {
    "a list": (build(costs=[1]), TypeError, "a mapping", "list"),
    "a number": (build(costs=3), TypeError, "a mapping", "int"),
    "prune by a list": (pruned(costs=[1]), TypeError, "a mapping"),
    "missing": (init(costs={"bias": 1}), ValueError, "leaf 'kernel'", "'bias'"),
    "empty": (init(costs={}), ValueError, "leaf 'kernel'", "none at all"),
    "no parameter": (
        init(costs={"kernel": 1, "Kernel": 2}),
        ValueError,
        "'Kernel'",
        "no parameter",
        "'kernel'",
    ),
    "prune by no parameter": (
        pruned(costs={"kernel": 1, "scale": 2}),
        ValueError,
        "'scale'",
        "no parameter",
        "'bias'",
    ),
    "prune missing": (pruned(costs={}), ValueError, "leaf 'kernel'"),
    "negative": (costing(-3), ValueError, *WHOLE, "-3"),
    "fractional": (costing(1.5), TypeError, *WHOLE, "1.5"),
    "True": (costing(True), TypeError, *WHOLE, "True"),
    "numpy True": (costing(np.True_), TypeError, *WHOLE, "True"),
    "NaN": (costing(math.nan), TypeError, *WHOLE, "nan"),
    "infinite": (costing(math.inf), TypeError, *WHOLE, "inf"),
    "complex": (costing(1j), TypeError, *WHOLE, "1j"),
    "a word": (costing("many"), TypeError, *WHOLE, "'many'"),
    "None": (costing(None), TypeError, *WHOLE, "None"),
    "an array": (costing(np.ones(2)), TypeError, *WHOLE),
    "traced": (lambda: with_traced_cost(jnp.array(3)), TypeError, *WHOLE),
    "negative, of others": (
        init(costs={"kernel": 1, "bias": -1}),
        ValueError,
        "the cost of 'bias'",
        "-1",
    ),
    "too much": (
        init(0.9, costs={"kernel": 1, "bias": 2}),
        ValueError,
        "a share of 0.9 of the multiply-adds cannot be removed",
        "0.5",
    ),
    "too much at the end": (
        init(RAMP, costs={"kernel": 1, "bias": 2}),
        ValueError,
        "a share of 0.8 of the multiply-adds cannot be removed",
        "0.5",
    ),
    "prune too much": (
        pruned(0.51, costs={"kernel": 1, "bias": 2}),
        ValueError,
        "a share of 0.51 of the multiply-adds cannot be removed",
        "0.5",
    ),
    "all free": (init(costs={"kernel": 0}), ValueError, "multiply-adds"),
    "uniform": (
        build(costs=COST, distribution="uniform"),
        ValueError,
        *OWN,
        "'uniform'",
    ),
    "erk": (
        build(costs=COST, distribution="erk"),
        ValueError,
        *OWN,
        "'erk'",
    ),
    "prune by erk": (
        pruned(costs=COST, distribution="erk"),
        ValueError,
        *OWN,
    ),
    "mapping": (build({"*": 0.5}, costs=COST), ValueError, *MAPPED),
    "prune's mapping": (
        pruned({"*": 0.5}, costs=COST),
        ValueError,
        *MAPPED,
    ),
    "threshold of free scores": (
        lambda: threshold(jnp.ones(3), 0.5, costs=0),
        ValueError,
        "no score",
    ),
    "threshold of a negative cost": (
        lambda: threshold(jnp.ones(3), 0.5, costs=-2),
        ValueError,
        "a cost is a whole number, 0 or more, got -2",
    ),
    "threshold of a fraction": (
        lambda: threshold(jnp.ones(3), 0.5, costs=0.5),
        TypeError,
        "a cost is a whole number, 0 or more, got 0.5",
    ),
}


@pytest.mark.parametrize("name", BAD_USES)
def test_bad_use_of_costs_is_explained_in_one_short_sentence(name):
    bad_use, error, *texts = BAD_USES[name]
    with pytest.raises(error) as caught:
        bad_use()
    message = str(caught.value)
    assert [text for text in texts if text not in message] == []
    assert "\n" not in message
    assert len(message) < 320
