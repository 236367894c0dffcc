"""Drop and regrow: the transform that methods with a moving mask share.

The raw weights are themselves sparse. From time to time the smallest of them are
removed, and as many positions are given back to training. Methods differ in how sparse
they start and end, in what decides where to grow, and in the gradient that the
optimizer sees.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax.checks import check_choice, check_optimizer, check_steps
from st3jax.engine.seeds import key_of
from st3jax.engine.updates import clear_state, pin
from st3jax.rule.distributions import layer_sparsities
from st3jax.rule.rule import make_rule
from st3jax.selection.keys import from_key, score_dtype, to_key, widened
from st3jax.selection.quantile import threshold
from st3jax.selection.ranking import largest
from st3jax.trees import (
    Prunable,
    check_same_structure,
    is_masked,
    map_prunable,
    map_where_prunable,
    named_leaves,
    prunable_leaves,
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
        frozen: bool [], whether the mask is fixed; ``optax.MaskedNode`` if it never
            will be.
        seed: uint32 [2], where random growth starts from; ``optax.MaskedNode`` if
            growth is not random.
        inner_state: State of the wrapped optimizer, zero at inactive weights.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    masks: Any
    frozen: jax.Array | optax.MaskedNode
    seed: jax.Array | optax.MaskedNode
    inner_state: optax.OptState

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`.

        Inactive weights are zero. They receive their gradient nevertheless, until the
        mask is fixed: it tells where to grow.
        """
        check_same_structure(self.masks, params)
        if isinstance(self.frozen, optax.MaskedNode):
            dense = jnp.ones([], bool)
        else:
            dense = ~self.frozen
        return map_where_prunable(
            lambda path, mask, w: _masked(jnp.asarray(w), mask, mask | dense),
            self.masks,
            params,
        )


@jax.custom_vjp
def _masked(w: jax.Array, mask: jax.Array, reached: jax.Array) -> jax.Array:
    """The weight where the mask is; its gradient wherever it is to be reached."""
    del reached
    return jnp.where(mask, w, jnp.zeros_like(w))


