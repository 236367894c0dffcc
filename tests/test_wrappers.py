"""Which wrappers go inside a method and which outside, and how misuse is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import st3jax

STEPS, SPARSITY = 12, 0.8
RAMP = st3jax.polynomial_ramp(SPARSITY, 1, 6)
RATE = 0.05


def network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (16, 12))},
        "second": {
            "kernel": jax.random.normal(keys[1], (12, 8)),
            "bias": jax.random.normal(keys[2], (8,)),
        },
    }


WEIGHTS = 16 * 12 + 12 * 8
ASKED = int(SPARSITY * (WEIGHTS - 1)) + 1


def zeros(weights):
    return int(st3jax.summary(weights).zeros)


@functools.cache
def step_of(tx):
    @jax.jit
    def step(params, opt_state, target):
        def loss_fn(params):
            w = st3jax.sparsify(params, opt_state)
            parts = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), w, target)
            return sum(jax.tree.leaves(parts))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, grad=grads, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), opt_state

    return step


def train(tx, steps=STEPS):
    tx = optax.with_extra_args_support(tx)
    params = network()
    opt_state, step = tx.init(params), step_of(tx)
    for i in range(steps):
        params, opt_state = step(params, opt_state, network(100 + i))
    return params, opt_state


SGD = optax.sgd(RATE, momentum=0.9)
INSIDE = {
    "clipping": optax.chain(optax.clip_by_global_norm(1.0), SGD),
    "weight decay": optax.adamw(0.02, weight_decay=0.1),
    "scaling": optax.chain(optax.scale_by_adam(), optax.scale(-0.02)),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1, b1=0.9),
    "dog": optax.contrib.dog(1.0),
}
OUTSIDE = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"first": True, "second": True}),
    "chain before": lambda tx: optax.chain(optax.clip(1.0), tx),
}


@pytest.mark.parametrize("freeze_step", [None, 8])
@pytest.mark.parametrize("name", INSIDE)
def test_what_goes_inside_ends_exact(name, freeze_step):
    tx = st3jax.st3(INSIDE[name], RAMP, freeze_step=freeze_step)
    assert zeros(st3jax.finalize(*train(tx))) == ASKED


@pytest.mark.parametrize("freeze_step", [None, 5])
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_goes_outside_ends_exact(name, freeze_step):
    ramp = st3jax.polynomial_ramp(SPARSITY, 1, 4)
    tx = OUTSIDE[name](st3jax.st3(SGD, ramp, freeze_step=freeze_step))
    assert zeros(st3jax.finalize(*train(tx))) == ASKED


WRONG = {
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1, b1=0.9),
    "scaling": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.01)),
}


@pytest.mark.parametrize("freeze_step", [None, 8])
@pytest.mark.parametrize("name", WRONG)
def test_what_belongs_inside_is_told_from_outside(name, freeze_step):
    tx = WRONG[name](st3jax.st3(SGD, RAMP, freeze_step=freeze_step))
    params, opt_state = train(tx)
    if freeze_step and name != "schedule_free" and zeros(params) == ASKED:
        return  # a scaled update of a zero is none
    with pytest.raises(ValueError, match=r"last seen.*0\.8 was asked for.*inside"):
        st3jax.finalize(params, opt_state)


def lookahead(freeze_step):
    """Both sets of weights of lookahead around a method, and the state."""
    inner = st3jax.st3(SGD, RAMP, freeze_step=freeze_step)
    tx = optax.lookahead(inner, sync_period=3, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(network())
    opt_state = tx.init(both)

    @jax.jit
    def step(both, opt_state, target):
        def loss_fn(fast):
            w = st3jax.sparsify(fast, opt_state)
            parts = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), w, target)
            return sum(jax.tree.leaves(parts))

        updates, opt_state = tx.update(jax.grad(loss_fn)(both.fast), opt_state, both)
        return optax.apply_updates(both, updates), opt_state

    for i in range(STEPS):
        both, opt_state = step(both, opt_state, network(100 + i))
    return both, opt_state


@pytest.mark.parametrize("freeze_step", [None, 8])
def test_lookahead_inside_ends_exact(freeze_step):
    slow_and_fast = optax.lookahead(SGD, sync_period=3, slow_step_size=0.5)
    inner = optax.GradientTransformation(
        slow_and_fast.init, lambda g, s, p: slow_and_fast.update(g.fast, s, p)
    )

    def is_fast_kernel(path, leaf):
        return path.startswith("fast/") and st3jax.is_kernel(path, leaf)

    tx = st3jax.st3(inner, RAMP, prunable=is_fast_kernel, freeze_step=freeze_step)
    both = optax.LookaheadParams.init_synced(network())
    opt_state = tx.init(both)

    @jax.jit
    def step(both, opt_state, target):
        def loss_fn(both):
            w = st3jax.sparsify(both, opt_state).fast
            parts = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), w, target)
            return sum(jax.tree.leaves(parts))

        updates, opt_state = tx.update(jax.grad(loss_fn)(both), opt_state, both)
        return optax.apply_updates(both, updates), opt_state

    for i in range(STEPS):
        both, opt_state = step(both, opt_state, network(100 + i))
    sparse = st3jax.finalize(both, opt_state)
    assert zeros(sparse.fast) == ASKED
    assert zeros(sparse.slow) == 0


@pytest.mark.parametrize("freeze_step", [None, 8])
def test_lookahead_outside_is_told(freeze_step):
    both, opt_state = lookahead(freeze_step)
    for params in both:
        with pytest.raises(ValueError, match="last seen"):
            st3jax.finalize(params, opt_state)


@pytest.mark.parametrize("soft", [True, False])
def test_a_second_finalize_is_told_where_it_would_change_weights(soft):
    params, opt_state = train(st3jax.st3(SGD, RAMP, soft=soft, rescale=soft))
    once = st3jax.finalize(params, opt_state)
    if soft:
        for fn in (st3jax.finalize, st3jax.summary):
            with pytest.raises(ValueError, match=r"last seen.*finalized already"):
                fn(once, opt_state)
    else:
        twice = st3jax.finalize(once, opt_state)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, once, twice))


METHODS = {
    "st3": st3jax.st3(SGD, RAMP),
    "ste": st3jax.ste(SGD, RAMP),
    "gmp": st3jax.gmp(SGD, RAMP),
    "by path": st3jax.st3(SGD, {"*": RAMP}),
    "str_": st3jax.str_(SGD, threshold_optimizer=optax.sgd(0.1), initial=0.0),
    "uniform": st3jax.gmp(SGD, RAMP, distribution="uniform"),
}


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_another_model_or_step_are_told(name):
    params, opt_state = train(METHODS[name])
    st3jax.finalize(params, opt_state)
    averaged = jax.tree.map(lambda w, v: 0.9 * w + 0.1 * v, params, network())
    earlier, _ = train(METHODS[name], STEPS - 1)
    exchanged = jax.tree.map(lambda w: w[::-1], params)
    for others in (network(7), averaged, earlier, exchanged):
        if others is not exchanged:  # the same weights elsewhere add up to the same
            with pytest.raises(ValueError, match="last seen"):
                st3jax.finalize(others, opt_state)


def test_fixed_masks_averages_of_them_and_tracing_stay_silent():
    tx = st3jax.st3(SGD, RAMP, freeze_step=7)
    (params, opt_state), (before, _) = train(tx), train(tx, STEPS - 1)
    average = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, params, before)
    assert zeros(st3jax.finalize(average, opt_state)) == ASKED
    raw = train(st3jax.st3(SGD, RAMP))
    for name in ("finalize", "sparsify"):
        fn = getattr(st3jax, name)
        traced = jax.jit(fn)(network(3), raw[1])
        assert jax.tree.structure(traced) == jax.tree.structure(network())
    assert zeros(st3jax.sparsify(network(3), raw[1])) > 0
    assert zeros(st3jax.prune(average, SPARSITY)) == ASKED


def test_finalize_of_nnx_tells_as_well():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, st3jax.st3(SGD, SPARSITY), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    sparse = st3jax.nnx.finalize(model, optimizer)
    assert zeros({"kernel": sparse.kernel[...]}) == int(SPARSITY * 23) + 1
    with pytest.raises(ValueError, match="last seen"):
        st3jax.nnx.finalize(sparse, optimizer)


def test_scaled_and_reordered_weights_are_told():
    """A factor of two adds the same to the bits of each weight, which may wrap."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    stack = {
        "kernel": params["kernel"].reshape(4, 32, 32)
        * jnp.arange(1.0, 5)[:, None, None]
    }
    layout = {"kernel": "sio"}
    tx = {
        "one": (st3jax.st3(SGD, SPARSITY), params, lambda w: 2 * w),
        "half": (st3jax.st3(SGD, SPARSITY), params, lambda w: 0.5 * w),
        "stack": (
            st3jax.st3(SGD, SPARSITY, distribution="uniform", layout=layout),
            stack,
            lambda w: w[::-1],
        ),
    }
    for method, weights, change in tx.values():
        still = jax.tree.map(jnp.zeros_like, weights)
        _, opt_state = jax.jit(method.update)(still, method.init(weights), weights)
        st3jax.finalize(weights, opt_state)
        with pytest.raises(ValueError, match="last seen"):
            st3jax.finalize(jax.tree.map(change, weights), opt_state)


