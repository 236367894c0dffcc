"""The protocol of a method: a state in the optimizer that knows how to sparsify.

A sparse-training method is one factory that wraps an optimizer and one state type with
a method ``effective_params``. The functions here find that state, wherever Optax has
nested it, and apply it.
"""

from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from st3jax.fingerprint import is_seen
from st3jax.selection.keys import to_key
from st3jax.trees import check_same_structure, named_leaves

__all__ = ["SparseState", "check_seen", "finalize", "find_state", "sparsify"]


Params = TypeVar("Params")


@runtime_checkable
class SparseState(Protocol):
    """Optimizer state of a sparse-training method.

    Attributes:
        inner_state: State of the wrapped optimizer.
    """

    inner_state: Any

    def effective_params(self, params: Any) -> Any:
        """The weights that the model sees, as a pure function of raw weights.

        Raises:
            ValueError: If the params are not those of the state.
        """
        ...


def find_state(opt_state: Any) -> SparseState:
    """The one sparse-training state inside an optimizer state.

    Args:
        opt_state: State of any Optax transform, nested as deep as it may be.

    Returns:
        The state of the sparse-training method.

    Raises:
        ValueError: If there is none or more than one.

    Example:
        >>> import optax, st3jax
        >>> tx = optax.chain(optax.identity(), st3jax.st3(optax.sgd(0.1), 0.9))
        >>> opt_state = tx.init({"kernel": jax.numpy.ones((2, 3))})
        >>> type(find_state(opt_state)).__name__
        'ThresholdState'
    """
    found, queue = [], [opt_state]
    while queue:
        nodes = jax.tree.leaves(
            queue.pop(), is_leaf=lambda node: isinstance(node, SparseState)
        )
        states = [node for node in nodes if isinstance(node, SparseState)]
        found += states
        queue += [state.inner_state for state in states]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(type(state).__name__ for state in found)
        raise ValueError(
            f"the optimizer state holds {len(found)} sparse-training states ({names}), "
            "but weights can follow only one: wrap the optimizer in one method"
        )
    raise ValueError(
        "the optimizer state holds no sparse-training state: wrap the optimizer, as in "
        "tx = st3jax.st3(optax.sgd(0.1), sparsity=0.9), and pass the state of that tx"
    )


def sparsify(params: Params, opt_state: Any) -> Params:
    """The sparse weights that the model sees, made from the raw weights.

    A pure function, to be called inside the loss: zeros are exact, and the gradient of
    every weight, kept or zero, passes through to the raw weights. The transform decides
    which of it its optimizer sees.

    Args:
        params: Raw weights, in the structure that the optimizer was initialised with.
        opt_state: Optimizer state that holds one sparse-training state.

    Returns:
        Pytree of the structure, shapes and dtypes of ``params``. Leaves that are not
        prunable are passed through.

    Raises:
        ValueError: If the optimizer state holds no or several sparse-training states,
            or belongs to other parameters.

    Example:
        >>> import optax, st3jax
        >>> params = {"kernel": jax.numpy.array([[1.0, -2.0, 3.0, -4.0]])}
        >>> tx = st3jax.st3(optax.sgd(0.0), sparsity=0.5, rescale=False)
        >>> opt_state = tx.init(params)
        >>> _, opt_state = tx.update(params, opt_state, params)
        >>> sparsify(params, opt_state)["kernel"].tolist()
        [[0.0, 0.0, 0.5, -1.5]]
    """
    return find_state(opt_state).effective_params(params)


def finalize(params: Params, opt_state: Any) -> Params:
    """The weights to evaluate and to ship: exact zeros, no gradient.

    Args:
        params: Raw weights, in the structure that the optimizer was initialised with.
        opt_state: Optimizer state that holds one sparse-training state.

    Returns:
        What :func:`sparsify` returns, cut off from differentiation.

    Raises:
        ValueError: As :func:`sparsify`; or if these are not the weights that the state
            has last seen, so that its thresholds would leave another sparsity. Under
            ``jit`` nothing is known of that, and nothing is checked.

    Example:
        >>> import optax, st3jax
        >>> params = {"kernel": jax.numpy.array([[1.0, -2.0, 3.0, -4.0]])}
        >>> tx = st3jax.st3(optax.sgd(0.0), sparsity=0.5, soft=False, rescale=False)
        >>> _, opt_state = tx.update(params, tx.init(params), params)
        >>> finalize(params, opt_state)["kernel"].tolist()
        [[0.0, 0.0, 3.0, -4.0]]
    """
    state = find_state(opt_state)
    weights = state.effective_params(params)
    check_seen(state, params, weights)
    return jax.lax.stop_gradient(weights)


def check_seen(state: Any, params: Any, weights: Any) -> None:
    """Raises if raw weights are others than those that a state has last seen.

    Args:
        state: State of a method; one that names no weights fits all.
        params: The raw weights.
        weights: What the state makes of them.

    Raises:
        ValueError: With what was asked for and what there is.
    """
    if not hasattr(state, "seen"):
        return
    check_same_structure(state.per_leaf, params)
    asked = getattr(state, "sparsity", None)
    if is_seen(state, params):
        return
    names = list(named_leaves(state.per_leaf))
    before, after = named_leaves(params), named_leaves(weights)
    zeros = sum(int(jnp.sum(to_key(after[name]) == 0)) for name in names)
    total = sum(after[name].size for name in names)
    same = all(bool(jnp.array_equal(before[name], after[name])) for name in names)
    if asked is not None:
        exact = float(asked) * (total - 1) + 1  # as selection counts, but for rounding
        if (same and zeros >= exact - 1) or abs(
            zeros - exact + 0.5
        ) < 0.5 + 1e-6 * total:
            return  # as sparse as was asked for
    wanted = "" if asked is None else f", where {float(asked):.4g} was asked for"
    raise ValueError(
        "these weights are not those that the optimizer state has last seen: with it "
        f"{zeros} of {total} prunable weights would be zero, a share of "
        f"{zeros / total:.4g}{wanted}. Were they finalized already, averaged, scaled "
        "or changed after the update, or are they of another step or model? What "
        "changes updates or weights (optax.lookahead, schedule_free, scale) goes "
        "inside, as st3(optax.lookahead(...), ...); an average gets its zeros by "
        "st3jax.prune(average, sparsity)"
    )
