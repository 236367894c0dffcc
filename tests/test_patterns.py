"""Patterns are exact at the end, and continuous on the way there."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import st3jax
import st3jax.nnx
from st3jax.rule import patterns

DTYPES = tuple(map(jnp.dtype, ("float32", "float64", "bfloat16", "float16")))
SGD = optax.sgd(0.1)
MOMENTUM = optax.sgd(0.1, momentum=0.9)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_dtype_and_pattern = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("groups", dtype) for dtype in DTYPES),
        ("columns", DTYPES[0]),
        ("columns", DTYPES[2]),
        ("tiles", DTYPES[3]),
    ],
    ids=str,
)
few = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 2**32 - 1)
finalize = jax.jit(st3jax.finalize)

GROUPS = {"pattern": "2:4"}
COLUMNS = {"pattern": (4, 1)}
TILES = {"pattern": (2, 2)}
EACH = {"groups": GROUPS, "columns": COLUMNS, "tiles": TILES}
each_pattern = pytest.mark.parametrize("options", EACH.values(), ids=EACH)
BY_NORM = {"columns": COLUMNS, "tiles": TILES}
each_block = pytest.mark.parametrize("options", BY_NORM.values(), ids=BY_NORM)


@pytest.fixture(autouse=True)
def signalling_nans():
    """Numpy warns of them, and of infinity, when it converts, compares or divides."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        yield


def width(dtype):
    return jax.enable_x64(dtype == np.float64)


def wide(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def tiny(dtype):
    """Below this, differences may be flushed or rounded to the least kept number."""
    return 8 * max(
        float(jnp.finfo(dtype).smallest_subnormal),
        float(jnp.finfo(wide(dtype)).smallest_normal),
    )


def as_float64(x):
    return np.asarray(x).astype(np.float64)


def any_bits(dtype, shape):
    """All weights that a dtype can hold, NaN and subnormal numbers among them."""
    return hnp.arrays(f"u{dtype.itemsize}", shape).map(lambda bits: bits.view(dtype))


def close_to_ties(dtype, shape):
    """Weights of which many are equal, zero or a little apart."""
    whole = hnp.arrays(np.int8, shape, elements=st.integers(-3, 3))
    aside = hnp.arrays(np.int8, shape, elements=st.integers(-2, 2))
    step = st.sampled_from([0.0, 2.0**-7, 2.0**-4])
    return st.tuples(whole, aside, step).map(
        lambda parts: (parts[0] + parts[1] * parts[2]).astype(dtype)
    )


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def distinct(seed, shape, dtype=np.float32):
    """Weights of magnitudes 1, 2, ... in a random order, with random signs."""
    rng = np.random.default_rng(seed)
    size = rng.permutation(math.prod(shape)).reshape(shape) + 1
    return (size * rng.choice([-1, 1], shape)).astype(dtype)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b
    )


# The contract in numpy


def is_block(options):
    return isinstance(options["pattern"], tuple)


def numbers_of(pattern):
    keep, of = pattern.split(":")
    return int(keep), int(of)


def group_bounds(w, pattern, axis=-2):
    """For each weight, the (N+1)-th largest magnitude of its group; NaN is largest."""
    keep, of = numbers_of(pattern)
    size = np.moveaxis(np.abs(as_float64(w)), axis, -1)
    groups = size.reshape(*size.shape[:-1], -1, of)
    bound = np.sort(groups)[..., of - 1 - keep]
    return np.moveaxis(np.repeat(bound, of, -1), -1, axis)


def stays(w, pattern, axis=-2):
    """Which weights of each group stay: the N largest, of equal ones the first."""
    keep, of = numbers_of(pattern)
    size = np.moveaxis(np.abs(as_float64(w)), axis, -1)
    groups = size.reshape(*size.shape[:-1], -1, of)
    order = np.lexsort((-groups, ~np.isnan(groups)))  # stable; NaN is largest
    rank = np.argsort(order, -1, kind="stable")
    kept = np.moveaxis((rank < keep).reshape(size.shape), -1, axis)
    return kept | np.isnan(group_bounds(w, pattern, axis))  # nothing is below NaN


def kept_per_group(w, of, axis=-2):
    groups = np.moveaxis(as_float64(w) != 0, axis, -1)
    return groups.reshape(*groups.shape[:-1], -1, of).sum(-1)


