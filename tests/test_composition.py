"""The method composes: with the transforms, shardings and containers around it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
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
    stack,
    trajectory,
)

import st3jax
import st3jax.nnx
from st3jax.rule.rule import Rule
from st3jax.rule.thresholds import leaf_thresholds, select
from st3jax.trees import prunable_leaves

SPARSITY = 0.8
BEGIN, END, FREEZE = 2, 6, 8
RAMP = st3jax.polynomial_ramp(SPARSITY, BEGIN, END)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
DECAYED = optax.chain(optax.add_decayed_weights(0.1), MOMENTUM)
ADAMW = optax.adamw(0.02, weight_decay=0.1)
LOOPS = {"while", "scan", "sort", "top_k", "approx_top_k"}


def train(tx, params, steps, step=None):
    *_, last = trajectory(tx, params, steps, step)
    return last


@functools.cache
def usual():
    """A transform that ramps and freezes, and its jitted step."""
    tx = st3jax.st3(MOMENTUM, RAMP, freeze_step=FREEZE)
    return tx, jax.jit(make_step(tx))


@functools.cache
def usual_run(seed=0):
    """What one device makes of it, after each step."""
    tx, step = usual()
    return jax.device_get(list(trajectory(tx, network(seed), FREEZE + 2, step)))


def zeros(weights):
    return int(st3jax.summary(weights).zeros)


def asked(n, sparsity=SPARSITY):
    return math.floor(sparsity * (n - 1)) + 1


def asked_with_ties(params, sparsity=SPARSITY):
    """How many weights are as small as the last one that has to go, or smaller."""
    size = np.abs(flat(params))
    return int((size <= np.sort(size)[asked(size.size, sparsity) - 1]).sum())


def kernels(params):
    return {layer: np.asarray(params[layer]["kernel"]) for layer in ("first", "second")}


def flat(params):
    return np.concatenate(
        [w.ravel() for w in kernels(params).values()], dtype=np.float64
    )


def zero_set(params):
    return jax.tree.map(lambda w: w == 0, kernels(params))


def thresholds(opt_state):
    return st3jax.find_state(opt_state).thresholds


def split(batch, n):
    return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


# Linen


def test_a_linen_train_state_trains_to_the_exact_sparsity():
    images = jax.random.normal(jax.random.key(0), (16, 6, 6, 2))
    labels = (images.mean((1, 2, 3)) > 0).astype(jnp.int32)
    model = nn.Sequential(
        [nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(len(x), -1), nn.Dense(2)]
    )
    tx = st3jax.st3(MOMENTUM, RAMP)
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        def sparse_loss(params):
            weights = st3jax.sparsify(params, state.opt_state)
            logits = state.apply_fn({"params": weights}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        loss, grads = jax.value_and_grad(sparse_loss)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(25):
        state, loss = train_step(state)
        losses.append(float(loss))
    weights = st3jax.finalize(state.params, state.opt_state)
    report = st3jax.summary(weights)
    assert report.weights == 3 * 3 * 2 * 4 + 6 * 6 * 4 * 2
    assert int(report.zeros) == asked(report.weights)
    assert zeros(state.params) == 0
    assert losses[-1] < 0.7 * losses[0]


# Counts


WRAPPERS = {
    "bare": lambda tx: tx,
    "finite": lambda tx: optax.apply_if_finite(tx, 1),
    "multi": lambda tx: optax.MultiSteps(tx, 1),
}


@pytest.mark.parametrize(
    ("jit_what", "wrap"),
    [
        ("update", "bare"),
        ("update", "multi"),
        ("vmapped update", "bare"),
        ("step", "bare"),
        ("step", "finite"),
    ],
)
def test_the_threshold_belongs_to_the_weights_after_the_step(jit_what, wrap):
    """At 0.8 of 256 weights the threshold is a weight, to the last bit."""
    tx = WRAPPERS[wrap](st3jax.st3(optax.sgd(0.3), SPARSITY))
    update = jax.jit(tx.update) if jit_what == "update" else tx.update
    if jit_what == "vmapped update":
        vmapped = jax.jit(jax.vmap(tx.update))

        def update(*args):
            return pick(vmapped(*stack(args, 1)), 0)

    def step(params, opt_state, grads):
        updates, opt_state = update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step) if jit_what == "step" else step
    params, wrong = network(), []
    opt_state = tx.init(params)
    for i in range(30):
        params, opt_state = step(params, opt_state, network(i))
        t = float(thresholds(opt_state)["first"]["kernel"])
        expected = float(np.sort(np.abs(flat(params)))[asked(256) - 1])
        count = zeros(st3jax.finalize(params, opt_state))
        if t != expected or count != asked_with_ties(params):
            wrong.append((i, t, expected, count))
    assert not wrong


def test_counts_of_zeros_mix_with_plain_numbers():
    report = st3jax.summary(st3jax.prune(network(), SPARSITY))
    assert report.zeros == asked(256)
    assert report.weights - report.zeros == 256 - asked(256)


# Devices


def test_shard_map_with_replicated_weights_equals_one_device():
    tx, _ = usual()
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))

    def mean_loss(weights, batch):
        return jax.lax.pmean(loss_fn(weights, batch), "devices")

    step = jax.shard_map(
        make_step(tx, mean_loss),
        mesh=mesh,
        in_specs=(P(), P(), P("devices")),
        out_specs=P(),
    )
    sharded = trajectory(tx, network(), FREEZE + 2, jax.jit(step))
    for ours, alone in zip(sharded, usual_run(), strict=True):
        assert_close(jax.device_get(ours), alone)
    assert zeros(st3jax.finalize(*jax.device_get(ours))) == asked(256)


def test_shard_map_trains_another_model_on_each_device():
    tx, _ = usual()
    mesh = jax.make_mesh((2,), ("models",), axis_types=(AxisType.Auto,))

    def step(params, opt_state, batch):
        model = pick((params, opt_state), 0)
        return stack(make_step(tx)(*model, batch), 1)

    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("models"), P("models"), P()),
        out_specs=P("models"),
    )
    assert_ensemble_equals_separate_training(jax.jit(step))


def assert_ensemble_equals_separate_training(step):
    tx, _ = usual()
    params = jax.tree.map(lambda *x: jnp.stack(x), network(0), network(1))
    opt_state = jax.vmap(tx.init)(params)
    for i in range(FREEZE + 2):
        params, opt_state = step(params, opt_state, make_batch(i))
        together = jax.device_get((params, opt_state))
        for seed in range(2):
            assert_close(pick(together, seed), usual_run(seed)[i])
    for seed in range(2):
        assert zeros(st3jax.finalize(*pick(together, seed))) == asked(256)


LAYOUTS = {
    "rows_and_columns": (P("rows"), P(None, "columns")),
    "both": (P("rows", "columns"), P("columns", "rows")),
    "eight_rows": (P(("rows", "columns")), P()),
}
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(MESHES[kind],) * 2)


def shard(params, mesh, layout):
    """Places the kernels as the layout says, and biases on every device."""
    specs = {
        layer: {"kernel": spec, "bias": P()}
        for layer, spec in zip(("first", "second"), LAYOUTS[layout], strict=True)
    }
    return jax.tree.map(
        lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), params, specs
    )


def gathered_loss(weights, batch):
    return loss_fn(jax.sharding.reshard(weights, P()), batch)


def selected(params, sparsity):
    """Thresholds and pruned weights by both criteria."""
    leaves, found = prunable_leaves(params), []
    layouts = dict.fromkeys(leaves, "io")
    for rule in (Rule("l1"), Rule("l1_sigma")):
        t = select(rule, leaves, layouts, params, sparsity)
        t = leaf_thresholds(rule, leaves, layouts, t)
        found.append((t, st3jax.prune(params, sparsity, criterion=rule.criterion)))
    return found


@pytest.mark.parametrize("kind", MESHES)
def test_selection_from_sharded_weights_is_bit_identical(kind):
    mesh, jitted = make_mesh(kind), jax.jit(selected)
    with jax.set_mesh(mesh):
        for layout in LAYOUTS:
            params = shard(network(), mesh, layout)
            compiled = jitted.lower(params, SPARSITY).compile()
            for sparsity in (0.37, SPARSITY):
                sharded = jax.device_get(compiled(params, sparsity))
                alone = jax.device_get(jitted(network(), sparsity))
                assert_identical(sharded, alone)
            assert "all-reduce" in compiled.as_text()
            assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("layout", ["rows_and_columns", "both"])
@pytest.mark.parametrize("kind", MESHES)
def test_training_sharded_weights_equals_one_device(kind, layout):
    tx, _ = usual()
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        loss = gathered_loss if kind == "explicit" else loss_fn
        start = shard(network(), mesh, layout)
        step = jax.jit(make_step(tx, loss))
        sharded = list(trajectory(tx, start, FREEZE + 2, step))
    for params, opt_state in sharded:
        for layer in ("first", "second"):
            w, placed = params[layer]["kernel"], start[layer]["kernel"].sharding
            assert w.sharding.is_equivalent_to(placed, w.ndim)
            assert thresholds(opt_state)[layer]["kernel"].is_fully_replicated
    for ours, alone in zip(jax.device_get(sharded), usual_run(), strict=True):
        assert_close(ours, alone)
        assert zeros(st3jax.finalize(*ours)) == zeros(st3jax.finalize(*alone))


def test_linen_partitioning_metadata_shards_weights_and_trains():
    mesh, x = make_mesh("auto"), make_batch()[0]
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", "columns"))
    model, tx = nn.Dense(16, kernel_init=init), st3jax.st3(MOMENTUM, SPARSITY)

    def create():
        params = model.init(jax.random.key(0), x)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @functools.partial(
        jax.jit, out_shardings=nn.get_sharding(jax.eval_shape(create), mesh)
    )
    def train_step(state):
        def sparse_loss(params):
            weights = st3jax.sparsify(params, state.opt_state)
            return (state.apply_fn({"params": weights}, x) ** 2).mean()

        return state.apply_gradients(grads=jax.grad(sparse_loss)(state.params))

    state = train_step(train_step(create()))
    placed = state.params["kernel"].value.sharding
    assert placed.is_equivalent_to(NamedSharding(mesh, P("rows", "columns")), 2)
    weights = nn.unbox(st3jax.finalize(state.params, state.opt_state))
    assert zeros(weights) == asked(128)


# NNX


TOKENS = jax.random.randint(jax.random.key(5), (16, 6), 0, 11)
LABELS = TOKENS[:, 0] % 4


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Embed(11, 8, rngs=rngs),
        nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.Dropout(0.2, rngs=rngs),
        functools.partial(jnp.mean, axis=1),
        nnx.Linear(8, 4, rngs=rngs),
    )


@nnx.jit
def nnx_forward(model):
    return model(TOKENS)


@nnx.jit
def nnx_step(model, optimizer):
    def sparse_loss(model):
        logits = st3jax.nnx.sparsify(model, optimizer)(TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    loss, grads = nnx.value_and_grad(sparse_loss)(model)
    optimizer.update(model, grads)
    return loss


@pytest.fixture(scope="module")
def nnx_run():
    """A trained model, its optimizer, the model before training and the losses."""
    model = nnx.jit(nnx_model)()
    before = nnx.clone(model)
    optimizer = nnx.Optimizer(model, st3jax.st3(MOMENTUM, RAMP), wrt=nnx.Param)
    losses = [float(nnx_step(model, optimizer)) for _ in range(30)]
    return model, optimizer, before, losses


def named_params(model):
    return dict(nnx.to_flat_state(nnx.as_pure(nnx.state(model, nnx.Param))))


def numbers(model):
    return jax.device_get(nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngKey))))


def variables(model):
    return [variable for _, variable in nnx.to_flat_state(nnx.variables(model))]


def test_an_nnx_model_trains_to_the_exact_sparsity(nnx_run):
    model, optimizer, _, losses = nnx_run
    final = st3jax.nnx.finalize(model, optimizer)
    assert zeros(nnx.as_pure(nnx.state(final, nnx.Param))) == asked(4 * 64 + 32)
    assert zeros(nnx.as_pure(nnx.state(model, nnx.Param))) == 0
    assert losses[-1] < 0.7 * losses[0]


def test_nnx_prunes_kernels_of_attention_but_no_biases_and_no_embedding(nnx_run):
    model, optimizer, _, _ = nnx_run
    raw = named_params(model)
    sparse = named_params(st3jax.nnx.finalize(model, optimizer))
    changed = {path for path in raw if not np.array_equal(raw[path], sparse[path])}
    assert changed == {path for path in raw if path[-1] == "kernel"}
    assert len(changed) == 5
    assert sum(path[-1] == "bias" and raw[path].ndim == 2 for path in raw) == 3


def test_nnx_forward_passes_move_statistics_and_streams_of_the_model(nnx_run):
    model, _, before, _ = nnx_run
    assert not np.array_equal(model.layers[2].mean[...], before.layers[2].mean[...])
    assert not np.array_equal(model.layers[2].var[...], before.layers[2].var[...])
    assert int(before.layers[3].rngs.count[...]) == 0
    assert int(model.layers[3].rngs.count[...]) == 30


def test_nnx_finalize_shares_no_variable_with_the_model(nnx_run):
    model, optimizer, _, _ = nnx_run
    final = st3jax.nnx.finalize(model, optimizer)
    assert not {id(v) for v in variables(final)} & {id(v) for v in variables(model)}
    before = numbers(model)
    nnx_forward(final)
    assert_identical(numbers(model), before)


def test_nnx_finalize_works_on_a_model_in_evaluation_mode(nnx_run):
    model, optimizer, _, _ = nnx_run
    model.eval()
    final = st3jax.nnx.finalize(model, optimizer)
    model.train()
    statistics = numbers(final)
    np.testing.assert_array_equal(nnx_forward(final), nnx_forward(final))
    assert_identical(numbers(final), statistics)
    accuracy = (nnx_forward(final).argmax(-1) == LABELS).mean()
    assert accuracy > 0.5


def test_nnx_final_weights_outlive_a_step_that_donates_the_model():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, st3jax.st3(MOMENTUM, SPARSITY), wrt=nnx.Param)
    final = st3jax.nnx.finalize(model, optimizer)
    nnx.jit(lambda model: None, donate_argnums=0)(model)
    assert jnp.isfinite(final(jnp.ones((1, 8)))).all()


def test_nnx_partitioning_metadata_shards_weights_and_trains():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", "columns"))
    x = make_batch()[0]

    @nnx.jit
    def create():
        model = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
        tx = st3jax.st3(MOMENTUM, SPARSITY)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        specs = nnx.get_partition_spec(state)
        nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, specs))
        return model, optimizer

    @nnx.jit
    def train_step(model, optimizer):
        def sparse_loss(model):
            return (st3jax.nnx.sparsify(model, optimizer)(x) ** 2).mean()

        optimizer.update(model, nnx.grad(sparse_loss)(model))

    mesh = make_mesh("auto")
    with jax.set_mesh(mesh):
        model, optimizer = create()
        train_step(model, optimizer)
        placed = model.kernel[...].sharding
        assert placed.is_equivalent_to(NamedSharding(mesh, P("rows", "columns")), 2)
        final = st3jax.nnx.finalize(model, optimizer)
        assert zeros(nnx.as_pure(nnx.state(final, nnx.Param))) == asked(128)


# Optax


def test_multi_steps_equals_one_step_on_the_mean_gradient():
    tx = st3jax.st3(MOMENTUM, SPARSITY)
    many = optax.MultiSteps(tx, 2)
    params, opt_state = network(), many.init(network())
    once, once_state = network(), tx.init(network())
    update, update_once = jax.jit(many.update), jax.jit(tx.update)
    for i in range(3):
        grads = network(2 * i + 1), network(2 * i + 2)
        still = thresholds(opt_state)
        updates, opt_state = update(grads[0], opt_state, params)
        assert_identical(thresholds(opt_state), still)
        assert_identical(optax.apply_updates(params, updates), params)
        updates, opt_state = update(grads[1], opt_state, params)
        params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        updates, once_state = update_once(mean, once_state, once)
        once = optax.apply_updates(once, updates)
        assert_close((params, thresholds(opt_state)), (once, thresholds(once_state)))


def test_an_injected_learning_rate_can_be_changed_between_steps():
    tx = optax.inject_hyperparams(
        lambda learning_rate: st3jax.st3(optax.sgd(learning_rate), RAMP)
    )(learning_rate=0.1)
    step = jax.jit(make_step(tx))
    params, opt_state = train(tx, network(), END, step)
    assert zeros(st3jax.finalize(params, opt_state)) == asked(256)
    opt_state.hyperparams["learning_rate"] = jnp.zeros_like(
        opt_state.hyperparams["learning_rate"]
    )
    still, opt_state = step(params, opt_state, make_batch())
    assert_identical(still, params)
    assert step._cache_size() == 1


def test_an_injected_sparsity_can_be_changed_between_steps():
    inject = optax.inject_hyperparams(st3jax.st3, static_args=("prunable",))
    tx = inject(MOMENTUM, SPARSITY)
    step = jax.jit(make_step(tx))
    params, opt_state = train(tx, network(), 2, step)
    for sparsity in (np.float32(0.8), np.float32(0.3), np.float32(0.0)):
        opt_state.hyperparams["sparsity"] = jnp.asarray(sparsity)
        params, opt_state = step(params, opt_state, make_batch())
        found = zeros(st3jax.finalize(params, opt_state))
        assert found == (asked(256, np.float64(sparsity)) if sparsity else 0)
    assert step._cache_size() == 1


def test_an_injected_freeze_step_may_stay_static():
    static = ("prunable", "update_every", "freeze_step")
    inject = optax.inject_hyperparams(st3jax.st3, static_args=static)
    tx = inject(MOMENTUM, SPARSITY, update_every=2, freeze_step=5)
    frozen, later = list(trajectory(tx, network(), 8))[4::3]
    assert zeros(frozen[0]) == asked(256)
    assert_identical(zero_set(frozen[0]), zero_set(later[0]))


def test_masked_leaves_the_masked_part_alone():
    tx = optax.chain(
        optax.masked(st3jax.st3(MOMENTUM, RAMP), {"first": True, "second": False}),
        optax.masked(optax.set_to_zero(), {"first": False, "second": True}),
    )
    params, opt_state = train(tx, network(), END)
    weights = st3jax.finalize(params, opt_state)
    assert_identical(weights["second"], network()["second"])
    assert zeros(weights) == zeros(weights["first"]) == asked(128)


def test_partition_prunes_the_part_with_its_label():
    tx = optax.partition(
        {"sparse": st3jax.st3(MOMENTUM, RAMP), "dense": optax.adam(0.01)},
        {"first": "dense", "second": "sparse"},
    )
    params, opt_state = train(tx, network(), END)
    weights = st3jax.finalize(params, opt_state)
    assert_identical(weights["first"], params["first"])
    assert zeros(weights) == zeros(weights["second"]) == asked(128)
    assert (params["first"]["kernel"] != network()["first"]["kernel"]).any()


def test_wrappers_nested_in_one_another_train_to_the_exact_sparsity():
    inject = optax.inject_hyperparams(
        lambda learning_rate: st3jax.st3(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(learning_rate)),
            RAMP,
            freeze_step=FREEZE,
        )
    )
    chained = optax.chain(inject(learning_rate=0.1))
    tx = optax.MultiSteps(optax.apply_if_finite(chained, 3), 2)
    run = list(trajectory(tx, network(), 2 * FREEZE + 2))
    assert zeros(st3jax.finalize(*run[2 * END - 1])) == asked(256)
    assert_identical(zero_set(run[2 * FREEZE - 1][0]), zero_set(run[-1][0]))


def test_two_transforms_in_one_optimizer_are_refused():
    one = st3jax.st3(MOMENTUM, SPARSITY)
    chained = optax.chain(one, one)
    inside = st3jax.st3(optax.chain(optax.identity(), one), SPARSITY)
    labels = {"first": "a", "second": "b"}
    for tx in (chained, inside, optax.partition({"a": one, "b": one}, labels)):
        with pytest.raises(ValueError, match="holds 2 sparse-training states"):
            st3jax.sparsify(network(), tx.init(network()))


def test_optax_map_params_reaches_the_inner_state_and_no_threshold():
    tx, _ = usual()
    opt_state = tx.init(network())
    mapped = optax.tree.map_params(tx, lambda x: x + 1, opt_state)
    ones = jax.tree.map(jnp.ones_like, network())
    assert_identical(mapped.inner_state[0].trace, ones)
    assert_identical(mapped.thresholds, opt_state.thresholds)
    assert_identical(mapped.count, opt_state.count)


def test_schedule_free_inside_gives_sparse_weights_to_train_and_to_evaluate():
    tx = st3jax.st3(optax.contrib.schedule_free_sgd(0.3, b1=0.9), RAMP)
    params, opt_state = train(tx, network(), 40)
    assert zeros(st3jax.finalize(params, opt_state)) == asked(256)
    inner_state = st3jax.find_state(opt_state).inner_state
    average = optax.contrib.schedule_free_eval_params(inner_state, params)
    pruned = st3jax.prune(average, SPARSITY)
    assert zeros(pruned) == asked(256)
    untrained = st3jax.prune(network(), SPARSITY)
    assert loss_fn(pruned, make_batch()) < loss_fn(untrained, make_batch())


# Transformations and compilation


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("make", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_no_two_leaves_of_a_state_share_a_buffer(make):
    tx = st3jax.st3(MOMENTUM, SPARSITY)
    opt_state = make(tx.init)(network())
    assert len(set(pointers(opt_state))) == len(pointers(opt_state))
    _, opt_state = make(tx.update)(network(1), opt_state, network())
    assert len(set(pointers(opt_state))) == len(pointers(opt_state))


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("width", [8, 4096])
def test_the_state_takes_bytes_a_leaf_and_none_a_weight(width, pattern):
    layer = {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float64)}
    params = {f"layer_{i}": layer for i in range(100)}
    tx = st3jax.st3(optax.sgd(0.1), 0.5, pattern=pattern, freeze_step=FREEZE)
    with jax.enable_x64(True):
        state = jax.eval_shape(tx.init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size <= 1000 + 16 * 100


@pytest.mark.parametrize("completed", [4, FREEZE + 1])
def test_gradients_pass_zeroed_weights_with_or_without_remat(
    completed,
):
    params, opt_state = usual_run()[completed - 1]
    zeroed = flat(st3jax.finalize(params, opt_state)) == 0

    def sparse_loss(params):
        return loss_fn(st3jax.sparsify(params, opt_state), make_batch())

    plain = jax.jit(jax.grad(sparse_loss))(params)
    remat = jax.jit(jax.grad(jax.checkpoint(sparse_loss)))(params)
    assert_close(remat, plain, rtol=1e-6, atol=1e-7)
    assert (flat(plain)[~zeroed] != 0).sum() > 20
    assert (flat(plain)[zeroed] != 0).any()


def primitives(jaxpr, in_branch=False):
    """Yields each primitive and whether it lies inside a branch."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, in_branch
        for value in jax.tree.leaves(eqn.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, in_branch or eqn.primitive.name == "cond")


