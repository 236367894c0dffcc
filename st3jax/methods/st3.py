"""ST-3: soft thresholds, straight-through gradients, a sparsity that ramps up.

Source: Vanderschueren and De Vleeschouwer, "Are Straight-Through gradients and
Soft-Thresholding all you need for Sparse Training?", WACV 2023, arXiv:2212.01076.
"""

import optax

from st3jax import ops
from st3jax.checks import check_whole_channels
from st3jax.engine.gradual import gradual
from st3jax.layout.letters import Layouts
from st3jax.rule.costs import Costs
from st3jax.rule.rule import make_rule
from st3jax.schedules import Sparsity
from st3jax.selection.tally import AxisName
from st3jax.trees import Prunable, is_kernel

__all__ = ["st3"]


def st3(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    criterion: str = "l1",
    soft: bool = True,
    rescale: bool = True,
    straight_through: bool = True,
    distribution: str = "global",
    costs: Costs | None = None,
    pattern: str | tuple[int, ...] | None = None,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
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
            schedule such as :func:`st3jax.polynomial_ramp`. A mapping from paths
            (``"*head*"``, the first that matches counts) to numbers or schedules gives
            each layer its own.
        criterion: ``"l1"`` compares magnitudes; ``"l1_sigma"`` (ST-3-sigma) compares
            them relative to the width of their layer.
        soft: Soft threshold (the method's own) or hard threshold.
        rescale: Whether each output channel is rescaled for the magnitude it lost.
        straight_through: Whether ``inner`` sees the gradients of zeroed weights (the
            method's own), or only those of kept ones.
        distribution: ``"global"`` (the method's own) compares the weights of all
            layers; ``"uniform"`` takes the same share of each layer; ``"erk"``
            (Erdos-Renyi-kernel) takes less of small and narrow layers.
        costs: Makes the sparsity a share of multiply-adds instead of weights: from path
            to those that one weight of the leaf takes part in, a whole number, as
            :func:`st3jax.multiply_adds` counts them. Leaves that are not prunable
            count towards the total if they are listed.
        pattern: Which weights go together: ``None``; ``"N:M"`` such as ``"2:4"``, where
            of every M weights along the inputs N are kept, and the sparsity ends at
            ``1 - N / M``; or the shape of a block, such as ``(4, 8)`` for 4 inputs by 8
            outputs: blocks go by their l1 norm.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        layout: What each axis of a leaf is, from its path (``*`` stands for any text,
            the first that matches counts) to a letter for each: ``s`` stacked kernels
            (scanned layers, experts), ``w`` the window of a convolution, ``i`` inputs,
            ``o`` outputs. :func:`st3jax.layouts` reads it off the model. Without it
            Flax's own names settle it, and ``init`` asks where they do not.
        update_every: Steps from one threshold to the next; the step that ends a ramp
            moves it too, so that its target is always reached, and a plain number
            counts from the first of these steps. In between weights
            train past the threshold: with 100 steps, sparsities from 0.888 to 0.900
            were measured where 0.9 was asked for.
        freeze_step: Number of completed steps at which the mask is fixed, not before
            the sparsity has reached its final value; never by default.
        axis_name: Axes of ``shard_map`` that the weights are sharded over by hand.
            Under ``jit`` and for replicated weights there is none to name.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.ThresholdState`.

    Raises:
        ValueError: If an argument is out of its range or excludes another, if ``init``
            finds no prunable leaf or one that costs or a pattern do not fit, or if
            ``update`` is called without params or with others than those of ``init``.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> import jax, st3jax
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
        costs=costs,
        pattern=pattern,
        axis_name=axis_name,
    )
    if rescale:
        check_whole_channels(axis_name)
    return gradual(
        inner,
        sparsity,
        rule,
        ops.soft_threshold if soft else ops.hard_threshold,
        rescale=rescale,
        masks_gradient=not straight_through,
        prunable=prunable,
        layout=layout,
        update_every=update_every,
        freeze_step=freeze_step,
    )
