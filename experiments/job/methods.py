"""The sparse-training methods, each from its fields of a configuration."""

import fnmatch
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import st3jax
from job.rates import learning_rate

__all__ = ["DENSE_WITHIN", "METHODS", "Method"]

DENSE_WITHIN = ("st3", "ste", "gmp", "probmask", "str_")
"""Methods whose raw weights are dense until the mask is fixed."""


class Method(NamedTuple):
    """A method.

    Attributes:
        make: From an optimizer, the configuration, the steps of an epoch, the costs of
            weights and the layouts of kernels to the optimizer of the whole run,
            gradient clipping included.
        fields: Those of ``config.sparsity`` that it has, beside all of the section that
            is called as it is.
    """

    make: Callable[..., Any]
    fields: tuple[str, ...]


def _clipped(inner: Any, config: Any) -> Any:
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    return optax.chain(clip, inner)


def _prunable(config: Any) -> Any:
    def prunable(path: str, leaf: Any) -> bool:
        dense = any(fnmatch.fnmatchcase(path, one) for one in config.sparsity.dense)
        return st3jax.is_kernel(path, leaf) and not dense

    return prunable


def _ramp(config: Any, steps_per_epoch: int, final: float) -> optax.Schedule:
    sparsity = config.sparsity
    return st3jax.polynomial_ramp(
        final,
        begin=round(sparsity.begin_epoch * steps_per_epoch),
        end=round(sparsity.end_epoch * steps_per_epoch),
        power=sparsity.power,
    )


def _ramps(config: Any, steps_per_epoch: int) -> Any:
    """The ramp to the final sparsity, or one for each path."""
    layers = config.sparsity.layers
    if not layers:
        return _ramp(config, steps_per_epoch, config.sparsity.final)
    return {path: _ramp(config, steps_per_epoch, final) for path, final in layers}


def _rule(config: Any, costs: dict[str, int]) -> dict[str, Any]:
    """Which weights go first: what the methods with a threshold share."""
    sparsity = config.sparsity
    names = ("criterion", "distribution")
    return {
        **{name: sparsity[name] for name in names if sparsity[name] is not None},
        "costs": costs if sparsity.budget == "multiply_adds" else None,
        "pattern": _pattern(sparsity.pattern),
    }


def _pattern(text: str) -> str | tuple[int, ...] | None:
    """N:M as it is; a block as its shape."""
    if re.fullmatch(r"\d+(x\d+)*", text):
        block = tuple(map(int, text.split("x")))
        if set(block) == {1}:
            raise ValueError(f"pattern {text!r} is one weight, so no pattern: write ''")
        return block
    if text and not re.fullmatch(r"\d+:\d+", text):
        raise ValueError(
            f"pattern is N:M such as '2:4', or a block such as '4x8', got {text!r}"
        )
    return text or None


def _dense(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    del steps_per_epoch, costs, layouts
    return _clipped(inner, config)


def _thresholded(
    method: Callable[..., Any], own: Callable[[Any], dict[str, Any]] = lambda config: {}
) -> Callable[..., Any]:
    """How a method with a threshold is made, with options of its own."""

    def make(
        inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
    ) -> Any:
        return method(
            _clipped(inner, config),
            _ramps(config, steps_per_epoch),
            prunable=_prunable(config),
            update_every=config.sparsity.update_every_steps,
            freeze_step=config.num_epochs * steps_per_epoch,
            layout=layouts,
            **_rule(config, costs),
            **own(config),
        )

    return make


def _st3_options(config: Any) -> dict[str, Any]:
    return {name: config.sparsity[name] for name in INGREDIENTS}


def _gmp_options(config: Any) -> dict[str, Any]:
    return {"sticky": config.gmp.sticky}


def _lrr(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    del costs, layouts
    return st3jax.lrr(
        _clipped(inner, config),
        config.sparsity.final,
        cycle_steps=config.num_epochs * steps_per_epoch,
        keep=config.lrr.keep,
        prunable=_prunable(config),
    )


def _probmask(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    del costs, layouts
    steps = config.num_epochs * steps_per_epoch
    rate = optax.cosine_decay_schedule(config.probmask.learning_rate, steps)
    return st3jax.probmask(
        inner,
        _ramp(config, steps_per_epoch, config.sparsity.final),
        key=_key(config),
        freeze_step=steps,
        probability_optimizer=optax.adam(rate),
        clip_norm=config.optimizer.clip_norm,  # of weights and probabilities together
        draw=config.probmask.draw,
        prunable=_prunable(config),
    )


def _granet(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    del costs
    return st3jax.granet(
        _clipped(inner, config),
        _ramp(config, steps_per_epoch, config.sparsity.final),
        total_steps=config.num_epochs * steps_per_epoch,
        update_every=config.sparsity.update_every_steps,
        drop=config.granet.drop,
        initial_sparsity=config.granet.initial,
        key=_key(config),
        prunable=_prunable(config),
        layout=layouts,
        freeze_step=config.num_epochs * steps_per_epoch,
    )


def _rigl(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    del costs
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
        layout=layouts,
    )


def _set(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    del costs
    return st3jax.set_(
        _clipped(inner, config),
        config.sparsity.final,
        key=_key(config),
        update_every=config.sparsity.update_every_steps,
        drop=config.set_.drop,
        distribution=config.sparsity.distribution,
        prunable=_prunable(config),
        layout=layouts,
        freeze_step=config.num_epochs * steps_per_epoch,
    )


def _str(
    inner: Any, config: Any, steps_per_epoch: int, costs: Any, layouts: Any = None
) -> Any:
    """The sparsity emerges, from the decay of the thresholds' own numbers."""
    del costs
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
        layout=layouts,
    )


def _key(config: Any) -> jax.Array:
    """Where a method's own randomness comes from: not what the weights are drawn by."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


INGREDIENTS = ("soft", "rescale", "straight_through")
RAMP = ("dense", "final", "begin_epoch", "end_epoch", "power")
RULE = ("criterion", "distribution", "budget", "layers", "pattern")
THRESHOLD = (*RAMP, *RULE, "update_every_steps")
REGROWTH = ("dense", "final", "distribution", "update_every_steps")

METHODS = {
    "none": Method(_dense, ()),
    "st3": Method(_thresholded(st3jax.st3, _st3_options), (*THRESHOLD, *INGREDIENTS)),
    "ste": Method(_thresholded(st3jax.ste), THRESHOLD),
    "gmp": Method(_thresholded(st3jax.gmp, _gmp_options), THRESHOLD),
    "lrr": Method(_lrr, ("dense", "final")),
    "probmask": Method(_probmask, RAMP),
    "granet": Method(_granet, (*RAMP, "update_every_steps")),
    "rigl": Method(_rigl, REGROWTH),
    "set_": Method(_set, REGROWTH),
    "str_": Method(_str, ("dense",)),
}
"""The methods by ``config.sparsity.method``."""
