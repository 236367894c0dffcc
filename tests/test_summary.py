"""A summary counts exact zeros, as numpy does, and nothing but exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import st3jax

DTYPES = tuple(map(jnp.dtype, ("float32", "float64", "bfloat16", "float16")))
SHAPES = {
    "Conv_0": {"kernel": (3, 3, 2, 2), "bias": (2,)},
    "Dense_0": {"kernel": (4, 3), "bias": (3,)},
    "empty": {"kernel": (0, 3)},
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
summarize = jax.jit(st3jax.summary)


def weights(dtype):
    least = float(jnp.finfo(dtype).smallest_subnormal)
    numbers = st.sampled_from([0.0, -0.0, least, -least, 1.0, np.inf, np.nan])

    def leaf(shape):
        array = hnp.arrays(np.float64, shape, elements=numbers)
        return array.map(lambda x: x.astype(dtype))

    layers = {
        layer: st.fixed_dictionaries(
            {name: leaf(shape) for name, shape in leaves.items()}
        )
        for layer, leaves in SHAPES.items()
    }
    return st.fixed_dictionaries(layers)


def zeros_of(leaf):
    return np.count_nonzero(np.asarray(leaf).astype(np.float64) == 0)


@each_dtype
@pytest.mark.parametrize("count", [st3jax.summary, summarize])
def test_a_summary_counts_the_zeros_of_each_layer_and_of_all(count, dtype):
    @settings(deadline=None, max_examples=40)
    @given(weights(dtype))
    def check(params):
        with jax.enable_x64(dtype == np.float64):
            report = count(params)
        kernels = {f"{name}/kernel": layer["kernel"] for name, layer in params.items()}
        assert list(report.layers) == sorted(kernels)
        for path, kernel in kernels.items():
            layer = report.layers[path]
            assert int(layer.zeros) == zeros_of(kernel)
            assert int(layer.weights) == kernel.size
            assert tuple(map(int, layer.shape)) == kernel.shape
        zeros = sum(map(zeros_of, kernels.values()))
        n = sum(kernel.size for kernel in kernels.values())
        assert (int(report.zeros), int(report.weights)) == (zeros, n)
        assert np.asarray(report.sparsity) == np.float32(zeros / n)

    check()


def test_a_predicate_says_what_is_counted():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(3)}
    biases = st3jax.summary(params, prunable=lambda path, leaf: path == "bias")
    assert list(biases.layers) == ["bias"]
    assert float(biases.sparsity) == 1


def test_a_summary_of_abstract_weights_has_their_shapes():
    shapes = jax.eval_shape(st3jax.summary, {"kernel": jnp.ones((2, 2))})
    assert shapes.zeros.shape == shapes.sparsity.shape == ()
    assert shapes.zeros.dtype == jnp.int32


def test_a_summary_of_nothing_prunable_is_refused():
    with pytest.raises(ValueError, match="no parameter is prunable"):
        st3jax.summary({"bias": jnp.zeros(3)})


def test_kernels_of_which_nothing_is_left_are_named_with_their_place():
    stack = np.ones((2, 3, 4, 5), np.float32)
    stack[1, 2] = 0
    params = {
        "mlp": {"kernel": stack},
        "head": {"kernel": np.zeros((5, 2), np.float32)},
        "stem": {"kernel": np.eye(3, dtype=np.float32)},
        "none": {"kernel": np.ones((0, 2), np.float32)},
    }
    found = st3jax.summary(params, layout={"mlp/*": "ssio"})
    assert sorted(found.vanished()) == ["head/kernel", "mlp/kernel[1][2]"]
    assert found.layers["mlp/kernel"].each.tolist() == [[0, 0, 0], [0, 0, 20]]
    traced = jax.jit(lambda p: st3jax.summary(p, layout={"mlp/*": "ssio"}))(params)
    assert traced.vanished() == found.vanished()


def test_with_a_state_raw_weights_are_counted_as_the_model_sees_them():
    params = {
        "blocks": {"kernel": jnp.arange(1.0, 25).reshape(2, 3, 4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }
    tx = st3jax.st3(
        optax.set_to_zero(),
        {"blocks/*": 0.5},
        layout={"blocks/*": "sio"},
        prunable=lambda path, _: path.startswith("blocks"),
    )
    _, opt_state = tx.update(params, tx.init(params), params)
    found = st3jax.summary(params, opt_state)
    assert list(found.layers) == ["blocks/kernel"]
    assert found.layers["blocks/kernel"].each.tolist() == [6, 6]
    assert int(st3jax.summary(st3jax.finalize(params, opt_state)).zeros) == 12


def nnx_pair():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    tx = st3jax.st3(optax.sgd(0.1), sparsity=0.5)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize("name", ["sparsify", "finalize", "summary"])
def test_functions_for_nnx_name_what_else_they_got(name):
    fn, (model, optimizer) = getattr(st3jax.nnx, name), nnx_pair()
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    for wrong, told in (
        ((model, optimizer.opt_state), "got Linear and ThresholdState"),
        ((optimizer, model), "got ModelAndOptimizer|got Optimizer and Linear"),
        ((params, optimizer), "and Optimizer: parameters and an optimizer state go to"),
        ((nnx.Linear, optimizer), "got the class Linear and Optimizer"),
    ):
        with pytest.raises(TypeError, match=told):
            fn(*wrong)
    with pytest.raises(TypeError, match="model is a module of Flax NNX, got the class"):
        st3jax.nnx.layouts(nnx.Linear)


def test_the_summary_of_an_nnx_model_is_that_of_its_finalized_weights():
    model, optimizer = nnx_pair()
    optimizer.update(model, nnx.state(model, nnx.Param))
    found = st3jax.nnx.summary(model, optimizer)
    assert int(found.zeros) == 8
    assert list(found.layers) == ["kernel"]
    shipped = nnx.as_pure(nnx.state(st3jax.nnx.finalize(model, optimizer), nnx.Param))
    assert int(st3jax.summary(shipped).zeros) == 8
    model.kernel[...] = 2 * model.kernel[...] + 1
    with pytest.raises(ValueError, match="last seen"):
        st3jax.nnx.summary(model, optimizer)
    dense = st3jax.nnx.summary(*nnx_pair(), prunable=lambda path, leaf: leaf.ndim == 2)
    assert dense.weights == 16
