"""Distributions: how the sparsity asked for is spread over layers.

``"global"`` leaves it to one threshold for all layers. Here are the others, which give
every layer a sparsity of its own: ``"uniform"``, ``"erk"``, and explicit numbers by
path, where ``*`` stands for any text.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st3jax.selection.wide import wide

__all__ = ["DISTRIBUTIONS", "by_path", "erk_densities", "layer_sparsities"]

DISTRIBUTIONS = ("global", "uniform", "erk")


@wide
def layer_sparsities(
    distribution: str, shapes: Mapping[str, tuple[int, ...]], sparsity: Any
) -> dict[str, jax.Array]:
    """The sparsity of each layer, so that all together have the one asked for.

    Args:
        distribution: ``"uniform"`` or ``"erk"``; anything if ``sparsity`` is a mapping.
        shapes: From path to shape.
        sparsity: Scalar in [0, 1], or a mapping from paths to such scalars.

    Returns:
        float64 [] for each path.

    Raises:
        ValueError: If the paths of a mapping do not fit, see :func:`by_path`.

    Example:
        >>> layer_sparsities("uniform", {"kernel": (2, 3)}, 0.5)["kernel"].item()
        0.5
    """
    if isinstance(sparsity, Mapping):
        chosen = by_path(sparsity, list(shapes))
        return {path: jnp.asarray(s).astype(jnp.float64) for path, s in chosen.items()}
    sparsity = jnp.asarray(sparsity).astype(jnp.float64)
    if distribution == "uniform":
        return dict.fromkeys(shapes, sparsity)
    densities = erk_densities(list(shapes.values()), 1 - sparsity)
    return {path: 1 - densities[i] for i, path in enumerate(shapes)}


def by_path(values: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """The value for each leaf: the first whose path matches that of the leaf.

    Args:
        values: From path to value. ``*`` stands for any text, ``/`` included.
        paths: Paths of leaves.

    Returns:
        From the path of each leaf to its value.

    Raises:
        ValueError: If a leaf matches no path, or if a path other than ``"*"`` counts
            for no leaf.

    Example:
        >>> by_path({"*head*": 0.5, "*": 0.9}, ["stem/kernel", "head/kernel"])
        {'stem/kernel': 0.9, 'head/kernel': 0.5}
    """
    listed = ", ".join(repr(path) for path in paths[:5])
    for path in values:
        if not fnmatch.filter(paths, path):
            raise ValueError(
                f"the path {path!r} of sparsity matches no prunable leaf ({listed})"
            )
    chosen, counting = {}, set()
    for leaf in paths:
        matching = [path for path in values if fnmatch.fnmatchcase(leaf, path)]
        if not matching:
            raise ValueError(
                f"no path of sparsity matches the leaf '{leaf}': add one, such as "
                "'*' for all that is left"
            )
        chosen[leaf] = values[matching[0]]
        counting.add(matching[0])
    for path in values:
        if path not in counting and path != "*":  # there may be nothing left
            raise ValueError(
                f"the path {path!r} of sparsity counts for no leaf, as others before "
                "it match all of its own: put it before them"
            )
    return chosen


@wide
def erk_densities(
    shapes: list[tuple[int, ...]], density: jax.typing.ArrayLike
) -> jax.Array:
    r"""The share of weights that each layer keeps under the Erdos-Renyi-kernel rule.

    .. math::
        d_l = \min(1, \epsilon\, q_l), \qquad q_l = \frac{\sum \text{shape}_l}{n_l},
        \qquad \sum_l d_l n_l = d \sum_l n_l

    with :math:`n_l` weights in layer :math:`l`. Layers for which :math:`\epsilon q_l`
    would be above 1 are dense, those of the highest :math:`q_l` first, until the rest
    fits.

    Args:
        shapes: Shapes of the layers.
        density: Share of all weights that is kept, in [0, 1], concrete or traced.

    Returns:
        float64 [layers], each in [0, 1].

    Example:
        >>> erk_densities([(2, 2), (8, 8)], 0.5).tolist()
        [1.0, 0.46875]

    References:
        Evci et al., "Rigging the Lottery", ICML 2020, arXiv:1911.11134, section 3;
        Mocanu et al., Nature Communications 9, 2018, for the rule without kernels.
    """
    sizes = np.array([np.prod(shape, dtype=float) for shape in shapes])
    sums = np.array([sum(shape) if 0 not in shape else 0 for shape in shapes], float)
    q = sums / np.maximum(sizes, 1)
    # Candidates: the layers above each of the values of q are dense, and no others.
    bounds = np.unique(q)[::-1]
    dense = q[None, :] > bounds[:, None]
    left = jnp.asarray(density).astype(jnp.float64) * sizes.sum()
    left = left - (sizes[None, :] * dense).sum(1)
    epsilon = left / ((q * sizes)[None, :] * ~dense).sum(1)
    fits = epsilon * bounds <= 1
    # The first that fits has the highest epsilon. By rounding, none may fit density 1.
    highest = jnp.max(jnp.where(fits, epsilon, 0))
    found = jnp.where(jnp.any(fits), jnp.clip(highest * q, 0, 1), 1)
    # By rounding only, a layer may be short of dense: no weight of it is to go.
    return jnp.where(found > 1 - 1e-12, 1, found)
