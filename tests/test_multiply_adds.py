"""Multiply-adds are found in the computation, whatever layers it was written with."""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import st3jax
from models.resnet import cifar_resnet, imagenet_resnet
from st3jax.trees import named_leaves

KEY = jax.random.key(0)


def images(size=8, channels=4, batch=1):
    return jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)


def counted(module, x):
    """Multiply-adds of a Linen module by path, each leaf's together."""
    variables = jax.eval_shape(module.init, KEY, x)
    costs = st3jax.multiply_adds(module.apply, variables, x)
    leaves = named_leaves(variables)
    return {
        path.removeprefix("params/"): cost * leaves[path].size
        for path, cost in costs.items()
    }


def total(module, x):
    return sum(counted(module, x).values())


CONVOLUTIONS = {  # on 8 x 8 images of 4 channels, with the products by hand
    "3x3": (nn.Conv(6, (3, 3)), 64 * 9 * 4 * 6),
    "1x1": (nn.Conv(6, (1, 1)), 64 * 4 * 6),
    "strided": (nn.Conv(6, (3, 3), strides=2), 16 * 9 * 4 * 6),
    "valid": (nn.Conv(6, (3, 3), padding="VALID"), 36 * 9 * 4 * 6),
    "dilated": (nn.Conv(6, (3, 3), kernel_dilation=2), 64 * 9 * 4 * 6),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), 64 * 9 * 2 * 6),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), 64 * 9 * 4),
    "multiplied depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), 64 * 9 * 8),
    "transposed": (nn.ConvTranspose(6, (2, 2), strides=(2, 2)), 64 * 4 * 4 * 6),
    "not shared": (nn.ConvLocal(6, (3, 3)), 64 * 9 * 4 * 6),
    "dense on every pixel": (nn.Dense(6), 64 * 4 * 6),
    "einsum": (nn.Einsum((4, 6), "bhwc,cd->bhwd"), 64 * 4 * 6),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_costs_what_its_loops_would(name):
    layer, expected = CONVOLUTIONS[name]
    assert counted(layer, images()) == {"kernel": expected}
    assert counted(layer, images(batch=3)) == {"kernel": 3 * expected}


def test_a_one_dimensional_and_a_three_dimensional_convolution():
    signal = jax.ShapeDtypeStruct((1, 10, 4), jnp.float32)
    video = jax.ShapeDtypeStruct((1, 3, 5, 7, 2), jnp.float32)
    assert total(nn.Conv(6, (3,)), signal) == 10 * 3 * 4 * 6
    assert total(nn.Conv(6, (3, 3, 3)), video) == 3 * 5 * 7 * 27 * 2 * 6


def test_in_a_transposed_grouped_convolution_an_input_meets_its_group_alone():
    def model(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    params = {"kernel": jnp.ones((2, 2, 2, 6))}
    expected = 64 * 4 * (2 * 2 * 3) // params["kernel"].size
    assert st3jax.multiply_adds(model, params, images()) == {"kernel": expected}


def test_attention_counts_its_projections_and_not_its_products_of_activations():
    tokens = jax.ShapeDtypeStruct((1, 5, 8), jnp.float32)
    layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    each = 5 * 8 * 6
    assert counted(layer, tokens) == {
        f"{name}/kernel": each for name in ("query", "key", "value", "out")
    }


def test_an_embedding_costs_nothing_until_it_multiplies():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 3)
            return embed.attend(embed(tokens))

    tokens = jax.ShapeDtypeStruct((1, 7), jnp.int32)
    assert counted(nn.Embed(11, 3), tokens) == {}
    assert counted(Tied(), tokens) == {"Embed_0/embedding": 7 * 11 * 3}


def test_a_scanned_layer_costs_each_of_its_turns():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(6)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=5,
            )
            return scanned()(x, None)[0]

    (cost,) = counted(Stack(), jax.ShapeDtypeStruct((2, 6), jnp.float32)).values()
    assert cost == 5 * 2 * 6 * 6


def test_a_recurrent_layer_costs_each_time_step():
    layer = nn.RNN(nn.SimpleCell(6))
    signal = jax.ShapeDtypeStruct((1, 9, 4), jnp.float32)
    costs = counted(layer, signal)
    assert costs == {"cell/h/kernel": 9 * 6 * 6, "cell/i/kernel": 9 * 4 * 6}


CELLS = {  # with the number of their kernels
    "LSTM": (nn.LSTMCell, 8),
    "LSTM with joined kernels": (nn.OptimizedLSTMCell, 8),
    "GRU": (nn.GRUCell, 6),
}


@pytest.mark.parametrize("name", CELLS)
def test_every_gate_costs_what_its_kernel_does(name):
    make, kernels = CELLS[name]
    cell, signal = make(8), jax.ShapeDtypeStruct((1, 5, 4), jnp.float32)
    variables = jax.eval_shape(nn.RNN(cell).init, KEY, signal)
    costs = st3jax.multiply_adds(nn.RNN(cell).apply, variables, signal)
    assert list(costs.values()) == [5] * kernels
    carry, x = cell.initialize_carry(KEY, (3, 4)), jnp.ones((3, 4))
    variables = jax.eval_shape(cell.init, KEY, carry, x)
    costs = st3jax.multiply_adds(cell.apply, variables, carry, x)
    assert list(costs.values()) == [3] * kernels


WIDTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@hypothesis.given(WIDTHS, st.integers(0, 5), st.integers(0, 1), st.integers(1, 4))
def test_kernels_in_one_product_cost_what_each_would(widths, zeros, axis, rows):
    names = [f"k{i}" for i in range(len(widths))]
    shapes = [(width, 4)[:: 1 - 2 * axis] for width in widths]
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in zip(names, shapes, strict=True)
    }

    def model(params, x):
        kernel = jnp.concatenate([params[name] for name in names], axis)
        kernel = jnp.pad(kernel, [(0, zeros * (k == axis)) for k in range(2)])
        return x @ kernel

    x = jnp.ones((rows, (sum(widths) + zeros, 4)[axis]))
    costs = st3jax.multiply_adds(model, params, x)
    assert costs == dict.fromkeys(names, rows)


SHARED = {  # products of 5 rows with kernels of 4 x 4, and what a weight costs
    "stacked": (
        lambda p, x: jnp.einsum("td,ndo->nto", x, jnp.stack([p["v"], p["w"]])),
        {"v": 5, "w": 5},
    ),
    "written into zeros": (
        lambda p, x: x @ jnp.zeros((4, 9)).at[:, 1:5].set(p["w"]),
        {"w": 5},
    ),
    "added to zeros": (
        lambda p, x: x @ jnp.zeros((4, 9)).at[:, 1:5].add(p["w"]),
        {"w": 5},
    ),
    "written over another": (
        lambda p, x: x @ jax.lax.dynamic_update_slice(p["v"], p["w"][:2], (0, 0)),
        {"v": 2, "w": 2},
    ),
    "the same kernel twice": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1),
        {"w": 10},
    ),
    "and transposed": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"].T], axis=1),
        {"w": 10},
    ),
    "scaled together": (
        lambda p, x: x @ (jnp.concatenate([p["v"], p["w"]], axis=1) * p["scale"]),
        {"v": 5, "w": 5},
    ),
    "written row by row": (
        lambda p, x: (
            x
            @ jax.lax.fori_loop(
                0, 4, lambda i, kernel: kernel.at[i].set(p["w"][i]), jnp.zeros((4, 4))
            )
        ),
        {"w": 5},
    ),
    "nothing to speak of": (
        lambda p, x: jnp.tensordot(
            x[:, :0], jnp.pad(p["w"][:, :0], ((0, 2), (0, 0))).reshape(0, 3), 1
        ),
        {},
    ),
    "repeated": (lambda p, x: x @ jnp.tile(p["w"], (1, 3)), {"w": 15}),
    "mixed by a matrix of constants": (
        lambda p, x: x @ (jnp.concatenate([p["v"], p["w"]], 1) @ jnp.ones((8, 8))),
        {"v": 5, "w": 5},
    ),
    "in an order that is lost": (
        lambda p, x: x @ jnp.fft.fft(jnp.concatenate([p["v"], p["w"]], 1)).real,
        {"v": 5, "w": 5},
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_kernel_costs_its_share_of_a_product(name):
    fn, expected = SHARED[name]
    params = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4)), "scale": jnp.ones(8)}
    assert st3jax.multiply_adds(fn, params, jnp.ones((5, 4))) == expected


def test_a_stack_costs_what_its_layers_do():
    params = {"w": jnp.ones((3, 4, 4))}

    def model(params, x):
        return x @ params["w"][0] @ params["w"][1] @ params["w"][2]

    assert st3jax.multiply_adds(model, params, jnp.ones((5, 4))) == {"w": 5}


def experts(params, x):
    return jax.lax.ragged_dot(x, params["w"], jnp.array([1, 4, 3], jnp.int32))


def weights_gradient(params, x):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(),
    )
    groups = jnp.array([1, 4, 3], jnp.int32)
    return jax.lax.ragged_dot_general(x, params["v"], groups, numbers)


def chosen(params, x):
    return jnp.einsum("ti,tio->to", x, params["w"][x[:, 0].astype(int)])


