"""Loops in the ways of others train under the lines that docs/loops.md adds to them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import st3jax
import st3jax.nnx

STEPS, SPARSITY = 40, 0.75
RAMP = st3jax.polynomial_ramp(SPARSITY, begin=4, end=24)
X = jax.random.normal(jax.random.key(0), (64, 8))
LABELS = jnp.argmax(X[:, :4] + X[:, 4:], axis=-1)
TOKENS = (jnp.arange(16)[:, None] + jnp.arange(9)) % 5


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def asked_for(n):
    return int(SPARSITY * (n - 1)) + 1


def check(weights, losses, evaluated, **options):
    """Zeros are exact and as many as asked for; training and evaluation got better."""
    report = st3jax.summary(weights, **options)
    assert int(report.zeros) == asked_for(report.weights)
    assert report.vanished() == []
    assert losses[-1] < losses[0]
    assert evaluated < losses[0]


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(not train, momentum=0.9)(nn.Dense(16)(x))
        return nn.Dense(4)(nn.relu(x))


class State(TrainState):
    batch_stats: dict


def trained(tx, params, loss_fn):
    """A loop over plain pytrees: weights, state and losses at the end."""
    opt_state, losses = tx.init(params), []

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(
            lambda params: loss_fn(st3jax.sparsify(params, opt_state))
        )(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for _ in range(STEPS):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    return params, opt_state, losses


@pytest.mark.parametrize("parallel", [False, True], ids=["jit", "pmap"])
def test_a_linen_loop_with_a_penalty_on_the_raw_weights(parallel):
    model = Classifier()
    variables = model.init(jax.random.key(1), X)
    tx = st3jax.st3(optax.sgd(0.05, momentum=0.9, nesterov=True), RAMP)
    state = State.create(apply_fn=model.apply, tx=tx, **variables)
    batch = (X, LABELS)

    def mean(values):
        return lax.pmean(values, "batch") if parallel else values

    def train_step(state, batch):
        x, labels = batch

        def loss_fn(params):
            w = st3jax.sparsify(params, state.opt_state)
            logits, updated = state.apply_fn(
                {"params": w, "batch_stats": state.batch_stats},
                x,
                mutable=["batch_stats"],
            )
            kernels = [w for w in jax.tree.leaves(params) if w.ndim > 1]
            penalty = 0.5e-3 * sum(jnp.sum(w**2) for w in kernels)
            return cross_entropy(logits, labels) + penalty, (updated, penalty)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (updated, penalty)), grads = grad_fn(state.params)
        stats = mean(updated["batch_stats"])
        state = state.apply_gradients(grads=mean(grads), batch_stats=stats)
        return state, mean(loss), mean(penalty)

    def eval_step(state, batch):
        w = st3jax.finalize(state.params, state.opt_state)
        variables = {"params": w, "batch_stats": state.batch_stats}
        logits = state.apply_fn(variables, batch[0], train=False)
        return mean(cross_entropy(logits, batch[1]))

    if parallel:
        devices = jax.local_device_count()
        batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        compiled = functools.partial(
            jax.pmap, in_axes=(None, 0), out_axes=None, axis_name="batch"
        )
    else:
        compiled = jax.jit
    train_step, eval_step = compiled(train_step), compiled(eval_step)
    losses, norm = [], 0.0
    for _ in range(STEPS):
        leaves = jax.tree.leaves(state.params)
        norm = sum(float((w**2).sum()) for w in leaves if w.ndim > 1)
        state, loss, penalty = train_step(state, batch)
        losses.append(float(loss))
        assert float(penalty) == pytest.approx(0.5e-3 * norm, rel=1e-5)
    weights = st3jax.finalize(state.params, state.opt_state)
    check(weights, losses, float(eval_step(state, batch)))


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def test_an_nnx_loop_with_metrics_that_evaluates_a_finalized_model():
    model = Perceptron(nnx.Rngs(0))
    tx = st3jax.st3(optax.adamw(0.02), RAMP, layout=st3jax.nnx.layouts(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))

    def loss_fn(model):
        return cross_entropy(model(X), LABELS)

    @nnx.jit
    def train_step(model, optimizer, metrics):
        def sparse_loss(model):
            return loss_fn(st3jax.nnx.sparsify(model, optimizer))

        loss, grads = nnx.value_and_grad(sparse_loss)(model)
        metrics.update(loss=loss)
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics):
        metrics.update(loss=loss_fn(model))

    losses = []
    for _ in range(STEPS):
        train_step(model, optimizer, metrics)
        losses.append(float(metrics.compute()["loss"]))
        metrics.reset()
    assert float(abs(model.norm.mean[...]).max()) > 0
    sparse_model = st3jax.nnx.finalize(model, optimizer)
    sparse_model.eval()
    eval_step(sparse_model, metrics)
    weights = nnx.as_pure(nnx.state(sparse_model, nnx.Param))
    check(weights, losses, float(metrics.compute()["loss"]))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")
        x = x + attention(x, mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(nn.Embed(5, 8)(tokens), None)
        return nn.Dense(5, name="head")(x)


def test_a_language_model_of_scanned_blocks_that_accumulates_gradients():
    model = LanguageModel()
    params = model.init(jax.random.key(2), TOKENS[:, :-1])["params"]

    def apply_fn(params, tokens):
        return model.apply({"params": params}, tokens)

    def loss_fn(w, tokens):
        return cross_entropy(apply_fn(w, tokens[:, :-1]), tokens[:, 1:])

    layout = st3jax.layouts(apply_fn, params, TOKENS[:, :-1])
    assert layout["blocks/attention/query/kernel"] == "sioo"
    assert layout["blocks/attention/out/kernel"] == "siio"
    assert layout["blocks/up/kernel"] == "sio"
    tx = st3jax.st3(optax.adam(0.01), RAMP, distribution="uniform", layout=layout)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state):
        w = st3jax.sparsify(params, opt_state)  # once for all parts of the batch

        def accumulate(total, tokens):
            loss, grads = jax.value_and_grad(loss_fn)(w, tokens)
            return jax.tree.map(jnp.add, total, grads), loss

        parts, zeros = TOKENS.reshape(2, 8, 9), jax.tree.map(jnp.zeros_like, params)
        grads, losses = lax.scan(accumulate, zeros, parts)
        grads = jax.tree.map(lambda g: g / 2, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses.mean()

    losses = []
    for _ in range(STEPS):
        params, opt_state, loss = train_step(params, opt_state)
        losses.append(float(loss))
    weights = st3jax.finalize(params, opt_state)
    for path, layer in st3jax.summary(params, opt_state).layers.items():
        stacked = 3 if path.startswith("blocks") else 1
        each = [asked_for(layer.weights // stacked)] * stacked
        assert jnp.ravel(layer.each).tolist() == each, path
    assert losses[-1] < losses[0]
    assert float(loss_fn(weights, TOKENS)) < losses[0]


def test_weights_that_are_stored_out_in_and_functions_among_them():
    def linear(key, inputs, outputs):
        w = jax.random.normal(key, (outputs, inputs)) / inputs**0.5
        return {"weight": w, "bias": jnp.zeros(outputs)}

    keys = jax.random.split(jax.random.key(3), 3)
    embedding = {"weight": jax.random.normal(keys[2], (5, 8))}
    model = [embedding, linear(keys[0], 8, 16), jax.nn.relu, linear(keys[1], 16, 5)]

    def is_array(leaf):
        return isinstance(leaf, jax.Array)

    def partition(model):
        arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, model)
        return arrays, jax.tree.map(lambda x: None if is_array(x) else x, model)

    def combine(*trees):
        return jax.tree.map(
            lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
            *trees,
            is_leaf=lambda leaf: leaf is None,
        )

    def is_weight(path, leaf):
        return path.endswith("weight") and leaf.ndim >= 2 and path != "0/weight"

    params, static = partition(model)

    def apply_fn(params, tokens):
        embedding, hidden, activation, head = combine(params, static)
        x = jnp.take(embedding["weight"], tokens, axis=0)
        x = activation(x @ hidden["weight"].T + hidden["bias"])
        return x @ head["weight"].T + head["bias"]

    def loss_fn(params):
        return cross_entropy(apply_fn(params, TOKENS[:, :-1]), TOKENS[:, 1:])

    layout = st3jax.layouts(apply_fn, params, TOKENS, prunable=is_weight)
    assert layout["1/weight"] == layout["3/weight"] == "oi"
    tx = st3jax.st3(optax.adam(0.02), RAMP, prunable=is_weight, layout=layout)
    params, opt_state, losses = trained(tx, params, loss_fn)
    weights = st3jax.finalize(params, opt_state)
    assert jnp.array_equal(weights[0]["weight"], params[0]["weight"])
    check(weights, losses, float(loss_fn(weights)), prunable=is_weight, layout=layout)
    with pytest.raises(ValueError, match="'2' is no array"):
        st3jax.sparsify(combine(params, static), opt_state)


def test_a_list_of_variables_with_their_paths_as_names():
    shapes = {"dense/kernel": (8, 16), "dense/bias": (16,), "dense_1/kernel": (16, 4)}
    keys = jax.random.split(jax.random.key(4), len(shapes))
    paths = list(shapes)
    variables = [
        jax.random.normal(key, shape) / 4
        for key, shape in zip(keys, shapes.values(), strict=True)
    ]

    def stateless_call(variables, x):
        hidden, bias, head = variables
        return jax.nn.relu(x @ hidden + bias) @ head

    with pytest.raises(ValueError, match="none of the 3 leaves"):
        st3jax.st3(optax.sgd(0.1), RAMP).init(variables)
    params = dict(zip(paths, variables, strict=True))
    tx = st3jax.st3(optax.sgd(0.3, momentum=0.9), RAMP)

    def loss_fn(w):
        return cross_entropy(stateless_call([w[path] for path in paths], X), LABELS)

    params, opt_state, losses = trained(tx, params, loss_fn)
    weights = st3jax.finalize(params, opt_state)
    check(weights, losses, float(loss_fn(weights)))
