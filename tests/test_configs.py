"""Every configuration builds, with the published networks and schedules."""

import importlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from rich.console import Console
from training import parsed, stand_in

import base_config
import paths
import st3jax
from errors import UserError
from job.methods import METHODS
from job.rates import learning_rate, total_steps
from job.settings import settle
from workdir.report import print_settings

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


def settled(name, **fields):
    """The settings of a configuration where these fields are set."""
    config = get_config(name)
    config.update_from_flattened_dict(fields)
    return settle(config).config


def test_every_configuration_is_checked_here():
    assert set(CONFIGS) == set(SHAPES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_builds_the_published_network(name):
    channels, classes, weights = SHAPES[name]
    job = stand_in(get_config(name), classes)
    size = job.config.data.image_size
    variables = jax.eval_shape(
        lambda key: job.model.init(
            key, jnp.zeros((1, size, size, channels)), train=False
        ),
        jax.random.key(0),
    )
    kernels = paths.kernels(variables["params"])
    assert sum(kernel.size for kernel in kernels.values()) == weights
    state = jax.eval_shape(job.tx.init, variables["params"])
    assert len(jax.tree.leaves(state.thresholds)) == len(kernels)
    names = {path.rpartition("/")[2] for path in paths.by_path(variables)}
    assert names == {"kernel", "scale", "bias", "mean", "var"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_starts_with_the_command_that_runs_it(name):
    source = (EXPERIMENTS / f"{name}.py").read_text()
    command = f"python experiments/train.py --config=experiments/{name}.py"
    assert command in source.split('"""')[1]


def test_learning_rates_are_the_published_ones():
    cifar = learning_rate(settled("cifar10_st3"), steps_per_epoch=10)
    epochs = [0, 79.9, 80, 119.9, 120, 159.9, 160, 169]
    rates = [float(cifar(jnp.array(int(epoch * 10)))) for epoch in epochs]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-3, 1e-3])

    imagenet = learning_rate(settled("imagenet_st3"), steps_per_epoch=10)
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
    job = stand_in(get_config(name), steps_per_epoch=10)
    config, tx = job.config, job.tx
    params = {"kernel": jax.random.normal(jax.random.key(0), (50, 20))}
    update = jax.jit(tx.update)

    def sparsity_after(epoch):
        state = tx.init(params)
        state = state._replace(count=jnp.array(round(epoch * 10) - 1, jnp.int32))
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, state = update(zero, state, params)
        sparse = st3jax.finalize(optax.apply_updates(params, updates), state)
        return float(st3jax.summary(sparse).sparsity), state

    assert sparsity_after(begin)[0] == 0
    assert 0 < sparsity_after(begin + 0.5)[0] < 0.1
    assert 0.89 < sparsity_after(end - 5)[0] < 0.9
    assert sparsity_after(end)[0] == pytest.approx(0.9)
    assert not sparsity_after(config.num_epochs - 0.1)[1].frozen
    assert sparsity_after(config.num_epochs)[1].frozen
    assert job.steps == 10 * (config.num_epochs + 10)


def test_weight_decay_acts_on_kernels_only():
    tx = stand_in(get_config("digits_st3")).tx
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
    stand_in(config, SHAPES[name][1])


def of_method(name, method, **fields):
    """The settings of a configuration with another method."""
    return settled(name, **fields, **{"sparsity.method": method})


def test_a_method_brings_what_it_was_published_with():
    imagenet = of_method("imagenet_st3", "granet")
    assert (imagenet.sparsity.begin_epoch, imagenet.sparsity.end_epoch) == (0, 30)
    assert imagenet.sparsity.update_every_steps == 4000
    assert imagenet.fine_tune_epochs == 0
    cifar = of_method("cifar10_st3", "granet")
    assert (cifar.sparsity.begin_epoch, cifar.sparsity.end_epoch) == (0, 80)
    assert cifar.sparsity.update_every_steps == 1000
    cifar = of_method("cifar10_st3", "probmask")
    assert cifar.sparsity.begin_epoch == pytest.approx(0.16 * 160)
    assert cifar.sparsity.end_epoch == pytest.approx(0.6 * 160)
    assert cifar.fine_tune_epochs == 10
    for method in ("st3", "ste", "gmp"):
        config = of_method("cifar10_st3", method)
        assert (config.sparsity.begin_epoch, config.sparsity.end_epoch) == (5, 80)
        assert config.fine_tune_epochs == 10
    assert of_method("cifar10_st3", "none").fine_tune_epochs == 10
    for method in ("rigl", "set_"):
        config = of_method("cifar10_st3", method)
        assert config.sparsity.distribution == "erk"
        assert config.sparsity.update_every_steps == 100


