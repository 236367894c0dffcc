"""Every method keeps one contract: add a line to ``METHODS``, and it is held to it."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import (
    assert_close,
    assert_identical,
    loss_fn,
    make_batch,
    network,
    pick,
    recording,
    seen_by_inner,
    stack,
)

import st3jax

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KEY = jax.random.key(7)
SPARSITY, FREEZE, STEPS = 0.8, 6, 8
RAMP = st3jax.polynomial_ramp(SPARSITY, 1, 5)
HALF = st3jax.polynomial_ramp(0.5, 1, 5)
COSTS = {"first/kernel": 5, "second/kernel": 1}
MOMENTUM = optax.sgd(0.1, momentum=0.9)
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}


def st3(sparsity=RAMP, **options):
    return functools.partial(
        st3jax.st3, sparsity=sparsity, freeze_step=FREEZE, **options
    )


def gmp(**options):
    return functools.partial(st3jax.gmp, sparsity=RAMP, freeze_step=FREEZE, **options)


def granet(**options):
    return functools.partial(
        st3jax.granet, sparsity=RAMP, total_steps=STEPS, update_every=1, **options
    )


METHODS = {
    "st3": st3(),
    "st3 2:4": st3(HALF, pattern="2:4"),
    "st3 blocks": st3(pattern=(4, 2)),
    "st3 costs": st3(costs=COSTS),
    "st3 erk": st3(distribution="erk"),
    "st3 sigma": st3(criterion="l1_sigma"),
    "st3 by path": st3({"first/*": RAMP, "*": HALF}),
    "ste": functools.partial(st3jax.ste, sparsity=RAMP, freeze_step=FREEZE),
    "gmp": gmp(),
    "gmp strict": gmp(sticky="strict", update_every=2),
    "gmp published": gmp(sticky="published"),
    "lrr": functools.partial(st3jax.lrr, sparsity=SPARSITY, cycle_steps=2, keep=0.5),
    "granet": granet(freeze_step=FREEZE),
    "granet sparse": granet(initial_sparsity=0.5, key=KEY),
    "rigl": functools.partial(
        st3jax.rigl, sparsity=SPARSITY, key=KEY, total_steps=STEPS, update_every=2
    ),
    "set": functools.partial(
        st3jax.set_, sparsity=SPARSITY, key=KEY, update_every=2, freeze_step=FREEZE
    ),
    "probmask": functools.partial(
        st3jax.probmask, sparsity=RAMP, key=KEY, freeze_step=FREEZE
    ),
    "str": functools.partial(
        st3jax.str_,
        threshold_optimizer=optax.sgd(0.1),
        initial=-2.0,
        freeze_step=FREEZE,
    ),
    "hold_zeros": functools.partial(st3jax.hold_zeros),
}
"""What makes a transform that has come to its sparsity after ``FREEZE`` steps."""


def asked(n, sparsity):
    return math.floor(sparsity * (n - 1)) + 1


ZEROS = {
    "st3 2:4": [128],
    "st3 blocks": [8 * asked(32, SPARSITY)],
    "st3 costs": range(256),  # see the test of it
    "st3 erk": [2 * asked(128, SPARSITY)],
    "st3 by path": [asked(128, SPARSITY) + asked(128, 0.5)],
    "granet sparse": range(asked(256, SPARSITY), 230),
    "rigl": range(asked(256, SPARSITY) - 2, 230),
    "set": range(asked(256, SPARSITY) - 2, 230),
    "str": range(1, 256),
}
"""How many zeros there are at the end, where it is not the sparsity of all weights.

