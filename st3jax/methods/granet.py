"""GraNet: gradual pruning over all layers, with zero-cost regrowth after each prune.

Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with
Neuroregeneration", NeurIPS 2021, arXiv:2106.10404.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from st3jax.checks import as_mapping, check_fraction, check_steps, is_concrete
from st3jax.engine.regrowth import regrowth
from st3jax.engine.seeds import seed_of
from st3jax.layout.letters import Layouts
from st3jax.rule.rule import Rule, check_schedules
from st3jax.schedules import LAST_STEP, Sparsity, at_step
from st3jax.trees import Prunable, is_kernel

__all__ = ["granet"]

LEAST_DROP = 0.005
"""The share of active weights that is still replaced at the end of training."""


def granet(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    total_steps: int,
    update_every: int = 1000,
    drop: float = 0.5,
    initial_sparsity: float = 0.0,
    key: jax.Array | None = None,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
    freeze_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that the network is pruned while it regrows, with GraNet.

    Inactive weights are exactly zero in the raw weights, with all that the optimizer
    keeps about them. Every ``update_every`` steps, after the step,

    1. the smallest active weights of all layers together are removed, until the share
       :math:`s(c)` is inactive after :math:`c` completed steps; equal ones, such as
       new weights that are still zero, go together;
    2. each layer drops the :math:`\lceil r(c)\, a_l \rceil` smallest of its :math:`a_l`
       active weights,

       .. math::
           r(c) = 0.005 + \frac{\text{drop} - 0.005}{2}
                  \left(1 + \cos\frac{\pi c}{\text{total\_steps}}\right);

    3. it activates as many inactive positions, the ones just removed included, where
       the gradient with respect to the weight that the model sees is the largest. New
       weights start at zero; one that was dropped in 2 goes on as it was.

    Step 1 is skipped when enough weights are inactive, so it ends with the schedule;
    steps 2 and 3 go on to the last step. ``update`` has to be given the gradient of the
    whole batch, averaged over all replicas: it decides about the mask before ``inner``
    clips or scales it. A ramp is looked at every ``update_every`` steps, and is met
    exactly at the first of them at or after its end; the authors' program stops one
    before.

    Wrap everything that changes updates in ``inner``; wrappers that call an optimizer
    as a whole (``optax.MultiSteps``, ...) go outside. Call ``update`` under
    ``jax.jit``.

    Args:
        inner: The optimizer that trains the active weights. It sees the gradient of
            inactive ones too.
        sparsity: Share of prunable weights to be inactive, in [0, 1]: a number, or a
            schedule such as :func:`st3jax.polynomial_ramp`.
        total_steps: Steps of the whole training.
        update_every: Steps from one change of the mask to the next; published results
            use 1000 (CIFAR) and 4000 (ImageNet).
        drop: Share of active weights that is replaced at the start, in [0, 1].
        initial_sparsity: Share of inactive weights at the start, spread over layers by
            the Erdos-Renyi-kernel rule at random positions. With it, a schedule
            :math:`\sigma(c)` that ends at :math:`s_f` asks for
            :math:`s(c) = s_f - (s_f - s_i) (1 - \sigma(c) / s_f)`.
        key: Random key for these positions, the same on all replicas; a dense start
            needs none.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        layout: From path to what each axis of a leaf is, as for :func:`st3jax.st3`:
            of stacked kernels each drops and grows its own number.
        freeze_step: Number of completed steps at which the mask is fixed, pruned once
            more if need be, not before the sparsity has reached its final value; never
            by default.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.RegrowthState`.

    Raises:
        ValueError: If an argument is out of its range or excludes another, if ``init``
            finds no prunable leaf, or if ``update`` is called without params or with
            others than those of ``init``.
        TypeError: If a prunable leaf is not of a floating-point dtype, or an argument
            not of its kind.

    Example:
        >>> import st3jax
        >>> tx = granet(
        ...     optax.sgd(0.1, momentum=0.9),
        ...     st3jax.polynomial_ramp(0.75, begin=0, end=8),
        ...     total_steps=10,
        ...     update_every=2,
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
        >>> int((st3jax.finalize(params, opt_state)["kernel"] == 0).sum()) >= 48
        True

    References:
        arXiv:2106.10404, section 4.
    """
    check_steps(total_steps, "total_steps", 1)
    check_fraction(drop, "drop")
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
    _check_sparsity(sparsity, initial_sparsity, key, freeze_step)
    seed = None if key is None else seed_of(key)
    if is_concrete(initial_sparsity) and float(initial_sparsity) == 0:
        seed = None  # nothing is random

    def dropped(count: jax.Array, active: jax.Array) -> jax.Array:
        done = jnp.minimum(count.astype(active.dtype) / total_steps, 1)
        share = LEAST_DROP + (drop - LEAST_DROP) / 2 * (1 + jnp.cos(jnp.pi * done))
        return jnp.ceil(share * active)

    def asked(count: jax.Array) -> jax.Array:
        s = at_step(sparsity, count)
        if seed is None:
            return s
        final = at_step(sparsity, LAST_STEP)
        return final - (final - initial_sparsity) * (1 - s / final)

    return regrowth(
        inner,
        drop=dropped,
        asked=asked,
        initial_sparsity=initial_sparsity,
        seed=seed,
        update_every=update_every,
        freeze_step=freeze_step,
        prunable=prunable,
        layout=layout,
    )


def _check_sparsity(sparsity: Any, initial: Any, key: Any, freeze_step: Any) -> None:
    """Raises unless it can start at one sparsity and end at the other."""
    if as_mapping(sparsity) is not None:
        raise ValueError(
            "GraNet compares the weights of all layers, so sparsity is one number or "
            f"one schedule for all of them, got {sparsity!r}"
        )
    check_schedules(Rule(), sparsity, freeze_step)
    check_fraction(initial, "initial_sparsity")
    with jax.ensure_compile_time_eval():
        final = at_step(sparsity, jnp.array(LAST_STEP))
    if not is_concrete(initial):
        return
    if is_concrete(final) and float(initial) > float(final):
        raise ValueError(
            f"initial_sparsity {float(initial):g} is above the final sparsity "
            f"{float(final):g}, but weights only become fewer: start at less"
        )
    if float(initial) > 0 and key is None:
        raise ValueError(
            f"initial_sparsity {float(initial):g} takes random positions: pass "
            "key=jax.random.key(0), the same on all replicas"
        )
