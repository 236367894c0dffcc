"""GMP, gradual magnitude pruning: small weights go, and only kept ones are trained.

Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
model compression", arXiv:1710.01878.
"""

import optax

from st3jax import ops
from st3jax.checks import check_choice
from st3jax.engine.gradual import STICKY, gradual
from st3jax.layout.letters import Layouts
from st3jax.rule.costs import Costs
from st3jax.rule.rule import make_rule
from st3jax.schedules import Sparsity
from st3jax.selection.tally import AxisName
from st3jax.trees import Prunable, is_kernel

__all__ = ["gmp"]


def gmp(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    sticky: str = "no",
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
    r"""Wraps an optimizer so that the network trains to exact sparsity with GMP.

    The model sees

    .. math::
        w_\text{eff} = w \; [\,|w| > t\,]

    ``inner`` sees the gradient of kept weights alone,

    .. math::
        \frac{\partial L}{\partial w} =
        \frac{\partial L}{\partial w_\text{eff}} \; [\,|w| > t\,]

    and the threshold is moved after each step, as :func:`st3jax.st3` does it. Memory:
    bytes per leaf, nothing per weight, and no mask: the threshold says what is kept,
    or, with sticky zeros, the zeros do.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: Share of prunable weights to be zero, in [0, 1]: a number, a schedule
            such as :func:`st3jax.polynomial_ramp`, or a mapping from paths.
        sticky: Whether zeroed weights are gone for good. ``"no"``: raw weights keep
            their value, and a weight returns when kept ones have become smaller than
            it (the published method). ``"strict"``: raw weights become zero, their
            momentum too, and they never return. ``"published"``: raw weights become
            zero, but leftover momentum can bring them back (the sticky layers of
            ST-3's authors).
        criterion: ``"l1"`` or ``"l1_sigma"``; this and what follows is as for
            :func:`st3jax.st3`.
        distribution: ``"global"``, ``"uniform"`` or ``"erk"``.
        costs: From path to the multiply-adds of one weight, to count those.
        pattern: ``None``, ``"N:M"``, or the shape of a block.
        prunable: Predicate on (path, leaf).
        layout: From path to what each axis of a leaf is.
        update_every: Steps from one threshold to the next; the step that ends a ramp
            moves it too. A kept weight that falls to the threshold in between is zero
            at once, unless zeros are strict.
        freeze_step: Number of completed steps at which the mask is fixed; never by
            default.
        axis_name: Axes of ``shard_map`` that the weights are sharded over by hand.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.ThresholdState`.

    Raises:
        ValueError: As :func:`st3jax.st3`, or if ``sticky`` is none of its choices.
        TypeError: As :func:`st3jax.st3`.

    Example:
        >>> import jax, st3jax
        >>> params = {"kernel": jax.numpy.array([[1.0, -2.0, 3.0, -4.0]])}
        >>> tx = gmp(optax.sgd(0.0), sparsity=0.5)
        >>> _, opt_state = tx.update(params, tx.init(params), params)
        >>> st3jax.sparsify(params, opt_state)["kernel"].tolist()
        [[0.0, 0.0, 3.0, -4.0]]

    References:
        arXiv:1710.01878, section 3; arXiv:2212.01076 for the global threshold.
    """
    check_choice(sticky, "sticky", STICKY)
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
        masks_gradient=True,
        prunable=prunable,
        layout=layout,
        sticky=sticky,
        update_every=update_every,
        freeze_step=freeze_step,
    )
