"""What each axis of a parameter is, is read off the computation."""

import functools
import random

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import st3jax
from st3jax.traced import read_axes

KEY = jax.random.key(0)


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def of_linen(module, *inputs):
    """The one reading of each parameter of a Linen module."""
    variables = jax.eval_shape(module.init, KEY, *inputs)
    return single(read_axes(module.apply, variables, *inputs))


def single(readings):
    assert all(len(each) == 1 for each in readings.values()), readings
    return {path.removeprefix("params/"): each[0] for path, each in readings.items()}


def of(fn, x, **params):
    """The one reading of each parameter that is given by its shape."""
    arrays = {name: shaped(*shape) for name, shape in params.items()}
    return single(read_axes(fn, arrays, x))


IMAGES = shaped(2, 8, 8, 4)

LAYERS = {
    "dense": (nn.Dense(6), shaped(5, 4), "io"),
    "dense with one output": (nn.Dense(1), shaped(5, 4), "io"),
    "dense with one input": (nn.Dense(6), shaped(5, 1), "io"),
    "dense on images": (nn.Dense(6), IMAGES, "io"),
    "1-D convolution": (nn.Conv(6, (3,)), shaped(2, 9, 4), "wio"),
    "2-D convolution": (nn.Conv(6, (3, 3)), IMAGES, "wwio"),
    "3-D convolution": (nn.Conv(6, (3, 3, 3)), shaped(1, 3, 5, 7, 2), "wwwio"),
    "1x1 convolution": (nn.Conv(6, (1, 1)), IMAGES, "wwio"),
    "circular": (nn.Conv(6, (3, 3), padding="CIRCULAR"), IMAGES, "wwio"),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGES, "wwio"),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGES, "wwio"),
    "masked": (nn.Conv(6, (3,), mask=jnp.ones((3, 4, 6))), shaped(2, 9, 4), "wio"),
    "transposed convolution": (nn.ConvTranspose(6, (3, 3)), IMAGES, "wwio"),
    "transposed strided": (nn.ConvTranspose(6, (2, 2), (2, 2)), IMAGES, "wwio"),
    "transposed kernel": (
        nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True),
        IMAGES,
        "wwoi",
    ),
    "not shared": (nn.ConvLocal(6, (3, 3)), IMAGES, "ssio"),
    "several outputs": (nn.DenseGeneral((2, 3)), shaped(5, 4), "ioo"),
    "several inputs": (nn.DenseGeneral(6, (-2, -1)), shaped(5, 4, 3), "iio"),
    "both": (nn.DenseGeneral((2, 3), (-2, -1)), shaped(5, 4, 3), "iioo"),
    "a batch": (nn.DenseGeneral(6, batch_dims=(0,)), shaped(3, 5, 4), "sio"),
    "einsum": (nn.Einsum((4, 2, 3), "bsd,dhk->bshk"), shaped(1, 5, 4), "ioo"),
    "einsum over experts": (
        nn.Einsum((3, 4, 6), "ecd,edf->ecf"),
        shaped(3, 5, 4),
        "sio",
    ),
    "normalised weights": (
        nn.WeightNorm(nn.Dense(6), variable_filter={"kernel"}),
        shaped(5, 4),
        "io",
    ),
    "half precision": (nn.Conv(6, (3, 3), dtype=jnp.bfloat16), IMAGES, "wwio"),
    "by bfloat16": (nn.Dense(6, dtype=jnp.bfloat16), shaped(5, 4), "io"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_linen(name):
    layer, x, expected = LAYERS[name]
    readings = of_linen(layer, x)
    assert {path.rpartition("/")[2]: axes for path, axes in readings.items()} == {
        "kernel": expected
    }


def test_attention_of_linen():
    layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    assert of_linen(layer, shaped(1, 5, 8)) == {
        "query/kernel": "ioo",
        "key/kernel": "ioo",
        "value/kernel": "ioo",
        "out/kernel": "iio",
    }


CELLS = {  # with the number of kernels
    "simple": (nn.SimpleCell, 2),
    "LSTM": (nn.LSTMCell, 8),
    "LSTM with joined kernels": (nn.OptimizedLSTMCell, 8),
    "GRU": (nn.GRUCell, 6),
    "MGU": (nn.MGUCell, 4),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_layer(name):
    make, kernels = CELLS[name]
    assert list(of_linen(nn.RNN(make(8)), shaped(1, 5, 4)).values()) == ["io"] * kernels


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_cell(name):
    make, kernels = CELLS[name]
    cell = make(8)
    carry = cell.initialize_carry(KEY, (1, 4))
    assert list(of_linen(cell, carry, shaped(1, 4)).values()) == ["io"] * kernels


def test_a_convolutional_recurrent_layer():
    layer = nn.RNN(nn.ConvLSTMCell(6, (3, 3)))
    readings = of_linen(layer, shaped(1, 5, 8, 8, 4))
    assert set(readings.values()) == {"wwio"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
        return nn.Dense(8)(nn.relu(nn.Conv(6, (3,))(attention(x)))), None


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("lifted", [lambda block: block, nn.remat])
def test_a_scanned_stack_of_linen(axis, lifted):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                lifted(Block),
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=3,
            )
            return scanned(name="stack")(x, None)[0]

    readings = of_linen(Stack(), shaped(1, 5, 8))
    below = {"Conv_0": "wio", "Dense_0": "io"}
    below |= {f"MultiHeadDotProductAttention_0/{k}": "ioo" for k in ("query", "key")}
    below |= {"MultiHeadDotProductAttention_0/value": "ioo"}
    below |= {"MultiHeadDotProductAttention_0/out": "iio"}

    def with_stack(axes):
        at = axis if axis >= 0 else len(axes) + 1 + axis
        return axes[:at] + "s" + axes[at:]

    assert readings == {
        f"stack/{name}/kernel": with_stack(axes) for name, axes in below.items()
    }


def test_layers_scanned_within_layers():
    def model(params, x):
        def outer(x, stack):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)

        return jax.lax.scan(outer, x, params["w"])[0]

    assert of(model, shaped(5, 4), w=(2, 3, 4, 4)) == {"w": "ssio"}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("layer", "x", "expected"),
    [
        (nn.Dense, shaped(3, 5, 4), "io"),
        (functools.partial(nn.Conv, kernel_size=(3, 3)), shaped(3, 2, 8, 8, 4), "wwio"),
        (
            functools.partial(nn.Conv, kernel_size=(3, 3), feature_group_count=2),
            shaped(3, 2, 8, 8, 4),
            "wwio",
        ),
    ],
)
def test_mapped_layers_of_linen(axis, layer, x, expected):
    mapped = nn.vmap(
        OneLayer, variable_axes={"params": axis}, split_rngs={"params": True}
    )
    readings = of_linen(mapped(layer), x)
    assert list(readings.values()) == [expected[:axis] + "s" + expected[axis:]]


