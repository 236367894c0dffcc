"""Gradual thresholding: the transform that methods with a threshold share.

The smallest weights are zero in what the model sees, more and more of them. Methods
differ in how a weight is thresholded, in which gradient a zeroed weight receives, and
in whether it can come back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import check_optimizer, check_steps
from st3jax.engine.updates import clear_state, hold_mask, pin, step_onto
from st3jax.rule.patterns import weight_thresholds
from st3jax.rule.rule import Rule, check_fits, check_schedules
from st3jax.rule.thresholds import OFF, leaf_thresholds
from st3jax.schedules import Sparsity, at_step
from st3jax.selection.keys import from_key, is_positive, score_dtype, to_key
from st3jax.trees import (
    Static,
    check_same_structure,
    map_prunable,
    map_where_prunable,
    prunable_leaves,
)

__all__ = ["STICKY", "ThresholdState", "gradual"]

STICKY = ("no", "strict", "published")
"""Whether a zeroed weight can come back; see :func:`st3jax.gmp`."""


class ThresholdState(NamedTuple):
    """State of a method with a threshold: bytes per leaf, nothing per weight.

    Attributes:
        count: int32 [], completed steps.
        thresholds: Scalar on ``|w|`` for each prunable leaf, -1 before the ramp, 0
            after fixing; ``optax.MaskedNode`` elsewhere.
        frozen: bool [], whether the mask is fixed; ``optax.MaskedNode`` if it never
            will be.
        soft: Static, whether thresholds are soft.
        rescale: Static, whether output channels are rescaled.
        straight_through: Static, whether zeroed weights receive gradients.
        sticky: Static, whether zeroed weights can come back.
        pattern: Static, which weights live and die together.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    thresholds: Any
    frozen: jax.Array | optax.MaskedNode
    soft: Static
    rescale: Static
    straight_through: Static
    sticky: Static
    pattern: Static
    inner_state: optax.OptState

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`."""
        check_same_structure(self.thresholds, params)

        def effective(path: str, t: jax.Array, w: jax.Array) -> jax.Array:
            if not isinstance(self.frozen, optax.MaskedNode):
                w = ops.hold_zeros(w, self.frozen)
            if self.sticky.value != "no":
                w = ops.hold_zeros(w, is_positive(t))
            t = weight_thresholds(self.pattern.value, path, w, t)
            if not self.straight_through.value:
                w = ops.mask_gradient(w, t)
            threshold = ops.soft_threshold if self.soft.value else ops.hard_threshold
            w_eff = threshold(w, t)
            if self.rescale.value:
                w_eff = ops.rescale(w_eff, ops.channel_scale(w, t))
            return w_eff

        return map_where_prunable(effective, self.thresholds, params)


def gradual(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    rule: Rule,
    *,
    soft: bool = False,
    rescale: bool = False,
    straight_through: bool = False,
    sticky: str = "no",
    update_every: int = 1,
    freeze_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a method with a threshold, made of its ingredients.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: A fraction, a schedule, or one of them for each path pattern.
        rule: Which weights go first.
        soft: Whether kept weights shrink by the threshold.
        rescale: Whether each output channel is rescaled for the magnitude it lost.
        straight_through: Whether zeroed weights receive gradients.
        sticky: One of ``STICKY``.
        update_every: Steps from one threshold to the next.
        freeze_step: Number of completed steps at which the mask is fixed, if ever.

    Returns:
        A transform with state :class:`ThresholdState`.

    Raises:
        ValueError: If an argument is out of its range or excludes another.
        TypeError: If ``inner`` is not an optimizer.
    """
    _check_arguments(inner, rule, rescale, update_every, freeze_step)
    check_schedules(rule, sparsity, freeze_step)
    inner = optax.with_extra_args_support(inner)

    def init_thresholds(params: optax.Params) -> Any:
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return jnp.full([], OFF)
        check_fits(rule, params, sparsity)
        leaves = prunable_leaves(params, rule.prunable)
        dtype = score_dtype(*(jnp.result_type(leaf) for leaf in leaves.values()))
        return map_prunable(lambda *_: jnp.full([], OFF, dtype), params, rule.prunable)

    def init_fn(params: optax.Params) -> ThresholdState:
        return ThresholdState(
            count=jnp.zeros([], jnp.int32),
            thresholds=init_thresholds(params),
            frozen=optax.MaskedNode() if freeze_step is None else jnp.zeros([], bool),
            soft=Static(bool(soft)),
            rescale=Static(bool(rescale)),
            straight_through=Static(bool(straight_through)),
            sticky=Static(sticky),
            pattern=Static(rule.pattern),
            inner_state=inner.init(params),
        )

    def move_thresholds(count: jax.Array, thresholds: Any, params: Any) -> Any:
        """The thresholds after ``count`` completed steps; no work while s = 0."""
        due = count % update_every == 0
        if freeze_step is not None:
            due = (due | (count == freeze_step)) & (count <= freeze_step)
        with jax.enable_x64(True):  # s(c) in float64, as exact as its count
            s = at_step(sparsity, count.astype(jnp.int64))
            if isinstance(s, Mapping):  # not by jax.tree.map, which sorts the patterns
                s = {pattern: jnp.asarray(x, jnp.float64) for pattern, x in s.items()}
            else:
                s = jnp.asarray(s, jnp.float64)
            asked = jnp.any(jnp.stack(jax.tree.leaves(s)) > 0)
        # Compare what the next step will see, to the last bit.
        params = jax.tree.map(jax.lax.optimization_barrier, params)

        return jax.lax.cond(
            due & asked,
            lambda: leaf_thresholds(params, s, rule, near=thresholds),
            lambda: jax.tree.map(lambda t: jnp.where(due, OFF, t), thresholds),
        )

    def hold_fixed(updates: Any, state: ThresholdState, params: Any) -> Any:
        """The updates that a mask which outlives the step allows."""

        def held(path: str, t: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
            hold = is_positive(t) if sticky == "strict" else jnp.zeros([], bool)
            if freeze_step is not None:
                hold |= state.frozen
            return hold_mask(w, u, hold)

        return map_where_prunable(held, state.thresholds, updates, params)

    def remove(
        updates: Any, state: ThresholdState, params: Any, stepped: Any
    ) -> tuple[optax.Updates, ThresholdState]:
        """Takes what is below the threshold out of the raw weights."""
        state = state._replace(thresholds=jax.tree.map(_above_zero, state.thresholds))
        updates = map_where_prunable(
            lambda path, t, u, w, target: jnp.where(to_key(target) == 0, -w, u),
            state.thresholds,
            updates,
            params,
            state.effective_params(stepped),
        )
        if sticky == "published":
            return updates, state
        landed = optax.apply_updates(params, updates)
        kept = map_where_prunable(
            lambda path, t, w: (to_key(w) != 0) | ~is_positive(t),
            state.thresholds,
            jax.tree.map(jnp.asarray, landed),
        )
        inner_state = clear_state(state.inner_state, kept)
        return updates, state._replace(inner_state=inner_state)

    def settle(count: jax.Array, thresholds: Any) -> Any:
        """The thresholds to keep: what outlives the step is in the zeros themselves."""
        if sticky == "strict":
            thresholds = jax.tree.map(_lowest, thresholds)
        if freeze_step is not None:
            fixed = count >= freeze_step
            thresholds = jax.tree.map(lambda t: jnp.where(fixed, 0, t), thresholds)
        return thresholds

    def update_fn(
        updates: optax.Updates,
        state: ThresholdState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ThresholdState]:
        if params is None:
            raise ValueError(
                "thresholds move with the weights, so update needs them: call "
                "tx.update(grads, opt_state, params)"
            )
        check_same_structure(state.thresholds, params)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        count = optax.safe_increment(state.count)
        updates = map_where_prunable(
            lambda path, t, u: pin(u, state.count), state.thresholds, updates
        )
        if freeze_step is not None or sticky == "strict":
            updates = hold_fixed(updates, state, params)
        stepped = optax.apply_updates(params, updates)
        state = state._replace(
            count=count,
            thresholds=move_thresholds(count, state.thresholds, stepped),
            inner_state=inner_state,
        )
        if sticky != "no":
            updates, state = remove(updates, state, params, stepped)
        if freeze_step is not None:
            updates = jax.lax.cond(
                count == freeze_step,
                lambda: _fix(state, updates, params, stepped),
                lambda: updates,
            )
        state = state._replace(thresholds=settle(count, state.thresholds))
        if freeze_step is not None:
            state = state._replace(frozen=count >= freeze_step)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _least(t: jax.Array) -> jax.Array:
    return from_key(jnp.ones([], to_key(t).dtype))


def _above_zero(t: jax.Array) -> jax.Array:
    """A threshold that is not off although all that it removes are zeros."""
    return jnp.where(to_key(t) == 0, _least(t), t)


def _lowest(t: jax.Array) -> jax.Array:
    """The threshold that zeros alone are below, once there is one."""
    return jnp.where(is_positive(t), _least(t), t)


def _fix(
    state: ThresholdState, updates: optax.Updates, params: Any, stepped: Any
) -> optax.Updates:
    """Updates that take the raw weights to their effective values."""

    def onto(
        path: str, t: jax.Array, u: jax.Array, w: jax.Array, now: jax.Array, then: Any
    ) -> jax.Array:
        there = (then == now) & (to_key(then) != 0)
        return jnp.where(there, u, step_onto(w, then, u.dtype))

    effective = state.effective_params(stepped)
    return map_where_prunable(
        onto, state.thresholds, updates, params, stepped, effective
    )


def _check_arguments(
    inner: Any, rule: Rule, rescale: bool, update_every: int, freeze_step: int | None
) -> None:
    """Raises early, before anything is compiled, for what can be known early."""
    check_optimizer(inner)
    if rescale and rule.axis_name is not None:
        raise ValueError(
            f"rescaling needs whole output channels, which weights sharded over "
            f"{rule.axis_name!r} by hand may not have: pass rescale=False, or leave "
            "the sharding to jit, without axis_name"
        )
    check_steps(update_every, "update_every", 1)
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
