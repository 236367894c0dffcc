"""Each layer gets the sparsity that its distribution says, to the last weight."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import st3jax
from models.resnet import cifar_resnet, imagenet_resnet
from st3jax.rule.distributions import erk_densities, layer_sparsities

pytestmark = pytest.mark.usefixtures("quickly_compiled")

few = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**32 - 1)
fractions = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0])


# Erdos-Renyi-kernel densities


def densities(shapes, density):
    """For a density that is traced in float64."""
    with jax.enable_x64(True):
        found = erk_jit(tuple(shapes))(np.float64(density))
        return np.asarray(found)


@functools.cache
def erk_jit(shapes):
    return jax.jit(lambda density: erk_densities(list(shapes), density))


def erk_by_hand(shapes, density):
    """The rule as published, in fractions: densities, epsilon and the dense layers.

    Layers are made dense until no other would be above 1, always all those that attain
    the highest q.
    """
    density = Fraction(density)
    sizes = [math.prod(shape) for shape in shapes]
    q = [Fraction(sum(shape), n) for shape, n in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        if not rest:
            return [Fraction(1)] * len(shapes), None, dense
        epsilon = left / sum(q[i] * sizes[i] for i in rest)
        highest = max(q[i] for i in rest)
        if epsilon * highest <= 1:
            each = [
                Fraction(1) if i in dense else epsilon * q[i] for i in range(len(q))
            ]
            return each, epsilon, dense
        dense |= {i for i in rest if q[i] == highest}


layer = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)
networks = st.lists(layer, min_size=1, max_size=6)


@few
@given(networks, st.lists(fractions, min_size=3, max_size=3))
@example([(3, 5), (5, 3), (15, 1), (30, 30)], [0.3, 0.5, 0.99])  # equal q
@example([(4, 4)] * 3, [0.0, 0.5, 1.0])
@example([(1, 1)], [0.0, 1.0, 2.2e-309])
def test_erk_is_the_iterative_rule(shapes, each):
    for density in each:
        expected, _, _ = erk_by_hand(shapes, density)
        found = densities(shapes, density)
        assert found.dtype == np.float64
        expected = [float(d) for d in expected]  # XLA takes subnormals for zeros
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)
        sizes = [math.prod(shape) for shape in shapes]
        total = density * sum(sizes)
        np.testing.assert_allclose(found @ sizes, total, rtol=1e-9, atol=1e-300)
        assert (found >= 0).all()
        assert (found <= 1).all()


@few
@given(networks, fractions, fractions)
def test_erk_densities_grow_together(shapes, one, other):
    low, high = sorted([one, other])
    assert (densities(shapes, low) <= densities(shapes, high) + 1e-12).all()


@few
@given(networks)
def test_erk_is_exact_at_both_ends(shapes):
    assert (densities(shapes, 0.0) == 0).all()
    assert (densities(shapes, 1.0) == 1).all()


def test_erk_depends_on_the_sum_of_the_axes_and_on_no_order():
    shapes = [(3, 3, 16, 32), (64, 10), (1, 1, 16, 64), (128, 128)]
    turned = [tuple(reversed(shape)) for shape in reversed(shapes)]
    found = densities(shapes, 0.1)
    np.testing.assert_allclose(densities(turned, 0.1), found[::-1], rtol=1e-12)
    q = [sum(shape) / math.prod(shape) for shape in shapes]
    np.testing.assert_allclose(found / q, (found / q)[0], rtol=1e-12)


def test_layers_of_equal_q_are_dense_together_or_not_at_all():
    shapes = [(6, 3), (3, 6), (2, 9, 1), (40, 40), (50, 32)]
    for density in np.linspace(0.01, 1, 34):
        found = densities(shapes, density)
        assert found[0] == found[1]
        assert found[2] >= found[0] > found[4] or density == 1


def test_a_concrete_density_is_like_a_traced_one():
    shapes = [(3, 3, 16, 32), (64, 10), (1, 1, 16, 64)]
    for density in (0.0, 0.05, 0.3, 0.9, 1.0):
        with jax.enable_x64(True):
            concrete = np.asarray(erk_densities(shapes, density))
        np.testing.assert_allclose(concrete, densities(shapes, density), rtol=1e-14)


# Evci et al. 2020's rule for the published networks: density, epsilon, dense layers.
RESNET_50 = [
    (0.5, 303.952, 32),
    (0.2, 99.5612, 8),
    (0.1, 48.7861, 1),
    (0.05, 24.3716, 0),
]
RESNET_20 = [
    (0.5, 101.0553, 11),
    (0.2, 36.0023, 4),
    (0.1, 16.9860, 2),
    (0.05, 8.2040, 0),
]
THREE = {  # densities of the stem, of a 3x3 convolution of stage 4, and of the head
    0.5: (1, 0.1327, 0.4524),
    0.2: (0.8572, 0.0435, 0.1482),
    0.1: (0.4200, 0.0213, 0.0726),
    0.05: (0.2098, 0.0106, 0.0363),
}


@functools.cache
def kernel_shapes(name):
    model, size = {
        "resnet50": (imagenet_resnet(50, 1000), 224),
        "resnet20": (cifar_resnet(20, 10), 32),
    }[name]
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )
    leaves = st3jax.trees.prunable_leaves(variables["params"])
    return {path: leaf.shape for path, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("name", "weights", "density", "epsilon", "dense"),
    [("resnet50", 25_502_912, *row) for row in RESNET_50]
    + [("resnet20", 270_896, *row) for row in RESNET_20],
)
def test_erk_of_the_published_networks(name, weights, density, epsilon, dense):
    shapes = kernel_shapes(name)
    sizes = np.array([math.prod(shape) for shape in shapes.values()])
    assert sizes.sum() == weights
    found = densities(shapes.values(), density)
    q = np.array([sum(shape) for shape in shapes.values()]) / sizes
    assert (found == 1).sum() == dense
    free = found < 1
    np.testing.assert_allclose(found[free] / q[free], epsilon, rtol=2e-6)
    assert found @ sizes == pytest.approx(density * weights, rel=1e-12)
    _, by_hand, layers = erk_by_hand(list(shapes.values()), density)
    assert float(by_hand) == pytest.approx(epsilon, rel=2e-6)
    assert set(np.flatnonzero(found == 1)) == layers


@pytest.mark.parametrize("density", THREE)
def test_erk_of_three_layers_of_resnet_50(density):
    shapes = kernel_shapes("resnet50")
    found = dict(zip(shapes, densities(shapes.values(), density), strict=True))
    assert shapes["stem/kernel"] == (7, 7, 3, 64)
    deep = [p for p, s in shapes.items() if p.startswith("stage4") and s[:2] == (3, 3)]
    (head,) = [path for path, shape in shapes.items() if len(shape) == 2]
    assert [shapes[path] for path in deep[1:]] == [(3, 3, 512, 512)] * 2
    three = found["stem/kernel"], found[deep[1]], found[head]
    np.testing.assert_allclose(three, THREE[density], atol=5.1e-5)


# Counts of single layers


KERNELS = {"stem": (3, 3, 1, 4), "middle": (8, 24), "wide": (16, 40), "head": (10, 3)}
SIZES = {name: math.prod(shape) for name, shape in KERNELS.items()}
MIXTURE = {"*head*": 0.5, "w*": 0.0, "*": 0.9}


def network(seed, dtype=np.float32):
    """Kernels of very different scales, so that one threshold would empty some."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2, size=len(KERNELS))
    return {
        name: {
            "kernel": (rng.normal(size=shape) * s).astype(dtype),
            "bias": np.zeros(shape[-1:], dtype),
        }
        for (name, shape), s in zip(KERNELS.items(), scale, strict=True)
    }