class OneLayer(nn.Module):
    layer: object

    @nn.compact
    def __call__(self, x):
        return self.layer(6)(x)


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


MAPPED_CONVOLUTIONS = {  # in_axes, images, kernels, groups, reading
    "both": ((0, 0), (3, 2, 8, 8, 4), (3, 3, 3, 4, 6), 1, "swwio"),
    "both, behind": ((0, 4), (3, 2, 8, 8, 4), (3, 3, 4, 6, 3), 1, "wwios"),
    "both, grouped": ((0, 0), (3, 2, 8, 8, 4), (3, 3, 3, 2, 6), 2, "swwio"),
    "both, depthwise": ((0, 0), (3, 2, 8, 8, 4), (3, 3, 3, 1, 4), 4, "swwio"),
    "images": ((0, None), (3, 2, 8, 8, 4), (3, 3, 4, 6), 1, "wwio"),
    "images, grouped": ((0, None), (3, 2, 8, 8, 4), (3, 3, 2, 6), 2, "wwio"),
    "kernels on the same images": (
        (None, 0),
        (2, 8, 8, 4),
        (3, 3, 3, 4, 6),
        1,
        "owwio",
    ),
    "the same, grouped": ((None, 0), (2, 8, 8, 4), (3, 3, 3, 2, 6), 2, "owwio"),
}


@pytest.mark.parametrize("name", MAPPED_CONVOLUTIONS)
def test_a_mapped_convolution(name):
    in_axes, images, kernels, groups, expected = MAPPED_CONVOLUTIONS[name]
    mapped = jax.vmap(functools.partial(conv, feature_group_count=groups), in_axes)

    def model(params, x):
        return mapped(x, params["w"])

    assert of(model, shaped(*images), w=kernels) == {"w": expected}


def test_twice_mapped_convolutions():
    mapped = jax.vmap(jax.vmap(conv))

    def model(params, x):
        return mapped(x, params["w"])

    x = shaped(2, 3, 2, 8, 8, 4)
    assert of(model, x, w=(2, 3, 3, 3, 4, 6)) == {"w": "sswwio"}


