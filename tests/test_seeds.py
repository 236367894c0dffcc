"""Random numbers for every weight: as many, as even and as independent as expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from st3jax.engine.seeds import key_of, numbers_for, seed_of

KEY = key_of(seed_of(jax.random.key(5)), 3)
SHAPES = {"a": (40, 50), "b": (3, 3, 20, 10), "c": (50, 40), "d": (7,), "e": ()}
LEAVES = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
EMPTY = {"none": jnp.zeros((0, 3)), "at all": jnp.zeros((3, 0)), "kernel": jnp.ones(2)}


def flat(numbers):
    return np.concatenate([np.ravel(x) for x in numbers.values()])


@pytest.mark.parametrize("each", [1, 2])
def test_every_weight_gets_its_own_numbers_between_zero_and_one(each):
    numbers = numbers_for(KEY, LEAVES, each)
    for path, shape in SHAPES.items():
        assert numbers[path].shape == (each, *shape)
        assert numbers[path].dtype == jnp.float32
    drawn = flat(numbers)
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    # Of 5,808 numbers among 2**23, one or two pairs are the same by chance.
    assert len(np.unique(drawn)) > drawn.size - 20


def test_the_numbers_are_even_and_know_nothing_of_each_other():
    leaves = {path: jnp.zeros((200, 100)) for path in "ab"}
    numbers = numbers_for(KEY, leaves, 2)
    of_four = np.concatenate([numbers[path].reshape(2, -1) for path in "ab"])
    counts = np.histogram(of_four, bins=20, range=(0, 1))[0]
    assert (abs(counts - of_four.size / 20) < 5 * np.sqrt(of_four.size / 20)).all()
    correlated = np.corrcoef(of_four) - np.eye(4)
    assert abs(correlated).max() < 5 / np.sqrt(of_four.shape[1])


def test_empty_leaves_have_none():
    numbers = numbers_for(KEY, EMPTY, 2)
    assert [x.shape for x in numbers.values()] == [(2, 0, 3), (2, 3, 0), (2, 2)]


def test_another_key_gives_other_numbers_and_the_same_key_the_same():
    again, other = numbers_for(KEY, LEAVES), numbers_for(jax.random.key(1), LEAVES)
    assert (flat(numbers_for(KEY, LEAVES)) == flat(again)).all()
    assert (flat(other) == flat(again)).mean() < 0.01


def test_they_are_the_same_under_jit_and_vmap_and_where_leaves_are_sharded():
    expected = flat(numbers_for(KEY, LEAVES, 2))
    assert (flat(jax.jit(lambda: numbers_for(KEY, LEAVES, 2))()) == expected).all()
    keys = jnp.stack([jax.random.key(0), KEY])
    both = jax.vmap(lambda key: numbers_for(key, LEAVES, 2))(keys)
    assert (flat({path: x[1] for path, x in both.items()}) == expected).all()
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    for first, last in (("x", None), (None, "x")):
        with jax.set_mesh(mesh):
            placed = NamedSharding(mesh, P(None, first, last))
            drawn = jax.jit(
                lambda: numbers_for(KEY, {"a": LEAVES["a"]}, 2)["a"],
                out_shardings=placed,
            )()
        assert drawn.sharding.is_equivalent_to(placed, 3)
        assert (np.ravel(drawn) == expected[: drawn.size]).all()
