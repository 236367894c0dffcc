"""The ONNX writer: every network and every primitive, against JAX in ONNX Runtime."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from shipped import of_model, of_transformer

from errors import UserError
from paths import kernels
from shipping.network import Network
from shipping.onnx_file import first_difference
from shipping.onnx_primitives import PRIMITIVES
from shipping.onnx_writer import to_onnx, write

pytestmark = pytest.mark.usefixtures("quickly_compiled")
TINY = {  # size of images, channels, share of zeros; and what the model takes
    "cifar_resnet": ((8, 1, 0.7), {"depth": 8, "width": 8}),
    "imagenet_resnet": ((33, 3, 0.7), {"depth": 50, "width": 4}),
    "mobilenet_v1": ((33, 3, 0.7), {"multiplier": 0.125}),
    "vgg": ((9, 3, 0.7), {"depth": 11}),
    "wide_resnet": ((8, 3, 0.7), {"depth": 10, "widen": 1}),
}
NAMES = [*TINY, "transformer"]


def tiny_network(name):
    if name == "transformer":
        return of_transformer()
    images, options = TINY[name]
    return of_model(name, *images, **options)


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    return tiny_network(request.param)


@pytest.fixture(scope="module")
def model(network):
    return to_onnx(network)


def run(model, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


def from_jax(network, images):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(network.apply)(network.variables, images))


def error(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def arrays(model):
    return {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}


def operators(model):
    return [node.op_type for node in model.graph.node]


def layer(apply, *shape, weights=()):
    """A network of one operation, on random images."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.standard_normal(shape).astype(np.float32)

    variables = {f"w{n}": draw(shape) for n, shape in enumerate(weights)}
    return Network("layer", apply, variables, draw(shape), {})


def check(network):
    """The model of a network, which gives what JAX gives for two sizes of batches."""
    model = to_onnx(network)
    for images in (network.images, network.images[:1]):
        assert error(run(model, images), from_jax(network, images)) < 1e-5
    return model


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_batch_gives_what_jax_gives(network, model, count):
    images = network.images[:count]
    assert error(run(model, images), from_jax(network, images)) < 1e-5


