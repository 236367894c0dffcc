"""ST-3: soft thresholds, straight-through gradients, a sparsity that ramps up.

Source: Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and
Soft-Thresholding all you need for Sparse Training?", WACV 2023, arXiv:2212.01076.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import check_choice, check_fraction, check_steps, is_concrete
from st3jax.keys import score_dtype
from st3jax.scores import CRITERIA
from st3jax.thresholds import leaf_thresholds
from st3jax.trees import (
    Prunable,
    Switch,
    check_same_structure,
    is_kernel,
    map_prunable,
    map_where_prunable,
    prunable_leaves,
    switch,
)
from st3jax.updates import hold_mask, pin, step_onto

__all__ = ["ST3State", "st3"]


OFF = -1.0
"""A threshold that nothing is below: none has been set yet."""


class ST3State(NamedTuple):
    """State of :func:`st3`: bytes per leaf, nothing per weight.

    Attributes:
        count: int32 [], completed steps.
        thresholds: Scalar on ``|w|`` for each prunable leaf, -1 before the ramp, 0
            after fixing; ``optax.MaskedNode`` elsewhere.
        frozen: bool [], whether the mask is fixed; ``optax.MaskedNode`` if it never
            will be.
        soft: Static switch, soft or hard threshold.
        rescale: Static switch, whether output channels are rescaled.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    thresholds: Any
    frozen: jax.Array | optax.MaskedNode
    soft: Switch
    rescale: Switch
    inner_state: optax.OptState

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`."""

        def effective(t: jax.Array, w: jax.Array) -> jax.Array:
            if not isinstance(self.frozen, optax.MaskedNode):
                w = ops.hold_zeros(w, self.frozen)
            threshold = ops.soft_threshold if self.soft else ops.hard_threshold
            w_eff = threshold(w, t)
            if self.rescale:
                w_eff = ops.rescale(w_eff, ops.channel_scale(w, t))
            return w_eff

        return map_where_prunable(effective, self.thresholds, params)


def st3(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    *,
    criterion: str = "l1",
    soft: bool = True,
    rescale: bool = True,
    prunable: Prunable = is_kernel,
    update_every: int = 1,
    freeze_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that the network trains to exact sparsity with ST-3.

    The raw weights stay dense and are trained by ``inner``. The model sees

    .. math::
        w_\text{eff} = \text{scale} \cdot (w - \operatorname{sign}(w)\, t)
        \; [\,|w| > t\,], \qquad
        \frac{\partial L}{\partial w} := \frac{\partial L}{\partial w_\text{eff}}

    through :func:`st3jax.sparsify`. After each step the threshold :math:`t` is moved,
    such that the share :math:`s(c)` of all prunable weights together is zero after
    :math:`c` completed steps. At ``freeze_step`` the weights become
    :math:`w_\text{eff}`; from then on zeros stay exactly zero, whatever the momentum
    or weight decay of ``inner`` asks for, and the other weights train on.

    This transform has to see the final updates: wrap everything that changes updates
    in ``inner``, clipping and weight decay included. Wrappers that call an optimizer
    as a whole (``optax.MultiSteps``, ``optax.apply_if_finite``, ...) go outside. Call
    ``update`` under ``jax.jit``. ``optax.inject_hyperparams(st3, ...)`` takes functions
    for schedules: give it ``static_args=("prunable",)``.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: Share of prunable weights to be zero, in [0, 1]: a number, or a
            schedule such as :func:`st3jax.polynomial_ramp`.
        criterion: ``"l1"`` compares magnitudes; ``"l1_sigma"`` (ST-3-sigma) compares
            them relative to the width of their layer.
        soft: Soft threshold (the method's own) or hard threshold.
        rescale: Whether each output channel is rescaled for the magnitude it lost.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        update_every: Steps from one threshold to the next.
        freeze_step: Number of completed steps at which the mask is fixed, not before
            the sparsity has reached its final value; never by default.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state :class:`ST3State`.

    Raises:
        ValueError: If an argument is out of its range, if ``init`` finds no prunable
            leaf, or if ``update`` is called without params or with others than those
            of ``init``.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> import st3jax
        >>> tx = st3(
        ...     optax.sgd(0.1, momentum=0.9),
        ...     sparsity=st3jax.polynomial_ramp(0.75, begin=0, end=10),
        ... )
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
        >>> opt_state = tx.init(params)
        >>> def loss_fn(params):
        ...     w = st3jax.sparsify(params, opt_state)["kernel"]
        ...     return ((w - 1.0) ** 2).sum()
        >>> for _ in range(10):
        ...     updates, opt_state = tx.update(
        ...         jax.grad(loss_fn)(params), opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((st3jax.finalize(params, opt_state)["kernel"] == 0).sum())
        48

    References:
        arXiv:2212.01076, section 3.
    """
    _check_arguments(inner, sparsity, criterion, prunable, update_every, freeze_step)
    inner = optax.with_extra_args_support(inner)

    def init_thresholds(params: optax.Params) -> Any:
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return jnp.full([], OFF)
        leaves = prunable_leaves(params, prunable)
        dtype = score_dtype(*(jnp.result_type(leaf) for leaf in leaves.values()))
        return map_prunable(lambda *_: jnp.full([], OFF, dtype), params, prunable)

    def init_fn(params: optax.Params) -> ST3State:
        return ST3State(
            count=jnp.zeros([], jnp.int32),
            thresholds=init_thresholds(params),
            frozen=optax.MaskedNode() if freeze_step is None else jnp.zeros([], bool),
            soft=switch(soft),
            rescale=switch(rescale),
            inner_state=inner.init(params),
        )

    def move_thresholds(count: jax.Array, thresholds: Any, params: Any) -> Any:
        """The thresholds after ``count`` completed steps; no work while s = 0."""
        due = count % update_every == 0
        if freeze_step is not None:
            due = (due | (count == freeze_step)) & (count <= freeze_step)
        with jax.enable_x64(True):  # s(c) in float64, as exact as its count
            s = sparsity(count.astype(jnp.int64)) if callable(sparsity) else sparsity
            s = jnp.asarray(s, jnp.float64)
            asked = s > 0
        # Compare what the next step will see, to the last bit.
        params = jax.lax.optimization_barrier(params)
        return jax.lax.cond(
            due & asked,
            lambda: leaf_thresholds(
                params, s, criterion=criterion, prunable=prunable, near=thresholds
            ),
            lambda: jax.tree.map(lambda t: jnp.where(due, OFF, t), thresholds),
        )

    def update_fn(
        updates: optax.Updates,
        state: ST3State,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ST3State]:
        if params is None:
            raise ValueError(
                "st3 moves its thresholds with the weights, so its update needs them: "
                "call tx.update(grads, opt_state, params)"
            )
        check_same_structure(state.thresholds, params)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        count = optax.safe_increment(state.count)
        if freeze_step is not None:
            updates = map_where_prunable(
                lambda _, u, w: hold_mask(w, u, state.frozen),
                state.thresholds,
                updates,
                params,
            )
        updates = map_where_prunable(
            lambda _, u: pin(u, state.count), state.thresholds, updates
        )
        stepped = optax.apply_updates(params, updates)
        state = state._replace(
            count=count,
            thresholds=move_thresholds(count, state.thresholds, stepped),
            inner_state=inner_state,
        )
        if freeze_step is not None:
            updates, thresholds = jax.lax.cond(
                count == freeze_step,
                lambda: _fix(state, updates, params, stepped),
                lambda: (updates, state.thresholds),
            )
            state = state._replace(thresholds=thresholds, frozen=count >= freeze_step)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fix(
    state: ST3State, updates: optax.Updates, params: Any, stepped: Any
) -> tuple[optax.Updates, Any]:
    """Updates that take the raw weights to their effective values, thresholds ended."""
    onto = map_where_prunable(
        lambda _, u, w, target: step_onto(w, target, u.dtype),
        state.thresholds,
        updates,
        params,
        state.effective_params(stepped),
    )
    return onto, jax.tree.map(jnp.zeros_like, state.thresholds)


def _check_arguments(
    inner: Any,
    sparsity: Any,
    criterion: str,
    prunable: Any,
    update_every: int,
    freeze_step: int | None,
) -> None:
    """Raises early, before anything is compiled, for what can be known early."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "the first argument of st3 is the optimizer to wrap, such as "
            f"optax.sgd(0.1), got {type(inner).__name__}"
        )
    if not callable(prunable):
        raise TypeError(
            "prunable is a function of (path, leaf) that says whether to prune the "
            f"leaf, got {prunable!r}"
        )
    check_choice(criterion, "criterion", CRITERIA)
    check_steps(update_every, "update_every", 1)
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
    if not callable(sparsity):
        check_fraction(sparsity, "sparsity")
        return
    with jax.ensure_compile_time_eval():
        last = jnp.iinfo(jnp.int32).max
        final = sparsity(jnp.array(last))
        check_fraction(sparsity(jnp.array(0)), "the sparsity schedule at step 0")
        check_fraction(final, "the final value of the sparsity schedule")
        if freeze_step is not None and is_concrete(final):
            then = sparsity(jnp.array(freeze_step))
            if then < final:
                raise ValueError(
                    f"freeze_step {freeze_step} comes before the ramp is over: the "
                    f"sparsity is {float(then):g} then and {float(final):g} at the end"
                )
