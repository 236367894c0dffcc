"""Networks without their dead channels: smaller, and the same."""

import functools

import hypothesis
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from flagless import imported
from flax import nnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from models import MODELS
from shipping.compact import compact
from shipping.network import Network
from shipping.onnx_writer import to_onnx

transformer = imported("transformer")


def make(nodes, arrays, image, outputs):
    """A model of nodes; an image's shape, without the axis of images."""
    image = helper.make_tensor_value_info("image", 1, ["n", *image])
    result = helper.make_tensor_value_info("y", 1, outputs)
    kept = [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    graph = helper.make_graph(nodes, "net", [image], [result], kept)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("other", 1)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(model, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def check_same(model, images, multiple=1):
    """Compacts, and holds the result against what was there; returns all of it."""
    compacted = compact(model, multiple)
    expected, found = outputs(model, images), outputs(compacted.model, images)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-7
    assert all(0 not in x.dims for x in compacted.model.graph.initializer)
    again = compact(compacted.model, multiple)
    assert again.weights[0] == again.weights[1] == compacted.weights[1]
    return compacted


def sizes(compacted):
    return [layer.after[:2] for layer in compacted.layers]


def rng_array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def two_layers(pads=(0, 0, 0, 0), bias=(-1.0, 2.0, 0.5, 0.5)):
    """Two 3x3 convolutions over four channels, of which the first two are dead."""
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 4, 2, 3, 3),
        "b1": np.array(bias, np.float32),
        "w2": rng_array(rng, 3, 4, 3, 3),
    }
    arrays["w1"][:2] = 0
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["y"], pads=pads),
    ]
    return nodes, arrays


IMAGES = np.random.default_rng(1).standard_normal((3, 2, 6, 6)).astype(np.float32)


def test_channels_that_are_zero_or_constant_go_into_biases():
    nodes, arrays = two_layers()
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 4, 4]), IMAGES)
    assert sizes(found) == [(2, 2), (2, 3)]
    assert found.weights == (72 + 108, 36 + 54)
    assert found.multiply_adds == (72 * 36 + 108 * 16, 36 * 36 + 54 * 16)
    biases = {x.name: x for x in found.model.graph.initializer}
    assert any(x.dims == [3] for x in biases.values())  # what the constant gives


def test_a_constant_that_meets_a_padded_border_stays():
    nodes, arrays = two_layers(pads=(1, 1, 1, 1))
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 6, 6]), IMAGES)
    assert sizes(found) == [(2, 3), (3, 3)]


def test_channels_that_nobody_reads_go():
    nodes, arrays = two_layers(bias=(1, 1, 1, 1))
    arrays["w1"] = rng_array(np.random.default_rng(2), 4, 2, 3, 3)
    arrays["w2"][:, [0, 3]] = 0
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 4, 4]), IMAGES)
    assert sizes(found) == [(2, 2), (2, 3)]


def test_one_channel_stays_where_all_are_dead():
    nodes, arrays = two_layers(bias=(-1, -1, -1, -1))
    arrays["w1"][:] = 0
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 4, 4]), IMAGES)
    assert sizes(found) == [(2, 1), (1, 3)]


@pytest.mark.parametrize("function", ["Relu", None])
def test_what_is_not_finite_is_no_constant(function):
    nodes, arrays = two_layers(bias=(np.inf, np.nan, 1, 1))
    if function is None:
        nodes = [nodes[0], helper.make_node("Conv", ["h", "w2"], ["y"])]
    found = compact(make(nodes, arrays, (2, 6, 6), ["n", 3, 4, 4]), multiple=1)
    assert sizes(found) == [(2, 4), (4, 3)]


