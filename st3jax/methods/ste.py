"""Hard straight-through pruning: ST-3 without soft threshold and rescaling."""

import optax

from st3jax import ops
from st3jax.engine.gradual import gradual
from st3jax.layout.letters import Layouts
from st3jax.rule.costs import Costs
from st3jax.rule.rule import make_rule
from st3jax.schedules import Sparsity
from st3jax.selection.tally import AxisName
from st3jax.trees import Prunable, is_kernel

__all__ = ["ste"]


def ste(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    criterion: str = "l1",
    distribution: str = "global",
    costs: Costs | None = None,
    pattern: str | tuple[int, ...] | None = None,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
    update_every: int = 1,
    freeze_step: int | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that small weights are zero in what the model sees.

    The raw weights stay dense. The model sees

    .. math::
        w_\text{eff} = w \; [\,|w| > t\,], \qquad
        \frac{\partial L}{\partial w} := \frac{\partial L}{\partial w_\text{eff}}

    so a zeroed weight is trained on and comes back once it is large enough. Thresholds
    and fixing are those of :func:`st3jax.st3`. Memory: bytes per leaf, nothing per
    weight.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: Share of prunable weights to be zero, in [0, 1]: a number, a schedule
            such as :func:`st3jax.polynomial_ramp`, or a mapping from paths.
        criterion: ``"l1"`` or ``"l1_sigma"``; this and what follows is as for
            :func:`st3jax.st3`.
        distribution: ``"global"``, ``"uniform"`` or ``"erk"``.
        costs: From path to the multiply-adds of one weight, to count those.
        pattern: ``None``, ``"N:M"``, or the shape of a block.
        prunable: Predicate on (path, leaf).
        layout: From path to what each axis of a leaf is.
        update_every: Steps from one threshold to the next; the step that ends a ramp
            moves it too.
        freeze_step: Number of completed steps at which the mask is fixed; never by
            default.
        axis_name: Axes of ``shard_map`` that the weights are sharded over by hand.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.ThresholdState`.

    Raises:
        ValueError: As :func:`st3jax.st3`.
        TypeError: As :func:`st3jax.st3`.

    Example:
        >>> import jax, st3jax
        >>> params = {"kernel": jax.numpy.array([[1.0, -2.0, 3.0, -4.0]])}
        >>> tx = ste(optax.sgd(0.0), sparsity=0.5)
        >>> _, opt_state = tx.update(params, tx.init(params), params)
        >>> def total(params):
        ...     return st3jax.sparsify(params, opt_state)["kernel"].sum()
        >>> float(total(params)), jax.grad(total)(params)["kernel"].tolist()
        (-1.0, [[1.0, 1.0, 1.0, 1.0]])

    References:
        The ablation of arXiv:2212.01076; straight-through: arXiv:1308.3432.
    """
    rule = make_rule(
        criterion=criterion,
        distribution=distribution,
        costs=costs,
        pattern=pattern,
        axis_name=axis_name,
    )
    return gradual(
        inner,
        sparsity,
        rule,
        ops.hard_threshold,
        masks_gradient=False,
        prunable=prunable,
        layout=layout,
        update_every=update_every,
        freeze_step=freeze_step,
    )