@pytest.mark.parametrize("freeze_step", [None, FREEZE])
@pytest.mark.parametrize("criterion", ["l1", "l1_sigma"])
def test_while_the_asked_sparsity_is_zero_nothing_is_selected(criterion, freeze_step):
    tx = st3jax.st3(MOMENTUM, RAMP, criterion=criterion, freeze_step=freeze_step)
    params = network()
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    found = set(primitives(jaxpr.jaxpr))
    assert not LOOPS & {name for name, in_branch in found if not in_branch}
    assert LOOPS & {name for name, in_branch in found if in_branch}


def test_the_compiled_step_selects_without_a_branch_and_without_a_sort():
    tx = st3jax.st3(MOMENTUM, RAMP)
    params = network()
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    text = compiled.as_text()
    assert " while(" in text
    assert " conditional(" not in text
    assert " sort(" not in text


# Saving


def test_the_pruned_average_of_effective_weights_has_the_exact_sparsity():
    average = network()
    for params, opt_state in usual_run():
        weights = st3jax.finalize(params, opt_state)
        average = optax.incremental_update(weights, average, 0.3)
    assert zeros(average) == 0
    assert zeros(st3jax.prune(average, SPARSITY)) == asked(256)


# Freezing


INNERS = {"momentum": MOMENTUM, "decayed": DECAYED, "adamw": ADAMW}


