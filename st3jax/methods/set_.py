"""SET: a sparse network throughout, whose mask moves to random places.

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive
sparse connectivity inspired by network science", Nature Communications 9, 2018,
arXiv:1707.04780.
"""

import jax
import jax.numpy as jnp
import optax

from st3jax.checks import check_fraction, check_steps
from st3jax.engine.regrowth import regrowth
from st3jax.engine.seeds import seed_of
from st3jax.layout.letters import Layouts
from st3jax.trees import Prunable, is_kernel

__all__ = ["set_"]


def set_(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    key: jax.Array,
    update_every: int,
    drop: float = 0.3,
    distribution: str = "erk",
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
    freeze_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that a sparse network is trained from scratch with SET.

    The mask starts at random positions, with a fixed number of active weights
    :math:`a_l` in each layer. Inactive weights are exactly zero in the raw weights.
    Every ``update_every`` steps, after the step, each layer drops the smallest

    .. math::
        \lfloor \text{drop} \cdot a_l \rfloor

    of its active weights and activates as many positions, drawn uniformly from all that
    are inactive then, the dropped ones included. New weights start at zero; one that
    was dropped and is activated again goes on as it was. ``inner`` sees the gradient of
    active weights only.

    The authors drop the smallest positive and the largest negative weights, and start
    new ones at random; this is the variant that later work compares with.

    Args:
        inner: The optimizer that trains the active weights.
        sparsity: Share of prunable weights that is inactive, a number in [0, 1].
        key: Random key for the first mask and for growth, the same on all replicas.
        update_every: Steps from one change of the mask to the next; an epoch in the
            authors' work.
        drop: Share of active weights that is replaced, in [0, 1].
        distribution: ``"erk"`` (Erdos-Renyi-kernel) takes less of small and narrow
            layers; ``"uniform"`` takes the same share of each.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        layout: From path to what each axis of a leaf is, as for :func:`st3jax.st3`:
            of stacked kernels each drops and grows its own number.
        freeze_step: Number of completed steps at which the mask is fixed; never by
            default.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state
        :class:`st3jax.RegrowthState`.

    Raises:
        ValueError: If an argument is out of its range, if ``init`` finds no prunable
            leaf, or if ``update`` is called without params or with others than those
            of ``init``.
        TypeError: If a prunable leaf is not of a floating-point dtype, or an argument
            not of its kind.

    Example:
        >>> import st3jax
        >>> tx = set_(optax.sgd(0.1), 0.75, key=jax.random.key(0), update_every=100)
        >>> params = {"kernel": jnp.ones((8, 8))}
        >>> opt_state = tx.init(params)
        >>> int((st3jax.sparsify(params, opt_state)["kernel"] == 0).sum())
        48

    References:
        arXiv:1707.04780, section "Sparse Evolutionary Training"; arXiv:1911.11134,
        section 4, for dropping by magnitude.
    """
    check_fraction(sparsity, "sparsity")
    check_fraction(drop, "drop")
    if freeze_step is not None:
        check_steps(freeze_step, "freeze_step", 1)
    return regrowth(
        inner,
        drop=lambda count, active: jnp.floor(drop * active),
        growth="random",
        initial_sparsity=sparsity,
        distribution=distribution,
        seed=seed_of(key),
        masks_gradient=True,
        update_every=update_every,
        freeze_step=freeze_step,
        prunable=prunable,
        layout=layout,
    )