def kernel(params, name):
    return np.asarray(params[name]["kernel"])


def counts(params):
    return {name: int((kernel(params, name) == 0).sum()) for name in KERNELS}


SLACK = Fraction(1, 10**12)
"""Of densities, which are rounded to float64."""


def asked(n, sparsity):
    """Zeros among n; two numbers where rounding in float64 may tell them apart."""
    if sparsity <= 0:
        return {0}
    position = Fraction(sparsity) * (n - 1)
    around = (position - SLACK, position, position + SLACK)
    return {min(max(math.floor(p), 0), n - 1) + 1 for p in around}


def expected_counts(distribution, sparsity):
    """For each kernel, by the contract."""
    if distribution == "uniform":
        return {name: asked(n, sparsity) for name, n in SIZES.items()}
    each, _, _ = erk_by_hand(list(KERNELS.values()), 1 - sparsity)
    return {
        name: {0} if d == 1 else asked(n, 1 - d) | ({0} if d > 1 - SLACK else set())
        for (name, n), d in zip(SIZES.items(), each, strict=True)
    }


def assert_counts(weights, expected, raw):
    """As many zeros as expected, and those the smallest of each layer."""
    found = counts(weights)
    assert {n: found[n] for n in found if found[n] not in expected[n]} == {}
    for name, zeros in found.items():
        size = np.abs(kernel(raw, name).astype(np.float64)).ravel()
        cut = np.sort(size)[zeros - 1] if zeros else -1
        np.testing.assert_array_equal(kernel(weights, name).ravel() == 0, size <= cut)