def test_what_differs_from_place_to_place_is_no_constant():
    rng = np.random.default_rng(0)
    arrays = {
        "up": rng_array(rng, 4, 3),
        "places": rng_array(rng, 5, 3),
        "down": rng_array(rng, 3, 4),
        "bias": rng_array(rng, 4),
    }
    arrays["up"][:, :2] = 0
    arrays["places"][:, 0] = 2
    nodes = [
        helper.make_node("MatMul", ["image", "up"], ["h"]),
        helper.make_node("Add", ["places", "h"], ["a"]),
        helper.make_node("MatMul", ["a", "down"], ["d"]),
        helper.make_node("Add", ["d", "bias"], ["y"]),
    ]
    found = check_same(
        make(nodes, arrays, (5, 4), ["n", 5, 4]), rng_array(rng, 3, 5, 4)
    )
    assert sizes(found) == [(4, 2), (2, 4)]


def test_a_constant_that_no_bias_takes_stays():
    rng = np.random.default_rng(0)
    arrays = {
        "up": rng_array(rng, 4, 3),
        "bias": np.array([1, 0, 1], np.float32),
        "down": rng_array(rng, 3, 4),
    }
    arrays["up"][:, :2] = 0
    nodes = [
        helper.make_node("MatMul", ["image", "up"], ["h"]),
        helper.make_node("Add", ["h", "bias"], ["a"]),
        helper.make_node("MatMul", ["a", "down"], ["d"]),
        helper.make_node("Tanh", ["d"], ["y"]),
    ]
    found = check_same(
        make(nodes, arrays, (5, 4), ["n", 5, 4]), rng_array(rng, 3, 5, 4)
    )
    assert sizes(found) == [(4, 2), (2, 4)]


def test_the_output_keeps_all_its_channels():
    nodes, arrays = two_layers()
    arrays["w2"][1:] = 0
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 4, 4]), IMAGES)
    assert sizes(found)[-1] == (2, 3)


def residual(dead_stem, dead_branch, read=(True,) * 4):
    """A stem, a branch that is added to it, and a head that may not read all."""
    rng = np.random.default_rng(0)
    arrays = {
        "stem": rng_array(rng, 4, 2, 1, 1),
        "branch": rng_array(rng, 4, 4, 3, 3),
        "head": rng_array(rng, 4, 3) * np.array(read, np.float32)[:, None],
        "axes": np.array([2, 3]),
    }
    arrays["stem"][dead_stem] = 0
    arrays["branch"][dead_branch] = 0
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["s"]),
        helper.make_node("Conv", ["s", "branch"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "s"], ["z"]),
        helper.make_node("Relu", ["z"], ["a"]),
        helper.make_node("ReduceMean", ["a", "axes"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "head"], ["y"]),
    ]
    return make(nodes, arrays, (2, 6, 6), ["n", 3])


def test_residual_channels_go_only_together():
    assert sizes(check_same(residual([0], [1]), IMAGES)) == [(2, 4), (4, 4), (4, 3)]
    found = check_same(residual([0, 2], [1, 2]), IMAGES)
    assert sizes(found) == [(2, 3), (3, 3), (3, 3)]
    # Nobody reads channel 3 but the branch.
    found = check_same(residual([], [], [True, True, True, False]), IMAGES)
    assert sizes(found) == [(2, 4), (4, 4), (4, 3)]


def test_numbers_of_channels_are_rounded_up():
    """By channels that do nothing, also where two layers must agree."""
    rng = np.random.default_rng(0)
    arrays = {
        "stem": rng_array(rng, 10, 2, 1, 1),
        "branch": rng_array(rng, 10, 10, 3, 3),
        "head": rng_array(rng, 3, 10, 1, 1),
    }
    arrays["stem"][:5], arrays["branch"][:5] = 0, 0
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["s"]),
        helper.make_node("Conv", ["s", "branch"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "s"], ["z"]),
        helper.make_node("Conv", ["z", "head"], ["y"]),
    ]
    model = make(nodes, arrays, (2, 6, 6), ["n", 3, 6, 6])
    for multiple, kept in ((1, 5), (4, 8), (6, 6), (8, 8), (16, 10)):
        found = check_same(model, IMAGES, multiple)
        assert sizes(found) == [(2, kept), (kept, kept), (kept, 3)]
    assert compact(model).weights == compact(model, multiple=4).weights


