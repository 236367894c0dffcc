"""The same functions for Flax NNX, on modules and optimizers."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from st3jax import base
from st3jax.layout.modules import module_layouts

__all__ = ["finalize", "layouts", "sparsify"]

M = TypeVar("M", bound=nnx.Module)


def layouts(model: nnx.Module) -> dict[str, str]:
    """What each axis of each kernel is, as the model's modules say it.

    Linear, general, einsum and attention layers, convolutions and recurrent cells, also
    where ``nnx.vmap`` stacked them; of axes that could all be the stacked one, the
    first is. A parameter that a module of your own holds is not among them: give its
    layout besides, or trace the model with :func:`st3jax.layouts`.

    Args:
        model: The module, with real or abstract variables.

    Returns:
        From path to a letter for each axis, for ``layout`` of :func:`st3jax.st3`.

    Example:
        >>> import optax, st3jax
        >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> layouts(model)["query/kernel"], layouts(model)["out/kernel"]
        ('ioo', 'iio')
        >>> tx = st3jax.st3(optax.sgd(0.1), sparsity=0.75, layout=layouts(model))
    """
    return module_layouts(model)


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
