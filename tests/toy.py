"""A network of two layers and 256 weights, and what trains and compares it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import st3jax


def network(seed=0, dtype=jnp.float32):
    """Of 256 weights, so that the threshold at a sparsity of 0.8 is itself a weight."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "first": {
            "kernel": 0.4 * jax.random.normal(first, (8, 16), dtype),
            "bias": jnp.zeros(16, dtype),
        },
        "second": {
            "kernel": 0.4 * jax.random.normal(second, (16, 8), dtype),
            "bias": jnp.zeros(8, dtype),
        },
    }


def make_batch(seed=0, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(100 + seed), (16, 8), dtype)
    return x, jnp.sin(2 * x)


def loss_fn(weights, batch):
    x, y = batch
    hidden = jax.nn.relu(x @ weights["first"]["kernel"] + weights["first"]["bias"])
    out = hidden @ weights["second"]["kernel"] + weights["second"]["bias"]
    return ((out - y) ** 2).mean()


def make_step(tx, loss_fn=loss_fn, axis_name=None):
    """The two lines of every training loop: sparsify, and update with params."""

    def step(params, opt_state, batch):
        def sparse_loss(params):
            return loss_fn(st3jax.sparsify(params, opt_state), batch)

        grads = jax.grad(sparse_loss)(params)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


class Recorded(NamedTuple):
    """State of :func:`recording`."""

    seen: Any
    inner_state: Any


def recording(inner):
    """The optimizer, which keeps the gradients that it saw in its state.

    They have an axis more than the parameters: no method takes them for momentum.
    """

    def init(params):
        seen = jax.tree.map(lambda w: jnp.zeros_like(w)[None], params)
        return Recorded(seen, inner.init(params))

    def update(grads, state, params=None):
        updates, inner_state = inner.update(grads, state.inner_state, params)
        return updates, Recorded(jax.tree.map(lambda g: g[None], grads), inner_state)

    return optax.GradientTransformation(init, update)


def seen_by_inner(opt_state):
    """The gradients that the recording optimizer inside a method saw last."""
    return pick(st3jax.find_state(opt_state).inner_state.seen, 0)


def trajectory(tx, params, steps, step=None):
    """Yields parameters and optimizer state after each step."""
    step = step or jax.jit(make_step(tx))
    dtype = jax.tree.leaves(params)[0].dtype
    opt_state = tx.init(params)
    for i in range(steps):
        params, opt_state = step(params, opt_state, make_batch(i, dtype))
        yield params, opt_state


def as_numpy(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = as_numpy(x), as_numpy(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(as_numpy(x), as_numpy(y), rtol=rtol, atol=atol)


def stack(tree, n):
    return jax.tree.map(lambda x: jnp.stack([x] * n), tree)


def pick(tree, i):
    return jax.tree.map(lambda x: x[i], tree)
