"""The published networks, by name. None of them knows of sparsity.

All are without biases in convolutions and dense layers, with BatchNorm and ReLU,
global average pooling and one dense head, and He-normal fan-in initialisation.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

import st3jax
from models.resnet import cifar_resnet, imagenet_resnet
from models.wide_resnet import wide_resnet

__all__ = ["MODELS", "abstract_variables", "create_model", "kernel_costs"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet": cifar_resnet,
    "imagenet_resnet": imagenet_resnet,
    "wide_resnet": wide_resnet,
}


def create_model(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
    """The model that ``config.model`` describes: a name and the model's own arguments.

    Args:
        config: The experiment's configuration.
        num_classes: Outputs of the head.

    Returns:
        A Linen module called as ``model(images, train=...)``, with images
        ``[B, H, W, C]`` and float32 logits ``[B, num_classes]``.

    Raises:
        ValueError: If the name is unknown or an argument is out of its range.
    """
    options = config.model.to_dict()
    name = options.pop("name")
    if name not in MODELS:
        raise ValueError(
            f"name is one of {', '.join(map(repr, sorted(MODELS)))}, got {name!r}"
        )
    return MODELS[name](num_classes=num_classes, **options)


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
