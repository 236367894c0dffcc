"""What a step is written as for a GPU computes what it does anywhere else.

No GPU is asked for: the same operations, on a CPU.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import st3jax
from st3jax import fingerprint, ops
from st3jax.engine import updates
from st3jax.selection import bit_search, quantile

rng = np.random.default_rng(0)
PARAMS = {
    "conv": {"kernel": rng.standard_normal((3, 3, 8, 16)).astype(np.float32)},
    "dense": {"kernel": rng.standard_normal((16, 10)).astype(np.float32)},
    "head": {"kernel": rng.standard_normal((10, 4)), "bias": np.zeros(4, np.float32)},
}
PARAMS["head"]["kernel"] = PARAMS["head"]["kernel"].astype(jnp.bfloat16)


@pytest.fixture
def as_on_a_gpu():
    """Takes a GPU's way at every fork, as for arrays that are whole."""

    def of_cuda(*args, cuda, **others):
        return cuda(*args)

    jax.clear_caches()
    with (
        mock.patch.object(jax.lax, "platform_dependent", of_cuda),
        mock.patch.object(bit_search, "MANY", 1000),
        mock.patch.object(quantile, "are_whole", return_value=True),
        mock.patch.object(fingerprint, "are_whole", return_value=True),
        mock.patch.object(updates, "are_whole", return_value=True),
    ):
        yield
    jax.clear_caches()


def trained(**options):
    """Thresholds and names of weights after each step, and the weights at the end."""
    tx = st3jax.st3(
        optax.sgd(0.1, momentum=0.9),
        sparsity=st3jax.polynomial_ramp(0.9, 0, 6),
        **options,
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        def loss_fn(params):
            leaves = jax.tree.leaves(st3jax.sparsify(params, opt_state))
            return sum(jnp.sum((w.astype(jnp.float32) - 0.3) ** 2) for w in leaves)

        grads = jax.grad(loss_fn)(params)
        changes, after = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), after

    seen = []
    for _ in range(8):
        params, opt_state = step(params, opt_state)
        seen.append(jax.device_get((opt_state.thresholds, opt_state.seen)))
    return seen, jax.device_get(st3jax.sparsify(params, opt_state))


@pytest.fixture(scope="module")
def here():
    """The same as on a CPU, before anything is put in its place."""
    return trained(rescale=False)


def test_a_step_has_the_same_bits(here, as_on_a_gpu):
    there = trained(rescale=False)
    jax.tree.map(np.testing.assert_array_equal, there, here)


def test_both_means_of_a_channel_are_one_reduction(as_on_a_gpu):
    w, t = PARAMS["conv"]["kernel"], jnp.float32(0.7)
    scale = jax.jit(ops.channel_scale, static_argnames="layout")
    text = scale.lower(w, t).as_text()
    assert text.count("stablehlo.reduce(") == 1
    size = np.abs(w)
    r = (np.where(size > 0.7, size, 0).mean((0, 1, 2)) + 1e-6) / (
        size.mean((0, 1, 2)) + 1e-6
    )
    np.testing.assert_allclose(scale(w, t), 1.01 / (r + 0.01), rtol=1e-5)
    assert scale(w, t, layout="wwio").shape == (1, 1, 1, 16)


def test_the_name_of_weights_is_the_same(as_on_a_gpu):
    leaves = jax.tree.leaves(PARAMS)
    leaves = [jnp.asarray(w) for w in leaves if jnp.ndim(w) > 1] * 20  # of two groups
    for frozen in (False, True):
        each = [fingerprint._of_leaf(w, jnp.array(frozen), "") for w in leaves]
        joined = jax.jit(fingerprint._of_joined)(leaves, jnp.array(frozen))
        assert joined == fingerprint._times_odd(jnp.stack(each))


def test_updates_are_put_in_the_order_of_weights_if_those_are_whole(as_on_a_gpu):
    pin = jax.jit(lambda w: updates.pin(w, jnp.int32(3)))
    w = PARAMS["conv"]["kernel"]
    assert "LayoutConstraint" in pin.lower(w).as_text()
    np.testing.assert_array_equal(pin(w), w)
    batched = jax.vmap(pin, in_axes=2, out_axes=2)(w)
    np.testing.assert_array_equal(batched, w)
