"""The training state and the pure functions of a step; ``train.py`` has the loop.

They run under ``pmap`` over ``BATCH_AXIS``: each device has its part of the batch.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax.training import train_state

import st3jax
from job.augmentation import augment, normalise
from job.methods import DENSE_WITHIN
from models.layers import BATCH_AXIS
from paths import by_path

__all__ = [
    "TrainState",
    "create_train_state",
    "effective_params",
    "eval_step",
    "eval_variables",
    "finite_names",
    "train_step",
]


class TrainState(train_state.TrainState):
    """Flax's training state with BatchNorm's running statistics.

    Attributes:
        batch_stats: Running statistics, in the structure of the model.
        ema: Moving averages of the effective weights and of ``batch_stats``; empty
            without ``config.ema_decay``.
    """

    batch_stats: Any
    ema: Any


def create_train_state(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
) -> TrainState:
    """Fresh parameters and optimizer for a seed.

    Args:
        config: The settings of the run.
        model: Its model.
        tx: Its optimizer.

    Returns:
        The state before the first step.
    """
    size = config.data.image_size
    images = jnp.zeros((1, size, size, len(config.data.mean)))
    init = jax.jit(
        functools.partial(model.init, train=False),
        # It runs once: compiling fast matters more than running fast.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    variables = init(jax.random.key(config.seed), images)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    averaged = {"params": params, "batch_stats": batch_stats}
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=tx,
        batch_stats=batch_stats,
        # A copy: buffers that are donated must not be shared.
        ema=jax.tree.map(jnp.copy, averaged) if config.ema_decay else {},
    )
    return state.replace(step=jnp.zeros([], jnp.int32))


def effective_params(
    config: ml_collections.ConfigDict, params: Any, opt_state: Any
) -> Any:
    """The weights that the model sees."""
    if config.sparsity.method == "none":
        return params
    return st3jax.sparsify(params, opt_state)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], config: ml_collections.ConfigDict
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on one device's part of the batch.

    A gradient that is not finite counts as zero, so no step can spoil the state.

    Returns:
        The state after the step, and its metrics; ``finite`` has a truth value for
        each of ``finite_names``.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index(BATCH_AXIS))
    grads, batch_stats, metrics = gradients(state, batch, key, config)

    finite = jnp.stack([jnp.isfinite(x).all() for x in _watched(batch_stats, grads)])
    fine = finite.all() & jnp.isfinite(metrics["train_loss"])
    grads = jax.tree.map(lambda g: jnp.where(fine, g, 0), grads)
    batch_stats = jax.tree.map(
        functools.partial(jnp.where, fine), batch_stats, state.batch_stats
    )
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    if config.ema_decay:
        now = {
            "params": effective_params(config, state.params, state.opt_state),
            "batch_stats": state.batch_stats,
        }
        ema = optax.incremental_update(now, state.ema, 1 - config.ema_decay)
        state = state.replace(ema=ema)
    return state, {**metrics, "fine": fine, "finite": finite}


def _watched(batch_stats: Any, grads: Any) -> list[Any]:
    """What shows where numbers stop being finite: statistics first, then gradients."""
    return [*by_path(batch_stats).values(), *by_path(grads).values()]


def finite_names(state: TrainState) -> list[str]:
    """Names for what ``train_step``'s ``finite`` tells of."""
    return [
        *(f"the activations at {name}" for name in by_path(state.batch_stats)),
        *(f"the gradient of {name}" for name in by_path(state.params)),
    ]


def gradients(
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    config: ml_collections.ConfigDict,
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Gradients over all devices, new statistics, metrics.

    With ``config.accumulate_steps`` above 1 the batch is worked through in parts:
    their mean gradient, for the memory of one.
    """
    count = config.accumulate_steps
    if count == 1:
        sums, batch_stats = _sums(state, state.batch_stats, batch, key, config)
    else:
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        def add(carry: Any, part: Any) -> Any:
            (sums, batch_stats), (batch, key) = carry, part
            more, batch_stats = _sums(state, batch_stats, batch, key, config)
            return (jax.tree.map(jnp.add, sums, more), batch_stats), None

        example = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(
            lambda: _sums(state, state.batch_stats, example, key, config)[0]
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        keys = jax.random.split(key, count)
        carry = (zeros, state.batch_stats)
        (sums, batch_stats), _ = jax.lax.scan(add, carry, (parts, keys))
    grads, metrics = jax.lax.pmean(
        jax.tree.map(lambda x: x / count, (sums["grads"], sums["metrics"])), BATCH_AXIS
    )
    skipped = jax.lax.psum(jnp.sum(~batch["valid"]), BATCH_AXIS)
    return grads, batch_stats, {**metrics, "skipped_images": skipped}


def _sums(
    state: TrainState,
    batch_stats: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    config: ml_collections.ConfigDict,
) -> tuple[dict[str, Any], Any]:
    """Gradients and metrics of one part of the batch, and the statistics after it."""
    augment_key, dropout_key = jax.random.split(key)
    images = augment(normalise(batch["image"], config), augment_key, config)
    valid = batch["valid"]

    def loss_fn(params: Any) -> Any:
        logits, updates = state.apply_fn(
            {
                "params": effective_params(config, params, state.opt_state),
                "batch_stats": batch_stats,
            },
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch["label"], logits.shape[-1]), config.label_smoothing
        )
        loss = _mean(optax.softmax_cross_entropy(logits, targets), valid)
        return loss, (logits, updates.get("batch_stats", {}))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    accuracy = _mean(logits.argmax(-1) == batch["label"], valid)
    metrics = {"train_loss": loss, "train_accuracy": accuracy}
    return {"grads": grads, "metrics": metrics}, batch_stats


def _mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.sum(x * valid) / jnp.maximum(jnp.sum(valid), 1)


def eval_variables(
    state: TrainState, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """The networks that an evaluation looks at, by name.

    Returns:
        ``test``: the network that will ship. ``dense_test``: the raw weights.
        ``ema_test``: the average of the effective weights, with the zeros of ``test``.
    """
    sparse = effective_params(config, state.params, state.opt_state)
    stats = {"batch_stats": state.batch_stats}
    networks = {"test": {"params": sparse, **stats}}
    if config.eval_dense and config.sparsity.method in DENSE_WITHIN:
        networks["dense_test"] = {"params": state.params, **stats}
    if config.ema_decay:
        networks["ema_test"] = {
            **state.ema,
            "params": jax.tree.map(
                lambda kernel, average, now: (
                    jnp.where(now == 0, 0, average) if kernel else average
                ),
                st3jax.kernel_mask(sparse),
                state.ema["params"],
                sparse,
            ),
        }
    return networks


def eval_step(
    variables: Any,
    batch: dict[str, jax.Array],
    apply_fn: Any,
    config: ml_collections.ConfigDict,
) -> dict[str, jax.Array]:
    """How many images of the batch are classified right, over all devices."""
    images = normalise(batch["image"], config)
    logits = apply_fn(variables, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    sums = {
        "correct": jnp.sum((logits.argmax(-1) == batch["label"]) & batch["valid"]),
        "loss": jnp.sum(losses * batch["valid"]),
        "images": jnp.sum(batch["valid"]),
    }
    return jax.lax.psum(sums, BATCH_AXIS)
