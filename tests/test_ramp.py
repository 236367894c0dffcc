"""A ramp takes the sparsity from nothing to its final value and never falls."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import st3jax
from st3jax import polynomial_ramp
from st3jax.schedules import ramp_ends

POWERS = [1, 2, 3, 0.5, 2.7]

each_power = pytest.mark.parametrize("power", POWERS)
few = settings(deadline=None, max_examples=40)
finals = st.floats(0, 1, width=32, allow_subnormal=False) | st.sampled_from(
    [0.8, 0.9, 0.95, 0.98, 1.0]
)
begins, lengths = st.integers(0, 500_000), st.integers(1, 500_000)


def formula(step, final, begin, end, power):
    done = np.clip((step - begin) / (end - begin), 0, 1)
    return final * (1 - (1 - done) ** power)


def around(begin, end):
    """100 steps, in order: ends and their neighbours, and some between."""
    ends = [0, begin - 1, begin, begin + 1, end - 1, end, end + 1, 2 * end]
    steps = np.concatenate([ends, np.linspace(begin, end, 92).astype(int)])
    return np.sort(np.maximum(steps, 0)).astype(np.int32)


@each_power
def test_a_ramp_is_its_formula(power):
    @few
    @given(finals, begins, lengths)
    def check(final, begin, length):
        steps, end = around(begin, begin + length), begin + length
        asked = polynomial_ramp(final, begin, end, power)(steps)
        expected = formula(steps, final, begin, end, power)
        slack = 1e-6 if power >= 1 else 1e-3
        np.testing.assert_allclose(asked, expected, atol=slack)

    check()


@each_power
def test_a_ramp_is_exact_to_float64_in_64_bit_mode(power):
    steps = np.arange(40)
    with jax.enable_x64(True):
        asked = polynomial_ramp(0.9, 5, 33, power)(jnp.asarray(steps))
    expected = formula(steps, 0.9, 5, 33, power)
    np.testing.assert_allclose(asked, expected, rtol=1e-14, atol=1e-15)


@each_power
def test_a_ramp_never_falls(power):
    @few
    @given(finals, begins, lengths)
    @example(0.9, 0, 3)
    def check(final, begin, length):
        ramp = polynomial_ramp(final, begin, begin + length, power)
        assert (np.diff(ramp(around(begin, begin + length))) >= 0).all()

    check()


@each_power
def test_both_ends_are_exact(power):
    @few
    @given(finals, begins, lengths)
    def check(final, begin, length):
        ramp = polynomial_ramp(final, begin, begin + length, power)
        before = np.array([0, begin // 2, begin], np.int32)
        after = np.array([0, 1, 1_000_000], np.int32) + begin + length
        assert np.asarray(ramp(before)).tolist() == [0] * 3
        assert np.asarray(ramp(after)).tolist() == [np.float32(final)] * 3

    check()


@each_power
@pytest.mark.parametrize("wide", [False, True])
def test_both_ends_are_exact_under_jit(wide, power):
    with jax.enable_x64(wide):
        for length in (3, 41, 49):
            ramp = jax.jit(polynomial_ramp(0.9, 7, 7 + length, power))
            ends = [np.asarray(ramp(step)) for step in (7, 7 + length, 8 + length)]
            assert ends == [0, *np.array([0.9, 0.9], ends[0].dtype)]


@each_power
@pytest.mark.parametrize("length", [41, 49])
def test_training_ends_at_the_final_sparsity(length, power):
    ramp = polynomial_ramp(0.875, 0, length, power)
    n, zeros = train_on_fixed_weights(ramp, length + 1)
    assert zeros == sorted(zeros)
    assert zeros[-2:] == [math.floor(0.875 * (n - 1)) + 1] * 2


def test_a_ramp_is_cubic_unless_asked_otherwise():
    half_way = polynomial_ramp(0.8, 0, 10)(5)
    assert float(half_way) == pytest.approx(0.8 * 7 / 8)
    assert polynomial_ramp(0.8, 0, 10, power=3)(5) == half_way


def test_a_ramp_is_traceable():
    ramp = polynomial_ramp(0.9, 2, 8)
    steps = np.arange(10, dtype=np.int32)
    np.testing.assert_allclose(jax.jit(ramp)(steps), ramp(steps), rtol=1e-6)


def test_whole_numbers_of_any_type_are_steps():
    expected = polynomial_ramp(0.9, 2, 8)(5)
    assert polynomial_ramp(np.float32(0.9), np.int64(2), 8.0)(5) == expected


def train_on_fixed_weights(ramp, steps, **options):
    """The zeros after each step of an optimizer that leaves the weights alone."""
    w = jax.random.normal(jax.random.key(0), (25, 41))
    params = {"kernel": w, "bias": jnp.zeros(41)}
    tx = st3jax.st3(optax.sgd(0.0), ramp, **options)

    @jax.jit
    def step(opt_state):
        _, opt_state = tx.update(params, opt_state, params)
        return opt_state, st3jax.summary(st3jax.finalize(params, opt_state)).zeros

    opt_state, zeros = tx.init(params), []
    for _ in range(steps):
        opt_state, count = step(opt_state)
        zeros.append(int(count))
    return w.size, zeros


@pytest.mark.parametrize(("end", "update_every"), [(25, 10), (13, 100), (7, 5)])
def test_the_target_is_met_at_the_end_of_the_ramp_whatever_the_interval(
    end, update_every
):
    """And before it the sparsity moves every so many steps alone."""
    ramp = polynomial_ramp(0.9, 0, end)
    n, zeros = train_on_fixed_weights(ramp, end + 3, update_every=update_every)
    target = math.floor(0.9 * (n - 1)) + 1
    assert zeros[end - 1 :] == [target] * 4
    moved = [i + 1 for i in range(end) if zeros[i] != ([0, *zeros])[i]]
    assert moved == [*range(update_every, end, update_every), end]


def test_a_ramp_of_250_steps_is_met_with_a_threshold_in_100():
    """As asked for in the count of a state, without the steps before."""
    ramp = polynomial_ramp(0.9, 0, 250)
    tx = st3jax.st3(optax.sgd(0.0), ramp, update_every=100)
    params = {"kernel": jax.random.normal(jax.random.key(0), (25, 41))}
    update, opt_state = jax.jit(tx.update), tx.init(params)
    for completed in (199, 248, 249, 250, 260):
        opt_state = opt_state._replace(count=jnp.int32(completed))
        before = opt_state.thresholds["kernel"]
        _, opt_state = update(params, opt_state, params)
        moved = bool(opt_state.thresholds["kernel"] != before)
        assert moved == (completed in (199, 249))
    report = st3jax.summary(st3jax.finalize(params, opt_state))
    assert int(report.zeros) == math.floor(0.9 * (25 * 41 - 1)) + 1


@each_power
def test_sparsity_never_falls_along_a_ramp(power):
    n, zeros = train_on_fixed_weights(polynomial_ramp(0.9, 3, 17, power), 20)
    assert zeros == sorted(zeros)
    assert zeros[:3] == [0, 0, 0]
    assert zeros[-4:] == [math.floor(0.9 * (n - 1)) + 1] * 4
    for c in range(4, 17):
        s = formula(c, 0.9, 3, 17, power)
        assert zeros[c - 1] == math.floor(s * (n - 1)) + 1


def test_thresholds_wait_for_the_next_update():
    _, each = train_on_fixed_weights(polynomial_ramp(0.9, 0, 9), 12)
    _, third = train_on_fixed_weights(polynomial_ramp(0.9, 0, 9), 12, update_every=3)
    assert third == [0, 0, *np.repeat(each[2:11:3], 3), each[11]]


def test_any_optax_schedule_is_a_sparsity():
    schedule = optax.piecewise_constant_schedule(0.5, {4: 1.5})
    n, zeros = train_on_fixed_weights(schedule, 6)
    assert zeros == [math.floor(s * (n - 1)) + 1 for s in [0.5] * 3 + [0.75] * 3]


def test_a_ramp_ends_at_one_step_and_a_number_at_none():
    steps = range(1, 40)
    one, two = polynomial_ramp(0.9, 5, 20), polynomial_ramp(0.5, 0, 30)
    for sparsity, ends in ((one, {20}), ({"a": one, "b": two}, {20, 30}), (0.9, set())):
        assert {c for c in steps if ramp_ends(sparsity, jnp.int32(c))} == ends
