"""ProbMask: the projection, the relaxed mask, its gradients, and training with it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import (
    assert_close,
    assert_identical,
    loss_fn,
    make_batch,
    make_step,
    network,
    pick,
    recording,
    seen_by_inner,
    stack,
    trajectory,
)

import st3jax
import st3jax.nnx
from st3jax.engine.seeds import key_of, numbers_for
from st3jax.methods.probmask import projection
from st3jax.methods.probmask.probmask import ProbMaskState, probmask
from st3jax.methods.probmask.projection import project
from st3jax.methods.probmask.relaxed_mask import relaxed_mask

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SPARSITY = 0.8
BEGIN, END, FREEZE = 2, 6, 8
RAMP = st3jax.polynomial_ramp(SPARSITY, BEGIN, END)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
DECAYED = optax.chain(optax.add_decayed_weights(0.1), MOMENTUM)
KEY = jax.random.key(7)
N = 256


def make(inner=MOMENTUM, sparsity=RAMP, key=KEY, freeze_step=FREEZE, **options):
    return probmask(inner, sparsity, key=key, freeze_step=freeze_step, **options)


@functools.cache
def usual():
    tx = make(DECAYED)
    return tx, jax.jit(make_step(tx))


@functools.cache
def usual_run(seed=0):
    tx, step = usual()
    return jax.device_get(list(trajectory(tx, network(seed), FREEZE + 4, step)))


def kernels(tree):
    return [tree[layer]["kernel"] for layer in ("first", "second")]


def flat(tree):
    return np.concatenate([np.ravel(w) for w in kernels(tree)], dtype=np.float64)


def zeros(params):
    return int((flat(params) == 0).sum())


def asked(n, sparsity=SPARSITY):
    return math.floor(sparsity * (n - 1)) + 1


def ramp_at(step):
    left = min(max(END - step, 0), END - BEGIN) / (END - BEGIN)
    return SPARSITY * (1 - left**3)


seen_by_model = jax.jit(st3jax.sparsify)


def mask_of(opt_state, count=None):
    """The masks of a step, as the model sees them: the weights 1 are multiplied."""
    if count is not None:
        opt_state = opt_state._replace(count=jnp.int32(count))
    ones = jax.tree.map(jnp.ones_like, network())
    return flat(seen_by_model(ones, opt_state))


# The projection

SIZE = 40
numbers = st.floats(-0.5, 2.0, width=32, allow_subnormal=False) | st.sampled_from(
    [0.0, 1.0, 0.25]
)
arrays = hnp.arrays(np.float32, SIZE, elements=numbers)
projected = jax.jit(project)


def total(p):
    return sum(np.asarray(x, np.float64).sum() for x in jax.tree.leaves(p))


def as_tree(p):
    return {"a": p[:10].reshape(2, 5), "b": (p[10:],)}


def test_the_projection_of_an_example_by_hand():
    p = project({"a": jnp.array([0.9, -0.2]), "b": jnp.array([[1.5], [0.4]])}, 1.5)
    # v = 0.15: 0.75 + 0 + 1 + 0.25 = 2; v = 0.4: 0.5 + 0 + 1 + 0 = 1.5
    assert_close(p, {"a": jnp.array([0.5, 0.0]), "b": jnp.array([[1.0], [0.0]])})


@settings(max_examples=100, deadline=None)
@given(arrays, st.floats(0, SIZE))
@example(np.ones(SIZE, np.float32), SIZE)
@example(np.full(SIZE, 2, np.float32), 0.0)
@example(np.full(SIZE, -0.5, np.float32), 0.0)
def test_the_projection_meets_its_budget_and_moves_only_what_exceeds_it(p, budget):
    before = np.clip(p, 0, 1)
    tree = jax.device_get(projected(as_tree(p), budget))
    assert jax.tree.structure(tree) == jax.tree.structure(as_tree(p))
    after = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert after.dtype == np.float32
    assert after.min() >= 0
    assert after.max() <= 1
    assert total(tree) <= budget + 1e-6 * SIZE
    if total(before) > budget:
        assert abs(total(tree) - budget) <= 1e-6 * SIZE
    if total(before) <= budget:
        np.testing.assert_array_equal(after, before)
    assert_close(jax.device_get(projected(tree, budget)), tree, rtol=0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(arrays, st.floats(0, SIZE))
def test_the_projection_shifts_all_that_stays_inside_by_one_number(p, budget):
    """The optimality conditions of the nearest point."""
    after = np.asarray(jax.device_get(projected(jnp.asarray(p), budget)))
    order = np.argsort(p, kind="stable")
    assert (np.diff(after[order]) >= 0).all()
    inside = (after > 0) & (after < 1)
    if inside.any():
        v = float(np.median(p[inside] - after[inside]))
        assert v >= -1e-6
        np.testing.assert_allclose(p[inside] - after[inside], v, atol=1e-6)
        assert (p[after == 0] <= v + 1e-6).all()
        assert (p[after == 1] >= 1 + v - 1e-6).all()


@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_the_projection_of_a_million_is_exact_to_a_millionth(largest):
    p = jax.random.uniform(KEY, (1 << 20,)) * largest
    for share in (0.999, 0.3, 0.001):
        after = projected(p, share * p.size)
        assert after.dtype == jnp.float32
        expected = min(share, total(jnp.clip(p, 0, 1)) / p.size)
        assert abs(total(after) / p.size - expected) < 1e-6


def test_the_projection_moves_nothing_within_its_tolerance():
    p = jnp.full(1000, 0.5)
    assert_identical(projected(p, 500 - 0.8e-4), p)
    assert (projected(p, 500 - 1.2e-4) < 0.5).all()


def test_the_projection_ends_and_tells_of_what_is_not_a_number():
    after = projected(jnp.array([0.5, jnp.nan, 0.75]), 0.5)
    assert jnp.isnan(after).any()


def test_the_projection_works_under_vmap_and_in_64_bits():
    p = jax.random.uniform(KEY, (3, 50)) * 1.5
    budgets = jnp.array([5.0, 60.0, 20.0])
    together = jax.vmap(project)(p, budgets)
    for one, row, budget in zip(together, p, budgets, strict=True):
        assert_close(one, project(row, budget), rtol=0, atol=1e-6)
    with jax.enable_x64(True):
        wide = project(jnp.linspace(0, 1, 50), 5.0)
        assert wide.dtype == jnp.float64
        assert abs(float(wide.sum()) - 5.0) <= 1e-6 * 50


# The relaxed mask


@pytest.mark.parametrize("temperature", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_a_mask_is_above_one_half_as_often_as_the_probability_says(p, temperature):
    n = 200_000
    u0, u1 = jax.random.uniform(jax.random.key(round(100 * p)), (2, n))
    m = np.asarray(relaxed_mask(jnp.full(n, p), u0, u1, temperature), np.float64)
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs((m > 0.5).mean() - p) <= 4 * deviation
    if temperature == 30:
        assert abs(m.mean() - p) <= 0.01


def test_the_mean_of_a_soft_mask_is_the_one_of_its_distribution():
    """At T = 1 and p = 0.1, by numerical integration over the logistic noise."""
    q = (np.arange(100_000) + 0.5) / 100_000
    expected = (1 / (1 + np.exp(-(np.log(0.1 / 0.9) + np.log(q / (1 - q)))))).mean()
    u0, u1 = jax.random.uniform(KEY, (2, 200_000))
    m = relaxed_mask(jnp.full(200_000, 0.1), u0, u1, 1.0)
    assert expected == pytest.approx(0.184, abs=1e-3)
    assert float(m.mean()) == pytest.approx(expected, abs=4 * float(m.std()) / 447)


uniforms = st.sampled_from([0.0, 2.0**-23, 1 - 2.0**-24, 0.5]) | st.floats(
    0, 1 - 2.0**-24, width=32
)
probabilities = st.sampled_from([0.0, 1e-30, 1 - 2.0**-24, 1.0]) | st.floats(
    0, 1, width=32, allow_subnormal=False
)


mask_and_slope = jax.jit(jax.value_and_grad(relaxed_mask))


def state_of(p, temperature=1.0, count=3):
    """A state with one leaf, before the mask is fixed."""
    tx = probmask(optax.sgd(1.0), 0.5, key=KEY, freeze_step=100)
    state = tx.init({"kernel": jnp.zeros(p.shape)})
    return tx, state._replace(
        probabilities={"kernel": p},
        temperature=jnp.float32(temperature),
        count=jnp.int32(count),
    )


@settings(max_examples=100, deadline=None)
@given(probabilities, uniforms, uniforms, st.sampled_from([1.0, 2.0, 33.0]))
@example(0.0, 0.0, 0.0, 1.0)
@example(1.0, 0.0, 1 - 2.0**-24, 1.0)
@example(1.0, 1 - 2.0**-24, 0.0, 1.0)
def test_masks_and_their_gradients_are_finite_at_every_edge(p, u0, u1, temperature):
    args = [jnp.float32(x) for x in (p, u0, u1, temperature)]
    m, slope = mask_and_slope(*args)
    assert 0 <= m <= 1
    assert jnp.isfinite(slope)
    if p == 1:
        assert m == 1
        assert slope == 0


def learned_slope(p, temperature=1.0, g=1.0, w=1.0):
    """What the optimizer of the probabilities receives, where g and w are given."""
    spy = optax.GradientTransformation(
        lambda p: p, lambda updates, state, params=None: (updates, updates)
    )
    tx = probmask(
        optax.sgd(1.0),
        0.5,
        key=KEY,
        freeze_step=100,
        probability_optimizer=spy,
    )
    _, state = state_of(p, temperature)
    state = state._replace(probability_state=state.probabilities)
    g, w = jnp.broadcast_to(g, p.shape), jnp.broadcast_to(w, p.shape)
    _, state = jax.jit(tx.update)({"kernel": g}, state, {"kernel": w})
    return state.probability_state["kernel"]


@pytest.mark.parametrize("temperature", [1.0, 2.4, 30.0])
def test_the_gradient_of_probabilities_is_that_of_the_relaxed_weights(temperature):
    p = jnp.geomspace(1e-3, 0.5, 100)
    p = jnp.concatenate([p, 1 - p])[None]
    g, w = jax.random.normal(KEY, (2, 1, p.size))
    _, state = state_of(p, temperature)
    u0, u1 = numbers_for(key_of(state.seed, 3), {"kernel": p}, 2)["kernel"]

    def linear(p):
        return (g * relaxed_mask(p, u0, u1, temperature) * w).sum()

    expected = np.asarray(jax.grad(linear)(p))
    assert (expected != 0).sum() > 30
    found = learned_slope(p, temperature, g, w)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_certain_weights_have_no_gradient_and_no_slope_is_infinite(temperature):
    slope = learned_slope(jnp.array([[1.0] * 50, [0.0] * 50]), temperature)
    np.testing.assert_array_equal(slope[0], 0)
    assert jnp.isfinite(slope).all()


def test_the_gradient_of_weights_is_multiplied_by_the_mask_that_the_model_saw():
    p = jax.random.uniform(KEY, (6, 5))
    tx, state = state_of(p)
    w = jax.random.normal(jax.random.key(1), p.shape)
    g = jax.random.normal(jax.random.key(2), p.shape)
    seen, pull = jax.vjp(lambda w: st3jax.sparsify({"kernel": w}, state)["kernel"], w)
    np.testing.assert_array_equal(pull(g)[0], g)
    updates, _ = jax.jit(tx.update)({"kernel": g}, state, {"kernel": w})
    np.testing.assert_allclose(updates["kernel"], -g * seen / w, rtol=1e-5)


def test_what_the_model_sees_is_the_relaxed_mask_times_the_weights():
    p = jax.random.uniform(KEY, (1, 300))
    _, state = state_of(p, 5.0)
    w = jax.random.normal(jax.random.key(1), p.shape)
    m = st3jax.sparsify({"kernel": jnp.ones((1, 300))}, state)["kernel"]
    seen = st3jax.sparsify({"kernel": w}, state)["kernel"]
    np.testing.assert_allclose(seen, m * w, rtol=1e-6)
    assert ((m > 0) & (m < 1)).sum() > 150
    assert jnp.corrcoef(m[0], p[0])[0, 1] > 0.5


# Randomness


def halfway(key=KEY):
    tx = make(key=key)
    opt_state = tx.init(network())
    half = jax.tree.map(lambda p: jnp.full_like(p, 0.5), opt_state.probabilities)
    return opt_state._replace(probabilities=half)


def test_the_same_key_draws_the_same_masks_and_another_key_draws_others():
    raw = jax.random.key_data(KEY)
    assert_identical(mask_of(halfway()), mask_of(halfway(KEY)))
    assert_identical(mask_of(halfway()), mask_of(halfway(raw)))
    assert_identical(mask_of(halfway()), mask_of(halfway(np.asarray(raw))))
    other = mask_of(halfway(jax.random.key(8)))
    assert abs(np.corrcoef(mask_of(halfway()), other)[0, 1]) < 0.3


def test_steps_and_layers_draw_independently():
    steps = [mask_of(halfway(), count) for count in range(4)]
    halves = [half for mask in steps for half in np.split(mask, 2)]
    others = np.corrcoef(halves) - np.eye(8)
    assert np.abs(others).max() < 0.4


def place(tree, mesh):
    placed = NamedSharding(mesh, P("rows", "columns"))
    return jax.tree.map(lambda w: jax.device_put(w, placed) if w.ndim == 2 else w, tree)


def test_sharded_probabilities_draw_the_same_masks():
    draw = jax.jit(lambda params, state: kernels(st3jax.sparsify(params, state)))
    alone = jax.device_get(draw(network(), halfway()))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            params, state = place((network(), halfway()), mesh)
            ours = jax.device_get(draw(params, state))
            assert_close(ours, alone, rtol=1e-6, atol=1e-7)


def test_the_probabilities_of_sharded_weights_are_sharded_like_them():
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    placed = NamedSharding(mesh, P("rows", "columns"))
    params = {"kernel": jax.device_put(jnp.ones((8, 8)), placed)}
    state = make().init(params)
    for p in (state.probabilities, state.probability_state[0].mu):
        assert p["kernel"].sharding.is_equivalent_to(placed, 2)


# Training


def test_before_the_ramp_training_is_dense_training():
    ramp = st3jax.polynomial_ramp(SPARSITY, 6, 8)
    tx = make(DECAYED, ramp, freeze_step=10)
    grad = jax.jit(jax.grad(loss_fn))
    ours, dense = jax.jit(tx.update), jax.jit(DECAYED.update)
    params, opt_state = network(), tx.init(network())
    dense_state = DECAYED.init(params)
    for i in range(6):
        assert_identical(seen_by_model(params, opt_state), params)
        assert (flat(opt_state.probabilities) == 1).all()
        grads = grad(params, make_batch(i))
        updates, opt_state = ours(grads, opt_state, params)
        expected, dense_state = dense(grads, dense_state, params)
        assert_close(updates, expected, rtol=1e-6, atol=1e-7)
        params = optax.apply_updates(params, updates)
    assert_identical(
        st3jax.sparsify(network(dtype=jnp.bfloat16), opt_state),
        network(dtype=jnp.bfloat16),
    )


def test_weights_are_seen_as_they_are_also_at_low_temperature_and_if_tiny():
    tx, params = make(temperature=0.01), network()
    tiny = jax.tree.map(
        lambda w: jnp.asarray(np.asarray(w) * np.float32(1e-42)), params
    )
    assert np.count_nonzero(np.asarray(tiny["first"]["kernel"])) > 100
    for weights in (params, tiny):
        assert_identical(seen_by_model(weights, tx.init(weights)), weights)


def test_the_probabilities_follow_the_ramp():
    for i, (_, opt_state) in enumerate(usual_run()[:FREEZE]):
        p = flat(opt_state.probabilities)
        budget = N * (1 - ramp_at(i + 1))
        assert p.min() >= 0
        assert p.max() <= 1
        assert 0.95 * budget <= p.sum() <= budget + 1e-6 * N
    assert p.std() > 1e-3
    assert_identical(usual_run()[-1][1].probabilities, opt_state.probabilities)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, SPARSITY, 1.0])
def test_the_largest_probabilities_stay_in_exact_number(sparsity):
    run = list(trajectory(make(sparsity=sparsity), network(), FREEZE + 1))
    before, at = run[FREEZE - 2], run[FREEZE - 1]
    expected = asked(N, sparsity) if sparsity else 0
    assert zeros(before[0]) == 0
    assert zeros(at[0]) == expected
    assert_identical(st3jax.finalize(*at), at[0])
    p, gone = flat(at[1].probabilities), flat(at[0]) == 0
    if 0 < sparsity < 1:
        assert p[gone].max() < p[~gone].min()


def fixed(p, draw="largest", sparsity=0.5, params=None):
    """Weights after the step that fixes the mask, from given probabilities."""
    tx = probmask(
        optax.sgd(0.0),
        sparsity,
        key=KEY,
        freeze_step=9,
        draw=draw,
        temperature=1.0,
        probability_optimizer=optax.set_to_zero(),
    )
    params = {"kernel": jnp.ones(p.shape)} if params is None else params
    state = tx.init(params)._replace(
        count=jnp.int32(8), probabilities={"kernel": jnp.asarray(p, jnp.float32)}
    )
    updates, state = jax.jit(tx.update)(params, state, params)
    assert state.frozen
    return np.asarray(optax.apply_updates(params, updates)["kernel"])


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        ([[0.9, 0.1, 0.2, 0.8]], [[1, 0, 0, 1]]),
        ([[0.5, 0.5, 0.5, 0.1]], [[0, 0, 0, 0]]),  # ties go together
        ([[0.0, 0.0, 0.0, 0.3]], [[0, 0, 0, 1]]),  # and so do impossible weights
        ([[1.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]]),
    ],
)
def test_ties_go_and_certain_weights_stay(p, kept):
    np.testing.assert_array_equal(fixed(jnp.array(p)), kept)


def test_a_sparsity_of_zero_removes_nothing_however_improbable():
    np.testing.assert_array_equal(fixed(jnp.array([[0.5, 0.0]]), sparsity=0.0), 1)


def test_more_certain_weights_than_the_count_allows_all_stay(monkeypatch):
    """The sum may exceed its budget by a rounding error: not all may go for that."""
    monkeypatch.setattr(projection, "TOLERANCE", 0.1)
    np.testing.assert_array_equal(
        fixed(jnp.array([[1.0, 1, 1, 0, 0]])), [[1, 1, 1, 0, 0]]
    )


def test_bernoulli_draws_each_weight_with_its_probability():
    n = 20_000
    p = jnp.concatenate([jnp.full(n, 0.3), jnp.full(n, 0.6), jnp.zeros(n), jnp.ones(n)])
    kept = fixed(p[None], "bernoulli").reshape(4, n).sum(1)
    for count, share in zip(kept, (0.3, 0.6), strict=False):
        assert abs(count - share * n) <= 4 * math.sqrt(share * (1 - share) * n)
    np.testing.assert_array_equal(kept[2:], [0, n])


def test_bernoulli_ends_near_the_asked_sparsity():
    run = list(trajectory(make(draw="bernoulli"), network(), FREEZE + 2))
    p = flat(run[FREEZE - 1][1].probabilities)
    count = zeros(run[FREEZE - 1][0])
    assert abs(count - (1 - p).sum()) <= 4 * math.sqrt((p * (1 - p)).sum())
    assert zeros(run[-1][0]) == count


def test_a_kept_weight_of_zero_becomes_as_small_as_a_weight_can_be():
    params = {"kernel": jnp.array([[0.0, -0.0, 0.0, 3.0]])}
    w = fixed(np.array([[0.9, 0.8, 0.2, 0.1]]), params=params)
    assert (w[0, :2] != 0).all()
    assert np.abs(w[0, :2]).max() < 1e-30
    np.testing.assert_array_equal(w[0, 2:], 0)


def test_fixing_takes_the_weights_to_the_mask_times_themselves():
    params, _ = usual_run()[FREEZE - 1]
    before, opt_state = usual_run()[FREEZE - 2]
    later = probmask(DECAYED, RAMP, key=KEY, freeze_step=FREEZE + 50)
    twin, _ = jax.jit(make_step(later))(before, opt_state, make_batch(FREEZE - 1))
    kept = flat(params) != 0
    np.testing.assert_allclose(flat(params)[kept], flat(twin)[kept], rtol=1e-5)
    assert (flat(twin)[~kept] != 0).all()


def test_after_fixing_zeros_stay_and_other_weights_train_on():
    """With momentum and weight decay, and nothing that the optimizer still learns."""
    at, state = usual_run()[FREEZE - 1]
    gone = flat(at) == 0
    assert gone.sum() == asked(N)
    for params, opt_state in usual_run()[FREEZE:]:
        np.testing.assert_array_equal(flat(params) == 0, gone)
        assert_identical(jax.device_get(st3jax.finalize(params, opt_state)), params)
        assert_identical(opt_state.probability_state, state.probability_state)
    assert (flat(params) != flat(at)).sum() == N - asked(N)


def test_the_optimizer_sees_no_gradient_of_zeros_only_after_fixing():
    tx = make(recording(DECAYED))
    update = jax.jit(tx.update)
    gone = flat(usual_run()[FREEZE - 1][0]) == 0
    for completed in (FREEZE - 1, FREEZE):
        params, opt_state = usual_run()[completed - 1]
        recorded = tx.init(network()).inner_state
        recorded = recorded._replace(inner_state=opt_state.inner_state)
        grads = network(1)
        assert (flat(grads) != 0).all()
        _, state = update(grads, opt_state._replace(inner_state=recorded), params)
        reached = flat(seen_by_inner(state))
        assert (reached[~gone] != 0).sum() > 20
        assert (reached[gone] != 0).any() == (completed < FREEZE)


def test_a_kept_weight_that_is_sent_onto_zero_stays_kept():
    tx = make(optax.sgd(1.0))
    update = jax.jit(tx.update)
    params, opt_state = usual_run()[FREEZE - 1]
    opt_state = opt_state._replace(inner_state=tx.init(params).inner_state)
    for _ in range(3):
        updates, opt_state = update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert zeros(params) == asked(N)


def test_the_default_temperature_is_the_published_one():
    for i, (_, opt_state) in enumerate(usual_run()):
        passed = min((i + 1) / FREEZE, 1)
        expected = 1 / (0.97 * (1 - passed) + 0.03)
        assert float(opt_state.temperature) == pytest.approx(expected, rel=1e-6)
    assert float(usual()[0].init(network()).temperature) == 1


def test_a_temperature_is_a_number_or_a_schedule_of_completed_steps():
    def schedule(count):
        return 2.0 + count

    tx = make(temperature=schedule)
    assert float(tx.init(network()).temperature) == 2
    for i, (_, opt_state) in enumerate(trajectory(tx, network(), 3)):
        assert float(opt_state.temperature) == 3 + i
    assert float(make(temperature=4).init(network()).temperature) == 4


def test_training_goes_on_to_lower_losses_while_weights_go():
    ramp = st3jax.polynomial_ramp(0.5, 10, 60)
    tx = make(optax.sgd(0.05, momentum=0.9), ramp, freeze_step=100)
    step, batch = jax.jit(make_step(tx)), make_batch()
    params, opt_state = network(), tx.init(network())
    for _ in range(140):
        params, opt_state = step(params, opt_state, batch)
    assert zeros(params) == asked(N, 0.5)
    assert loss_fn(params, batch) < 0.6 * loss_fn(network(), batch)


# Clipping


def test_weights_and_probabilities_are_clipped_together():
    """As one tree of both, before both optimizers."""
    record = optax.sgd(1.0, momentum=0.0)
    plain = make(record, 0.5, probability_optimizer=record)
    joint = make(record, 0.5, probability_optimizer=record, clip_norm=0.1)
    params, start = network(), plain.init(network())
    half = jax.tree.map(lambda p: jnp.full_like(p, 0.5), start.probabilities)
    start = start._replace(probabilities=half, count=jnp.int32(3))
    grads = network(1)
    free, free_state = jax.jit(plain.update)(grads, start, params)
    ours, our_state = jax.jit(joint.update)(grads, start, params)
    trace = (free_state.inner_state[0].trace, free_state.probability_state[0].trace)
    clip = optax.clip_by_global_norm(0.1)
    expected, _ = clip.update(trace, clip.init(trace))
    found = (our_state.inner_state[0].trace, our_state.probability_state[0].trace)
    assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert float(optax.tree.norm(found)) == pytest.approx(0.1, rel=1e-5)
    assert float(optax.tree.norm(found[1])) > 0.01
    assert float(optax.tree.norm(ours["first"]["bias"])) == pytest.approx(0.0)
    del free


def test_gradients_within_the_norm_are_not_touched_and_later_ones_clipped_too():
    far = make(DECAYED, clip_norm=1e6)
    assert_identical(
        jax.device_get(list(trajectory(far, network(), FREEZE + 4))), usual_run()
    )
    tx = make(optax.sgd(1.0), clip_norm=1e-3)
    params, opt_state = usual_run()[FREEZE]
    opt_state = opt_state._replace(inner_state=tx.init(params).inner_state)
    updates, _ = jax.jit(tx.update)(params, opt_state, params)
    assert float(optax.tree.norm(updates)) == pytest.approx(1e-3, rel=1e-3)


# Composition


def test_shard_map_with_replicated_weights_equals_one_device():
    tx, _ = usual()
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))

    def mean_loss(weights, batch):
        return jax.lax.pmean(loss_fn(weights, batch), "devices")

    step = jax.jit(
        jax.shard_map(
            make_step(tx, loss_fn=mean_loss),
            mesh=mesh,
            in_specs=(P(), P(), P("devices")),
            out_specs=P(),
        )
    )
    run = trajectory(tx, network(), 4, step)
    for ours, alone in zip(run, usual_run(), strict=False):
        assert_close(jax.device_get(ours), alone, rtol=1e-3, atol=1e-4)


def test_an_ensemble_over_devices_trains_as_each_model_does():
    tx, _ = usual()
    mesh = jax.make_mesh((2,), ("models",), axis_types=(AxisType.Auto,))

    def one(params, opt_state, batch):
        return stack(make_step(tx)(*pick((params, opt_state), 0), batch), 1)

    step = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(P("models"), P("models"), P()),
        out_specs=P("models"),
    )
    params = jax.tree.map(lambda *x: jnp.stack(x), network(0), network(1))
    opt_state, step = jax.vmap(tx.init)(params), jax.jit(step)
    for i in range(5):
        params, opt_state = step(params, opt_state, make_batch(i))
        for seed in range(2):
            ours = jax.device_get(pick((params, opt_state), seed))
            assert_close(ours, usual_run(seed)[i], rtol=1e-3, atol=1e-4)


def test_steps_of_several_batches_see_one_mask():
    tx = optax.MultiSteps(make(), 2)
    opt_state = tx.init(network())
    inner = opt_state.inner_opt_state
    half = jax.tree.map(lambda p: jnp.full_like(p, 0.5), inner.probabilities)
    opt_state = opt_state._replace(inner_opt_state=inner._replace(probabilities=half))
    params, seen = network(), [mask_of(opt_state)]
    for _ in range(2):
        updates, opt_state = jax.jit(tx.update)(network(1), opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(mask_of(opt_state))
    assert_identical(seen[0], seen[1])
    assert (seen[1] != seen[2]).mean() > 0.9


def test_wrappers_nested_in_one_another_train_to_the_exact_sparsity():
    inject = optax.inject_hyperparams(
        lambda learning_rate: make(optax.sgd(learning_rate), clip_norm=1.0)
    )
    chained = optax.chain(inject(learning_rate=0.1))
    tx = optax.MultiSteps(optax.apply_if_finite(chained, 3), 2)
    *_, (params, opt_state) = trajectory(tx, network(), 2 * FREEZE + 1)
    assert zeros(params) == asked(N)
    assert_identical(st3jax.finalize(params, opt_state), params)


def test_hyperparameters_can_be_injected():
    inject = optax.inject_hyperparams(
        probmask, static_args=("prunable", "key", "freeze_step")
    )
    tx = inject(MOMENTUM, 0.5, key=KEY, freeze_step=4, temperature=2.0, clip_norm=1.0)
    *_, (params, _) = trajectory(tx, network(), 5)
    assert zeros(params) == asked(N, 0.5)


def test_masked_leaves_the_masked_part_alone():
    tx = optax.masked(make(), {"first": True, "second": False})
    *_, (params, opt_state) = trajectory(tx, network(), FREEZE)
    weights = st3jax.finalize(params, opt_state)
    assert_identical(weights["second"], params["second"])
    p = np.sort(np.ravel(st3jax.find_state(opt_state).probabilities["first"]["kernel"]))
    expected = (p <= p[asked(128) - 1]).sum()  # equal ones, without gradient, go too
    assert (weights["first"]["kernel"] == 0).sum() == expected
    assert asked(128) <= expected <= asked(128) + 8


def test_optax_map_params_reaches_weights_moments_and_probabilities():
    tx, opt_state = make(), make().init(network())
    mapped = optax.tree.map_params(tx, lambda x: x + 1, opt_state)
    assert (flat(mapped.probabilities) == 2).all()
    assert (flat(mapped.probability_state[0].mu) == 1).all()
    assert (flat(mapped.inner_state[0].trace) == 1).all()
    assert_identical(mapped.seed, opt_state.seed)


def test_an_nnx_model_with_partitioned_weights_trains():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", "columns"))
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    x = make_batch()[0]
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def sparse_loss(model):
                return (st3jax.nnx.sparsify(model, optimizer)(x) ** 2).mean()

            optimizer.update(model, nnx.grad(sparse_loss)(model))

        for _ in range(FREEZE):
            step(model, optimizer)
        final = st3jax.nnx.finalize(model, optimizer)
    assert int((final.kernel[...] == 0).sum()) == asked(128)


@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        ("float16", False),
        ("bfloat16", True),
        ("float32", False),
        ("float32", True),
        ("float64", True),
    ],
)
def test_every_dtype_trains_in_one_compilation_with_a_state_of_one_type(dtype, x64):
    with jax.enable_x64(x64):
        tx = make(DECAYED, clip_norm=3.0)
        params, step = network(dtype=dtype), jax.jit(make_step(tx))
        shapes = jax.eval_shape(tx.init, params)
        assert shapes == jax.eval_shape(lambda state: state, tx.init(params))
        assert jax.eval_shape(jax.jit(tx.init), params) == shapes
        updates, updated = jax.eval_shape(tx.update, params, shapes, params)
        assert updated == shapes
        assert updates == jax.eval_shape(lambda params: params, params)
        assert {p.dtype for p in kernels(shapes.probabilities)} == {np.dtype("f4")}
        opt_state = jax.jit(tx.init)(params)
        for i in range(FREEZE + 2):
            params, opt_state = step(params, opt_state, make_batch(i, dtype))
            if i >= FREEZE - 1:
                assert zeros(params) == asked(N)
        assert step._cache_size() == 1
        assert np.isfinite(flat(params)).all()


def test_the_state_takes_twelve_bytes_a_weight_with_adam():
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)}
    state = jax.eval_shape(make(optax.sgd(0.1)).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert 12 * 512 * 512 <= size <= 12 * 512 * 512 + 64


def test_remat_sees_the_same_masks():
    params, opt_state = usual_run()[4]

    def sparse_loss(params):
        return loss_fn(st3jax.sparsify(params, opt_state), make_batch())

    assert_close(
        jax.jit(jax.grad(jax.checkpoint(sparse_loss)))(params),
        jax.jit(jax.grad(sparse_loss))(params),
        rtol=1e-6,
        atol=1e-7,
    )


# Bad use


LATE = st3jax.polynomial_ramp(0.5, 0, 20)
JUMP = st3jax.polynomial_ramp(0.5, 7, 8)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 90}, ValueError, "for 90 % write 0.9"),
        ({"sparsity": {"*": 0.5}}, TypeError, "one budget among all layers"),
        ({"sparsity": LATE}, ValueError, "before the ramp is over"),
        ({"sparsity": JUMP}, ValueError, "no step to learn"),
        ({"freeze_step": 1, "sparsity": 0.5}, ValueError, "2 or more, got 1"),
        ({"freeze_step": None}, TypeError, "freeze_step is a whole number"),
        ({"key": 0}, TypeError, "one random key, as jax.random.key"),
        ({"key": jax.random.split(KEY)}, TypeError, "one random key"),
        ({"key": jnp.ones(2)}, TypeError, "one random key"),
        ({"draw": "smallest"}, ValueError, "'largest', 'bernoulli'"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm is a number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature at step 0"),
        ({"temperature": lambda c: 4.0 - c}, ValueError, "temperature at step 8"),
        ({"probability_optimizer": 6e-3}, TypeError, "probability_optimizer is"),
        ({"inner": 0.1}, TypeError, "optimizer to wrap"),
        ({"prunable": "kernel"}, TypeError, "prunable is a function"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


def test_a_bad_tree_is_refused():
    tx = make()
    with pytest.raises(ValueError, match="no parameter is prunable"):
        tx.init({"bias": jnp.ones(3)})
    state = tx.init(network())
    with pytest.raises(ValueError, match=r"tx.update\(grads, opt_state, params\)"):
        tx.update(network(), state)
    other = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="do not have the structure"):
        tx.update(other, state, other)
    with pytest.raises(ValueError, match="do not have the structure"):
        st3jax.sparsify(other, state)


def test_the_state_is_found_by_its_protocol():
    state = make().init(network())
    assert isinstance(st3jax.find_state((state,)), ProbMaskState)
