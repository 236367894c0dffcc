"""The prunable leaves are the kernels of convolutions and dense layers, in any tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct

import st3jax
from st3jax import trees

IMAGES = jnp.ones((2, 8, 8, 4))
WORDS = jnp.ones((2, 5, 4))
QKV = {f"{name}/kernel" for name in ("query", "key", "value", "out")}
LSTM = {f"{a}{b}/kernel" for a in "ih" for b in "figo"}
NNX_LSTM = {path.replace("if/", "if_/") for path in LSTM}

partitioned = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
LINEN = {
    "convolution": (nn.Conv(6, (3, 3)), IMAGES, {"kernel"}),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGES, {"kernel"}),
    "transposed": (nn.ConvTranspose(6, (2, 2)), IMAGES, {"kernel"}),
    "dense": (nn.Dense(3), WORDS, {"kernel"}),
    "general": (nn.DenseGeneral((2, 3)), WORDS, {"kernel"}),
    "einsum": (nn.Einsum((4, 3), "abc,cd->abd"), WORDS, {"kernel"}),
    "attention": (nn.MultiHeadDotProductAttention(2), WORDS, QKV),
    "LSTM": (nn.RNN(nn.LSTMCell(6)), WORDS, {f"cell/{path}" for path in LSTM}),
    "embedding": (nn.Embed(7, 4), jnp.ones((2, 3), int), set()),
    "layer norm": (nn.LayerNorm(), WORDS, set()),
    "group norm": (nn.GroupNorm(2), IMAGES, set()),
    "batch norm": (nn.BatchNorm(use_running_average=False), IMAGES, set()),
    "boxed": (nn.Dense(3, kernel_init=partitioned), WORDS, {"kernel"}),
    "nested": (nn.Sequential([nn.Dense(3), nn.relu]), WORDS, {"layers_0/kernel"}),
}
NNX = {
    "convolution": (functools.partial(nnx.Conv, 3, 4, (3, 3)), {"kernel"}),
    "transposed": (functools.partial(nnx.ConvTranspose, 3, 4, (2, 2)), {"kernel"}),
    "dense": (functools.partial(nnx.Linear, 3, 4), {"kernel"}),
    "general": (functools.partial(nnx.LinearGeneral, 4, (2, 3)), {"kernel"}),
    "attention": (functools.partial(nnx.MultiHeadAttention, 2, 4, 8), QKV),
    "LSTM": (functools.partial(nnx.LSTMCell, 3, 4), NNX_LSTM),
    "embedding": (functools.partial(nnx.Embed, 7, 4), set()),
    "layer norm": (functools.partial(nnx.LayerNorm, 4), set()),
    "group norm": (functools.partial(nnx.GroupNorm, 4, 2), set()),
    "batch norm": (functools.partial(nnx.BatchNorm, 4), set()),
}


class Scanned(nn.Module):
    """Three dense layers as one, with a bias of two axes."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(nn.Dense(4, name="layer"), x, None)[0]


@struct.dataclass
class Attention:
    """A tree with attribute names, one of them called value."""

    query: dict
    value: dict


@struct.dataclass
class Projections:
    """Leaves with attribute names, one of them called value."""

    query: jax.Array
    value: jax.Array


def chosen(params):
    leaves = trees.named_leaves(params)
    return {path for path, leaf in leaves.items() if trees.is_kernel(path, leaf)}


def linen_params(module, x):
    arguments = (x, x) if isinstance(module, nn.MultiHeadDotProductAttention) else (x,)
    return jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]


@pytest.mark.parametrize("name", LINEN)
def test_the_kernels_of_a_linen_layer_are_chosen(name):
    module, x, expected = LINEN[name]
    assert chosen(linen_params(module, x)) == expected