def test_convolutions_with_other_dimension_numbers():
    def model(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    assert of(model, shaped(2, 4, 8, 8), w=(6, 4, 3, 3)) == {"w": "oiww"}


def joined(params, x):
    kernels = jnp.concatenate([params[k] for k in "qkv"], axis=1)
    return jnp.split(x @ kernels, 3, axis=1)


X = shaped(5, 4)

PRODUCTS = {
    "a matrix": (lambda p, x: x @ p["w"], X, {"w": (4, 6)}, {"w": "io"}),
    "(out, in)": (lambda p, x: x @ p["w"].T, X, {"w": (6, 4)}, {"w": "oi"}),
    "(out, in) of one example": (
        lambda p, x: jax.vmap(lambda x: p["w"] @ x)(x), X, {"w": (6, 4)}, {"w": "oi"}
    ),
    "kernel first": (lambda p, x: p["w"] @ x.T, X, {"w": (6, 4)}, {"w": "oi"}),
    "a vector": (lambda p, x: x @ p["w"], X, {"w": (4,)}, {"w": "i"}),
    "joined heads": (
        lambda p, x: x @ p["w"].reshape(4, 6), X, {"w": (4, 2, 3)}, {"w": "ioo"}
    ),
    "split heads": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"].reshape(4, 2, 3)),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "inputs split": (
        lambda p, x: jnp.einsum("tab,abo->to", x, p["w"].reshape(2, 2, 6)),
        shaped(5, 2, 2), {"w": (4, 6)}, {"w": "io"},
    ),
    "an axis half input, half output": (
        lambda p, x: jnp.einsum("ta,abo->tbo", x, p["w"].reshape(2, 2, 6)),
        shaped(5, 2), {"w": (4, 6)}, {"w": "?o"},
    ),
    "an axis half indexed, half input": (
        lambda p, x: x @ p["w"].reshape(3, 4, 6)[1], X, {"w": (12, 6)}, {"w": "?o"}
    ),
    "joined, split in another way": (
        lambda p, x: x @ p["w"].reshape(4, 6), X, {"w": (3, 8)}, {"w": "??"}
    ),
    "joined in three kernels": (
        joined, X, dict.fromkeys("qkv", (4, 4)), dict.fromkeys("qkv", "io")
    ),
    "three in a kernel": (
        lambda p, x: jnp.split(x @ p["w"], 3, axis=1), X, {"w": (4, 12)}, {"w": "io"}
    ),
    "three in a kernel, split first": (
        lambda p, x: [x @ w for w in jnp.split(p["w"], 3, axis=1)],
        X, {"w": (4, 12)}, {"w": "io"},
    ),
    "three with heads in a kernel": (
        lambda p, x: jnp.einsum("td,dnhk->ntkh", x, p["w"]),
        X, {"w": (4, 3, 2, 2)}, {"w": "iooo"},
    ),
    "three stacked and indexed": (
        lambda p, x: [x @ p["w"][0], x @ p["w"][1], x @ p["w"][2]],
        X, {"w": (3, 4, 4)}, {"w": "sio"},
    ),
    "stacked in the computation": (
        lambda p, x: jnp.einsum("td,ndo->nto", x, jnp.stack([p["a"], p["b"]])),
        X, {"a": (4, 6), "b": (4, 6)}, {"a": "io", "b": "io"},
    ),
    "written into zeros": (
        lambda p, x: x @ jnp.zeros((4, 8)).at[:, 1:7].set(p["w"]),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "a diagonal of blocks": (
        lambda p, x: x @ jax.lax.dynamic_update_slice(
            jax.lax.dynamic_update_slice(jnp.zeros((4, 6)), p["a"], (0, 0)),
            p["b"], (2, 3),
        ),
        X, {"a": (2, 3), "b": (2, 3)}, {"a": "io", "b": "io"},
    ),
    "padded": (
        lambda p, x: x @ jnp.pad(p["w"], ((1, 1), (0, 2))),
        X, {"w": (2, 6)}, {"w": "io"},
    ),
    "a part of it": (lambda p, x: x @ p["w"][2:, ::2], X, {"w": (6, 6)}, {"w": "io"}),
    "reversed": (lambda p, x: x @ p["w"][::-1], X, {"w": (4, 6)}, {"w": "io"}),
    "rows in another order": (
        lambda p, x: x @ p["w"][jnp.array([3, 1, 2, 0])], X, {"w": (4, 6)}, {"w": "io"}
    ),
    "kernels in another order": (
        lambda p, x: jnp.einsum("td,ndo->nto", x, p["w"][jnp.array([2, 0])]),
        X, {"w": (3, 4, 6)}, {"w": "oio"},
    ),
    "one of a stack, chosen by a constant array": (
        lambda p, x: x @ p["w"][jnp.array(1)], X, {"w": (3, 4, 6)}, {"w": "sio"}
    ),
    "repeated": (
        lambda p, x: x @ jnp.broadcast_to(p["w"], (4, 6)), X, {"w": (1, 6)}, {"w": "so"}
    ),
    "summed over a stack": (
        lambda p, x: x @ p["w"].sum(0), X, {"w": (3, 4, 6)}, {"w": "?io"}
    ),
    "two parameters multiplied": (
        lambda p, x: x @ (p["a"] @ p["b"]), X, {"a": (4, 8), "b": (8, 6)}, {"b": "?o"}
    ),
    "low rank beside a kernel": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        X, {"w": (4, 6), "a": (4, 1), "b": (1, 6)}, {"w": "io"},
    ),
    "rotated": (
        lambda p, x: x @ (p["w"] @ jnp.eye(6)), X, {"w": (4, 6)}, {"w": "i?"}
    ),
    "made symmetric": (
        lambda p, x: x @ (p["w"] + p["w"].T), X, {"w": (4, 4)}, {"w": "??"}
    ),
    "standardised": (
        lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / (p["w"].std(0) + 1e-5)),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "standardised, with a gain": (
        lambda p, x: x @ ((p["w"] - p["w"].mean(0)) * p["a"] / jnp.var(p["w"], 0)),
        X, {"w": (4, 6), "a": (6,)}, {"w": "io"},
    ),
    "of unit norm": (
        lambda p, x: x @ (p["w"] * p["a"] / jnp.linalg.norm(p["w"], axis=0)),
        X, {"w": (4, 6), "a": (6,)}, {"w": "io"},
    ),
    "pruned": (
        lambda p, x: x @ st3jax.ops.soft_threshold(p["w"], 0.1),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "chosen by a larger one": (
        lambda p, x: x @ jnp.where(p["a"][0] > 0, p["w"], 0),
        X, {"w": (4, 6), "a": (3, 4, 6)}, {"w": "io"},
    ),
    "half precision": (
        lambda p, x: x.astype("bfloat16") @ p["w"].astype("bfloat16"),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "experts with tokens of their own": (
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]),
        shaped(3, 5, 4), {"w": (3, 4, 6)}, {"w": "sio"},
    ),
    "experts that all see everything": (
        lambda p, x: jnp.einsum("bd,edf->bef", x, p["w"]),
        X, {"w": (3, 4, 6)}, {"w": "oio"},
    ),
    "experts on sequences": (
        lambda p, x: jnp.einsum("bsd,edf->bsef", x, p["w"]),
        shaped(2, 5, 4), {"w": (3, 4, 6)}, {"w": "oio"},
    ),
    "experts of ragged groups": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 2, 2], jnp.int32)),
        X, {"w": (3, 4, 6)}, {"w": "sio"},
    ),
    "block-diagonal": (
        lambda p, x: jnp.einsum("tnd,ndo->tno", x.reshape(5, 2, 2), p["w"]),
        X, {"w": (2, 2, 3)}, {"w": "sio"},
    ),
    "a filter by Fourier transform": (
        lambda p, x: x @ jnp.fft.rfft(p["w"]).real, X, {"w": (4, 6)}, {"w": "??"}
    ),
    "written as one of a stack": (
        lambda p, x: jnp.einsum(
            "td,ndo->nto", x, jnp.zeros((2, 4, 6)).at[1].set(p["w"])
        ),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "written as rows": (
        lambda p, x: x @ jnp.zeros((4, 6)).at[jnp.array([3, 1])].set(p["w"]),
        X, {"w": (2, 6)}, {"w": "io"},
    ),
    "tiled": (lambda p, x: x @ jnp.tile(p["w"], (2, 1)), X, {"w": (2, 6)}, {"w": "io"}),
    "written over another": (
        lambda p, x: x @ jax.lax.dynamic_update_slice(p["v"], p["w"], (0, 0)),
        X, {"v": (4, 6), "w": (4, 6)}, {"w": "io"},
    ),
    "kernels at pairs of indices": (
        lambda p, x: jnp.einsum(
            "td,ndo->nto", x, p["w"][jnp.array([0, 2]), jnp.array([1, 0])]
        ),
        X, {"w": (3, 3, 4, 6)}, {"w": "ssio"},
    ),
    "reduced by a function": (
        lambda p, x: x @ jax.lax.reduce(p["w"], 0.0, lambda a, b: a * b + a, (0,)).T,
        X, {"w": (3, 6, 4)}, {"w": "???"},
    ),
    "the difference from an average": (
        lambda p, x: x @ (p["w"][0] - p["w"].mean(0)), X, {"w": (3, 4, 6)}, {"w": "sio"}
    ),
    "behind a barrier": (
        lambda p, x: jnp.matmul(*jax.lax.optimization_barrier((x, p["w"]))),
        X, {"w": (4, 6)}, {"w": "io"},
    ),
    "an axis of one": (
        lambda p, x: x @ p["w"].reshape(4, 6), X, {"w": (4, 1, 6)}, {"w": "iso"}
    ),
    "an output of one, reshaped": (
        lambda p, x: x @ p["w"].reshape(1, 4, 1)[0], X, {"w": (4, 1)}, {"w": "io"}
    ),
    "the images of a convolution": (
        lambda p, x: conv(p["w"], x), shaped(3, 3, 4, 7), {"w": (6, 5, 5, 4)},
        {"w": "owwi"},
    ),
    "the images of a grouped convolution": (
        lambda p, x: conv(p["w"], x, feature_group_count=2),
        shaped(3, 3, 2, 6), {"w": (6, 5, 5, 4)}, {"w": "owwi"},
    ),
    "the rows of ragged groups": (
        lambda p, x: jax.lax.ragged_dot(p["w"], x, jnp.array([1, 4, 3], jnp.int32)),
        shaped(3, 4, 6), {"w": (8, 4)}, {"w": "oi"},
    ),
    "stacks of two parameters multiplied": (
        lambda p, x: jnp.einsum("ntd,nde->nte", x, p["a"] @ p["b"]),
        shaped(2, 5, 4), {"a": (2, 4, 3), "b": (2, 3, 9)}, {"b": "s?o"},
    ),
    "two parameters convolved": (
        lambda p, x: x @ conv(p["w"], p["v"])[0, 0],
        X, {"w": (1, 2, 4, 8), "v": (1, 1, 8, 3)}, {"w": "????"},
    ),
    "nothing of it": (lambda p, x: x * p["w"], X, {"w": (5, 4)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product(name):
    fn, x, params, expected = PRODUCTS[name]
    assert of(fn, x, **params) == expected


TURNS = {
    "scan over the stack": lambda p, x: jax.lax.scan(
        lambda x, w: (x @ w, None), x, p["w"]
    )[0],
    "for": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda i, x: x @ jax.lax.dynamic_index_in_dim(p["w"], i, 0, False), x
    ),
    "for, by brackets": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda i, x: x @ p["w"][i], x
    ),
    "for, of unknown length": lambda p, x: jax.lax.fori_loop(
        0, jnp.int32(x[0, 0]), lambda i, x: x @ p["w"][i], x
    ),
    "while": lambda p, x: jax.lax.while_loop(
        lambda carry: carry[0] < 3,
        lambda carry: (carry[0] + 1, carry[1] @ p["w"][carry[0]]),
        (0, x),
    ),
    "map over the stack": lambda p, x: jax.lax.map(lambda w: x @ w, p["w"]),
    "restacked": lambda p, x: jax.lax.scan(
        lambda x, w: (x @ w, None),
        x,
        jax.lax.map(lambda w: st3jax.ops.soft_threshold(w, 0.1), p["w"])[1:],
    )[0],
    "with checkpoints": lambda p, x: jax.lax.scan(
        jax.checkpoint(lambda x, w: (x @ w, None)), x, p["w"]
    )[0],
    "a branch": lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda: x @ p["w"][0], lambda: x
    ),
    "a chosen branch": lambda p, x: jax.lax.switch(
        1, [lambda w=w: x @ w for w in p["w"]]
    ),
    "a kernel that a branch chose": lambda p, x: (
        x @ jax.lax.cond(x.sum() > 0, lambda: p["w"][0], lambda: p["w"][1])
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_one_of_a_stack_at_a_time(name):
    assert of(TURNS[name], shaped(5, 4), w=(3, 4, 4)) == ({"w": "sio"})


def test_a_kernel_that_is_used_in_two_ways_has_two_readings():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 3)
            x = embed(tokens)
            return embed.attend(x), x @ embed.embedding.T

    variables = jax.eval_shape(Tied().init, KEY, shaped(1, 7, dtype=jnp.int32))
    tokens = shaped(1, 7, dtype=jnp.int32)
    assert read_axes(Tied().apply, variables, tokens) == {
        "params/Embed_0/embedding": ["oi"]
    }

    def autoencoder(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["w"].T

    assert read_axes(autoencoder, {"w": shaped(4, 6)}, X) == {"w": ["io", "oi"]}


def test_all_branches_are_read():
    def model(params, x):
        return jax.lax.cond(
            x.sum() > 0, lambda: x @ params["w"], lambda: (x @ params["w"].T) * 2
        )

    assert read_axes(model, {"w": shaped(4, 4)}, X) == {"w": ["io", "oi"]}


def test_a_kernel_that_is_chosen_from_different_ones_cannot_be_told():
    def model(params, x):
        return x @ jax.lax.cond(x.sum() > 0, lambda: params["w"], lambda: params["w"].T)

    assert of(model, X, w=(4, 4)) == {"w": "??"}


def test_a_loop_that_turns_its_kernel_cannot_be_told():
    def model(params, x):
        def turn(_, carry):
            w, x = carry
            return w.T, x @ w

        return jax.lax.fori_loop(0, 3, turn, (params["w"], x))[1]

    assert of(model, X, w=(4, 4)) == {"w": "??"}


def test_a_loop_that_reshapes_its_kernel_there_and_back():
    def model(params, x):
        def turn(_, carry):
            w, x = carry
            return (w.reshape(2, 2, 2, 2) * 2).reshape(4, 4), x @ w

        return jax.lax.fori_loop(0, 3, turn, (params["w"], x))[1]

    assert of(model, X, w=(4, 4)) == {"w": "io"}


def test_a_loop_that_swaps_its_kernels_comes_to_an_end():
    def model(params, x):
        def turn(_, carry):
            v, w, x = carry
            return w, v, x @ w

        return jax.lax.fori_loop(0, 3, turn, (params["v"], params["w"], x))[2]

    assert of(model, X, v=(4, 4), w=(4, 4)) == {"v": "io"}


def test_a_loop_that_writes_its_kernel_row_by_row():
    def model(params, x):
        def turn(i, kernel):
            return kernel.at[i].set(params["w"][i] * 2)

        return x @ jax.lax.fori_loop(0, 4, turn, jnp.zeros((4, 6)))

    assert of(model, X, w=(4, 6)) == {"w": "??"}


CHOSEN = {
    "a kernel for each row": lambda p, x: jnp.einsum(
        "ti,tio->to", x, p["w"][x[:, 0].astype(int)]
    ),
    "scaled": lambda p, x: jnp.einsum(
        "ti,tio->to", x, p["w"][x[:, 0].astype(int)] * p["scale"]
    ),
    "by take": lambda p, x: jnp.einsum(
        "ti,tio->to", x, jnp.take(p["w"], x[:, 0].astype(int), axis=0)
    ),
    "one for all rows": lambda p, x: x @ p["w"][x[0, 0].astype(int)],
    "mapped": lambda p, x: jax.vmap(lambda x: x @ p["w"][x[0].astype(int)])(x),
    "scanned": lambda p, x: jax.lax.map(lambda x: x @ p["w"][x[0].astype(int)], x),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_experts_that_inputs_choose_are_a_stack(name):
    assert of(CHOSEN[name], X, w=(3, 4, 6), scale=(6,)) == {"w": "sio"}


LOOKED_UP = {
    "embeddings": lambda p, x: p["w"][x.astype(int)] @ p["v"],
    "embeddings of a matrix": lambda p, x: p["m"][x[:, 0].astype(int)].sum(1) @ p["v"],
    "among themselves": lambda p, x: (
        p["m"][x[:, 0].astype(int)] @ p["m"][x[:, 1].astype(int)] @ p["v"]
    ),
    "by a constant": lambda p, x: p["m"][x[:, 0].astype(int)] @ jnp.eye(6) @ p["v"],
    "chosen or not": lambda p, x: (
        jax.lax.cond(
            x.sum() > 0,
            lambda: p["m"][x[0, 0].astype(int)],
            lambda: p["m"][0],
        )
        @ p["v"]
    ),
    "a parameter or an input": lambda p, x: (
        (
            x
            @ jax.lax.cond(
                x.sum() > 0,
                lambda: p["m"][0],
                lambda: x[:4].T @ x[:4, :1] * jnp.ones((1, 6)),
            )
        )
        @ p["v"]
    ),
    "by what inputs scale": lambda p, x: (
        x @ (p["m"][x[:, 0].astype(int)] * x.sum()) @ p["v"]
    ),
    "a column": lambda p, x: (
        jnp.einsum("td,td->t", p["w"][x[:, 0].astype(int)], jnp.tile(x, (1, 2))[:, :6])[
            :, None
        ]
        * jnp.ones(6)
        @ p["v"]
    ),
}


@pytest.mark.parametrize("name", LOOKED_UP)
def test_what_inputs_look_up_is_no_kernel(name):
    params = {"w": (9, 6), "m": (9, 4, 6) if name != "among themselves" else (9, 6, 6)}
    assert of(LOOKED_UP[name], X, v=(6, 2), **params) == {"v": "io"}


def test_a_custom_gradient_changes_nothing():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, None))

    @jax.custom_jvp
    def twice(w):
        return 2 * w

    twice.defjvp(lambda w, dw: (twice(*w), 2 * dw[0]))
    assert of(lambda p, x: product(x, twice(p["w"])), X, w=(4, 6)) == {"w": "io"}


def of_nnx(make, x, call=lambda model, x: model(x)):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, x, rest):
        return call(nnx.merge(graphdef, params, rest), x)

    return single(read_axes(fn, params, x, rest))


