"""The same weights give the same result, however they are stored."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import flax
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import st3jax
import st3jax.nnx
from st3jax.layout.names import readings

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KEY = jax.random.key(3)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
few = settings(deadline=None, max_examples=5)


# Storages


class Storage(NamedTuple):
    """A way to hold kernels in one array.

    Attributes:
        layout: A letter for each axis of the array.
        store: From kernels, all of the shape (window, inputs, outputs), to the array.
        restore: The way back, given the shape of a kernel.
        number: How many kernels it holds.
        window: Their window.
    """

    layout: str
    store: Callable
    restore: Callable
    number: int = 1
    window: tuple[int, ...] = ()


def reshaped(layout, sides):
    """One kernel with axes split: ``sides`` are of the array, from its shape."""
    return Storage(
        layout,
        lambda kernels: kernels[0].reshape(sides(*kernels[0].shape)),
        lambda x, shape: [x.reshape(shape)],
    )


def transposed(layout, order, window=()):
    return Storage(
        layout,
        lambda kernels: kernels[0].transpose(order),
        lambda x, shape: [x.transpose(np.argsort(order))],
        window=window,
    )


def stacked(layout, axis, window=()):
    return Storage(
        layout,
        lambda kernels: np.stack(kernels, axis),
        lambda x, shape: [x.take(n, axis) for n in range(2)],
        2,
        window,
    )


STORAGES = {
    "stack": stacked("sio", 0),
    "stack_on_axis_1": stacked("iso", 1),
    "stack_on_the_last_axis": stacked("ios", 2),
    "stacked_convolution": stacked("swio", 0, (3,)),
    "layers_of_experts": Storage(
        "ssio",
        lambda kernels: np.stack(kernels).reshape(2, 1, *kernels[0].shape),
        lambda x, shape: list(x.reshape(2, *shape)),
        2,
    ),
    "stack_of_out_in": Storage(
        "soi",
        lambda kernels: np.stack([w.T for w in kernels]),
        lambda x, shape: [w.T for w in x],
        2,
    ),
    "scanned_query": Storage(
        "sioo",
        lambda kernels: np.stack([w.reshape(len(w), 2, -1) for w in kernels]),
        lambda x, shape: [w.reshape(shape) for w in x],
        2,
    ),
    "scanned_out": Storage(
        "iiso",
        lambda kernels: np.stack(
            [w.reshape(2, -1, w.shape[1]) for w in kernels], axis=2
        ),
        lambda x, shape: [x[:, :, n].reshape(shape) for n in range(2)],
        2,
    ),
    "query": reshaped("ioo", lambda i, o: (i, 2, o // 2)),
    "one_head": reshaped("ioo", lambda i, o: (i, 1, o)),
    "out": reshaped("iio", lambda i, o: (2, i // 2, o)),
    "both_split": reshaped("iioo", lambda i, o: (2, i // 2, o // 2, 2)),
    "heads_outside": Storage(
        "oio",
        lambda kernels: np.stack(np.split(kernels[0], 2, axis=1)),
        lambda x, shape: [x.transpose(1, 0, 2).reshape(shape)],
    ),
    "out_in": transposed("oi", (1, 0)),
    "convolution": transposed("wwio", (0, 1, 2, 3), (3, 2)),
    "convolution_out_in": transposed("oiww", (3, 2, 0, 1), (3, 2)),
    "transpose_kernel": transposed("wwoi", (0, 1, 3, 2), (2, 2)),
}


class Network(NamedTuple):
    """The same kernels, held in two ways.

    Attributes:
        single: Parameters with every kernel in a leaf of its own.
        stored: Parameters with the kernels of each storage in one.
    """

    single: dict
    stored: dict

    @classmethod
    def random(cls, seed, sizes):
        """Kernels of the sizes (inputs, outputs) of each storage, and a head."""
        rng = np.random.default_rng(seed)
        single, stored = {}, {}
        for name, size in sizes.items():
            storage = STORAGES[name]
            scale = 10 ** rng.uniform(-0.5, 0.5)
            shape = (storage.number, *storage.window, *size)
            kernels = scale * rng.normal(size=shape).astype(np.float32)
            stored[name] = {"kernel": storage.store(kernels)}
            single |= {f"{name} {n}": {"kernel": w} for n, w in enumerate(kernels)}
        head = {"kernel": rng.normal(size=(8, 4)).astype(np.float32)}
        return cls({**single, "head": head}, {**stored, "head": head})

    def unstored(self, stored):
        """Any tree like that of the stored parameters, as one of single kernels."""
        single = {}
        for name, part in stored.items():
            if name == "head":
                single[name] = part
                continue
            shape = self.single[f"{name} 0"]["kernel"].shape
            kernels = STORAGES[name].restore(part["kernel"], shape)
            single |= {f"{name} {n}": {"kernel": w} for n, w in enumerate(kernels)}
        return single

    def layouts(self, params):
        """What is said of a tree of either kind."""
        letters = {
            name: STORAGES[name].layout for name in self.stored if name in STORAGES
        }
        single = {
            name: "w" * (part["kernel"].ndim - 2) + "io"
            for name, part in self.single.items()
        }
        return {f"{name}/kernel": {**single, **letters}[name] for name in params}

    def each(self, values):
        """Values of leaves of stored kernels, scalars or one for each kernel."""
        single = {}
        for name, part in values.items():
            number = STORAGES[name].number if name in STORAGES else 1
            each = np.broadcast_to(np.ravel(part["kernel"]), number)
            names = [f"{name} {n}" for n in range(number)] if name != "head" else [name]
            single |= {one: {"kernel": v} for one, v in zip(names, each, strict=True)}
        return single


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name]["kernel"], b[name]["kernel"], name)


def assert_close(a, b):
    """Equal up to the order of sums, with the same zeros."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.asarray(a[name]["kernel"]), np.asarray(b[name]["kernel"])
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(x == 0, y == 0, name)


