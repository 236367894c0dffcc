"""The published networks have the layers, weights and costs that are published."""

import collections
import contextlib
import functools
import math
from inspect import signature

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import base_config
import paths
import st3jax
from models import MODELS, create_model, layers
from models.layers import BATCH_AXIS
from models.vgg import VGG

KEY = jax.random.key(0)


# Tables of layers: a kernel's shape, and at how many places of an image it is used.


def conv(size, c_in, c_out, side):
    return (size, size, c_in, c_out), side**2


def basic(c_in, c, side, blocks):
    """Two 3x3 convolutions a block, and a 1x1 beside the first two if it widens."""
    shortcut = [] if c_in == c else [conv(1, c_in, c, side)]
    return [
        conv(3, c_in, c, side),
        *shortcut,
        *[conv(3, c, c, side)] * (2 * blocks - 1),
    ]


def bottleneck(c_in, c, side, blocks):
    """1x1, 3x3 and 1x1; the first 3x3 has the stride, so a 1x1 comes before it."""
    before = side if c_in == 64 else 2 * side
    return [
        conv(1, c_in, c, before),
        conv(1, c_in, 4 * c, side),
        *[conv(1, 4 * c, c, side)] * (blocks - 1),
        *[conv(3, c, c, side), conv(1, c, 4 * c, side)] * blocks,
    ]


def resnet_table(*blocks, deep):
    stage, widened = (bottleneck, 4) if deep else (basic, 1)
    return [
        conv(7, 3, 64, 112),
        *stage(64, 64, 56, blocks[0]),
        *stage(64 * widened, 128, 28, blocks[1]),
        *stage(128 * widened, 256, 14, blocks[2]),
        *stage(256 * widened, 512, 7, blocks[3]),
        ((512 * widened, 1000), 1),
    ]


def small_table(blocks, classes, k=1):
    """CIFAR ResNets, and with wider stages WideResNets."""
    return [
        conv(3, 3, 16, 32),
        *basic(16, 16 * k, 32, blocks),
        *basic(16 * k, 32 * k, 16, blocks),
        *basic(32 * k, 64 * k, 8, blocks),
        ((64 * k, classes), 1),
    ]


def vgg_table(*counts, sides=(224, 112, 56, 28, 14), classes=1000):
    table, c_in = [], 3
    for count, c, side in zip(counts, (64, 128, 256, 512, 512), sides, strict=True):
        table += [conv(3, c_in, c, side), *[conv(3, c, c, side)] * (count - 1)]
        c_in = c
    return [*table, ((512, classes), 1)]


def mobilenet_table(width=1):
    def separable(c_in, c, side):
        c_in, c = int(c_in * width), int(c * width)
        return [((3, 3, 1, c_in), side**2), conv(1, c_in, c, side)]

    return [
        conv(3, 3, int(32 * width), 112),
        *separable(32, 64, 112),
        *separable(64, 128, 56),
        *separable(128, 128, 56),
        *separable(128, 256, 28),
        *separable(256, 256, 28),
        *separable(256, 512, 14),
        *separable(512, 512, 14) * 5,
        *separable(512, 1024, 7),
        *separable(1024, 1024, 7),
        ((int(1024 * width), 1000), 1),
    ]


