"""A sparse network trains on, and its zeros stay exactly where they are."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import (
    assert_close,
    assert_identical,
    loss_fn,
    make_batch,
    make_step,
    network,
    recording,
    seen_by_inner,
    trajectory,
)

import st3jax
import st3jax.nnx

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SPARSITY, STEPS = 0.8, 5
MOMENTUM = optax.sgd(0.1, momentum=0.9)
OPTIMIZERS = {
    "momentum": MOMENTUM,
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "decay": optax.chain(optax.add_decayed_weights(0.1), MOMENTUM),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), MOMENTUM),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), MOMENTUM),
}


def pruned(dtype=jnp.float32):
    return st3jax.prune(network(dtype=dtype), SPARSITY)


def kernels(tree):
    return [np.asarray(tree[layer]["kernel"]) for layer in ("first", "second")]


def masks(tree):
    return [w != 0 for w in kernels(tree)]


def assert_same_zeros(ours, theirs):
    for a, b in zip(masks(ours), masks(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def train(tx, params, steps=STEPS, step=None):
    *_, last = trajectory(tx, params, steps, step)
    return last


# What is held


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_exactly_zero_and_all_else_moves(name, dtype):
    before = pruned(dtype)
    params, opt_state = train(st3jax.hold_zeros(OPTIMIZERS[name]), before)
    assert_same_zeros(params, before)
    each = kernels(before), kernels(params), masks(before)
    for old, new, mask in zip(*each, strict=True):
        assert new.dtype == dtype
        assert not np.signbit(new[~mask]).any()
        assert (new != old)[mask].mean() > 0.3  # narrow ones round
    assert (np.asarray(params["first"]["bias"]) != 0).any()
    assert_identical(st3jax.finalize(params, opt_state), params)


def test_it_trains_as_dense_training_that_is_masked_by_hand():
    """Of gradients and of weights; by it momentum of zeros changes nothing."""
    start = pruned()
    mask = jax.tree.map(
        lambda w: (w != 0) | (w.ndim == 1), start
    )  # biases, which begin at zero, train
    inner = optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.01), MOMENTUM
    )

    @jax.jit
    def by_hand(params, state, batch):
        grads = jax.tree.map(jnp.multiply, jax.grad(loss_fn)(params, batch), mask)
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.map(jnp.multiply, params, mask), state

    params, state = start, inner.init(start)
    ours = trajectory(st3jax.hold_zeros(inner), start, STEPS)
    for i, (held, _) in enumerate(ours):
        params, state = by_hand(params, state, make_batch(i))
        assert_close(held, params, rtol=1e-5, atol=1e-7)


def test_clipping_inside_counts_the_gradients_of_other_weights_alone():
    start = pruned()
    tx = st3jax.hold_zeros(recording(optax.sgd(0.0)))
    grads = jax.tree.map(jnp.ones_like, start)
    grads["first"]["kernel"] = jnp.where(
        start["first"]["kernel"] == 0, jnp.nan, grads["first"]["kernel"]
    )
    _, opt_state = tx.update(grads, tx.init(start), start)
    seen = seen_by_inner(opt_state)
    for gradient, mask in zip(kernels(seen), masks(start), strict=True):
        np.testing.assert_array_equal(gradient, mask)
    others = sum(int(mask.sum()) for mask in masks(start)) + 16 + 8
    assert sum(float((g**2).sum()) for g in jax.tree.leaves(seen)) == others


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_weight_that_is_sent_onto_zero_stays_next_to_it(dtype):
    params = {"kernel": jnp.array([[0.0, -0.0, 1.5, -2.0]], dtype)}
    tx = st3jax.hold_zeros(optax.sgd(1.0))
    updates, _ = tx.update(params, tx.init(params), params)
    landed = np.asarray(optax.apply_updates(params, updates)["kernel"], np.float32)
    assert (landed[0] != 0).tolist() == [False, False, True, True]
    assert (np.abs(landed) < 0.1).all()


def test_the_smallest_number_is_no_zero_and_minus_zero_is_one():
    w = np.array([[1e-45, -0.0, 0.0, 1.0]], np.float32)
    tx = st3jax.hold_zeros(recording(optax.sgd(1.0)))
    grads = {"kernel": jnp.ones((1, 4))}
    _, opt_state = tx.update(grads, tx.init({"kernel": w}), {"kernel": w})
    assert seen_by_inner(opt_state)["kernel"].tolist() == [[1, 0, 0, 1]]


def test_a_leaf_without_zeros_trains_as_without():
    start = st3jax.prune(network(), SPARSITY, prunable=lambda path, _: "first" in path)
    held, _ = train(st3jax.hold_zeros(MOMENTUM), start)
    state, params = MOMENTUM.init(start), start
    for i in range(STEPS):
        grads = jax.grad(loss_fn)(params, make_batch(i))
        mask = start["first"]["kernel"] != 0
        grads["first"]["kernel"] *= mask
        updates, state = MOMENTUM.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(held, params, rtol=1e-5, atol=1e-7)


def test_a_predicate_says_whose_zeros_are_held():
    start = pruned()
    tx = st3jax.hold_zeros(MOMENTUM, prunable=lambda path, _: path == "first/kernel")
    params, _ = train(tx, start)
    first, second = masks(params)
    np.testing.assert_array_equal(first, masks(start)[0])
    assert second.mean() > 0.8  # some units are dead


def test_the_state_takes_a_byte_a_leaf():
    start = pruned()
    state = st3jax.hold_zeros(optax.identity()).init(start)
    assert isinstance(state, st3jax.HoldState)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(state)]
    assert sorted(sizes) == [1, 1, 4, 4]  # and two counts


# Misuse


@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray])
def test_weights_without_a_zero_are_refused_where_they_can_be_seen(as_array):
    tx = st3jax.hold_zeros(MOMENTUM)
    dense = jax.tree.map(as_array, network())
    with pytest.raises(ValueError, match="there are none in 2 prunable leaves: pass"):
        tx.init(dense)
    jax.eval_shape(tx.init, dense)
    tx.init(jax.eval_shape(network))
    jax.jit(tx.init)(dense)
    optax.tree.map_params(tx, lambda w: w, jax.jit(tx.init)(dense))
    tx.init(jax.tree.map(as_array, pruned()))


# Where sparse weights come from


def of_another_method():
    tx = st3jax.gmp(MOMENTUM, 0.7)
    return st3jax.finalize(*train(tx, network()))


def of_a_mask():
    tx = st3jax.set_(MOMENTUM, 0.7, key=jax.random.key(3), update_every=2)
    return st3jax.finalize(*train(tx, network()))


def of_groups():
    return st3jax.prune(network(), 0.5, pattern="2:4")


@pytest.mark.parametrize("made", [of_another_method, of_a_mask, of_groups])
def test_it_goes_on_from_what_others_made(made):
    start = made()
    params, opt_state = train(st3jax.hold_zeros(optax.adam(1e-2)), start)
    assert_same_zeros(params, start)
    assert_identical(st3jax.finalize(params, opt_state), params)
    assert sum((~mask).sum() for mask in masks(start)) > 120


def test_it_goes_on_from_a_checkpoint_of_weights_to_the_same_bits(tmp_path):
    tx, start = st3jax.hold_zeros(MOMENTUM), pruned()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "weights", start)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "weights", jax.eval_shape(pruned))
    step = jax.jit(make_step(tx))
    ours, others = (train(tx, params, step=step) for params in (restored, start))
    assert_identical(ours, others)
    assert_same_zeros(ours[0], start)


# Where they train


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_keep_their_zeros_and_their_places(kind):
    tx, start = st3jax.hold_zeros(MOMENTUM), pruned()
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind,) * 2)
    placed = {2: NamedSharding(mesh, P("rows", "columns")), 1: NamedSharding(mesh, P())}

    def loss(weights, batch):
        if kind == AxisType.Explicit:
            weights = jax.sharding.reshard(weights, P())
        return loss_fn(weights, batch)

    with jax.set_mesh(mesh):
        sharded = jax.tree.map(lambda w: jax.device_put(w, placed[w.ndim]), start)
        dense = jax.tree.map(lambda w: jax.device_put(w, placed[w.ndim]), network())
        with pytest.raises(ValueError, match="there are none"):
            tx.init(dense)
        params, _ = train(tx, sharded, step=jax.jit(make_step(tx, loss)))
    assert params["first"]["kernel"].sharding.is_equivalent_to(placed[2], 2)
    alone, _ = train(tx, start)
    assert_close(jax.device_get(params), jax.device_get(alone))
    assert_same_zeros(params, start)


def test_boxed_weights_keep_their_zeros():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "columns"))
    model, x = nn.Dense(16, kernel_init=init), make_batch()[0]
    params = st3jax.prune(model.init(jax.random.key(0), x)["params"], SPARSITY)
    before = nn.unbox(params)["kernel"]
    tx = st3jax.hold_zeros(optax.adamw(1e-2))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            weights = st3jax.sparsify(params, opt_state)
            return (model.apply({"params": weights}, x) ** 2).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        params, opt_state = step(params, opt_state)
    assert isinstance(params["kernel"], nn.Partitioned)
    after = nn.unbox(st3jax.finalize(params, opt_state))["kernel"]
    np.testing.assert_array_equal(after == 0, before == 0)
    assert (after != before).sum() == (before != 0).sum()


def test_an_nnx_model_keeps_its_zeros():
    model, x = nnx.Linear(8, 16, rngs=nnx.Rngs(0)), make_batch()[0]
    state = nnx.state(model, nnx.Param)
    nnx.update(model, st3jax.prune(state, SPARSITY))
    before = model.kernel[...]
    tx = st3jax.hold_zeros(MOMENTUM)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return (st3jax.nnx.sparsify(model, optimizer)(x) ** 2).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(3):
        step(model, optimizer)
    after = st3jax.nnx.finalize(model, optimizer).kernel[...]
    assert int((before == 0).sum()) == math.floor(SPARSITY * 127) + 1
    np.testing.assert_array_equal(after == 0, before == 0)
    assert (after != before).sum() == (before != 0).sum()


def test_multi_steps_outside_is_one_step_on_the_mean_gradient():
    start = pruned()
    tx = optax.MultiSteps(st3jax.hold_zeros(MOMENTUM), 2)
    held, _ = train(tx, start, 4)

    def mean_loss(weights, batches):
        return (loss_fn(weights, batches[0]) + loss_fn(weights, batches[1])) / 2

    inner = st3jax.hold_zeros(MOMENTUM)
    step = jax.jit(make_step(inner, mean_loss))
    params, opt_state = start, inner.init(start)
    for i in (0, 2):
        batches = make_batch(i), make_batch(i + 1)
        params, opt_state = step(params, opt_state, batches)
    assert_close(held, params)
    assert_same_zeros(held, start)
