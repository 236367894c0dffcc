"""Momentum of removed weights is cleared, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import st3jax
from st3jax.engine.updates import clear_state

SHAPE = (2, 3)
KEPT = jnp.array([[True, False, True], [False, False, True]])
ONES = jnp.ones(SHAPE)
PARAMS = {  # two paths end alike, and one leaf is not prunable
    "kernel": ONES,
    "head": {"kernel": ONES},
    "body": {"kernel": ONES, "bias": ONES},
}
TREE = {
    "kernel": KEPT,
    "head": {"kernel": ONES},
    "body": {"kernel": ~KEPT, "bias": ONES},
}
OPTIMIZERS = {
    "momentum": optax.trace(0.9),
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.sgd(lambda count: 0.1, momentum=0.9)),
    "steps": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
    "masked": optax.masked(
        optax.trace(0.9), {"kernel": True, "head": True, "body": False}
    ),
    "ema": optax.ema(0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_that_an_optimizer_keeps_about_a_removed_weight_is_zero(name):
    state = OPTIMIZERS[name].init(PARAMS)
    full = jax.tree.map(jnp.ones_like, state)
    cleared = clear_state(full, TREE)
    assert jax.tree.structure(cleared) == jax.tree.structure(full)
    seen = 0
    for path, leaf in jax.tree.leaves_with_path(cleared):
        name = st3jax.trees.path_name(path)
        expected = np.ones(leaf.shape, bool)
        if leaf.shape == SHAPE and name.endswith("body/kernel"):
            expected = ~KEPT
        elif leaf.shape == SHAPE and not name.endswith(("head/kernel", "bias")):
            expected, seen = KEPT, seen + 1
        np.testing.assert_array_equal(leaf != 0, expected, name)
        assert leaf.dtype == dict(jax.tree.leaves_with_path(full))[path].dtype
    assert seen


def test_what_has_another_shape_is_left_alone():
    state = {"row": {"kernel": jnp.ones(2)}, "trace": {"kernel": ONES}}
    cleared = clear_state(state, {"kernel": KEPT})
    np.testing.assert_array_equal(cleared["row"]["kernel"], 1)
    np.testing.assert_array_equal(cleared["trace"]["kernel"], KEPT)
