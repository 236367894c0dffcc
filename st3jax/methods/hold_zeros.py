"""Holding zeros: training on with a network that is sparse already."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from st3jax.checks import is_concrete
from st3jax.engine.step import first_count, sparse_transform
from st3jax.engine.updates import hold_mask
from st3jax.fingerprint import fingerprint, first_fingerprint
from st3jax.layout.letters import Layouts
from st3jax.selection.keys import to_key
from st3jax.trees import (
    Prunable,
    check_same_structure,
    is_kernel,
    is_placeholder,
    map_where_prunable,
    per_leaf_tree,
)

__all__ = ["HoldState", "hold_zeros"]


class HoldState(NamedTuple):
    """State of :func:`hold_zeros`: a byte per leaf. The zeros are the mask.

    Attributes:
        count: int32 [], completed steps.
        held: bool [], true, for each prunable leaf; ``optax.MaskedNode`` elsewhere.
        seen: int32 [], the zeros that are held; see :func:`st3jax.finalize`.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    held: Any
    seen: jax.Array
    inner_state: optax.OptState

    @property
    def frozen(self) -> jax.Array:
        """Whether the mask is fixed: always."""
        return jnp.ones([], bool)

    @property
    def per_leaf(self) -> Any:
        """The tree that says which leaves are prunable."""
        return self.held

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees, which are the raw weights."""
        check_same_structure(self.held, params)
        return params


def hold_zeros(
    inner: optax.GradientTransformation, *, prunable: Prunable = is_kernel
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that weights which are zero stay exactly zero.

    For training on with a network that is sparse already: one that
    :func:`st3jax.prune` made, that :func:`st3jax.finalize` returned, or that comes from
    a checkpoint. With :math:`u` the update that ``inner`` makes of the gradient
    :math:`g \, [\,w \ne 0\,]`,

    .. math::
        w \leftarrow w + u \, [\,w \ne 0\,]

    where no weight becomes zero that was not: one that would land there stops next to
    it. So the zeros are those of ``init`` ever after, whatever momentum or weight decay
    ``inner`` has, and no mask is stored. Neither does ``inner`` see the gradient of a
    zero, so clipping by a norm does not count it.

    Args:
        inner: The optimizer that trains the other weights, clipping and weight decay
            included.
        prunable: Predicate on (path, leaf): the leaves whose zeros are held. Others,
            such as biases that start at zero, train as always.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.HoldState`.

    Raises:
        ValueError: If ``init`` finds no prunable leaf, or no zero in any of them (where
            it can look at them: under ``jit`` it cannot), or if ``update`` is called
            without params or with others than those of ``init``.
        TypeError: If an argument is of a wrong type, or a prunable leaf is not of a
            floating-point dtype.

    Example:
        >>> params = {"kernel": jnp.array([[0.0, -2.0], [3.0, 0.0]])}
        >>> tx = hold_zeros(optax.sgd(0.5))
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, opt_state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [[0.0, -2.5], [2.5, 0.0]]
    """

    def init(leaves: dict[str, Any], _: Layouts, params: optax.Params) -> HoldState:
        held = {path: jnp.ones([], bool) for path in leaves}
        none = first_fingerprint()
        state = HoldState(first_count(), per_leaf_tree(params, held), none, None)
        arrays = all(isinstance(w, jax.Array | np.ndarray) for w in leaves.values())
        if is_placeholder(params) or not arrays:
            return state
        return state._replace(seen=fingerprint(state, params, state.frozen))

    def gradients(state: HoldState, grads: Any, params: Any) -> tuple[Any, HoldState]:
        """Those of all weights but zeros."""

        def reaching(_: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.where(to_key(w) != 0, g, jnp.zeros_like(g))

        return map_where_prunable(reaching, state.held, grads, params), state

    def land(
        state: HoldState, updates: Any, params: Any, _: Any
    ) -> tuple[optax.Updates, HoldState]:
        def held(hold: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
            return hold_mask(w, u, hold)

        return map_where_prunable(held, state.held, updates, params), state

    return sparse_transform(
        inner,
        init,
        land,
        state_type=HoldState,
        check=_check_zeros,
        gradients=gradients,
        prunable=prunable,
    )


def _check_zeros(leaves: dict[str, Any], _: Layouts, params: optax.Params) -> None:
    """Raises if there is certainly nothing to hold."""
    del params
    known = [
        isinstance(w, jax.Array | np.ndarray) and is_concrete(w)
        for w in leaves.values()
    ]
    if all(known) and not any(bool(_has_zero(w)) for w in leaves.values()):
        raise ValueError(
            "hold_zeros keeps the zeros that it finds, and there are none in "
            f"{len(leaves)} prunable leaves: pass sparse weights to init, such as "
            "st3jax.prune(params, 0.9)"
        )


@jax.jit
def _has_zero(w: jax.Array) -> jax.Array:
    return jnp.any(to_key(w) == 0)