FEW = ("stack_on_axis_1", "scanned_query", "out", "convolution_out_in")
"""Storages that have all that there is, to be compiled in little time."""


@functools.cache
def network(names=FEW, seed=0):
    """Kernels of sizes that are not all the same."""
    sizes = [(4, 6), (8, 2), (4, 2), (8, 4)]
    return Network.random(seed, {name: sizes[n % 4] for n, name in enumerate(names)})


# Pruning once

MAPPING = {"stack*": 0.3, "*query*": 0.8, "out*": 0.0, "*": 0.6}
RULES = {
    "l1": (0.6, {}),
    "l1_sigma": (0.6, {"criterion": "l1_sigma"}),
    "uniform": (0.6, {"distribution": "uniform"}),
    "erk": (0.6, {"distribution": "erk"}),
    "mapping": (MAPPING, {}),
    "erk of a mapping": ({"*o*": 0.7, "*": 0.4}, {"distribution": "erk"}),
    "2:4": (0.5, {"pattern": "2:4"}),
    "1:2": (0.5, {"pattern": "1:2"}),
    "blocks": (0.6, {"pattern": (2, 2)}),
    "columns by sigma": (0.6, {"pattern": (4, 1), "criterion": "l1_sigma"}),
    "uniform blocks": (0.6, {"pattern": (1, 2), "distribution": "uniform"}),
}
each_rule = pytest.mark.parametrize("rule", RULES)


@each_rule
def test_one_shot_pruning_has_the_same_bits(rule):
    sparsity, options = RULES[rule]
    one_threshold = rule in ("l1_sigma", "2:4", "columns by sigma")  # soon compiled
    names = tuple(STORAGES) if one_threshold else FEW

    @jax.jit
    def pruned(params):
        layout = network(names).layouts(params)
        return st3jax.prune(params, sparsity, layout=layout, **options)

    @few
    @given(st.integers(0, 99))
    def check(seed):
        kernels = network(names, seed)
        found = kernels.unstored(pruned(kernels.stored))
        assert_same(found, pruned(kernels.single))

    check()


# Training

