"""ST-3: soft thresholds, straight-through gradients, a sparsity that ramps up.

Source: Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and
Soft-Thresholding all you need for Sparse Training?", WACV 2023, arXiv:2212.01076.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.budgets import Costs
from st3jax.checks import check_steps
from st3jax.keys import score_dtype
from st3jax.patterns import weight_thresholds
from st3jax.rules import check_fits, check_schedules, make_rule
from st3jax.schedules import Sparsity, at_step
from st3jax.tally import AxisName
from st3jax.thresholds import OFF, leaf_thresholds
from st3jax.trees import (
    Prunable,
    Static,
    check_same_structure,
    is_kernel,
    map_prunable,
    map_where_prunable,
    prunable_leaves,
)
from st3jax.updates import hold_mask, pin, step_onto

__all__ = ["ST3State", "st3"]


class ST3State(NamedTuple):
    """State of :func:`st3`: bytes per leaf, nothing per weight.

    Attributes:
        count: int32 [], completed steps.
        thresholds: Scalar on ``|w|`` for each prunable leaf, -1 before the ramp, 0
            after fixing; ``optax.MaskedNode`` elsewhere.
        frozen: bool [], whether the mask is fixed; ``optax.MaskedNode`` if it never
            will be.
        soft: Static, whether thresholds are soft.
        rescale: Static, whether output channels are rescaled.
        pattern: Static, which weights live and die together.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    thresholds: Any
    frozen: jax.Array | optax.MaskedNode
    soft: Static
    rescale: Static
    pattern: Static
    inner_state: optax.OptState

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`."""

        def effective(path: str, t: jax.Array, w: jax.Array) -> jax.Array:
            if not isinstance(self.frozen, optax.MaskedNode):
                w = ops.hold_zeros(w, self.frozen)
            threshold = ops.soft_threshold if self.soft.value else ops.hard_threshold
            t = weight_thresholds(self.pattern.value, path, w, t)
            w_eff = threshold(w, t)
            if self.rescale.value:
                w_eff = ops.rescale(w_eff, ops.channel_scale(w, t))
            return w_eff

        return map_where_prunable(effective, self.thresholds, params)


def st3(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    criterion: str = "l1",
    soft: bool = True,
    rescale: bool = True,
    distribution: str = "global",
    budget: str = "weights",
    costs: Costs | None = None,
    pattern: str | None = None,
    block_shape: tuple[int, ...] | None = None,
    prunable: Prunable = is_kernel,
    update_every: int = 1,
    freeze_step: int | None = None,
    axis_name: AxisName = None,
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
            schedule such as :func:`st3jax.polynomial_ramp`. A mapping from path
            patterns (``"*head*"``, the first that matches counts) to numbers or
            schedules gives each layer its own.
        criterion: ``"l1"`` compares magnitudes; ``"l1_sigma"`` (ST-3-sigma) compares
            them relative to the width of their layer.
        soft: Soft threshold (the method's own) or hard threshold.
        rescale: Whether each output channel is rescaled for the magnitude it lost.
        distribution: ``"global"`` (the method's own) compares the weights of all
            layers; ``"uniform"`` takes the same share of each layer; ``"erk"``
            (Erdos-Renyi-kernel) takes less of small and narrow layers.
        budget: What the sparsity is a share of: ``"weights"``, or ``"multiply_adds"``,
            for which weights count as often as they are used.
        costs: For ``"multiply_adds"``, from path to the multiply-adds that one weight
            of the leaf takes part in, a whole number. Leaves that are not prunable
            count towards the total if they are listed.
        pattern: Which weights go together: ``None``; ``"N:M"`` such as ``"2:4"``, where
            of every M weights along the input axis at most N are kept, and the
            sparsity ends at ``1 - N / M``; or ``"block"``, which go by their l1 norm.
        block_shape: For ``"block"``, the shape of a block on a leaf's last axes.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        update_every: Steps from one threshold to the next.
        freeze_step: Number of completed steps at which the mask is fixed, not before
            the sparsity has reached its final value; never by default.
        axis_name: Axes of ``shard_map`` that the weights are sharded over by hand.
            Under ``jit`` and for replicated weights there is none to name.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state :class:`ST3State`.

    Raises:
        ValueError: If an argument is out of its range or excludes another, if ``init``
            finds no prunable leaf or one that costs or a pattern do not fit, or if
            ``update`` is called without params or with others than those of ``init``.
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
        arXiv:2212.01076, section 3; arXiv:2409.09099 for continuous N:M patterns.
    """
    rule = make_rule(
        criterion=criterion,
        distribution=distribution,
        budget=budget,
        costs=costs,
        pattern=pattern,
        block_shape=block_shape,
        prunable=prunable,
        axis_name=axis_name,
    )
    _check_arguments(inner, rescale, update_every, freeze_step, axis_name)
    check_schedules(rule, sparsity, freeze_step)
    inner = optax.with_extra_args_support(inner)

    def init_thresholds(params: optax.Params) -> Any:
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return jnp.full([], OFF)
        check_fits(rule, params, sparsity)
        leaves = prunable_leaves(params, prunable)
        dtype = score_dtype(*(jnp.result_type(leaf) for leaf in leaves.values()))
        return map_prunable(lambda *_: jnp.full([], OFF, dtype), params, prunable)

    def init_fn(params: optax.Params) -> ST3State:
        return ST3State(
            count=jnp.zeros([], jnp.int32),
            thresholds=init_thresholds(params),
            frozen=optax.MaskedNode() if freeze_step is None else jnp.zeros([], bool),
            soft=Static(bool(soft)),
            rescale=Static(bool(rescale)),
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
                lambda path, t, u, w: hold_mask(w, u, state.frozen),
                state.thresholds,
                updates,
                params,
            )
        updates = map_where_prunable(
            lambda path, t, u: pin(u, state.count), state.thresholds, updates
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
        lambda path, t, u, w, target: step_onto(w, target, u.dtype),
        state.thresholds,
        updates,
        params,
        state.effective_params(stepped),
    )
    return onto, jax.tree.map(jnp.zeros_like, state.thresholds)


def _check_arguments(
    inner: Any,
    rescale: bool,
    update_every: int,
    freeze_step: int | None,
    axis_name: AxisName,
) -> None:
    """Raises early, before anything is compiled, for what can be known early."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "the first argument of st3 is the optimizer to wrap, such as "
            f"optax.sgd(0.1), got {type(inner).__name__}"
        )
    if rescale and axis_name is not None:
        raise ValueError(
            f"rescaling needs whole output channels, which weights sharded over "
            f"{axis_name!r} by hand may not have: pass rescale=False, or leave the "
            "sharding to jit, without axis_name"
        )
    check_steps(update_every, "update_every", 1)
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
