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
from errors import UserError
from job.methods import METHODS
from job.optimizers import make_optimizer
from job.rates import learning_rate, total_steps
from models import create_model

EXPERIMENTS = pathlib.Path(base_config.__file__).parent
CONFIGS = sorted(path.stem for path in EXPERIMENTS.glob("*_st3.py"))
SHAPES = {  # configuration: channels, classes, kernel weights
    "digits_st3": (1, 10, 43_500),
    "fashion_mnist_st3": (1, 10, 77_072),
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_takes_every_method(name, method):
    config = get_config(name)
    config.sparsity.method = method
    check_config(base_config.use_published(config))


def published(name, method, given=(), **fields):
    """The configuration that the command line makes of these fields."""
    config = get_config(name)
    config.sparsity.method = method
    config.update_from_flattened_dict(fields)
    return base_config.use_published(config, {"sparsity.method", *fields, *given})


def test_a_method_brings_what_it_was_published_with():
    imagenet = published("imagenet_st3", "granet")
    assert (imagenet.sparsity.begin_epoch, imagenet.sparsity.end_epoch) == (0, 30)
    assert imagenet.sparsity.update_every_steps == 4000
    assert imagenet.fine_tune_epochs == 0
    cifar = published("cifar10_st3", "granet")
    assert (cifar.sparsity.begin_epoch, cifar.sparsity.end_epoch) == (0, 80)
    assert cifar.sparsity.update_every_steps == 1000
    cifar = published("cifar10_st3", "probmask")
    assert cifar.sparsity.begin_epoch == pytest.approx(0.16 * 160)
    assert cifar.sparsity.end_epoch == pytest.approx(0.6 * 160)
    assert cifar.fine_tune_epochs == 10
    for method in ("none", "st3", "ste", "gmp"):
        config = published("cifar10_st3", method)
        assert (config.sparsity.begin_epoch, config.sparsity.end_epoch) == (5, 80)
        assert config.fine_tune_epochs == 10


def test_what_the_command_line_gives_is_kept():
    config = published("cifar10_st3", "granet", **{"sparsity.end_epoch": 20.0})
    assert (config.sparsity.begin_epoch, config.sparsity.end_epoch) == (0, 20)
    config = published("cifar10_st3", "lrr", fine_tune_epochs=3)
    assert config.fine_tune_epochs == 3


def test_the_published_shares_follow_the_number_of_epochs():
    config = published("cifar10_st3", "granet", num_epochs=50)
    assert config.sparsity.end_epoch == 25


def test_cycles_of_lrr_rewind_the_learning_rate():
    config = published("imagenet_st3", "lrr", **{"sparsity.final": 0.4})
    assert total_steps(config, 2) == 4 * 100 * 2  # 0, 20, 36 and 40 %
    rate = jax.vmap(learning_rate(config, steps_per_epoch=2))(jnp.arange(800))
    np.testing.assert_array_equal(rate.reshape(4, 200), [rate[:200]] * 4)
    assert rate[0] == pytest.approx(0.04)
    assert len(np.unique(rate)) > 90


def test_fine_tuning_after_the_last_cycle_has_its_own_rate():
    fields = {"sparsity.final": 0.2, "fine_tune_epochs": 3}
    config = published("cifar10_st3", "lrr", **fields)
    rate = jax.vmap(learning_rate(config, steps_per_epoch=1))(jnp.arange(323))
    assert total_steps(config, 1) == 323
    np.testing.assert_array_equal(rate[160:320], rate[:160])
    np.testing.assert_allclose(rate[320:], 1e-3)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("granet", "criterion", "l1_sigma"),
        ("probmask", "distribution", "erk"),
        ("lrr", "pattern", "2:4"),
        ("rigl", "layers", (("*", 0.5),)),
        ("set_", "budget", "multiply_adds"),
    ],
)
def test_a_field_that_a_method_has_not_is_refused(method, field, value):
    config = published("digits_st3", method, **{f"sparsity.{field}": value})
    with pytest.raises(UserError, match=f"{method}' has no {field}"):
        check_config(config)


def test_rewinding_twice_is_refused():
    config = published("digits_st3", "lrr", second_cycle=True)
    with pytest.raises(UserError, match="second_cycle"):
        check_config(config)