@functools.cache
def pruning(distribution, criterion="l1"):
    return jax.jit(
        functools.partial(st3jax.prune, distribution=distribution, criterion=criterion)
    )


def prune(params, sparsity, distribution, criterion="l1"):
    """Pruning with a sparsity that is traced in float64."""
    with jax.enable_x64(True):
        pruned = pruning(distribution, criterion)(params, np.float64(sparsity))
        return jax.tree.map(np.asarray, pruned)


@pytest.mark.parametrize("criterion", ["l1", "l1_sigma"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_prune_removes_the_exact_count_of_each_layer(distribution, criterion):
    @few
    @given(seeds, fractions)
    @example(0, 0.0)
    @example(0, 1.0)
    def check(seed, sparsity):
        params = network(seed)
        pruned = prune(params, sparsity, distribution, criterion)
        expected = expected_counts(distribution, sparsity)
        assert_counts(pruned, expected, params)
        for name in KERNELS:
            before, after = kernel(params, name), kernel(pruned, name)
            np.testing.assert_array_equal(after, np.where(after == 0, 0, before))
            assert (pruned[name]["bias"] == params[name]["bias"]).all()

    check()


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_every_dtype_is_cut_layer_by_layer(distribution, dtype):
    params = {
        name: {"kernel": (np.arange(n, 0, -1) * 0.5).astype(dtype).reshape(shape)}
        for (name, shape), n in zip(KERNELS.items(), SIZES.values(), strict=True)
    }
    for sparsity in (0.3, 0.8):
        pruned = prune(params, sparsity, distribution)
        for name, expected in expected_counts(distribution, sparsity).items():
            assert kernel(pruned, name).dtype == dtype
            size = np.sort(np.abs(kernel(params, name).astype(np.float64)).ravel())
            with_ties = {int((size <= size[k - 1]).sum()) if k else 0 for k in expected}
            assert counts(pruned)[name] in with_ties


def test_global_is_the_default_and_compares_all_layers():
    params = network(1)
    for criterion in ("l1", "l1_sigma"):
        plain = st3jax.prune(params, 0.75, criterion=criterion)
        named = prune(params, 0.75, "global", criterion)
        jax.tree.map(np.testing.assert_array_equal, plain, named)
        n = sum(SIZES.values())
        assert sum(counts(named).values()) == math.floor(0.75 * (n - 1)) + 1
        size = np.concatenate(
            [
                np.abs(w.ravel())
                * np.float32(math.sqrt(sum(w.shape)) if criterion != "l1" else 1)
                for w in (kernel(params, name) for name in KERNELS)
            ]
        )
        zero = np.concatenate([kernel(named, name).ravel() == 0 for name in KERNELS])
        assert size[zero].max() < size[~zero].min()


def test_of_a_mapping_the_first_path_that_matches_counts():
    params = network(2)
    pruned = st3jax.prune(params, MIXTURE)
    assert_counts(
        pruned,
        {
            "stem": asked(36, 0.9),
            "middle": asked(192, 0.9),
            "wide": {0},
            "head": asked(30, 0.5),
        },
        params,
    )
    pruned = st3jax.prune(params, {"wide*": 0.7, "*e*": 0.2, "*": 0.4})
    expected = {n: asked(SIZES[n], 0.7 if n == "wide" else 0.2) for n in KERNELS}
    assert_counts(pruned, expected, params)


@pytest.mark.parametrize("first", ["*", "*e*"])
def test_a_path_that_counts_for_no_leaf_is_an_error(first):
    with pytest.raises(ValueError, match=r"'wide\*' of sparsity counts for no leaf"):
        st3jax.prune(network(2), {first: 0.2, "wide*": 0.7})


def test_an_empty_layer_has_no_part_in_erk():
    shapes = {"none": (0, 4), "a": (8, 8), "b": (4, 16)}
    found = layer_sparsities("erk", shapes, 0.5)
    del shapes["none"]
    expected = layer_sparsities("erk", shapes, 0.5)
    assert {path: float(found[path]) for path in shapes} == {
        path: float(s) for path, s in expected.items()
    }


# Erdos-Renyi-kernel within each path of a mapping


def erk_within(groups):
    """The counts of each kernel, from groups of names and what each is asked for."""
    expected = {}
    for names, sparsity in groups:
        each, _, _ = erk_by_hand([KERNELS[name] for name in names], 1 - sparsity)
        for name, d in zip(names, each, strict=True):
            zeros = asked(SIZES[name], 1 - d)
            expected[name] = {0} if d == 1 else zeros
    return expected


@pytest.mark.parametrize("traced", [False, True])
def test_erk_spreads_each_number_over_the_leaves_that_its_path_counts_for(traced):
    params = network(6)
    groups = [(("stem", "head"), 0.6), (("middle", "wide"), 0.9)]

    def pruned(params, a, b):
        sparsity = {"stem*": a, "head*": a, "*": b}
        return st3jax.prune(params, sparsity, distribution="erk")

    def joined(params, a, b):
        return st3jax.prune(params, {"[sh]*": a, "*": b}, distribution="erk")

    with jax.enable_x64(True):
        numbers = (np.float64(0.6), np.float64(0.9))
        found = (jax.jit(joined) if traced else joined)(params, *numbers)
        apart = (jax.jit(pruned) if traced else pruned)(params, *numbers)
    assert_counts(jax.device_get(found), erk_within(groups), params)
    each = [(("stem",), 0.6), (("head",), 0.6), groups[1]]  # two paths are two groups
    assert_counts(jax.device_get(apart), erk_within(each), params)
    assert counts(found) != counts(apart)


@few
@given(networks, networks, fractions, fractions)
def test_what_a_path_is_asked_for_is_what_its_leaves_have_together(one, two, a, b):
    shapes = {f"one/{i}": shape for i, shape in enumerate(one)}
    shapes |= {f"two/{i}": shape for i, shape in enumerate(two)}
    with jax.enable_x64(True):
        found = layer_sparsities("erk", shapes, {"one/*": a, "*": b})
        found = {path: float(s) for path, s in found.items()}
    for group, sparsity in ((one, a), (two, b)):
        name = "one" if group is one else "two"
        mine = [found[f"{name}/{i}"] for i in range(len(group))]
        sizes = [math.prod(shape) for shape in group]
        total = sum(s * n for s, n in zip(mine, sizes, strict=True))
        assert total == pytest.approx(sparsity * sum(sizes), rel=1e-9, abs=1e-9)
        if len(group) == 1:
            assert mine == [sparsity]


@pytest.mark.parametrize("sparsity", [1e-30, 0.1, 0.3, 0.7, 0.9, 1 - 1e-16])
def test_a_leaf_that_is_alone_has_exactly_its_number(sparsity):
    shapes = {"a": (3, 7), "b": (5, 11), "c": (11, 2)}
    asked_for = {"b": sparsity, "*": 0.5}
    with jax.enable_x64(True):
        assert float(layer_sparsities("erk", shapes, asked_for)["b"]) == sparsity
        alone = layer_sparsities("erk", {"b": (5, 11)}, sparsity)
        assert float(alone["b"]) == sparsity


def test_stacked_kernels_count_each_within_their_path():
    stack, rest = {"a": (6, 8, 4), "b": (16, 4)}, {"c": (5, 9)}
    layouts = {"a": "sio", "b": "io", "c": "io"}
    found = layer_sparsities("erk", stack | rest, {"c": 0.2, "*": 0.8}, layouts)
    together = layer_sparsities("erk", stack, 0.8, layouts)
    assert {path: float(found[path]) for path in stack} == {
        path: float(s) for path, s in together.items()
    }
    total = 6 * 32 * float(found["a"]) + 64 * float(found["b"])
    assert total == pytest.approx(0.8 * (6 * 32 + 64))


def test_a_path_is_matched_as_a_whole_with_its_case():
    params = {"Head": {"kernel": np.arange(1.0, 11)[:, None]}, "head": {}}
    params["head"] = {"kernel": np.arange(1.0, 11)[:, None]}
    params = jax.tree.map(np.float32, params)
    pruned = st3jax.prune(params, {"head/kernel": 0.5, "[A-Z]*": 0.9, "*": 0.0})
    zeros = {name: int((pruned[name]["kernel"] == 0).sum()) for name in params}
    assert zeros == {"Head": 9, "head": 5}


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), jnp.float32(0.5), 1, 0])
def test_the_values_of_a_mapping_are_any_numbers(value):
    params = network(3)
    pruned = st3jax.prune(params, {"*": value})
    expected = {name: asked(n, float(value)) for name, n in SIZES.items()}
    assert_counts(pruned, expected, params)


