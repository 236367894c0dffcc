"""The protocol of a method: a state in the optimizer that knows how to sparsify.

A sparse-training method is one factory that wraps an optimizer and one state type with
a method ``effective_params``. The functions here find that state, wherever Optax has
nested it, and apply it.
"""

from typing import Any, Protocol, TypeVar, runtime_checkable

import jax

from st3jax.fingerprint import check_seen

__all__ = ["SparseState", "finalize", "find_state", "sparsify"]


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