@functools.cache
def frozen_and_twin(name):
    """A run with a fixed mask from step 8 on, and the one without up to there."""
    frozen = st3jax.st3(INNERS[name], RAMP, freeze_step=FREEZE)
    twin = st3jax.st3(INNERS[name], RAMP)
    return (
        jax.device_get(list(trajectory(frozen, network(), FREEZE + 6))),
        jax.device_get(list(trajectory(twin, network(), FREEZE))),
    )


@pytest.mark.parametrize("name", INNERS)
def test_at_the_freeze_the_weights_become_the_effective_weights(name):
    run, twin = frozen_and_twin(name)
    for ours, others in zip(run[: FREEZE - 1], twin, strict=False):
        assert_close(ours[0], others[0], rtol=1e-5, atol=1e-6)
    expected = jax.device_get(st3jax.finalize(*twin[-1]))
    assert_close(run[FREEZE - 1][0], expected, rtol=1e-5, atol=1e-6)
    assert_identical(zero_set(run[FREEZE - 1][0]), zero_set(expected))
    assert zeros(run[FREEZE - 1][0]) == asked(256)


@pytest.mark.parametrize("name", INNERS)
def test_after_the_freeze_zeros_stay_and_other_weights_train_on(name):
    run, _ = frozen_and_twin(name)
    fixed = run[FREEZE - 1][0]
    for params, opt_state in run[FREEZE:]:
        assert_identical(zero_set(params), zero_set(fixed))
        assert_identical(jax.device_get(st3jax.finalize(params, opt_state)), params)
    assert (flat(params) != flat(fixed)).sum() == 256 - asked(256)


