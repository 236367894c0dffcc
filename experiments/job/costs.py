"""What a configured model says of its kernels, found without computing anything."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

import st3jax

__all__ = ["Kernels", "abstract_variables", "kernels_of"]


def abstract_variables(
    model: nn.Module, config: ml_collections.ConfigDict
) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shapes of the model's variables and of one of its images; nothing is computed."""
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((1, size, size, len(config.data.mean)), jnp.float32)
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), image), image


class Kernels(NamedTuple):
    """What a model says of its kernels, by path.

    Attributes:
        costs: The multiply-adds that one weight takes part in, for one image.
        layouts: A letter for each axis: stacked, window, input or output.
    """

    costs: dict[str, int]
    layouts: dict[str, str]


def kernels_of(model: nn.Module, config: ml_collections.ConfigDict) -> Kernels:
    """What the model says, as it is traced with one image."""
    variables, image = abstract_variables(model, config)

    def logits(params: Any, variables: Any, image: jax.Array) -> Any:
        return model.apply({**variables, "params": params}, image, train=False)

    traced = (logits, variables["params"], variables, image)
    return Kernels(st3jax.multiply_adds(*traced), st3jax.layouts(*traced))