def test_kernels_have_their_zeros_and_these_are_positive(network):
    written = write(network)
    counts = {}
    for name, array in arrays(written.model).items():
        if array.dtype == np.float32:
            assert not np.signbit(array[array == 0]).any()
        if name in written.sources:
            path = written.sources[name]
            counts[path] = counts.get(path, 0) + np.sum(array == 0)
    expected = {k: np.sum(x == 0) for k, x in kernels(network.variables).items()}
    assert {path: counts[path] for path in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_few_nodes_are_left(name):
    found = operators(to_onnx(tiny_network(name)))
    if name == "transformer":
        assert found.count("LayerNormalization") == 5
        assert found.count("Softmax") == 2
        assert found.count("Transpose") <= 9
        return
    transposed = 0 if name == "cifar_resnet" else 1  # one channel comes first and last
    assert found.count("Transpose") == transposed
    assert not {"Sub", "Div", "Sqrt", "ReduceSum"} & {*found}
    normed_first = 4 if name == "wide_resnet" else 0
    assert found.count("Mul") == normed_first


def test_no_step_of_a_right_model_differs(network):
    assert "no single step" in first_difference(network)


def test_names_are_those_of_the_parameters():
    model = to_onnx(tiny_network("cifar_resnet"))
    assert model.graph.node[1].name == "stem/conv"
    assert {"stem/kernel", "stem/bias", "head/kernel"} <= arrays(model).keys()
    properties = {x.key: x.value for x in model.metadata_props}
    assert properties["network"] == "cifar_resnet"
    vit = to_onnx(tiny_network("transformer"))
    assert "blocks/attention/query.1/kernel" in arrays(vit)


def test_a_channel_scaled_by_zero_keeps_its_weights():
    network = tiny_network("cifar_resnet")
    scale = network.variables["params"]["stem_norm"]["scale"]
    scale[0] = 0.0
    model = check(network)
    assert operators(model).count("Mul") == 1  # not folded
    kernel = network.variables["params"]["stem"]["kernel"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(arrays(model)["stem/kernel"], kernel)


def test_negative_scales_leave_no_negative_zeros():
    network = tiny_network("cifar_resnet")
    network.variables["params"]["stem_norm"]["scale"][:] = -1.0
    kernel = arrays(check(network))["stem/kernel"]
    assert (kernel == 0).any()
    assert not np.signbit(kernel[kernel == 0]).any()


ELEMENTWISE = {
    "abs": jnp.abs,
    "add": lambda x: x + x[:, ::1],
    "div": lambda x: 1.0 / (2.0 + x * x),
    "erf": lax.erf,
    "exp": jnp.exp,
    "integer_pow": lambda x: lax.integer_pow(x, 3) + lax.integer_pow(2.0 + x * x, -2),
    "log": lambda x: jnp.log(1.0 + x * x),
    "logistic": lax.logistic,
    "max": lambda x: jnp.maximum(x, 0.5) + jnp.maximum(-0.25, x * 2) + jax.nn.relu(x),
    "min": lambda x: jnp.minimum(x, -0.5 * x),
    "mul": lambda x: x * (x - 1.0),
    "neg": lambda x: -x,
    "rsqrt": lambda x: lax.rsqrt(1.0 + x * x),
    "sqrt": lambda x: jnp.sqrt(1.0 + x * x),
    "square": lax.square,
    "stop_gradient": lambda x: 2.0 * lax.stop_gradient(x),
    "sub": lambda x: (1.0 - x) - 3.0 * x,
    "tanh": jnp.tanh,
}
MOVES = {
    "broadcast_in_dim": lambda x: x[:, None] * jnp.ones((1, 2, 1, 1, 1)),
    "convert_element_type": lambda x: (4 * x).astype(jnp.int32).astype(jnp.float32),
    "copy": lambda x: jnp.copy(x) * 2.0,
    "copy_p": lambda x: jnp.array(x) * 2.0,
    "reduce_max": lambda x: x.max((1, 3), keepdims=True) + x.max(2, keepdims=True),
    "reduce_sum": lambda x: x.sum(1, keepdims=True) + x.mean((1, 2), keepdims=True),
    "reshape": lambda x: x.reshape(x.shape[0], -1, 2).reshape(-1, 4, 6),
    "squeeze": lambda x: (x.sum(1, keepdims=True) * 1.5).squeeze(1),
    "transpose": lambda x: x.transpose(0, 3, 1, 2) + x.reshape(x.shape[0], 3, 2, 4),
}
LAYERS = {
    "conv_general_dilated": (
        lambda v, x: lax.conv_general_dilated(
            x, v["w0"], (2, 1), [(0, 2), (1, 0)], rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2,
        ),
        (3, 7, 9, 4),
        [(3, 2, 2, 6)],
    ),
    "dot_general": (
        lambda v, x: jnp.einsum("bqhd,hde->bqe", x, v["w0"]), (3, 4, 2, 3), [(2, 3, 5)],
    ),
    "reduce_window_max": (
        lambda v, x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1),
            [(0, 0), (1, 0), (0, 1), (0, 0)],
        ),
        (3, 7, 9, 4),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive(name):
    if name in LAYERS:
        apply, shape, weights = LAYERS[name]
        check(layer(apply, *shape, weights=weights))
    else:
        function = ELEMENTWISE.get(name) or MOVES[name]
        check(layer(lambda v, x: function(x), 3, 2, 4, 3))


@pytest.mark.parametrize(
    ("equation", "shape", "weights"),
    [
        ("bi,io->bo", (3, 4), (4, 5)),
        ("bi,oi->bo", (3, 4), (5, 4)),
        ("oi,bi->ob", (3, 4), (5, 4)),
        ("bti,ihd->bthd", (3, 4, 5), (5, 2, 3)),
        ("bthd,hdo->bto", (3, 4, 2, 3), (2, 3, 5)),
        ("ihd,bti->hdbt", (3, 4, 5), (5, 2, 3)),
    ],
)
def test_products_with_weights(equation, shape, weights):
    turned = equation[0] != "b"
    leads = equation.split("->")[1][0] != "b"

    def apply(variables, x):
        pair = (variables["w0"], x) if turned else (x, variables["w0"])
        y = jnp.einsum(equation, *pair)
        return jnp.moveaxis(y, equation.split("->")[1].index("b"), 0) if leads else y

    found = operators(check(layer(apply, *shape, weights=[weights])))
    assert ("Gemm" if len(shape) == 2 else "MatMul") in found


@pytest.mark.parametrize(
    ("equation", "transposed"),
    [
        ("bqhd,bkhd->bhqk", 2),
        ("bhqk,bkhd->bqhd", 2),
        ("bhqk,bhkd->bhqd", 0),
        ("bqhd,bqhk->bdk", 2),
        ("bqhd,bqhd->bqh", 0),
    ],
)
def test_products_of_activations(equation, transposed):
    sizes = {"b": 3, "q": 4, "h": 2, "d": 5, "k": 6}
    sides = equation.split("->")[0].split(",")
    shapes = [[sizes[axis] for axis in side[1:]] for side in sides]

    def apply(variables, x):
        pair = (
            (x @ weight).reshape(x.shape[0], *shape)
            for weight, shape in zip(variables.values(), shapes, strict=True)
        )
        return jnp.einsum(equation, *pair)

    weights = [(7, math.prod(shape)) for shape in shapes]
    found = operators(check(layer(apply, 3, 7, weights=weights)))
    assert found.count("Transpose") <= transposed


def test_what_is_computed_again_or_never_used():
    def apply(variables, x):
        x.reshape(x.shape[0], -1).reshape(x.shape)
        return jax.checkpoint(lambda x: jnp.tanh(x * variables["w0"]))(x)

    check(layer(apply, 3, 4, weights=[(4,)]))


def test_an_unknown_primitive_is_named_with_its_place():
    def apply(variables, x):
        return jnp.cumsum(x * variables["w0"], axis=1)

    with pytest.raises(UserError, match=r"'cumsum'.*onnx_primitives"):
        to_onnx(layer(apply, 3, 4, weights=[(4,)]))


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (lambda v, x: x + jnp.zeros(x.shape), "batch's size"),
        (lambda v, x: x * len(x), "write x.shape.0. for len"),
        (lambda v, x: v["w0"], "the same for all images"),
        (lambda v, x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 3), (1, 1), "VALID"), "pooling over"),
        (lambda v, x: lax.scan(lambda c, y: (c, y), 0.0, x.T)[1], "'scan'"),
        (lambda v, x: x - x.mean(0), "batch's size"),
        (lambda v, x: x + jax.random.normal(jax.random.key(0), (4,)), "a random key"),
        (lambda v, x: (x, x * v["w0"]), "2 arrays, and an export has one"),
        (lambda v, x: nn.max_pool(
            x[..., None], (2,), (2,), [(2, 2)]), "padding alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_a_sentence(apply, words):
    with pytest.raises(UserError, match=words):
        to_onnx(layer(apply, 3, 4, weights=[(4,)]))