def test_layers_of_nnx():
    assert of_nnx(lambda r: nnx.Linear(4, 6, rngs=r), X) == {"kernel": "io"}
    assert of_nnx(lambda r: nnx.LinearGeneral(4, (2, 3), rngs=r), X) == {
        "kernel": "ioo"
    }
    assert of_nnx(lambda r: nnx.Conv(4, 6, (3, 3), rngs=r), IMAGES) == {
        "kernel": "wwio"
    }
    transposed = functools.partial(nnx.ConvTranspose, 4, 6, (3, 3), (2, 2))
    assert of_nnx(lambda r: transposed(rngs=r), IMAGES) == {"kernel": "wwio"}
    assert of_nnx(lambda r: transposed(transpose_kernel=True, rngs=r), IMAGES) == {
        "kernel": "wwoi"
    }
    assert of_nnx(
        lambda r: nnx.Einsum("bsd,dhk->bshk", (4, 2, 3), rngs=r), shaped(1, 5, 4)
    ) == {"kernel": "ioo"}
    cell = functools.partial(nnx.OptimizedLSTMCell, 4, 8)
    readings = of_nnx(lambda r: nnx.RNN(cell(rngs=r)), shaped(1, 5, 4))
    assert set(readings.values()) == {"io"}


def test_attention_of_nnx():
    readings = of_nnx(
        lambda r: nnx.MultiHeadAttention(2, 8, 6, decode=False, rngs=r), shaped(1, 5, 8)
    )
    assert readings == {
        "query/kernel": "ioo",
        "key/kernel": "ioo",
        "value/kernel": "ioo",
        "out/kernel": "iio",
    }