def test_a_kept_weight_that_is_sent_onto_zero_stays_kept():
    tx = st3jax.st3(optax.sgd(1.0), SPARSITY, freeze_step=1)
    update = jax.jit(tx.update)
    params, opt_state = network(), tx.init(network())
    updates, opt_state = update(network(1), opt_state, params)
    fixed = params = optax.apply_updates(params, updates)
    for _ in range(3):
        updates, opt_state = update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert_identical(zero_set(params), zero_set(fixed))


def test_freezing_counts_the_real_steps_of_multi_steps():
    tx = optax.MultiSteps(st3jax.st3(DECAYED, RAMP, freeze_step=FREEZE), 2)
    run = jax.device_get(list(trajectory(tx, network(), 2 * FREEZE + 4)))
    *before, at_freeze = run[: 2 * FREEZE]
    assert zeros(before[-1][0]) == 0
    assert zeros(st3jax.finalize(*before[-1])) == asked(256)
    assert zeros(at_freeze[0]) == asked(256)
    for i, (params, _) in enumerate(run[2 * FREEZE :]):
        assert_identical(zero_set(params), zero_set(at_freeze[0]))
        same = (flat(params) == flat(run[2 * FREEZE + i - 1][0])).all()
        assert same == (i % 2 == 0)


# Low precision


