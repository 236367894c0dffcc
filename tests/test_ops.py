"""Thresholding is its formula to the last bit, and its gradient the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from st3jax import ops

DTYPES = tuple(map(jnp.dtype, ("float32", "float64", "bfloat16", "float16")))
SHAPE = (4, 3)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
few = settings(deadline=None, max_examples=100)

soft = jax.jit(ops.soft_threshold)
hard = jax.jit(ops.hard_threshold)
each_threshold = pytest.mark.parametrize("op", [soft, hard], ids=["soft", "hard"])
scale_of = jax.jit(ops.channel_scale)
kept = jax.jit(ops.is_kept)
rescaled = jax.jit(ops.rescale)


@jax.jit
def hard_effective(w, t):
    return ops.rescale(ops.hard_threshold(w, t), ops.channel_scale(w, t))


@jax.jit
def soft_effective(w, t):
    return ops.rescale(ops.soft_threshold(w, t), ops.channel_scale(w, t))


@pytest.fixture(autouse=True)
def signalling_nans():
    """Numpy warns of them when it converts or compares."""
    with np.errstate(invalid="ignore"):
        yield


def width(dtype):
    return jax.enable_x64(dtype == np.float64)


def wide(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def any_bits(dtype, shape=SHAPE):
    """All weights that a dtype can hold, NaN and subnormal numbers among them."""
    return hnp.arrays(f"u{dtype.itemsize}", shape).map(lambda bits: bits.view(dtype))


def moderate(dtype, shape=SHAPE):
    numbers = st.floats(-100, 100, width=16)
    return hnp.arrays(np.float32, shape, elements=numbers).map(
        lambda w: w.astype(dtype)
    )


@st.composite
def weights_and_threshold(draw, dtype, weights=any_bits):
    """Weights and a finite positive threshold, often that of one of the weights."""
    w = draw(weights(dtype))
    sizes = [float(x) for x in np.abs(w).ravel() if 0 < x < np.inf]
    anywhere = st.floats(0, 1e4, width=32, exclude_min=True)
    t = draw(st.one_of(anywhere, st.sampled_from(sizes)) if sizes else anywhere)
    step = draw(st.sampled_from([0, 0, -np.inf, np.inf]))
    t = np.nextafter(wide(dtype)(t), wide(dtype)(step)) if step else wide(dtype)(t)
    return w, max(t, np.finfo(wide(dtype)).smallest_subnormal)


def as_float64(x):
    return np.asarray(x).astype(np.float64)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def tiny(dtype):
    """Below this, differences may be flushed or rounded to the least kept number."""
    return 2 * ops.smallest_kept(dtype)


@each_dtype
def test_soft_threshold_is_its_formula(dtype):
    @few
    @given(weights_and_threshold(dtype))
    def check(case):
        w, t = case
        with width(dtype):
            shrunk = soft(w, t)
        exact = as_float64(w)
        finite = np.isfinite(exact)
        expected = np.where(
            np.abs(exact) > t, exact - np.sign(exact) * np.float64(t), 0
        )
        np.testing.assert_allclose(
            as_float64(shrunk)[finite],
            expected[finite],
            rtol=2 * eps(dtype),
            atol=tiny(dtype),
        )

    check()


@each_dtype
def test_hard_threshold_is_its_formula_to_the_last_bit(dtype):
    @few
    @given(weights_and_threshold(dtype))
    def check(case):
        w, t = case
        with width(dtype):
            cut = hard(w, t)
        pruned = np.abs(as_float64(w)) <= np.float64(t)
        assert_same_bits(cut, np.where(pruned, np.zeros_like(w), w))

    check()


@each_dtype
@pytest.mark.parametrize(
    "op", [soft, hard, soft_effective], ids=["soft", "hard", "effective"]
)
def test_exactly_the_weights_up_to_the_threshold_become_plus_zero(op, dtype):
    weights = moderate if op is soft_effective else any_bits

    @few
    @given(weights_and_threshold(dtype, weights))
    def check(case):
        w, t = case
        with width(dtype):
            result = np.asarray(op(w, t))
        pruned = np.abs(as_float64(w)) <= np.float64(t)
        np.testing.assert_array_equal(as_float64(result) == 0, pruned)
        assert not np.signbit(result[pruned]).any()

    check()


@each_dtype
@each_threshold
@pytest.mark.parametrize("t", [0.0, -0.0, -1.0, -np.inf, np.nan])
def test_a_threshold_that_is_not_above_zero_is_off(op, t, dtype):
    bits = np.random.default_rng(0).bytes(300 * dtype.itemsize)
    w = np.frombuffer(bits, f"u{dtype.itemsize}").view(dtype).reshape(100, 3)
    w = np.concatenate([w, np.array([[0.0, -0.0, np.nan]], dtype)])
    with width(dtype):
        assert_same_bits(op(w, t), w)


@each_dtype
@each_threshold
def test_special_weights_stay_what_they_are(op, dtype):
    least = np.array(jnp.finfo(dtype).smallest_subnormal, dtype)
    w = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, least, -least], dtype)
    with width(dtype):
        assert_same_bits(op(w, 1.0), np.where(np.arange(7) < 3, w, np.zeros_like(w)))
        assert_same_bits(op(w, np.inf), np.where(np.isnan(w), w, np.zeros_like(w)))


@each_dtype
@each_threshold
def test_a_kept_weight_never_becomes_zero(op, dtype):
    below = np.array([jnp.finfo(dtype).smallest_subnormal, 1e-4, 1.0, 3.0], dtype)
    above = np.nextafter(below, np.array(np.inf, dtype))
    with width(dtype):
        for w, t in zip(above, below, strict=True):
            assert float(op(w, t.astype(wide(dtype)))) > 0
            assert float(op(-w, t.astype(wide(dtype)))) < 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_threshold
def test_a_threshold_is_finer_than_a_narrow_weight(op, dtype):
    w = jnp.array([1.0], dtype)
    assert op(w, 1 - 1e-6).item() > 0
    assert op(w, 1 + 1e-6).item() == 0


@each_dtype
def test_soft_threshold_is_continuous_in_the_weight(dtype):
    @few
    @given(moderate(dtype), moderate(dtype), st.floats(-1, 100, width=16))
    @example(np.full(SHAPE, 1, dtype), np.full(SHAPE, 1 + 2**-7, dtype), 1.0)
    def check(v, w, t):
        with width(dtype):
            moved = np.abs(as_float64(soft(v, t)) - as_float64(soft(w, t)))
        allowed = np.abs(as_float64(v) - as_float64(w))
        assert (moved <= allowed + 200 * eps(dtype) + tiny(dtype)).all()

    check()


@each_dtype
def test_soft_threshold_is_continuous_in_the_threshold(dtype):
    thresholds = st.floats(-1, 100, width=16)

    @few
    @given(moderate(dtype), thresholds, thresholds)
    @example(np.full(SHAPE, 2, dtype), 0.0, 2.0**-14)
    @example(np.full(SHAPE, 1, dtype), 1.0, 1 - 2.0**-10)
    def check(w, t, u):
        with width(dtype):
            moved = np.abs(as_float64(soft(w, t)) - as_float64(soft(w, u)))
        assert (moved <= abs(t - u) + 200 * eps(dtype) + tiny(dtype)).all()

    check()


@each_dtype
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 3), (2, 3, 2, 4)])
def test_channel_scale_is_its_formula(shape, dtype):
    rng = np.random.default_rng(1)
    for t in (-1.0, 0.25, 1.0, 100.0):
        w = rng.normal(size=shape).astype(dtype)
        with width(dtype):
            scale = scale_of(w, t)
        assert scale.dtype == wide(dtype)
        assert scale.shape == shape[-1:]
        if w.size == 0:
            continue
        size, axes = np.abs(as_float64(w)), tuple(range(len(shape) - 1))
        r = ((size * (size > t)).mean(axes) + 1e-6) / (size.mean(axes) + 1e-6)
        rtol = 1e-5 if wide(dtype) == np.float32 else 1e-12
        np.testing.assert_allclose(scale, 1.01 / (r + 0.01), rtol=rtol)


@each_dtype
def test_a_channel_that_lost_nothing_has_scale_1(dtype):
    largest = float(jnp.finfo(dtype).max)
    w = np.array([[1, largest, np.inf, np.nan, 0]] * 3, dtype)
    with width(dtype):
        for t in (-1.0, 0.0, np.nan, 0.5):
            assert np.asarray(scale_of(w, t)).tolist() == [1] * 5


@each_dtype
def test_channel_scale_lies_between_1_and_101(dtype):
    @few
    @given(weights_and_threshold(dtype, moderate))
    def check(case):
        with width(dtype):
            scale = as_float64(scale_of(*case))
        slack = 1e-4 if wide(dtype) == np.float32 else 1e-12
        assert (1 - slack <= scale).all()
        assert (scale <= 101 + slack).all()

    check()


@each_dtype
def test_rescale_multiplies_each_output_channel(dtype):
    scales = hnp.arrays(np.float32, SHAPE[-1:], elements=st.floats(1, 101, width=32))

    @few
    @given(moderate(dtype), scales)
    def check(x, scale):
        with width(dtype):
            result = rescaled(x, scale)
        assert result.dtype == dtype
        np.testing.assert_allclose(
            as_float64(result),
            as_float64(x) * as_float64(scale),
            rtol=2 * eps(dtype),
            atol=tiny(dtype),
        )

    check()


@each_dtype
def test_a_scale_of_one_changes_nothing(dtype):
    @few
    @given(any_bits(dtype))
    @example(np.full(SHAPE, jnp.finfo(dtype).smallest_subnormal, dtype))
    def check(x):
        with width(dtype):
            assert_same_bits(rescaled(x, np.ones(SHAPE[-1:])), x)

    check()


@each_dtype
def test_rescaling_makes_no_new_zeros(dtype):
    least = float(jnp.finfo(dtype).smallest_subnormal)
    w = np.array([[1, -1, 3], [3, 3, -3], [-5, 5, 5]], dtype) * np.array(least, dtype)
    with width(dtype):
        kept = np.asarray(hard_effective(w, wide(dtype)(2 * least)))
    np.testing.assert_array_equal(as_float64(kept) != 0, np.abs(w / least) > 2)


@each_dtype
@each_threshold
@pytest.mark.parametrize("t", [-1.0, 0.0, 0.5, 10.0, np.nan])
def test_gradient_of_a_threshold_is_the_identity(op, t, dtype):
    rng = np.random.default_rng(2)
    w = np.concatenate([rng.normal(size=9), [0.0, -0.0, 0.5]]).astype(dtype)
    cotangent = np.concatenate([rng.normal(size=10), [np.inf, -0.0]]).astype(dtype)
    with width(dtype):
        _, pull = jax.vjp(op, jnp.asarray(w), jnp.asarray(t, wide(dtype)))
        dw, dt = pull(jnp.asarray(cotangent))
    assert_same_bits(dw, cotangent)
    assert_same_bits(dt, np.zeros([], wide(dtype)))


@each_dtype
def test_gradient_of_rescale_is_the_identity(dtype):
    rng = np.random.default_rng(3)
    x, cotangent = rng.normal(size=(2, *SHAPE)).astype(dtype)
    scale = rng.uniform(1, 101, size=SHAPE[-1:]).astype(wide(dtype))
    with width(dtype):
        _, pull = jax.vjp(ops.rescale, jnp.asarray(x), jnp.asarray(scale))
        dx, dscale = pull(jnp.asarray(cotangent))
    assert_same_bits(dx, cotangent)
    assert_same_bits(dscale, np.zeros_like(scale))


@each_dtype
def test_channel_scale_is_not_differentiated(dtype):
    w = np.arange(1.0, 7).reshape(3, 2).astype(dtype)
    with width(dtype):
        for t in (-1.0, 3.0):
            dw, dt = jax.grad(
                lambda w, t: ops.channel_scale(w, t).sum(), argnums=(0, 1)
            )(jnp.asarray(w), jnp.asarray(t, wide(dtype)))
            assert not dw.any()
            assert dt == 0


@each_dtype
def test_the_whole_chain_passes_gradients_straight_through(dtype):
    rng = np.random.default_rng(4)
    w, cotangent = rng.normal(size=(2, *SHAPE)).astype(dtype)
    with width(dtype):
        _, pull = jax.vjp(soft_effective, jnp.asarray(w), jnp.asarray(0.5, wide(dtype)))
        dw, dt = pull(jnp.asarray(cotangent))
    assert_same_bits(dw, cotangent)
    assert float(dt) == 0


@each_dtype
@each_threshold
def test_jit_and_vmap_change_no_bit(op, dtype):
    rng = np.random.default_rng(5)
    w = rng.normal(size=(3, 4, 5)).astype(dtype)
    t = np.array([-1.0, 0.3, 1.0], wide(dtype))
    with width(dtype):
        with jax.disable_jit():
            one_by_one = jnp.stack([op(*pair) for pair in zip(w, t, strict=True)])
        assert_same_bits(jax.jit(jax.vmap(op))(w, t), one_by_one)
        assert_same_bits(op(w, t[:, None, None]), one_by_one)


@each_dtype
@each_threshold
def test_pmap_changes_no_bit(op, dtype):
    rng = np.random.default_rng(6)
    w, cotangent = rng.normal(size=(2, 2, 4, 5)).astype(dtype)
    t = np.array([0.3, 1.0], wide(dtype))

    def forward_and_back(w, t, cotangent):
        result, pull = jax.vjp(op, w, t)
        return result, *pull(cotangent)

    with width(dtype):
        result, dw, dt = jax.pmap(forward_and_back, devices=jax.devices()[:2])(
            w, t, cotangent
        )
        expected = jnp.stack([op(*pair) for pair in zip(w, t, strict=True)])
    assert_same_bits(result, expected)
    assert_same_bits(dw, cotangent)
    assert not np.asarray(dt).any()


def test_gradient_is_the_identity_under_vmap_of_grad():
    w = jnp.linspace(-1, 1, 12).reshape(3, 4)
    coefficients = jnp.arange(12.0).reshape(3, 4)

    def loss(w, t, c):
        scale = ops.channel_scale(w[:, None], t)
        return (ops.rescale(ops.soft_threshold(w[:, None], t), scale)[:, 0] * c).sum()

    gradient = jax.jit(jax.vmap(jax.grad(loss)))(
        w, jnp.array([0.0, 0.5, 2]), coefficients
    )
    np.testing.assert_array_equal(gradient, coefficients)


@each_threshold
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1), (4, 3), (1, 3)])
def test_a_threshold_may_be_an_array_that_broadcasts(op, shape):
    rng = np.random.default_rng(7)
    w = rng.normal(size=SHAPE).astype(np.float32)
    t = rng.uniform(-0.2, 1, size=shape).astype(np.float32)
    single = [
        op(x, y) for x, y in zip(w.flat, np.broadcast_to(t, SHAPE).flat, strict=True)
    ]
    assert_same_bits(op(w, t), np.array(single).reshape(SHAPE))
    dw, dt = jax.grad(lambda w, t: op(w, t).sum(), argnums=(0, 1))(w, t)
    assert_same_bits(dw, np.ones_like(w))
    assert_same_bits(dt, np.zeros_like(t))


@pytest.mark.parametrize(
    ("op", "small", "large"),
    [
        (ops.soft_threshold, (3,), (2, 3)),
        (ops.hard_threshold, (3,), (2, 3)),
        (ops.rescale, (3,), (2, 3)),
    ],
)
def test_the_result_never_outgrows_the_weights(op, small, large):
    with pytest.raises((ValueError, TypeError)):
        op(jnp.ones(small), jnp.ones(large))


@each_dtype
def test_is_kept_says_where_the_threshold_keeps(dtype):
    @few
    @given(weights_and_threshold(dtype))
    def check(case):
        w, t = case
        with width(dtype):
            found, off = kept(w, t), kept(w, -t)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, ~(np.abs(as_float64(w)) <= np.float64(t)))
        assert off.all()

    check()


@each_dtype
@each_threshold
def test_what_is_not_kept_is_zero(op, dtype):
    rng = np.random.default_rng(8)
    w = np.concatenate([rng.normal(size=97), [0.0, -0.0, np.nan]]).astype(dtype)
    with width(dtype):
        for t in (0.3, 2.0):
            np.testing.assert_array_equal(kept(w, t), as_float64(op(w, t)) != 0)


@each_dtype
def test_the_model_sees_what_is_given_and_weights_get_its_gradient(dtype):
    rng = np.random.default_rng(9)
    w, cotangent = rng.normal(size=(2, 12)).astype(dtype)
    bits = rng.bytes(12 * dtype.itemsize)
    seen = np.frombuffer(bits, f"u{dtype.itemsize}").view(dtype)
    with width(dtype):
        result, pull = jax.vjp(ops.straight_through, jnp.asarray(w), jnp.asarray(seen))
        dw, dseen = pull(jnp.asarray(cotangent))
    assert_same_bits(result, seen)
    assert_same_bits(dw, cotangent)
    assert_same_bits(dseen, np.zeros_like(seen))


def test_straight_through_may_see_what_is_made_of_the_weights_themselves():
    w, c = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.arange(12.0).reshape(3, 4)

    def loss(w, c):
        return (ops.straight_through(w, jnp.sin(w)) * c).sum()

    gradient = jax.jit(jax.vmap(jax.grad(loss)))(w, c)
    np.testing.assert_array_equal(gradient, c)


def test_integers_are_refused():
    for op in (soft, hard, ops.channel_scale, ops.rescale):
        with pytest.raises(TypeError, match="int32"):
            op(jnp.arange(3), 1.0)