def test_stacks_of_nnx():
    @nnx.vmap(in_axes=0)
    def stack(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    def make(rngs):
        return stack(rngs.split(3))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return layer(x)

    mapped = nnx.vmap(lambda layer, x: layer(x))
    assert of_nnx(make, X, lambda model, x: scanned(x, model)) == {"kernel": "sio"}
    assert of_nnx(make, shaped(3, 5, 4), mapped) == {"kernel": "sio"}


def gathered(params, x):
    return x @ jax.lax.all_gather(params["w"], "d", axis=1, tiled=True)


def stacked_shards(params, x):
    shards = jax.lax.all_gather(params["w"], "d")  # (8, in, out / 8)
    return x @ jnp.concatenate(list(shards), axis=1)


def plain(params, x):
    return x @ params["w"]


def summed(params, x):
    return jax.lax.psum(x @ params["w"], "d")


SHARDED = {  # what a device does, and what of the kernel and of the input it has
    "data": (plain, P(), P("d"), P("d")),
    "outputs": (plain, P(None, "d"), P(), P(None, "d")),
    "inputs": (summed, P("d"), P(None, "d"), P()),
    "data and weights": (gathered, P(None, "d"), P("d"), P("d")),
    "data and weights, by hand": (stacked_shards, P(None, "d"), P("d"), P("d")),
}


@pytest.mark.parametrize("name", SHARDED)
def test_what_devices_do_together_is_one_product(name):
    fn, kernel, data, out = SHARDED[name]
    model = jax.shard_map(
        fn,
        mesh=jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=({"w": kernel}, data),
        out_specs=out,
        check_vma=False,
    )
    params, x = {"w": shaped(16, 32)}, shaped(8, 16)
    assert read_axes(model, params, x) == {"w": ["io"]}
    assert st3jax.multiply_adds(model, params, x) == {"w": 8}


def test_one_model_on_each_device_is_a_stack():
    params, x = {"w": shaped(8, 4, 6)}, shaped(8, 5, 4)
    model = jax.pmap(plain)
    assert read_axes(model, params, x) == {"w": ["sio"]}
    assert st3jax.multiply_adds(model, params, x) == {"w": 5}


def test_a_kernel_shaped_by_one_device_goes_on_whole():
    half = jax.shard_map(
        lambda w: w * 2,
        mesh=jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=P("d"),
        out_specs=P("d"),
    )

    def model(params, x):
        return jnp.einsum("tab,abo->to", x, half(params["w"]).reshape(4, 4, 6))

    assert of(model, shaped(5, 4, 4), w=(16, 6)) == {"w": "io"}


@pytest.mark.parametrize("name", ["for, of unknown length", "while"])
def test_a_loop_of_unknown_length_has_axes_and_no_cost(name):
    params = {"w": shaped(3, 4, 4)}
    with pytest.raises(ValueError, match="'w' is used in a loop"):
        st3jax.multiply_adds(TURNS[name], params, X)


SIZES = st.sampled_from([1, 2, 3, 4, 6])


def transpose(array, random):
    return array.transpose(random.sample(range(array.ndim), array.ndim))


def reshape(array, random):
    """The prime factors of the size, in up to four groups."""
    size, shape = array.size, [1] * random.randint(1, 4)
    for prime in (3, 2):
        while size % prime == 0:
            size //= prime
            shape[random.randrange(len(shape))] *= prime
    return array.reshape(shape)


def cut(array, random):
    at = random.randrange(array.ndim)
    stop = random.randint(1, array.shape[at])
    return array[*[slice(None)] * at, random.randrange(stop) : stop]


def index(array, random):
    at = random.randrange(array.ndim)
    return array[*[slice(None)] * at, random.randrange(array.shape[at])]


def flip(array, random):
    return array[*[slice(None)] * random.randrange(array.ndim), ::-1]


def expand(array, random):
    return array[*[slice(None)] * random.randint(0, array.ndim), None]


MOVES = {move.__name__: move for move in (transpose, reshape, cut, index, flip, expand)}

STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 2**32)), max_size=6
)