IMAGENET, CIFAR10, CIFAR100 = (224, 1000), (32, 10), (32, 100)
NETWORKS = {  # arguments, (size of images, classes), table, kernel weights
    "ResNet-18": (
        {"name": "imagenet_resnet", "depth": 18},
        IMAGENET,
        resnet_table(2, 2, 2, 2, deep=False),
        11_678_912,
    ),
    "ResNet-34": (
        {"name": "imagenet_resnet", "depth": 34},
        IMAGENET,
        resnet_table(3, 4, 6, 3, deep=False),
        21_779_648,
    ),
    "ResNet-50": (
        {"name": "imagenet_resnet", "depth": 50},
        IMAGENET,
        resnet_table(3, 4, 6, 3, deep=True),
        25_502_912,
    ),
    "ResNet-101": (
        {"name": "imagenet_resnet", "depth": 101},
        IMAGENET,
        resnet_table(3, 4, 23, 3, deep=True),
        44_442_816,
    ),
    "ResNet-152": (
        {"name": "imagenet_resnet", "depth": 152},
        IMAGENET,
        resnet_table(3, 8, 36, 3, deep=True),
        60_040_384,
    ),
    "VGG-11": (
        {"name": "vgg", "depth": 11},
        IMAGENET,
        vgg_table(1, 1, 2, 2, 2),
        9_217_728 + 512_000,
    ),
    "VGG-13": (
        {"name": "vgg", "depth": 13},
        IMAGENET,
        vgg_table(2, 2, 2, 2, 2),
        9_402_048 + 512_000,
    ),
    "VGG-16": (
        {"name": "vgg", "depth": 16},
        IMAGENET,
        vgg_table(2, 2, 3, 3, 3),
        14_710_464 + 512_000,
    ),
    "VGG-19": (
        {"name": "vgg", "depth": 19},
        IMAGENET,
        vgg_table(2, 2, 4, 4, 4),
        20_018_880 + 512_000,
    ),
    "VGG-16 on CIFAR": (
        {"name": "vgg", "depth": 16},
        CIFAR10,
        vgg_table(2, 2, 3, 3, 3, sides=(32, 16, 8, 4, 2), classes=10),
        14_710_464 + 5_120,
    ),
    "MobileNetV1": (
        {"name": "mobilenet_v1"},
        IMAGENET,
        mobilenet_table(),
        3_185_088 + 1_024_000,
    ),
    "MobileNetV1, half": (
        {"name": "mobilenet_v1", "multiplier": 0.5},
        IMAGENET,
        mobilenet_table(0.5),
        807_648 + 512_000,
    ),
    "ResNet-20": (
        {"name": "cifar_resnet", "depth": 20},
        CIFAR10,
        small_table(3, 10),
        270_896,
    ),
    "ResNet-56": (
        {"name": "cifar_resnet", "depth": 56},
        CIFAR10,
        small_table(9, 10),
        851_504,
    ),
    "ResNet-110": (
        {"name": "cifar_resnet", "depth": 110},
        CIFAR10,
        small_table(18, 10),
        1_722_416,
    ),
    "WideResNet-34-2": (
        {"name": "wide_resnet", "depth": 34, "widen": 2},
        CIFAR100,
        small_table(5, 100, k=2),
        1_862_576,
    ),
    "WideResNet-28-10": (
        {"name": "wide_resnet", "depth": 28, "widen": 10},
        CIFAR10,
        small_table(4, 10, k=10),
        36_461_232,
    ),
}


def build(arguments, classes):
    return create_model(ml_collections.ConfigDict({"model": arguments}), classes)


def images(size, batch=1):
    return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)


def abstract_variables(model, size):
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, KEY, images(size))


@functools.cache
def shapes(name):
    """Shapes of a network's parameters by path; nothing is computed."""
    arguments, (size, classes), _, _ = NETWORKS[name]
    variables = abstract_variables(build(arguments, classes), size)
    return {path: x.shape for path, x in paths.by_path(variables["params"]).items()}


def kernels(model, size):
    """Shape and number of places of each kernel, without order."""
    variables = abstract_variables(model, size)
    apply = functools.partial(model.apply, train=False)
    costs = st3jax.multiply_adds(apply, variables, images(size))
    leaves = paths.kernels(variables)
    assert costs.keys() == leaves.keys()
    return collections.Counter((leaves[path].shape, costs[path]) for path in leaves)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_layers_of_its_table(name):
    arguments, (size, classes), table, weights = NETWORKS[name]
    assert kernels(build(arguments, classes), size) == collections.Counter(table)
    assert sum(math.prod(shape) for shape, _ in table) == weights


@pytest.mark.parametrize("name", NETWORKS)
def test_a_kernel_has_no_bias_and_a_norm_has_a_scale_and_one(name):
    found = collections.defaultdict(set)
    for path in shapes(name):
        layer, _, leaf = path.rpartition("/")
        found[layer].add(leaf)
    for layer, leaves in found.items():
        assert leaves == ({"scale", "bias"} if "norm" in layer else {"kernel"}), layer


PARAMETERS = {  # as PyTorch and Keras count them, with a bias for each class
    "ResNet-18": 11_689_512,
    "ResNet-34": 21_797_672,
    "ResNet-50": 25_557_032,
    "ResNet-101": 44_549_160,
    "ResNet-152": 60_192_808,
    "MobileNetV1": 4_231_976,
    "ResNet-20": 272_474,
    "ResNet-56": 855_770,
    "ResNet-110": 1_730_714,
    "WideResNet-28-10": 36_479_194,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_parameters_are_as_many_as_published(name):
    _, (_, classes), _, _ = NETWORKS[name]
    parameters = sum(map(math.prod, shapes(name).values()))
    assert parameters + classes == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("VGG-11", 132_868_840),
        ("VGG-13", 133_053_736),
        ("VGG-16", 138_365_992),
        ("VGG-19", 143_678_248),
    ],
)
def test_a_vgg_has_the_published_parameters_but_for_its_head_and_biases(
    name, published
):
    convolutions = {k: v for k, v in shapes(name).items() if "head" not in k}
    biases = sum(v[-1] for k, v in convolutions.items() if k.endswith("kernel"))
    dense = 25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    found = sum(map(math.prod, convolutions.values())) + biases + dense
    assert found == published