def blocks_of(w, shape):
    """The weights with the axes of a block last, as one axis."""
    w = np.asarray(w)
    lead, tail = w.shape[: w.ndim - len(shape)], w.shape[w.ndim - len(shape) :]
    pairs = [(size // side, side) for size, side in zip(tail, shape, strict=True)]
    split = w.reshape(*lead, *itertools.chain(*pairs))
    inner = range(len(lead) + 1, split.ndim, 2)
    moved = np.moveaxis(split, list(inner), range(split.ndim - len(shape), split.ndim))
    return moved.reshape(*moved.shape[: w.ndim], -1)


def norms_of(w, shape):
    return np.abs(as_float64(blocks_of(w, shape))).sum(-1)


def on_weights(per_block, shape):
    """A number of each block, for each of its weights."""
    for axis, side in enumerate(shape, start=per_block.ndim - len(shape)):
        per_block = np.repeat(per_block, side, axis)
    return per_block


def bounds(w, t, options, axis=-2):
    """The threshold on each weight that the contract asks for, in float64."""
    if not is_block(options):
        return t * group_bounds(w, options["pattern"], axis)
    norms = on_weights(norms_of(w, options["pattern"]), options["pattern"])
    return np.where(norms > t, np.abs(as_float64(w)) * t / norms, np.inf)


def softened(w, bound):
    w = as_float64(w)
    return np.where(np.abs(w) > bound, w - np.sign(w) * bound, 0)


def scale_of(w, kept):
    size, axes = np.abs(as_float64(w)), tuple(range(np.ndim(w) - 1))
    r = ((size * kept).mean(axes) + 1e-6) / (size.mean(axes) + 1e-6)
    return 1.01 / (r + 0.01)


# What the model sees at some threshold, through the public functions


def final_of(options):
    if not isinstance(options.get("pattern"), str):
        return 0.5
    keep, of = numbers_of(options["pattern"])
    return 1 - keep / of


@functools.cache
def view(path, items, soft, rescale):
    options = dict(items)
    if path == "Conv_0/kernel":
        options["layout"] = {path: "wwio"}
    tx = st3jax.st3(SGD, final_of(options), soft=soft, rescale=rescale, **options)

    def effective(w, t):
        state = tx.init({path: w})
        state = state._replace(thresholds={path: t})
        return st3jax.sparsify({path: w}, state)[path]

    return jax.jit(effective)


def path_of(w):
    return "kernel" if w.ndim == 2 else "Conv_0/kernel"


def seen(w, t, options, *, path=None, soft=True, rescale=False):
    """What the model sees of a kernel at a threshold."""
    path = path or path_of(w)
    effective = view(path, tuple(options.items()), soft, rescale)
    return effective(w, np.asarray(t, wide(w.dtype)))


@functools.cache
def pruner(items):
    options = dict(items)
    return jax.jit(lambda params, s: st3jax.prune(params, s, **options))


def prune(params, sparsity, **options):
    """Pruning with a sparsity that is traced in float64."""
    with jax.enable_x64(True):
        pruned = pruner(tuple(options.items()))(params, np.float64(sparsity))
        return jax.tree.map(np.asarray, pruned)


def at_the_end(w, pattern, path="kernel"):
    return prune({path: w}, final_of({"pattern": pattern}), pattern=pattern)[path]


# N:M at the end


@each_dtype
@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_exactly_the_smallest_weights_of_a_group_become_zero(pattern, dtype):
    shape = (2 * numbers_of(pattern)[1], 3)

    @few
    @given(any_bits(dtype, shape) | close_to_ties(dtype, shape))
    @example(np.full(shape, jnp.finfo(dtype).smallest_subnormal, dtype))
    @example(np.full(shape, np.inf, dtype))
    @example(np.full(shape, np.nan, dtype))
    @example(np.zeros(shape, dtype))
    def check(w):
        bound, zero = group_bounds(w, pattern), as_float64(w) == 0
        pruned = ~stays(w, pattern) | zero
        cut = at_the_end(w, pattern)
        expected = np.where(pruned & (bound > 0) & ~zero, np.zeros_like(w), w)
        np.testing.assert_array_equal(as_float64(cut), as_float64(expected))
        with width(dtype):
            for rescale in (False, True):
                result = seen(w, 1, {"pattern": pattern}, rescale=rescale)
                np.testing.assert_array_equal(as_float64(result) == 0, pruned)
        keep, of = numbers_of(pattern)
        left = np.where(np.isnan(bound).any(), of, keep)
        left = np.minimum(kept_per_group(w, of), left)
        assert (kept_per_group(cut, of) <= left).all()

    check()


@each_dtype
def test_nan_is_the_largest_of_its_group_and_stays_visible(dtype):
    w = np.array([[np.nan, 1, -2, 3], [np.nan, np.nan, np.nan, 1]], dtype).reshape(8, 1)
    nan, most = np.nan, [np.nan, 0, 0, 3]
    with width(dtype):
        for cut in (at_the_end(w, "2:4"), seen(w, 1, GROUPS, soft=False)):
            result = as_float64(cut).reshape(2, 4)
            np.testing.assert_array_equal(result, [most, [nan, nan, nan, 1]])
        softly = as_float64(seen(w, 0.5, GROUPS, rescale=True)).reshape(2, 4)
    shown = np.isnan(as_float64(w)).reshape(2, 4)
    np.testing.assert_array_equal(np.isnan(softly), shown)


@each_dtype
def test_an_infinite_weight_is_kept_and_of_equal_ones_the_first(dtype):
    inf = np.inf
    w = np.array([[inf, 1, -2, 3], [inf, -inf, 2, 1], [inf, -inf, inf, 1]], dtype)
    w = w.reshape(12, 1)
    expected = [[inf, 0, 0, 3], [inf, -inf, 0, 0], [inf, -inf, 0, 0]]
    with width(dtype):
        for cut in (at_the_end(w, "2:4"), seen(w, 1, GROUPS, soft=False)):
            np.testing.assert_array_equal(as_float64(cut).reshape(3, 4), expected)
        softly = as_float64(seen(w, 1, GROUPS, rescale=True)).reshape(3, 4)
    np.testing.assert_array_equal(np.isinf(softly), np.isinf(expected))
    np.testing.assert_array_equal(np.sign(softly), np.sign(expected))


LAYOUTS = {
    "dense": ("kernel", (12, 3), -2),
    "convolution": ("conv/kernel", (3, 2, 12, 2), -2),
    "scanned dense": ("blocks/Dense_0/kernel", (2, 12, 3), -2),
    "a dense layer called query": ("query/kernel", (12, 3), -2),
    "query": ("attention/query/kernel", (12, 2, 5), -3),
    "key": ("attention/key/kernel", (12, 3, 2), -3),
    "value": ("attention/value/kernel", (12, 2, 1), -3),
    "out": ("attention/out/kernel", (2, 12, 5), -2),
    "scanned query": ("layers/query/kernel", (2, 12, 3, 5), -3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_lie_along_the_input_axis(layout):
    path, shape, axis = LAYOUTS[layout]
    for pattern in ("2:4", "1:3"):
        w = distinct(0, shape)
        cut = at_the_end(w, pattern, path)
        expected = np.where(np.abs(w) > group_bounds(w, pattern, axis), w, 0)
        np.testing.assert_array_equal(cut, expected)
        softly = seen(w, 0.5, {"pattern": pattern}, path=path)
        bound = bounds(w, 0.5, {"pattern": pattern}, axis)
        np.testing.assert_allclose(softly, softened(w, bound), rtol=1e-5)


ALL_TO_7 = [f"{n}:{m}" for m in range(2, 8) for n in range(1, m)]


@pytest.mark.parametrize("pattern", [*ALL_TO_7, "1:16", "8:16", "15:16"])
def test_exactly_n_of_m_distinct_weights_are_kept(pattern):
    keep, of = numbers_of(pattern)
    for seed in range(3):
        w = distinct(seed, (12 * of, 5))
        cut = at_the_end(w, pattern)
        np.testing.assert_array_equal(
            cut, np.where(np.abs(w) > group_bounds(w, pattern), w, 0)
        )
        assert (kept_per_group(cut, of) == keep).all()


@each_dtype
@pytest.mark.parametrize("pattern", ["1:3", "5:7"])
def test_exactly_n_of_m_are_kept_where_weights_tie(pattern, dtype):
    keep, of = numbers_of(pattern)

    @few
    @given(close_to_ties(dtype, (of, 4)))
    def check(w):
        with width(dtype):
            for rescale in (False, True):
                result = seen(w, 1, {"pattern": pattern}, rescale=rescale)
                left = np.minimum(kept_per_group(w, of), keep)
                np.testing.assert_array_equal(kept_per_group(result, of), left)

    check()


# N:M on the way


@each_dtype
@pytest.mark.parametrize("t", [2.0**-20, 0.3, 1.0])
def test_groups_shrink_by_their_share_of_the_bound(t, dtype):
    @few
    @given(seeds, st.booleans())
    def check(seed, rescale):
        w = normal(seed, (8, 3), dtype)
        bound = bounds(w, float(wide(dtype)(t)), GROUPS)
        expected = softened(w, bound)
        if rescale:
            expected *= scale_of(w, np.abs(as_float64(w)) > bound)
        with width(dtype):
            result = seen(w, t, GROUPS, rescale=rescale)
        assert result.dtype == dtype
        tolerance = 4 * eps(dtype) + 1e-5 * (dtype != np.float64)
        np.testing.assert_allclose(
            as_float64(result), expected, rtol=tolerance, atol=1e-4 * tolerance + 1e-6
        )

    check()


def largest_move(v, w, options):
    """For each weight, how far the weights it shares a fate with have moved."""
    moved = np.abs(as_float64(v) - as_float64(w))
    if not is_block(options):
        of = numbers_of(options["pattern"])[1]
        groups = moved.reshape(-1, of, moved.shape[-1])
        return np.repeat(groups.max(1), of, 0)
    sums = blocks_of(moved, options["pattern"]).sum(-1)
    return on_weights(sums, options["pattern"])


@each_dtype
@each_pattern
def test_a_small_change_of_weights_is_a_small_change_of_what_the_model_sees(
    options, dtype
):
    """At most 1 + t times the largest change for groups, 3 times the sum for blocks."""
    factor = 3 if is_block(options) else 2
    ones = np.ones((8, 4), dtype)
    few_more = np.arange(32).reshape(8, 4) % 3 == 0

    @few
    @given(
        close_to_ties(dtype, (8, 4)),
        close_to_ties(dtype, (8, 4)),
        st.sampled_from([0.25, 0.5, 1.0]),
        st.sampled_from([2.0**-10, 2.0**-5, 1.0]),
    )
    @example(ones, np.where(few_more, ones, 0), 1.0, 2.0**-5)
    @example(ones, np.where(few_more, 0, -ones), 1.0, 2.0**-5)
    def check(v, aside, t, step):
        w = (as_float64(v) + step * as_float64(aside)).astype(dtype)
        if is_block(options):
            t *= 4  # the norm of a block of ones
        with width(dtype):
            one, other = seen(v, t, options), seen(w, t, options)
        moved = np.abs(as_float64(one) - as_float64(other))
        allowed = factor * largest_move(v, w, options)
        assert (moved <= allowed + 32 * eps(dtype) + tiny(dtype)).all()

    check()


@each_dtype
@each_pattern
def test_a_small_change_of_the_threshold_is_a_small_change_of_what_the_model_sees(
    options, dtype
):
    thresholds = st.integers(-2, 16).map(lambda i: i / 16)

    @few
    @given(close_to_ties(dtype, (8, 4)), thresholds, thresholds)
    @example(np.ones((8, 4), dtype), 1 - 2.0**-12, 1.0)
    @example(np.ones((8, 4), dtype), 0.0, 2.0**-12)
    def check(w, t, u):
        t, u = sorted([t, u])
        largest = np.abs(as_float64(w)).max()
        if is_block(options):
            t, u, largest = 4 * t, 4 * u, 1
        with width(dtype):
            less, more = (as_float64(seen(w, x, options)) for x in (t, u))
        allowed = largest * (max(u, 0) - max(t, 0))
        moved = np.abs(less - more)
        assert (moved <= allowed + 32 * eps(dtype) + tiny(dtype)).all()
        # and never away from zero
        slack = 8 * eps(dtype) + tiny(dtype)
        assert (np.abs(more) <= np.abs(less) * (1 + slack) + slack).all()
        assert ((less != 0) | (more == 0)).all()
        assert (np.sign(more) * np.sign(as_float64(w)) >= 0).all()

    check()


@each_dtype
@each_pattern
def test_weights_pass_unchanged_while_the_threshold_is_off(options, dtype):
    bits = np.random.default_rng(0).bytes(80 * dtype.itemsize)
    rare = np.frombuffer(bits, f"u{dtype.itemsize}").view(dtype).reshape(20, 4)
    special = np.array([0.0, -0.0, np.nan, np.inf], dtype)
    rare = np.concatenate([rare, np.tile(special, (4, 1))])
    usual = (normal(seed, (24, 4), dtype) for seed in range(8))
    with width(dtype):
        for w in (rare, *usual):
            for t, soft in itertools.product([-1.0, 0.0], [True, False]):
                result = seen(w, t, options, soft=soft, rescale=soft)
                assert_same_bits(result, w)


@each_pattern
@pytest.mark.parametrize("shape", [(16, 8), (64, 64), (3, 3, 16, 8)])
def test_kernels_of_any_size_pass_unchanged_while_the_threshold_is_off(shape, options):
    for seed in range(4):
        w = normal(seed, shape)
        for t in (-1.0, 0.0):
            assert_same_bits(seen(w, t, options, rescale=True), w)


# Ramps


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["1:3", "2:3", "5:7"])
def test_the_ramp_of_groups_goes_from_0_to_exactly_1(pattern, power):
    keep, of = numbers_of(pattern)
    begin, end = 2, 9
    ramp = st3jax.polynomial_ramp(1 - keep / of, begin, end, power)
    tx = st3jax.st3(optax.set_to_zero(), ramp, pattern=pattern)
    params = {"kernel": distinct(0, (2 * of, 3))}
    update, opt_state, found = jax.jit(tx.update), tx.init(params), []
    for _ in range(end + 3):
        if len(found) <= begin:
            assert_identical(finalize(params, opt_state), params)
        _, opt_state = update(params, opt_state, params)
        found.append(float(opt_state.thresholds["kernel"]))
    left = [1 - (step - begin) / (end - begin) for step in range(begin + 1, end)]
    assert found[:begin] == [-1] * begin
    assert found[end - 1 :] == [1] * 4
    between = found[begin : end - 1]
    np.testing.assert_allclose(between, [1 - x**power for x in left], rtol=1e-5)
    assert max(between) < 1
    weights = finalize(params, opt_state)["kernel"]
    assert (kept_per_group(weights, of) == keep).all()
    expected = np.abs(params["kernel"]) > group_bounds(params["kernel"], pattern)
    np.testing.assert_array_equal(np.asarray(weights) != 0, expected)


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("pattern", ["1:3", "5:12"])
def test_the_final_sparsity_may_be_given_in_any_precision(pattern, number):
    keep, of = numbers_of(pattern)
    final = number((of - keep) / of)
    params = {"kernel": distinct(0, (of, 3))}
    tx = st3jax.st3(SGD, final, pattern=pattern)
    _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
    assert opt_state.thresholds["kernel"] == 1
    cut = st3jax.prune(params, final, pattern=pattern)["kernel"]
    assert (kept_per_group(cut, of) == keep).all()


@each_dtype_and_pattern
def test_training_ends_exactly_and_finalize_is_what_the_model_saw(name, dtype):
    with width(dtype):
        options = EACH[name]
        params = {"kernel": jnp.asarray(distinct(1, (8, 4), dtype)) / 8}
        ramp = st3jax.polynomial_ramp(0.5, 1, 3)
        tx = st3jax.st3(optax.sgd(2.0**-6, momentum=0.5), ramp, **options)

        @jax.jit
        def step(params, opt_state):
            def loss_fn(params):
                weights = st3jax.sparsify(params, opt_state)
                return ((weights["kernel"] - 1) ** 2).sum(), weights

            grads, weights = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, weights

        opt_state = tx.init(params)
        for _ in range(5):
            expected = finalize(params, opt_state)
            params, opt_state, saw = step(params, opt_state)
            assert_identical(expected, saw)
        weights = as_float64(finalize(params, opt_state)["kernel"])
        raw = as_float64(params["kernel"])
    assert weights.dtype == np.float64
    if is_block(options):
        norms = norms_of(raw, options["pattern"])
        dead = norms <= np.sort(norms.ravel())[(norms.size - 1) // 2]
        dead = on_weights(dead, options["pattern"])
        np.testing.assert_array_equal(weights == 0, dead)
    else:
        np.testing.assert_array_equal(weights != 0, stays(raw, "2:4"))


@each_dtype_and_pattern
def test_an_update_and_its_end_may_be_one_program(name, dtype):
    """Compilers may leave out roundings to narrow dtypes within one program."""
    options, sparsity = EACH[name], 0.5 if name == "groups" else 0.8
    with width(dtype):
        tx = st3jax.st3(optax.sgd(0.3), sparsity, **options)

        @jax.jit
        def step(params, grads):
            updates, opt_state = tx.update(grads, tx.init(params), params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, finalize(params, opt_state)

        for seed in range(8):
            params, grads = (
                {"kernel": normal(2 * seed + i, (64, 16), dtype)} for i in range(2)
            )
            params, opt_state, weights = step(params, grads)
            zeros = np.asarray(weights["kernel"] == 0)
            alone = np.asarray(finalize(params, opt_state)["kernel"] == 0)
            np.testing.assert_array_equal(zeros, alone)
            if name == "groups":
                assert (kept_per_group(~zeros, 4) <= 2).all()
            else:
                assert set(blocks_of(zeros, options["pattern"]).sum(-1).flat) == {
                    0,
                    4,
                }


# Blocks


@pytest.mark.parametrize(
    ("shape", "block", "dtypes"),
    [
        ((16, 6), (16, 1), DTYPES),
        ((12, 6), (3, 2), DTYPES[:1]),
        ((12, 6), (6,), DTYPES[:1]),
        ((3, 2, 8, 4), (8, 1), DTYPES[:1]),
        ((3, 2, 8, 4), (3, 2, 1, 2), DTYPES[1:2]),
        ((3, 2, 8, 4), (2, 4, 4), DTYPES[2:3]),
    ],
)
def test_blocks_live_and_die_by_their_norm(shape, block, dtypes):
    for dtype, seed in itertools.product(dtypes, range(4)):
        with width(dtype):
            check_blocks(distinct(seed, shape, np.float64).astype(dtype) / 64, block)


def check_blocks(w, block):
    options, dtype = {"pattern": block}, w.dtype
    norms = norms_of(w, block)
    for quantile in (0.0, 0.3, 0.6, 0.9):
        t = float(wide(dtype)(np.quantile(norms, quantile)))
        kept = on_weights(norms > t, block)
        cut = seen(w, t, options, soft=False)
        assert_same_bits(cut, np.where(kept, w, np.zeros_like(w)))
        expected = softened(w, bounds(w, t, options))
        scaled = expected * scale_of(w, kept)
        for rescale, wanted in ((False, expected), (True, scaled)):
            result = seen(w, t, options, rescale=rescale)
            assert result.dtype == dtype
            np.testing.assert_array_equal(as_float64(result) != 0, kept)
            tolerance = 4 * eps(dtype) + 1e-5 * (dtype != np.float64)
            atol = 4 * tolerance * np.abs(as_float64(w))
            error = np.abs(as_float64(result) - wanted)
            assert (error <= tolerance * np.abs(wanted) + atol).all()


@each_dtype
@each_block
def test_no_weight_of_a_kept_block_becomes_zero(options, dtype):
    block = options["pattern"]

    @few
    @given(any_bits(dtype, (8, 4)), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
    def check(w, quantile, soft):
        w = np.where(np.isfinite(as_float64(w)), w, np.ones_like(w))
        with width(dtype):
            norms = np.asarray(norms_jit(w, block))
            t = np.sort(norms.ravel())[int(quantile * (norms.size - 1))]
            if not (0 < t < np.inf):
                return
            result = as_float64(seen(w, t, options, soft=soft, rescale=soft))
        kept = on_weights(norms > t, block)
        np.testing.assert_array_equal(result != 0, kept & (as_float64(w) != 0))

    check()


@each_block
def test_the_scale_of_a_block_is_one_number_for_all_its_weights(options):
    w = distinct(3, (8, 4))
    block = options["pattern"]
    t = np.quantile(norms_of(w, block), 0.4)
    shrunk = blocks_of(np.asarray(seen(w, t, options)) / w, block)
    norms = norms_of(w, block)
    expected = np.where(norms > t, 1 - t / norms, 0)
    np.testing.assert_allclose(
        shrunk, np.repeat(expected[..., None], 4, -1), rtol=1e-5, atol=1e-6
    )
    assert 0 < (expected == 0).mean() < 1


@each_dtype
@each_block
def test_a_block_with_nan_or_infinity_is_kept_and_shows_it(options, dtype):
    for bad in (np.nan, np.inf, -np.inf):
        w = normal(4, (8, 4), dtype)
        w[1, 1] = bad
        with width(dtype):
            for soft in (True, False):
                result = as_float64(seen(w, 5.0, options, soft=soft, rescale=soft))
                kept = norms_of(w, options["pattern"]) > 5.0
                kept |= np.isnan(norms_of(w, options["pattern"]))
                kept = on_weights(kept, options["pattern"])
                np.testing.assert_array_equal(result != 0, kept)
                np.testing.assert_array_equal(result[1, 1], bad)
                assert np.isfinite(np.delete(result.ravel(), 5)).all()
        cut = prune({"kernel": w}, 0.9, **options)["kernel"]
        np.testing.assert_array_equal(as_float64(cut)[1, 1], bad)


@pytest.mark.parametrize(
    ("block", "dtype"), list(zip([(1,), (1, 1), (1, 1), (1,)], DTYPES, strict=True))
)
def test_blocks_of_one_weight_are_no_pattern_at_all(block, dtype):
    options = {"pattern": block}

    @few
    @given(seeds, st.floats(0, 2, width=16), st.booleans())
    def check(seed, t, soft):
        w = normal(seed, (6, 4), dtype)
        with width(dtype):
            plain = seen(w, t, {}, soft=soft, rescale=soft)
            result = seen(w, t, options, soft=soft, rescale=soft)
        np.testing.assert_array_equal(as_float64(result) == 0, as_float64(plain) == 0)
        tolerance = eps(dtype) + 1e-6 * (dtype != np.float64)
        np.testing.assert_allclose(
            as_float64(result), as_float64(plain), rtol=tolerance, atol=4 * tolerance
        )

    check()


@pytest.mark.parametrize("block", [(1,), (1, 1)])
def test_blocks_of_one_weight_are_selected_as_weights(block):
    params, found = {"kernel": normal(0, (6, 4))}, []
    for options in ({}, {"pattern": block}):
        tx = st3jax.st3(SGD, 0.7, **options)
        _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
        cut = prune(params, 0.7, **options)
        found.append((opt_state.thresholds["kernel"], cut["kernel"]))
    assert_identical(*found)


norms_jit = jax.jit(patterns.block_norms, static_argnums=1)
SUMS = {"a column": (16, 1), "odd": (3, 5), "an axis": (11,)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a column", np.float32),
        ("a column", jnp.bfloat16),
        ("odd", np.float32),
        ("odd", np.float64),
        ("an axis", np.float16),
    ],
)
def test_block_norms_have_the_same_bits_wherever_they_are_computed(name, dtype):
    block, dtype = SUMS[name], jnp.dtype(dtype)
    shape = tuple(2 * side for side in block)
    v, w = normal(5, (2, *shape), dtype)
    norms = functools.partial(patterns.block_norms, shape=block)

    def with_much_around_it(v, w):
        weights = jax.lax.optimization_barrier((w * 3 - v * w).astype(dtype))
        _, scanned = jax.lax.scan(lambda _, x: (None, norms(x)), None, w[None])
        loss = jax.grad(lambda w: (norms(w) ** 2).mean())(w)
        return weights, norms(weights), norms(w), scanned[0], loss * norms(w).sum()

    with width(dtype):
        v, w = jnp.asarray(v), jnp.asarray(w)
        with jax.disable_jit():
            eager = norms(w)
        assert eager.dtype == wide(dtype)
        assert_same_bits(jax.jit(norms)(w), eager)
        assert_same_bits(jax.jit(jax.vmap(norms))(jnp.stack([v, w]))[1], eager)
        weights, found, again, scanned, _ = jax.jit(with_much_around_it)(v, w)
        assert_same_bits(again, eager)
        assert_same_bits(scanned, eager)
        assert_same_bits(found, norms(weights))
        turned = jax.jit(lambda x: norms(jnp.transpose(x)))(jnp.transpose(w))
        assert_same_bits(turned, eager)
        exact = norms_of(w, block)
        np.testing.assert_allclose(eager, exact, rtol=32 * eps(wide(dtype)))
        jaxpr = str(jax.make_jaxpr(norms)(w))
    # The order in which a reduction adds is the compiler's choice.
    assert "add" in jaxpr
    for reduction in ("reduce", "dot", "cumsum", "conv_", "scan", "while"):
        assert reduction not in jaxpr


NETWORK = {"a/kernel": (8, 6), "conv/kernel": (3, 3, 4, 2), "b/kernel": (4, 2)}


def network(seed):
    """Kernels of very different magnitudes, with exact norms, and a bias."""
    rng = np.random.default_rng(seed)
    params = {
        path: rng.integers(-4096, 4096, shape) * np.float32(2.0 ** rng.integers(-4, 4))
        for path, shape in NETWORK.items()
    }
    params = {path: w.astype(np.float32) for path, w in params.items()}
    return {**params, "a/bias": np.ones(6, np.float32)}


def factors(criterion):
    return {
        path: math.sqrt(sum(shape)) if criterion == "l1_sigma" else 1.0
        for path, shape in NETWORK.items()
    }


@pytest.mark.parametrize("criterion", ["l1", "l1_sigma"])
@each_block
def test_exactly_the_blocks_of_smallest_norm_go_over_all_layers(options, criterion):
    block = options["pattern"]

    @few
    @given(seeds, st.floats(0, 1, exclude_min=True) | st.sampled_from([0.9, 0.95, 1.0]))
    def check(seed, sparsity):
        params = network(seed)
        cut = prune(params, sparsity, criterion=criterion, **options)
        scores = {  # in the precision of the library
            path: norms_of(params[path], block).astype(np.float32) * np.float32(factor)
            for path, factor in factors(criterion).items()
        }
        every = np.sort(np.concatenate([norms.ravel() for norms in scores.values()]))
        gone = math.floor(sparsity * (every.size - 1)) + 1
        removed = 0
        for path, norms in scores.items():
            dead = on_weights(norms <= every[gone - 1], block)
            np.testing.assert_array_equal(cut[path], np.where(dead, 0, params[path]))
            removed += (blocks_of(cut[path], block) == 0).all(-1).sum()
        assert removed == gone or np.unique(every).size < every.size
        np.testing.assert_array_equal(cut["a/bias"], params["a/bias"])

    check()


@pytest.mark.parametrize("criterion", ["l1", "l1_sigma"])
def test_training_removes_the_asked_number_of_blocks_after_each_step(criterion):
    asked = [0.0, 1e-9, 0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0]

    def sparsity(count):
        return jnp.asarray(asked)[jnp.minimum(count, len(asked) - 1)]

    tx = st3jax.st3(optax.sgd(0.3), sparsity, criterion=criterion, **COLUMNS)
    update = jax.jit(tx.update)
    params = {path: 0.2 * distinct(0, shape) for path, shape in NETWORK.items()}
    n = sum(w.size for w in params.values()) // 4
    opt_state = tx.init(params)
    for seed, wanted in enumerate(asked[1:]):
        grads = {path: normal(seed, shape) for path, shape in NETWORK.items()}
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        weights = finalize(params, opt_state)
        dead = [(blocks_of(weights[path], (4, 1)) == 0) for path in NETWORK]
        gone = math.floor(wanted * (n - 1)) + 1
        assert sum(block.all(-1).sum() for block in dead) == gone
        assert sum(block.sum() for block in dead) == 4 * gone


def test_each_layer_may_lose_its_own_share_of_blocks():
    params = {path: distinct(1, shape) for path, shape in NETWORK.items()}
    shares = {"conv*": 0.25, "*": 0.5}
    named = jax.jit(lambda params: st3jax.prune(params, shares, **COLUMNS))(params)
    uniform = prune(params, 0.5, distribution="uniform", **COLUMNS)
    for path, shape in NETWORK.items():
        n = math.prod(shape) // 4
        for cut, share in (
            (named, 0.25 if path.startswith("conv") else 0.5),
            (uniform, 0.5),
        ):
            dead = (blocks_of(cut[path], (4, 1)) == 0).all(-1)
            assert dead.sum() == math.floor(share * (n - 1)) + 1


def test_blocks_of_equal_norm_go_together():
    w = np.array([[1, 2, -3, 0], [3, -2, 1, 9]], np.float32)
    cut = prune({"kernel": w}, 0.1, pattern=(2, 1))["kernel"]
    assert cut.tolist() == [[0, 0, 0, 0], [0, 0, 0, 9]]


@each_pattern
def test_pruning_by_a_traced_sparsity_of_0_leaves_every_bit(options):
    w = normal(2, (8, 4))
    w[:4, 0] = 0.0, -0.0, np.nan, 1e-45
    w[4:, 1] = 1e-6, 1.0, 2.0, 3.0
    assert_same_bits(prune({"kernel": w}, 0.0, **options)["kernel"], w)


# Gradients


@functools.cache
def pull_back(items):
    effective = view("kernel", items, True, True)
    return jax.jit(lambda w, t, cotangent: jax.vjp(effective, w, t)[1](cotangent))


def assert_straight_through(w, cotangent, options):
    pull = pull_back(tuple(options.items()))
    with width(w.dtype):
        for t in (-1.0, 0.0, 0.5, 1.0, 8.0):
            dw, dt = pull(w, np.asarray(t, wide(w.dtype)), cotangent)
            assert_same_bits(dw, cotangent)
            assert float(dt) == 0


@each_dtype
@each_pattern
def test_the_gradient_is_the_identity(options, dtype):
    w, cotangent = normal(6, (2, 12, 4), dtype)
    assert_straight_through(w, cotangent, options)


@each_dtype
@each_pattern
@pytest.mark.parametrize("special", [0.0, -0.0, "least", np.inf, np.nan])
def test_the_gradient_is_the_identity_for_special_weights(special, options, dtype):
    """Whole blocks and groups of them, and single ones among others."""
    w, cotangent = normal(7, (2, 12, 4), dtype)
    least = float(jnp.finfo(dtype).smallest_subnormal)
    w[:4] = w[4] = w[8, 1] = least if special == "least" else special
    assert_straight_through(w, cotangent, options)


@each_pattern
def test_the_gradient_is_the_identity_under_vmap_of_grad(options):
    w, factor = normal(8, (2, 3, 8, 4))
    effective = view("kernel", tuple(options.items()), True, True)

    def loss(w, t, factor):
        return (effective(w, t) * factor).sum()

    t = jnp.array([-1.0, 0.5, 1.0])
    gradient = jax.jit(jax.vmap(jax.grad(loss)))(w, t, factor)
    assert_same_bits(gradient, factor)
    remat = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(w, t, factor)
    assert_same_bits(remat, factor)


@each_pattern
def test_a_kernel_that_starts_at_zero_trains(options):
    """As last layers of residual branches and adapters do."""
    tx = st3jax.st3(SGD, st3jax.polynomial_ramp(0.5, 1, 3), **options)
    params = {"kernel": jnp.zeros((8, 4)), "other/kernel": jnp.ones((8, 4))}
    target = distinct(9, (8, 4)) / 8
    opt_state = tx.init(params)

    def loss_fn(params, opt_state):
        weights = st3jax.sparsify(params, opt_state)
        return sum(((w - target) ** 2).sum() for w in weights.values())

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state, first = step(params, opt_state)
    for _ in range(6):
        params, opt_state, loss = step(params, opt_state)
    assert loss < first
    assert int((finalize(params, opt_state)["kernel"] != 0).sum()) > 4


# The state


@pytest.mark.parametrize("freeze_step", [None, 4])
@each_pattern
def test_the_state_is_bytes_per_leaf(options, freeze_step):
    tx = st3jax.st3(SGD, 0.5, freeze_step=freeze_step, **options)
    params = {"a/kernel": jnp.ones((64, 64)), "b/kernel": jnp.ones((3, 3, 16, 32))}
    opt_state = tx.init({**params, "bias": jnp.ones(64)})
    leaves = jax.tree.leaves(opt_state)
    assert all(leaf.size == 1 for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) == 2 * 4 + 4 + 1 + 8


# Composition: a small network of three kernels, one of them attention's


BEGIN, END, FREEZE = 1, 4, 5
RAMP = st3jax.polynomial_ramp(0.5, BEGIN, END)


def weights_of(seed=0, dtype=jnp.float32):
    shapes = {"first/kernel": (16, 8), "query/kernel": (8, 2, 4), "last/bias": (8,)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        path: jax.random.normal(key, shape, dtype)
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss_of(weights, target):
    return sum(((weights[path] - target[path]) ** 2).sum() for path in weights)


def make_step(tx):
    def step(params, opt_state, target):
        def sparse_loss(params):
            return loss_of(st3jax.sparsify(params, opt_state), target)

        grads = jax.grad(sparse_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def trajectory(tx, params, steps, step=None):
    step = step or jax.jit(make_step(tx))
    opt_state, run = tx.init(params), []
    for i in range(steps):
        params, opt_state = step(params, opt_state, weights_of(100 + i))
        run.append((params, opt_state))
    return run


COMPOSED = {"groups": GROUPS, "tiles": TILES}
each_composed = pytest.mark.parametrize("name", COMPOSED)


@functools.cache
def usual(name):
    tx = st3jax.st3(MOMENTUM, RAMP, freeze_step=FREEZE, **COMPOSED[name])
    return tx, jax.jit(make_step(tx))


@functools.cache
def usual_run(name, seed=0):
    tx, step = usual(name)
    return jax.device_get(trajectory(tx, weights_of(seed), FREEZE + 2, step))


def assert_exact(weights, name):
    """Groups keep 2 of 4; half of all blocks are gone, to the last one."""
    if name == "groups":
        for path, axis in (("first/kernel", -2), ("query/kernel", -3)):
            assert (kept_per_group(weights[path], 4, axis) == 2).all()
        return
    joined = (weights[path].reshape(len(weights[path]), -1) for path in KERNELS)
    blocks = [blocks_of(w, (2, 2)) for w in joined]  # the heads of a query are outputs
    dead = np.concatenate([(block == 0).all(-1).ravel() for block in blocks])
    some = np.concatenate([(block == 0).any(-1).ravel() for block in blocks])
    assert dead.sum() == some.sum() == (dead.size - 1) // 2 + 1


KERNELS = ("first/kernel", "query/kernel")


def zero_set(weights):
    return {path: np.asarray(weights[path]) == 0 for path in KERNELS}


@each_composed
def test_training_ends_at_the_pattern_and_stays_there(name):
    run = usual_run(name)
    assert_exact(finalize(*run[END - 1]), name)
    fixed = run[FREEZE - 1][0]
    assert_exact(fixed, name)
    for params, opt_state in run[FREEZE:]:
        assert_identical(zero_set(params), zero_set(fixed))
        assert_identical(jax.device_get(finalize(params, opt_state)), params)
    for params, _ in run[: FREEZE - 1]:
        assert not any(zeros.any() for zeros in zero_set(params).values())


INNERS = {
    "decayed momentum": optax.chain(optax.add_decayed_weights(0.1), MOMENTUM),
    "adamw": optax.adamw(0.02, weight_decay=0.1),
}


@pytest.mark.parametrize(
    ("name", "inner", "dtype"),
    [
        ("groups", "decayed momentum", jnp.float32),
        ("groups", "adamw", jnp.bfloat16),
        ("tiles", "adamw", jnp.float32),
        ("tiles", "decayed momentum", jnp.bfloat16),
    ],
)
def test_after_the_freeze_zeros_stay_and_other_weights_train_on(name, inner, dtype):
    options = COMPOSED[name]
    tx = st3jax.st3(INNERS[inner], RAMP, freeze_step=FREEZE, **options)
    run = jax.device_get(trajectory(tx, weights_of(dtype=dtype), FREEZE + 5))
    fixed = run[FREEZE - 1][0]
    if dtype == jnp.float32:
        assert_exact(fixed, name)
    for params, _ in run[FREEZE:]:
        assert_identical(zero_set(params), zero_set(fixed))
    moved = sum((params[path] != fixed[path]).sum() for path in KERNELS)
    assert moved > 0.9 * sum((fixed[path] != 0).sum() for path in KERNELS)


MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
PLACES = {
    "groups": {"first/kernel": P("rows", "columns"), "query/kernel": P("columns")},
    "tiles": {"first/kernel": P(("rows", "columns")), "query/kernel": P("rows")},
}


@pytest.mark.parametrize("kind", MESHES)
@each_composed
def test_sharded_weights_train_as_on_one_device(name, kind):
    """Every shard holds whole groups or blocks."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(MESHES[kind],) * 2)

    def put(tree):
        return {
            path: jax.device_put(w, NamedSharding(mesh, PLACES[name].get(path, P())))
            for path, w in tree.items()
        }

    tx, _ = usual(name)
    cut = jax.jit(functools.partial(st3jax.prune, sparsity=0.5, **COMPOSED[name]))
    with jax.set_mesh(mesh):
        params, step = put(weights_of()), jax.jit(make_step(tx))
        opt_state, placed = tx.init(params), put(weights_of())
        for i, (alone, alone_state) in enumerate(usual_run(name)):
            params, opt_state = step(params, opt_state, put(weights_of(100 + i)))
            for path in KERNELS:
                kept, w = placed[path].sharding, params[path]
                assert w.sharding.is_equivalent_to(kept, w.ndim)
            weights = jax.device_get(finalize(params, opt_state))
            expected = jax.device_get(finalize(alone, alone_state))
            assert_close(weights, expected)
            assert_identical(zero_set(weights), zero_set(expected))
        compiled = cut.lower(placed).compile()
        sharded = jax.device_get(compiled(placed))
        assert "all-gather" not in compiled.as_text()
    assert_identical(sharded, jax.device_get(cut(weights_of())))


@each_composed
def test_masked_leaves_the_masked_part_alone(name):
    mask = {"first/kernel": True, "query/kernel": False, "last/bias": True}
    tx = st3jax.st3(MOMENTUM, RAMP, **COMPOSED[name])
    params, opt_state = trajectory(optax.masked(tx, mask), weights_of(), END)[-1]
    weights = finalize(params, opt_state)
    assert_identical(weights["query/kernel"], params["query/kernel"])
    assert int((weights["first/kernel"] == 0).sum()) == 64


@each_composed
def test_injected_hyperparameters_keep_the_pattern(name):
    inject = optax.inject_hyperparams(st3jax.st3, static_args=("prunable",))
    tx = inject(MOMENTUM, 0.5, **COMPOSED[name])
    step = jax.jit(make_step(tx))
    params, opt_state = trajectory(tx, weights_of(), 3, step)[-1]
    assert_exact(finalize(params, opt_state), name)
    opt_state.hyperparams["sparsity"] = jnp.float32(0.0)
    params, opt_state = step(params, opt_state, weights_of(9))
    assert_identical(finalize(params, opt_state), params)
    assert step._cache_size() == 1


# NNX


TOKENS = jax.random.randint(jax.random.key(5), (16, 6), 0, 11)
LABELS = TOKENS[:, 0] % 4


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Embed(11, 8, rngs=rngs),
        nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs),
        functools.partial(jnp.mean, axis=1),
        nnx.Linear(8, 4, rngs=rngs),
    )


@nnx.jit
def nnx_step(model, optimizer):
    def sparse_loss(model):
        logits = st3jax.nnx.sparsify(model, optimizer)(TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    loss, grads = nnx.value_and_grad(sparse_loss)(model)
    optimizer.update(model, grads)
    return loss


def nnx_run(model, options, steps):
    tx = st3jax.st3(optax.adam(0.03), st3jax.polynomial_ramp(0.5, 2, 8), **options)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(nnx_step(model, optimizer)) for _ in range(steps)]
    final = st3jax.nnx.finalize(model, optimizer)
    flat = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(final, nnx.Param))))
    return losses, {path: w for path, w in flat.items() if path[-1] == "kernel"}


def test_an_nnx_model_with_attention_trains_to_groups():
    losses, kernels = nnx_run(nnx.jit(nnx_model)(), GROUPS, 25)
    axes = {path[-2]: -3 for path in kernels if path[-2] in ("query", "key", "value")}
    assert (len(kernels), len(axes)) == (5, 3)
    for path, w in kernels.items():
        assert (kept_per_group(w, 4, axes.get(path[-2], -2)) == 2).all()
    assert losses[-1] < 0.7 * losses[0]


def test_an_nnx_model_trains_to_blocks():
    rngs = nnx.Rngs(0)
    mean = functools.partial(jnp.mean, axis=1)
    layers = nnx.Embed(11, 8, rngs=rngs), mean, nnx.Linear(8, 4, rngs=rngs)
    losses, kernels = nnx_run(nnx.Sequential(*layers), TILES, 25)
    (w,) = kernels.values()
    dead = (blocks_of(w, (2, 2)) == 0).sum(-1)
    assert np.sort(dead.ravel()).tolist() == [0] * 4 + [4] * 4
    assert losses[-1] < 0.9 * losses[0]


# Bad use


WEIGHTS = {"Dense_0": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
STEM = {"stem": {"kernel": jnp.ones((3, 3, 3, 64))}}
ODD = {"head": {"kernel": jnp.ones((10, 4))}}
QUERY = {"query": {"kernel": jnp.ones((6, 4, 4))}}
FLAT = {"scale": jnp.ones(8)}
LEAVE_OUT = "out with prunable=..."


def build(sparsity=0.5, **options):
    return lambda: st3jax.st3(SGD, sparsity, **options)


def prunes(sparsity=0.5, params=WEIGHTS, **options):
    return lambda: st3jax.prune(params, sparsity, **options)


def inits(params, sparsity=0.5, **options):
    tx = st3jax.st3(SGD, sparsity, **options)
    return lambda: tx.init(params)


def refits(params, **options):
    """Traces an init, compiling nothing."""
    tx = st3jax.st3(SGD, 0.5, **options)
    return lambda: jax.eval_shape(tx.init, params)


def everything(path, leaf):
    return True


BAD_OPTIONS = {
    "more kept than there are": ({"pattern": "4:2"}, "0 < N < M", "'4:2'"),
    "all kept": ({"pattern": "4:4"}, "0 < N < M", "'4:4'"),
    "another sign": ({"pattern": "2-4"}, "'2:4'", "'2-4'"),
    "none kept": ({"pattern": "0:4"}, "0 < N < M", "'0:4'"),
    "negative": ({"pattern": "-2:4"}, "0 < N < M", "'-2:4'"),
    "fractions": ({"pattern": "0.5:1"}, "0 < N < M", "'0.5:1'"),
    "more to come": ({"pattern": "2:4:8"}, "0 < N < M", "'2:4:8'"),
    "spaces": ({"pattern": " 2:4"}, "0 < N < M", "' 2:4'"),
    "a number": ({"pattern": 24}, "'N:M'", "24"),
    "another word": ({"pattern": "blocks"}, "shape of a block", "'blocks'"),
    "the word alone": ({"pattern": "block"}, "shape of a block", "'block'"),
    "a side of 0": ({"pattern": (0,)}, "(16, 1)", "(0,)"),
    "a negative side": ({"pattern": (4, -1)}, "(16, 1)", "(4, -1)"),
    "a fractional side": ({"pattern": (2.0,)}, "(16, 1)", "(2.0,)"),
    "a side of True": ({"pattern": (True, 1)}, "(16, 1)", "(True, 1)"),
    "no sides": ({"pattern": ()}, "(16, 1)", "()"),
    "a side alone": ({"pattern": 16}, "(16, 1)", "got 16"),
    "its sides as text": ({"pattern": "16"}, "(16, 1)", "'16'"),
    "another sparsity": (
        {"pattern": "2:4", "sparsity": 0.9},
        "'2:4'",
        "0.5",
        "0.9",
    ),
    "nearly its sparsity": (
        {"pattern": "1:3", "sparsity": 0.67},
        "'1:3'",
        "0.666667",
        "0.67",
    ),
    "uniform groups": (
        {"pattern": "2:4", "distribution": "uniform"},
        "'2:4'",
        "leave out distribution",
    ),
    "erk groups": (
        {"pattern": "2:4", "distribution": "erk"},
        "'2:4'",
        "leave out distribution",
    ),
    "costs of groups": (
        {
            "pattern": "2:4",
            "costs": {"Dense_0/kernel": 1},
        },
        "'2:4'",
        "leave out distribution and costs",
    ),
    "named groups": ({"pattern": "2:4", "sparsity": {"*": 0.5}}, "N:M pattern"),
}
BAD_LEAVES = {
    "a stem that does not divide": (
        {"params": STEM, "pattern": "2:4"},
        "'2:4'",
        "'stem/kernel'",
        "(3, 3, 3, 64)",
        "input axis of 3",
        LEAVE_OUT,
    ),
    "inputs that do not divide": (
        {"params": ODD, "pattern": "2:4"},
        "'head/kernel'",
        "(10, 4)",
        "10 weights does not divide by 4",
        LEAVE_OUT,
    ),
    "embeddings that do not divide": (
        {"params": QUERY, "pattern": "2:4"},
        "'query/kernel'",
        "(6, 4, 4)",
        "6 weights does not divide by 4",
        LEAVE_OUT,
    ),
    "two that do not": (
        {"params": {**STEM, **ODD, **WEIGHTS}, "pattern": "2:4"},
        "'stem/kernel'",
        "'head/kernel'",
        "leave them out with prunable=...",
    ),
    "one axis in groups": (
        {"params": FLAT, "pattern": "2:4", "prunable": everything},
        "'scale'",
        "(8,)",
        "no input axis",
        LEAVE_OUT,
    ),
    "blocks that do not divide": (
        {"params": ODD, "pattern": (4, 3)},
        "pattern (4, 3)",
        "'head/kernel'",
        "(10, 4)",
        "10 by 4",
        "4 by 3",
        LEAVE_OUT,
    ),
    "one axis in blocks of two": (
        {
            "params": FLAT,
            "pattern": (4, 1),
            "prunable": everything,
        },
        "'scale'",
        "(8,)",
        "fewer than 2 axes",
        LEAVE_OUT,
    ),
}
BAD_USES = [
    *(
        (f"{where.__name__} {name}", where(**options), texts)
        for name, (options, *texts) in BAD_OPTIONS.items()
        for where in (build, prunes)
    ),
    *(
        (f"{where.__name__} {name}", where(**options), texts)
        for name, (options, *texts) in BAD_LEAVES.items()
        for where in (inits, refits, prunes)
    ),
    (
        "build a ramp to another end",
        build(st3jax.polynomial_ramp(0.9, 0, 10), pattern="2:4"),
        ["'2:4'", "0.5", "0.9"],
    ),
    (
        "build a freeze before the end",
        build(st3jax.polynomial_ramp(0.5, 0, 10), pattern="2:4", freeze_step=8),
        ["freeze_step 8", "0.5"],
    ),
]


@pytest.mark.parametrize("row", BAD_USES, ids=[row[0] for row in BAD_USES])
def test_bad_use_is_explained_in_one_short_sentence(row):
    _, bad_use, texts = row
    with pytest.raises(ValueError, match=re.escape(texts[0])) as caught:
        bad_use()
    message = str(caught.value)
    assert [text for text in texts if text not in message] == []
    assert "\n" not in message
    assert len(message) < 320


@pytest.mark.parametrize("options", [GROUPS, COLUMNS], ids=["groups", "columns"])
def test_a_leaf_that_does_not_fit_may_be_left_out(options):
    params = {**ODD, **WEIGHTS}

    def fits(path, leaf):
        return path.endswith("kernel") and "head" not in path

    tx = st3jax.st3(SGD, 0.5, prunable=fits, **options)
    _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
    weights = finalize(params, opt_state)
    assert_identical(weights["head"], params["head"])
    assert (weights["Dense_0"]["kernel"] != params["Dense_0"]["kernel"]).any()


def test_a_sparsity_written_with_six_digits_is_that_of_the_pattern():
    w = jnp.asarray(distinct(21, (9, 4)))
    for sparsity in (0.666666, 2 / 3, 0.666667):
        pruned = st3jax.prune({"kernel": w}, sparsity, pattern="1:3")["kernel"]
        assert bool(((pruned.reshape(3, 3, 4) != 0).sum(1) == 1).all())
