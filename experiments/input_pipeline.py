"""Images from TFDS through Grain: a deterministic stream of batches for a seed.

Records are read with random access (array_record), without TensorFlow. Decoding and
cropping of large images happen here, on the host; normalisation, shifts and flips
happen on the device, in ``augment`` and ``normalise``.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from builders.digits import Digits
from errors import UserError

__all__ = ["Data", "augment", "load", "normalise", "test_batches", "train_batches"]

BUILDERS = {"digits": Digits}
EVAL_CROP = 224 / 256  # share of the shorter side that evaluation looks at


class Data(NamedTuple):
    """A prepared data set.

    Attributes:
        train: Random-access source of training examples.
        test: Random-access source of test examples.
        num_classes: Number of labels.
        channels: Channels of an image.
    """

    train: Any
    test: Any
    num_classes: int
    channels: int


def load(config: ml_collections.ConfigDict) -> Data:
    """Opens the data set that ``config.data`` names; prepares it if that needs no net.

    Raises:
        UserError: If the data set is unknown, or is not prepared yet.
    """
    builder = _builder(config)
    if config.data.name in BUILDERS:
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download
            builder.download_and_prepare()
    elif not builder.is_prepared():
        name = config.data.name
        where = f", data_dir={config.data.dir!r}" if config.data.dir else ""
        raise UserError(
            f"the data set {name!r} is not prepared in {builder.data_path}: prepare it "
            f'once with python -c "import tensorflow_datasets as tfds; tfds.builder('
            f"{name!r}{where}, file_format='array_record').download_and_prepare()\", "
            "or name the folder that holds it with --config.data.dir=..."
        )
    splits = (config.data.train_split, config.data.test_split)
    train, test = (builder.as_data_source(split) for split in splits)
    if config.data.in_memory:
        train, test = list(train), list(test)
    if len(train) < config.batch_size:
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the {len(train):,} "
            f"training images of {config.data.name!r}: make it smaller"
        )
    features = builder.info.features
    channels = features["image"].shape[-1]
    for field in ("mean", "std"):
        if len(config.data[field]) != channels:
            raise UserError(
                f"config.data.{field} has {len(config.data[field])} numbers, but the "
                f"images of {config.data.name!r} have {channels} channels: one for each"
            )
    return Data(train, test, features["label"].num_classes, channels)


def _builder(config: ml_collections.ConfigDict) -> Any:
    tfds.disable_progress_bar()
    options = {"data_dir": config.data.dir or None, "file_format": "array_record"}
    if config.data.name in BUILDERS:
        return BUILDERS[config.data.name](**options)
    try:
        return tfds.builder(config.data.name, **options)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"config.data.name is 'digits' or a data set of TFDS, got "
            f"{config.data.name!r}"
        ) from None


class _Decode(grain.transforms.RandomMap):
    """Crops an image to the size of the network's input, if it is not of that size."""

    def __init__(self, config: ml_collections.ConfigDict, train: bool):
        self.size = config.data.image_size
        self.random = train and config.data.augmentation == "resized_crop"

    def random_map(self, element: Any, rng: np.random.Generator) -> dict[str, Any]:
        image = element["image"]
        if self.random:
            image = _random_resized_crop(image, self.size, rng)
        elif image.shape[:2] != (self.size, self.size):
            image = _resized_centre(image, self.size)
        return {"image": image, "label": np.int32(element["label"])}


def _random_resized_crop(image: Any, size: int, rng: np.random.Generator) -> Any:
    """8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, resized."""
    height, width = image.shape[:2]
    box = None
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            box = (x, y, x + w, y + h)
            break
    if box is None:
        return _resized_centre(image, size)
    return np.asarray(
        Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
    )


def _resized_centre(image: Any, size: int) -> Any:
    """The central square, with a margin cut off, resized."""
    height, width = image.shape[:2]
    side = min(height, width) * EVAL_CROP
    x, y = (width - side) / 2, (height - side) / 2
    box = (x, y, x + side, y + side)
    return np.asarray(
        Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
    )


def train_batches(data: Data, config: ml_collections.ConfigDict) -> Any:
    """An endless Grain iterator of shuffled batches; its state can be checkpointed.

    Returns:
        Iterator of ``{"image": uint8 [B, H, W, C], "label": int32 [B]}``, in another
        order each epoch, the same for the same seed.
    """
    stream = grain.MapDataset.source(data.train).seed(config.seed).shuffle()
    stream = stream.repeat().random_map(_Decode(config, train=True))
    stream = stream.batch(config.batch_size, drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=2)))


def test_batches(
    data: Data, config: ml_collections.ConfigDict
) -> Iterator[dict[str, Any]]:
    """Every test image exactly once, in batches filled up with masked-out images.

    Yields:
        ``{"image": uint8 [B, H, W, C], "label": int32 [B], "valid": bool [B]}``.
    """
    stream = grain.MapDataset.source(data.test).seed(config.seed)
    stream = stream.random_map(_Decode(config, train=False))
    for batch in stream.batch(config.batch_size).to_iter_dataset():
        missing = config.batch_size - len(batch["label"])
        valid = np.ones(len(batch["label"]), bool)
        yield {
            name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            for name, x in {**batch, "valid": valid}.items()
        }


def normalise(images: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """uint8 pixels to float32 of about zero mean and unit variance."""
    mean, std = jnp.array(config.data.mean), jnp.array(config.data.std)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def augment(
    images: jax.Array, key: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Shifts and mirrors each image of a batch at random, on the device."""
    shift_key, flip_key = jax.random.split(key)
    if config.data.augmentation == "shift":
        images = _shift(images, shift_key, config.data.shift_pixels)
    if config.data.flip:
        flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
    return images


def _shift(images: jax.Array, key: jax.Array, pixels: int) -> jax.Array:
    """Random crops of the original size from images padded with their edges."""
    pad = [(0, 0), (pixels, pixels), (pixels, pixels), (0, 0)]
    padded = jnp.pad(images, pad, mode="edge")
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)