def test_a_mapping_may_hold_traced_numbers():
    params = network(4)

    @jax.jit
    def pruned(params, a, b):
        return st3jax.prune(params, {"*head*": a, "*": b})

    with jax.enable_x64(True):
        found = pruned(params, np.float64(0.25), np.float64(0.75))
    expected = {n: asked(SIZES[n], 0.25 if n == "head" else 0.75) for n in KERNELS}
    assert_counts(found, expected, params)


# Training


BEGIN, END, FREEZE = 2, 6, 8
FINAL = 0.8
RAMP = st3jax.polynomial_ramp(FINAL, BEGIN, END)
LATER = st3jax.polynomial_ramp(0.6, BEGIN + 1, END + 1, power=1)
SGD = optax.sgd(0.05, momentum=0.9)
RULES = {
    "uniform": (RAMP, {"distribution": "uniform"}),
    "erk": (RAMP, {"distribution": "erk"}),
    "mapping": ({"*head*": 0.5, "w*": LATER, "*": RAMP}, {}),
    "erk by path": ({"[hw]*": LATER, "*": RAMP}, {"distribution": "erk"}),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def ramp_at(step, final=FINAL, begin=BEGIN, end=END, power=3):
    left = Fraction(min(max(end - step, 0), end - begin), end - begin)
    return Fraction(final) * (1 - left**power)


def expected_at(rule, step):
    sparsity = ramp_at(step)
    later = ramp_at(step, 0.6, BEGIN + 1, END + 1, 1)
    if rule == "erk by path":
        return erk_within([(("wide", "head"), later), (("stem", "middle"), sparsity)])
    if rule != "mapping":
        return expected_counts(rule, sparsity)
    each = {"stem": sparsity, "middle": sparsity, "wide": later, "head": 0.5}
    return {name: asked(SIZES[name], each[name]) for name in KERNELS}


def transform(rule, **options):
    sparsity, chosen = RULES[rule]
    return st3jax.st3(SGD, sparsity, **chosen, **options)


def gradients(i):
    return jax.tree.map(lambda w: 0.3 * w, network(100 + i))


@functools.cache
def usual(rule):
    tx = transform(rule, freeze_step=FREEZE)
    return tx, jax.jit(tx.update)


def trajectory(tx, params, steps, update=None):
    """Yields parameters and optimizer state after each step, on the host."""
    update = update or jax.jit(tx.update)
    opt_state = tx.init(params)
    for i in range(steps):
        updates, opt_state = update(gradients(i), opt_state, params)
        params = optax.apply_updates(params, updates)
        yield jax.device_get((params, opt_state))


@functools.cache
def usual_run(rule):
    return list(trajectory(usual(rule)[0], network(5), FREEZE + 3, usual(rule)[1]))


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
    "options",
    [{}, {"soft": False, "rescale": False}],
    ids=["soft and rescaled", "hard"],
)
@each_rule
def test_every_layer_follows_its_ramp_and_is_fixed_at_its_end(rule, options):
    tx = transform(rule, freeze_step=FREEZE, **options)
    run = (
        usual_run(rule) if not options else list(trajectory(tx, network(5), FREEZE + 3))
    )
    for i, (params, opt_state) in enumerate(run):
        weights = st3jax.finalize(params, opt_state)
        if i + 1 < FREEZE:
            assert_counts(weights, expected_at(rule, i + 1), params)
            assert sum(counts(params).values()) == 0
        else:
            found, expected = counts(params), expected_at(rule, FREEZE)
            assert {n: found[n] for n in found if found[n] not in expected[n]} == {}
            assert_identical(weights, params)
            for name in KERNELS:
                fixed = kernel(run[FREEZE - 1][0], name) == 0
                np.testing.assert_array_equal(kernel(params, name) == 0, fixed)
    assert any(counts(params).values())
    assert (kernel(params, "wide") != kernel(run[FREEZE - 1][0], "wide")).any()


