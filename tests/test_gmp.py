"""GMP and hard straight-through pruning: who is zero, who trains, who returns."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import recording, seen_by_inner

import st3jax

pytestmark = pytest.mark.usefixtures("quickly_compiled")

METHODS = {
    "no": st3jax.gmp,
    "strict": functools.partial(st3jax.gmp, sticky="strict"),
    "published": functools.partial(st3jax.gmp, sticky="published"),
    "ste": st3jax.ste,
}
GMP = ["no", "strict", "published"]
RATE, MOMENTUM = 0.25, 0.5  # powers of two: products are exact, sums round once
SGD = optax.sgd(RATE, momentum=MOMENTUM)
N = 56
RAMP = np.array([0, 0, 0.25, 0.5, 0.625, 0.75, 0.75, 0.75, 0.75, 0.75])
STEPS = len(RAMP) - 1


def network(seed=0, dtype=jnp.float32):
    """Two kernels of 56 weights together, and a bias."""
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "a": {
            "kernel": jax.random.normal(a, (4, 8), dtype),
            "bias": jnp.ones(8, dtype),
        },
        "b": {"kernel": jax.random.normal(b, (8, 3), dtype)},
    }


def gradients(steps=STEPS, scale=1.0, dtype=jnp.float32):
    """As many trees of gradients, stacked."""
    trees = [network(100 + i, dtype) for i in range(steps)]
    return jax.tree.map(lambda *x: scale * jnp.stack(x), *trees)


def filled(params, values):
    """The same tree with other numbers in its kernels."""
    a, b = np.split(np.asarray(values, np.float32), [32], axis=-1)
    return {
        "a": {
            "kernel": jnp.asarray(a.reshape(*a.shape[:-1], 4, 8)),
            "bias": params["a"]["bias"],
        },
        "b": {"kernel": jnp.asarray(b.reshape(*b.shape[:-1], 8, 3))},
    }


def flat(tree):
    """The kernels of a tree, one after the other."""
    kernels = (np.asarray(tree[layer]["kernel"]) for layer in ("a", "b"))
    return np.concatenate([w.reshape(*w.shape[:-2], -1) for w in kernels], axis=-1)


def asked(sparsity, n=N):
    return math.floor(float(sparsity) * (n - 1)) + 1 if sparsity > 0 else 0


class Run(NamedTuple):
    """What there was in each step, stacked."""

    seen: Any  # effective weights in the loss
    passed: Any  # gradient with respect to raw weights
    reached: Any  # what of it the inner optimizer saw
    raw: Any  # after the step
    effective: Any
    state: st3jax.ThresholdState


def simulate(tx, params, grads):
    """Trains on given gradients with respect to what the model sees.

    The transform is around a recording optimizer.
    """

    def step(carry, g):
        params, opt_state = carry
        seen, pull = jax.vjp(lambda p: st3jax.sparsify(p, opt_state), params)
        (passed,) = pull(jax.tree.map(lambda g, w: g.astype(w.dtype), g, seen))
        updates, opt_state = tx.update(passed, opt_state, params)
        params = optax.apply_updates(params, updates)
        effective = st3jax.finalize(params, opt_state)
        inner_state = opt_state.inner_state.inner_state
        state = opt_state._replace(inner_state=inner_state)
        reached = seen_by_inner(opt_state)
        record = Run(seen, passed, reached, params, effective, state)
        return (params, opt_state), record

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def simulate_schedule(method, inner, options, params, grads, sparsities):
    def schedule(count):
        return sparsities[count]

    tx = METHODS[method](recording(inner), schedule, **dict(options))
    return simulate(tx, params, grads)


def run(method, params=None, grads=None, sparsities=RAMP, inner=SGD, **options):
    """What becomes of a network, with a schedule that is read from an array."""
    params = network() if params is None else params
    grads = gradients() if grads is None else grads
    options = tuple(sorted(options.items()))
    sparsities = jnp.asarray(sparsities, jnp.float32)
    return jax.device_get(
        simulate_schedule(method, inner, options, params, grads, sparsities)
    )


def zeros(weights):
    return (weights == 0).sum(-1)


def traces(run):
    return flat(run.state.inner_state[0].trace)


# All of it, against a few lines of NumPy


class Expected:
    """The methods in NumPy: a mask for each weight, and no cleverness."""

    def __init__(self, method, params, update_every=1, freeze_step=None):
        self.method, self.update_every = method, update_every
        self.freeze_step = freeze_step
        self.w = flat(params)
        self.v = np.zeros_like(self.w)
        self.t, self.count = -1.0, 0

    def fixed(self):
        frozen = self.freeze_step is not None and self.count >= self.freeze_step
        return frozen or (self.method == "strict" and self.t >= 0)

    def kept(self):
        if self.fixed():
            return self.w != 0
        on = self.t >= 0 if self.method == "published" else self.t > 0
        return abs(self.w) > self.t if on else np.ones_like(self.w, bool)

    def seen(self):
        return np.where(self.kept(), self.w, 0)

    def reached(self, g):
        straight = self.method == "ste" and not self.fixed()
        return g if straight else np.where(self.kept(), g, 0)

    def find_threshold(self, sparsity):
        """Between the last weight to go and the first to stay, by interpolation."""
        if sparsity == 0:
            return -1.0
        size = np.sort(abs(self.w)).astype(np.float64)
        last = asked(sparsity) - 1
        share = float(sparsity) * (N - 1) - last
        first = size[min(last + 1, N - 1)]
        return size[last] + share * (first - size[last])

    def step(self, g, sparsity, ends=False):
        """Trains on; ``ends`` where the ramp comes to its last value."""
        w, fixed, kept = self.w, self.fixed(), self.kept()
        self.v = self.reached(g) + np.float32(MOMENTUM) * self.v
        landed = w - np.float32(RATE) * self.v
        if fixed:  # a kept weight does not become zero
            float32 = np.finfo(np.float32)
            least = np.maximum(abs(w) * float32.eps, 2 * float32.smallest_normal)
            aside = w + (np.copysign(least, w) - w)
            landed = np.where(kept, np.where(landed == 0, aside, landed), 0)
        self.w = landed
        frozen = self.freeze_step is not None and self.count >= self.freeze_step
        self.count += 1
        due = self.count % self.update_every == 0 or self.count == self.freeze_step
        due |= ends
        if due and not frozen:
            self.t = self.find_threshold(sparsity)
        removes = self.method == "published" or (self.method == "strict" and due)
        if removes and self.t >= 0 and not frozen:
            self.w = np.where(abs(self.w) > self.t, self.w, 0)
        if self.method == "strict" and self.t >= 0:
            self.v = np.where(self.w != 0, self.v, 0)
        if self.count == self.freeze_step and self.t > 0:
            self.w = np.where(abs(self.w) > self.t, self.w, 0)


def draw(rng, shape, coarse):
    """Weights or gradients; coarse ones have ties and zeros."""
    values = rng.normal(size=shape)
    return np.round(2 * values) / 2 if coarse else values


SPARSITIES = st.lists(
    st.sampled_from([0.0, *np.linspace(0, 1, N), 0.3, 0.777]), min_size=6, max_size=6
)


@pytest.mark.parametrize(
    "options", [{}, {"update_every": 2, "freeze_step": 5}], ids=["plain", "freeze"]
)
@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), coarse=st.booleans(), sparsities=SPARSITIES)
def test_training_is_what_a_few_lines_of_numpy_say(
    method, options, seed, coarse, sparsities
):
    """To the last bit, whatever the weights, the gradients and the ramp."""
    rng = np.random.default_rng(seed)
    params = filled(network(), draw(rng, N, coarse))
    grads = filled(gradients(6), draw(rng, (6, N), coarse))
    sparsities = [0.0, *sorted(sparsities)]
    ours = run(method, params, grads, sparsities, **options)
    expected = Expected(method, params, **options)
    for i, g in enumerate(flat(grads)):
        assert (flat(ours.seen)[i] == expected.seen()).all()
        assert (flat(ours.passed)[i] == g).all()
        assert (flat(ours.reached)[i] == expected.reached(g)).all()
        before, now, last = np.float32([sparsities[j] for j in (i, i + 1, -1)])
        expected.step(g, now, ends=before != now == last)
        assert ((flat(ours.raw)[i] == 0) == (expected.w == 0)).all()
        if i + 1 == expected.freeze_step:  # the update onto a weight rounds
            np.testing.assert_allclose(flat(ours.raw)[i], expected.w, rtol=1e-6)
            expected.w = flat(ours.raw)[i]
        assert (flat(ours.raw)[i] == expected.w).all()
        assert (flat(ours.effective)[i] == expected.seen()).all()
        if method != "strict" or expected.t >= 0:
            assert (traces(ours)[i] == expected.v).all()


# Sparsity


@pytest.mark.parametrize("method", METHODS)
def test_after_each_refresh_the_count_of_zeros_is_exact(method):
    counts = [asked(s) for s in RAMP[1:]]
    assert zeros(flat(run(method).effective)).tolist() == counts
    every_other = run(method, update_every=2)
    assert zeros(flat(every_other.effective))[1::2].tolist() == counts[1::2]


@pytest.mark.parametrize("method", METHODS)
def test_at_a_sparsity_of_zero_training_is_that_of_the_inner_optimizer(method):
    """To the bit, also for kernels that start at zero while the rate does too."""
    rate = optax.join_schedules([optax.constant_schedule(0.0), lambda _: RATE], [2])
    inner = optax.sgd(rate, momentum=MOMENTUM)
    params = filled(network(), [0.0] * 32 + [1.0] * 24)
    ours = run(method, params, sparsities=0 * RAMP, inner=inner)

    def step(carry, g):
        params, opt_state = carry
        updates, opt_state = inner.update(g, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), params

    scan = jax.jit(functools.partial(jax.lax.scan, step))
    _, alone = scan((params, inner.init(params)), gradients())
    for a, b in zip(jax.tree.leaves(ours.raw), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_that_start_at_zero_are_not_stuck_before_the_ramp(method):
    params = filled(network(), [0.0] * 32 + [1.0] * 24)
    ours = run(method, params)
    assert (flat(ours.raw)[0][:32] != 0).all()
    assert (flat(ours.effective)[-1][:32] != 0).any()


def test_everything_can_be_asked_to_go():
    for method in METHODS:
        ours = run(method, sparsities=np.linspace(0, 1, STEPS + 1))
        assert zeros(flat(ours.effective))[-1] == N


# Who returns


@pytest.mark.parametrize("method", ["no", "ste"])
def test_raw_weights_that_are_not_pushed_stay_and_return_with_their_value(method):
    """Survivors shrink below the pruned weights, and the mask turns around."""
    params = filled(network(), np.arange(1, N + 1) / 8)
    pushes = np.zeros((STEPS, N))
    pushes[6, N // 2 :] = flat(params)[N // 2 :] / RATE * (1 - 1 / 64)
    sparsities = np.full(STEPS + 1, 0.5)
    ours = run(
        method,
        params,
        filled(gradients(), pushes),
        sparsities,
        inner=optax.sgd(RATE),
    )
    small, large = slice(0, N // 2), slice(N // 2, N)
    for i in range(STEPS):
        assert (flat(ours.raw)[i][small] == flat(params)[small]).all()
        gone, left = (small, large) if i < 6 else (large, small)
        assert (flat(ours.effective)[i][gone] == 0).all()
        assert (flat(ours.effective)[i][left] == flat(ours.raw)[i][left]).all()


def test_straight_through_a_pushed_weight_returns_and_with_gmp_it_does_not():
    params = filled(network(), np.arange(1, N + 1) / 8)
    pushes = np.zeros((STEPS, N))
    pushes[:, 0] = -4.0  # the smallest weight has to grow
    grads = filled(gradients(), pushes)
    sparsities = np.full(STEPS + 1, 0.5)
    for method in METHODS:
        weight = flat(run(method, params, grads, sparsities).effective)[:, 0]
        assert weight[0] == 0 or method == "ste"
        assert (weight[-1] > 4) == (method == "ste")


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_strict_zeros_never_return_and_have_no_momentum(scale):
    inner = optax.sgd(1.0, momentum=0.9)
    ours = run("strict", grads=gradients(scale=scale), inner=inner)
    kept = flat(ours.effective) != 0
    assert not (kept[1:] & ~kept[:-1]).any()
    assert (N - kept.sum(-1)).tolist() == [asked(s) for s in RAMP[1:]]
    assert (flat(ours.raw)[1:][~kept[1:]] == 0).all()
    assert (traces(ours)[1:][~kept[1:]] == 0).all()
    assert (traces(ours)[1:][kept[1:]] != 0).all()


def test_published_zeros_return_on_leftover_momentum():
    """The momentum is not cleared, which is what tells them from strict ones."""
    inner = optax.sgd(1.0, momentum=0.9)
    ours = run("published", sparsities=np.full(STEPS + 1, 0.25), inner=inner)
    kept = flat(ours.effective) != 0
    assert (kept[1:] & ~kept[:-1]).any()
    assert (flat(ours.raw)[~kept] == 0).all()
    assert (traces(ours)[~kept] != 0).all()


def kernels_only(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


def labels_by_path(params):
    """As in the guides of Flax and Optax; not of what is not a dictionary."""
    assert isinstance(params, dict)
    return {"a": {"kernel": "adam", "bias": "adam"}, "b": {"kernel": "sgd"}}


INNERS = {
    "chain": optax.chain(
        optax.clip_by_global_norm(3.0),
        optax.add_decayed_weights(0.1, mask=kernels_only),
        optax.sgd(optax.linear_schedule(1.0, 0.1, 5), momentum=0.9, nesterov=True),
    ),
    "adamw": optax.adamw(0.3, weight_decay=0.3),
    "masked": optax.masked(optax.adam(0.3), kernels_only),
    "masked_half": optax.chain(
        optax.masked(optax.trace(0.9), {"a": True, "b": False}), optax.scale(-0.3)
    ),
    "labels_by_path": optax.multi_transform(
        {"adam": optax.adam(0.3), "sgd": optax.sgd(0.3, momentum=0.9)}, labels_by_path
    ),
    "inject": optax.inject_hyperparams(optax.adamw)(0.3),
    "noise": optax.chain(optax.add_noise(1.0, 0.1, 0), optax.sgd(0.3, momentum=0.9)),
    "finite": optax.apply_if_finite(optax.adam(0.3), 2),
    "adafactor": optax.adafactor(0.3, min_dim_size_to_factor=3),
    "bfloat16": optax.sgd(0.3, momentum=0.9, accumulator_dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("name", INNERS)
def test_strict_removal_clears_all_that_the_inner_optimizer_knows(name):
    """Whatever noise, decay or moments ask for."""
    ours = run("strict", inner=INNERS[name])
    effective = flat(ours.effective)
    assert zeros(effective).tolist() == [asked(s) for s in RAMP[1:]]
    gone = effective == 0
    assert not (gone[1:-1] & ~gone[2:]).any()
    assert (flat(ours.raw)[gone] == 0).all()
    copies = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours.state.inner_state):
        for layer in ("a", "b"):
            zero = ours.effective[layer]["kernel"] == 0
            here = f"['{layer}']['kernel']" in jax.tree_util.keystr(path)
            if here and leaf.shape == zero.shape:
                copies += 1
                assert (np.asarray(leaf, np.float32)[zero] == 0).all()
                assert (np.asarray(leaf, np.float32)[-1] != 0).any()
    expected = dict.fromkeys(("adamw", "inject", "finite", "masked"), 4)
    expected |= {"labels_by_path": 3, "masked_half": 1, "adafactor": 0}
    assert copies == expected.get(name, 2)


def test_strict_removal_leaves_counts_and_biases_of_the_inner_optimizer_alone():
    ours = run("strict", inner=INNERS["adamw"])
    adam = ours.state.inner_state[0]
    assert adam.count.tolist() == list(range(1, STEPS + 1))
    assert (adam.mu["a"]["bias"] != 0).all()
    assert (adam.nu["a"]["bias"] != 0).all()


def test_between_refreshes_a_strict_mask_is_fixed():
    """Kept weights may become tiny, and no other one goes for it."""
    params = filled(network(), np.arange(1, N + 1) / 8)
    pushes = np.zeros((STEPS, N))
    pushes[4] = flat(params) / RATE  # onto zero, all of them
    ours = run(
        "strict",
        params,
        filled(gradients(), pushes),
        np.full(STEPS + 1, 0.5),
        inner=optax.sgd(RATE),
        update_every=4,
    )
    gone = flat(ours.effective) == 0
    assert zeros(flat(ours.effective)).tolist() == [0] * 3 + [asked(0.5)] * 6
    assert (gone[3:] == (np.arange(N) < N // 2)).all()
    tiny = flat(ours.raw)[4][N // 2 :]
    assert ((tiny > 0) & (tiny < 1e-5)).all()


@pytest.mark.parametrize("method", ["no", "published", "ste"])
def test_between_refreshes_the_threshold_stays(method):
    ours = run(method, update_every=3)
    t = ours.state.thresholds["a"]["kernel"]
    assert t[0] == t[1] == -1
    assert t[2] == t[3] > 0
    assert t[4] not in (t[3], t[5])  # the ramp ends
    assert t[5] == t[6] == t[7] > 0
    for i in range(2, STEPS):
        below = abs(flat(ours.raw)[i]) <= t[i]
        assert (below == (flat(ours.effective)[i] == 0)).all()


def test_a_threshold_of_exactly_zero_still_holds_strict_zeros():
    """(n - 1) s is whole: at the second refresh the last weight to go is a zero."""
    train = jax.jit(
        functools.partial(simulate, METHODS["strict"](recording(SGD), 11 / 55))
    )
    ours = jax.device_get(train(network(), gradients(scale=100.0)))
    gone = flat(ours.effective) == 0
    assert (gone[1:] == gone[:1]).all()
    assert gone[0].sum() == asked(11 / 55)
    assert (flat(ours.reached)[1:][gone[:-1]] == 0).all()
    assert (flat(ours.reached)[1:][~gone[:-1]] != 0).all()


def test_strict_zeros_outlive_a_sparsity_that_falls():
    sparsities = [0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.01, 0.25, 0.75, 0.75]
    ours = run("strict", sparsities=sparsities)
    gone = flat(ours.effective) == 0
    assert (gone == gone[0]).all()
    assert gone[0].sum() == asked(0.75)


def test_a_sparsity_that_falls_back_to_zero_gives_all_weights_back():
    """Raw weights kept their value."""
    ours = run("no", sparsities=[0, 0, 0.5, 0.5, 0.5, 0, 0, 0, 0.5, 0.5])
    counts = zeros(flat(ours.effective)).tolist()
    assert counts == [0, 28, 28, 28, 0, 0, 0, 28, 28]


# Gradients


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_exactly_those_of_the_method(method):
    """All come through what the model sees; the optimizer gets those it should."""
    ours, grads = run(method), flat(gradients())
    assert (flat(ours.passed) == grads).all()
    for i in range(STEPS):
        gone = flat(ours.seen)[i] == 0
        reached = flat(ours.reached)[i]
        assert (reached[~gone] == grads[i][~gone]).all()
        expected = grads[i][gone] if method == "ste" else 0
        assert (reached[gone] == expected).all()
    for tree in (ours.passed, ours.reached):
        np.testing.assert_array_equal(tree["a"]["bias"], gradients()["a"]["bias"])


def norm():
    """Keeps the global norm of what comes in, as clipping would see it."""

    def update(updates, state, params=None):
        return updates, {"norm": optax.tree.norm(updates)}

    return optax.GradientTransformation(lambda params: {"norm": jnp.zeros([])}, update)


SEES_NORM = optax.chain(norm(), optax.clip_by_global_norm(1.0), SGD)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_sees_only_the_gradients_of_kept_weights(method):
    ours, grads = run(method, inner=SEES_NORM), flat(gradients())
    bias = float(jnp.square(gradients()["a"]["bias"][0]).sum())
    for i, seen in enumerate(ours.state.inner_state[0]["norm"]):
        kept = (flat(ours.seen)[i] != 0) | (method == "ste")
        expected = np.sqrt(np.square(grads[i][kept]).sum() + bias)
        np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_after_the_freeze_zeros_receive_no_gradient_and_no_update(method):
    ours = run(method, freeze_step=6)
    raw, gone = flat(ours.raw), flat(ours.raw)[5] == 0
    assert gone.sum() == asked(0.75)
    assert ours.state.frozen.tolist() == [False] * 5 + [True] * 4
    assert (ours.state.thresholds["a"]["kernel"][5:] < 1e-40).all()
    assert (flat(ours.effective)[5:] == raw[5:]).all()
    for i in range(6, STEPS):
        assert ((raw[i] == 0) == gone).all()
        assert (raw[i][~gone] != raw[i - 1][~gone]).all()
        assert (flat(ours.passed)[i] == flat(gradients())[i]).all()
        assert ((flat(ours.reached)[i] != 0) == ~gone).all()


@pytest.mark.parametrize(
    ("method", "update_every"), [("no", 20), ("strict", 20), ("strict", 1)]
)
def test_freezing_removes_what_the_same_step_asks_to_go(method, update_every):
    sparsities = [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    ours = run(method, sparsities=sparsities, freeze_step=3, update_every=update_every)
    for i in range(2, STEPS):
        assert zeros(flat(ours.raw))[i] == zeros(flat(ours.effective))[i] == asked(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_hard_freeze_changes_nothing_that_the_model_sees(method):
    """And one that comes later would change nothing again."""
    frozen = run(method, freeze_step=6)
    twin = run(method)
    assert (flat(frozen.raw)[5] == flat(twin.effective)[5]).all()
    last = jax.tree.map(lambda x: x[-1], (frozen.raw, frozen.state))
    once = st3jax.finalize(*last)
    twice = st3jax.finalize(once, last[1])
    assert (flat(once) == flat(last[0])).all()
    assert (flat(twice) == flat(once)).all()
    before = jax.tree.map(lambda x: x[4], (frozen.raw, frozen.state))
    once = st3jax.finalize(*before)
    assert (flat(st3jax.finalize(once, before[1])) == flat(once)).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_st3_without_straight_through_trains_kept_weights_only(soft, rescale):
    tx = st3jax.st3(
        recording(SGD),
        st3jax.polynomial_ramp(0.75, 1, 5),
        soft=soft,
        rescale=rescale,
        straight_through=False,
        freeze_step=7,
    )
    ours = jax.device_get(
        jax.jit(functools.partial(simulate, tx))(network(), gradients())
    )
    kept, grads = flat(ours.seen) != 0, flat(gradients())
    assert (flat(ours.passed) == grads).all()
    assert (flat(ours.reached) == np.where(kept, grads, 0)).all()
    assert zeros(flat(ours.effective))[4:].tolist() == [asked(0.75)] * 5
    shrunk = abs(flat(ours.seen)[5]) < abs(flat(ours.raw)[4])
    assert (shrunk & kept[5]).any() == (soft and not rescale) or rescale


# Patterns


def in_groups(weights):
    """The kernels in groups of four along their input axis, the groups last."""
    for layer in ("a", "b"):
        w = np.asarray(weights[layer]["kernel"])
        w = w.reshape(*w.shape[:-2], -1, 4, w.shape[-1])
        yield np.moveaxis(w, -2, -1)


def in_blocks(weights):
    """The kernels in blocks of two by one."""
    for layer in ("a", "b"):
        w = np.asarray(weights[layer]["kernel"])
        w = w.reshape(*w.shape[:-2], -1, 2, w.shape[-1])
        yield np.moveaxis(w, -2, -1)


NM_RAMP = np.minimum(RAMP, 0.5)
PATTERNS = {
    "2:4": ({"pattern": "2:4"}, NM_RAMP),
    "block": ({"pattern": (2, 1)}, RAMP),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold_in_zeros_and_in_gradients(method, pattern):
    options, ramp = PATTERNS[pattern]
    ours = run(method, sparsities=ramp, **options)
    parts = in_groups if pattern == "2:4" else in_blocks
    for w in parts(ours.effective):
        dead = (w[-1] == 0).sum(-1)
        assert set(dead.ravel()) <= ({2} if pattern == "2:4" else {0, 2})
    if pattern == "block":
        dead = sum((w == 0).all(-1).sum((-1, -2)) for w in in_blocks(ours.effective))
        assert dead.tolist() == [asked(s, N // 2) for s in ramp[1:]]
    gone, grads = flat(ours.seen) == 0, flat(gradients())
    assert gone[-1].sum() >= N // 2
    assert (flat(ours.passed) == grads).all()
    reached = grads if method == "ste" else np.where(gone, 0, grads)
    assert (flat(ours.reached) == reached).all()
    if method == "strict":
        gone = flat(ours.effective) == 0
        assert not (gone[:-1] & ~gone[1:]).any()
        assert (flat(ours.raw)[gone] == 0).all()
        assert (traces(ours)[gone] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_between_refreshes_a_strict_pattern_is_fixed(pattern):
    options, ramp = PATTERNS[pattern]
    ours = run("strict", sparsities=ramp, update_every=2, **options)
    gone = flat(ours.effective) == 0
    assert gone[1].any()
    end = int((ramp < ramp[-1]).sum())
    for i in range(2, STEPS, 2):
        assert (gone[i] == gone[i - 1]).all() == (i + 1 != end)


# Dtypes and containers


DTYPES = [
    ("no", jnp.bfloat16),
    ("strict", jnp.bfloat16),
    ("strict", jnp.float16),
    ("strict", jnp.float64),
]


@pytest.mark.parametrize(("method", "dtype"), DTYPES)
def test_every_dtype_is_pruned_exactly(method, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, grads = network(dtype=dtype), gradients(dtype=dtype)
        ours = run(method, params, grads, freeze_step=7)
        effective = flat(ours.effective)
        assert effective.dtype == dtype
        assert traces(ours).dtype == dtype
        for i in range(6):
            size = np.sort(abs(flat(ours.raw)[i].astype(np.float64)))
            least = asked(RAMP[i + 1])
            if method in ("no", "ste") and least:
                assert zeros(effective)[i] == (size <= size[least - 1]).sum()
            assert zeros(effective)[i] >= least
            assert zeros(effective)[i] <= least + 4  # ties of few digits
        assert (flat(ours.raw)[6:] == effective[6:]).all()
        assert (zeros(effective)[6:] == zeros(effective)[6]).all()
        assert (flat(ours.passed) == flat(grads)).all()
        reached = np.where(flat(ours.seen) == 0, 0, flat(grads))
        assert (flat(ours.reached) == reached).all()


def test_strict_zeros_train_in_the_boxes_of_linen():
    params = network()
    boxed = jax.tree.map(lambda w: nn.Partitioned(w, (None,) * w.ndim), params)
    tx = METHODS["strict"](recording(SGD), 0.5, freeze_step=4)
    train = jax.jit(functools.partial(simulate, tx))
    plain = train(params, gradients())
    box = train(
        boxed,
        jax.tree.map(lambda g: nn.Partitioned(g, (None,) * (g.ndim - 1)), gradients()),
    )
    assert zeros(flat(nn.unbox(box.raw)))[-1] == asked(0.5)
    np.testing.assert_array_equal(flat(nn.unbox(box.raw)), flat(plain.raw))


def test_a_schedule_for_each_path_is_strict_for_each():
    ramp = st3jax.polynomial_ramp(0.75, 1, 5)
    tx = METHODS["strict"](recording(SGD), {"a/*": ramp, "b/*": 0.0})
    ours = jax.device_get(
        jax.jit(functools.partial(simulate, tx))(network(), gradients())
    )
    gone = flat(ours.effective) == 0
    assert gone[-1][:32].sum() == asked(0.75, 32)
    assert not gone[:, 32:].any()
    assert not (gone[:-1] & ~gone[1:]).any()


# Bad use


def test_sticky_is_one_of_three():
    with pytest.raises(ValueError, match="sticky is one of 'no', 'strict', 'publ"):
        st3jax.gmp(SGD, 0.5, sticky=True)


@pytest.mark.parametrize("method", METHODS)
def test_bad_use_says_what_is_wrong(method):
    make = METHODS[method]
    with pytest.raises(TypeError, match="the optimizer to wrap"):
        make(0.1, 0.5)
    with pytest.raises(ValueError, match="sparsity is a fraction"):
        make(SGD, 90)
    with pytest.raises(ValueError, match="update_every is a number of steps, 1 or"):
        make(SGD, 0.5, update_every=0)
    with pytest.raises(ValueError, match="before the ramp is over"):
        make(SGD, st3jax.polynomial_ramp(0.5, 0, 9), freeze_step=5)
    tx = make(SGD, 0.5)
    with pytest.raises(ValueError, match="update needs them"):
        tx.update(network(), tx.init(network()))
    with pytest.raises(ValueError, match="'b/kernel' is missing"):
        tx.update(network(), tx.init(network()), {"a": network()["a"]})
