"""A trained network, as every export takes it."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

import base_config
import st3jax
from data import sources
from data.decoding import resized_centre
from data.source import Unreadable, read
from errors import UserError
from job.augmentation import normalise
from models import create_model
from workdir.claim import FREE
from workdir.missing import why_missing

__all__ = ["Network", "read_network"]

IMAGES = 16
MOST_BYTES = 2**36  # of a run's own file


class Network(NamedTuple):
    """What there is to ship, with what its exports are checked on.

    Attributes:
        name: Of the architecture, such as ``"imagenet_resnet"`` or ``"transformer"``.
        apply: ``(variables, images) -> logits``, in inference, for any batch size.
        variables: Nested dicts of arrays on the host, zeros in place, as ``apply``
            takes them.
        images: Real images as ``apply`` takes them, normalised, float32 [N, ...].
        metadata: What a file says about itself: settings, sparsity, mean and standard
            deviation of pixels; JSON can hold it.
    """

    name: str
    apply: Callable[[Any, Any], Any]
    variables: Any
    images: np.ndarray
    metadata: dict[str, Any]


def read_network(workdir: pathlib.Path, data_dir: str | None = None) -> Network:
    """What a run of ``train.py`` or ``transformer.py`` has left in a folder.

    The network computes in float32, in whatever it was trained.

    Args:
        workdir: The folder, with ``model.st3``.
        data_dir: Where the images of the run are, if not where they were.

    Returns:
        The network, with up to 16 test images of the run.

    Raises:
        UserError: If there is no network, or none of its images.
    """
    path = workdir / "model.st3"
    if not path.is_file():
        raise UserError(why_missing(workdir, path.name))
    try:
        metadata = st3jax.read_header(path)["metadata"]
        variables = st3jax.load_sparse(path, max_bytes=MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    if metadata.get("network") == "transformer":
        return _transformer(variables, metadata)
    if not isinstance(metadata.get("config"), dict):
        raise UserError(f"{path} does not say of which run it is: name a run's workdir")
    return _convolutional(workdir, variables, metadata, data_dir)


def _convolutional(
    workdir: pathlib.Path,
    variables: Any,
    metadata: dict[str, Any],
    data_dir: str | None,
) -> Network:
    """One of ``experiments/models``."""
    config = _settings(workdir, metadata["config"])
    if data_dir:
        config.data.dir = data_dir
    model = create_model(config, metadata["num_classes"])

    def apply(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=False)

    images = np.array(normalise(jnp.asarray(_test_images(config)), config))
    return Network(config.model.name, apply, variables, images, metadata)


def _settings(workdir: pathlib.Path, settings: Any) -> ml_collections.ConfigDict:
    """The run's configuration, with what depends on the machine from its workdir."""
    config = ml_collections.ConfigDict(settings)
    here = base_config.get_config().data
    with contextlib.suppress(OSError, ValueError):  # model.st3 may have come alone
        here.update(json.loads((workdir / "config.json").read_text())["data"])
    for field in FREE:
        name = field.removeprefix("data.")
        config.data[name] = here[name]
    config.data.in_memory = False
    config.model.dtype = "float32"
    return config


def _test_images(config: ml_collections.ConfigDict) -> np.ndarray:
    """The first test images that can be read, uint8 [N, H, W, C]."""
    size, channels = config.data.image_size, len(config.data.mean)
    source = sources.load(config).test

    def pixels(image: Any) -> Any:
        return resized_centre(image, channels, size, config.data.max_pixels)

    images: list[Any] = []
    for index in range(len(source)):
        if len(images) == IMAGES:
            break
        with contextlib.suppress(Unreadable):
            images.append(read(source, index, pixels)["image"])
    return np.stack(images)


def _transformer(weights: Any, metadata: dict[str, Any]) -> Network:
    """The one of ``transformer.py``."""
    import transformer  # here, as it declares the flags of its command line

    model = transformer.ViT(**metadata["model"])
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, _, rest = parts

    def apply(weights: Any, images: Any) -> Any:
        return nnx.merge(graph, weights, rest)(images)

    _, (images, _) = transformer.load(metadata["dataset"])
    return Network("transformer", apply, weights, images[:IMAGES], metadata)