def test_soft_weights_are_shrunk_by_the_threshold_of_their_layer():
    tx = transform("mapping", rescale=False)
    *_, (params, opt_state) = trajectory(tx, network(6), END + 1)
    weights = st3jax.finalize(params, opt_state)
    thresholds = st3jax.find_state(opt_state).thresholds
    assert len({float(thresholds[name]["kernel"]) for name in KERNELS}) == 4
    for name in KERNELS:
        w, t = kernel(params, name), thresholds[name]["kernel"]
        np.testing.assert_allclose(
            kernel(weights, name),
            np.sign(w) * np.maximum(np.abs(w) - t, 0),
            rtol=1e-6,
            atol=1e-30,
        )


def test_a_layer_that_nothing_is_asked_of_is_not_touched():
    tx = st3jax.st3(SGD, {"w*": 0.0, "*": 0.9})
    *_, (params, opt_state) = trajectory(tx, network(7), 3)
    weights = st3jax.finalize(params, opt_state)
    assert_identical(weights["wide"], params["wide"])
    assert st3jax.find_state(opt_state).thresholds["wide"]["kernel"] == -1
    assert counts(weights)["middle"] in asked(SIZES["middle"], 0.9)


@pytest.mark.parametrize("criterion", ["l1", "l1_sigma"])
def test_a_global_distribution_trains_as_none_at_all(criterion):
    named = st3jax.st3(SGD, RAMP, criterion=criterion, distribution="global")
    plain = st3jax.st3(SGD, RAMP, criterion=criterion)
    ours, theirs = (list(trajectory(tx, network(8), END)) for tx in (named, plain))
    assert_identical(ours, theirs)
    zeros = counts(st3jax.finalize(*ours[-1]))
    assert sum(zeros.values()) in asked(sum(SIZES.values()), FINAL)
    assert any(zeros[n] not in asked(SIZES[n], FINAL) for n in KERNELS)


