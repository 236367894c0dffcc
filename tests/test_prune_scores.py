"""Pruning by scores of one's own: the smallest go, and the rest is not touched."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import st3jax

SHAPES = {"Conv_0": (3, 3, 2, 4), "Dense_0": (8, 12), "Dense_1": (16, 4)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
SIZE = sum(SIZES.values())
DENSE = ("Dense_0", "Dense_1")
few = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**32 - 1)


def tree(seed, dtype=np.float32, names=tuple(SHAPES)):
    """Numbers of either sign, with a bias beside each kernel."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": rng.normal(size=SHAPES[name]).astype(dtype),
            "bias": np.ones(SHAPES[name][-1], np.float32),
        }
        for name in names
    }


def kernels(params):
    return {name: np.asarray(layer["kernel"]) for name, layer in params.items()}


def flat(params):
    return np.concatenate([w.ravel() for w in kernels(params).values()])


def asked(n, sparsity):
    return math.floor(sparsity * (n - 1)) + 1 if sparsity else 0


def assert_untouched(params, pruned):
    """Weights that stay have their bits, those that go are +0.0; biases all stay."""
    for name, w in kernels(params).items():
        after = kernels(pruned)[name]
        assert after.dtype == w.dtype
        gone = (after == 0) & (w != 0)
        assert np.where(gone, w, after).tobytes() == w.tobytes()
        assert not np.signbit(after[gone]).any()
        np.testing.assert_array_equal(pruned[name]["bias"], params[name]["bias"])


@functools.cache
def pruning(**options):
    return jax.jit(
        lambda params, s, scores: st3jax.prune(params, s, scores=scores, **options)
    )


def prune(params, sparsity, scores, **options):
    """With a sparsity that is traced in float64."""
    with jax.enable_x64(True):
        found = pruning(**options)(params, np.float64(sparsity), scores)
        return jax.tree.map(np.asarray, found)


# Counts


@few
@given(seeds, st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 1.0]) | st.floats(0.01, 1))
def test_exactly_the_weights_of_the_smallest_scores_go(seed, sparsity):
    params, scores = tree(seed), tree(seed + 1)
    pruned = prune(params, sparsity, scores)
    size = np.abs(flat(scores))
    count = asked(SIZE, sparsity)
    expected = size <= np.sort(size)[count - 1] if count else np.zeros(SIZE, bool)
    assert expected.sum() == count
    np.testing.assert_array_equal(flat(pruned) == 0, expected)
    assert_untouched(params, pruned)


def test_magnitudes_as_scores_are_pruning_by_magnitude():
    params = tree(0)
    for options in (
        {},
        {"distribution": "uniform"},
        {"distribution": "erk"},
        {"pattern": (2, 2)},
        {"costs": {f"{name}/kernel": 2 + len(name) for name in SHAPES}},
    ):
        own = st3jax.prune(params, 0.7, **options)
        scored = st3jax.prune(params, 0.7, scores=params, **options)
        jax.tree.map(np.testing.assert_array_equal, scored, own)
    dense = tree(0, names=DENSE)
    own, scored = (
        st3jax.prune(dense, 0.5, pattern="2:4", scores=scores)
        for scores in (None, dense)
    )
    jax.tree.map(np.testing.assert_array_equal, scored, own)


def test_scores_of_zero_are_scores_although_the_weights_are_not_zero():
    params = {"kernel": np.arange(1.0, 9, dtype=np.float32)[None]}
    scores = {"kernel": np.array([[0, -0.0, 3, 0, 1e-45, 2, 5, 4]], np.float32)}
    kept = [[0, 0, 3, 0, 5, 6, 7, 8]]
    for sparsity in (0.01, 0.3, 2 / 7):
        found = st3jax.prune(params, sparsity, scores=scores)["kernel"]
        assert found.tolist() == kept
    assert st3jax.prune(params, 0, scores=scores)["kernel"].tolist() == [
        list(range(1, 9))
    ]


def test_nan_is_the_largest_score_and_all_can_go():
    params = {"kernel": np.array([[1.0, 2, 3, 4]], np.float32)}
    scores = {"kernel": np.array([[np.nan, 1.0, np.inf, -2.0]], np.float32)}
    for sparsity, kept in ((0.34, [1, 0, 3, 0]), (0.67, [1, 0, 0, 0]), (1, [0] * 4)):
        found = st3jax.prune(params, sparsity, scores=scores)["kernel"]
        assert found.tolist() == [kept]


