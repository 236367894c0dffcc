"""RigL: a sparse network throughout, whose mask moves to where gradients are large.

Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
arXiv:1911.11134.
"""

import jax
import jax.numpy as jnp
import optax

from st3jax.checks import check_fraction, check_steps
from st3jax.engine.regrowth import regrowth
from st3jax.engine.seeds import seed_of
from st3jax.layout.letters import Layouts
from st3jax.trees import Prunable, is_kernel

__all__ = ["rigl"]


def rigl(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    key: jax.Array,
    total_steps: int,
    update_every: int = 100,
    drop: float = 0.3,
    end: float = 0.75,
    distribution: str = "erk",
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that a sparse network is trained from scratch with RigL.

    The mask starts at random positions, with a fixed number of active weights
    :math:`a_l` in each layer. Inactive weights are exactly zero in the raw weights.
    Every ``update_every`` steps, after the step, each layer drops the smallest
    :math:`\lfloor r(c)\, a_l \rfloor` of its active weights,

    .. math::
        r(c) = \frac{\text{drop}}{2}
               \left(1 + \cos\frac{\pi c}{\text{end} \cdot \text{total\_steps}}\right)

    after :math:`c` completed steps, and activates as many positions, the dropped ones
    included, where the gradient with respect to the weight that the model sees is the
    largest. New weights start at zero; one that was dropped and is activated again goes
    on as it was. ``inner`` sees the gradient of active weights only. ``update`` has to
    be given that of the whole batch, averaged over all replicas.

    Unlike in the authors' program, the optimizer makes its step also when the mask is
    about to change.

    Args:
        inner: The optimizer that trains the active weights.
        sparsity: Share of prunable weights that is inactive, a number in [0, 1].
        key: Random key for the first mask, the same on all replicas.
        total_steps: Steps of the whole training.
        update_every: Steps from one change of the mask to the next.
        drop: Share of active weights that is replaced at the start, in [0, 1].
        end: Share of ``total_steps`` after which the mask is fixed, in [0, 1].
        distribution: ``"erk"`` (Erdos-Renyi-kernel) takes less of small and narrow
            layers; ``"uniform"`` takes the same share of each.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.
        layout: From path to what each axis of a leaf is, as for :func:`st3jax.st3`:
            of stacked kernels each drops and grows its own number.

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
        >>> tx = rigl(optax.sgd(0.1), 0.75, key=jax.random.key(0), total_steps=100)
        >>> params = {"kernel": jnp.ones((8, 8))}
        >>> opt_state = tx.init(params)
        >>> int((st3jax.sparsify(params, opt_state)["kernel"] == 0).sum())
        48

    References:
        arXiv:1911.11134, section 3 and algorithm 1.
    """
    check_fraction(sparsity, "sparsity")
    check_steps(total_steps, "total_steps", 1)
    check_fraction(drop, "drop")
    check_fraction(end, "end")
    last = end * total_steps

    def dropped(count: jax.Array, active: jax.Array) -> jax.Array:
        done = jnp.minimum(count.astype(active.dtype) / last, 1)
        return jnp.floor(drop / 2 * (1 + jnp.cos(jnp.pi * done)) * active)

    return regrowth(
        inner,
        drop=dropped,
        initial_sparsity=sparsity,
        distribution=distribution,
        seed=seed_of(key),
        masks_gradient=True,
        update_every=update_every,
        freeze_step=last,
        prunable=prunable,
        layout=layout,
    )