def ramp_at(step):
    left = min(max(END - step, 0), END - BEGIN) / (END - BEGIN)
    return SPARSITY * (1 - left**3)


@functools.cache
def low_precision_run(dtype, freeze_step):
    tx = st3jax.st3(DECAYED, RAMP, freeze_step=freeze_step)
    run = []
    for params, opt_state in trajectory(tx, network(dtype=dtype), FREEZE + 6):
        assert params["first"]["kernel"].dtype == dtype
        assert all(jnp.isfinite(w).all() for w in jax.tree.leaves(params))
        run.append(jax.device_get((params, st3jax.finalize(params, opt_state))))
    return run


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_weights_are_counted_exactly_along_the_ramp(dtype):
    for i, (params, weights) in enumerate(low_precision_run(dtype, None)):
        sparsity = ramp_at(i + 1)
        expected = asked_with_ties(params, sparsity) if sparsity else 0
        assert zeros(weights) == expected
        assert expected >= asked(256, sparsity) or sparsity == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_zeros_are_exact_after_the_freeze(dtype):
    twin = low_precision_run(dtype, None)[FREEZE - 1]
    *_, fixed = frozen = low_precision_run(dtype, FREEZE)[FREEZE - 1 :]
    for params, weights in frozen:
        assert_identical(zero_set(params), zero_set(twin[1]))
        assert_identical(weights, params)
    assert (flat(fixed[0]) != flat(frozen[0][0])).sum() > 20
