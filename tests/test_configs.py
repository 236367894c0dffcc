"""Every configuration builds, with the published networks and schedules."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import base_config
import st3jax
from check_config import check_config
from models import create_model
from optimizers import learning_rate, make_optimizer, total_steps

EXPERIMENTS = pathlib.Path(base_config.__file__).parent
CONFIGS = sorted(path.stem for path in EXPERIMENTS.glob("*_st3.py"))
SHAPES = {  # configuration: channels, classes, kernel weights
    "digits_st3": (1, 10, 43_500),
    "fashion_mnist_st3": (1, 10, 43_500),
    "cifar10_st3": (3, 10, 270_896),
    "cifar100_st3": (3, 100, 1_862_576),
    "imagenet_st3": (3, 1000, 25_502_912),
}


def get_config(name):
    return importlib.import_module(name).get_config()


def test_every_configuration_is_checked_here():
    assert set(CONFIGS) == set(SHAPES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_builds_the_published_network(name):
    config = get_config(name)
    check_config(config)
    channels, classes, weights = SHAPES[name]
    model = create_model(config, classes)
    size = config.data.image_size
    variables = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, size, size, channels)), train=False),
        jax.random.key(0),
    )
    kernels = st3jax.trees.prunable_leaves(variables["params"])
    assert sum(kernel.size for kernel in kernels.values()) == weights
    tx = make_optimizer(config, steps_per_epoch=100, costs={})
    state = jax.eval_shape(tx.init, variables["params"])
    assert len(jax.tree.leaves(state.thresholds)) == len(kernels)
    names = {path.rpartition("/")[2] for path in st3jax.trees.named_leaves(variables)}
    assert names == {"kernel", "scale", "bias", "mean", "var"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_starts_with_the_command_that_runs_it(name):
    source = (EXPERIMENTS / f"{name}.py").read_text()
    command = f"python experiments/train.py --config=experiments/{name}.py"
    assert command in source.split('"""')[1]


def test_learning_rates_are_the_published_ones():
    cifar = learning_rate(get_config("cifar10_st3"), steps_per_epoch=10)
    epochs = [0, 79.9, 80, 119.9, 120, 159.9, 160, 169]
    rates = [float(cifar(jnp.array(int(epoch * 10)))) for epoch in epochs]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-3, 1e-3])

    imagenet = learning_rate(get_config("imagenet_st3"), steps_per_epoch=10)
    within_an_epoch = [float(imagenet(jnp.array(step))) for step in range(300, 310)]
    assert len(set(within_an_epoch)) == 1
    published = 0.1 * (1 + np.cos(np.pi * (30 - 5) / 95))
    assert within_an_epoch[0] == pytest.approx(published)
    assert float(imagenet(jnp.array(50))) == pytest.approx(0.2)
    assert float(imagenet(jnp.array(0))) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("name", "begin", "end"), [("cifar10_st3", 5, 80), ("imagenet_st3", 5, 50)]
)
def test_ramps_and_fixing_happen_at_the_published_epochs(name, begin, end):
    config = get_config(name)
    tx = make_optimizer(config, steps_per_epoch=10, costs={})
    params = {"kernel": jax.random.normal(jax.random.key(0), (50, 20))}
    update = jax.jit(tx.update)

    def sparsity_after(epoch):
        state = tx.init(params)
        state = state._replace(count=jnp.array(round(epoch * 10) - 1, jnp.int32))
        zero = jax.tree.map(jnp.zeros_like, params)
        _, state = update(zero, state, params)
        sparse = st3jax.finalize(params, state)
        return float(st3jax.summary(sparse).sparsity), state

    assert sparsity_after(begin)[0] == 0
    assert 0 < sparsity_after(begin + 0.5)[0] < 0.1
    assert 0.89 < sparsity_after(end - 5)[0] < 0.9
    assert sparsity_after(end)[0] == pytest.approx(0.9)
    assert not sparsity_after(config.num_epochs - 0.1)[1].frozen
    assert sparsity_after(config.num_epochs)[1].frozen
    assert total_steps(config, 10) == 10 * (config.num_epochs + 10)


def test_weight_decay_acts_on_kernels_only():
    config = ml_collections.ConfigDict(get_config("digits_st3"))
    tx = make_optimizer(config, steps_per_epoch=10, costs={})
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert np.all(updates["kernel"] < 0)
    assert not np.any(updates["scale"])
    assert not np.any(updates["bias"])