def test_experts_cost_their_average():
    """Eight rows, each of which meets one of three matrices."""
    params, x = {"w": jnp.ones((3, 4, 6)), "v": jnp.ones((8, 2))}, jnp.ones((8, 4))
    assert st3jax.multiply_adds(experts, params, x) == {"w": 8 // 3}
    assert st3jax.multiply_adds(chosen, params, x) == {"w": 8 // 3}
    assert st3jax.multiply_adds(weights_gradient, params, x) == {"v": 4}


def test_the_branch_that_costs_most_counts():
    def model(params, x):
        return jax.lax.switch(
            x[0, 0].astype(int),
            [
                lambda: x @ params["w"],
                lambda: x @ params["v"] @ params["v"],
                lambda: x,
            ],
        )

    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    assert st3jax.multiply_adds(model, params, jnp.ones((5, 4))) == {"v": 10}


def test_a_layer_used_twice_costs_twice():
    params = {"w": jnp.ones((3, 3))}
    x = jnp.ones((1, 3))
    assert st3jax.multiply_adds(lambda p, x: x @ p["w"] @ p["w"], params, x) == {"w": 2}


WRAPPED = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, (None, 0)),
    "bfloat16": lambda f: (
        lambda p, x: f(
            jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)
        )
    ),
    "transposed": lambda f: lambda p, x: f({"w": p["w"].T.reshape(4, 6)}, x),
    "scaled": lambda f: lambda p, x: f({"w": p["w"] * p["scale"]}, x),
    "in a loop of fixed length": lambda f: (
        lambda p, x: jax.lax.fori_loop(
            0, 1, lambda _, y: y + f(p, x), jnp.zeros((5, 6))
        )
    ),
    "in a branch": lambda f: (
        lambda p, x: jax.lax.cond(
            x.sum() > 0, lambda: f(p, x), lambda: jnp.zeros((5, 6))
        )
    ),
    "inside a gradient that is stopped": lambda f: (
        lambda p, x: f(jax.lax.stop_gradient(p), x)
    ),
    "pruned": lambda f: (
        lambda p, x: f({"w": st3jax.ops.soft_threshold(p["w"], 0.1)}, x)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_around_a_product_changes_nothing(name):
    params = {"w": jnp.ones((4, 6)), "scale": jnp.ones(6)}
    fn = WRAPPED[name](lambda p, x: x @ p["w"])
    assert st3jax.multiply_adds(fn, params, jnp.ones((5, 4))) == {"w": 5}


def test_a_loop_that_carries_activations_into_a_product():
    def model(params, x):
        def turn(carry, _):
            _, second = carry
            return (second, second @ params["w"]), None  # first a parameter, later not

        return jax.lax.scan(turn, (params["w"], x), length=3)[0][0] @ params["v"]

    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
    assert st3jax.multiply_adds(model, params, jnp.ones((4, 4))) == {"w": 12, "v": 4}


def test_sparsified_weights_count_for_the_raw_ones():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    tx = st3jax.st3(optax.sgd(0.1), 0.5)
    opt_state = tx.init(params)

    def model(params, x):
        weights = st3jax.sparsify(params, opt_state)
        return x @ weights["kernel"] + weights["bias"]

    assert st3jax.multiply_adds(model, params, jnp.ones((5, 4))) == {"kernel": 5}


def test_a_loop_of_unknown_length_around_a_product_is_refused():
    def model(params, x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ params["w"], x)

    with pytest.raises(ValueError, match="'w' is used in a loop whose number of turns"):
        st3jax.multiply_adds(model, {"w": jnp.ones((3, 3))}, jnp.ones((1, 3)))


def test_a_loop_of_unknown_length_without_parameters_is_no_hindrance():
    def model(params, x):
        y = jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y.T, x)
        return y @ params["w"]

    assert st3jax.multiply_adds(model, {"w": jnp.ones((3, 3))}, jnp.ones((3, 3))) == {
        "w": 3
    }


def test_an_nnx_model_is_counted_like_a_linen_one():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(self.conv(x)).mean((1, 2)))

    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def model(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    costs = st3jax.multiply_adds(model, params, images())
    assert costs == {"conv/kernel": 64, "head/kernel": 1}


NETWORKS = {  # millions, with the accuracy of the number that is known
    "ResNet-50": (imagenet_resnet(50, 1000), 224, 4089, 0.002),
    "ResNet-20": (cifar_resnet(20, 10), 32, 40.8, 0.01),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_network_costs_what_is_published(name):
    model, size, expected, close = NETWORKS[name]
    x = images(size, channels=3)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, KEY, x)
    apply = functools.partial(model.apply, train=False)
    costs = st3jax.multiply_adds(apply, variables, x)
    leaves = named_leaves(variables)
    assert all(st3jax.is_kernel(path, leaves[path]) for path in costs)
    cost = sum(cost * leaves[path].size for path, cost in costs.items())
    assert cost / 1e6 == pytest.approx(expected, rel=close)


def test_costs_are_those_that_a_sparsity_takes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Conv(6, (3, 3))(x).mean((1, 2)))

    x = images()
    params = Model().init(KEY, jnp.zeros(x.shape))["params"]
    costs = st3jax.multiply_adds(
        lambda p, x: Model().apply({"params": p}, x), params, x
    )
    ramp = st3jax.polynomial_ramp(0.75, begin=0, end=1)
    tx = st3jax.st3(optax.sgd(0.0), ramp, costs=costs)
    _, opt_state = tx.update(params, jax.jit(tx.init)(params), params)
    pruned = st3jax.finalize(params, opt_state)
    layers = st3jax.summary(pruned).layers
    removed = sum(costs[path] * int(layer.zeros) for path, layer in layers.items())
    every = sum(costs[path] * layer.weights for path, layer in layers.items())
    assert 0.75 * every - 1 <= removed <= 0.75 * every + max(costs.values())
    assert np.isclose(every, 64 * 9 * 4 * 6 + 6 * 3)