def test_what_is_given_is_kept():
    config = of_method("cifar10_st3", "granet", **{"sparsity.end_epoch": 20.0})
    assert (config.sparsity.begin_epoch, config.sparsity.end_epoch) == (0, 20)
    config = of_method("cifar10_st3", "lrr", fine_tune_epochs=3)
    assert config.fine_tune_epochs == 3
    # What the method's publication says, given anyway, is no different.
    config = of_method("cifar10_st3", "granet", **{"sparsity.update_every_steps": 1000})
    assert config == of_method("cifar10_st3", "granet")


GRANET = """
import digits_st3

def get_config():
    config = digits_st3.get_config()
    config.sparsity.method = "granet"
    config.sparsity.update_every_steps = 5
    config.sparsity.end_epoch = 2
    config.num_epochs = 3
    config.fine_tune_epochs = 1
    return config
"""


def test_what_a_configuration_file_says_is_kept_by_every_door(tmp_path):
    path = tmp_path / "granet.py"
    path.write_text(GRANET)
    namespace = {}
    exec(GRANET, namespace)
    from_file = settle(namespace["get_config"]())
    config = from_file.config
    sparsity = config.sparsity
    assert sparsity.update_every_steps == 5
    assert (sparsity.begin_epoch, sparsity.end_epoch) == (0, 2)
    assert (config.num_epochs, config.fine_tune_epochs) == (3, 1)
    assert from_file.origins == {"sparsity.begin_epoch": "granet"}

    from_flags = settle(parsed(f"--config={path}")).config
    assert from_flags == config
    more = ("--config.sparsity.end_epoch=1", "--config.sparsity.begin_epoch=0.5")
    sparsity = settle(parsed(f"--config={path}", *more)).config.sparsity
    assert (sparsity.begin_epoch, sparsity.end_epoch) == (0.5, 1)
    assert sparsity.update_every_steps == 5


def test_the_published_shares_follow_the_number_of_epochs():
    config = of_method("cifar10_st3", "granet", num_epochs=50)
    assert config.sparsity.end_epoch == 25


def test_settings_that_are_settled_again_stay_what_they_are():
    for method in METHODS:
        config = get_config("digits_st3")
        config.sparsity.method = method
        once = settle(config).config
        again = ml_collections.ConfigDict(once)
        again.defaults = config.defaults
        assert settle(again).config == once


def test_cycles_of_lrr_rewind_the_learning_rate():
    config = of_method("imagenet_st3", "lrr", **{"sparsity.final": 0.4})
    assert total_steps(config, 2) == 4 * 100 * 2  # 0, 20, 36 and 40 %
    rate = jax.vmap(learning_rate(config, steps_per_epoch=2))(jnp.arange(800))
    np.testing.assert_array_equal(rate.reshape(4, 200), [rate[:200]] * 4)
    assert rate[0] == pytest.approx(0.04)
    assert len(np.unique(rate)) > 90


def test_fine_tuning_after_the_last_cycle_has_its_own_rate():
    fields = {"sparsity.final": 0.2, "fine_tune_epochs": 3}
    config = of_method("cifar10_st3", "lrr", **fields)
    rate = jax.vmap(learning_rate(config, steps_per_epoch=1))(jnp.arange(323))
    assert total_steps(config, 1) == 323
    np.testing.assert_array_equal(rate[160:320], rate[:160])
    np.testing.assert_allclose(rate[320:], 1e-3)


