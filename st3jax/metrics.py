"""Counting zeros: what a pruned network has left, kernel by kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from st3jax.base import find_state
from st3jax.fingerprint import check_seen
from st3jax.layout.letters import Layouts
from st3jax.layout.settle import settle
from st3jax.selection.keys import to_key
from st3jax.selection.wide import wide
from st3jax.trees import Prunable, is_kernel, named_leaves, prunable_leaves

__all__ = ["Layer", "Summary", "summary"]


class Layer(NamedTuple):
    """One prunable leaf.

    Attributes:
        shape: Its shape.
        weights: How many weights it has.
        zeros: How many of them are exactly zero, int32 [].
        each: How many of each of its stacked kernels, int32 in the shape of the stacked
            axes, [] where it is one kernel.
    """

    shape: tuple[int, ...]
    weights: int
    zeros: jax.Array
    each: jax.Array


class Summary(NamedTuple):
    """All prunable leaves of a network.

    Attributes:
        layers: From path to :class:`Layer`, in the tree's order.
        weights: How many weights they have together.
        zeros: How many of them are exactly zero, int32 [], int64 in 64-bit mode.
        sparsity: ``zeros / weights``, float32 [], a fraction in [0, 1].
    """

    layers: dict[str, Layer]
    weights: int
    zeros: jax.Array
    sparsity: jax.Array

    def vanished(self) -> list[str]:
        """The kernels of which nothing is left, so that no signal passes.

        Returns:
            Paths, those of stacked kernels with their place: ``"mlp/kernel[3]"``.

        Example:
            >>> summary({"fc": {"kernel": jnp.zeros((2, 2))}}).vanished()
            ['fc/kernel']
        """
        found = []
        for path, layer in self.layers.items():
            each = np.asarray(layer.each)
            gone = layer.weights > 0 and each == layer.weights // max(each.size, 1)
            for place in np.argwhere(gone) if np.ndim(gone) else [()] * bool(gone):
                found.append(path + "".join(f"[{i}]" for i in place))
        return found


def summary(
    params: Any,
    opt_state: Any = None,
    *,
    prunable: Prunable = is_kernel,
    layout: Layouts | None = None,
) -> Summary:
    """Counts the exact zeros of each prunable leaf and of all together.

    Subnormal numbers are not zero; both signs of zero are.

    Args:
        params: Pytree of arrays, as the model sees them: the result of
            :func:`st3jax.sparsify`, :func:`st3jax.finalize` or :func:`st3jax.prune`.
            Raw weights, if an optimizer state is given.
        opt_state: Optimizer state that holds one sparse-training state: what is counted
            is what the model sees with it, of the leaves and kernels that it knows.
        prunable: Predicate on (path, leaf), where there is no state.
        layout: From path to what each axis of a leaf is, where there is no state; see
            :func:`st3jax.st3`.

    Returns:
        A :class:`Summary`. Its counts are arrays, so it works under ``jit`` too.

    Raises:
        ValueError: If no leaf is prunable, or as :func:`st3jax.finalize`.
        TypeError: If a prunable leaf is not of a floating-point dtype.

    Example:
        >>> report = summary({"fc": {"kernel": jnp.array([[0.0, 1.0, -0.0, 2.0]])}})
        >>> int(report.zeros), report.weights, float(report.sparsity)
        (2, 4, 0.5)
        >>> report.layers["fc/kernel"].shape
        (1, 4)
    """
    if opt_state is not None:
        state: Any = find_state(opt_state)
        weights = state.effective_params(params)
        check_seen(state, params, weights)
        params = weights
        known = named_leaves(state.per_leaf)
        leaves = {path: x for path, x in named_leaves(params).items() if path in known}
        told = getattr(state, "layouts", None)
        layouts = dict(told.value) if told else settle(leaves, params, layout, {})
    else:
        leaves = prunable_leaves(params, prunable)
        layouts = settle(leaves, params, layout, {})
    layers = {path: _layer(leaf, layouts.get(path)) for path, leaf in leaves.items()}
    weights = sum(layer.weights for layer in layers.values())
    zeros, sparsity = _total([layer.zeros for layer in layers.values()], weights)
    zeros = zeros.astype(jax.dtypes.canonicalize_dtype(jnp.int64))
    return Summary(layers, weights, zeros, sparsity)


def _layer(leaf: Any, layout: str | None) -> Layer:
    leaf = jnp.asarray(leaf)
    letters = layout or "o" * leaf.ndim
    axes = tuple(axis for axis, letter in enumerate(letters) if letter != "s")
    each = jnp.sum(to_key(leaf) == 0, axes, dtype=jnp.int32)
    return Layer(leaf.shape, leaf.size, jnp.sum(each, dtype=jnp.int32), each)


@wide
def _total(counts: list[jax.Array], weights: int) -> tuple[jax.Array, jax.Array]:
    """How many there are together, and which share of all weights, float32 []."""
    zeros = jnp.sum(jnp.stack(counts).astype(jnp.int64))
    return zeros, (zeros.astype(jnp.float64) / weights).astype(jnp.float32)