def apply_steps(steps, array):
    """A chain of moves of NumPy's or JAX's arrays, the same for the same seeds."""
    for name, seed in steps:
        array = MOVES[name](array, random.Random(seed)) if array.ndim else array
    return array.reshape(1) if array.ndim == 0 else array


@hypothesis.given(st.lists(SIZES, min_size=1, max_size=4), STEPS, st.integers(0, 3))
def test_an_axis_is_where_its_positions_are(shape, steps, at):
    """However a kernel is moved, a letter never says what is not so."""
    positions = [apply_steps(steps, along) for along in np.indices(shape)]
    moved = positions[0].shape
    at %= len(moved)

    def model(params, x):
        return jnp.tensordot(x, apply_steps(steps, params["w"]), axes=[[0], [at]])

    reading = of(model, shaped(moved[at]), w=tuple(shape))["w"]
    dims = set(range(len(moved)))
    allowed = {"i": {at}, "o": dims - {at}, "s": set(), "?": dims}
    for letter, position in zip(reading, positions, strict=True):
        varies = {k for k in dims if np.ptp(position, axis=k).any()}
        assert varies <= allowed[letter], reading
    assert "?" not in reading or "reshape" in dict(steps)


def axes_and_costs(fn, params, *inputs):
    axes = read_axes(fn, params, *inputs)
    return axes, st3jax.multiply_adds(fn, params, *inputs)


