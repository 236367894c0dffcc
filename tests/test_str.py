"""STR: learned thresholds, their gradients, and the sparsity that emerges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import st3jax
from st3jax.methods.str_ import STRState, str_

DECAY = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0, momentum=0.5))
MOMENTUM = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))
G = jax.random.normal(jax.random.key(1), (8, 8))


def network(dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(0), (8, 8), dtype)
    return {"kernel": w, "bias": jnp.ones(8, dtype)}


def make(inner=MOMENTUM, initial=-3200.0, **options):
    options = {"threshold_optimizer": DECAY, "initial": initial} | options
    return str_(inner, **options)


def loss_fn(weights):
    return ((weights["kernel"] - G.astype(weights["kernel"].dtype)) ** 2).sum()


def make_step(tx):
    def step(params, opt_state):
        grads = jax.grad(lambda p: loss_fn(st3jax.sparsify(p, opt_state)))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)


def train(tx, steps, dtype=jnp.float32):
    params, step = network(dtype), make_step(tx)
    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        yield params, opt_state
    assert step._cache_size() == 1


def zeros(params):
    return int((params["kernel"] == 0).sum())


def test_at_first_the_model_sees_the_weights_themselves_and_trains_densely():
    """A weight that is zero among them."""
    tx, params = make(), network()
    params["kernel"] = params["kernel"].at[0, 0].set(0)
    opt_state = tx.init(params)
    seen = st3jax.sparsify(params, opt_state)
    jax.tree.map(np.testing.assert_array_equal, seen, params)
    grads = {"kernel": G, "bias": jnp.ones(8)}
    ours, state = jax.jit(tx.update)(grads, opt_state, params)
    dense, _ = jax.jit(MOMENTUM.update)(grads, MOMENTUM.init(params), params)
    # Two programs: one may round where the other multiplies and adds at once.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, dense)
    assert float(state.thresholds["kernel"]) == pytest.approx(-3200 * 0.9)


def test_higher_thresholds_remove_more_and_only_more():
    gone = jnp.zeros((8, 8), bool)
    for v in (-3200.0, -4.0, -1.0, 0.0, 2.0):
        w = st3jax.finalize(network(), make(initial=v).init(network()))["kernel"]
        t = jax.nn.sigmoid(v)
        raw = network()["kernel"]
        expected = jnp.sign(raw) * jnp.maximum(jnp.abs(raw) - t, 0)
        np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-7)
        assert (gone <= (w == 0)).all()
        gone = w == 0
    assert gone.sum() > 20


def spy():
    """An optimizer that does nothing but keep the gradients that it receives."""
    return optax.GradientTransformation(
        lambda params: params,
        lambda updates, state, params=None: (
            jax.tree.map(jnp.zeros_like, updates),
            updates,
        ),
    )


@pytest.mark.parametrize("v", [-5.0, -1.0, 0.5])
def test_both_gradients_are_those_of_the_soft_threshold(v):
    tx = str_(spy(), threshold_optimizer=spy(), initial=v)
    grads = {"kernel": G, "bias": jnp.ones(8)}
    _, state = jax.jit(tx.update)(grads, tx.init(network()), network())

    def linear(v, w):
        t = jax.nn.sigmoid(v)
        return (G * jnp.sign(w) * jax.nn.relu(jnp.abs(w) - t)).sum()

    dv, dw = jax.grad(linear, (0, 1))(v, network()["kernel"])
    assert float(state.threshold_state["kernel"]) == pytest.approx(float(dv), rel=1e-5)
    np.testing.assert_array_equal(state.inner_state["kernel"], dw)
    np.testing.assert_array_equal(state.inner_state["bias"], 1)
    gone = jnp.abs(network()["kernel"]) <= jax.nn.sigmoid(v)
    assert (state.inner_state["kernel"][gone] == 0).all()


def test_stronger_decay_of_thresholds_makes_the_network_sparser():
    found = []
    for decay in (0.0, 0.05, 0.5):
        chain = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.3))
        *_, last = train(make(initial=-12.0, threshold_optimizer=chain), 60)
        found.append(zeros(st3jax.finalize(*last)))
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_zeros_stay_and_others_train_on_after_fixing(dtype):
    with jax.enable_x64(dtype == "float64"):
        tx, twin = make(initial=-2.0, freeze_step=5), make(initial=-2.0)
        shapes = jax.eval_shape(tx.init, network(dtype))
        _, updated = jax.eval_shape(tx.update, network(dtype), shapes, network(dtype))
        assert updated == shapes
        run = list(train(tx, 9, dtype))
        seen = st3jax.finalize(*list(train(twin, 5, dtype))[-1])
        fixed, state = run[4]
        rtol = {"float16": 2e-2, "bfloat16": 8e-2}.get(dtype, 1e-4)
        np.testing.assert_allclose(
            fixed["kernel"].astype(float),
            seen["kernel"].astype(float),
            rtol=rtol,
            atol=rtol / 10,
        )
        assert zeros(run[3][0]) == 0
        assert 0 < zeros(fixed) == zeros(seen) < 64
        for params, opt_state in run[4:]:
            assert params["kernel"].dtype == dtype
            assert ((params["kernel"] == 0) == (fixed["kernel"] == 0)).all()
            weights = st3jax.finalize(params, opt_state)
            np.testing.assert_array_equal(weights["kernel"], params["kernel"])
            assert opt_state.thresholds == state.thresholds
        grads = jax.grad(lambda p: loss_fn(st3jax.sparsify(p, opt_state)))(params)
        gone = params["kernel"] == 0
        assert (grads["kernel"][gone] != 0).any()
        tx = make(spy(), initial=-2.0, freeze_step=5)
        opt_state = opt_state._replace(inner_state=params)
        _, after = jax.jit(tx.update)(grads, opt_state, params)
        assert ((after.inner_state["kernel"] == 0) == gone).all()
        changed = params["kernel"] != fixed["kernel"]
        assert changed.sum() > 0.8 * (64 - zeros(fixed))


def test_the_state_takes_bytes_a_leaf_and_is_found_and_composes():
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    state = jax.eval_shape(make(optax.sgd(0.1), freeze_step=3).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size <= 32
    inject = optax.inject_hyperparams(lambda rate: make(optax.sgd(rate), freeze_step=2))
    tx = optax.MultiSteps(optax.chain(inject(rate=0.1)), 2)
    *_, (_, opt_state) = train(tx, 5)
    assert isinstance(st3jax.find_state(opt_state), STRState)
    mapped = optax.tree.map_params(make(), lambda x: x + 1, make().init(network()))
    np.testing.assert_array_equal(mapped.inner_state[1][0].trace["kernel"], 1)
    assert float(mapped.thresholds["kernel"]) == -3200


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"inner": 0.1}, TypeError, "optimizer to wrap"),
        ({"threshold_optimizer": 0.1}, TypeError, "threshold_optimizer is"),
        ({"initial": -np.inf}, ValueError, "finite number, got -inf"),
        ({"freeze_step": 0}, ValueError, "1 or more, got 0"),
        ({"prunable": "kernel"}, TypeError, "prunable is a function"),
    ],
)
def test_bad_use_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


def test_a_bad_tree_is_refused():
    tx, other = make(), {"kernel": jnp.ones((2, 2))}
    state = tx.init(network())
    with pytest.raises(ValueError, match="no parameter is prunable"):
        tx.init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"tx.update\(grads, opt_state, params\)"):
        tx.update(network(), state)
    for call in (
        lambda: tx.update(other, state, other),
        lambda: st3jax.sparsify(other, state),
    ):
        with pytest.raises(ValueError, match="do not have the structure"):
            call()
