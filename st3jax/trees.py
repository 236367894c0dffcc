"""Which leaves of a parameter pytree are prunable, and how to walk over them.

A tree of per-leaf values (thresholds, masks) has the structure of the parameters, with
an ``optax.MaskedNode`` in the place of every leaf that is not prunable.
"""

import functools
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
    "all_paths",
    "check_same_structure",
    "in_place_of",
    "is_boxed",
    "is_kernel",
    "is_masked",
    "is_placeholder",
    "kernel_mask",
    "map_named",
    "map_where_prunable",
    "named_leaves",
    "path_name",
    "per_leaf_tree",
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
    """The names of a key path joined by ``/``.

    Example:
        >>> path_name((jax.tree_util.DictKey("Dense_0"), jax.tree_util.DictKey("bias")))
        'Dense_0/bias'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


def kernel_mask(params: Any) -> Any:
    """Which parameters are kernels: for weight decay and the like.

    Args:
        params: Pytree of arrays or of abstract arrays.

    Returns:
        Pytree of booleans in its structure, ``True`` where :func:`is_kernel` is.

    Example:
        >>> kernel_mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
        >>> decay = optax.add_decayed_weights(1e-4, mask=kernel_mask)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, node: is_kernel(path_name(path), _content(node)),
        params,
        is_leaf=is_boxed,
    )


def is_boxed(node: Any) -> bool:
    """Whether a node is a box that Flax puts around an array, with its metadata.

    Values per leaf are scalars and stay out of the box: its metadata, such as the axes
    that the array is sharded over, would not fit them.

    Example:
        >>> is_boxed(nnx.Param(jnp.ones(3))), is_boxed(jnp.ones(3))
        (True, False)
    """
    return isinstance(node, meta.AxisMetadata | nnx.Variable)


def _content(node: Any) -> Any:
    """The leaf itself, out of its box if it is in one."""
    return next(iter(jax.tree.leaves(node)), None) if is_boxed(node) else node


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path names, in the tree's order.

    Raises:
        ValueError: If two leaves have the same name.

    Example:
        >>> list(named_leaves({"b": {"kernel": 1.0}, "a": 2.0}))
        ['a', 'b/kernel']
    """
    leaves: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_boxed):
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                f"two parameters are called '{name}': rename one, so that a predicate "
                "can tell them apart"
            )
        leaves[name] = _content(node)
    return leaves


def all_paths(tree: Any) -> list[str]:
    """The path names of all leaves, those that a wrapper has masked included.

    Example:
        >>> all_paths({"b": optax.MaskedNode(), "a": 2.0})
        ['a', 'b']
    """
    places = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_value)
    return [path_name(path) for path, _ in places]


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
    if is_placeholder(params):
        return {"": jnp.zeros([])}
    leaves = named_leaves(params)
    chosen = {path: leaf for path, leaf in leaves.items() if prunable(path, leaf)}
    if not chosen:
        listed = ", ".join(list(leaves)[:5]) or "none at all"
        raise ValueError(
            "no parameter is prunable: the predicate chose none of the "
            f"{len(leaves)} leaves ({listed}); {_predicate_for(leaves)}"
        )
    for path, leaf in chosen.items():
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter '{path}' is of dtype {dtype}, but only floating-point "
                "weights can be pruned; leave it out with prunable=..."
            )
    return chosen


def _predicate_for(leaves: dict[str, Any]) -> str:
    """Which predicate to pass where the default has found no kernel."""
    for path, leaf in leaves.items():
        if path.rpartition("/")[2] == "weight" and getattr(leaf, "ndim", 0) >= 2:
            return (
                f"kernels are called weight here, as '{path}': pass prunable=lambda "
                'path, leaf: path.endswith("weight") and leaf.ndim >= 2, and leave '
                "out embeddings by their path"
            )
    return "pass prunable=lambda path, leaf: ..."


def per_leaf_tree(params: Any, values: dict[str, Any]) -> Any:
    """A tree like the parameters, with a value for each prunable leaf.

    Args:
        params: Pytree of arrays, or the place holder that ``optax.tree.map_params``
            initialises a transform with.
        values: From the path of each prunable leaf to its value.

    Returns:
        Tree with the values, and a ``MaskedNode`` where a leaf is not prunable.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> per_leaf_tree(params, {"kernel": 6})
        {'bias': MaskedNode(), 'kernel': 6}
    """
    if is_placeholder(params):
        return next(iter(values.values()))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values.get(path_name(path), optax.MaskedNode()),
        params,
        is_leaf=is_boxed,
    )


def is_placeholder(params: Any) -> bool:
    """Whether these are no parameters but stand for them, in ``optax.tree.map_params``.

    Example:
        >>> is_placeholder({"kernel": 1.0})
        False
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def is_masked(node: Any) -> bool:
    """Whether a node stands in the place of what is not prunable.

    Example:
        >>> is_masked(optax.MaskedNode())
        True
    """
    return isinstance(node, optax.MaskedNode)


