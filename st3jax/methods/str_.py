"""STR: soft thresholds that are learned, one for each kernel.

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable
Sparsity", ICML 2020, arXiv:2002.03231.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import check_steps, is_concrete
from st3jax.engine.step import first_count, sparse_transform
from st3jax.engine.updates import hold_mask, step_onto
from st3jax.fingerprint import first_fingerprint
from st3jax.layout.letters import Layouts, broadcast, stack_shape
from st3jax.layout.settle import as_structure, on_weights
from st3jax.selection.keys import to_key
from st3jax.selection.ranking import whole
from st3jax.trees import (
    Prunable,
    Static,
    check_same_structure,
    in_place_of,
    is_kernel,
    map_where_prunable,
    named_leaves,
    per_leaf_tree,
)

__all__ = ["STRState", "str_"]


class STRState(NamedTuple):
    """State of :func:`str_`: bytes per leaf, nothing per weight.

    Attributes:
        count: int32 [], completed steps.
        thresholds: For each prunable leaf the learned number ``v``, float32 [], whose
            sigmoid is the threshold, or one for each stacked kernel, in the shape of
            the stacked axes; ``optax.MaskedNode`` elsewhere.
        frozen: bool [], whether the mask is fixed.
        seen: int32 [], which weights the state has last seen; see
            :func:`st3jax.finalize`.
        threshold_state: State of the optimizer of the thresholds.
        layouts: Static, from the path of each prunable leaf to what its axes are.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    thresholds: Any
    frozen: jax.Array
    seen: jax.Array
    threshold_state: optax.OptState
    layouts: Static
    inner_state: optax.OptState

    @property
    def per_leaf(self) -> Any:
        """The tree that says which leaves are prunable."""
        return self.thresholds

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`."""
        check_same_structure(self.thresholds, params)

        def effective(v: jax.Array, w: jax.Array) -> jax.Array:
            t = jnp.where(self.frozen, 0, jax.nn.sigmoid(v))
            return ops.soft_threshold(w, t)

        return map_where_prunable(
            effective, on_weights(self.thresholds, self.layouts), params
        )


def str_(
    inner: optax.GradientTransformation,
    *,
    threshold_optimizer: optax.GradientTransformation,
    initial: float = -3200.0,
    freeze_step: int | None = None,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that thresholds on weights are learned too, with STR.

    Every prunable kernel has a number :math:`v`. The model sees, through
    :func:`st3jax.sparsify`,

    .. math::
        w_\text{eff} = \operatorname{sign}(w) \max(|w| - t, 0), \qquad t = \sigma(v)

    With the gradient :math:`g` of the loss with respect to :math:`w_\text{eff}`,
    ``inner`` receives that of the weights and ``threshold_optimizer`` that of
    :math:`v`,

    .. math::
        \frac{\partial L}{\partial w} = g \, [\,|w| > t\,], \qquad
        \frac{\partial L}{\partial v} =
        -t (1 - t) \sum g \operatorname{sign}(w) \, [\,|w| > t\,]

    No sparsity is asked for: it emerges. Weight decay is what raises :math:`v` from
    ``initial``, so its strength decides how sparse the network becomes. While
    :math:`\sigma(v)` is zero in float32, :math:`w_\text{eff} = w` and training is
    dense training.

    Args:
        inner: The optimizer that trains the raw weights. It has to make the final
            updates: wrap clipping and weight decay in it.
        threshold_optimizer: The optimizer of all :math:`v`, weight decay included:
            ``optax.chain(optax.add_decayed_weights(2e-5), optax.sgd(0.1, 0.875))``.
        initial: The first value of every :math:`v`, a finite number.
        freeze_step: Number of completed steps at which the weights become
            :math:`w_\text{eff}` and the mask is fixed: zeros then stay exactly zero,
            and the other weights train on. Never by default.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        layout: From path to what each axis of a leaf is, as for :func:`st3jax.st3`.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state :class:`STRState`.

    Raises:
        ValueError: If an argument is out of its range, if ``init`` finds no prunable
            leaf, or if ``update`` is called without params or with others than those
            of ``init``.
        TypeError: If an argument is of a wrong type, or a prunable leaf is not of a
            floating-point dtype.

    Example:
        >>> import st3jax
        >>> tx = str_(optax.sgd(0.1), threshold_optimizer=optax.sgd(0.1), initial=0.0)
        >>> params = {"kernel": jnp.array([[1.5, -0.25, 0.5]])}
        >>> st3jax.finalize(params, tx.init(params))["kernel"].tolist()
        [[1.0, 0.0, 0.0]]

    References:
        arXiv:2002.03231, section 3.
    """
    _check_arguments(threshold_optimizer, initial, freeze_step)

    def init(
        leaves: dict[str, Any], layouts: Layouts, params: optax.Params
    ) -> STRState:
        first = {
            path: jnp.full(stack_shape(layouts[path], jnp.shape(w)), initial, "float32")
            for path, w in leaves.items()
        }
        thresholds = per_leaf_tree(params, first)
        return STRState(
            count=first_count(),
            thresholds=thresholds,
            frozen=jnp.zeros([], bool),
            seen=first_fingerprint(),
            threshold_state=threshold_optimizer.init(thresholds),
            layouts=as_structure(layouts, params),
            inner_state=None,
        )

    def gradients(state: STRState, grads: Any, params: Any) -> tuple[Any, STRState]:
        """That of kept weights; the thresholds learn from it, too."""
        layouts = dict(state.layouts.value)
        gradient, weights = named_leaves(grads), named_leaves(params)
        slopes = in_place_of(
            state.thresholds,
            {
                path: _slope(v, gradient[path], weights[path], layouts[path])
                for path, v in named_leaves(state.thresholds).items()
            },
        )
        moves, threshold_state = threshold_optimizer.update(
            slopes, state.threshold_state, state.thresholds
        )
        learned = optax.apply_updates(state.thresholds, moves), threshold_state
        thresholds, threshold_state = jax.tree.map(
            lambda old, new: jnp.where(state.frozen, old, new),
            (state.thresholds, state.threshold_state),
            learned,
        )

        def reaching(v: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
            kept = jnp.where(state.frozen, to_key(w) != 0, _reaches(v, w))
            return jnp.where(kept, g, jnp.zeros_like(g))

        grads = map_where_prunable(
            reaching, on_weights(state.thresholds, state.layouts), grads, params
        )
        state = state._replace(thresholds=thresholds, threshold_state=threshold_state)
        return grads, state

    def land(
        state: STRState, updates: Any, params: Any, _: Any
    ) -> tuple[optax.Updates, STRState]:
        updates = map_where_prunable(
            lambda _, u, w: hold_mask(w, u, state.frozen),
            state.thresholds,
            updates,
            params,
        )
        if freeze_step is None:
            return updates, state._replace(frozen=jnp.zeros([], bool))
        frozen = state.count >= freeze_step
        fix = frozen & ~state.frozen
        updates = map_where_prunable(
            lambda _, u, w, target: jnp.where(fix, step_onto(w, target, u.dtype), u),
            state.thresholds,
            updates,
            params,
            state.effective_params(optax.apply_updates(params, updates)),
        )
        return updates, state._replace(frozen=frozen)

    return sparse_transform(
        inner,
        init,
        land,
        state_type=STRState,
        gradients=gradients,
        prunable=prunable,
        layout=layout,
        needs={"the threshold of each kernel": "kernels"},
    )


def _reaches(v: jax.Array, w: jax.Array) -> jax.Array:
    """Whether the gradient of what the model sees reaches the weight."""
    return ops.is_kept(w, jax.nn.sigmoid(v))


def _slope(v: jax.Array, g: jax.Array, w: jax.Array, layout: str) -> jax.Array:
    """The derivative of the loss with respect to one ``v``, or to each of a stack."""
    t = jax.nn.sigmoid(v)
    signed = g.astype(v.dtype) * jnp.sign(w).astype(v.dtype)
    passed = jnp.where(_reaches(broadcast(v, layout), w), signed, 0)
    axes = tuple(axis for axis, letter in enumerate(layout) if letter != "s")
    return -t * (1 - t) * whole(passed.sum(axes, dtype=v.dtype))


def _check_arguments(threshold_optimizer: Any, initial: Any, freeze_step: Any) -> None:
    """Raises early, before anything is compiled, for what can be known early."""
    if not isinstance(threshold_optimizer, optax.GradientTransformation):
        raise TypeError(
            "threshold_optimizer is an optimizer with weight decay, as optax.chain("
            "optax.add_decayed_weights(2e-5), optax.sgd(0.1)), got "
            f"{type(threshold_optimizer).__name__}"
        )
    if is_concrete(initial) and not math.isfinite(initial):
        raise ValueError(f"initial is a finite number, got {initial}")
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
