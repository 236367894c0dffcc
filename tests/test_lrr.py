"""LRR: pruned after each cycle, trained on from there, and never more than asked."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy import recording

import st3jax

RATE, MOMENTUM = 0.25, 0.5  # powers of two: products are exact, sums round once
SGD = optax.sgd(RATE, momentum=MOMENTUM)
CYCLE, SPARSITY = 3, 0.5
CYCLES = 5  # dense, then 0.2, 0.36, 0.488 and 0.5
STEPS = CYCLE * (CYCLES + 1)


def network(seed=0, rows=12):
    """A kernel of 84 weights, and a bias."""
    kernel = jax.random.normal(jax.random.key(seed), (rows, 7))
    return {"kernel": kernel, "bias": jnp.ones(7)}


def gradients(steps=STEPS, scale=1.0, rows=12):
    trees = [network(100 + i, rows) for i in range(steps)]
    return jax.tree.map(lambda *x: scale * jnp.stack(x), *trees)


def simulate(tx, params, grads):
    """Trains on given gradients of effective weights; all there is in each step."""

    def step(carry, g):
        params, opt_state = carry
        seen, pull = jax.vjp(lambda p: st3jax.sparsify(p, opt_state), params)
        (passed,) = pull(g)
        updates, opt_state = tx.update(passed, opt_state, params)
        params = optax.apply_updates(params, updates)
        effective = st3jax.finalize(params, opt_state)
        record = {"seen": seen, "passed": passed, "raw": params, "updates": updates}
        record |= {"effective": effective, "state": opt_state}
        return (params, opt_state), record

    train = jax.jit(functools.partial(jax.lax.scan, step))
    return jax.device_get(train((params, tx.init(params)), grads)[1])


@functools.cache
def usual(scale=1.0):
    tx = st3jax.lrr(recording(SGD), SPARSITY, cycle_steps=CYCLE)
    run = simulate(tx, network(), gradients(scale=scale))
    reached = jax.tree.map(lambda g: g[:, 0], run["state"].inner_state.seen)
    state = run["state"]._replace(inner_state=run["state"].inner_state.inner_state)
    return run | {"reached": reached, "state": state}


def asked(n, sparsity):
    return math.floor(sparsity * (n - 1)) + 1 if sparsity else 0


def sparsity_after(steps, keep=0.8, sparsity=SPARSITY, cycle=CYCLE):
    return min(1 - keep ** (steps // cycle), sparsity)


def zeros(kernels):
    return (kernels == 0).sum((-1, -2))


# Counts and masks


def test_after_each_cycle_a_fifth_of_the_rest_is_gone_to_the_weight():
    """Of 84 weights, and what is left is what the paper's recursion leaves."""
    counts = zeros(usual()["effective"]["kernel"])
    expected = [asked(84, sparsity_after(i + 1)) for i in range(STEPS)]
    assert counts.tolist() == expected
    assert sorted({int(c) for c in counts}) == [0, 17, 30, 41, 42]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_masks_are_nested_and_what_is_gone_is_zero_everywhere(scale):
    run = usual(scale)
    gone = run["effective"]["kernel"] == 0
    for before, after in itertools.pairwise(gone):
        assert not (before & ~after).any()
    assert ((run["raw"]["kernel"] == 0) == gone).all()
    trace = run["state"].inner_state[0].trace["kernel"]
    assert ((trace == 0) == gone).all()
    assert ((run["seen"]["kernel"][1:] == 0) == gone[:-1]).all()
    assert ((run["reached"]["kernel"][1:] == 0) == gone[:-1]).all()
    assert (run["passed"]["kernel"] == gradients(scale=scale)["kernel"]).all()


def test_the_mask_moves_at_the_end_of_a_cycle_only():
    gone = usual()["effective"]["kernel"] == 0
    moved = [i + 1 for i in range(1, STEPS) if (gone[i] != gone[i - 1]).any()]
    assert moved == [CYCLE * c for c in range(1, CYCLES)]


def test_the_last_pruning_removes_no_more_than_is_asked():
    counts = zeros(usual()["effective"]["kernel"])[CYCLE - 1 :: CYCLE]
    removed = np.diff(counts)
    left = 84 - counts
    assert removed[2] < 0.19 * left[2]
    assert counts[-1] == counts[-2] == asked(84, SPARSITY)