@pytest.mark.parametrize(
    ("name", "low", "high"),  # millions
    [
        ("ResNet-18", 1810, 1820),
        ("ResNet-34", 3660, 3670),
        ("ResNet-101", 7800, 7830),
        ("ResNet-152", 11510, 11560),
        ("VGG-11", 7610 - 125, 7610 - 115),  # its three dense layers take 123.6
        ("VGG-13", 11310 - 130, 11310 - 115),
        ("VGG-16", 15345, 15355),
        ("VGG-19", 19630 - 130, 19630 - 115),
        ("VGG-16 on CIFAR", 312, 314),
        ("MobileNetV1", 566.2, 571.8),
        ("MobileNetV1, half", 148, 150.5),
        ("ResNet-56", 125, 126),
        ("ResNet-110", 252.5, 253.5),
        ("WideResNet-28-10", 5200, 5300),
    ],
)
def test_an_image_costs_what_is_published(name, low, high):
    # That the network has the table's layers is tested above.
    cost = sum(math.prod(shape) * places for shape, places in NETWORKS[name][2])
    assert low <= cost / 1e6 <= high


def test_every_network_works_on_small_images_too():
    sides = (8, 4, 2, 1, 1)
    table = vgg_table(1, 1, 2, 2, 2, sides=sides, classes=10)
    assert kernels(MODELS["vgg"](11, 10), 8) == collections.Counter(table)
    pools = VGG((1, 0, 0, 0, 0), 10, norm_momentum=0.99, dtype=jnp.float32)
    x = jax.random.normal(KEY, (2, 5, 5, 3))
    run = jax.jit(functools.partial(pools.init_with_output, train=False))
    logits, _ = run(KEY, x)
    assert np.all(np.isfinite(logits))
    assert np.any(logits)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "vgg", "depth": 12}, "a VGG has depth 11/13/16/19, got 12"),
        (
            {"name": "mobilenet_v1", "multiplier": 0},
            "MobileNetV1 is 1/32 or more, got 0",
        ),
        ({"name": "mobilenet_v1", "multiplier": math.nan}, "1/32 or more, got nan"),
        ({"name": "mobilenet_v1", "multiplier": math.inf}, "1/32 or more, got inf"),
        ({"name": "mobilenet_v2"}, "'mobilenet_v1', 'vgg', 'wide_resnet', got"),
        ({"name": "vgg"}, "depth is missing, which 'vgg' needs"),
        (
            {"name": "vgg", "depth": 11, "widen": 2},
            "widen is 2, but 'vgg' has no widen",
        ),
        ({"name": "vgg", "depth": 11, "dtype": "float7"}, "data type 'float7' not"),
    ],
)
def test_an_argument_out_of_its_range_is_named(arguments, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        build(arguments, 10)


def test_every_argument_of_a_network_is_a_field_of_the_configuration():
    known = {name for make in MODELS.values() for name in signature(make).parameters}
    fields = base_config.get_config().model
    assert set(fields) == known - {"num_classes"} | {"name"}
    assert fields.name == ""
    assert not any(value for name, value in fields.items() if name != "name")


SMALL = {  # one of each family
    "cifar_resnet": {"depth": 8, "width": 2},
    "imagenet_resnet": {"depth": 50, "width": 2},
    "mobilenet_v1": {"multiplier": 0.25},
    "vgg": {"depth": 11},
    "wide_resnet": {"depth": 10, "widen": 2},
}


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@contextlib.contextmanager
def watched():
    """Each call of a layer, and last that of the model: who, and the dtype returned."""
    calls = []

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            calls.append((context.module, jax.tree.leaves(result)[0].dtype))
        return result

    with nn.intercept_methods(watch):
        yield calls


def train_on_two_devices(model, variables):
    """Shapes of logits and new statistics in training, as on two devices."""

    def apply(x):
        rngs = {"dropout": KEY}
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

    x = jax.ShapeDtypeStruct((2, 4, 8, 8, 3), jnp.float32)
    return jax.eval_shape(jax.vmap(apply, axis_name=BATCH_AXIS), x)


def test_every_model_has_a_small_one_here():
    assert SMALL.keys() == MODELS.keys()


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_for_what_a_layer_computes_and_for_nothing_else(name, train):
    model = MODELS[name](num_classes=10, dtype="bfloat16", **SMALL[name])
    variables = abstract_variables(model, 8)
    assert dtypes(variables) == {"float32"}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    with watched() as calls:
        if train:
            logits, new = train_on_two_devices(model, zeros)
            old = {"batch_stats": variables["batch_stats"]}
            assert jax.tree.structure(new) == jax.tree.structure(old)
            assert dtypes(new) == {"float32"}
        else:
            apply = functools.partial(model.apply, train=False)
            logits = jax.eval_shape(apply, variables, images(8))
    assert logits.dtype == jnp.float32
    inner = [(type(layer), str(dtype)) for layer, dtype in calls[:-1]]
    assert {nn.Conv, nn.BatchNorm, nn.Dense} <= {layer for layer, _ in inner}
    assert {dtype for _, dtype in inner} == {"bfloat16"}


@pytest.mark.parametrize("name", SMALL)
def test_thresholds_are_float32_with_every_dtype(name):
    for dtype in ("float32", "bfloat16"):
        model = MODELS[name](num_classes=10, dtype=dtype, **SMALL[name])
        params = abstract_variables(model, 8)["params"]
        tx = st3jax.st3(optax.sgd(0.1), 0.9)
        thresholds = jax.eval_shape(tx.init, params).thresholds
        assert len(jax.tree.leaves(thresholds)) == len(paths.kernels(params))
        assert dtypes(thresholds) == {"float32"}


def test_depthwise_kernels_are_pruned_like_others():
    model = MODELS["mobilenet_v1"](num_classes=10, multiplier=0.25)
    leaves = abstract_variables(model, 8)["params"]
    found = [x.shape for path, x in paths.kernels(leaves).items() if "depth" in path]
    assert [shape[:3] for shape in found] == [(3, 3, 1)] * 13
    block = {name: leaves[f"block2_{name}"] for name in ("depthwise", "pointwise")}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), block)

    @jax.jit
    def shares(params):
        layers = st3jax.summary(st3jax.prune(params, 0.75)).layers
        return {path: layer.zeros / layer.weights for path, layer in layers.items()}

    assert all(0.6 < share < 0.9 for share in shares(params).values())