def test_a_branch_that_is_constant_is_gone():
    found = check_same(residual([], [0, 1, 2, 3]), IMAGES)
    assert [node.op_type for node in found.model.graph.node].count("Conv") == 1
    assert sizes(found) == [(2, 4), (0, 0), (4, 3)]


def test_depthwise_channels_go_with_what_they_read():
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 4, 2, 1, 1),
        "depthwise": rng_array(rng, 8, 1, 3, 3),
        "b": np.array([-1, -1, 1, 1, 1, 1, -1, -1], np.float32),
        "w2": rng_array(rng, 3, 8, 1, 1),
    }
    arrays["w1"][0] = 0  # zero, and so are its two
    arrays["depthwise"][2:4] = 0  # constants
    arrays["depthwise"][6] = 0  # and 7 lives
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["h"]),
        helper.make_node(
            "Conv", ["h", "depthwise", "b"], ["d"], group=4, pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["d"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["y"]),
    ]
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 6, 6]), IMAGES)
    assert sizes(found) == [(2, 2), (2, 4), (4, 3)]


def test_groups_of_channels_go_as_a_whole():
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 6, 2, 1, 1),
        "grouped": rng_array(rng, 6, 2, 1, 1),
        "w2": rng_array(rng, 3, 6, 1, 1),
    }
    arrays["w2"][:, [0, 1, 2]] = 0
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["h"]),
        helper.make_node("Conv", ["h", "grouped"], ["d"], group=3),
        helper.make_node("Conv", ["d", "w2"], ["y"]),
    ]
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 6, 6]), IMAGES)
    assert sizes(found) == [(2, 4), (4, 4), (4, 3)]


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_hidden_units_of_a_transformer(gelu):
    """``gelu(bias)`` of a unit without inputs goes into the next bias, exactly."""
    rng = np.random.default_rng(0)
    arrays = {
        "up": rng_array(rng, 4, 8),
        "up_bias": rng_array(rng, 8),
        "down": rng_array(rng, 8, 4),
        "down_bias": rng_array(rng, 4),
    }
    arrays["up"][:, :3] = 0
    arrays["up_bias"][:3] = -2.5, 1, 2.5
    arrays["down"][:3] = 10
    arrays["down"][7] = 0
    nodes = [
        helper.make_node("MatMul", ["image", "up"], ["h"]),
        helper.make_node("Add", ["h", "up_bias"], ["hb"]),
        helper.make_node("Gelu", ["hb"], ["a"], approximate=gelu),
        helper.make_node("MatMul", ["a", "down"], ["d"]),
        helper.make_node("Add", ["down_bias", "d"], ["db"]),
        helper.make_node("Add", ["image", "db"], ["y"]),
    ]
    model = make(nodes, arrays, (5, 4), ["n", 5, 4])
    found = check_same(model, rng_array(rng, 3, 5, 4))
    assert sizes(found) == [(4, 4), (4, 4)]


def test_a_product_that_has_no_bias_gets_one():
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 4, 5),
        "b1": np.array([2, 1, 1, -1, 3], np.float32),
        "w2": rng_array(rng, 5, 3),
    }
    arrays["w1"][:, :2] = 0
    nodes = [
        helper.make_node("Gemm", ["image", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["y"]),
    ]
    found = check_same(make(nodes, arrays, (4,), ["n", 3]), rng_array(rng, 6, 4))
    assert sizes(found) == [(4, 3), (3, 3)]


@pytest.mark.parametrize(
    "reshape",
    [
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Reshape", ["p", "fixed"], ["f"]),
        helper.make_node("Reshape", ["p", "open"], ["f"]),
    ],
    ids=["flatten", "fixed", "open"],
)
def test_channels_in_other_shapes(reshape):
    """Channels last, as tokens, pooled, and flattened with their places."""
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 4, 2, 1, 1),
        "scale": rng_array(rng, 4),
        "w2": rng_array(rng, 3, 16),
        "fixed": np.array([-1, 16]),
        "open": np.array([0, -1]),
    }
    arrays["w1"][1] = 0
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["h"]),
        helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["t", "scale"], ["s"]),
        helper.make_node("Transpose", ["s"], ["c"], perm=[0, 3, 1, 2]),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[3, 3], strides=[3, 3]),
        reshape,
        helper.make_node("Gemm", ["f", "w2"], ["y"], transB=1),
    ]
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3]), IMAGES)
    assert sizes(found) == [(2, 3), (12, 3)]