RAMP = st3jax.polynomial_ramp(0.6, 0, 2)
TRAINED = {
    "st3": lambda **layout: st3jax.st3(MOMENTUM, RAMP, **layout),
    "st3 by sigma": lambda **layout: st3jax.st3(
        MOMENTUM, RAMP, criterion="l1_sigma", freeze_step=2, **layout
    ),
    "uniform": lambda **layout: st3jax.st3(
        MOMENTUM, RAMP, distribution="uniform", freeze_step=2, **layout
    ),
    "erk without rescaling": lambda **layout: st3jax.st3(
        MOMENTUM, RAMP, distribution="erk", rescale=False, **layout
    ),
    "mapping": lambda **layout: st3jax.st3(
        MOMENTUM, MAPPING, straight_through=False, update_every=2, **layout
    ),
    "2:4": lambda **layout: st3jax.st3(
        MOMENTUM, st3jax.polynomial_ramp(0.5, 0, 2), pattern="2:4", **layout
    ),
    "blocks": lambda **layout: st3jax.st3(
        MOMENTUM, RAMP, pattern=(2, 2), criterion="l1_sigma", **layout
    ),
    "uniform blocks": lambda **layout: st3jax.st3(
        MOMENTUM, RAMP, pattern=(2, 1), distribution="uniform", **layout
    ),
    "ste": lambda **layout: st3jax.ste(MOMENTUM, RAMP, **layout),
    "gmp": lambda **layout: st3jax.gmp(
        MOMENTUM, RAMP, distribution="uniform", **layout
    ),
    "gmp strict": lambda **layout: st3jax.gmp(
        MOMENTUM, RAMP, sticky="strict", distribution="uniform", **layout
    ),
    "gmp published": lambda **layout: st3jax.gmp(
        MOMENTUM, RAMP, sticky="published", distribution="erk", **layout
    ),
    "str": lambda **layout: st3jax.str_(
        MOMENTUM,
        threshold_optimizer=optax.sgd(0.5),
        initial=-2.0,
        freeze_step=2,
        **layout,
    ),
    "lrr": lambda layout: st3jax.lrr(MOMENTUM, 0.6, cycle_steps=1, keep=0.5),
    "granet": lambda **layout: st3jax.granet(
        MOMENTUM, RAMP, total_steps=4, update_every=1, **layout
    ),
    "rigl": lambda **layout: st3jax.rigl(
        MOMENTUM, 0.6, key=KEY, total_steps=4, update_every=1, **layout
    ),
}


class Step(NamedTuple):
    """What there is after a step, by single kernels."""

    params: dict
    seen: dict
    grads: dict
    per_kernel: dict


def trained(tx, params, opt_state, unstored, each):
    """Yields what there is after each step of a loss of single weights."""

    def loss_fn(params, opt_state):
        weights = unstored(st3jax.sparsify(params, opt_state))
        return sum((jnp.sin(3 * w) + w * w).sum() for w in jax.tree.leaves(weights))

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss_fn)(params, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, st3jax.finalize(params, opt_state), grads

    for _ in range(3):
        params, opt_state, seen, grads = step(params, opt_state)
        parts = map(unstored, (params, seen, grads))
        yield Step(*parts, each(st3jax.find_state(opt_state).per_leaf))


def with_masks(opt_state, masks):
    """The state of a moving mask that starts somewhere else."""
    return opt_state._replace(masks=jax.tree.map(jnp.asarray, masks))


@pytest.mark.parametrize("name", TRAINED)
def test_training_does_not_depend_on_storage(name):
    kernels = network()
    make = TRAINED[name]
    stored_tx, single_tx = (
        make(layout=kernels.layouts(params))
        for params in (kernels.stored, kernels.single)
    )
    stored, single = stored_tx.init(kernels.stored), single_tx.init(kernels.single)
    each = kernels.each
    if name in ("granet", "rigl"):  # of which the state holds masks
        single = with_masks(single, kernels.unstored(stored.masks))
        each = kernels.unstored
    pairs = zip(
        trained(stored_tx, kernels.stored, stored, kernels.unstored, each),
        trained(single_tx, kernels.single, single, lambda tree: tree, lambda t: t),
        strict=True,
    )
    for ours, alone in pairs:
        for a, b in zip(ours, alone, strict=True):
            assert_close(a, b)
    zeros = [(w["kernel"] == 0).mean() for w in ours.seen.values()]
    assert 0.2 < np.mean(zeros) < 0.9


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_every_kernel_of_a_stack_has_as_many_random_weights(distribution):
    kernels = network()

    @jax.jit
    def counts(params):
        tx = st3jax.set_(
            MOMENTUM,
            0.6,
            key=KEY,
            update_every=1,
            distribution=distribution,
            layout=kernels.layouts(params),
        )
        state = tx.init(params)
        _, later = tx.update(params, state, params)
        return state.masks, later.masks

    stored = map(kernels.unstored, counts(kernels.stored))
    for ours, alone in zip(stored, counts(kernels.single), strict=True):
        assert {name: int(m["kernel"].sum()) for name, m in ours.items()} == {
            name: int(m["kernel"].sum()) for name, m in alone.items()
        }


# Modules of Flax


def same_step(tx, params, single_tx, single, unstored):
    """One step of both gives weights that are the same but for the order of sums."""

    @functools.partial(jax.jit, static_argnames="tx")
    def seen(tx, params):
        updates, opt_state = tx.update(params, tx.init(params), params)
        return st3jax.finalize(optax.apply_updates(params, updates), opt_state)

    ours, alone = unstored(seen(tx, params)), seen(single_tx, single)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(a == 0, b == 0)
    zeros = sum(int((w == 0).sum()) for w in jax.tree.leaves(alone))
    assert zeros > 10


def sigma(**options):
    return st3jax.st3(optax.sgd(0.01), 0.6, criterion="l1_sigma", **options)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        attention = linen.MultiHeadDotProductAttention(2, qkv_features=4)
        return linen.Dense(6)(attention(x)), None


class Stack(linen.Module):
    axis: int

    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=2,
            metadata_params={linen.PARTITION_NAME: "layers"},
        )
        return scanned(name="stack")(x, None)[0]