@pytest.mark.parametrize("name", SMALL)
def test_every_norm_is_as_the_configuration_has_it(name):
    model = MODELS[name](num_classes=10, norm_momentum=0.9, **SMALL[name])
    variables = abstract_variables(model, 8)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    with watched() as calls:
        train_on_two_devices(model, zeros)
    norms = [layer for layer, _ in calls if isinstance(layer, nn.BatchNorm)]
    facts = {(norm.epsilon, norm.momentum, norm.axis_name) for norm in norms}
    assert facts == {(1e-5, 0.9, BATCH_AXIS)}


def test_statistics_are_those_of_the_batch_over_all_devices():
    model = MODELS["cifar_resnet"](depth=8, num_classes=3, width=2, norm_momentum=0)
    x = jax.random.normal(KEY, (8, 8, 8, 3)) * jnp.arange(1.0, 9)[:, None, None, None]
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32),
        abstract_variables(model, 8),
    )

    def statistics(devices):
        apply = jax.pmap(
            lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[1],
            BATCH_AXIS,
            devices=jax.devices()[:devices],
        )
        return jax.device_get(apply(x.reshape(devices, -1, *x.shape[1:])))

    (whole,) = zip(*jax.tree.leaves(statistics(1)), strict=True)
    first, second = zip(*jax.tree.leaves(statistics(2)), strict=True)
    for one, other, expected in zip(first, second, whole, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "channels", "fan_in"),
    [
        (layers.conv(jnp.float32, 256, 3), 64, 9 * 64),
        (layers.conv(jnp.float32, 2048, 3, feature_group_count=2048), 2048, 9),
    ],
    ids=["3x3", "depthwise"],
)
def test_kernels_begin_normal_with_the_variance_of_he(layer, channels, fan_in):
    kernel = layer.init(KEY, jnp.zeros((1, 1, 1, channels)))["params"]["kernel"]
    sigma = math.sqrt(2 / fan_in)
    assert np.std(kernel) == pytest.approx(sigma, rel=0.02)
    assert np.mean(kernel) == pytest.approx(0, abs=0.02 * sigma)
    assert np.max(np.abs(kernel)) > 3 * sigma  # not cut off
