"""One-shot pruning removes exactly what was asked, the smallest first."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import st3jax

KERNELS = {"Conv_0": (3, 3, 2, 4), "Dense_0": (8, 5), "Dense_1": (5, 2)}
SIZE = sum(math.prod(shape) for shape in KERNELS.values())
CRITERIA = ("l1", "l1_sigma")

each_criterion = pytest.mark.parametrize("criterion", CRITERIA)
few = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
sparsities = st.floats(0, 1, exclude_min=True) | st.sampled_from([0.8, 0.9, 0.95, 1.0])
prune_jit = jax.jit(st3jax.prune, static_argnames="criterion")


def network(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2, size=len(KERNELS))
    return {
        name: {
            "kernel": (rng.normal(size=shape) * s).astype(dtype),
            "bias": np.zeros(shape[-1:], dtype),
        }
        for (name, shape), s in zip(KERNELS.items(), scale, strict=True)
    }


def prune(params, sparsity, criterion="l1"):
    """Pruning with a sparsity that is traced in float64."""
    with jax.enable_x64(True):
        pruned = prune_jit(params, np.float64(sparsity), criterion=criterion)
        return jax.tree.map(np.asarray, pruned)


def kernels(params):
    return [params[name]["kernel"] for name in KERNELS]


def zeros_of(params):
    return np.concatenate([kernel.ravel() == 0 for kernel in kernels(params)])


def scores(params, criterion):
    """By brute force, in the precision of the library."""
    parts = []
    for kernel in kernels(params):
        factor = math.sqrt(sum(kernel.shape)) if criterion == "l1_sigma" else 1.0
        size = np.abs(kernel).ravel()
        parts.append(size * size.dtype.type(factor))
    return np.concatenate(parts)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@each_criterion
def test_exactly_the_smallest_scores_are_pruned(criterion):
    @few
    @given(seeds, sparsities)
    def check(seed, sparsity):
        params = network(seed)
        size = scores(params, criterion)
        k = math.floor(sparsity * (SIZE - 1))
        expected = size <= np.sort(size)[k]
        np.testing.assert_array_equal(
            zeros_of(prune(params, sparsity, criterion)), expected
        )
        if len(np.unique(size)) == SIZE:
            assert expected.sum() == k + 1

    check()


@each_criterion
def test_float64_weights_are_cut_in_float64(criterion):
    params = network(0, np.float64)
    size = scores(params, criterion)
    for sparsity in (0.1, 0.5, 0.9, 0.95):
        zeros = zeros_of(prune(params, sparsity, criterion))
        k = math.floor(sparsity * (SIZE - 1))
        np.testing.assert_array_equal(zeros, size <= np.sort(size)[k])


@each_criterion
def test_kept_weights_and_biases_are_untouched(criterion):
    @few
    @given(seeds, sparsities)
    def check(seed, sparsity):
        params = network(seed)
        pruned = prune(params, sparsity, criterion)
        for name in KERNELS:
            before, after = params[name]["kernel"], pruned[name]["kernel"]
            np.testing.assert_array_equal(after, np.where(after == 0, 0, before))
            assert not np.signbit(after[after == 0]).any()
            np.testing.assert_array_equal(pruned[name]["bias"], params[name]["bias"])

    check()


def test_sparsity_0_leaves_every_bit():
    rare = np.array([[0.0, -0.0, 1e-45, np.nan, -np.inf, 1.0]], np.float32)
    for w in (rare, rare[:, 2:], network(0)["Dense_0"]["kernel"]):
        for pruned in (st3jax.prune({"kernel": w}, 0), prune({"kernel": w}, 0.0)):
            assert np.asarray(pruned["kernel"]).tobytes() == w.tobytes()


@pytest.mark.parametrize("sparsity", [1e-300, 1e-46, 1e-40, 1e-30, 1e-9])
def test_the_least_sparsity_prunes_the_smallest_weight(sparsity):
    w = jnp.array([[1.0, -2.0, 3.0]])
    assert st3jax.prune({"kernel": w}, sparsity)["kernel"].tolist() == [[0, -2, 3]]


@each_criterion
def test_sparsity_1_prunes_everything(criterion):
    params = network(0)
    assert zeros_of(st3jax.prune(params, 1, criterion=criterion)).all()
    assert zeros_of(st3jax.prune(params, 1.0, criterion=criterion)).all()
    inf = st3jax.prune({"kernel": jnp.array([[jnp.inf, 1.0]])}, 1.0)
    assert inf["kernel"].tolist() == [[0, 0]]


@each_criterion
def test_pruning_again_changes_nothing(criterion):
    @few
    @given(seeds, sparsities)
    def check(seed, sparsity):
        once = prune(network(seed), sparsity, criterion)
        assert_equal(prune(once, sparsity, criterion), once)

    check()


@each_criterion
def test_more_sparsity_prunes_more_of_the_same(criterion):
    @few
    @given(seeds, sparsities, sparsities)
    def check(seed, one, other):
        less, more = sorted([one, other])
        params = network(seed)
        first, second = prune(params, less, criterion), prune(params, more, criterion)
        assert (zeros_of(first) <= zeros_of(second)).all()
        assert_equal(prune(first, more, criterion), second)

    check()


@each_criterion
def test_only_relative_magnitudes_count(criterion):
    @few
    @given(seeds, sparsities, st.sampled_from([2.0**-20, -1.0, -(2.0**30)]))
    def check(seed, sparsity, factor):
        params = network(seed)
        scaled = jax.tree.map(lambda w: w * np.float32(factor), params)
        expected = prune(params, sparsity, criterion)
        actual = prune(scaled, sparsity, criterion)
        assert_equal(actual, jax.tree.map(lambda w: w * np.float32(factor), expected))

    check()


def test_a_concrete_sparsity_is_like_a_traced_one():
    params = network(1)
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        assert_equal(st3jax.prune(params, sparsity), prune(params, sparsity))


def test_ties_are_pruned_together():
    w = jnp.array([[1.0, -1.0, 1.0, 2.0, -2.0, 3.0]])
    assert st3jax.prune({"kernel": w}, 0.1)["kernel"].tolist() == [[0, 0, 0, 2, -2, 3]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_keep_their_dtype(dtype):
    w = jnp.arange(1.0, 13).reshape(3, 4).astype(dtype)
    pruned = st3jax.prune({"kernel": w}, 0.5)["kernel"]
    assert pruned.dtype == dtype
    assert pruned.tolist() == [[0, 0, 0, 0], [0, 0, 7, 8], [9, 10, 11, 12]]


def test_a_predicate_chooses_what_is_pruned():
    params = network(2)
    pruned = st3jax.prune(params, 1.0, prunable=lambda path, leaf: "Dense_1" in path)
    assert [kernel.any() for kernel in kernels(pruned)] == [True, True, False]
