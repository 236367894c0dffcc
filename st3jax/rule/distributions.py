"""Distributions: how the sparsity asked for is spread over layers.

``"global"`` leaves it to one threshold for all layers. Here are the others, which give
every kernel a sparsity of its own: ``"uniform"``, ``"erk"``, and explicit numbers by
path, where ``*`` stands for any text. Kernels that are stacked in one leaf are of one
shape and path, so one number does for all of them.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st3jax.layout.letters import Layouts, kernel_shape, stack_shape
from st3jax.rule.costs import shards_of
from st3jax.selection.tally import AxisName
from st3jax.selection.wide import wide

__all__ = [
    "DISTRIBUTIONS",
    "by_path",
    "erk_densities",
    "layer_sparsities",
    "share_of_all",
]

DISTRIBUTIONS = ("global", "uniform", "erk")


@wide
def layer_sparsities(
    distribution: str,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: Any,
    layouts: Layouts | None = None,
) -> dict[str, jax.Array]:
    """The sparsity of the kernels of each leaf, so that all have the one asked for.

    Args:
        distribution: ``"uniform"`` or ``"erk"``; anything else if ``sparsity`` is a
            mapping.
        shapes: From path to shape.
        sparsity: Scalar in [0, 1], or a mapping from paths to such scalars: then
            ``"erk"`` spreads each over the leaves that its path counts for.
        layouts: From path to a letter for each axis; by default a leaf is one kernel.

    Returns:
        float64 [] for each path.

    Raises:
        ValueError: If the paths of a mapping do not fit, see :func:`by_path`.

    Example:
        >>> layer_sparsities("uniform", {"kernel": (2, 3)}, 0.5)["kernel"].item()
        0.5
    """
    together = isinstance(sparsity, Mapping) and distribution == "erk"
    patterns = {path: path for path in sparsity} if together else {}
    if isinstance(sparsity, Mapping):
        values = {path: jnp.asarray(s) for path, s in sparsity.items()}
        chosen = by_path(values, list(shapes))
    else:
        chosen = dict.fromkeys(shapes, jnp.asarray(sparsity))
    each = {path: s.astype(jnp.float64) for path, s in chosen.items()}
    if distribution != "erk":
        return each
    owners = by_path(patterns, list(shapes)) if together else dict.fromkeys(shapes, "*")
    for owner in dict.fromkeys(owners.values()):
        alike = [path for path in shapes if owners[path] == owner]
        if len(alike) == 1:  # which has the number itself, to the last bit
            continue
        kernels = [_kernels(path, shapes, layouts) for path in alike]
        densities = erk_densities(
            [shape for _, shape in kernels],
            1 - each[alike[0]],
            [number for number, _ in kernels],
        )
        each.update({path: 1 - densities[i] for i, path in enumerate(alike)})
    return each


def _kernels(
    path: str, shapes: Mapping[str, tuple[int, ...]], layouts: Layouts | None
) -> tuple[int, tuple[int, ...]]:
    """How many kernels a leaf holds, and of what shape."""
    if layouts is None:
        return 1, shapes[path]
    layout = layouts[path]
    stack = stack_shape(layout, shapes[path])
    return math.prod(stack), kernel_shape(layout, shapes[path])


@wide
def share_of_all(
    sparsity: Any, leaves: Mapping[str, Any], axis_name: AxisName = None
) -> jax.Array:
    """The share of all weights that is asked for, float32 [].

    Args:
        sparsity: Scalar in [0, 1], or a mapping from paths to such scalars.
        leaves: The prunable leaves by path.
        axis_name: Axes of ``shard_map`` that weights are sharded over by hand.

    Example:
        >>> leaves = {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 1))}
        >>> float(share_of_all({"a": 0.0, "*": 1.0}, leaves))
        0.25
    """
    if not isinstance(sparsity, Mapping):
        return jnp.asarray(sparsity).astype(jnp.float32)
    sizes = {
        path: math.prod(jnp.shape(leaf)) * shards_of(leaf, axis_name)
        for path, leaf in leaves.items()
    }
    each = by_path({k: jnp.asarray(s) for k, s in sparsity.items()}, list(sizes))
    parts = [each[path].astype(jnp.float64) * size for path, size in sizes.items()]
    total = max(sum(sizes.values()), 1)
    return (jnp.stack(parts).sum() / total).astype(jnp.float32)


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
    shapes: list[tuple[int, ...]],
    density: jax.typing.ArrayLike,
    numbers: list[int] | None = None,
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
        numbers: How many layers of each shape there are, 1 by default.

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
    sizes = sizes * (1 if numbers is None else np.array(numbers, float))
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