SPECS = {"middle": P("a", "b"), "wide": P(None, ("a", "b"))}


def sharded_by_jit(params, mesh):
    return {
        name: {
            "kernel": jax.device_put(
                layer["kernel"], NamedSharding(mesh, SPECS.get(name, P()))
            ),
            "bias": jax.device_put(layer["bias"], NamedSharding(mesh, P())),
        }
        for name, layer in params.items()
    }


@each_rule
def test_jit_with_sharded_kernels_has_the_thresholds_of_one_device(rule):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    tx = transform(rule, rescale=False)
    ours = trajectory(tx, sharded_by_jit(network(9), mesh), END)
    for pair in zip(ours, trajectory(tx, network(9), END), strict=True):
        assert_identical(*pair)


BY_HAND = {"stem": P(None, None, None, "a"), "wide": P("a", "b"), "middle": P("b")}


@pytest.mark.parametrize("rule", ["global", "uniform", "mapping"])
def test_shards_by_hand_train_to_the_bits_of_one_device(rule):
    """Three kernels sharded over one or both axes, the head and biases copied."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    sparsity, chosen = RULES.get(rule, (RAMP, {}))
    options = {"rescale": False, "freeze_step": FREEZE, **chosen}
    tx = st3jax.st3(SGD, sparsity, axis_name=("a", "b"), **options)
    specs = {n: {"kernel": BY_HAND.get(n, P()), "bias": P()} for n in KERNELS}
    of_state = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(network(10)),
        specs,
        transform_non_params=lambda _: P(),
    )
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(specs, of_state, specs),
            out_specs=(specs, of_state),
        )
    )
    alone = st3jax.st3(SGD, sparsity, **options)
    ours = list(trajectory(tx, network(10), FREEZE + 2, update))
    for pair in zip(ours, trajectory(alone, network(10), FREEZE + 2), strict=True):
        assert_identical(*pair)
    if rule == "global":
        total = sum(counts(ours[-1][0]).values())
        assert total in asked(sum(SIZES.values()), FINAL)
    else:
        found, expected = counts(ours[-1][0]), expected_at(rule, FREEZE)
        assert {n: found[n] for n in found if found[n] not in expected[n]} == {}


# Bad use


def build(sparsity=0.5, **options):
    return lambda: st3jax.st3(SGD, sparsity, **options)


def init(sparsity):
    """Only the parameters' shapes are there: nothing can be compiled from them."""
    shapes = jax.eval_shape(lambda: network(0))
    return lambda: st3jax.st3(SGD, sparsity).init(shapes)


