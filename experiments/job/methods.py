"""The sparse-training methods, each from its fields of a configuration."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import optax

import base_config
import st3jax
from job.rates import learning_rate

__all__ = ["DENSE_WITHIN", "METHODS"]

DENSE_WITHIN = ("st3", "ste", "gmp", "probmask", "str_")
"""Methods whose raw weights are dense until the mask is fixed."""


def _clipped(inner: Any, config: Any) -> Any:
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    return optax.chain(clip, inner)


def _prunable(config: Any) -> Any:
    def prunable(path: str, leaf: Any) -> bool:
        patterns = config.sparsity.dense
        dense = any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        return st3jax.is_kernel(path, leaf) and not dense

    return prunable


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


def _dense(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    del steps_per_epoch, costs
    return _clipped(inner, config)


def _thresholded(method: Callable[..., Any]) -> Callable[..., Any]:
    """How a method with a threshold is made: all but its own options."""

    def make(
        inner: Any, config: Any, steps_per_epoch: int, costs: Any, **own: Any
    ) -> Any:
        sparsity = config.sparsity
        return method(
            _clipped(inner, config),
            _ramps(config, steps_per_epoch),
            criterion=sparsity.criterion,
            distribution=sparsity.distribution,
            budget=sparsity.budget,
            costs=costs if sparsity.budget == "multiply_adds" else None,
            pattern=sparsity.pattern or None,
            block_shape=tuple(sparsity.block_shape) or None,
            prunable=_prunable(config),
            update_every=sparsity.update_every_steps,
            freeze_step=config.num_epochs * steps_per_epoch,
            **own,
        )

    return make


def _st3(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    names = ("soft", "rescale", "straight_through")
    own = {name: config.sparsity[name] for name in names}
    return _thresholded(st3jax.st3)(inner, config, steps_per_epoch, costs, **own)


def _gmp(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    make = _thresholded(st3jax.gmp)
    return make(inner, config, steps_per_epoch, costs, sticky=config.gmp.sticky)


def _lrr(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    del costs
    _check_plain(config)
    return st3jax.lrr(
        _clipped(inner, config),
        config.sparsity.final,
        cycle_steps=config.num_epochs * steps_per_epoch,
        keep=config.lrr.keep,
        prunable=_prunable(config),
    )


def _probmask(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    del costs
    _check_plain(config)
    steps = config.num_epochs * steps_per_epoch
    rate = optax.cosine_decay_schedule(config.probmask.learning_rate, steps)
    return st3jax.probmask(
        inner,
        _ramps(config, steps_per_epoch),
        key=_key(config),
        freeze_step=steps,
        probability_optimizer=optax.adam(rate),
        clip_norm=config.optimizer.clip_norm,  # of weights and probabilities together
        draw=config.probmask.draw,
        prunable=_prunable(config),
    )


def _granet(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    del costs
    _check_plain(config)
    return st3jax.granet(
        _clipped(inner, config),
        _ramps(config, steps_per_epoch),
        total_steps=config.num_epochs * steps_per_epoch,
        update_every=config.sparsity.update_every_steps,
        drop=config.granet.drop,
        initial_sparsity=config.granet.initial,
        key=_key(config),
        prunable=_prunable(config),
        freeze_step=config.num_epochs * steps_per_epoch,
    )


def _rigl(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    del costs
    _check_plain(config, "distribution")
    return st3jax.rigl(
        _clipped(inner, config),
        config.sparsity.final,
        key=_key(config),
        total_steps=config.num_epochs * steps_per_epoch,
        update_every=config.sparsity.update_every_steps,
        drop=config.rigl.drop,
        end=config.rigl.end,
        distribution=config.sparsity.distribution,
        prunable=_prunable(config),
    )


def _set(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    del costs
    _check_plain(config, "distribution")
    return st3jax.set_(
        _clipped(inner, config),
        config.sparsity.final,
        key=_key(config),
        update_every=config.sparsity.update_every_steps,
        drop=config.set_.drop,
        distribution=config.sparsity.distribution,
        prunable=_prunable(config),
        freeze_step=config.num_epochs * steps_per_epoch,
    )


def _str(inner: Any, config: Any, steps_per_epoch: int, costs: Any) -> Any:
    """The sparsity emerges, from the decay of the thresholds' own numbers."""
    del costs
    _check_plain(config)
    return st3jax.str_(
        _clipped(inner, config),
        threshold_optimizer=optax.chain(
            optax.add_decayed_weights(config.str_.weight_decay),
            optax.sgd(
                learning_rate(config, steps_per_epoch), config.optimizer.momentum
            ),
        ),
        initial=config.str_.initial,
        freeze_step=config.num_epochs * steps_per_epoch,
        prunable=_prunable(config),
    )


def _key(config: Any) -> jax.Array:
    """Where a method's own randomness comes from: not what the weights are drawn by."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def _check_plain(config: Any, *known: str) -> None:
    """Raises if a field is set that the method knows nothing of."""
    plain = base_config.get_config().sparsity
    for name in ("criterion", "distribution", "budget", "layers", "pattern"):
        if name not in known and config.sparsity[name] != plain[name]:
            raise ValueError(
                f"method {config.sparsity.method!r} has no {name}, got "
                f"{config.sparsity[name]!r}: the methods 'st3', 'ste' and 'gmp' have"
            )


METHODS: dict[str, Callable[[Any, Any, int, Any], Any]] = {
    "none": _dense,
    "st3": _st3,
    "ste": _thresholded(st3jax.ste),
    "gmp": _gmp,
    "lrr": _lrr,
    "probmask": _probmask,
    "granet": _granet,
    "rigl": _rigl,
    "set_": _set,
    "str_": _str,
}
"""How ``config.sparsity.method`` wraps the optimizer, gradient clipping included."""