def _masked_bwd(reached: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.where(reached, g, jnp.zeros_like(g)), None, None


_masked.defvjp(
    lambda w, mask, reached: (_masked(w, mask, reached), reached), _masked_bwd
)


def random_masks(
    seed: jax.Array, leaves: Leaves, sparsity: Any, distribution: str
) -> Leaves:
    r"""Masks with random positions and an exact number of them for each layer.

    Layer :math:`l` with :math:`n_l` weights and the density :math:`d_l` of the
    distribution keeps :math:`d_l n_l` of them, rounded to the nearest integer.

    Args:
        seed: uint32 [2].
        leaves: From path to array.
        sparsity: Share of all weights that is inactive, a scalar in [0, 1].
        distribution: ``"erk"`` or ``"uniform"``.

    Returns:
        From path to a bool array, true where a weight is active.

    Example:
        >>> leaves, seed = {"kernel": jnp.ones((4, 4))}, jnp.array([0, 1], jnp.uint32)
        >>> masks = random_masks(seed, leaves, 0.75, "uniform")
        >>> int(masks["kernel"].sum())
        4
    """
    shapes = {path: jnp.shape(w) for path, w in leaves.items()}
    with jax.enable_x64(True):
        each = layer_sparsities(distribution, shapes, sparsity)
        kept = {
            path: jnp.round((1 - each[path]) * leaves[path].size).astype(jnp.int32)
            for path in leaves
        }
    return {
        path: largest(
            jax.random.uniform(key_of(seed, i), shapes[path], jnp.float32),
            kept[path],
            among=jnp.ones_like(w, bool),
        )
        for i, (path, w) in enumerate(leaves.items())
    }


def regrowth(
    inner: optax.GradientTransformation,
    *,
    drop: Callable[[jax.Array, jax.Array], jax.Array],
    growth: str = "gradient",
    asked: Asked | None = None,
    initial_sparsity: Any = 0.0,
    distribution: str = "erk",
    seed: jax.Array | None = None,
    mask_gradient: bool = False,
    update_every: Any,
    freeze_step: Any = None,
    prunable: Prunable,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a method that drops and regrows, made of its ingredients.

    Args:
        inner: The optimizer that trains the active weights.
        drop: From completed steps and active weights of a layer (int64 []) to how many
            of them to drop; called in 64-bit mode.
        growth: One of ``GROWTHS``: where the gradient is largest, or anywhere.
        asked: From completed steps (int64 []) to the sparsity that is to be reached by
            pruning, if any is; called in 64-bit mode.
        initial_sparsity: Share of inactive weights at the start, if there is a seed.
        distribution: How that is spread over layers, ``"erk"`` or ``"uniform"``.
        seed: uint32 [2] for what is random; without one all weights start active.
        mask_gradient: Whether the optimizer sees the gradient of active weights only.
        update_every: Steps from one change of the mask to the next.
        freeze_step: Number of completed steps at which the mask is fixed, if ever.
        prunable: Predicate on (path, leaf).

    Returns:
        A transform with state :class:`RegrowthState`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``inner`` is not an optimizer or ``prunable`` not a function.
    """
    _check_arguments(inner, distribution, prunable, update_every)
    inner = optax.with_extra_args_support(inner)

    def init_masks(params: optax.Params) -> Any:
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return jnp.ones([], bool)
        leaves = prunable_leaves(params, prunable)
        if seed is None:
            found = {path: jnp.ones_like(w, bool) for path, w in leaves.items()}
        else:
            found = random_masks(seed, leaves, initial_sparsity, distribution)
        masks = map_prunable(lambda path, _: found[path], params, prunable)
        return jax.tree.map(_in_box, masks, params, is_leaf=is_masked)

    def init_fn(params: optax.Params) -> RegrowthState:
        return RegrowthState(
            count=jnp.zeros([], jnp.int32),
            masks=init_masks(params),
            frozen=optax.MaskedNode() if freeze_step is None else jnp.zeros([], bool),
            seed=jnp.array(seed) if growth == "random" else optax.MaskedNode(),
            inner_state=inner.init(params),
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
            masks = _pruned(masks, weights, asked, count)
        moved = {
            path: _moved(mask, weights[path], scores[path], number(count, mask))
            for path, mask in masks.items()
        }
        kept = {path: mask & moved[path] for path, mask in masks.items()}
        structure = jax.tree.structure(state.masks)
        return (
            jax.tree.unflatten(structure, moved.values()),
            jax.tree.unflatten(structure, kept.values()),
        )

    def number(count: jax.Array, mask: jax.Array) -> jax.Array:
        """How many weights of a leaf to drop after ``count`` completed steps."""
        with jax.enable_x64(True):
            count, active = count.astype(jnp.int64), mask.sum(dtype=jnp.int64)
            dropped = jnp.clip(drop(count, active), 0, active)
            if freeze_step is not None:
                dropped = jnp.where(count < freeze_step, dropped, 0)
            return dropped.astype(jnp.int32)

    def timing(count: jax.Array, state: RegrowthState) -> tuple[jax.Array, Any]:
        """Whether the mask may change after this step, and whether it is fixed then."""
        with jax.enable_x64(True):
            count = count.astype(jnp.int64)
            due = count % update_every == 0
            if freeze_step is None:
                return due, state.frozen
            frozen = count.astype(jnp.float64) >= freeze_step
            return (due | frozen) & ~state.frozen, frozen

    def update_fn(
        updates: optax.Updates,
        state: RegrowthState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RegrowthState]:
        if params is None:
            raise ValueError(
                "masks move with the weights, so update needs them: call "
                "tx.update(grads, opt_state, params)"
            )
        seen, grads = state.effective_params(params), updates
        if mask_gradient:
            updates = _only(state.masks, updates)
        updates, inner_state = inner.update(
            updates, state.inner_state, seen, **extra_args
        )
        updates = map_where_prunable(
            lambda path, mask, u: pin(u, state.count), state.masks, updates
        )
        stepped = optax.apply_updates(seen, updates)
        # Compare what the next step will see, to the last bit.
        stepped = jax.tree.map(jax.lax.optimization_barrier, stepped)
        count = optax.safe_increment(state.count)
        due, frozen = timing(count, state)
        masks, kept = jax.lax.cond(
            due,
            lambda: move(count, state, stepped, grads),
            lambda: (state.masks, state.masks),
        )
        updates = map_where_prunable(
            lambda path, keep, u, w: jnp.where(keep, u, -w), kept, updates, params
        )
        return updates, state._replace(
            count=count,
            masks=masks,
            frozen=frozen,
            inner_state=clear_state(inner_state, _over(kept, params)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _in_box(mask: Any, part: Any) -> Any:
    """The mask in the box of its weight, if any: it is sharded the same way."""
    return mask if is_masked(mask) else jax.tree.map(lambda _: mask, part)


def _over(masks: Any, params: Any) -> Any:
    """The masks in the structure of the parameters."""
    return map_where_prunable(lambda path, mask, w: mask, masks, params)


def _only(masks: Any, tree: Any) -> Any:
    """The tree, zero where weights are inactive."""
    return map_where_prunable(
        lambda path, mask, x: jnp.where(mask, x, jnp.zeros_like(x)), masks, tree
    )


def _random_scores(key: jax.Array, masks: Leaves) -> Leaves:
    return {
        path: jax.random.uniform(jax.random.fold_in(key, i), mask.shape, jnp.float32)
        for i, (path, mask) in enumerate(masks.items())
    }


def _pruned(masks: Leaves, weights: Leaves, asked: Asked, count: jax.Array) -> Leaves:
    """What is left of the masks at the sparsity asked for, of all leaves together."""
    dtype = score_dtype(*(jnp.result_type(weights[path]) for path in masks))
    sizes = {path: _sizes(mask, weights[path], dtype) for path, mask in masks.items()}
    with jax.enable_x64(True):
        sparsity = jnp.asarray(asked(count.astype(jnp.int64)), jnp.float64)
        total = sum(mask.size for mask in masks.values())
        active = sum(mask.sum(dtype=jnp.int64) for mask in masks.values())
        removed = jnp.floor(sparsity * (total - 1)) + 1  # as selection counts
        more = (sparsity > 0) & (removed > total - active)

    def prune() -> Leaves:
        t = to_key(threshold(sizes, sparsity))
        return {path: mask & (to_key(sizes[path]) > t) for path, mask in masks.items()}

    return jax.lax.cond(more, prune, lambda: masks)


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


def _check_arguments(
    inner: Any, distribution: str, prunable: Any, update_every: Any
) -> None:
    """Raises early, before anything is compiled, for what can be known early."""
    check_optimizer(inner)
    check_choice(distribution, "distribution", ("erk", "uniform"))
    make_rule(
        criterion="l1",
        distribution=distribution,
        budget="weights",
        costs=None,
        pattern=None,
        block_shape=None,
        prunable=prunable,
        axis_name=None,
    )
    check_steps(update_every, "update_every", 1)