FIVE, TALL = jnp.ones((5, 8)), jnp.ones((16, 8))
TOUCHED = {
    "masked": (lambda p, x, m: x @ (p["w"] * m).T, jnp.ones((16, 8))),
    "scaled by a number": (lambda p, x, m: x @ (p["w"] / m).T, jnp.ones([])),
    "scaled by columns": (lambda p, x, m: x @ (p["w"] * m).T, jnp.ones(8)),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_a_kernel_that_an_input_masks_or_scales_is_a_kernel(name):
    fn, other = TOUCHED[name]
    axes, costs = axes_and_costs(fn, {"w": TALL}, FIVE, other)
    assert axes == {"w": ["oi"]}
    assert costs == {"w": 5}


def test_what_is_repeated_to_meet_an_activation_is_no_kernel():
    def model(p, x, y):
        return (x * p["scale"] + p["bias"]) @ y

    params = {"scale": jnp.ones(8), "bias": jnp.ones((1, 8))}
    assert axes_and_costs(model, params, FIVE, jnp.ones((8, 3))) == ({}, {})


def test_kernels_of_one_size_that_are_added_or_multiplied_are_all_kernels():
    for join in (jnp.add, jnp.multiply, lambda a, b: a * jax.nn.sigmoid(b)):
        axes, costs = axes_and_costs(
            lambda p, x, join=join: x @ join(p["a"], p["b"]).T,
            {"a": TALL, "b": TALL},
            FIVE,
        )
        assert axes == {"a": ["oi"], "b": ["oi"]}
        assert costs == {"a": 5, "b": 5}


def test_a_leaf_of_its_own_name_that_no_product_reads_is_asked_for():
    def model(p, x):
        return x * p["mlp"]["kernel"].sum()

    params = {"mlp": {"kernel": TALL}}
    with pytest.raises(ValueError, match=r"'mlp/kernel'.*no product.*layout="):
        st3jax.layouts(model, params, FIVE)
    named = {"Dense_0": {"kernel": TALL}}
    found = st3jax.layouts(lambda p, x: x, named, FIVE)
    assert found == {"Dense_0/kernel": "io"}
