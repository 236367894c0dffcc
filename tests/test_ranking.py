"""Exactly the largest so many of one array, whatever is in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st3jax.selection.ranking import largest

SIZE = 12
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
SCORES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 1e-45, -3e-45, 1e-40, 6e-8]
)
jitted = jax.jit(lambda scores, count, among: largest(scores, count, among=among))


def expected(scores, count, among):
    """By a sort of magnitudes in Python, NaN first, then the flat index."""
    size = [np.inf if np.isnan(x) else abs(float(x)) for x in scores]
    order = sorted(
        np.flatnonzero(among), key=lambda i: (not np.isnan(scores[i]), -size[i], i)
    )
    return [i in order[: max(count, 0)] for i in range(len(scores))]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(SCORES, min_size=SIZE, max_size=SIZE),
    st.integers(-1, SIZE + 2),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
)
def test_the_largest_are_taken_and_ties_go_by_position(dtype, scores, count, among):
    with jax.enable_x64(dtype == jnp.float64):
        values = np.array(scores).astype(dtype)
        found = jitted(jnp.asarray(values), count, jnp.asarray(among))
        assert found.tolist() == expected(values.astype(np.float64), count, among)


def test_an_array_of_any_shape_is_ranked_by_flat_index():
    scores = jnp.ones((2, 3, 2))
    found = largest(scores, 5, among=scores > 0)
    assert found.shape == scores.shape
    assert found.ravel().tolist() == [True] * 5 + [False] * 7


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3)])
def test_scalars_and_empty_arrays_are_ranked_too(shape):
    found = largest(jnp.zeros(shape), 1, among=jnp.ones(shape, bool))
    assert found.shape == shape
    assert found.all()


def test_each_of_a_batch_has_its_own_count():
    scores = jax.random.normal(jax.random.key(0), (3, 7))
    counts = jnp.array([0, 2, 7])
    found = jax.vmap(lambda x, k: largest(x, k, among=x == x))(scores, counts)
    assert found.sum(1).tolist() == [0, 2, 7]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"among has shape \(3,\), but scores have"):
        largest(jnp.ones((2, 3)), 1, among=jnp.ones(3, bool))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        largest(jnp.arange(3), 1, among=jnp.ones(3, bool))