@pytest.mark.parametrize("name", NNX)
def test_the_kernels_of_an_nnx_layer_are_chosen(name):
    layer, expected = NNX[name]
    model = nnx.eval_shape(lambda: layer(rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    assert chosen(state) == chosen(nnx.as_pure(state)) == expected


def test_the_kernels_of_a_scanned_layer_are_chosen():
    params = linen_params(Scanned(), jnp.ones((2, 4)))
    assert params["layer"]["bias"].shape == (3, 4)
    assert chosen(params) == {"layer/kernel"}


def test_a_name_counts_only_as_the_last_of_a_path():
    tree = {"kernel": {"scale": jnp.ones((2, 2))}, "my_kernel": jnp.ones((2, 2))}
    assert chosen(tree) == set()
    assert chosen({"kernel": jnp.ones(3)}) == set()
    assert chosen([{"kernel": jnp.ones((1, 1))}]) == {"0/kernel"}


def test_paths_read_the_same_in_any_container():
    kernel = {"kernel": jnp.ones((2, 2))}
    paths = list(trees.named_leaves(Attention(query=kernel, value=kernel)))
    assert paths == list(trees.named_leaves({"query": kernel, "value": kernel}))
    assert list(trees.named_leaves((kernel, [kernel]))) == ["0/kernel", "1/0/kernel"]


def test_a_leaf_called_value_keeps_its_name_and_can_be_chosen():
    w = jnp.arange(1.0, 5).reshape(2, 2)
    params = {"attention": Projections(query=w, value=w)}
    paths = ["attention/query", "attention/value"]
    assert list(trees.named_leaves(params)) == paths
    assert trees.all_paths(params) == paths

    def values(path, leaf):
        return path == "attention/value"

    pruned = st3jax.prune(params, 0.5, prunable=values)["attention"]
    assert (pruned.query == w).all()
    assert pruned.value.tolist() == [[0, 0], [3, 4]]
    tx = st3jax.st3(optax.sgd(0.0), {"*value": 1.0}, prunable=values)
    _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
    sparse = st3jax.finalize(params, opt_state)["attention"]
    assert (sparse.query == w).all()
    assert not sparse.value.any()


BOXES = {
    "partitioned": lambda w: nn.Partitioned(w, (None,) * w.ndim),
    "logical": lambda w: nn.LogicallyPartitioned(w, (None,) * w.ndim),
    "param": nnx.Param,
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_a_box_is_no_part_of_a_path_and_no_part_of_a_state(box):
    w = jnp.arange(1.0, 7).reshape(2, 3)
    bare = {"layer": {"kernel": w, "bias": jnp.ones(3)}}
    params = jax.tree.map(box, bare)
    assert trees.all_paths(params) == trees.all_paths(bare)
    leaves = trees.named_leaves(params)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        "layer/bias": (3,),
        "layer/kernel": (2, 3),
    }
    tx = st3jax.st3(optax.sgd(0.0), 0.5)
    opt_state = tx.init(params)
    masked = optax.MaskedNode()
    assert opt_state.thresholds == {"layer": {"kernel": -1, "bias": masked}}
    _, opt_state = jax.jit(tx.update)(params, opt_state, params)
    assert jnp.shape(opt_state.thresholds["layer"]["kernel"]) == ()
    sparse = st3jax.finalize(params, opt_state)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    assert int(st3jax.summary(sparse).zeros) == 3


def test_a_boxed_kernel_has_the_name_of_a_bare_one():
    bare = linen_params(nn.Dense(3), WORDS)
    boxed = linen_params(nn.Dense(3, kernel_init=partitioned), WORDS)
    assert list(trees.named_leaves(boxed)) == list(trees.named_leaves(bare))


def test_boxed_and_scanned_kernels_are_pruned_where_they_are():
    boxed = nn.Dense(3, kernel_init=partitioned).init(jax.random.key(0), WORDS)
    for params in (boxed, Scanned().init(jax.random.key(0), jnp.ones((2, 4)))):
        pruned = st3jax.prune(params, 0.5)
        assert jax.tree.structure(pruned) == jax.tree.structure(params)
        assert float(st3jax.summary(pruned).sparsity) == pytest.approx(0.5, abs=0.05)


def test_a_predicate_can_choose_by_path():
    params = {
        name: {"kernel": jnp.arange(1.0, 5).reshape(2, 2), "bias": jnp.ones(2)}
        for name in ("stem", "body", "head")
    }
    asked = []

    def only_body(path, leaf):
        asked.append((path, leaf.shape))
        return trees.is_kernel(path, leaf) and path.split("/")[0] == "body"

    thresholds = st3jax.st3(optax.sgd(0.1), 0.5, prunable=only_body).init(params)
    assert list(trees.named_leaves(thresholds.thresholds)) == ["body/kernel"]
    assert ("stem/bias", (2,)) in asked
    pruned = st3jax.prune(params, 1.0, prunable=only_body)
    zeros = {name: bool((layer["kernel"] == 0).all()) for name, layer in pruned.items()}
    assert zeros == {"stem": False, "body": True, "head": False}


def test_a_predicate_can_choose_by_size():
    params = {"small": jnp.ones((2, 2)), "large": jnp.ones((9, 9))}
    leaves = trees.prunable_leaves(params, lambda path, leaf: leaf.size > 50)
    assert list(leaves) == ["large"]


def test_values_stand_where_their_leaves_are():
    params = [{"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, (jnp.ones(1),)]
    leaves = trees.prunable_leaves(params)
    sizes = trees.per_leaf_tree(params, {path: w.size for path, w in leaves.items()})
    masked = optax.MaskedNode()
    assert sizes == [{"kernel": 6, "bias": masked}, (masked,)]
    times = trees.map_where_prunable(lambda size, leaf: size * leaf, sizes, params)
    assert times[0]["kernel"].tolist() == [[6, 6, 6], [6, 6, 6]]
    assert times[0]["bias"] is params[0]["bias"]
    named = trees.map_named(lambda path, size, leaf: path, sizes, params)
    assert named[0]["kernel"] == "0/kernel"
    assert named[1][0] is params[1][0]
    halves = trees.in_place_of(sizes, {"0/kernel": 0.5})
    assert halves == [{"kernel": 0.5, "bias": masked}, (masked,)]


@pytest.mark.parametrize("container", ["dict", "list", "dataclass", "boxed"])
def test_thresholds_and_params_may_have_any_structure(container):
    kernel = {"kernel": jnp.arange(1.0, 7).reshape(2, 3)}
    params = {
        "dict": {"query": kernel, "value": {"bias": jnp.ones(3)}},
        "list": [kernel, (kernel, {"bias": jnp.ones(3)})],
        "dataclass": Attention(query=kernel, value=kernel),
        "boxed": nn.Dense(3, kernel_init=partitioned).init(jax.random.key(0), WORDS),
    }[container]
    tx = st3jax.st3(optax.sgd(0.0), 0.5)
    _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
    sparse = jax.jit(st3jax.finalize)(params, opt_state)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    n = st3jax.summary(sparse).weights
    assert int(st3jax.summary(sparse).zeros) >= (n - 1) // 2 + 1


def test_a_static_value_is_part_of_the_structure():
    for value in (True, "2:4", (16, 1)):
        static = trees.Static(value)
        assert jax.tree.leaves(static) == []
        assert jax.jit(lambda s: s)(static).value == value
    structures = {jax.tree.structure(trees.Static(value)) for value in (True, False)}
    assert len(structures) == 2


def test_what_is_no_kernel_is_passed_through_as_it_is():
    params = {"kernel": jnp.ones((2, 2)), "step": 3, "key": jax.random.key(0)}
    pruned = st3jax.prune(params, 0.5)
    assert pruned["step"] == 3
    assert pruned["key"] is params["key"]
    assert np.count_nonzero(pruned["kernel"]) == 0


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 4, rngs=rngs)


def nnx_params():
    return nnx.state(Layers(nnx.Rngs(0)), nnx.Param)


DECAYED = {  # parameters, and the paths of those that decay
    "linen": lambda: (
        nn.Sequential([nn.Dense(3), nn.LayerNorm()]).init(jax.random.key(0), WORDS),
        {"params/layers_0/kernel"},
    ),
    "boxed": lambda: (
        nn.Dense(3, kernel_init=partitioned).init(jax.random.key(0), WORDS)["params"],
        {"kernel"},
    ),
    "nnx": lambda: (nnx.as_pure(nnx_params()), {"conv/kernel", "head/kernel"}),
    "nnx boxed": lambda: (nnx_params(), {"conv/kernel", "head/kernel"}),
}


@pytest.mark.parametrize("name", DECAYED)
def test_weight_decay_may_be_of_kernels_alone(name):
    params, expected = DECAYED[name]()
    params = jax.tree.map(jnp.ones_like, params)
    mask = st3jax.kernel_mask(params)
    decay = optax.add_decayed_weights(0.5, mask=st3jax.kernel_mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    decayed = trees.named_leaves(updates)
    assert {path for path, u in decayed.items() if (u == 0.5).all()} == expected
    assert {path for path, u in decayed.items() if (u == 0).all()} == (
        set(decayed) - expected
    )
    assert all(type(chosen) is bool for chosen in jax.tree.leaves(mask))
    shapes = jax.eval_shape(lambda: params)
    assert jax.tree.leaves(st3jax.kernel_mask(shapes)) == jax.tree.leaves(mask)
