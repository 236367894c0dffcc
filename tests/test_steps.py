"""One training step: accumulated parts, images left out, the moving average."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import stand_in

import digits_st3
import st3jax
from job import steps
from job.optimizers import make_optimizer
from job.rates import learning_rate, total_steps
from job.settings import settle
from models.layers import BATCH_AXIS
from paths import by_path, kernels

pytestmark = pytest.mark.usefixtures("quickly_compiled")


class Small(nn.Module):
    """Two kernels, and a normalisation that the training state has to carry."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(4, (3, 3), (2, 2), use_bias=False)(images)
        axis_name = BATCH_AXIS if train else None
        x = nn.BatchNorm(not train, momentum=0.5, axis_name=axis_name)(x)
        return nn.Dense(10, use_bias=False)(nn.relu(x).mean((1, 2)))


def configure(**fields):
    config = digits_st3.get_config()
    config.data.augmentation = "none"
    config.defaults.common.sparsity.begin_epoch = 0.0
    config.defaults.common.sparsity.end_epoch = 1.0
    config.update_from_flattened_dict(fields)
    return settle(config).config


def make_state(config):
    return steps.create_train_state(config, Small(), make_optimizer(config, 4, {}))


def make_batch(seed, size=8):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, size, np.int32),
        "valid": np.ones(size, bool),
    }


@functools.cache
def compiled(function, fields):
    config = configure(**dict(fields))
    return jax.pmap(
        functools.partial(function, config=config),
        BATCH_AXIS,
        in_axes=(None, 0),
        devices=jax.local_devices()[:1],
    )


def on_one_device(function, state, batch, **fields):
    """What a function of a step gives, on one device."""
    batch = jax.tree.map(lambda x: x[None], batch)
    run = compiled(function, tuple(fields.items()))
    return jax.tree.map(lambda x: x[0], run(state, batch))


def gradients(state, batch, config):
    return steps.gradients(state, batch, jax.random.key(0), config)


def test_accumulated_gradients_are_the_mean_of_those_of_the_parts():
    state = make_state(configure())
    batch = make_batch(0)
    fields = {"accumulate_steps": 4}
    grads, stats, metrics = on_one_device(gradients, state, batch, **fields)
    parts = []
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch)
        found = on_one_device(gradients, state, part)
        parts.append((found[0], {k: v for k, v in found[2].items() if "train" in k}))
        state = state.replace(batch_stats=found[1])
    mean = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *parts)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        (grads, stats, metrics["train_loss"]),
        (mean[0], found[1], mean[1]["train_loss"]),
    )


def test_a_batch_in_parts_is_one_step_of_the_optimizer():
    config = configure(accumulate_steps=4)
    state, metrics = on_one_device(
        steps.train_step, make_state(config), make_batch(0), accumulate_steps=4
    )
    assert int(state.step) == int(state.opt_state.count) == 1
    assert metrics["train_loss"].shape == ()