USELESS = [  # method, other fields, the field that does nothing, its value
    ("str_", {}, "sparsity.final", 0.5),
    ("gmp", {}, "sparsity.soft", False),
    ("gmp", {}, "sparsity.soft", True),
    ("ste", {}, "sparsity.rescale", True),
    ("lrr", {}, "sparsity.straight_through", False),
    ("lrr", {}, "sparsity.update_every_steps", 7),
    ("lrr", {}, "sparsity.begin_epoch", 2.0),
    ("rigl", {}, "sparsity.power", 2.0),
    ("set_", {}, "sparsity.end_epoch", 9.0),
    ("probmask", {}, "sparsity.update_every_steps", 1),
    ("none", {}, "sparsity.final", 90.0),
    ("none", {}, "sparsity.pattern", "9:4"),
    ("none", {}, "sparsity.dense", ("stem/*",)),
    ("none", {}, "sparsity.power", 3.0),
    ("granet", {}, "sparsity.criterion", "l1_sigma"),
    ("granet", {}, "sparsity.soft", True),
    ("probmask", {}, "sparsity.distribution", "erk"),
    ("lrr", {}, "sparsity.pattern", "2:4"),
    ("rigl", {}, "sparsity.layers", (("*", 0.5),)),
    ("set_", {}, "sparsity.budget", "multiply_adds"),
    ("st3", {}, "gmp.sticky", "strict"),
    ("st3", {}, "gmp.sticky", "no"),
    ("gmp", {}, "lrr.keep", 0.5),
    ("st3", {}, "probmask.draw", "bernoulli"),
    ("rigl", {}, "granet.drop", 0.5),
    ("granet", {}, "rigl.end", 0.5),
    ("rigl", {}, "set_.drop", 0.5),
    ("st3", {}, "str_.initial", -5.0),
    ("st3", {"sparsity.layers": (("*", 0.5),)}, "sparsity.final", 0.9),
    ("st3", {"sparsity.layers": (("*", 0.5),)}, "sparsity.criterion", "l1_sigma"),
    ("st3", {"sparsity.distribution": "erk"}, "sparsity.criterion", "l1_sigma"),
    (
        "st3",
        {"sparsity.pattern": "2:4", "sparsity.final": 0.5},
        "sparsity.criterion",
        "l1_sigma",
    ),
    ("st3", {"sparsity.layers": (("*", 0.5),)}, "sparsity.distribution", "global"),
    ("gmp", {"sparsity.layers": (("*", 0.5),)}, "sparsity.budget", "weights"),
    (
        "ste",
        {"sparsity.pattern": "2:4", "sparsity.final": 0.5},
        "sparsity.distribution",
        "global",
    ),
    ("st3", {}, "data.workers", 2),
    ("st3", {"data.augmentation": "none"}, "data.shift_pixels", 2),
    ("st3", {}, "learning_rate.drop_epochs", (30,)),
    ("st3", {}, "learning_rate.drop_factor", 0.5),
    ("st3", {"learning_rate.schedule": "step"}, "learning_rate.warmup_epochs", 5),
    ("st3", {"fine_tune_epochs": 0}, "learning_rate.fine_tune", 0.1),
    ("lrr", {}, "learning_rate.fine_tune", 0.1),
    ("granet", {}, "eval_dense", False),
]


@pytest.mark.parametrize(("method", "fields", "field", "value"), USELESS)
def test_a_setting_that_does_nothing_is_refused(method, fields, field, value):
    without = of_method("digits_st3", method, **fields)
    section, _, name = field.rpartition(".")
    assert (without[section][name] if section else without[name]) is None
    said = re.escape(f"config.{field} is {value!r}, but does nothing while config.")
    with pytest.raises(UserError, match=said) as error:
        of_method("digits_st3", method, **fields, **{field: value})
    assert "\n" not in str(error.value)
    assert f"leave it out, or let a file set config.defaults.common.{field}" in str(
        error.value
    )
    # Which says nothing against the method.
    default = {f"defaults.common.{field}": value}
    assert of_method("digits_st3", method, **fields, **default) == without


DEFAULTS = [  # of a method, though the run may be one of another
    (
        "granet",
        {"sparsity": {"updat": 3}},
        ".granet.sparsity.updat is the default of n",
    ),
    (
        "st3",
        {"granet": {"drop": 0.9}},
        ".st3.granet.drop does nothing, as only 'g",
    ),
    ("none", {"ramp": (0.0, 0.5)}, ".none.sparsity.begin_epoch does nothing, as only"),
    (
        "granet",
        {"ramp": (0.5,)},
        ".granet.ramp is two shares of num_epochs, (be",
    ),
    ("gmp", {"foo": 3}, ".gmp.foo is the default of no field"),
    ("gmpp", {}, " is one of 'common', 'none', 'st3'"),
]


@pytest.mark.parametrize(("method", "section", "sentence"), DEFAULTS)
def test_a_default_that_does_nothing_is_refused(method, section, sentence):
    config = base_config.get_config()
    config.defaults[method] = ml_collections.ConfigDict(section)
    with pytest.raises(UserError, match=re.escape(f"config.defaults{sentence}"[:60])):
        settle(config)


