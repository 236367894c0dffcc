"""Gradual thresholding: the transform that methods with a threshold share.

The smallest weights are zero in what the model sees, more and more of them. Methods
differ in the formula by which a threshold makes a weight effective, in whether their
optimizer sees the gradient of a zeroed weight, and in whether it can come back.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import as_mapping, check_steps, is_concrete
from st3jax.engine.step import first_count, sparse_transform, where
from st3jax.engine.updates import clear_state, hold_mask, step_onto
from st3jax.fingerprint import first_fingerprint
from st3jax.layout.letters import Layouts, broadcast
from st3jax.layout.settle import as_structure, on_weights
from st3jax.rule.distributions import share_of_all
from st3jax.rule.patterns import Pattern, spread
from st3jax.rule.rule import Rule, check_fits, check_schedules
from st3jax.rule.thresholds import first_thresholds, leaf_thresholds, select
from st3jax.schedules import Sparsity, at_step, ramp_ends
from st3jax.selection.keys import from_key, is_positive, to_key
from st3jax.selection.tally import tied_to
from st3jax.trees import (
    Prunable,
    Static,
    check_same_structure,
    in_place_of,
    map_named,
    map_where_prunable,
    named_leaves,
    per_leaf_tree,
)

__all__ = ["STICKY", "Effective", "Formula", "ThresholdState", "gradual"]

Formula = Callable[[jax.Array, jax.Array], jax.Array]
"""From weights and the threshold on each of them to what the model sees."""
STICKY = ("no", "strict", "published")
"""Whether a zeroed weight can come back; see :func:`st3jax.gmp`."""


class Effective(NamedTuple):
    """How the weights of a leaf become effective: all that a state has to know of it.

    Attributes:
        formula: What a threshold does to weights, a function of a module.
        pattern: Which weights share a threshold.
        rescale: Whether output channels make up for the magnitude that they lost.
    """

    formula: Formula
    pattern: Pattern
    rescale: bool = False

    def __str__(self) -> str:
        name = getattr(self.formula, "__name__", repr(self.formula))
        return f"{name}{', rescaled,' * self.rescale} with {self.pattern}"


@functools.partial(jax.jit, static_argnames=("how", "layout"))
def _seen(w: jax.Array, t: jax.Array, how: Effective, layout: str) -> jax.Array:
    """What the model sees of a leaf; of leaves of one shape, traced once."""
    each = spread(how.pattern, w, t, layout)
    seen = how.formula(w, each)
    if not how.rescale:
        return seen
    return ops.rescale(seen, ops.channel_scale(w, each, layout=layout))


@functools.partial(jax.jit, static_argnames=("how", "layout"))
def _kept(w: jax.Array, t: jax.Array, how: Effective, layout: str) -> jax.Array:
    """Which weights of a leaf the model sees."""
    return ops.is_kept(w, spread(how.pattern, w, t, layout))


class ThresholdState(NamedTuple):
    """State of a method with a threshold: bytes per leaf, nothing per weight.

    Its structure is the same whenever thresholds move and the mask is fixed.

    Attributes:
        count: int32 [], completed steps.
        thresholds: Scalar on ``|w|`` for each prunable leaf, -1 before the ramp, 0
            after fixing; ``optax.MaskedNode`` elsewhere. Of stacked kernels that have
            a sparsity each, one for each of them, in the shape of the stacked axes.
        sparsity: float32 [], the share of zeros that was last asked for.
        frozen: bool [], whether the mask is fixed.
        seen: int32 [], which weights the state has last seen; see
            :func:`st3jax.finalize`.
        effective: Static, how weights become effective.
        layouts: Static, from the path of each prunable leaf to what its axes are.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    thresholds: Any
    sparsity: jax.Array
    frozen: jax.Array
    seen: jax.Array
    effective: Static
    layouts: Static
    inner_state: optax.OptState

    @property
    def per_leaf(self) -> Any:
        """The tree that says which leaves are prunable."""
        return self.thresholds

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`."""
        check_same_structure(self.thresholds, params)
        layouts = dict(self.layouts.value)

        def effective(path: str, t: jax.Array, w: jax.Array) -> jax.Array:
            raw = jax.lax.stop_gradient(w)
            seen = _seen(raw, t, self.effective.value, layouts[path])
            return ops.straight_through(w, seen)

        return map_named(effective, self.thresholds, params)


def gradual(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    rule: Rule,
    formula: Formula,
    *,
    rescale: bool = False,
    masks_gradient: bool,
    prunable: Prunable,
    layout: Layouts | None = None,
    sticky: str = "no",
    update_every: int = 1,
    freeze_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a method with a threshold.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: A fraction, a schedule, or one of them for each path.
        rule: Which weights go first.
        formula: What a threshold does to weights.
        rescale: Whether output channels make up for the magnitude that they lost.
        masks_gradient: Whether ``inner`` sees the gradient of kept weights alone.
        prunable: Predicate on (path, leaf).
        layout: What the user said of the axes of leaves.
        sticky: One of ``STICKY``.
        update_every: Steps from one threshold to the next.
        freeze_step: Number of completed steps at which the mask is fixed, if ever.

    Returns:
        A transform with state :class:`ThresholdState`.

    Raises:
        ValueError: If an argument is out of its range or excludes another.
        TypeError: If an argument is not of its kind.
    """
    by_path = as_mapping(sparsity)
    sparsity = sparsity if by_path is None else by_path
    check_steps(update_every, "update_every", 1)
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
    check_schedules(rule, sparsity, freeze_step)

    own = Static(Effective(formula, rule.pattern, bool(rescale)))
    needs = {**({"rescaling": "channels"} if rescale else {}), **rule.needs(sparsity)}

    def check(leaves: dict[str, Any], layouts: Layouts, params: optax.Params) -> None:
        check_fits(rule, leaves, layouts, params, sparsity)

    def init(
        leaves: dict[str, Any], layouts: Layouts, params: optax.Params
    ) -> ThresholdState:
        off = first_thresholds(rule, leaves, layouts, sparsity)
        return ThresholdState(
            count=first_count(),
            thresholds=per_leaf_tree(params, off),
            sparsity=jnp.zeros([], jnp.float32),
            frozen=jnp.zeros([], bool),
            seen=first_fingerprint(),
            effective=own,
            layouts=as_structure(layouts, params),
            inner_state=None,
        )

    def gradients(state: ThresholdState, grads: Any, params: Any) -> Any:
        """Without those of zeros that are to stay zeros, for now or for good."""
        layouts = dict(state.layouts.value)

        def reaching(path: str, t: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
            reached = jnp.ones(w.shape, bool)
            if masks_gradient:
                reached &= _kept(w, t, state.effective.value, layouts[path])
            if sticky != "no":  # a group's own bound may be zero
                on = is_positive(broadcast(t, layouts[path]))
                reached &= (to_key(w) != 0) | ~on
            if freeze_step is not None:
                reached &= (to_key(w) != 0) | ~state.frozen
            return jnp.where(reached, g, jnp.zeros_like(g))

        return map_named(reaching, state.thresholds, grads, params), state

    def is_due(state: ThresholdState) -> jax.Array | bool:
        """Whether thresholds move now: they end when the mask is fixed."""
        if freeze_step is None and is_concrete(update_every) and update_every == 1:
            return True
        due = (state.count % update_every == 0) | ramp_ends(sparsity, state.count)
        if freeze_step is None:
            return due
        return jnp.where(state.count >= freeze_step, ~state.frozen, due)

    def moved(state: ThresholdState, params: Any) -> ThresholdState:
        """With the thresholds after ``state.count`` completed steps."""
        count, due = state.count, is_due(state)
        s, before = at_step(sparsity, count), named_leaves(state.thresholds)
        every = named_leaves(params)
        # Compare what the next step will see, to the last bit.
        held = tied_to(count, [every[path] for path in before])
        leaves = dict(zip(before, held, strict=True))
        layouts = dict(state.layouts.value)
        selected = select(rule, leaves, layouts, params, s, before, needed=due)
        after = leaf_thresholds(rule, leaves, layouts, selected)
        share = share_of_all(s, leaves, rule.axis_name)
        if due is not True:
            after = {path: jnp.where(due, t, before[path]) for path, t in after.items()}
            share = jnp.where(due, share, state.sparsity)
        thresholds = in_place_of(state.thresholds, after)
        return state._replace(thresholds=thresholds, sparsity=share)

    def hold_fixed(state: ThresholdState, updates: Any, params: Any) -> Any:
        """The updates that a mask which outlives the step allows."""

        def held(t: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
            hold = is_positive(t) if sticky == "strict" else jnp.zeros([], bool)
            if freeze_step is not None:
                hold |= state.frozen
            return hold_mask(w, u, hold)

        return map_where_prunable(
            held, on_weights(state.thresholds, state.layouts), updates, params
        )

    def remove(
        state: ThresholdState, updates: Any, params: Any, stepped: Any
    ) -> tuple[optax.Updates, ThresholdState]:
        """Takes what is below the threshold out of the raw weights."""
        thresholds = jax.tree.map(_above_zeros, state.thresholds)
        state = state._replace(thresholds=thresholds)
        updates = map_where_prunable(
            lambda _, u, w, target: jnp.where(to_key(target) == 0, -w, u),
            thresholds,
            updates,
            params,
            state.effective_params(stepped),
        )
        if sticky == "published":
            return updates, state
        kept = map_where_prunable(
            lambda t, w: (to_key(w) != 0) | ~is_positive(t),
            on_weights(state.thresholds, state.layouts),
            optax.apply_updates(params, updates),
        )
        inner_state = clear_state(state.inner_state, kept)
        return updates, state._replace(inner_state=inner_state)

    def fixed(state: ThresholdState, updates: Any, params: Any, stepped: Any) -> Any:
        """Updates that take the raw weights to their effective values."""
        effective = state.effective_params(stepped)
        return map_where_prunable(
            _onto, state.thresholds, updates, params, stepped, effective
        )

    def land(
        state: ThresholdState, updates: Any, params: Any, _: Any
    ) -> tuple[optax.Updates, ThresholdState]:
        _check_effective(state.effective.value, own.value)
        if freeze_step is not None or sticky == "strict":
            updates = hold_fixed(state, updates, params)
        stepped = optax.apply_updates(params, updates)
        state = moved(state, stepped)
        if sticky != "no":
            updates, state = remove(state, updates, params, stepped)
        if sticky == "strict":  # what is gone is told by the zeros themselves
            thresholds = jax.tree.map(_above_zeros_alone, state.thresholds)
            state = state._replace(thresholds=thresholds)
        if freeze_step is None:
            return updates, state._replace(frozen=jnp.zeros([], bool))
        frozen = state.count >= freeze_step
        updates = where(  # later than asked for, if the state comes from elsewhere
            frozen & ~state.frozen,
            lambda: fixed(state, updates, params, stepped),
            lambda: updates,
        )
        thresholds = jax.tree.map(lambda t: jnp.where(frozen, 0, t), state.thresholds)
        return updates, state._replace(thresholds=thresholds, frozen=frozen)

    masks = masks_gradient or freeze_step is not None
    return sparse_transform(
        inner,
        init,
        land,
        state_type=ThresholdState,
        check=check,
        gradients=gradients if masks else None,
        prunable=prunable,
        layout=layout,
        needs=needs,
        axis_name=rule.axis_name,
        straight_through=not masks_gradient,
    )


def _check_effective(there: Effective, here: Effective) -> None:
    """Raises if a state's thresholds are not what the transform would make of them."""
    if there != here:
        raise ValueError(
            f"the state is of another transform: weights become effective by {there} "
            f"there and by {here} here; go on with the options that made the state, or "
            "begin with a new one from init"
        )


@jax.jit
def _onto(
    _: jax.Array, u: jax.Array, w: jax.Array, now: jax.Array, then: jax.Array
) -> jax.Array:
    """The update of a leaf onto its effective weights, as it is if it leads there."""
    there = (then == now) & (to_key(then) != 0)
    return jnp.where(there, u, step_onto(w, then, u.dtype))


def _smallest_number(t: jax.Array) -> jax.Array:
    """The smallest number above zero: as a threshold, zeros alone are below it."""
    return from_key(jnp.ones([], to_key(t).dtype))


def _above_zeros(t: jax.Array) -> jax.Array:
    """A threshold that is not off although all that it removes are zeros."""
    return jnp.where(to_key(t) == 0, _smallest_number(t), t)


def _above_zeros_alone(t: jax.Array) -> jax.Array:
    """The threshold that zeros alone are below, once there is one."""
    return jnp.where(is_positive(t), _smallest_number(t), t)