def test_weights_that_are_zero_stay_zero_and_rare_ones_keep_their_bits():
    rare = np.array([[0.0, -0.0, 1e-45, np.nan, -np.inf, 7.0]], np.float32)
    scores = {"kernel": np.array([[5.0, 4, 3, 2, 1, 0]], np.float32)}
    found = np.asarray(st3jax.prune({"kernel": rare}, 0.1, scores=scores)["kernel"])
    assert found[:, :5].tobytes() == rare[:, :5].tobytes()
    assert found[0, 5] == 0


def test_ties_go_together():
    params = {"kernel": np.array([[1.0, 2, 3, 4, 5, 6]], np.float32)}
    scores = {"kernel": np.array([[2.0, 1, -1, 1, 2, 3]], np.float32)}
    found = st3jax.prune(params, 0.1, scores=scores)["kernel"]
    assert found.tolist() == [[1, 0, 0, 0, 5, 6]]


@pytest.mark.parametrize("scored", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_scores_have_a_dtype_of_their_own(dtype, scored):
    params = {"kernel": jnp.full((4, 4), -3.0, dtype)}
    scores = {"kernel": jnp.arange(16.0).reshape(4, 4).astype(scored)}
    found = st3jax.prune(params, 0.5, scores=scores)["kernel"]
    assert found.dtype == dtype
    assert found.ravel().tolist() == [0.0] * 8 + [-3.0] * 8


def test_float64_scores_of_one_leaf_are_compared_as_they_are():
    near = 1.0 + np.array([[0, 0.75, 1.25, 3]]) * 2.0**-23  # 0.75 would round up
    params = {name: {"kernel": np.ones((1, 4), np.float32)} for name in "ab"}
    scores = {
        "a": {"kernel": near},
        "b": {"kernel": np.array([[1.0, 1 + 2.0**-23, 0, 2]], np.float32)},
    }
    with jax.enable_x64(True):
        pruned = st3jax.prune(params, 3 / 7, scores=scores)
    assert pruned["a"]["kernel"].tolist() == [[0, 0, 1, 1]]
    assert pruned["b"]["kernel"].tolist() == [[0, 1, 0, 1]]


# Layers


@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        (0.6, {"distribution": "uniform"}),
        ({"Dense_1/*": 0.25, "*": 0.75}, {}),
    ],
    ids=["uniform", "mapping"],
)
def test_each_layer_has_its_own_count(sparsity, options):
    params, scores = tree(2), tree(3)
    pruned = st3jax.prune(params, sparsity, scores=scores, **options)
    for name, w in kernels(pruned).items():
        s = sparsity
        if not options:
            s = 0.25 if name == "Dense_1" else 0.75
        size = np.abs(scores[name]["kernel"])
        cut = np.sort(size.ravel())[asked(SIZES[name], s) - 1]
        np.testing.assert_array_equal(w == 0, size <= cut)
    assert_untouched(params, pruned)


def test_stacked_kernels_are_cut_one_by_one():
    rng = np.random.default_rng(0)
    w, scores = (rng.normal(size=(3, 8, 4)).astype(np.float32) for _ in range(2))
    scores *= np.array([1.0, 10, 100], np.float32)[:, None, None]
    for options in ({"distribution": "uniform"}, {"pattern": "2:4"}):
        found = st3jax.prune(
            {"kernel": w},
            0.5,
            scores={"kernel": scores},
            layout={"kernel": "sio"},
            **options,
        )["kernel"]
        for i in range(3):
            alone = st3jax.prune(
                {"kernel": w[i]}, 0.5, scores={"kernel": scores[i]}, **options
            )["kernel"]
            np.testing.assert_array_equal(found[i], alone)
            assert (alone == 0).sum() == 16


def test_an_output_can_be_a_kernel_of_its_own():
    """As Wanda compares: within each output, of a dense layer and of a convolution."""
    params, scores = tree(4), tree(5)
    pruned = st3jax.prune(
        params,
        0.5,
        scores=scores,
        distribution="uniform",
        layout={"Conv_*": "wwis", "*": "is"},
    )
    for name, w in kernels(pruned).items():
        size = np.abs(scores[name]["kernel"]).reshape(-1, w.shape[-1])
        cut = np.sort(size, axis=0)[asked(len(size), 0.5) - 1]
        np.testing.assert_array_equal(w.reshape(size.shape) == 0, size <= cut)
    assert_untouched(params, pruned)