def test_an_image_that_is_left_out_teaches_nothing():
    state = make_state(configure())
    batch = make_batch(0)
    batch["valid"][3:5] = False
    before = on_one_device(gradients, state, batch)
    batch["label"][3:5] += 1
    after = on_one_device(gradients, state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert before[2]["skipped_images"] == 2
    batch["label"][5] = (batch["label"][5] + 1) % 10
    changed = on_one_device(gradients, state, batch)
    assert changed[2]["train_loss"] != before[2]["train_loss"]
    # Each of six images counts as a sixth.
    logits = on_one_device(_logits, state, batch)
    losses = _losses(logits, batch["label"])[batch["valid"]]
    np.testing.assert_allclose(changed[2]["train_loss"], losses.mean(), rtol=1e-5)


def _logits(state, batch, config):
    images = steps.normalise(batch["image"], config)
    params = steps.effective_params(config, state.params, state.opt_state)
    variables = {"params": params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, images, train=True, mutable=["batch_stats"])[0]


def _losses(logits, labels, smoothing=0.1):
    log_p = np.asarray(jax.nn.log_softmax(logits))
    picked = log_p[np.arange(len(labels)), labels]
    return -(1 - smoothing) * picked - smoothing * log_p.mean(1)


def test_the_moving_average_is_that_of_the_effective_weights():
    fields = {"ema_decay": 0.75}
    config = configure(**fields)
    state = make_state(config)
    average = {"params": state.params, "batch_stats": state.batch_stats}
    for seed in range(6):
        state, _ = on_one_device(steps.train_step, state, make_batch(seed), **fields)
        now = {
            "params": st3jax.sparsify(state.params, state.opt_state),
            "batch_stats": state.batch_stats,
        }
        average = jax.tree.map(lambda a, x: 0.75 * a + 0.25 * x, average, now)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    networks = steps.eval_variables(state, config)
    sparse = by_path(networks["test"]["params"])
    for name, leaf in by_path(networks["ema_test"]["params"]).items():
        raw = by_path(state.ema["params"])[name]
        zero = np.asarray(sparse[name] == 0) & name.endswith("kernel")
        np.testing.assert_array_equal(leaf, np.where(zero, 0, raw))
    summary = st3jax.summary(networks["ema_test"]["params"])
    assert summary.zeros == st3jax.summary(networks["test"]["params"]).zeros > 0


def test_an_evaluation_looks_at_what_was_asked_for():
    for fields, names in (
        ({}, {"test", "dense_test"}),
        ({"eval_dense": False}, {"test"}),
        ({"sparsity.method": "none"}, {"test"}),
        ({"ema_decay": 0.9, "sparsity.method": "none"}, {"test", "ema_test"}),
    ):
        config = configure(**fields)
        assert steps.eval_variables(make_state(config), config).keys() == names
    config = configure()
    state = make_state(config)
    networks = steps.eval_variables(state, config)
    jax.tree.map(
        np.testing.assert_array_equal, networks["dense_test"]["params"], state.params
    )


@pytest.mark.parametrize("spoilt", ["image", "weight"])
def test_a_step_that_is_not_finite_spoils_nothing(monkeypatch, spoilt):
    config = configure(ema_decay=0.5)
    state = make_state(config)
    if spoilt == "image":
        monkeypatch.setattr(
            steps, "normalise", lambda images, config: jnp.full(images.shape, jnp.inf)
        )
    else:
        kernel = state.params["Dense_0"]["kernel"].at[0, 0].set(jnp.inf)
        state = state.replace(params={**state.params, "Dense_0": {"kernel": kernel}})
    config = configure(ema_decay=0.5, seed=1)  # another program than other tests'
    run = jax.pmap(
        functools.partial(steps.train_step, config=config),
        BATCH_AXIS,
        in_axes=(None, 0),
        devices=jax.local_devices()[:1],
    )
    batch = jax.tree.map(lambda x: x[None], make_batch(0))
    new, metrics = jax.tree.map(lambda x: x[0], run(state, batch))
    assert not metrics["fine"]
    wrong = [
        name
        for name, finite in zip(
            steps.finite_names(state), metrics["finite"], strict=True
        )
        if not finite
    ]
    assert any("Conv_0/kernel" in name or "Dense_0/kernel" in name for name in wrong)
    assert ("the activations at BatchNorm_0/mean" in wrong) == (spoilt == "image")
    assert int(new.step) == int(new.opt_state.count) == 1
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, state.batch_stats)
    finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), new.params)
    assert finite["Conv_0"]["kernel"]


def test_a_second_cycle_rewinds_the_learning_rate_and_keeps_the_zeros():
    fields = {"num_epochs": 6, "fine_tune_epochs": 2, "second_cycle": True}
    for schedule, per_epoch in (("cosine", False), ("cosine", True), ("step", True)):
        fields |= {
            "learning_rate.schedule": schedule,
            "learning_rate.per_epoch": per_epoch,
            "defaults.common.learning_rate.warmup_epochs": 2,
            "defaults.common.learning_rate.drop_epochs": (3, 5),
        }
        config = configure(**fields)
        rate = learning_rate(config, steps_per_epoch=4)
        rates = np.array([float(rate(jnp.array(step))) for step in range(14 * 4)])
        np.testing.assert_array_equal(rates[32:], rates[:24])
        np.testing.assert_allclose(rates[24:32], config.learning_rate.fine_tune)
        assert total_steps(config, 4) == 14 * 4 == len(rates)
        once = configure(**fields | {"second_cycle": False})
        assert total_steps(once, 4) == 8 * 4


def test_zeros_are_fixed_through_the_second_cycle():
    fields = {"num_epochs": 2, "fine_tune_epochs": 1, "second_cycle": True}
    state = make_state(configure(**fields))
    zeros = []
    for step in range(5 * 4):
        batch = make_batch(step)
        state, _ = on_one_device(steps.train_step, state, batch, **fields)
        weights = st3jax.finalize(state.params, state.opt_state)
        zeros.append({name: np.asarray(w == 0) for name, w in kernels(weights).items()})
    for later in zeros[8:]:
        jax.tree.map(np.testing.assert_array_equal, later, zeros[7])
    assert sum(int(z.sum()) for z in zeros[-1].values()) == int(0.9 * 75) + 1


def test_bfloat16_computes_a_step_with_float32_state():
    config = digits_st3.get_config()
    config.model.dtype = "bfloat16"
    job = stand_in(config)
    config = job.config
    state = steps.create_train_state(config, job.model, job.tx)
    batch = jax.tree.map(lambda x: x[None], make_batch(0))
    step = jax.pmap(
        functools.partial(steps.train_step, config=config),
        BATCH_AXIS,
        in_axes=(None, 0),
    )
    new, metrics = jax.eval_shape(step, state, batch)
    floats = {
        x.dtype
        for x in jax.tree.leaves((new, metrics))
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    assert floats == {jnp.dtype("float32")}
