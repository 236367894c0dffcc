"""A step: what every method does around the optimizer that it wraps.

A method says what is its own: its state, the gradients that its optimizer sees, and
what becomes of the updates. The order of things is here, once: checks at the doors, the
inner update, its rounding, the count.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from st3jax.base import SparseState
from st3jax.checks import check_optimizer, check_predicate
from st3jax.engine.updates import pin
from st3jax.fingerprint import fingerprint
from st3jax.layout.letters import Layouts
from st3jax.layout.settle import check_layout, settle
from st3jax.selection.tally import AxisName
from st3jax.trees import (
    Prunable,
    check_same_structure,
    is_placeholder,
    map_where_prunable,
    prunable_leaves,
)

__all__ = ["State", "first_count", "sparse_transform", "where"]


class State(SparseState, Protocol):
    """What a step has to know of a method's state, a ``NamedTuple``.

    Attributes:
        count: int32 [], completed steps.
        frozen: bool [], whether the mask is fixed.
        inner_state: State of the wrapped optimizer.
    """

    count: Any
    frozen: Any

    @property
    def per_leaf(self) -> Any:
        """The tree that says which leaves are prunable: a value where one is."""
        ...

    def _replace(self, **fields: Any) -> Any: ...


def first_count() -> jax.Array:
    """The number of completed steps before the first."""
    return jnp.zeros([], jnp.int32)


def where(condition: jax.Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """One of two results; on a GPU both are computed.

    There a branch makes the host wait for the condition, at every step: 5 ms of a step
    of 25 ms on an H100, for work that takes a fraction of one.

    Example:
        >>> int(where(jnp.array(True), lambda: jnp.array(1), lambda: jnp.array(2)))
        1
    """

    def both() -> Any:
        return jax.tree.map(functools.partial(jnp.where, condition), yes(), no())

    return jax.lax.platform_dependent(
        cuda=both, rocm=both, default=lambda: jax.lax.cond(condition, yes, no)
    )


def sparse_transform(
    inner: optax.GradientTransformation,
    init: Callable[[dict[str, Any], Layouts, optax.Params], Any],
    land: Callable[..., tuple[optax.Updates, Any]],
    *,
    state_type: type,
    check: Callable[[dict[str, Any], Layouts, optax.Params], None] | None = None,
    gradients: Callable[[Any, Any, Any], Any] | None = None,
    seen: Callable[[Any, Any], Any] | None = None,
    prunable: Prunable,
    layout: Layouts | None = None,
    needs: Mapping[str, str] | None = None,
    axis_name: AxisName = None,
    straight_through: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a method, made of what is its own.

    Args:
        inner: The optimizer to wrap.
        init: From (prunable leaves by path, their layouts, params) to the method's
            state, with ``inner_state`` left ``None``.
        land: From (state, updates, params, gradients) after the inner update, with the
            step counted, to the updates that the user adds and the state to keep.
            The gradients are those that ``update`` was given.
        state_type: Of the states that ``init`` makes.
        check: Raises if the method does not fit these (prunable leaves, layouts,
            params).
        gradients: From (state, gradients, params) to those that ``inner`` sees, and
            the state after it; all of them if ``None``.
        seen: From (state, params) to the params that ``inner`` sees.
        prunable: Predicate on (path, leaf): which leaves are prunable is decided in
            ``init``, and read from the state's ``per_leaf`` ever after.
        layout: What the user said of the axes of leaves.
        needs: What depends on them, and how far; see :func:`st3jax.layout.settle`.
        axis_name: Axes of ``shard_map`` that weights are sharded over by hand.
        straight_through: Whether what ``inner`` sees is no slope of the loss.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        TypeError: If ``inner`` is not an optimizer or ``prunable`` not a function.
    """
    check_optimizer(inner)
    check_predicate(prunable)
    check_layout(layout)
    inner = optax.with_extra_args_support(inner)

    # Compiled as one where the caller compiles nothing, and kept for the next call.
    seen_gradients = gradients and jax.jit(gradients)

    @jax.jit
    def after(
        state: Any, inner_state: Any, updates: Any, params: Any, given: Any
    ) -> tuple[optax.Updates, Any]:
        updates = map_where_prunable(
            lambda _, u: pin(u, state.count), state.per_leaf, updates
        )
        count = optax.safe_increment(state.count)
        state = state._replace(count=count, inner_state=inner_state)
        updates, landed = land(state, updates, params, given)
        if not hasattr(state, "seen"):  # its mask is there, whatever the weights are
            return updates, landed
        stepped = optax.apply_updates(params, updates)
        seen = fingerprint(landed, stepped, landed.frozen, axis_name)
        fixed = state.frozen & landed.frozen  # the zeros stay those of that step
        return updates, landed._replace(seen=jnp.where(fixed, state.seen, seen))

    def init_fn(params: optax.Params) -> Any:
        leaves = prunable_leaves(params, prunable)
        layouts = settle(leaves, params, layout, needs or {})
        if check is not None and not is_placeholder(params):
            check(leaves, layouts, params)
        inner_state = inner.init(params)
        if straight_through:
            _check_no_slopes(inner_state)
        return init(leaves, layouts, params)._replace(inner_state=inner_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "what is zero depends on the weights, so update needs them: call "
                "tx.update(grads, opt_state, params)"
            )
        _check_state(state, state_type)
        check_same_structure(state.per_leaf, params)
        grads = updates
        if seen_gradients is not None:
            grads, state = seen_gradients(state, grads, params)
        updates_of_inner, inner_state = inner.update(
            grads,
            state.inner_state,
            params if seen is None else seen(state, params),
            **extra_args,
        )
        return after(state, inner_state, updates_of_inner, params, updates)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


SLOPES = (
    optax.ScaleByLBFGSState,
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
)
"""States of optimizers that take the gradient for the slope of the loss."""


def _check_no_slopes(inner_state: Any) -> None:
    """Raises if the optimizer could not work with straight-through gradients."""
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, SLOPES))
    found = next((node for node in nodes if isinstance(node, SLOPES)), None)
    if found is not None:
        raise ValueError(
            f"the optimizer has a {type(found).__name__}: L-BFGS and line searches "
            "take the gradient for the slope of the loss, and a straight-through "
            "gradient is none; wrap another optimizer, such as optax.adam(1e-3)"
        )


def _check_state(state: Any, state_type: type) -> None:
    """Raises unless it is a state of this kind of transform."""
    if not isinstance(state, state_type):
        raise TypeError(
            f"update got a state of the type {type(state).__name__}, but this "
            f"transform has a {state_type.__name__}: pass the state that its own init "
            "or its last update returned"
        )