def map_where_prunable(fn: Callable[..., Any], values: Any, *trees: Any) -> Any:
    """Maps ``fn(value, *leaves)`` over per-leaf values and whole trees.

    Where the value is a ``MaskedNode``, the first tree's part stays as it is.

    Example:
        >>> values = {"bias": optax.MaskedNode(), "kernel": 2.0}
        >>> params = {"bias": 1.0, "kernel": 3.0}
        >>> map_where_prunable(lambda v, w: v * w, values, params)
        {'bias': 1.0, 'kernel': 6.0}
    """
    return map_named(lambda _, value, *leaves: fn(value, *leaves), values, *trees)


def map_named(fn: Callable[..., Any], values: Any, *trees: Any) -> Any:
    """The same for ``fn(path, value, *leaves)``.

    Example:
        >>> values = {"bias": optax.MaskedNode(), "kernel": 2.0}
        >>> map_named(lambda path, v, w: path, values, {"bias": 1.0, "kernel": 3.0})
        {'bias': 1.0, 'kernel': 'kernel'}
    """

    def visit(path: tuple[Any, ...], value: Any, first: Any, *rest: Any) -> Any:
        if is_masked(value):
            return first
        named = functools.partial(fn, path_name(path))
        if is_boxed(value):
            return jax.tree.map(named, value, first, *rest)
        return jax.tree.map(functools.partial(named, value), first, *rest)

    return jax.tree_util.tree_map_with_path(visit, values, *trees, is_leaf=_is_value)


def in_place_of(values: Any, leaves: dict[str, Any]) -> Any:
    """A tree like that of per-leaf values, with other values by their path names.

    Example:
        >>> values = {"bias": optax.MaskedNode(), "kernel": 2.0}
        >>> in_place_of(values, {"kernel": 3.0})
        {'bias': MaskedNode(), 'kernel': 3.0}
    """
    names = named_leaves(values)
    return jax.tree.unflatten(
        jax.tree.structure(values), [leaves[name] for name in names]
    )


def _is_value(node: Any) -> bool:
    return is_masked(node) or is_boxed(node)


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
        raise ValueError(
            "these params do not have the structure that the optimizer state was "
            f"initialised with: {_difference(values, params)}"
        )


def _difference(values: Any, params: Any) -> str:
    """What only one of the two has, and what to pass if a model was given."""
    known, given = named_leaves(values), named_leaves(params)
    missing = next((path for path in known if path not in given), None)
    names = all_paths(values)
    extra = next((path for path in given if path not in names), None)
    nnx_model = _holds_nnx(params)
    if extra and not (missing or nnx_model or hasattr(given[extra], "dtype")):
        return (
            f"'{extra}' is no array but of type {type(given[extra]).__name__}; pass "
            "the part of the model that the optimizer was initialised with, such as "
            "eqx.filter(model, eqx.is_inexact_array) of an Equinox module"
        )
    what = (
        f"'{missing}' is missing from the params"
        if missing
        else f"the params have other leaves besides, such as '{extra}'"
    )
    listed = ", ".join(list(given)[:3]) or "none at all"
    way_out = (
        "; NNX models have st3jax.nnx.sparsify(model, optimizer), and finalize and "
        "summary there"
    )
    return f"{what} (they hold {listed}){way_out * nnx_model}"


def _holds_nnx(tree: Any) -> bool:
    """Whether a tree is or holds a module, a state or a variable of Flax NNX."""

    def is_nnx(node: Any) -> bool:
        return isinstance(node, nnx.Module | nnx.State | nnx.Variable)

    return any(map(is_nnx, jax.tree.leaves(tree, is_leaf=is_nnx)))
