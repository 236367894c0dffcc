"""Drop and regrow: the transform that methods with a moving mask share.

The raw weights are themselves sparse. From time to time the smallest of them are
removed from each kernel, and as many positions of it are given back to training.
Methods differ in how sparse they start and end, in what decides where to grow, and in
the gradient that the optimizer sees.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import check_choice, check_steps
from st3jax.engine.seeds import key_of, numbers_for
from st3jax.engine.step import first_count, sparse_transform
from st3jax.engine.updates import clear_state
from st3jax.layout.letters import (
    Layouts,
    each_kernel,
    from_kernels,
    stack_shape,
    to_kernels,
)
from st3jax.layout.settle import as_structure
from st3jax.rule.distributions import layer_sparsities
from st3jax.selection.keys import choose, from_key, score_dtype, to_key, widened
from st3jax.selection.quantile import threshold
from st3jax.selection.ranking import largest, whole
from st3jax.selection.wide import wide
from st3jax.trees import (
    Prunable,
    Static,
    check_same_structure,
    is_masked,
    is_placeholder,
    map_where_prunable,
    named_leaves,
    per_leaf_tree,
)

__all__ = ["GROWTHS", "RegrowthState", "random_masks", "regrowth"]

GROWTHS = ("gradient", "random")
"""What decides where weights grow."""

Leaves = dict[str, jax.Array]
Asked = Callable[[jax.Array], jax.Array]


class RegrowthState(NamedTuple):
    """State of a method with a moving mask: one byte for each prunable weight.

    Attributes:
        count: int32 [], completed steps.
        masks: bool array of its shape for each prunable leaf, true where a weight is
            active; ``optax.MaskedNode`` elsewhere.
        frozen: bool [], whether the mask is fixed.
        seed: uint32 [2], where random growth starts from.
        layouts: Static, from the path of each prunable leaf to what its axes are.
        inner_state: State of the wrapped optimizer, zero at inactive weights.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    masks: Any
    frozen: jax.Array
    seed: jax.Array
    layouts: Static
    inner_state: optax.OptState

    @property
    def per_leaf(self) -> Any:
        """The tree that says which leaves are prunable."""
        return self.masks

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`.

        Inactive weights are zero. The gradient of theirs tells where to grow.
        """
        check_same_structure(self.masks, params)
        return map_where_prunable(
            lambda mask, w: ops.straight_through(w, _only(mask, w)), self.masks, params
        )


def _only(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Weights, or what belongs to them, zero where they are inactive."""
    x = jnp.asarray(x)
    return choose(mask, x, jnp.zeros_like(x))


def random_masks(
    seed: jax.Array,
    leaves: Leaves,
    layouts: Layouts,
    sparsity: Any,
    distribution: str,
) -> Leaves:
    r"""Masks with random positions and an exact number of them for each kernel.

    Kernel :math:`l` with :math:`n_l` weights and the density :math:`d_l` of the
    distribution keeps :math:`d_l n_l` of them, rounded to the nearest integer.

    Args:
        seed: uint32 [2].
        leaves: From path to array.
        layouts: From path to a letter for each axis.
        sparsity: Share of all weights that is inactive, a scalar in [0, 1].
        distribution: ``"erk"`` or ``"uniform"``.

    Returns:
        From path to a bool array, true where a weight is active.

    Example:
        >>> leaves, seed = {"kernel": jnp.ones((4, 4))}, jnp.array([0, 1], jnp.uint32)
        >>> masks = random_masks(seed, leaves, {"kernel": "io"}, 0.75, "uniform")
        >>> int(masks["kernel"].sum())
        4
    """
    shapes = {path: jnp.shape(w) for path, w in leaves.items()}
    kept = _numbers_kept(distribution, shapes, layouts, sparsity)
    scores = _random_scores(key_of(seed), leaves)

    def draw(path: str) -> jax.Array:
        def of_kernel(among: jax.Array, scores: jax.Array) -> jax.Array:
            return largest(scores, kept[path], among=among)

        every = jnp.ones_like(leaves[path], bool)  # on the devices of the weights
        return _map_kernels(of_kernel, layouts[path], every, scores[path])

    return {path: draw(path) for path in leaves}


def _map_kernels(fn: Any, layout: str, *arrays: jax.Array) -> jax.Array:
    """A function from arrays of a kernel to one, applied to every kernel of a leaf."""
    kernels = [to_kernels(x, layout) for x in arrays]
    if "s" in layout:  # as those of one kernel are ranked on all devices
        kernels = [whole(x) for x in kernels]
    return from_kernels(each_kernel(fn, layout)(*kernels), layout, arrays[0])


def _random_scores(key: jax.Array, leaves: Leaves) -> Leaves:
    """A random number for every weight, from path to float32."""
    return {path: x[0] for path, x in numbers_for(key, leaves).items()}


@wide
def _numbers_kept(
    distribution: str,
    shapes: dict[str, tuple[int, ...]],
    layouts: Layouts,
    sparsity: Any,
) -> dict[str, jax.Array]:
    """How many weights each kernel of a leaf keeps, int32 []."""
    each = layer_sparsities(distribution, shapes, sparsity, layouts)

    def kept(path: str, shape: tuple[int, ...]) -> jax.Array:
        kernels = max(math.prod(stack_shape(layouts[path], shape)), 1)
        weights = math.prod(shape) // kernels
        return jnp.round((1 - each[path]) * weights).astype(jnp.int32)

    return {path: kept(path, shape) for path, shape in shapes.items()}


def regrowth(
    inner: optax.GradientTransformation,
    *,
    drop: Callable[[jax.Array, jax.Array], jax.Array],
    growth: str = "gradient",
    asked: Asked | None = None,
    initial_sparsity: Any = 0.0,
    distribution: str = "erk",
    seed: jax.Array | None = None,
    masks_gradient: bool = False,
    update_every: Any,
    freeze_step: Any = None,
    prunable: Prunable,
    layout: Layouts | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a method that drops and regrows, made of its ingredients.

    Args:
        inner: The optimizer that trains the active weights.
        drop: From completed steps (int64 []) and the active weights of a kernel
            (float64 []) to how many of them to drop, a whole number.
        growth: One of ``GROWTHS``: where the gradient is largest, or anywhere.
        asked: From completed steps (int64 []) to the sparsity that is to be reached by
            pruning (float64 []), if any is.
        initial_sparsity: Share of inactive weights at the start, if there is a seed.
        distribution: How that is spread over layers, ``"erk"`` or ``"uniform"``.
        seed: uint32 [2] for what is random; without one all weights start active.
        masks_gradient: Whether the optimizer sees the gradient of active weights only.
            Once the mask is fixed, it sees no other.
        update_every: Steps from one change of the mask to the next.
        freeze_step: Number of completed steps at which the mask is fixed, if ever.
        prunable: Predicate on (path, leaf).
        layout: What the user said of the axes of leaves.

    Returns:
        A transform with state :class:`RegrowthState`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``inner`` is not an optimizer or ``prunable`` not a function.
    """
    check_choice(growth, "growth", GROWTHS)
    check_choice(distribution, "distribution", ("erk", "uniform"))
    check_steps(update_every, "update_every", 1)

    needs = {"the number of weights that a kernel drops": "kernels"}
    if seed is not None and distribution == "erk":
        needs["distribution 'erk'"] = "axes"

    def init(leaves: Leaves, layouts: Layouts, params: optax.Params) -> RegrowthState:
        if seed is None or is_placeholder(params):
            found = {path: jnp.ones_like(w, bool) for path, w in leaves.items()}
        else:
            found = random_masks(seed, leaves, layouts, initial_sparsity, distribution)
        masks = per_leaf_tree(params, found)
        if not is_placeholder(params):
            masks = jax.tree.map(_in_box, masks, params, is_leaf=is_masked)
        return RegrowthState(
            count=first_count(),
            masks=masks,
            frozen=jnp.zeros([], bool),
            # A copy, as states are donated.
            seed=jnp.zeros(2, jnp.uint32) if seed is None else jnp.array(seed),
            layouts=as_structure(layouts, params),
            inner_state=None,
        )

    def gradients(state: RegrowthState, grads: Any, _: Any) -> Any:
        """Of active weights alone, where others do not count or never will."""
        dense = jnp.asarray(not masks_gradient) & ~state.frozen
        return (
            map_where_prunable(
                lambda mask, g: _only(mask | dense, g), state.masks, grads
            ),
            state,
        )

    def move(
        count: jax.Array, state: RegrowthState, params: Any, grads: Any
    ) -> tuple[Any, Any]:
        """The next masks, and those of the weights that keep value and momentum."""
        masks = named_leaves(state.masks)
        weights, scores = named_leaves(params), named_leaves(grads)
        if growth == "random":
            scores = _random_scores(key_of(state.seed, count), masks)
        if asked is not None:
            masks = _pruned(masks, weights, wide(asked), count)
        layouts = dict(state.layouts.value)

        def of_kernel(mask: jax.Array, w: jax.Array, scores: jax.Array) -> jax.Array:
            return _moved(mask, w, scores, number(count, mask))

        moved = {
            path: _map_kernels(
                of_kernel, layouts[path], mask, weights[path], scores[path]
            )
            for path, mask in masks.items()
        }
        kept = {path: mask & moved[path] for path, mask in masks.items()}
        structure = jax.tree.structure(state.masks)
        return (
            jax.tree.unflatten(structure, moved.values()),
            jax.tree.unflatten(structure, kept.values()),
        )

    @wide
    def number(count: jax.Array, mask: jax.Array) -> jax.Array:
        """How many weights of a kernel to drop after ``count`` completed steps."""
        active = mask.sum(dtype=jnp.int64).astype(jnp.float64)
        dropped = jnp.clip(drop(count.astype(jnp.int64), active), 0, active)
        if freeze_step is not None:
            dropped = jnp.where(_reached(count, freeze_step), 0, dropped)
        return dropped.astype(jnp.int32)

    def timing(count: jax.Array, state: RegrowthState) -> tuple[jax.Array, jax.Array]:
        """Whether the mask may change after this step, and whether it is fixed then."""
        due = count % update_every == 0
        if freeze_step is None:
            return due, jnp.zeros([], bool)
        frozen = _reached(count, freeze_step)
        return (due | frozen) & ~state.frozen, frozen

    def land(
        state: RegrowthState, updates: Any, params: Any, grads: Any
    ) -> tuple[optax.Updates, RegrowthState]:
        stepped = optax.apply_updates(state.effective_params(params), updates)
        # Compare what the next step will see, to the last bit.
        stepped = jax.tree.map(jax.lax.optimization_barrier, stepped)
        due, frozen = timing(state.count, state)
        masks, kept = jax.lax.cond(
            due,
            lambda: move(state.count, state, stepped, grads),
            lambda: (state.masks, state.masks),
        )
        updates = map_where_prunable(
            lambda keep, u, w: jnp.where(keep, u, -w), kept, updates, params
        )
        over = map_where_prunable(lambda keep, w: keep, kept, params)
        inner_state = clear_state(state.inner_state, over)
        state = state._replace(masks=masks, frozen=frozen, inner_state=inner_state)
        return updates, state

    return sparse_transform(
        inner,
        init,
        land,
        state_type=RegrowthState,
        gradients=gradients if masks_gradient or freeze_step is not None else None,
        seen=lambda state, params: state.effective_params(params),
        prunable=prunable,
        layout=layout,
        needs=needs,
    )


@wide
def _reached(count: jax.Array, step: Any) -> jax.Array:
    """Whether so many steps are completed; ``step`` need not be whole."""
    return count.astype(jnp.float64) >= step


def _in_box(mask: Any, part: Any) -> Any:
    """The mask in the box of its weight, if any: it is sharded the same way."""
    return mask if is_masked(mask) else jax.tree.map(lambda _: mask, part)


def _pruned(masks: Leaves, weights: Leaves, asked: Asked, count: jax.Array) -> Leaves:
    """What is left of the masks at the sparsity asked for, of all leaves together."""
    dtype = score_dtype(*(jnp.result_type(weights[path]) for path in masks))
    sizes = {path: _sizes(mask, weights[path], dtype) for path, mask in masks.items()}
    sparsity, more = _goes_on(masks, asked, count)

    def prune() -> Leaves:
        t = to_key(threshold(sizes, sparsity))
        return {path: mask & (to_key(sizes[path]) > t) for path, mask in masks.items()}

    return jax.lax.cond(more, prune, lambda: masks)


@wide
def _goes_on(
    masks: Leaves, asked: Asked, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sparsity asked for, and whether fewer weights are inactive now."""
    sparsity = jnp.asarray(asked(count.astype(jnp.int64))).astype(jnp.float64)
    total = sum(mask.size for mask in masks.values())
    active = jnp.stack([mask.sum(dtype=jnp.int64) for mask in masks.values()]).sum()
    removed = jnp.floor(sparsity * (total - 1)) + 1  # as selection counts
    return sparsity, (sparsity > 0) & (removed > (total - active).astype(jnp.float64))


def _sizes(mask: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Magnitudes to compare, zero where weights are inactive."""
    size = from_key(jnp.where(mask, to_key(w), 0))
    return widened(size) if dtype == jnp.float64 else size


def _moved(
    mask: jax.Array, w: jax.Array, scores: jax.Array, number: jax.Array
) -> jax.Array:
    """The mask without its smallest weights, grown again where scores are largest."""
    active = mask.sum(dtype=jnp.int32)
    kept = largest(w, active - number, among=mask)
    return kept | largest(scores, number, among=~kept)
