"""The published networks, by name. None of them knows of sparsity.

All are without biases in convolutions and dense layers, with BatchNorm and ReLU,
global average pooling and one dense head, and He-normal fan-in initialisation.
"""

import inspect
from collections.abc import Callable

import flax.linen as nn
import ml_collections

from models.mobilenet import mobilenet_v1
from models.resnet import cifar_resnet, imagenet_resnet
from models.vgg import vgg
from models.wide_resnet import wide_resnet

__all__ = ["MODELS", "create_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet": cifar_resnet,
    "imagenet_resnet": imagenet_resnet,
    "mobilenet_v1": mobilenet_v1,
    "vgg": vgg,
    "wide_resnet": wide_resnet,
}


def create_model(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
    """The model that ``config.model`` describes: a name, and arguments if not ``None``.

    Args:
        config: The experiment's configuration.
        num_classes: Outputs of the head.

    Returns:
        A Linen module called as ``model(images, train=...)``, with images
        ``[B, H, W, C]`` and float32 logits ``[B, num_classes]``.

    Raises:
        ValueError: If the name is unknown, or an argument missing, not one of this
            model's or out of its range.
    """
    options = {k: value for k, value in config.model.items() if value is not None}
    name = options.pop("name")
    if name not in MODELS:
        raise ValueError(
            f"name is one of {', '.join(map(repr, sorted(MODELS)))}, got {name!r}"
        )
    known = inspect.signature(MODELS[name]).parameters
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"{option} is {value!r}, but {name!r} has no {option}: leave it out"
            )
    for option in known.keys() - options.keys() - {"num_classes"}:
        if known[option].default is inspect.Parameter.empty:
            raise ValueError(f"{option} is missing, which {name!r} needs")
    return MODELS[name](num_classes=num_classes, **options)
