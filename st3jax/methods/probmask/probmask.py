"""ProbMask: a probability for every weight to be kept, learned beside the weights.

Source: Zhou, Zhang, Xu and Zhang, "Effective Sparsification of Neural Networks with
Global Sparsity Constraint", CVPR 2021, arXiv:2105.01571.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from st3jax import ops
from st3jax.checks import (
    as_mapping,
    check_choice,
    check_positive,
    check_steps,
    is_concrete,
)
from st3jax.engine.seeds import key_of, numbers_for, seed_of
from st3jax.engine.step import first_count, sparse_transform
from st3jax.engine.updates import hold_mask, step_onto
from st3jax.fingerprint import first_fingerprint
from st3jax.layout.letters import Layouts
from st3jax.methods.probmask.projection import project
from st3jax.methods.probmask.relaxed_mask import relaxed_mask, relaxed_slope
from st3jax.rule.rule import Rule, check_schedules
from st3jax.schedules import at_step
from st3jax.selection.keys import choose, is_positive, score_dtype, to_key
from st3jax.selection.quantile import threshold
from st3jax.selection.wide import wide
from st3jax.trees import (
    Prunable,
    check_same_structure,
    is_kernel,
    is_masked,
    map_named,
    map_where_prunable,
    named_leaves,
    per_leaf_tree,
)

__all__ = ["DRAWS", "ProbMaskState", "probmask"]

DRAWS = ("largest", "bernoulli")
"""How the mask is chosen in the end: by exact number, or at random as published."""


class ProbMaskState(NamedTuple):
    """State of :func:`probmask`.

    No mask is stored: it is drawn again from ``seed`` and ``count`` whenever it is
    needed, and always comes out the same.

    Attributes:
        count: int32 [], completed steps.
        probabilities: For each prunable leaf a float32 array of its shape, the
            probability that a weight is kept; ``optax.MaskedNode`` elsewhere.
        temperature: float32 [], by which the logits of the next mask are multiplied.
        seed: uint32 [2], what all masks are drawn from.
        frozen: bool [], whether the mask is fixed.
        seen: int32 [], which weights the state has last seen; see
            :func:`st3jax.finalize`.
        probability_state: State of the optimizer of the probabilities.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in Optax
    probabilities: Any
    temperature: jax.Array
    seed: jax.Array
    frozen: jax.Array
    seen: jax.Array
    probability_state: optax.OptState
    inner_state: optax.OptState

    @property
    def per_leaf(self) -> Any:
        """The tree that says which leaves are prunable."""
        return self.probabilities

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees; see :func:`st3jax.sparsify`."""
        check_same_structure(self.probabilities, params)

        def seen(m: jax.Array, w: jax.Array) -> jax.Array:
            raw = jax.lax.stop_gradient(w)
            masked = choose(self.frozen, raw, _times(m, raw))
            return ops.straight_through(w, masked)

        return map_where_prunable(seen, _draw_masks(self), params)


def probmask(
    inner: optax.GradientTransformation,
    sparsity: float | optax.Schedule,
    *,
    key: jax.Array,
    freeze_step: int,
    probability_optimizer: optax.GradientTransformation | None = None,
    temperature: float | optax.Schedule | None = None,
    clip_norm: float | None = None,
    draw: str = "largest",
    prunable: Prunable = is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it is learned which weights to keep, with ProbMask.

    Every prunable weight has a probability :math:`p`, 1 at first. Before
    ``freeze_step`` the model sees, through :func:`st3jax.sparsify`, the weights times
    one relaxed random mask for each step (:func:`relaxed_mask`),

    .. math::
        w_\text{eff} = m w, \qquad
        m = \sigma\!\left(T \left(\log p - \log(1 - p) + \text{noise}\right)\right)

    With the gradient :math:`g` of the loss with respect to :math:`w_\text{eff}`,
    ``inner`` receives that of the weights and ``probability_optimizer`` that of the
    probabilities,

    .. math::
        \frac{\partial L}{\partial w} = m g, \qquad
        \frac{\partial L}{\partial p} =
        g w\, T m (1 - m) \left(\frac{1}{p} + \frac{1}{1 - p}\right)

    and after each step the probabilities move to the nearest ones whose sum is at most
    :math:`n (1 - s(c))` after :math:`c` completed steps (:func:`project`). While the
    sparsity is 0, all :math:`p` are exactly 1, and training is dense training.

    Until ``freeze_step`` masks are relaxed, and the weights that the model sees are
    small rather than zero: neither :func:`st3jax.sparsify` nor
    :func:`st3jax.finalize` gives a sparse network before. At ``freeze_step`` a mask
    of zeros and ones is chosen and the weights become :math:`m w`; from then on zeros
    stay exactly zero, whatever ``inner`` asks for, and the other weights train on.

    Gradients have to come through :func:`st3jax.sparsify` with the state that
    ``update`` gets, and averaged over devices if there are several: every device draws
    the same mask, whatever the sharding, from ``key`` and the number of steps. One
    mask is drawn for each step, where the authors average the gradients of two.
    Weights that ``shard_map`` shards by hand are not supported.

    The state takes 4 bytes a prunable weight for :math:`p` and what
    ``probability_optimizer`` needs: 12 bytes with Adam. Everything about masks is
    computed in float32.

    This transform has to see the final updates: wrap everything that changes updates
    in ``inner``. Clip the gradients with ``clip_norm``, not before this transform.
    Wrappers that call an optimizer as a whole (``optax.MultiSteps``,
    ``optax.apply_if_finite``, ...) go outside. Call ``update`` under ``jax.jit``.
    ``optax.inject_hyperparams(probmask, ...)`` needs
    ``static_args=("prunable", "key", "freeze_step")``.

    Args:
        inner: The optimizer that trains the raw weights.
        sparsity: Share of prunable weights to be zero, in [0, 1]: a number, or a
            schedule such as :func:`st3jax.polynomial_ramp`.
        key: One random key. Runs with the same key draw the same masks.
        freeze_step: Number of completed steps at which the mask is fixed, not before
            the sparsity has reached its final value.
        probability_optimizer: The optimizer of the probabilities, the authors'
            ``optax.adam(6e-3)`` by default. It receives no weight decay, and no
            schedule, but its own.
        temperature: The factor :math:`T` above 0, a number or a schedule of completed
            steps :math:`c`; by default the authors'
            :math:`1 / (0.97 (1 - c / \text{freeze\_step}) + 0.03)`.
        clip_norm: The largest global norm of the gradients of all parameters and all
            probabilities together, above 0; they are scaled down to it before both
            optimizers. Not clipped by default.
        draw: How the mask is chosen at ``freeze_step``. ``"largest"`` keeps the most
            probable weights: of :math:`n` weights
            :math:`\lfloor s (n - 1) \rfloor + 1` are removed, and equal probabilities
            go together, but never those of 1. ``"bernoulli"`` (the authors' way) keeps
            each weight with its probability; the number is random.
        prunable: Predicate on (path, leaf), where the path is the names joined by
            ``/``; the default takes every convolution and dense kernel.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with state :class:`ProbMaskState`.

    Raises:
        ValueError: If an argument is out of its range, if no probability could be
            learned before ``freeze_step``, if ``init`` finds no prunable leaf, or if
            ``update`` is called without params or with others than those of ``init``.
        TypeError: If an argument is of a wrong type, such as a mapping for
            ``sparsity``, or a prunable leaf is not of a floating-point dtype.

    Example:
        >>> import st3jax
        >>> tx = probmask(
        ...     optax.sgd(0.1, momentum=0.9),
        ...     sparsity=st3jax.polynomial_ramp(0.75, begin=0, end=8),
        ...     key=jax.random.key(0),
        ...     freeze_step=10,
        ... )
        >>> params = {"kernel": jax.random.normal(jax.random.key(1), (8, 8))}
        >>> opt_state = tx.init(params)
        >>> def loss_fn(params):
        ...     w = st3jax.sparsify(params, opt_state)["kernel"]
        ...     return ((w - 1.0) ** 2).sum()
        >>> update = jax.jit(tx.update)
        >>> for _ in range(10):
        ...     updates, opt_state = update(
        ...         jax.grad(loss_fn)(params), opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((st3jax.finalize(params, opt_state)["kernel"] == 0).sum())
        48

    References:
        arXiv:2105.01571; the temperature and the rates are those of the authors' code.
    """
    if probability_optimizer is None:
        probability_optimizer = _adam()
    _check_arguments(probability_optimizer, clip_norm, draw)
    seed = seed_of(key)
    _check_schedules(sparsity, freeze_step, temperature)

    def temperature_at(count: jax.Array) -> jax.Array:
        if temperature is not None:
            return at_step(temperature, count).astype(jnp.float32)
        passed = jnp.minimum(count.astype(jnp.float32) / freeze_step, 1)
        return 1 / (0.97 * (1 - passed) + 0.03)

    def init(
        leaves: dict[str, Any], layouts: Layouts, params: optax.Params
    ) -> ProbMaskState:
        del layouts  # probabilities of all kernels are compared
        probabilities = jax.tree.map(  # in the boxes of the weights, sharded like them
            lambda mark, part: mark if is_masked(mark) else jax.tree.map(_ones, part),
            per_leaf_tree(params, dict.fromkeys(leaves, True)),
            params,
            is_leaf=is_masked,
        )
        return ProbMaskState(
            count=first_count(),
            probabilities=probabilities,
            temperature=temperature_at(first_count()),
            seed=jnp.array(seed),  # a copy, as states are donated
            frozen=jnp.zeros([], bool),
            seen=first_fingerprint(),
            probability_state=probability_optimizer.init(probabilities),
            inner_state=None,
        )

    def clipped(grads: Any) -> Any:
        return grads if clip_norm is None else _clip(grads, clip_norm)

    def learn(state: ProbMaskState, grads: Any, params: Any) -> tuple[Any, Any, Any]:
        """The gradient of the weights, and the probabilities after the step."""
        masks = _draw_masks(state)
        slopes = map_where_prunable(
            lambda m, g, w, p: relaxed_slope(m, p, state.temperature) * _product(g, w),
            masks,
            _where_prunable(masks, grads),
            params,
            state.probabilities,
        )
        grads = map_where_prunable(_times, masks, grads)
        grads, slopes = clipped((grads, slopes))
        moves, probability_state = probability_optimizer.update(
            slopes, state.probability_state, state.probabilities
        )
        moved = optax.apply_updates(state.probabilities, moves)
        total = sum(p.size for p in jax.tree.leaves(moved))
        budget = _budget(total, at_step(sparsity, optax.safe_increment(state.count)))
        return grads, project(moved, budget), probability_state

    def gradients(
        state: ProbMaskState, grads: Any, params: Any
    ) -> tuple[Any, ProbMaskState]:
        """That of the weights through their masks; the probabilities learn, too."""

        def fixed() -> tuple[Any, Any, Any]:
            kept = map_where_prunable(_of_nonzero, state.probabilities, grads, params)
            return clipped(kept), state.probabilities, state.probability_state

        reaching, probabilities, probability_state = jax.lax.cond(
            state.frozen, fixed, lambda: learn(state, grads, params)
        )
        state = state._replace(
            probabilities=probabilities, probability_state=probability_state
        )
        return reaching, state

    def choose(state: ProbMaskState) -> Any:
        """Which weights the fixed mask keeps."""
        if draw == "bernoulli":  # m > 1/2 has the probability p at any temperature
            return jax.tree.map(lambda m: m > 0.5, _draw_masks(state))
        s = at_step(sparsity, state.count)
        t, asked = threshold(state.probabilities, s), _is_asked(s)
        return jax.tree.map(
            lambda p: ~asked | (to_key(p) > to_key(t)) | (p >= 1),
            state.probabilities,
        )

    def land(
        state: ProbMaskState, updates: Any, params: Any, _: Any
    ) -> tuple[optax.Updates, ProbMaskState]:
        updates = map_where_prunable(
            lambda _, u, w: hold_mask(w, u, state.frozen),
            state.probabilities,
            updates,
            params,
        )
        fix = (state.count >= freeze_step) & ~state.frozen
        state = state._replace(
            temperature=temperature_at(state.count), frozen=state.frozen | fix
        )
        updates = jax.lax.cond(
            fix,
            lambda: map_where_prunable(_onto_mask, choose(state), updates, params),
            lambda: updates,
        )
        return updates, state

    return sparse_transform(
        inner,
        init,
        land,
        state_type=ProbMaskState,
        gradients=gradients,
        prunable=prunable,
    )