Some methods round in each layer and let new weights start at zero; ``str`` ends with as
many as training makes.
"""
ALL_GRADIENTS = {"st3", "ste", "granet", "granet sparse"}
"""Methods whose optimizer sees all gradients, until the mask is fixed."""
MASKS = {"granet", "granet sparse", "rigl", "set"}
"""Methods with a mask, whose active weights may be zero."""
SPARSE = {"hold_zeros"}
"""Methods that start with a sparse network."""
SAMPLED = {"probmask"}
"""Methods that train on masks drawn at random, up to ``FREEZE`` steps."""
OPEN = [name for name in METHODS if "freeze_step" in METHODS[name].keywords]
OPEN.remove("probmask")
"""Methods that may fix their mask, or never do."""
KINDS = ["st3", "gmp strict", "granet", "probmask", "hold_zeros"]
"""One of each kind of state: what is around a transform knows no more of it."""

every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(params=METHODS, scope="module")
def name(request):
    """Each method, with all of its tests in a row: then its programs can go."""
    yield request.param
    forget()


def forget():
    for cached in (usual, usual_run):
        cached.cache_clear()
    jax.clear_caches()


def start(name, seed=0, dtype=jnp.float32):
    """The network that a method starts with."""
    params = network(seed, dtype)
    return st3jax.prune(params, SPARSITY) if name in SPARSE else params


class Step(NamedTuple):
    """What there is after a step, and what there was in it."""

    params: Any
    opt_state: Any
    seen: Any  # by the model
    given: Any  # gradients with respect to that
    passed: Any  # to the raw weights, through what the model saw


def make_step(tx, axis_name=None):
    def step(params, opt_state, batch):
        seen, pull = jax.vjp(lambda w: st3jax.sparsify(w, opt_state), params)
        given = jax.grad(loss_fn)(seen, batch)
        if axis_name is not None:
            given = jax.lax.pmean(given, axis_name)
        (passed,) = pull(given)
        updates, new_state = tx.update(passed, opt_state, params)
        params = optax.apply_updates(params, updates)
        return Step(params, new_state, seen, given, passed)

    return step


def trajectory(tx, step, params, steps=STEPS):
    """All steps, one after the other."""
    opt_state = tx.init(params)
    for i in range(steps):
        now = step(params, opt_state, make_batch(i))
        params, opt_state = now.params, now.opt_state
        yield now


@functools.cache
def usual(name):
    """A transform around momentum that keeps what it sees, and its jitted step.

    Compiled with all that XLA does for speed, unlike what is compared with it.
    """
    tx = METHODS[name](recording(MOMENTUM))
    return tx, jax.jit(make_step(tx), compiler_options=OPTIMIZED)


@functools.cache
def usual_run(name, seed=0):
    tx, step = usual(name)
    return jax.device_get(list(trajectory(tx, step, start(name, seed))))


def shapes(tree):
    """What a compiled program depends on: structure, shapes, dtypes, weak types."""
    described = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), described


def kernels(tree):
    return {layer: np.asarray(tree[layer]["kernel"]) for layer in ("first", "second")}


def flat(tree):
    return np.concatenate([w.ravel() for w in kernels(tree).values()])


def zeros(weights):
    return int(st3jax.summary(weights).zeros)


def kind(name):
    return name.split()[0]


# Sparsity


def test_the_sparsity_at_the_end_is_the_one_asked_for(name):
    for now in usual_run(name)[FREEZE - 1 :]:
        count = zeros(st3jax.finalize(now.params, now.opt_state))
        assert count in ZEROS.get(name, [asked(256, SPARSITY)])
        if kind(name) == "granet":
            masks = jax.tree.leaves(now.opt_state.masks)
            assert sum((~mask).sum() for mask in masks) == asked(256, SPARSITY)


def test_costs_are_met_by_whole_weights_at_the_end():
    for now in usual_run("st3 costs")[FREEZE - 1 :]:
        weights = kernels(st3jax.finalize(now.params, now.opt_state))
        gone = [int((w == 0).sum()) for w in weights.values()]
        assert 0 <= 5 * gone[0] + gone[1] - asked(6 * 128, SPARSITY) < 5


def test_the_pattern_of_groups_and_of_blocks_is_there_at_the_end():
    def final(name):
        now = usual_run(name)[FREEZE - 1]
        return kernels(st3jax.finalize(now.params, now.opt_state)).values()

    for w in final("st3 2:4"):
        assert ((w.reshape(-1, 4, w.shape[1]) != 0).sum(1) == 2).all()
    for w in final("st3 blocks"):
        live = (w.reshape(w.shape[0] // 4, 4, -1, 2) != 0).sum((1, 3))
        assert set(live.ravel()) == {0, 8}


def test_finalize_returns_what_the_model_sees_to_the_bit(name):
    run = usual_run(name)
    start = FREEZE - 1 if name in SAMPLED else 0
    finalize = jax.jit(st3jax.finalize, compiler_options=OPTIMIZED)
    for now, later in zip(run[start:-1], run[start + 1 :], strict=True):
        weights = finalize(now.params, now.opt_state)
        assert_identical(jax.device_get(weights), later.seen)


# Gradients


def test_every_gradient_passes_and_the_transform_decides_which_are_seen(name):
    """Before and after the mask is fixed."""
    run = usual_run(name)
    before = jax.device_get(usual(name)[0].init(start(name)))
    raw = start(name)
    for i, now in enumerate(run):
        assert_identical(now.passed, now.given)
        fixed = i >= FREEZE and name != "granet sparse"
        given, seen = flat(now.given), flat(now.seen)
        reached = flat(seen_by_inner(now.opt_state))
        live = seen != 0
        if name in MASKS:
            live = np.concatenate([m.ravel() for m in jax.tree.leaves(before.masks)])
        if name in SAMPLED and not fixed:
            np.testing.assert_allclose(reached, given * seen / flat(raw), rtol=1e-5)
        elif not fixed and (name in ALL_GRADIENTS or kind(name) == "st3"):
            assert (reached == given).all()
        else:
            assert (reached == np.where(live, given, 0)).all()
        for layer in ("first", "second"):
            bias = seen_by_inner(now.opt_state)[layer]["bias"]
            assert_identical(bias, now.given[layer]["bias"])
        raw, before = now.params, now.opt_state
    assert (given[~live] != 0).sum() > 20


def test_biases_train_as_with_the_inner_optimizer_alone(name):
    params = biases(start(name))
    state = MOMENTUM.init(params)
    for now in usual_run(name):
        updates, state = momentum_alone(biases(now.given), state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, biases(now.params), rtol=1e-6, atol=1e-7)
        # Most of them: a sparse network may have units that nothing reaches.
        assert all((bias != 0).mean() > 0.5 for bias in params)


momentum_alone = jax.jit(MOMENTUM.update)


def biases(tree):
    return [tree[layer]["bias"] for layer in ("first", "second")]


# Compiling


def test_nothing_is_compiled_twice(name):
    tx, step = usual(name)
    usual_run(name)
    assert step._cache_size() == 1
    params = start(name)
    states = [tx.init(params), jax.jit(tx.init)(params)]
    assert_identical(*states)
    assert shapes(states[0]) == shapes(states[1])
    assert step._cache_size() == 1


def test_outside_of_jit_an_update_is_compiled_once(name, caplog):
    tx = METHODS[name](MOMENTUM)
    params, state = start(name), tx.init(start(name))
    compiled = []
    for i in range(3):
        caplog.clear()
        with jax.log_compiles():
            updates, state = tx.update(network(i), state, params)
        compiled.append([x for x in caplog.messages if x.startswith("Compiling")])
        params = optax.apply_updates(params, updates)
    assert compiled[0]
    assert compiled[1:] == [[], []]


def test_abstract_evaluation_tells_what_running_gives(name):
    tx, _ = usual(name)
    params = start(name)
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert shapes(abstract) == shapes(state)
    now = jax.eval_shape(make_step(tx), params, abstract, make_batch(0))
    assert shapes(now.opt_state) == shapes(state)
    for tree in (now.params, now.seen, now.passed):
        described = [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        assert described == [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    ran = usual_run(name)[0]
    for ours, tree in zip(now, ran, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(tree)
        described = [(x.shape, x.dtype) for x in jax.tree.leaves(ours)]
        assert described == [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        (jnp.bfloat16, False),
        (jnp.float16, False),
        (jnp.bfloat16, True),
        (jnp.float32, True),
        (jnp.float64, True),
    ],
)
def test_in_either_mode_dtypes_stay_what_they_are(name, dtype, x64):
    with jax.enable_x64(x64):
        tx = METHODS[name](MOMENTUM)
        params = jax.eval_shape(lambda: start(name, dtype=dtype))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert shapes(after) == shapes(state)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        weights = jax.eval_shape(st3jax.sparsify, params, state)
        assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype(dtype)}


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_donated_buffers_are_distinct_and_give_the_same_bits(name):
    tx, _ = usual(name)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1), compiler_options=OPTIMIZED)
    spare = tx.init(start(name))
    params, opt_state = start(name), tx.init(start(name))
    for i, plain in enumerate(usual_run(name)):
        given = params, opt_state
        assert len(set(pointers(given))) == len(pointers(given))
        now = step(*given, make_batch(i))
        params, opt_state = now.params, now.opt_state
        # JAX may keep what no step reads, such as the gradients seen before.
        kept = [path for path, leaf in leaves_by_name(given) if not leaf.is_deleted()]
        unread = (".seen", ".seed", ".frozen")
        assert all(any(name in path for name in unread) for path in kept)
        # NumPy looks at copies: a buffer that it looks at may not be given away.
        assert_identical(jax.tree.map(jnp.copy, now), plain)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(spare))


def leaves_by_name(tree):
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


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


@every_kind
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_in_optax_it_trains_as_before(name, wrapper):
    """Steps that a wrapper holds back or refuses are no steps."""
    tx = WRAPPERS[wrapper](METHODS[name])
    jitted = jax.jit(make_step(tx))
    params, opt_state = start(name), tx.init(start(name))
    bad = jax.tree.map(lambda x: jnp.nan * x, make_batch(0))
    for i, alone in enumerate(usual_run(name)):
        if wrapper in ("finite", "multi_steps"):
            batch = bad if wrapper == "finite" else make_batch(i)
            before, state = params, st3jax.find_state(opt_state)
            params, opt_state, *_ = jitted(params, opt_state, batch)
            assert_identical(params, before)
            assert_identical(st3jax.find_state(opt_state), state)
        params, opt_state, *_ = jitted(params, opt_state, make_batch(i))
        assert_close(params, alone.params)
        assert isinstance(st3jax.find_state(opt_state), st3jax.base.SparseState)
    last = usual_run(name)[-1]
    expected = st3jax.finalize(last.params, last.opt_state)
    assert_close(st3jax.finalize(params, opt_state), expected)
    assert jitted._cache_size() == 1


def test_params_of_another_structure_are_refused(name):
    tx, _ = usual(name)
    params = start(name)
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


# What is prunable


def first_alone(path, leaf):
    return path == "first/kernel"


def test_what_is_prunable_is_asked_once_for_each_leaf(name):
    asked_for = []

    def prunable(path, leaf):
        asked_for.append(path)
        return st3jax.is_kernel(path, leaf)

    tx = METHODS[name](MOMENTUM, prunable=prunable)
    params = start(name)
    state = tx.init(params)
    jax.eval_shape(tx.update, params, state, params)
    jax.eval_shape(st3jax.sparsify, params, state)
    st3jax.finalize(params, state)
    assert sorted(asked_for) == sorted(st3jax.trees.all_paths(params))


def program(name, tx, state):
    """What an update does, without the addresses of functions."""
    jaxpr = jax.make_jaxpr(tx.update)(network(1), state, start(name))
    return re.sub("0x[0-9a-f]+", "", str(jaxpr))


def test_an_update_follows_what_was_prunable_at_the_start(name):
    usual_choice = METHODS[name](MOMENTUM)
    other_choice = METHODS[name](MOMENTUM, prunable=first_alone)
    for tx, other in (
        (usual_choice, other_choice),
        (other_choice, usual_choice),
    ):
        state = tx.init(start(name))
        assert program(name, other, state) == program(name, tx, state)
    seen = jax.eval_shape(usual_choice.update, network(1), state, start(name))[1]
    assert shapes(seen) == shapes(state)
    assert len(jax.tree.leaves(state.per_leaf)) == 1


# Strict modes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains_where_nothing_is_promoted(name, dtype):
    """Neither ranks nor dtypes, without a word from the user."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        tx = METHODS[name](MOMENTUM)
        params = start(name, dtype=dtype)
        state = tx.init(params)

        def step(params, opt_state):
            seen, pull = jax.vjp(lambda w: st3jax.sparsify(w, opt_state), params)
            updates, opt_state = tx.update(pull(seen)[0], opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, st3jax.finalize(params, opt_state)

        params, after, _ = jax.eval_shape(step, params, state)
        assert shapes(after) == shapes(state)
        assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        st3jax.finalize(start(name, dtype=dtype), state)


# Devices and transformations


def test_pmap_keeps_replicas_identical_and_equals_one_device(name):
    tx, _ = usual(name)
    step = jax.pmap(
        make_step(tx, "devices"), axis_name="devices", devices=jax.devices()[:4]
    )
    params, opt_state = stack(start(name), 4), stack(tx.init(start(name)), 4)
    for i, alone in enumerate(usual_run(name)):
        batch = jax.tree.map(lambda x: x.reshape(4, 4, 8), make_batch(i))
        now = step(params, opt_state, batch)
        params, opt_state = now.params, now.opt_state
        together = jax.device_get(now)
        replicas = [pick(together, j) for j in range(4)]
        for replica in replicas[1:]:
            assert_identical(replicas[0], replica)
        assert_close(replicas[0], alone)
        assert_same_zeros(replicas[0], alone)


def test_weights_sharded_over_eight_devices_get_the_same_zeros(name):
    tx, _ = usual(name)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    placed = {2: NamedSharding(mesh, P("rows")), 1: NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda w: jax.device_put(w, placed[w.ndim]), start(name))
        step = jax.jit(make_step(tx))
        sharded = list(trajectory(tx, step, params))
    for layer in ("first", "second"):
        w = sharded[-1].params[layer]["kernel"]
        assert w.sharding.is_equivalent_to(placed[2], 2)
    for ours, alone in zip(jax.device_get(sharded), usual_run(name), strict=True):
        assert_close(ours, alone)
        assert_same_zeros(ours, alone)


def assert_same_zeros(ours, alone):
    weights = [flat(st3jax.finalize(x.params, x.opt_state)) for x in (ours, alone)]
    np.testing.assert_array_equal(*(w == 0 for w in weights))


def test_vmap_over_seeds_equals_separate_training(name):
    tx, _ = usual(name)
    step = jax.jit(jax.vmap(make_step(tx), (0, 0, None)))
    params = jax.tree.map(lambda *w: jnp.stack(w), start(name, 0), start(name, 1))
    opt_state = jax.vmap(tx.init)(params)
    for i in range(STEPS):
        now = step(params, opt_state, make_batch(i))
        params, opt_state = now.params, now.opt_state
        together = jax.device_get(now)
        for seed in range(2):
            alone = usual_run(name, seed)[i]
            assert_close(pick(together, seed), alone)
            assert_same_zeros(pick(together, seed), alone)


def test_a_scan_over_steps_equals_a_python_loop(name):
    tx, _ = usual(name)

    def body(carry, batch):
        now = make_step(tx)(*carry, batch)
        return (now.params, now.opt_state), now

    batches = [make_batch(i) for i in range(STEPS)]
    batches = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    scan = jax.jit(functools.partial(jax.lax.scan, body))
    _, run = jax.device_get(scan((start(name), tx.init(start(name))), batches))
    for i, alone in enumerate(usual_run(name)):
        assert_close(pick(run, i), alone)
        assert_same_zeros(pick(run, i), alone)


# Saving


@pytest.mark.parametrize("completed", [0, 3, FREEZE + 1])
def test_flax_serialization_restores_every_bit(name, completed):
    tx, _ = usual(name)
    fresh = jax.device_get((start(name), tx.init(start(name))))
    saved = tuple(usual_run(name)[completed - 1][:2]) if completed else fresh
    assert_identical(
        serialization.from_bytes(fresh, serialization.to_bytes(saved)), saved
    )


def test_a_restored_checkpoint_goes_on_to_the_same_bits(name, tmp_path):
    """From the ramp, and from where the mask is fixed."""
    tx, step = usual(name)
    template = jax.eval_shape(lambda: (start(name), tx.init(start(name))))
    with ocp.CheckpointManager(tmp_path) as manager:
        for completed in (3, FREEZE + 1):
            saved = usual_run(name)[completed - 1]
            tree = jax.device_put((saved.params, saved.opt_state))
            manager.save(completed, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        for completed in (3, FREEZE + 1):
            args = ocp.args.StandardRestore(template)
            params, opt_state = manager.restore(completed, args=args)
            saved = usual_run(name)[completed - 1]
            assert_identical((params, opt_state), tuple(saved[:2]))
            for i in range(completed, STEPS):
                now = step(params, opt_state, make_batch(i))
                params, opt_state = now.params, now.opt_state
                assert_identical(jax.device_get(now), usual_run(name)[i])


@functools.cache
def open_run(name, steps=3):
    """The first steps of a transform that never fixes its mask."""
    tx = METHODS[name](recording(MOMENTUM), freeze_step=None)
    *_, last = trajectory(tx, jax.jit(make_step(tx)), start(name), steps)
    return jax.device_get((last.params, last.opt_state))


@pytest.mark.parametrize("name", OPEN)
def test_the_state_has_one_structure_whether_the_mask_is_ever_fixed_or_not(name):
    states = [
        METHODS[name](MOMENTUM, freeze_step=step).init(start(name))
        for step in (None, FREEZE)
    ]
    assert_identical(*states)
    assert shapes(states[0]) == shapes(states[1])


@pytest.mark.parametrize("way", ["as it is", "flax", "orbax"])
@pytest.mark.parametrize("name", ["st3", "gmp", "granet", "str"])
def test_a_state_of_a_mask_that_was_never_fixed_is_trained_on_and_fixed(
    name, way, tmp_path
):
    tx, step = usual(name)
    saved = open_run(name)
    if way == "flax":
        fresh = jax.device_get((start(name), tx.init(start(name))))
        saved = serialization.from_bytes(fresh, serialization.to_bytes(saved))
    if way == "orbax":
        template = jax.eval_shape(lambda: (start(name), tx.init(start(name))))
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(3, args=ocp.args.StandardSave(jax.device_put(saved)))
            manager.wait_until_finished()
            saved = manager.restore(3, args=ocp.args.StandardRestore(template))
    params, opt_state = saved
    for i in range(3, STEPS):
        now = step(params, opt_state, make_batch(i))
        params, opt_state = now.params, now.opt_state
        assert_close(jax.device_get(now), usual_run(name)[i])
    assert opt_state.frozen
    assert_identical(jax.device_get(st3jax.finalize(params, opt_state)), params)
    assert zeros(params) == zeros(usual_run(name)[-1].params) > 0


def test_the_count_of_steps_stops_where_no_integer_follows(name):
    _, step = usual(name)
    before, most = usual_run(name)[-1], np.int32(2**31 - 1)
    state = before.opt_state._replace(count=most)
    now = jax.device_get(step(before.params, state, make_batch(STEPS)))
    assert now.opt_state.count == most
    counts = {zeros(st3jax.finalize(x.params, x.opt_state)) for x in (before, now)}
    assert len(counts) == 1 or not now.opt_state.frozen


@pytest.mark.parametrize(("completed", "late"), [(7, 5), (7, 7), (7, 8), (5, 5)])
@pytest.mark.parametrize("name", OPEN)
def test_a_mask_that_should_have_been_fixed_before_is_fixed_at_the_next_step(
    name, completed, late
):
    """A state that was saved without ``freeze_step`` may come late."""
    params, opt_state = open_run(name, completed)
    tx = METHODS[name](recording(MOMENTUM), freeze_step=late)
    step = jax.jit(make_step(tx))
    before = zeros(st3jax.finalize(params, opt_state))
    for i in range(completed, completed + 4):
        params, opt_state, *_ = step(params, opt_state, make_batch(i))
        assert opt_state.frozen == (opt_state.count >= late)
    assert_identical(jax.device_get(st3jax.finalize(params, opt_state)), params)
    assert zeros(params) > before / 2 > 0


OTHER_OPTIONS = [{"pattern": "2:4"}, {"pattern": (4, 2)}, {"soft": False}]


@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=str)
def test_a_state_of_other_options_is_refused(options):
    plain, other = st3jax.st3(MOMENTUM, 0.5), st3jax.st3(MOMENTUM, 0.5, **options)
    for one, two in ((plain, other), (other, plain)):
        with pytest.raises(ValueError, match="the state is of another transform: wei"):
            jax.eval_shape(two.update, network(1), one.init(network()), network())


def test_a_state_of_another_method_is_refused(name):
    tx = METHODS[name](MOMENTUM)
    others = ("st3", "set", "probmask", "str", "hold_zeros")
    states = [METHODS[other](MOMENTUM).init(start(other)) for other in others]
    states.append(MOMENTUM.init(network()))
    own = type(tx.init(start(name)))
    refused = [state for state in states if not isinstance(state, own)]
    assert len(refused) == 5
    for state in refused:
        with pytest.raises(TypeError, match=r"update got a state of the type \w+, but"):
            tx.update(network(1), state, start(name))


def test_saved_numbers_are_what_the_transform_that_takes_them_makes_them():
    soft, hard = (st3jax.st3(MOMENTUM, 0.5, soft=soft) for soft in (True, False))
    params, state = network(), soft.init(network())
    updates, trained = jax.jit(soft.update)(network(1), state, network())
    params = optax.apply_updates(params, updates)
    seen = flat(st3jax.finalize(params, trained))
    template = jax.device_get(hard.init(network()))
    restored = serialization.from_bytes(template, serialization.to_bytes(trained))
    seen_hard = flat(st3jax.finalize(params, restored))
    assert ((seen == 0) == (seen_hard == 0)).all()
    kept = seen != 0
    assert (seen_hard[kept] != seen[kept]).all()
