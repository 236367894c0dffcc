"""Which leaves of a parameter pytree are prunable, and how to walk over them.

A tree of per-leaf values (thresholds, masks) has the structure of the parameters, with
an ``optax.MaskedNode`` in the place of every leaf that is not prunable.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from flax.core import meta

__all__ = [
    "Prunable",
    "Static",
    "check_same_structure",
    "is_kernel",
    "map_prunable",
    "named_leaves",
    "path_name",
    "prunable_leaves",
]

Prunable = Callable[[str, Any], bool]
"""Predicate on a leaf's path (names joined by ``/``) and the leaf itself."""


@struct.dataclass
class Static:
    """A value that a state carries as part of its structure, not as one of its leaves.

    Under ``jit`` it stays what it is, and two states with other values are of other
    types.

    Attributes:
        value: Hashable.

    Example:
        >>> state = (jnp.ones(3), Static("2:4"))
        >>> len(jax.tree.leaves(state)), jax.jit(lambda state: state)(state)[1].value
        (1, '2:4')
    """

    value: Any = struct.field(pytree_node=False)


def path_name(path: tuple[Any, ...]) -> str:
    """The names of a key path joined by ``/``, without the boxes around a leaf.

    Example:
        >>> path_name((jax.tree_util.DictKey("Dense_0"), jax.tree_util.DictKey("bias")))
        'Dense_0/bias'
    """
    last = path[-1] if path else None
    boxed = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value"
    return jax.tree_util.keystr(
        path[:-1] if boxed else path, simple=True, separator="/"
    )


def is_kernel(path: str, leaf: Any) -> bool:
    """The default choice of prunable leaves: convolution and dense kernels.

    Flax names them ``kernel`` in Linen and NNX alike, attention's projections
    included. Biases (attention's have two axes), normalisation scales and embeddings
    have other names.

    Args:
        path: Names on the way to the leaf, joined by ``/``.
        leaf: The parameter.

    Returns:
        Whether the last name is ``kernel`` and the leaf has two or more axes.

    Example:
        >>> is_kernel("Conv_0/kernel", jnp.zeros((3, 3, 4, 8)))
        True
        >>> is_kernel("attention/query/bias", jnp.zeros((2, 8)))
        False
    """
    return path.rpartition("/")[2] == "kernel" and jnp.ndim(leaf) >= 2


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path names, in the tree's order.

    Example:
        >>> list(named_leaves({"b": {"kernel": 1.0}, "a": 2.0}))
        ['a', 'b/kernel']
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                f"two parameters are called '{name}': rename one, so that a predicate "
                "can tell them apart"
            )
        leaves[name] = leaf
    return leaves


def prunable_leaves(params: Any, prunable: Prunable = is_kernel) -> dict[str, Any]:
    """The prunable leaves of a parameter pytree by their path names.

    Args:
        params: Pytree of arrays (or of abstract arrays).
        prunable: Predicate on (path, leaf).

    Returns:
        Dictionary from path to leaf, in the tree's order.

    Raises:
        ValueError: If no leaf is prunable.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> list(prunable_leaves(params))
        ['Dense_0/kernel']
    """
    leaves = named_leaves(params)
    chosen = {path: leaf for path, leaf in leaves.items() if prunable(path, leaf)}
    if not chosen:
        listed = ", ".join(list(leaves)[:5]) or "none at all"
        raise ValueError(
            "no parameter is prunable: the predicate chose none of the "
            f"{len(leaves)} leaves ({listed}); pass prunable=lambda path, leaf: ..."
        )
    for path, leaf in chosen.items():
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter '{path}' is of dtype {dtype}, but only floating-point "
                "weights can be pruned; leave it out with prunable=..."
            )
    return chosen


def map_prunable(
    fn: Callable[[str, Any], Any], params: Any, prunable: Prunable = is_kernel
) -> Any:
    """Maps ``fn(path, leaf)`` over prunable leaves, with ``MaskedNode`` elsewhere.

    Raises:
        ValueError: If no leaf is prunable.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> map_prunable(lambda path, leaf: leaf.size, params)
        {'bias': MaskedNode(), 'kernel': 6}
    """
    chosen = prunable_leaves(params, prunable)

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_name(path)
        return fn(name, chosen[name]) if name in chosen else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_boxed)


def is_boxed(node: Any) -> bool:
    """Whether a node is a box that Flax puts around an array, with its metadata.

    Values per leaf are scalars and stay out of the box: its metadata, such as the axes
    that the array is sharded over, would not fit them.

    Example:
        >>> is_boxed(nnx.Param(jnp.ones(3))), is_boxed(jnp.ones(3))
        (True, False)
    """
    return isinstance(node, meta.AxisMetadata | nnx.Variable)


def is_masked(node: Any) -> bool:
    """Whether a node stands in the place of what is not prunable.

    Example:
        >>> is_masked(optax.MaskedNode())
        True
    """
    return isinstance(node, optax.MaskedNode)


def map_where_prunable(fn: Callable[..., Any], values: Any, *trees: Any) -> Any:
    """Maps ``fn(path, value, *leaves)`` over per-leaf values and whole trees.

    Where the value is a ``MaskedNode``, the first tree's part stays as it is.

    Example:
        >>> values = {"bias": optax.MaskedNode(), "kernel": 2.0}
        >>> params = {"bias": 1.0, "kernel": 3.0}
        >>> map_where_prunable(lambda path, v, w: v * w, values, params)
        {'bias': 1.0, 'kernel': 6.0}
    """

    def visit(path: tuple[Any, ...], value: Any, first: Any, *rest: Any) -> Any:
        if is_masked(value):
            return first
        name = path_name(path)
        return jax.tree.map(lambda *leaves: fn(name, value, *leaves), first, *rest)

    return jax.tree_util.tree_map_with_path(visit, values, *trees, is_leaf=is_masked)


def check_same_structure(values: Any, params: Any) -> None:
    """Raises unless a tree of per-leaf values belongs to these parameters.

    Args:
        values: Scalars (or ``MaskedNode``) in the structure of the parameters that the
            state was initialised with.
        params: Pytree of arrays.

    Raises:
        ValueError: With a path that only one of the two has.

    Example:
        >>> check_same_structure({"kernel": 0.5}, {"kernel": jnp.ones(3)})
    """

    def fits(value: Any, part: Any) -> bool:
        whole = is_masked(value) or is_boxed(part)
        return whole or jax.tree_util.all_leaves([part])

    try:
        pairs = jax.tree.map(fits, values, params, is_leaf=is_masked)
        same = all(jax.tree.leaves(pairs))
    except (ValueError, TypeError, KeyError):
        same = False
    if not same:
        known, given = named_leaves(values), named_leaves(params)
        missing = next((path for path in known if path not in given), None)
        places = jax.tree_util.tree_leaves_with_path(values, is_leaf=is_masked)
        names = {path_name(path) for path, _ in places}
        extra = next((path for path in given if path not in names), None)
        what = (
            f"'{missing}' is missing from the params"
            if missing
            else f"the params have other leaves besides, such as '{extra}'"
        )
        listed = ", ".join(list(given)[:3]) or "none at all"
        raise ValueError(
            "these params do not have the structure that the optimizer state was "
            f"initialised with: {what} (they hold {listed}); NNX models have "
            "st3jax.nnx.sparsify(model, optimizer)"
        )
