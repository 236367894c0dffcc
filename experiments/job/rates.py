"""How long a configuration trains, and at which learning rate."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

import st3jax

__all__ = ["cycles", "learning_rate", "total_steps"]


def cycles(config: ml_collections.ConfigDict) -> int:
    """How many times ``config.num_epochs`` are trained, each from the rates' start."""
    if config.sparsity.method != "lrr":
        return 1
    return st3jax.lrr_cycles(config.sparsity.final, keep=config.lrr.keep)


def total_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: all cycles, and fine-tuning."""
    epochs = cycles(config) + config.second_cycle
    return (epochs * config.num_epochs + config.fine_tune_epochs) * steps_per_epoch


def learning_rate(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate over steps: warm-up, steps or cosine, constant fine-tuning.

    It begins anew with each cycle, and with a second cycle after fine-tuning:
    learning-rate rewinding. Source: arXiv:2003.02389.
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
        trained = cycles(config) * config.num_epochs
        rewound = trained + config.fine_tune_epochs
        fine_tunes = (epoch >= trained) & (epoch < rewound)
        epoch = jnp.where(epoch < rewound, epoch % config.num_epochs, epoch - rewound)
        if not config.fine_tune_epochs:
            return by_epoch(epoch)
        return jnp.where(fine_tunes, rate.fine_tune, by_epoch(epoch))

    return by_step
