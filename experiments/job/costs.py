"""What a weight of a configured model costs, found without computing anything."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

import st3jax

__all__ = ["abstract_variables", "kernel_costs"]


def abstract_variables(
    model: nn.Module, config: ml_collections.ConfigDict
) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shapes of the model's variables and of one of its images; nothing is computed."""
    size = config.data.image_size
    image = jax.ShapeDtypeStruct((1, size, size, len(config.data.mean)), jnp.float32)
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), image), image


def kernel_costs(model: nn.Module, config: ml_collections.ConfigDict) -> dict[str, int]:
    """From path to the multiply-adds that one weight takes part in, for one image."""
    variables, image = abstract_variables(model, config)
    params = variables["params"]

    def logits(params: Any, variables: Any, image: jax.Array) -> Any:
        return model.apply({**variables, "params": params}, image, train=False)

    return st3jax.multiply_adds(logits, params, variables, image)