@pytest.mark.parametrize(("rows", "sparsity"), [(18, 0.2), (18, 0.36), (12, 0.488)])
def test_a_sparsity_that_whole_cycles_come_to_is_met_to_the_weight(rows, sparsity):
    """125 * 0.2 is whole, and 1 - 0.8 is less than 0.2 in floating point."""
    cycles = st3jax.lrr_cycles(sparsity)
    tx = st3jax.lrr(SGD, sparsity, cycle_steps=1)
    run = simulate(tx, network(rows=rows), gradients(cycles + 2, rows=rows))
    pruned = st3jax.prune(network(rows=rows), sparsity)
    counts = zeros(run["raw"]["kernel"])
    assert counts[cycles - 2 :].tolist() == [zeros(pruned["kernel"])] * 4


@settings(deadline=None, max_examples=12)
@given(
    sparsity=st.floats(0, 0.99),
    keep=st.sampled_from([0.5, 0.8, 0.9]),
    cycle=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_sparsity_is_met_after_as_many_cycles_as_said(sparsity, keep, cycle, seed):
    cycles = min(st3jax.lrr_cycles(sparsity, keep=keep), 8)
    tx = st3jax.lrr(SGD, sparsity, cycle_steps=cycle, keep=keep)
    grads = jax.device_get(gradients(cycle * cycles))
    params, update = network(seed), jax.jit(tx.update)
    opt_state = tx.init(params)
    for i in range(cycle * cycles):
        g = jax.tree.map(lambda g, i=i: g[i], grads)
        updates, opt_state = update(g, opt_state, params)
        params = optax.apply_updates(params, updates)
        s = sparsity_after(i + 1, keep, sparsity, cycle)
        least = asked(84, s) if s > 0 else 0
        # The power may round to either side where its product is whole.
        assert int(zeros(params["kernel"])) - least in (
            (0,) if abs(s * 83 - round(s * 83)) > 1e-9 else (-1, 0, 1)
        )


def test_the_first_cycle_is_dense_and_so_is_all_for_a_sparsity_of_zero():
    dense = simulate(st3jax.lrr(SGD, 0.0, cycle_steps=CYCLE), network(), gradients())
    assert not zeros(dense["raw"]["kernel"]).any()
    first = usual()["raw"]["kernel"][: CYCLE - 1]
    assert (first == dense["raw"]["kernel"][: CYCLE - 1]).all()
    w = np.asarray(network()["kernel"])
    v = np.zeros_like(w)
    for g, ours in zip(gradients()["kernel"], dense["raw"]["kernel"], strict=True):
        v = np.asarray(g) + np.float32(MOMENTUM) * v
        w = w - np.float32(RATE) * v
        assert (ours == w).all()


# Survivors


def test_survivors_and_their_momentum_go_through_a_pruning_unchanged():
    """To the bit what a masked step of the inner optimizer makes of them."""
    run = usual()
    w = np.asarray(network()["kernel"])
    v = np.zeros_like(w)
    pruned = 0
    for i, g in enumerate(gradients()["kernel"]):
        mask = (w != 0) if i >= CYCLE else np.ones_like(w, bool)
        v = np.where(mask, g, 0) + np.float32(MOMENTUM) * v
        w = w - np.float32(RATE) * v
        kept = run["effective"]["kernel"][i] != 0
        assert (run["raw"]["kernel"][i][kept] == w[kept]).all()
        trace = run["state"].inner_state[0].trace["kernel"][i]
        assert (trace[kept] == v[kept]).all()
        pruned += (mask & ~kept).any()
        if (mask & ~kept).any():  # the smallest ones are gone
            assert abs(w[mask & ~kept]).max() < abs(w[kept]).min()
        w, v = np.where(kept, w, 0), np.where(kept, v, 0)
    assert pruned == CYCLES - 1


def test_within_a_cycle_tiny_weights_stay_alive_and_zeros_stay_zero():
    pushes = gradients()
    onto_zero = usual()["raw"]["kernel"][CYCLE] / RATE
    trace = usual()["state"].inner_state[0].trace["kernel"][CYCLE]
    pushes["kernel"] = pushes["kernel"].at[CYCLE + 1].set(onto_zero - 0.5 * trace)
    tx = st3jax.lrr(SGD, SPARSITY, cycle_steps=CYCLE)
    run = simulate(tx, network(), pushes)
    gone = run["effective"]["kernel"] == 0
    alive = ~gone[CYCLE - 1]
    size = abs(run["raw"]["kernel"][CYCLE + 1])[alive]
    assert ((size > 0) & (size < 1e-5)).all()
    for i in range(CYCLE - 1, 2 * CYCLE - 1):
        assert (gone[i] == gone[CYCLE - 1]).all()
    assert zeros(run["effective"]["kernel"])[2 * CYCLE - 1] == asked(84, 0.36)


def test_adam_noise_and_decay_bring_nothing_back():
    inner = optax.chain(optax.add_noise(0.5, 0.1, 0), optax.adamw(0.3, weight_decay=1))
    tx = st3jax.lrr(inner, SPARSITY, cycle_steps=CYCLE)
    run = simulate(tx, network(), gradients())
    gone = run["raw"]["kernel"] == 0
    expected = [asked(84, sparsity_after(i + 1)) for i in range(STEPS)]
    assert gone.sum((1, 2)).tolist() == expected
    assert not (gone[:-1] & ~gone[1:]).any()
    adam = run["state"].inner_state[1][0]
    assert (adam.mu["kernel"][gone] == 0).all()
    assert (adam.nu["kernel"][gone] == 0).all()


def test_boxed_kernels_are_pruned_as_bare_ones():
    def boxed(tree, batch):
        return jax.tree.map(
            lambda w: nn.Partitioned(w, (None,) * (w.ndim - batch)), tree
        )

    tx = st3jax.lrr(SGD, SPARSITY, cycle_steps=CYCLE)
    run = simulate(tx, boxed(network(), 0), boxed(gradients(), 1))
    raw = nn.unbox(run["raw"])["kernel"]
    assert (raw == usual()["raw"]["kernel"]).all()


# Rewinding


def rate(step):
    """Warm-up, and a decay."""
    return jnp.where(step < 2, (step + 1) / 4, 0.5 / (1 + step))


def rewound(cycles, length=CYCLE):
    ends = [length * c for c in range(1, cycles)]
    return optax.join_schedules([rate] * cycles, ends)


def test_after_a_rewind_the_rate_is_that_of_the_first_cycle():
    tx = st3jax.lrr(optax.sgd(rewound(CYCLES)), SPARSITY, cycle_steps=CYCLE)
    ones = jax.tree.map(jnp.ones_like, gradients(CYCLE * CYCLES))
    run = simulate(tx, network(), ones)
    first = -np.array([float(rate(j)) for j in range(CYCLE)], np.float32)
    of_bias = run["updates"]["bias"].reshape(CYCLES, CYCLE, 7)
    np.testing.assert_allclose(
        of_bias, np.broadcast_to(first[:, None], of_bias.shape), rtol=1e-6
    )
    alive = run["raw"]["kernel"][-1] != 0
    of_kept = run["updates"]["kernel"][:, alive].reshape(CYCLES, CYCLE, -1)
    np.testing.assert_allclose(
        of_kept, np.broadcast_to(first[:, None], of_kept.shape), rtol=1e-6
    )


@pytest.mark.parametrize("sticky", ["no", "strict"])
def test_one_ramp_and_a_rewound_cycle_stay_at_the_target(sticky):
    """E + F + E epochs of one step: a ramp, its fine-tuning, and all rates anew."""
    epochs, fine_tuning = 8, 2
    first = epochs + fine_tuning
    schedule = optax.join_schedules([rate, rate], [first])
    tx = st3jax.gmp(
        optax.sgd(schedule),
        st3jax.polynomial_ramp(SPARSITY, 1, 5),
        sticky=sticky,
        freeze_step=epochs,
    )
    steps = 2 * epochs + fine_tuning
    run = simulate(tx, network(), gradients(steps))
    gone = run["effective"]["kernel"] == 0
    assert gone[4:].sum((1, 2)).tolist() == [asked(84, SPARSITY)] * (steps - 4)
    assert (gone[epochs - 1 :] == gone[-1]).all()
    ones = jax.tree.map(jnp.ones_like, gradients(steps))
    sizes = simulate(tx, network(), ones)["updates"]["bias"][:, 0]
    assert (sizes[first:] == sizes[:epochs]).all()
    assert len(set(sizes[:epochs].tolist())) > 4


# The number of cycles


@settings(max_examples=300, deadline=None)
@given(sparsity=st.floats(0, 0.9999), keep=st.floats(0.01, 0.97))
@example(sparsity=0.0, keep=0.8)
@example(sparsity=0.2, keep=0.8)
def test_cycles_are_as_few_as_come_to_the_sparsity(sparsity, keep):
    cycles = st3jax.lrr_cycles(sparsity, keep=keep)
    assert isinstance(cycles, int)
    assert cycles >= 1
    assert 1 - keep ** (cycles - 1) >= sparsity - 1e-9
    assert cycles == 1 or 1 - keep ** (cycles - 2) < sparsity
    assert st3jax.lrr_cycles(sparsity / 2, keep=keep) <= cycles


@pytest.mark.parametrize("prunings", [1, 2, 3, 5, 7, 8, 10, 11, 13, 14, 17, 18])
def test_as_many_prunings_as_published(prunings):
    assert st3jax.lrr_cycles(1 - 0.8**prunings) == prunings + 1
    rounded = math.floor(1e4 * (1 - 0.8**prunings)) / 1e4
    assert st3jax.lrr_cycles(rounded) == prunings + 1
    assert st3jax.lrr_cycles(rounded + 2e-4) == prunings + 2


def test_a_sparsity_written_in_decimals_needs_no_cycle_more():
    """1 - 0.8 is less than 0.2 in floating point."""
    assert [st3jax.lrr_cycles(s) for s in (0.2, 0.36, 0.488)] == [2, 3, 4]
    assert [st3jax.lrr_cycles(s, keep=0.9) for s in (0.1, 0.19)] == [2, 3]


# Bad use


@pytest.mark.parametrize(
    "make",
    [
        st3jax.lrr_cycles,
        functools.partial(
            lambda sparsity, **options: st3jax.lrr(
                SGD, sparsity, cycle_steps=3, **options
            )
        ),
    ],
)
def test_sparsities_that_cycles_do_not_come_to_are_refused(make):
    for sparsity, keep in [(1.0, 0.8), (0.5, 0.0), (0.5, 1.0)]:
        with pytest.raises(ValueError, match="do not come to a sparsity of"):
            make(sparsity, keep=keep)
    for sparsity, keep, name in [(90, 0.8, "sparsity"), (0.5, 80, "keep")]:
        with pytest.raises(ValueError, match=f"{name} is a fraction in"):
            make(sparsity, keep=keep)
    for sparsity, keep in [(lambda step: 0.5, 0.8), ({"*": 0.5}, 0.8), (0.5, "0.8")]:
        with pytest.raises(TypeError, match="is a number in"):
            make(sparsity, keep=keep)


def test_cycles_have_whole_steps_and_an_optimizer():
    with pytest.raises(ValueError, match="cycle_steps is a number of steps, 1 or more"):
        st3jax.lrr(SGD, 0.5, cycle_steps=0)
    with pytest.raises(TypeError, match="cycle_steps is a whole number"):
        st3jax.lrr(SGD, 0.5, cycle_steps=2.5)
    with pytest.raises(TypeError, match="the optimizer to wrap"):
        st3jax.lrr(0.1, 0.5, cycle_steps=3)
    with pytest.raises(ValueError, match="no parameter is prunable"):
        st3jax.lrr(SGD, 0.5, cycle_steps=3).init({"bias": jnp.ones(3)})


def test_prunable_says_what_is_pruned():
    params = {"kernel": network()["kernel"], "table": network(1)["kernel"]}
    tx = st3jax.lrr(
        SGD, 0.2, cycle_steps=1, prunable=lambda path, leaf: path == "table"
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    pruned = optax.apply_updates(params, updates)
    assert [int(zeros(pruned[name])) for name in params] == [0, asked(84, 0.2)]