TOKENS = jnp.ones((1, 3, 6))


def scanned(axis):
    model = Stack(axis)
    return model, jax.jit(model.init)(KEY, TOKENS)["params"]


def unstacked(tree, axis):
    def layer(n):
        return jax.tree.map(lambda x: x.take(n, axis), tree["stack"])

    return {"layer0": layer(0), "layer1": layer(1)}


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers_of_linen_are_as_unrolled(axis):
    model, params = scanned(axis)
    traced = st3jax.layouts(lambda p, x: model.apply({"params": p}, x), params, TOKENS)
    dense, query, out = "sio", "sioo", "siio"
    if axis:
        dense, query, out = "iso", "isoo", "isio"
    attention = "stack/MultiHeadDotProductAttention_0"
    assert traced == {
        "stack/Dense_0/kernel": dense,
        f"{attention}/query/kernel": query,
        f"{attention}/key/kernel": query,
        f"{attention}/value/kernel": query,
        f"{attention}/out/kernel": out,
    }
    said = sigma(layout=traced)
    single = unstacked(params, axis)
    same_step(said, params, sigma(), single, lambda t: unstacked(t, axis))
    if axis == 0:  # the names say it too
        assert said.init(params).layouts == sigma().init(params).layouts


def test_mapped_layers_of_linen_are_as_unrolled():
    mapped = linen.vmap(
        linen.Dense, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    params = {"stack": mapped(5, name="Dense_0").init(KEY, jnp.ones((2, 3, 4)))}
    params = {"stack": {"Dense_0": params["stack"]["params"]}}
    single = unstacked(params, 0)
    same_step(sigma(), params, sigma(), single, lambda t: unstacked(t, 0))


def test_stacked_modules_of_nnx_say_what_their_axes_are():
    @nnx.split_rngs(splits=2)
    @functools.partial(nnx.vmap, in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.MultiHeadAttention(2, 6, qkv_features=4, decode=False, rngs=rngs)

    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        stack=stack(rngs),
        up=nnx.ConvTranspose(4, 6, (2,), transpose_kernel=True, rngs=rngs),
        conv=nnx.Conv(4, 6, (3,), rngs=rngs),
        batch=nnx.LinearGeneral(4, 6, batch_axis={0: 2}, rngs=rngs),
        einsum=nnx.Einsum("ecd,edf->ecf", (2, 4, 6), rngs=rngs),
    )
    found = st3jax.nnx.layouts(model)
    assert found == {
        "stack/query/kernel": "sioo",
        "stack/key/kernel": "sioo",
        "stack/value/kernel": "sioo",
        "stack/out/kernel": "siio",
        "up/kernel": "woi",
        "conv/kernel": "wio",
        "batch/kernel": "sio",
        "einsum/kernel": "sio",
    }
    state = nnx.Optimizer(model, sigma(layout=found), wrt=nnx.Param).opt_state
    assert dict(state.layouts.value) == found


def test_a_model_of_out_in_weights_is_as_one_of_in_out():
    """As Equinox has them."""

    def model(params, x):
        for layer in params.values():
            x = layer["weight"] @ x + layer["bias"]
        return x

    rng = np.random.default_rng(0)
    params = {
        name: {"weight": rng.normal(size=(6, 6)).astype("f"), "bias": np.zeros(6, "f")}
        for name in ("first", "second")
    }

    def prunable(path, leaf):
        return path.endswith("weight")

    found = st3jax.layouts(model, params, jnp.ones(6), prunable=prunable)
    assert found == {"first/weight": "oi", "second/weight": "oi"}

    def turned(tree):
        return jax.tree.map(lambda x: x.T, tree)

    here = sigma(layout=found, prunable=prunable)
    there = sigma(layout={"*": "io"}, prunable=prunable)
    same_step(here, params, there, turned(params), turned)
    with pytest.raises(ValueError, match="may be 'oi' or 'io'"):
        sigma(prunable=prunable, rescale=True).init(params)


# What names say

NAMED = {  # path, shape, bias, readings
    "dense": ("Dense_0", (4, 6), None, ["io"]),
    "own name of two axes": ("mlp", (4, 6), None, ["io"]),
    "out first, by its bias": ("mlp", (4, 6), (4,), ["oi"]),
    "scanned dense": ("stack/Dense_12", (3, 4, 6), (3, 6), ["sio"]),
    "nested": ("Dense_0", (2, 3, 4, 6), None, ["ssio"]),
    "dense whose bias says that it is none": (
        "Dense_0",
        (4, 3, 6),
        (6, 3),
        ["sio", "wio", "ioo", "iio"],
    ),
    "convolution": ("Conv_0", (3, 3, 4, 6), None, ["wwio"]),
    "1-D convolution": ("Conv_0", (3, 4, 6), None, ["wio"]),
    "narrow": ("Conv_0", (1, 7, 4, 6), None, ["wwio"]),
    "narrow or stacked": ("Conv_0", (7, 1, 4, 6), None, ["wwio", "swio"]),
    "narrow with a bias": ("Conv_0", (7, 1, 4, 6), (6,), ["wwio"]),
    "stacked with a bias": ("Conv_0", (7, 3, 4, 6), (7, 6), ["swio"]),
    "3-D or stacked": ("Conv_0", (3, 3, 3, 4, 6), None, ["wwwio", "swwio"]),
    "transposed": ("ConvTranspose_0", (3, 3, 4, 6), None, ["wwio"]),
    "transposed with a bias": ("ConvTranspose_0", (3, 3, 4, 6), (6,), ["wwio"]),
    "transpose_kernel": ("ConvTranspose_0", (3, 3, 4, 6), (4,), ["wwoi"]),
    "query": ("attention/query", (4, 2, 3), (2, 3), ["ioo"]),
    "scanned value": ("attention/value", (5, 4, 2, 3), None, ["sioo"]),
    "out": ("attention/out", (2, 3, 4), (4,), ["iio"]),
    "scanned out": ("attention/out", (5, 2, 3, 4), None, ["siio"]),
    "own window": ("mlp", (3, 3, 4, 6), None, ["wwio"]),
    "own name": ("mlp", (5, 4, 6), None, ["wio", "sio", "ioo", "iio"]),
    "own with the bias of a stack": ("mlp", (5, 4, 6), (5, 6), ["sio"]),
    "own with the bias of heads": ("mlp", (5, 4, 6), (4, 6), ["ioo"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_and_biases_leave_these_readings(name):
    layer, shape, bias, expected = NAMED[name]
    shapes = {f"{layer}/kernel": shape}
    if bias is not None:
        shapes[f"{layer}/bias"] = bias
    assert list(readings(f"{layer}/kernel", shapes)) == expected


@pytest.mark.parametrize(
    ("shape", "bias", "expected"),
    [
        ((4, 6), None, ["oi", "io"]),
        ((4, 6), (4,), ["oi"]),
        ((4, 6), (6,), ["io"]),
        ((5, 4, 6), None, ["oiw", "wio", "soi", "sio"]),
        ((5, 4, 6), (5, 4), ["soi"]),
        ((6, 4, 3, 3), None, ["oiww"]),
        ((3, 3, 4, 6), None, ["wwio"]),
    ],
)
def test_a_weight_may_be_of_either_kind(shape, bias, expected):
    shapes = {"fc/weight": shape} | ({"fc/bias": bias} if bias else {})
    assert list(readings("fc/weight", shapes)) == expected


def test_logical_names_say_what_is_stacked_and_where_heads_are():
    for shape, names, expected in (
        ((4, 3, 6), ("embed", "layers", "mlp"), "iso"),
        ((3, 4, 6), ("expert", "embed", "mlp"), "sio"),
        ((4, 2, 3), ("embed", "heads", "kv"), "ioo"),
        ((4, 5, 2, 3), ("embed", "layers", "kv_heads", "kv"), "isoo"),
        ((2, 3, 4), ("heads", "kv", "embed"), "iio"),
    ):
        box = linen.Partitioned(jnp.ones(shape), names=names)
        variable = nnx.Param(jnp.ones(shape), out_sharding=names, eager_sharding=False)
        for leaf in (box, variable):
            state = sigma().init({"mlp": {"kernel": leaf}})
            assert dict(state.layouts.value) == {"mlp/kernel": expected}


# Who is asked, and when

UNCLEAR = {"mlp": {"kernel": jnp.ones((4, 4, 6))}}
ASKED = {
    "rescaling": {},
    "criterion 'l1_sigma'": {"rescale": False, "criterion": "l1_sigma"},
    "the sparsity of each kernel": {"rescale": False, "distribution": "uniform"},
    "distribution 'erk'": {"rescale": False, "distribution": "erk"},
    "the pattern 2:4": {"rescale": False, "pattern": "2:4"},
    "the pattern 2x2": {"rescale": False, "pattern": (2, 2)},
}


@pytest.mark.parametrize("what", ASKED)
def test_what_depends_on_an_unclear_layout_is_asked_for(what):
    options = ASKED[what]
    with pytest.raises(ValueError, match=re.escape(f"and {what} depends on it")) as e:
        st3jax.st3(MOMENTUM, 0.5, **options).init(UNCLEAR)
    message = str(e.value)
    assert "'mlp/kernel' of shape (4, 4, 6)" in message
    assert "'wio' or 'sio' or 'ioo' or 'iio'" in message
    for way in ("layout={'mlp/kernel': 'wio'}", "st3jax.layouts", "st3jax.nnx.layouts"):
        assert way in message
    told = st3jax.st3(MOMENTUM, 0.5, layout={"mlp/*": "sio"}, **options).init(UNCLEAR)
    assert dict(told.layouts.value) == {"mlp/kernel": "sio"}


def test_what_depends_on_no_layout_is_not_asked_for():
    for tx in (
        st3jax.st3(MOMENTUM, 0.5, rescale=False),
        st3jax.gmp(MOMENTUM, 0.5, sticky="strict"),
        st3jax.ste(MOMENTUM, 0.5),
        st3jax.lrr(MOMENTUM, 0.5, cycle_steps=1),
    ):
        tx.init(UNCLEAR)
    st3jax.prune(UNCLEAR, 0.5)
    settled = {"mlp": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    sigma(distribution="erk").init(settled)


BAD = {
    "too few": ({"mlp/kernel": "io"}, ValueError, "2 letters, but the leaf has 3 axes"),
    "unknown": ({"*": "xio"}, ValueError, "a letter for each axis"),
    "not a text": ({"*": 3}, ValueError, "a letter for each axis"),
    "no kernel": ({"*": "sss"}, ValueError, "neither inputs"),
    "no parameter": ({"mpl/*": "sio"}, ValueError, "matches no parameter"),
    "no mapping": ("sio", TypeError, "layout is a mapping"),
    "two wrong paths": (
        {"mpl/kernel": "sio", "blok/kernel": "sio"},
        ValueError,
        "'mpl/kernel' of layout matches no parameter",
    ),
    "of the variables": (
        {"params/mlp/kernel": "sio", "params/head/kernel": "io"},
        ValueError,
        r"matches no parameter.*trace lambda params, x: model.apply\(\{'params'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_letters_that_do_not_fit_are_an_error(name):
    layout, error, text = BAD[name]
    with pytest.raises(error, match=text):
        sigma(layout=layout).init(UNCLEAR)
    with pytest.raises(error, match=text):
        st3jax.prune(UNCLEAR, 0.5, layout=layout)


def test_the_first_path_that_matches_counts():
    layout = {"mlp/*": "ioo", "*": "sio"}
    assert dict(sigma(layout=layout).init(UNCLEAR).layouts.value) == {
        "mlp/kernel": "ioo"
    }


def test_a_leaf_used_in_two_ways_or_in_none_has_to_be_told():
    params = {
        "tied": {"kernel": jnp.ones((4, 4))},
        "idle": {"kernel": jnp.ones((2,) * 3)},
    }

    def model(params, x):
        return x @ params["tied"]["kernel"] @ params["tied"]["kernel"].T

    def only_tied(path, leaf):
        return path.startswith("tied")

    with pytest.raises(ValueError, match=r"'tied/kernel'.*2 ways.*layout=\{'tied"):
        st3jax.layouts(model, params, jnp.ones(4), prunable=only_tied)
    said = {"tied/kernel": "oi"}
    with pytest.raises(ValueError, match=r"'idle/kernel'.*no product"):
        st3jax.layouts(model, params, jnp.ones(4), layout=said)
    found = st3jax.layouts(model, params, jnp.ones(4), layout=said, prunable=only_tied)
    assert found == said


# States

STACKED = {"blocks": {"kernel": jnp.arange(24.0).reshape(2, 4, 3) - 7}}
SIO, IOO = {"*": "sio"}, {"*": "ioo"}


def uniform(layout=SIO, **options):
    return st3jax.st3(MOMENTUM, 0.5, distribution="uniform", layout=layout, **options)


def test_there_is_a_threshold_for_each_kernel_that_has_a_sparsity():
    for tx, shape in (
        (uniform(), (2,)),
        (uniform(IOO), ()),
        (uniform({"*": "iso"}), (4,)),
        (st3jax.st3(MOMENTUM, 0.5, layout=SIO), ()),
        (st3jax.st3(MOMENTUM, {"*": 0.5}, layout=SIO), (2,)),
        (st3jax.str_(MOMENTUM, threshold_optimizer=MOMENTUM, layout=SIO), (2,)),
    ):
        opt_state = tx.init(STACKED)
        assert opt_state.thresholds["blocks"]["kernel"].shape == shape
        _, later = tx.update(STACKED, opt_state, STACKED)
        assert jax.tree.map(jnp.shape, later) == jax.tree.map(jnp.shape, opt_state)


def test_layouts_are_structure():
    states = [sigma(layout=layout).init(STACKED) for layout in (SIO, IOO)]
    for state in states:
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(states[0]) != jax.tree.structure(states[1])
    traced = []

    @jax.jit
    def finalized(params, opt_state):
        traced.append(dict(opt_state.layouts.value))
        return st3jax.finalize(params, opt_state)

    for state in states * 2:
        finalized(STACKED, state)
    assert traced == [{"blocks/kernel": "sio"}, {"blocks/kernel": "ioo"}]


def test_states_pass_through_all_that_is_around_a_step():
    tx = uniform(freeze_step=3)
    state = tx.init(STACKED)
    layouts = state.layouts
    assert jax.jit(tx.init)(STACKED).layouts == layouts
    assert jax.eval_shape(tx.init, STACKED).layouts == layouts
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    data = flax.serialization.to_bytes(state)
    assert flax.serialization.from_bytes(state, data).layouts == layouts
    step = jax.jit(tx.update, donate_argnums=1)
    _, later = step(STACKED, state, STACKED)
    assert later.layouts == layouts
    seeds = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), STACKED)
    states = jax.vmap(tx.init)(seeds)
    assert states.thresholds["blocks"]["kernel"].shape == (2, 2)
    updates, states = jax.jit(jax.vmap(tx.update))(seeds, states, seeds)
    one, _ = jax.jit(tx.update)(STACKED, tx.init(STACKED), STACKED)
    np.testing.assert_allclose(updates["blocks"]["kernel"][0], one["blocks"]["kernel"])
    wrapped = optax.multi_transform(
        {"sparse": optax.chain(tx), "dense": MOMENTUM},
        {"blocks": "sparse", "head": "dense"},
    )
    params = {**STACKED, "head": {"kernel": jnp.ones((3, 2))}}
    found = st3jax.find_state(wrapped.init(params))
    assert found.layouts == layouts


def test_layouts_of_what_a_wrapper_has_masked_do_no_harm():
    params = {**STACKED, "head": {"kernel": jnp.ones((3, 2))}}
    told = {"blocks/kernel": "sio", "head/kernel": "io"}
    tx = optax.masked(uniform(told), {"blocks": True, "head": False})
    layouts = st3jax.find_state(tx.init(params)).layouts
    assert dict(layouts.value) == {"blocks/kernel": "sio"}


SHARDED = {
    "uniform": uniform,
    "str": lambda: st3jax.str_(
        MOMENTUM, threshold_optimizer=optax.sgd(0.1), initial=1.0, layout=SIO
    ),
    "set": lambda: st3jax.set_(MOMENTUM, 0.5, key=KEY, update_every=1, layout=SIO),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", SHARDED)
def test_a_stack_may_be_sharded_over_its_kernels(name, kind):
    tx = SHARDED[name]()

    @jax.jit
    def seen(params):
        _, opt_state = tx.update(params, tx.init(params), params)
        return st3jax.finalize(params, opt_state)

    alone = jax.device_get(seen(STACKED))
    mesh = jax.make_mesh((2,), ("layers",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = jax.device_put(STACKED, NamedSharding(mesh, P("layers")))
        sharded = jax.device_get(seen(params))
    assert_close(sharded, alone)
    assert 0 < (sharded["blocks"]["kernel"] == 0).mean() < 1


def test_of_ties_in_bfloat16_the_first_stay_however_they_are_stored():
    w = np.array([[2, -2, 2, 2, 1, 1, 1, 3]]).T * np.ones((1, 3))
    w = jnp.asarray(w, jnp.bfloat16)
    for layout, stored in (("io", w), ("oi", w.T), ("iio", w.reshape(2, 4, 3))):
        params = {"kernel": stored}
        cut = st3jax.prune(params, 0.5, pattern="2:4", layout={"*": layout})["kernel"]
        cut = cut.T if layout == "oi" else cut.reshape(8, 3)
        expected = [2, -2, 0, 0, 1, 0, 0, 3]
        assert cut.astype(float).T.tolist() == [expected] * 3


def test_one_of_two_paths_that_is_misspelt_is_an_error():
    params = {name: {"kernel": jnp.ones((4, 4))} for name in ("Dense_0", "Dense_1")}
    wrong = {"Dense_0/kernel": "oi", "dense_1/kernel": "oi"}
    with pytest.raises(ValueError, match="'dense_1/kernel' of layout matches no param"):
        st3jax.prune(params, 0.5, layout=wrong)
    whole = {"Dense_0/kernel": "oi", "Dense_1/kernel": "oi", "Dense_2/kernel": "oi"}
    st3jax.prune(params, 0.5, layout=whole)  # of which this is a part


def stacked_linears(*shapes, out_axes):
    """Modules of which each holds five kernels, along one axis."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            for i, shape in enumerate(shapes):
                linear = nnx.Linear(*shape, use_bias=False, rngs=rngs)
                setattr(self, f"linear{i}", linear)

    @nnx.split_rngs(splits=5)
    @nnx.vmap(out_axes=out_axes)
    def made(rngs):
        return Block(rngs)

    return made(nnx.Rngs(0))


@pytest.mark.parametrize(("axis", "letters"), [(0, "sio"), (1, "iso"), (2, "ios")])
def test_other_kernels_tell_which_of_equal_axes_is_stacked(axis, letters):
    model = stacked_linears((5, 5), (5, 7), (7, 7), out_axes=axis)
    found = st3jax.nnx.layouts(model)
    assert set(found.values()) == {letters}
    alone = stacked_linears((5, 5), out_axes=axis)
    with pytest.raises(ValueError, match=r"'linear0/kernel' are stacked is not clear"):
        st3jax.nnx.layouts(alone)
