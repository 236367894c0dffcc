"""What happens to pixels on the device: normalisation, shifts, mirroring."""

import jax
import jax.numpy as jnp
import ml_collections

__all__ = ["augment", "normalise"]


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
