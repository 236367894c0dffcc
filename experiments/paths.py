"""The leaves of a tree by their paths: names joined by ``/``, as st3jax has them."""

from typing import Any

import jax

import st3jax

__all__ = ["by_path", "kernels"]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree from path to leaf, in the tree's order."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def kernels(params: Any) -> dict[str, Any]:
    """The kernels among the parameters from path to leaf, in the tree's order."""
    return {k: leaf for k, leaf in by_path(params).items() if st3jax.is_kernel(k, leaf)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