def test_norms_before_activations():
    """A norm that could not be folded: one of a channel that is zero is its bias."""
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 4, 2, 1, 1),
        "scale": rng_array(rng, 4),
        "bias": np.array([-1, 1, -1, 1], np.float32),
        "mean": np.zeros(4, np.float32),
        "var": np.ones(4, np.float32),
        "w2": rng_array(rng, 3, 4, 1, 1),
    }
    arrays["w1"][:2] = 0
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["h"]),
        helper.make_node(
            "BatchNormalization", ["h", "scale", "bias", "mean", "var"], ["b"]
        ),
        helper.make_node("Relu", ["b"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["y"]),
    ]
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 3, 6, 6]), IMAGES)
    assert sizes(found) == [(2, 2), (2, 3)]


@pytest.mark.parametrize(
    "barrier",
    [
        helper.make_node("Softmax", ["h"], ["s"], axis=1),
        helper.make_node("ReduceMean", ["h", "axes"], ["s"]),
        helper.make_node("Conv", ["h", "depthwise"], ["s"], group=4, domain="other"),
    ],
    ids=["across", "mean", "unknown"],
)
def test_channels_at_a_barrier_stay(barrier):
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng_array(rng, 4, 2, 1, 1),
        "axes": np.array([1]),
        "depthwise": rng_array(rng, 4, 1, 1, 1),
        "w2": rng_array(rng, 3, 4, 1, 1),
    }
    arrays["w1"][1] = 0
    nodes = [helper.make_node("Conv", ["image", "w1"], ["h"]), barrier]
    nodes.append(helper.make_node("Add", ["h", "s"], ["z"]))
    nodes.append(helper.make_node("Conv", ["z", "w2"], ["y"]))
    model = make(nodes, arrays, (2, 6, 6), ["n", 3, 6, 6])
    assert sizes(compact(model, multiple=1))[0] == (2, 4)


def test_weights_that_two_layers_share_are_cut_for_one():
    rng = np.random.default_rng(0)
    arrays = {"w": rng_array(rng, 2, 2, 1, 1), "w2": rng_array(rng, 2, 2, 1, 1)}
    arrays["w2"][:, 1] = 0
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["h"]),
        helper.make_node("Conv", ["h", "w2"], ["g"]),
        helper.make_node("Conv", ["g", "w"], ["y"]),
    ]
    found = check_same(make(nodes, arrays, (2, 6, 6), ["n", 2, 6, 6]), IMAGES)
    assert sizes(found) == [(2, 1), (1, 2), (2, 2)]


def test_the_model_that_is_given_stays_as_it_is():
    nodes, arrays = two_layers()
    model = make(nodes, arrays, (2, 6, 6), ["n", 3, 4, 4])
    before = model.SerializeToString(deterministic=True)
    compact(model)
    assert model.SerializeToString(deterministic=True) == before