def test_a_skipped_step_that_turns_minus_zero_is_no_other_step():
    params = {"kernel": jnp.array([[-0.0, 1.0, 2.0, 3.0]])}
    tx = optax.apply_if_finite(st3jax.st3(SGD, 0.5), 3)
    opt_state = tx.init(params)
    for slope in (0.0, float("nan")):
        grads = {"kernel": jnp.full((1, 4), slope)}
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert zeros(st3jax.finalize(params, opt_state)) == 2


def test_zeros_that_are_held_are_told_from_dense_weights():
    sparse = st3jax.prune(network(), SPARSITY)
    opt_state = st3jax.hold_zeros(SGD).init(sparse)
    assert zeros(st3jax.finalize(sparse, opt_state)) == ASKED
    with pytest.raises(ValueError, match="last seen"):
        st3jax.finalize(network(), opt_state)


def test_nothing_is_told_while_nothing_is_asked_for():
    tx = st3jax.st3(SGD, st3jax.polynomial_ramp(SPARSITY, 20, 30))
    _, opt_state = train(tx)
    assert zeros(st3jax.finalize(network(5), opt_state)) == 0
    assert zeros(st3jax.finalize(network(5), tx.init(network()))) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_weights_of_every_step_are_known_in_any_dtype(dtype):
    tx = st3jax.st3(SGD, RAMP, freeze_step=9)
    params = jax.tree.map(lambda w: w.astype(dtype), network())
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for i in range(STEPS):
        grads = jax.tree.map(lambda w: w.astype(dtype), network(50 + i))
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        st3jax.finalize(params, opt_state)


def test_one_integer_and_one_number_name_the_weights_and_what_was_asked():
    _, opt_state = train(st3jax.st3(SGD, RAMP))
    assert (opt_state.seen.shape, opt_state.seen.dtype) == ((), jnp.int32)
    np.testing.assert_allclose(opt_state.sparsity, SPARSITY, rtol=1e-6)


SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "lbfgs without a search": optax.lbfgs(0.1, linesearch=None),
    "backtracking": optax.chain(SGD, optax.scale_by_backtracking_linesearch(5)),
    "zoom": optax.chain(SGD, optax.scale_by_zoom_linesearch(5)),
}


@pytest.mark.parametrize("method", [st3jax.st3, st3jax.ste])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_along_straight_through_gradients_is_refused(name, method):
    with pytest.raises(ValueError, match=r"State: L-BFGS and line searches.*adam"):
        method(SEARCHES[name], SPARSITY).init(network())


def test_a_search_along_true_slopes_is_not():
    tx = st3jax.gmp(optax.lbfgs(), SPARSITY)
    assert zeros(st3jax.finalize(*train(tx, 3))) == ASKED
