"""The same functions for Flax NNX, on modules and optimizers."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from st3jax import base, metrics
from st3jax.layout.modules import module_layouts

__all__ = ["finalize", "layouts", "sparsify", "summary"]

M = TypeVar("M", bound=nnx.Module)


def layouts(model: nnx.Module) -> dict[str, str]:
    """What each axis of each kernel is, as the model's modules say it.

    Linear, general, einsum and attention layers, convolutions and recurrent cells, also
    where ``nnx.vmap`` stacked them; of axes that could all be the stacked one, it is
    the same as in the model's other kernels. A parameter that a module of your own
    holds is not among them: give its layout besides, as in ``layouts(model) |
    {"blocks/kernel": "sio"}``, or trace the model with :func:`st3jax.layouts`, whose
    function may be ``lambda model, x: model(x)``.

    Args:
        model: The module, with real or abstract variables.

    Returns:
        From path to a letter for each axis, for ``layout`` of :func:`st3jax.st3`.

    Raises:
        TypeError: If it is no module.
        ValueError: If nothing tells which axis of a kernel is the stacked one.

    Example:
        >>> import optax, st3jax
        >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> layouts(model)["query/kernel"], layouts(model)["out/kernel"]
        ('ioo', 'iio')
        >>> tx = st3jax.st3(optax.sgd(0.1), sparsity=0.75, layout=layouts(model))
    """
    _check_module(model)
    return module_layouts(model)


def _check_module(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a module of Flax NNX, got {_kind(model)}: for other models, "
            "trace them with st3jax.layouts(fn, params, inputs)"
        )


def _check_both(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nnx.Module) or not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "the functions of st3jax.nnx take a module and its nnx.Optimizer, got "
            f"{_kind(model)} and {_kind(optimizer)}: parameters and an optimizer state "
            "go to those of st3jax"
        )


def _kind(x: Any) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__


def sparsify(model: M, optimizer: nnx.Optimizer[M]) -> M:
    """A view of the model with the sparse weights, to be called inside the loss.

    The view shares every variable but the optimizer's own with the model, so BatchNorm
    statistics and random streams that a forward pass updates are updated in the model.

    Args:
        model: The module with the raw weights.
        optimizer: Its ``nnx.Optimizer`` around a sparse-training transform.

    Returns:
        A module of the same type.

    Raises:
        ValueError: If the optimizer has no or several sparse-training states.

    Example:
        >>> import optax, st3jax
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> tx = st3jax.st3(optax.sgd(0.1), sparsity=0.75)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> def loss_fn(model):
        ...     return (sparsify(model, optimizer)(jax.numpy.ones((1, 4))) ** 2).sum()
        >>> _ = optimizer.update(model, nnx.grad(loss_fn)(model))
        >>> int((finalize(model, optimizer).kernel[...] == 0).sum())
        12
    """
    return _with_weights(model, optimizer, base.sparsify)


def _with_weights(
    model: M, optimizer: nnx.Optimizer[M], weights_of: Callable[[Any, Any], Any]
) -> M:
    """The model with what a function makes of its parameters and of their state."""
    _check_both(model, optimizer)
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)  # type: ignore[misc]
    values = weights_of(nnx.as_pure(params), nnx.as_pure(optimizer.opt_state))
    sparse = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(values))
    return nnx.merge(graphdef, sparse, rest)


def finalize(model: M, optimizer: nnx.Optimizer[M]) -> M:
    """A copy of the model with the weights to evaluate and to ship: exact zeros.

    Args:
        model: The module with the raw weights.
        optimizer: Its ``nnx.Optimizer`` around a sparse-training transform.

    Returns:
        A module of the same type that shares nothing with ``model``.

    Raises:
        ValueError: As :func:`st3jax.finalize`.

    Example:
        >>> import optax, st3jax
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> tx = st3jax.st3(optax.sgd(0.1), sparsity=0.5)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> _ = optimizer.update(model, nnx.state(model, nnx.Param))
        >>> int((finalize(model, optimizer).kernel[...] == 0).sum())
        8
    """
    graphdef, state = nnx.split(_with_weights(model, optimizer, base.finalize))
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.copy, state))


def summary(
    model: nnx.Module, optimizer: nnx.Optimizer[Any], **options: Any
) -> metrics.Summary:
    """Counts the exact zeros of the weights that the model would ship.

    Args:
        model: The module with the raw weights.
        optimizer: Its ``nnx.Optimizer`` around a sparse-training transform.
        **options: Keyword arguments of :func:`st3jax.summary`.

    Returns:
        As :func:`st3jax.summary` of the parameters and the optimizer's state.

    Raises:
        ValueError: As :func:`st3jax.finalize`.

    Example:
        >>> import optax, st3jax
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> tx = st3jax.st3(optax.sgd(0.1), sparsity=0.5)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> _ = optimizer.update(model, nnx.state(model, nnx.Param))
        >>> int(summary(model, optimizer).zeros)
        8
    """
    _check_both(model, optimizer)
    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    return metrics.summary(params, nnx.as_pure(optimizer.opt_state), **options)