def drawn_network(rng, blocks):
    """Residual blocks of all kinds of layers, many of whose channels are dead."""
    nodes, arrays, count = [], {}, 0

    def new(op, inputs, **attributes):
        nonlocal count
        count += 1
        nodes.append(helper.make_node(op, inputs, [f"t{count}"], **attributes))
        return f"t{count}"

    def kernel(shape, dead):
        w = rng_array(rng, *shape)
        w[rng.random(shape[0]) < dead] = 0
        w[:, rng.random(shape[1]) < dead / 2] = 0
        arrays[f"w{count}"] = w
        arrays[f"b{count}"] = rng_array(rng, shape[0]) * (rng.random() < 0.7)
        return [f"w{count}", f"b{count}"]

    def conv(x, ins, outs, group=1):
        size = rng.choice([1, 3])
        pads = [size // 2] * 4
        weights = kernel((outs, ins // group, size, size), rng.choice([0, 0.3, 0.6, 1]))
        return new("Conv", [x, *weights], pads=pads, group=group)

    width = 6
    x = new("Relu", [conv("image", 2, width)])
    for block in blocks:
        y = new("Relu", [conv(x, width, 4)])
        if block == "depthwise":
            y = new("Relu", [conv(y, 4, 8, group=4)])
            y = conv(y, 8, width)
        elif block == "grouped":
            y = new("Sigmoid", [conv(y, 4, 4, group=2)])
            y = conv(y, 4, width)
        elif block == "norm":
            arrays[f"scale{count}"] = rng_array(rng, 4, 1, 1)
            y = new("Mul", [y, f"scale{count}"])
            y = conv(new("Relu", [y]), 4, width)
        elif block == "pool":
            y = new("MaxPool", [y], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            y = conv(y, 4, width)
        else:
            y = conv(y, 4, width)
        x = new("Relu", [new("Add", [x, y] if rng.random() < 0.5 else [y, x])])
    x = new("Flatten", [new("GlobalAveragePool", [x])])
    arrays["head"] = rng_array(rng, width, 3) * (rng.random((width, 1)) < 0.7)
    nodes.append(helper.make_node("MatMul", [x, "head"], ["y"]))
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    return make(nodes, arrays, (2, 6, 6), ["n", 3])


BLOCKS = st.sampled_from(["plain", "depthwise", "grouped", "norm", "pool"])


@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.lists(BLOCKS, min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_network_stays_the_same(seed, blocks, multiple):
    model = drawn_network(np.random.default_rng(seed), blocks)
    found = check_same(model, IMAGES, multiple)
    assert found.weights[1] <= found.weights[0]
    assert found.multiply_adds[1] <= found.multiply_adds[0]


def networks():
    """Small ones of this project, as their exports take them."""
    for name, options in (
        ("cifar_resnet", {"depth": 8, "width": 8}),
        ("mobilenet_v1", {"multiplier": 0.25}),
        ("wide_resnet", {"depth": 10, "widen": 1}),
    ):
        model = MODELS[name](num_classes=10, **options)
        init = functools.partial(model.init, train=False)
        images = rng_array(np.random.default_rng(0), 3, 32, 32, 3)
        shapes = jax.eval_shape(init, jax.random.key(0), images)
        apply = functools.partial(model.apply, train=False)
        yield pytest.param(Network(name, apply, shapes, images, {}), id=name)
    model = nnx.eval_shape(lambda: transformer.ViT(8, 2, 16, 2, 2, seed=0))
    graph, shapes = nnx.split(model)
    images = rng_array(np.random.default_rng(0), 3, 8, 8)
    yield pytest.param(
        Network("vit", lambda v, x: nnx.merge(graph, v)(x), shapes, images, {}),
        id="vit",
    )


@pytest.mark.parametrize("network", list(networks()))
def test_networks_of_this_project(network):
    """With 40 % of the outputs of kernels dead, they are smaller and the same."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        if "mean" in str(path[-1]) or "bias" in str(path):
            return 0.1 * rng_array(rng, *leaf.shape) - 0.1
        if "var" in str(path[-1]) or "scale" in str(path):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        weights = rng_array(rng, *leaf.shape) * (leaf.size / leaf.shape[-1]) ** -0.5
        return (weights * (rng.random(leaf.shape[-1]) < 0.6)).astype(np.float32)

    variables = jax.tree.map_with_path(drawn, network.variables)
    model = to_onnx(network._replace(variables=variables))
    found = check_same(model, network.images)
    assert found.weights[1] < 0.85 * found.weights[0]
    assert found.multiply_adds[1] < 0.85 * found.multiply_adds[0]
