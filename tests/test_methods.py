"""Every method keeps one contract: add a line to ``METHODS``, and it is held to it."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import (
    assert_close,
    assert_identical,
    loss_fn,
    make_batch,
    network,
    pick,
    stack,
)

import st3jax

KEY = jax.random.key(7)
SPARSITY, FREEZE, STEPS = 0.8, 6, 8
RAMP = st3jax.polynomial_ramp(SPARSITY, 1, 5)
MOMENTUM = optax.sgd(0.1, momentum=0.9)

METHODS = {
    "st3": lambda inner: st3jax.st3(inner, RAMP, freeze_step=FREEZE),
    "ste": lambda inner: st3jax.ste(inner, RAMP, freeze_step=FREEZE),
    "gmp": lambda inner: st3jax.gmp(inner, RAMP, freeze_step=FREEZE),
    "gmp_strict": lambda inner: st3jax.gmp(
        inner, RAMP, sticky="strict", update_every=2, freeze_step=FREEZE
    ),
    "lrr": lambda inner: st3jax.lrr(inner, SPARSITY, cycle_steps=2, keep=0.5),
    "granet": lambda inner: st3jax.granet(
        inner, RAMP, total_steps=STEPS, update_every=1, freeze_step=FREEZE
    ),
    "rigl": lambda inner: st3jax.rigl(
        inner, SPARSITY, key=KEY, total_steps=STEPS, update_every=2
    ),
    "set": lambda inner: st3jax.set_(
        inner, SPARSITY, key=KEY, update_every=2, freeze_step=FREEZE
    ),
    "probmask": lambda inner: st3jax.probmask(inner, RAMP, key=KEY, freeze_step=FREEZE),
    "str": lambda inner: st3jax.str_(
        inner, threshold_optimizer=optax.sgd(0.1), initial=-2.0, freeze_step=FREEZE
    ),
}
"""What makes a transform that has come to its sparsity after ``FREEZE`` steps."""
REGROWN = {"rigl", "set"}
"""Methods that round in each layer, and whose new weights start at zero."""
EMERGENT = {"str"}
"""Methods that end with as many zeros as training makes."""
SAMPLED = {"probmask"}
"""Methods that train on masks drawn at random, up to ``FREEZE`` steps."""

every_method = pytest.mark.parametrize("name", METHODS)


def make_step(tx, axis_name=None):
    """One step; it returns what the model saw besides."""

    def step(params, opt_state, batch):
        def sparse_loss(params):
            weights = st3jax.sparsify(params, opt_state)
            return loss_fn(weights, batch), weights

        grads, seen = jax.grad(sparse_loss, has_aux=True)(params)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        updates, new_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_state, seen

    return step


def trajectory(tx, step, steps=STEPS, params=None):
    """Parameters, optimizer state and what the model saw, for each step."""
    params = network() if params is None else params
    opt_state = tx.init(params)
    for i in range(steps):
        params, opt_state, seen = step(params, opt_state, make_batch(i))
        yield params, opt_state, seen


@functools.cache
def usual(name):
    """A transform around momentum, and its jitted step."""
    tx = METHODS[name](MOMENTUM)
    return tx, jax.jit(make_step(tx))


@functools.cache
def usual_run(name, seed=0):
    tx, step = usual(name)
    return jax.device_get(list(trajectory(tx, step, params=network(seed))))


def shapes(tree):
    """What a compiled program depends on: structure, shapes, dtypes, weak types."""
    described = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), described


def zeros(weights):
    return int(st3jax.summary(weights).zeros)


# Sparsity


@every_method
def test_the_sparsity_at_the_end_is_the_one_asked_for(name):
    asked = math.floor(SPARSITY * 255) + 1
    for params, opt_state, _ in usual_run(name)[FREEZE - 1 :]:
        count = zeros(st3jax.finalize(params, opt_state))
        if name in EMERGENT:
            assert 0 < count < 256
        elif name in REGROWN:
            assert asked - 2 <= count < 230
        else:
            assert count == asked


@every_method
def test_finalize_returns_what_the_model_sees_to_the_bit(name):
    run = usual_run(name)
    start = FREEZE - 1 if name in SAMPLED else 0
    for i in range(start, STEPS - 1):
        params, opt_state, _ = run[i]
        assert_identical(
            jax.device_get(st3jax.finalize(params, opt_state)), run[i + 1][2]
        )


@every_method
def test_biases_train_as_with_the_inner_optimizer_alone(name):
    tx, _ = usual(name)
    step, alone = jax.jit(tx.update), jax.jit(MOMENTUM.update)
    params = twins = network()
    opt_state, inner_state = tx.init(params), MOMENTUM.init(twins)
    for i in range(STEPS):
        grads = jax.tree.map(lambda w: w + 1, network(10 + i))
        updates, opt_state = step(grads, opt_state, params)
        expected, inner_state = alone(grads, inner_state, twins)
        params = optax.apply_updates(params, updates)
        twins = optax.apply_updates(twins, expected)
        for layer in params:
            assert_identical(params[layer]["bias"], twins[layer]["bias"])
            assert (params[layer]["bias"] != 0).all()


# Compiling


@every_method
def test_nothing_is_compiled_twice(name):
    tx, step = usual(name)
    usual_run(name)
    assert step._cache_size() == 1
    params = network()
    states = [tx.init(params), jax.jit(tx.init)(params)]
    assert_identical(*states)
    assert shapes(states[0]) == shapes(states[1])
    assert step._cache_size() == 1


@every_method
def test_abstract_evaluation_tells_what_running_gives(name):
    tx, step = usual(name)
    params = network()
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert shapes(abstract) == shapes(state)
    updates, after = jax.eval_shape(tx.update, params, abstract, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert shapes(after) == shapes(state)
    weights = jax.eval_shape(st3jax.sparsify, params, abstract)
    assert shapes(weights)[0] == shapes(params)[0]
    new_params, new_state, seen = step(params, state, make_batch(0))
    assert shapes(new_state) == shapes(state)
    for tree in (updates, weights, new_params, seen):
        described = [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        assert described == [(x.shape, x.dtype) for x in jax.tree.leaves(params)]


@every_method
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_with_64_bits_dtypes_stay_what_they_are(name, dtype):
    with jax.enable_x64(True):
        tx = METHODS[name](MOMENTUM)
        params = jax.eval_shape(lambda: network(dtype=dtype))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert shapes(after) == shapes(state)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        weights = jax.eval_shape(st3jax.sparsify, params, state)
        assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype(dtype)}


@every_method
def test_donated_buffers_give_the_same_bits(name):
    tx, _ = usual(name)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    donated = [jax.device_get(now[:2]) for now in trajectory(tx, step)]
    for ours, plain in zip(donated, usual_run(name), strict=True):
        assert_identical(ours, plain[:2])


# Wrapping


def kernels_and_first_bias(params):
    return {
        **jax.tree.map(lambda w: True, params),
        "second": {"kernel": True, "bias": False},
    }


def the_other_bias(params):
    return jax.tree.map(lambda wrapped: not wrapped, kernels_and_first_bias(params))


WRAPPERS = {
    "chain": lambda make: optax.chain(optax.zero_nans(), make(MOMENTUM)),
    "masked": lambda make: optax.chain(
        optax.masked(make(MOMENTUM), kernels_and_first_bias),
        optax.masked(MOMENTUM, the_other_bias),
    ),
    "inject": lambda make: optax.inject_hyperparams(
        lambda rate: make(optax.sgd(rate, momentum=0.9))
    )(rate=0.1),
    "finite": lambda make: optax.apply_if_finite(make(MOMENTUM), 3),
    "multi_steps": lambda make: optax.MultiSteps(make(MOMENTUM), 2),
}


# One of each kind of state: wrappers know no more of it.
@pytest.mark.parametrize("name", ["st3", "gmp_strict", "granet", "probmask"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_in_optax_it_trains_as_before(name, wrapper):
    """Steps that a wrapper holds back or refuses are no steps."""
    tx = WRAPPERS[wrapper](METHODS[name])
    jitted = jax.jit(make_step(tx))
    params, opt_state = network(), tx.init(network())
    bad = jax.tree.map(lambda x: jnp.nan * x, make_batch(0))
    for i, alone in enumerate(usual_run(name)):
        if wrapper == "finite":
            before = params
            params, opt_state, _ = jitted(params, opt_state, bad)
            assert_identical(params, before)
        if wrapper == "multi_steps":
            before = params
            params, opt_state, _ = jitted(params, opt_state, make_batch(i))
            assert_identical(params, before)
        params, opt_state, _ = jitted(params, opt_state, make_batch(i))
        assert_close(params, alone[0])
        assert isinstance(st3jax.find_state(opt_state), st3jax.base.SparseState)
    expected = st3jax.finalize(*usual_run(name)[-1][:2])
    assert_close(st3jax.finalize(params, opt_state), expected)
    assert jitted._cache_size() == 1


@every_method
def test_params_of_another_structure_are_refused(name):
    tx, _ = usual(name)
    params = network()
    state = tx.init(params)
    others = [
        {"first": params["first"]},
        {**params, "third": params["first"]},
        {"first": params["first"], "other": params["second"]},
    ]
    for other in others:
        message = "not have the structure that the optimizer state was initialised"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(st3jax.sparsify, other, state)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.update, params, state, other)
    with pytest.raises(ValueError, match="update needs them"):
        tx.update(params, state)


# Devices


@every_method
def test_pmap_keeps_replicas_identical_and_equals_one_device(name):
    tx, _ = usual(name)
    step = jax.pmap(
        make_step(tx, "devices"), axis_name="devices", devices=jax.devices()[:4]
    )
    params, opt_state = stack(network(), 4), stack(tx.init(network()), 4)
    for i, alone in enumerate(usual_run(name)):
        batch = jax.tree.map(lambda x: x.reshape(4, 4, 8), make_batch(i))
        params, opt_state, _ = step(params, opt_state, batch)
        together = jax.device_get((params, opt_state))
        replicas = [pick(together, j) for j in range(4)]
        for replica in replicas[1:]:
            assert_identical(replicas[0], replica)
        assert_close(replicas[0], alone[:2])


@every_method
def test_weights_sharded_over_eight_devices_get_the_same_zeros(name):
    tx, _ = usual(name)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda w: jax.device_put(
                w, NamedSharding(mesh, P("rows") if w.ndim > 1 else P())
            ),
            network(),
        )
        step = jax.jit(make_step(tx))
        sharded = jax.device_get(list(trajectory(tx, step, params=params)))
    for ours, alone in zip(sharded, usual_run(name), strict=True):
        assert_close(ours, alone)
        ours, alone = (st3jax.finalize(*run[:2]) for run in (ours, alone))
        zero_sets = [jax.tree.map(lambda w: w == 0, run) for run in (ours, alone)]
        assert_identical(*zero_sets)


@every_method
def test_vmap_over_seeds_equals_separate_training(name):
    tx, _ = usual(name)
    step = jax.jit(jax.vmap(make_step(tx), (0, 0, None)))
    params = jax.tree.map(lambda *w: jnp.stack(w), network(0), network(1))
    opt_state = jax.vmap(tx.init)(params)
    for i in range(STEPS):
        params, opt_state, _ = step(params, opt_state, make_batch(i))
        together = jax.device_get((params, opt_state))
        for seed in range(2):
            assert_close(pick(together, seed), usual_run(name, seed)[i][:2])


# Saving


@every_method
def test_a_restored_checkpoint_goes_on_to_the_same_bits(name, tmp_path):
    tx, step = usual(name)
    middle = 3
    saved = usual_run(name)[middle - 1][:2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", jax.device_put(saved))
        checkpointer.wait_until_finished()
        template = jax.eval_shape(lambda: (network(), tx.init(network())))
        params, opt_state = checkpointer.restore(tmp_path / "saved", template)
    assert_identical((params, opt_state), saved)
    for i in range(middle, STEPS):
        params, opt_state, _ = step(params, opt_state, make_batch(i))
        assert_identical((params, opt_state), usual_run(name)[i][:2])
