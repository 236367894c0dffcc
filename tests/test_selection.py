"""The threshold is the exact quantile: it cuts the asked number of weights, no more."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from st3jax.rule.scores import score_factor, scores, unscaled
from st3jax.selection import keys
from st3jax.selection.quantile import threshold

F16, BF16, F32, F64 = map(jnp.dtype, ("float16", "bfloat16", "float32", "float64"))
Leaf = jax.ShapeDtypeStruct
TREES = {  # with the dtype whose numbers fill the tree
    "one leaf": (F32, Leaf((33,), F32)),
    "double": (F64, [Leaf((2, 3), F64), Leaf((7,), F64)]),
    "float16": (F16, {"a": {"kernel": Leaf((3, 4), F16)}, "b": Leaf((5,), F16)}),
    "bfloat16": (BF16, (Leaf((2, 2, 3), BF16), Leaf((1,), BF16))),
    "scalars and empty leaves": (F32, [Leaf((), F32), Leaf((0, 3), F32)]),
    "single and half": (
        BF16,
        {"a": Leaf((4, 2), BF16), "b": [Leaf((), F32), Leaf((3, 1, 3), F32)]},
    ),
    "all four": (
        F16,
        [Leaf((6,), F64), Leaf((5,), F32), Leaf((4, 2), F16), Leaf((1,), F16)],
    ),
}
FRACTIONS = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0])
)

each_tree = pytest.mark.parametrize("name", TREES)
few = settings(deadline=None, max_examples=100)
select = jax.jit(threshold)


@pytest.fixture(autouse=True)
def signalling_nans():
    """Numpy warns of them when it converts or compares."""
    with np.errstate(invalid="ignore", over="ignore"):
        yield


def size_of(name):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(TREES[name][1]))


def fill(name, numbers):
    """The tree with these numbers, cast to the dtype of each leaf."""
    leaves, treedef = jax.tree.flatten(TREES[name][1])
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = np.split(numbers, ends[:-1])
    arrays = [
        part.astype(leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def any_weights(name):
    """All that a dtype can hold: ties, zeros, subnormal numbers, infinity and NaN."""
    dtype = TREES[name][0]
    bits = hnp.arrays(f"u{dtype.itemsize}", size_of(name))
    return bits.map(lambda bits: fill(name, bits.view(dtype)))


@st.composite
def distinct_weights(draw, name):
    """No two of the same magnitude, some of them one ulp apart."""
    dtype, n = TREES[name][0], size_of(name)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    infinity = np.array(np.inf, dtype).view(unsigned).item()
    start = draw(st.integers(0, infinity - n))
    near = st.integers(start, start + n)
    key = draw(
        st.lists(near | st.integers(0, infinity), min_size=n, max_size=n, unique=True)
    )
    sign = draw(hnp.arrays(bool, n))
    numbers = np.array(key, unsigned).view(dtype)
    return fill(name, np.where(sign, -numbers, numbers))


def magnitudes(tree):
    """All of them, sorted, NaN last; float64 holds every one of them exactly."""
    leaves = [np.abs(np.asarray(x).astype(np.float64)) for x in jax.tree.leaves(tree)]
    return np.sort(np.concatenate([leaf.ravel() for leaf in leaves]))


def cut(tree, fraction):
    """The threshold for a fraction that is traced in float64."""
    with jax.enable_x64(True):
        return select(tree, np.float64(fraction))


@each_tree
def test_threshold_is_the_quantile_of_numpy(name):
    @few
    @given(distinct_weights(name), FRACTIONS)
    def check(tree, fraction):
        size = magnitudes(tree)
        above = size[min(math.floor(fraction * (len(size) - 1)) + 1, len(size) - 1)]
        if np.isfinite(above):
            t = cut(tree, fraction)
            expected = np.quantile(size, fraction)
            info = jnp.finfo(t.dtype)
            slack = 4 * float(info.eps) * above + 2 * float(info.smallest_normal)
            assert abs(np.float64(t) - expected) <= slack

    check()


@each_tree
def test_the_pruned_count_is_exact(name):
    @few
    @given(distinct_weights(name), FRACTIONS)
    def check(tree, fraction):
        size = magnitudes(tree)
        pruned = np.sum(size <= np.float64(cut(tree, fraction)))
        assert pruned == math.floor(fraction * (len(size) - 1)) + 1

    check()


@each_tree
def test_threshold_lies_between_its_order_statistic_and_the_next(name):
    @few
    @given(any_weights(name), FRACTIONS)
    def check(tree, fraction):
        size = magnitudes(tree)
        k = math.floor(fraction * (len(size) - 1))
        t = np.float64(cut(tree, fraction))
        if np.isnan(size[k]):
            assert np.isnan(t)
            return
        assert t >= size[k]
        if k + 1 < len(size):
            tied = size[k + 1] == size[k]
            assert t == size[k] if tied else not t >= size[k + 1]

    check()


@each_tree
def test_ties_are_pruned_together(name):
    few_numbers = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0, -2.0])

    @few
    @given(hnp.arrays(np.float32, size_of(name), elements=few_numbers), FRACTIONS)
    def check(numbers, fraction):
        tree = fill(name, numbers)
        size = magnitudes(tree)
        k = math.floor(fraction * (len(size) - 1))
        t = np.float64(cut(tree, fraction))
        assert np.sum(size <= t) == np.sum(size <= size[k])
        assert t == pytest.approx(np.quantile(size, fraction), abs=1e-6)

    check()


LEAST = np.finfo(np.float32).smallest_subnormal
LARGEST = np.finfo(np.float32).max
EDGE_CASES = {
    "all zero": [0.0] * 5,
    "both zeros": [-0.0, 0.0, -0.0, 1.0, 2.0],
    "all equal": [3.0, -3.0, 3.0, 3.0],
    "one ulp apart": [1.0, np.nextafter(np.float32(1), 2), 1.0, 2.0],
    "subnormal": [LEAST, 2 * LEAST, -3 * LEAST, 5 * LEAST, 0.0],
    "subnormal and normal": [LEAST, 1e-38, 1.0, 1e-40, -2e-38],
    "75 decades": 10.0 ** np.linspace(-44, 38, 76) * (-1) ** np.arange(76),
    "least and largest": [LEAST, LARGEST, 0.0, -LARGEST],
    "infinity": [1.0, np.inf, -np.inf, 2.0],
    "all infinite": [np.inf, -np.inf],
    "NaN": [np.nan, 1.0, -np.nan, np.inf, 2.0],
    "all NaN": [np.nan, -np.nan],
}


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases_are_cut_at_their_order_statistic(case, dtype):
    w = np.resize(np.asarray(EDGE_CASES[case], np.float32), 76).astype(dtype)
    size = magnitudes(w)
    for fraction in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0):
        k = math.floor(fraction * (len(size) - 1))
        t = np.float64(cut(w, fraction))
        assert np.isnan(t) == np.isnan(size[k])
        assert np.sum(size <= t) == np.sum(size <= size[k])


def test_infinity_does_not_spill_over_to_smaller_weights():
    assert jnp.isfinite(threshold(jnp.array([1.0, jnp.inf]), 0.5))
    assert threshold(jnp.array([jnp.inf, jnp.nan]), 0.5) == jnp.inf


def test_the_dtype_is_that_of_the_widest_comparison():
    def dtype_of(*scores):
        return jax.eval_shape(threshold, scores, 0.5).dtype

    narrow = Leaf((2,), BF16), Leaf((2,), F16)
    assert dtype_of(*narrow) == dtype_of(*narrow, Leaf((2,), F32)) == F32
    with jax.enable_x64(True):
        assert dtype_of(*narrow) == dtype_of(*narrow, Leaf((2,), F32)) == F32
        assert dtype_of(*narrow, Leaf((1,), F64)) == F64


def test_empty_and_scalar_leaves_count_for_what_they_hold():
    tree = [jnp.zeros((0, 3)), jnp.float32(2), [jnp.array([[-3.0]]), -1.0]]
    assert threshold(tree, 0.5) == 2
    assert threshold(jnp.float32(-5), 0.3) == 5


@each_tree
def test_a_traced_fraction_is_like_a_concrete_one(name):
    tree = fill(name, np.random.default_rng(0).normal(size=size_of(name)))
    size = magnitudes(tree)
    for fraction in np.array([0.0, 0.3, 0.9, 1.0], np.float32):
        with jax.enable_x64(TREES[name][0] == F64 or "four" in name):
            traced = np.asarray(select(tree, fraction))
            concrete = np.asarray(threshold(tree, fraction))
        np.testing.assert_allclose(
            traced, concrete, rtol=4 * np.finfo(traced.dtype).eps
        )
        np.testing.assert_array_equal(size <= traced, size <= concrete)


@pytest.mark.parametrize(("n", "fraction"), [(11, 0.9), (21, 0.7), (1001, 0.95)])
def test_a_concrete_fraction_is_not_rounded_to_float32(n, fraction):
    w = jnp.arange(1.0, n + 1)
    for t in (threshold(w, fraction), jax.jit(lambda w: threshold(w, fraction))(w)):
        assert int((w <= t).sum()) == math.floor(fraction * (n - 1)) + 1


def test_threshold_works_under_vmap():
    rng = np.random.default_rng(1)
    tree = {"a": rng.normal(size=(3, 4, 2)), "b": rng.normal(size=(3, 7))}
    tree = jax.tree.map(np.float32, tree)
    fractions = np.array([0.1, 0.5, 0.9], np.float32)

    def part(i):
        return jax.tree.map(lambda x: x[i], tree)

    single = [select(part(i), fractions[i]) for i in range(3)]
    np.testing.assert_array_equal(jax.vmap(threshold)(tree, fractions), single)
    first = jax.tree.map(lambda x: x[0], tree)
    np.testing.assert_array_equal(
        jax.vmap(threshold, (None, 0))(first, fractions),
        [select(first, fraction) for fraction in fractions],
    )


def test_threshold_works_under_pmap():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(2, 4, 25)).astype(np.float32)
    fractions = np.array([0.5, 0.9], np.float32)
    parallel = jax.pmap(threshold, devices=jax.devices()[:2])(w, fractions)
    single = [select(*pair) for pair in zip(w, fractions, strict=True)]
    np.testing.assert_array_equal(parallel, single)


def test_a_resnet_50_is_cut_exactly():
    n = 25_500_000
    assert math.gcd(n, 7_654_321) == 1
    order = np.arange(n, dtype=np.int64) * 7_654_321 % n
    size = (order.astype(np.int32) + np.float32(0.01).view(np.int32)).view(np.float32)
    tree = [-size[:1000].reshape(10, 100), size[1000:9_000_000], -size[9_000_000:]]
    for fraction in (0.8, 0.9, 0.95):
        t = np.asarray(cut(tree, fraction))
        assert np.count_nonzero(size <= t) == math.floor(fraction * (n - 1)) + 1


def test_nothing_is_sorted_or_joined():
    lowered = select.lower([jnp.ones((8, 8)), jnp.ones(9)], 0.5)
    asked, compiled = lowered.as_text(), lowered.compile().as_text()
    assert "stablehlo.sort" not in asked
    assert " sort(" not in compiled
    assert "tensor<73x" not in asked
    assert "[73]" not in compiled


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_keys_order_magnitudes(dtype):
    to_key = jax.jit(keys.to_key)

    @few
    @given(hnp.arrays(f"u{dtype.itemsize}", 8), hnp.arrays(f"u{dtype.itemsize}", 8))
    def check(v, w):
        v, w = v.view(dtype), w.view(dtype)
        with jax.enable_x64(dtype == F64):
            a, b = np.asarray(to_key(v)), np.asarray(to_key(w))
            back = np.asarray(keys.from_key(jnp.asarray(a)))
        x, y = np.abs(v.astype(np.float64)), np.abs(w.astype(np.float64))
        np.testing.assert_array_equal(back, x)
        np.testing.assert_array_equal(a < b, (x < y) | (~np.isnan(x) & np.isnan(y)))
        np.testing.assert_array_equal(a == b, (x == y) | (np.isnan(x) & np.isnan(y)))

    check()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(), (8,)], ids=str)
def test_positive_is_above_zero_to_the_least_subnormal(shape, dtype):
    is_positive = jax.jit(keys.is_positive)
    least = np.array(jnp.finfo(dtype).smallest_subnormal, dtype)

    @few
    @given(hnp.arrays(f"u{dtype.itemsize}", shape))
    @example(np.full(shape, least).view(f"u{dtype.itemsize}"))
    def check(bits):
        x = bits.view(dtype)
        with jax.enable_x64(dtype == F64):
            positive = np.asarray(is_positive(x))
        np.testing.assert_array_equal(positive, x.astype(np.float64) > 0)

    check()


@jax.jit
def both_cuts(w, t):
    """Where scores are above their threshold, and where weights are above theirs."""
    size, factor = scores(w, "l1_sigma"), score_factor("l1_sigma", w.shape)
    kept = keys.to_key(size) > keys.to_key(t)
    limit = unscaled(t, np.array([1.0, factor]))[1]
    return kept, keys.to_key(w) > keys.to_key(limit)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "shape", [(36, 1), (1, 3, 12), (3, 3, 2, 2), (4000, 1)], ids=str
)
def test_weights_and_scores_are_cut_at_the_same_place(shape, dtype):
    info, integer = np.finfo(dtype), f"i{dtype.itemsize}"
    top = np.array(np.inf, dtype).view(integer)
    offsets = np.arange(math.prod(shape)) - math.prod(shape) // 2
    sizes = st.floats(0, width=8 * dtype.itemsize, allow_nan=False)

    @few
    @given(sizes, sizes)
    @example(0.0, 0.0)
    @example(float(info.smallest_normal), float(info.smallest_normal / 2))
    @example(float(info.max), float(info.max))
    @example(math.inf, float(info.max))
    def check(t, anywhere):
        t = dtype.type(t)
        factor = dtype.type(score_factor("l1_sigma", shape))
        near = np.array([t / factor, anywhere], dtype).view(integer)
        for centre in near:
            w = np.clip(centre + offsets, 0, top).astype(integer).view(dtype)
            with jax.enable_x64(dtype == F64):
                of_scores, of_weights = both_cuts(w.reshape(shape), t)
            np.testing.assert_array_equal(of_weights, of_scores)

    check()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_scores_are_magnitudes_times_one_factor(dtype):
    w = np.random.default_rng(3).normal(size=(3, 3, 4, 6)).astype(dtype)
    size = np.abs(w.astype(np.float64))
    with jax.enable_x64(dtype == F64):
        np.testing.assert_array_equal(scores(w, "l1"), size)
        np.testing.assert_array_equal(scores(w, "l1_sigma"), 4 * size)