def _adam() -> optax.GradientTransformation:
    """Adam, also where its powers of a count would be promotions that are forbidden."""
    adam = optax.adam(6e-3)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(grads, state, params)

    return optax.GradientTransformation(adam.init, update)


@wide
def _budget(total: int, sparsity: jax.Array) -> jax.Array:
    """What all probabilities may add up to."""
    return total * (1 - sparsity)


@wide
def _is_asked(sparsity: jax.Array) -> jax.Array:
    """Whether any weight is to be zero."""
    return is_positive(sparsity)


def _of_nonzero(_: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
    """The gradient of weights that a fixed mask keeps."""
    return jnp.where(to_key(w) != 0, g, jnp.zeros_like(g))


@jax.jit  # for finalize, which is called outside of it
def _draw_masks(state: ProbMaskState) -> Any:
    """The relaxed mask of a step for each prunable leaf, the same at every call."""
    key = key_of(state.seed, state.count)
    numbers = numbers_for(key, named_leaves(state.probabilities), each=2)

    def draw(path: str, p: jax.Array, _: jax.Array) -> jax.Array:
        u0, u1 = numbers[path]
        return relaxed_mask(p, u0, u1, state.temperature)

    return map_named(draw, state.probabilities, state.probabilities)


def _product(g: jax.Array, w: jax.Array) -> jax.Array:
    return g.astype(jnp.float32) * w.astype(jnp.float32)


def _times(m: jax.Array, x: jax.Array) -> jax.Array:
    """A mask times weights or gradients, exactly these where the mask is 1."""
    dtype = score_dtype(x.dtype)
    return choose(m == 1, x, (m.astype(dtype) * x.astype(dtype)).astype(x.dtype))


def _ones(w: jax.Array) -> jax.Array:
    return jnp.ones_like(w, jnp.float32)


def _where_prunable(masks: Any, tree: Any) -> Any:
    """A tree of the parameters' structure without what is not prunable."""
    return jax.tree.map(
        lambda m, part: m if is_masked(m) else part, masks, tree, is_leaf=is_masked
    )


def _clip(grads: Any, clip_norm: Any) -> Any:
    """All gradients, scaled down together to a norm if theirs is larger."""
    arrays = [x.astype(score_dtype(x.dtype)) for x in jax.tree.leaves(grads)]
    squares = [jnp.sum(x * x) for x in arrays]
    norm = jnp.sqrt(sum(squares[1:], squares[0]))
    factor = clip_norm / jnp.maximum(norm, clip_norm)
    return jax.tree.map(lambda x: _times(factor, x), grads)


def _onto_mask(keep: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
    """The update that lands on zero exactly where the mask does not keep a weight."""
    stepped = optax.apply_updates(w, u)
    least = jnp.copysign(ops.smallest_kept(w.dtype), stepped).astype(w.dtype)
    alive = jnp.where(to_key(stepped) == 0, least, stepped)
    return step_onto(w, jnp.where(keep, alive, jnp.zeros_like(w)), u.dtype)


def _check_arguments(probability_optimizer: Any, clip_norm: Any, draw: str) -> None:
    """Raises early, before anything is compiled, for what can be known early."""
    if not isinstance(probability_optimizer, optax.GradientTransformation):
        raise TypeError(
            "probability_optimizer is an optimizer, as optax.adam(6e-3), got "
            f"{type(probability_optimizer).__name__}"
        )
    if clip_norm is not None and is_concrete(clip_norm):
        check_positive(clip_norm, "clip_norm")
    check_choice(draw, "draw", DRAWS)


def _check_schedules(sparsity: Any, freeze_step: int, temperature: Any) -> None:
    """Raises if a schedule is out of range, or leaves no step to learn."""
    paths = as_mapping(sparsity)
    if paths is not None:
        raise TypeError(
            "probmask shares one budget among all layers, so sparsity is a number or "
            f"a schedule, got a mapping of {len(paths)} paths: to leave a layer dense, "
            "use prunable=..."
        )
    check_steps(freeze_step, "freeze_step", 2)
    check_schedules(Rule(), sparsity, freeze_step)
    if not is_concrete(freeze_step):
        return
    with jax.ensure_compile_time_eval():
        before = at_step(sparsity, jnp.array(freeze_step - 1))
        final = at_step(sparsity, jnp.array(freeze_step))
        hot = {} if temperature is None else {0: temperature, freeze_step: temperature}
        for step, value in ((c, at_step(t, jnp.array(c))) for c, t in hot.items()):
            if is_concrete(value):
                check_positive(value, f"temperature at step {step}")
        known = is_concrete(final) and is_concrete(before)
        late = known and float(before) <= 0 < float(final)
    if late:
        raise ValueError(
            f"freeze_step {freeze_step} leaves no step to learn probabilities in: the "
            "sparsity is still 0 one step before, so let the ramp begin earlier"
        )
