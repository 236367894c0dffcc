"""LRR, learning-rate rewinding: train, prune a fifth of what is left, train again.

Source: Renda, Frankle and Carbin, "Comparing Rewinding and Fine-tuning in Neural
Network Pruning", ICLR 2020, arXiv:2003.02389.
"""

import math

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import check_fraction, check_steps
from st3jax.engine.gradual import gradual
from st3jax.rule.rule import Rule
from st3jax.trees import Prunable, is_kernel

__all__ = ["lrr", "lrr_cycles"]


def lrr_cycles(sparsity: float, *, keep: float = 0.8) -> int:
    r"""How many times LRR trains: once dense, and once after each pruning.

    After :math:`k` prunings a share of :math:`1 - \text{keep}^k` is zero, and the last
    pruning removes no more than what is asked.

    Args:
        sparsity: Share of prunable weights that end as zero, in [0, 1).
        keep: Share of the remaining weights that a pruning keeps, in (0, 1).

    Returns:
        The number of cycles; their budget is as many times that of one training.

    Raises:
        ValueError: If ``sparsity`` or ``keep`` is out of its range.

    Example:
        >>> [lrr_cycles(s) for s in (0.0, 0.2, 0.8, 0.9, 0.95, 0.98)]
        [1, 2, 9, 12, 15, 19]

    References:
        arXiv:2003.02389, section 3.
    """
    check_fraction(sparsity, "sparsity")
    check_fraction(keep, "keep")
    if sparsity >= 1 or not 0 < keep < 1:
        raise ValueError(
            f"cycles that keep a share of {keep} do not come to a sparsity of "
            f"{sparsity}: choose keep between 0 and 1, and a sparsity below 1"
        )
    prunings = max(0, math.floor(math.log1p(-sparsity) / math.log(keep)) - 1)
    while 1 - keep**prunings < sparsity - 1e-12:
        prunings += 1
    return 1 + prunings


def lrr(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    cycle_steps: int,
    keep: float = 0.8,
    prunable: Prunable = is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that the network is pruned after each cycle of training.

    The first cycle is dense. After :math:`k` cycles the smallest weights of all layers
    together are removed for good, such that a share

    .. math::
        s_k = \min(\text{sparsity},\; 1 - \text{keep}^k)

    is zero, and training goes on from the weights and the momentum that are there. A
    removed weight is exactly zero, and ``inner`` sees no gradient of it; the mask stays
    what it is until the next pruning. Memory: bytes per leaf, nothing per weight: the
    zeros are the mask.

    Rewinding is the learning rate's: repeat its schedule for each of the
    :func:`lrr_cycles` with ``optax.join_schedules``. The variant of ST-3's authors, one
    ramp and a second cycle with the mask fixed, is :func:`st3jax.gmp` or
    :func:`st3jax.st3` with ``freeze_step`` and such a schedule.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: Share of prunable weights that end as zero, in [0, 1).
        cycle_steps: Steps of one cycle, which are those of a whole training.
        keep: Share of the remaining weights that a pruning keeps, in (0, 1).
        prunable: Predicate on (path, leaf).

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.ThresholdState`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``inner`` is not an optimizer or a leaf not of floating point.

    Example:
        >>> import st3jax
        >>> rate = optax.cosine_decay_schedule(0.1, decay_steps=3)
        >>> cycles = lrr_cycles(0.5, keep=0.75)
        >>> ends = [3 * cycle for cycle in range(1, cycles)]
        >>> rewound = optax.join_schedules([rate] * cycles, ends)
        >>> tx = lrr(optax.sgd(rewound), 0.5, cycle_steps=3, keep=0.75)
        >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
        >>> opt_state, zeros = tx.init(params), []
        >>> for _ in range(3 * cycles):
        ...     zeros.append(int(st3jax.summary(params).zeros))
        ...     grads = {"kernel": jnp.zeros((4, 2))}
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> zeros
        [0, 0, 0, 2, 2, 2, 4, 4, 4, 4, 4, 4]

    References:
        arXiv:2003.02389, section 3 and appendix A.
    """
    prunings = lrr_cycles(sparsity, keep=keep) - 1
    check_steps(cycle_steps, "cycle_steps", 1)

    def staircase(count: jax.typing.ArrayLike) -> jax.Array:
        cycle = jnp.asarray(count) // cycle_steps
        left = jnp.power(keep, cycle.astype(float))
        return jnp.where(cycle >= prunings, sparsity, 1 - left)

    return gradual(
        inner,
        staircase,
        Rule(),
        ops.hard_threshold,
        masks_gradient=True,
        prunable=prunable,
        sticky="strict",
        update_every=cycle_steps,
    )
