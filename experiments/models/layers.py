"""What the published networks have in common: convolution, normalisation, head."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

__all__ = ["BATCH_AXIS", "Layer", "conv", "head", "norm"]

BATCH_AXIS = "batch"
"""The pmap axis over which BatchNorm statistics are averaged."""

Layer = Callable[..., Any]

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(
    dtype: Any, features: int, size: int, stride: int = 1, **kwargs: Any
) -> nn.Conv:
    """A square convolution without bias, padded to keep ``H`` and ``W`` at stride 1."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        kernel_init=he_normal,
        dtype=dtype,
        **kwargs,
    )


def norm(dtype: Any, momentum: float, train: bool) -> Layer:
    """BatchNorm; in training, statistics are those of the batch over all devices."""
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=BATCH_AXIS if train else None,
    )


def head(dtype: Any, num_classes: int, x: Any) -> Any:
    """Global average pooling and one dense layer: float32 logits."""
    x = jnp.mean(x, axis=(1, 2))
    dense = nn.Dense(
        num_classes, use_bias=False, kernel_init=he_normal, dtype=dtype, name="head"
    )
    return dense(x).astype(jnp.float32)