def test_costs_count_by_scores():
    params, scores = tree(6), tree(7)
    costs = {"Conv_0/kernel": 5, "Dense_0/kernel": 1, "Dense_1/kernel": 2}
    pruned = st3jax.prune(params, 0.6, scores=scores, costs=costs)
    each = np.concatenate(
        [np.full(n, costs[f"{name}/kernel"]) for name, n in SIZES.items()]
    )
    size = np.abs(flat(scores))
    order = np.argsort(size)
    reached = np.cumsum(each[order]) >= asked(each.sum(), 0.6)
    cut = size[order][np.argmax(reached)]
    np.testing.assert_array_equal(flat(pruned) == 0, size <= cut)


# Patterns


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_of_every_group_exactly_as_many_stay_by_scores(pattern):
    keep = int(pattern[0])
    params = tree(8, names=DENSE)
    scores = jax.tree.map(np.round, tree(9, names=DENSE))  # many zeros and ties
    pruned = st3jax.prune(params, 1 - keep / 4, pattern=pattern, scores=scores)
    for name, w in kernels(pruned).items():
        live = (w != 0).reshape(-1, 4, w.shape[1])
        assert (live.sum(1) == keep).all()
        size = np.abs(scores[name]["kernel"]).reshape(live.shape)
        first = np.argsort(-size, axis=1, kind="stable")[:, :keep]
        expected = np.zeros_like(live)
        np.put_along_axis(expected, first, True, axis=1)
        np.testing.assert_array_equal(live, expected)
    assert_untouched(params, pruned)


@pytest.mark.parametrize("options", [{}, {"distribution": "uniform"}])
def test_blocks_go_by_the_sum_of_their_scores(options):
    params, scores = tree(10, names=("Dense_0",)), tree(11, names=("Dense_0",))
    scores["Dense_0"]["kernel"][0, :] = 0
    pruned = st3jax.prune(params, 0.5, pattern=(2, 3), scores=scores, **options)
    blocks = np.abs(scores["Dense_0"]["kernel"]).reshape(4, 2, 4, 3).sum((1, 3))
    kept = blocks > np.sort(blocks.ravel())[asked(16, 0.5) - 1]
    live = (kernels(pruned)["Dense_0"] != 0).reshape(4, 2, 4, 3)
    np.testing.assert_array_equal(
        live, np.broadcast_to(kept[:, None, :, None], live.shape)
    )
    assert_untouched(params, pruned)


def test_blocks_of_zero_scores_go():
    params = {"kernel": np.ones((4, 4), np.float32)}
    scores = {"kernel": np.zeros((4, 4), np.float32)}
    scores["kernel"][0, 0] = 2
    found = st3jax.prune(params, 0.2, pattern=(2, 2), scores=scores)["kernel"]
    assert found.tolist() == [[1, 1, 0, 0]] * 2 + [[0] * 4] * 2


# What comes in


def test_other_leaves_may_be_anything():
    params, scores = tree(12), tree(13)
    expected = st3jax.prune(params, 0.5, scores=scores)
    for other in (None, optax.MaskedNode(), 0.0, "none"):
        for name in SHAPES:
            scores[name]["bias"] = other
        found = st3jax.prune(params, 0.5, scores=scores)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_boxes_may_be_around_weights_or_scores():
    params, scores = tree(14), tree(15)
    expected = st3jax.prune(params, 0.5, scores=scores)

    def boxed(tree):
        return jax.tree.map(lambda w: nn.Partitioned(w, (None,) * w.ndim), tree)

    for ours, theirs in ((boxed(params), scores), (params, boxed(scores))):
        found = nn.unbox(st3jax.prune(ours, 0.5, scores=theirs))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gradients_pass_as_without_scores():
    params, scores = tree(16), tree(17)

    def total(params, scores):
        pruned = st3jax.prune(params, 0.5, scores=scores)
        return sum(layer["kernel"].sum() for layer in pruned.values())

    to_weights, to_scores = jax.grad(total, (0, 1))(params, scores)
    assert (flat(to_weights) == 1).all()
    assert (flat(to_scores) == 0).all()


@pytest.mark.parametrize("options", [{}, {"pattern": (2, 2)}], ids=["any", "blocks"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_and_scores_are_cut_as_whole_ones(kind, options):
    params, scores = tree(18, names=DENSE), tree(19, names=DENSE)
    expected = st3jax.prune(params, 0.5, scores=scores, **options)
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind,) * 2)
    placed = {2: NamedSharding(mesh, P("rows", "columns")), 1: NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        params, scores = jax.tree.map(
            lambda w: jax.device_put(w, placed[w.ndim]), (params, scores)
        )
        found = jax.jit(
            lambda params, scores: st3jax.prune(params, 0.5, scores=scores, **options)
        )(params, scores)
    assert found["Dense_0"]["kernel"].sharding.is_equivalent_to(placed[2], 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