def pruned(sparsity=0.5, **options):
    return lambda: st3jax.prune(network(0), sparsity, **options)


KINDS = ("distribution", "'global'", "'uniform'", "'erk'")
UNMATCHED = ("no path of sparsity matches the leaf",)
IDLE = ("the path", "of sparsity matches no prunable leaf")
SHARDED = ("whole shapes of leaves", "axis_name")
WIDE_RAMP = st3jax.polynomial_ramp(0.9, 0, 100)
BAD_USES = {
    "unknown": (build(distribution="layerwise"), ValueError, *KINDS, "'layerwise'"),
    "None": (build(distribution=None), ValueError, *KINDS, "None"),
    "prune's": (pruned(distribution="layerwise"), ValueError, *KINDS),
    "no match": (init({"*tail*": 0.5, "*": 0.9}), ValueError, *IDLE, "'*tail*'"),
    "a bias": (init({"*bias": 0.5, "*": 0.9}), ValueError, *IDLE, "'*bias'"),
    "part of a path": (init({"head": 0.5, "*": 0.9}), ValueError, *IDLE, "'head'"),
    "prune no match": (pruned({"tail": 0.5, "*": 0.9}), ValueError, *IDLE, "'tail'"),
    "left out": (init({"head*": 0.5}), ValueError, *UNMATCHED, "'*'"),
    "prune left out": (pruned({"head*": 0.5}), ValueError, *UNMATCHED),
    "nothing in it": (init({}), ValueError, *UNMATCHED),
    "prune by nothing": (pruned({}), ValueError, *UNMATCHED),
    "percent": (build({"*": 90}), ValueError, "sparsity of '*'", "90", "0.9"),
    "prune percent": (pruned({"*": 90}), ValueError, "sparsity of '*'", "0.9"),
    "negative": (build({"a": 0.5, "b*": -0.1}), ValueError, "of 'b*'", "-0.1"),
    "a word": (build({"*": "high"}), TypeError, "sparsity of '*'", "'high'"),
    "prune by a ramp": (pruned({"*": RAMP}), TypeError, "sparsity of '*'"),
    "schedule of percent": (
        build({"head": 0.5, "*": lambda step: 90}),
        ValueError,
        "sparsity of '*'",
        "schedule",
        "0.9",
    ),
    "schedule to percent": (
        build({"head": 0.5, "*": optax.linear_schedule(0, 90, 10)}),
        ValueError,
        "final value of the sparsity of '*' schedule",
        "0.9",
    ),
    "schedule of None": (
        build({"*": lambda step: None}),
        TypeError,
        "sparsity of '*'",
        "None",
    ),
    "freeze in a ramp": (
        build({"head*": RAMP, "*": WIDE_RAMP}, freeze_step=50),
        ValueError,
        "freeze_step 50",
        "before the ramp is over",
        "sparsity of '*'",
        "0.7875 then and 0.9 at the end",
    ),
    "freeze in the first ramp": (
        build({"head*": WIDE_RAMP, "*": RAMP}, freeze_step=50),
        ValueError,
        "sparsity of 'head*'",
    ),
    "mapping and uniform": (
        build({"*": 0.5}, distribution="uniform"),
        ValueError,
        "a sparsity for each path is a distribution of its own",
        "distribution",
    ),
    "prune's mapping and uniform": (
        pruned({"*": 0.5}, distribution="uniform"),
        ValueError,
        "a sparsity for each path is a distribution of its own",
    ),
    "shards and sigma": (
        build(axis_name="i", rescale=False, criterion="l1_sigma"),
        ValueError,
        *SHARDED,
        "'l1_sigma'",
    ),
    "shards and erk": (
        build(axis_name="i", rescale=False, distribution="erk"),
        ValueError,
        *SHARDED,
        "'erk'",
    ),
    "shards rescaled": (
        build(axis_name="i"),
        ValueError,
        "rescaling needs whole output channels",
        "rescale=False",
    ),
}


@pytest.mark.parametrize("name", BAD_USES)
def test_bad_use_of_a_distribution_is_explained_in_one_short_sentence(name):
    bad_use, error, *texts = BAD_USES[name]
    with pytest.raises(error) as caught:
        bad_use()
    message = str(caught.value)
    assert [text for text in texts if text not in message] == []
    assert "\n" not in message
    assert len(message) < 320


def test_a_ramp_of_a_mapping_may_end_at_the_freeze():
    tx = st3jax.st3(SGD, {"head*": RAMP, "*": WIDE_RAMP}, freeze_step=100)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
