"""The optimizer of a configuration: learning rate, SGD, sparse-training method."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import st3jax
from st3jax.trees import path_name

__all__ = ["METHODS", "learning_rate", "make_optimizer", "total_steps"]


def total_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: training, fine-tuning, a second cycle."""
    epochs = config.num_epochs + config.fine_tune_epochs
    return (epochs + config.second_cycle * config.num_epochs) * steps_per_epoch


def learning_rate(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate over steps: warm-up, steps or cosine, constant fine-tuning.

    A second cycle begins anew after fine-tuning: learning-rate rewinding. Source:
    arXiv:2003.02389.
    """
    rate = config.learning_rate
    if rate.schedule == "cosine":
        start = rate.peak / rate.warmup_epochs if rate.warmup_epochs else rate.peak
        by_epoch = optax.warmup_cosine_decay_schedule(
            start, rate.peak, rate.warmup_epochs, config.num_epochs
        )
    else:
        drops = dict.fromkeys(rate.drop_epochs, rate.drop_factor)
        by_epoch = optax.piecewise_constant_schedule(rate.peak, drops)

    def by_step(count: jax.Array) -> jax.Array:
        epoch = count / steps_per_epoch
        epoch = jnp.floor(epoch) if rate.per_epoch else epoch
        rewound = config.num_epochs + config.fine_tune_epochs
        fine_tunes = (epoch >= config.num_epochs) & (epoch < rewound)
        epoch = jnp.where(epoch < rewound, epoch, epoch - rewound)
        return jnp.where(fine_tunes, rate.fine_tune, by_epoch(epoch))

    return by_step


def kernels(params: Any) -> Any:
    """Which parameters weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: st3jax.is_kernel(path_name(path), leaf), params
    )


def _ramps(config: Any, steps_per_epoch: int) -> Any:
    """The ramp to the final sparsity, or one for each path pattern."""
    sparsity = config.sparsity

    def ramp(final: float) -> optax.Schedule:
        return st3jax.polynomial_ramp(
            final,
            begin=round(sparsity.begin_epoch * steps_per_epoch),
            end=round(sparsity.end_epoch * steps_per_epoch),
            power=sparsity.power,
        )

    if not sparsity.layers:
        return ramp(sparsity.final)
    return {pattern: ramp(final) for pattern, final in sparsity.layers}


def _st3(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    sparsity = config.sparsity

    def prunable(path: str, leaf: Any) -> bool:
        dense = any(fnmatch.fnmatchcase(path, name) for name in sparsity.dense)
        return st3jax.is_kernel(path, leaf) and not dense

    return st3jax.st3(
        inner,
        _ramps(config, steps_per_epoch),
        criterion=sparsity.criterion,
        soft=sparsity.soft,
        rescale=sparsity.rescale,
        distribution=sparsity.distribution,
        budget=sparsity.budget,
        costs=costs if sparsity.budget == "multiply_adds" else None,
        pattern=sparsity.pattern or None,
        block_shape=tuple(sparsity.block_shape) or None,
        prunable=prunable,
        update_every=sparsity.update_every_steps,
        freeze_step=config.num_epochs * steps_per_epoch,
    )


METHODS: dict[str, Callable[[Any, Any, int, Any], Any]] = {
    "none": lambda inner, config, steps_per_epoch, costs: inner,
    "st3": _st3,
}
"""How ``config.sparsity.method`` wraps the optimizer."""


def make_optimizer(
    config: ml_collections.ConfigDict, steps_per_epoch: int, costs: dict[str, int]
) -> optax.GradientTransformationExtraArgs:
    """Clipping, weight decay on kernels and SGD, wrapped in the asked method.

    Args:
        config: The experiment's configuration.
        steps_per_epoch: Optimizer steps in an epoch.
        costs: From path to the multiply-adds of one weight.

    Returns:
        The optimizer of the whole run.
    """
    sgd = config.optimizer
    inner = optax.chain(
        optax.clip_by_global_norm(sgd.clip_norm),
        optax.add_decayed_weights(sgd.weight_decay, mask=kernels),
        optax.sgd(learning_rate(config, steps_per_epoch), momentum=sgd.momentum),
    )
    return METHODS[config.sparsity.method](inner, config, steps_per_epoch, costs)