def test_numbers_of_numpy_are_numbers():
    config = base_config.get_config()
    config.data.update(name="digits", mean=(np.float32(0.3),), std=(np.float32(0.4),))
    config.learning_rate.drop_epochs = (np.int64(8), np.int64(9))
    assert settle(config).config.learning_rate.drop_epochs == (8, 9)


def test_drops_of_the_rate_are_while_the_network_trains():
    fields = {"learning_rate.schedule": "step", "num_epochs": 100}
    config = of_method("digits_st3", "st3", **fields)
    assert config.learning_rate.drop_epochs == (80,)  # of the default, (80, 120)
    for drops in ((100,), (0,), (20, 20), (30, 20), (-1,), (2.5,), ("a",)):
        with pytest.raises(UserError, match="drop_epochs are whole numbers above"):
            of_method(
                "digits_st3", "st3", **fields, **{"learning_rate.drop_epochs": drops}
            )


def shown(config):
    """The rows of the settings that a run prints, from name to text."""
    console = Console(file=io.StringIO(), width=500)
    print_settings(console, stand_in(config), {"images": "none"})
    lines = console.file.getvalue().splitlines()
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    return {row[1]: row[2] for row in cells if len(row) == 4}


def test_the_settings_that_are_shown_are_those_of_use_and_say_whose_they_are():
    config = get_config("digits_st3")
    config.sparsity.method = "granet"
    config.sparsity.end_epoch = 20
    rows = shown(config)
    assert rows["sparsity"] == (
        "begin_epoch 0.0 (granet's own), end_epoch 20.0, final 0.9, method granet, "
        "power 3.0, update_every_steps 22 (granet's own)"
    )
    assert rows["granet"] == "drop 0.5, initial 0.0"
    assert rows["fine_tune_epochs"] == "0 (granet's own)"
    assert rows["images"] == "none"
    assert rows["data"].startswith("augmentation shift, broken_images stop, flip False")
    assert not {"gmp", "lrr", "str_", "eval_dense", "defaults"} & set(rows)

    rows = shown(get_config("digits_st3"))
    assert "soft True, straight_through True" in rows["sparsity"]
    assert "own" not in "".join(rows.values())
    config.sparsity.method = "none"
    config.sparsity.end_epoch = None
    assert shown(config)["sparsity"] == "method none"


class Reading:
    """A configuration that notes which of its fields are read."""

    def __init__(self, node, read, prefix=""):
        self.node, self.read, self.prefix = node, read, prefix

    def __getattr__(self, name):
        value = self.node[name]
        if isinstance(value, ml_collections.ConfigDict):
            return Reading(value, self.read, f"{self.prefix}{name}.")
        self.read.add(self.prefix + name)
        return value

    __getitem__ = __getattr__


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_the_fields_that_it_has_and_no_others(method):
    config, read = of_method("digits_st3", method), set()
    tx = METHODS[method].make(optax.sgd(0.1), Reading(config, read), 22, {})
    jax.eval_shape(tx.init, {"stem": {"kernel": jnp.ones((4, 4))}})
    has = {f"sparsity.{name}" for name in METHODS[method].fields}
    has |= {f"{method}.{name}" for name in config.get(method, ())}
    assert has == {
        field
        for field in read - {"sparsity.method"}
        if field.partition(".")[0] in {"sparsity", *METHODS}
    }


@pytest.mark.parametrize(
    ("section", "field", "sentence"),
    [
        ("granett", "fine_tune_epochs", "config.defaults is one of 'common', 'none',"),
        (
            "granet",
            "sparsity.fnal",
            "defaults.granet.sparsity.fnal is the default of no",
        ),
        ("granet", "batch_size", "defaults.granet.batch_size is the default of no"),
        ("common", "sparsity.fnal", "defaults.common.sparsity.fnal is not a field of"),
    ],
)
def test_a_default_that_is_of_no_field_is_refused(section, field, sentence):
    config = get_config("digits_st3")
    config.sparsity.method = "granet"
    node = config.defaults.get(section) or ml_collections.ConfigDict()
    config.defaults[section] = node
    *path, name = field.split(".")
    for part in path:
        node = node[part]
    node[name] = 0.5
    with pytest.raises(UserError, match=re.escape(sentence)):
        settle(config)


def test_rewinding_twice_is_refused():
    with pytest.raises(UserError, match="second_cycle"):
        of_method("digits_st3", "lrr", second_cycle=True)
