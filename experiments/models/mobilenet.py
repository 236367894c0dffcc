"""MobileNetV1: convolutions split into one by channel and one by pixel."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from models.layers import conv, head, norm

__all__ = ["MobileNetV1", "mobilenet_v1"]

STEM = 32
BLOCKS = (  # channels, stride
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(nn.Module):
    """MobileNetV1.

    A depthwise kernel has the shape ``[3, 3, 1, C]``: one filter for each channel.

    Attributes:
        multiplier: Share of the published channels that each layer has, rounded down.
        num_classes: Outputs of the head.
        norm_momentum: Share of the old running statistics that BatchNorm keeps a step.
        dtype: Dtype of the computation; parameters are float32.
    """

    multiplier: float
    num_classes: int
    norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, images: Any, train: bool) -> Any:
        """Logits of shape ``[B, num_classes]`` for images ``[B, H, W, C]``."""
        bn = norm(self.dtype, self.norm_momentum, train)
        x = conv(self.dtype, int(STEM * self.multiplier), 3, 2, name="stem")(images)
        x = nn.relu(bn(name="stem_norm")(x))
        for block, (features, stride) in enumerate(BLOCKS):
            channels = x.shape[-1]
            depthwise, pointwise = (
                f"block{block + 1}_{part}" for part in ("depthwise", "pointwise")
            )
            x = conv(
                self.dtype,
                channels,
                3,
                stride,
                feature_group_count=channels,
                name=depthwise,
            )(x)
            x = nn.relu(bn(name=f"{depthwise}_norm")(x))
            x = conv(self.dtype, int(features * self.multiplier), 1, name=pointwise)(x)
            x = nn.relu(bn(name=f"{pointwise}_norm")(x))
        return head(self.dtype, self.num_classes, x)


def mobilenet_v1(
    num_classes: int,
    multiplier: float = 1.0,
    norm_momentum: float = 0.99,
    dtype: str = "float32",
) -> MobileNetV1:
    """MobileNetV1 of 28 layers, made thinner or wider by a factor.

    Raises:
        ValueError: If ``multiplier`` leaves the stem without a channel.
    """
    if not 1 <= STEM * multiplier < math.inf:
        raise ValueError(
            f"the multiplier of a MobileNetV1 is 1/{STEM} or more, got {multiplier}"
        )
    return MobileNetV1(
        multiplier=multiplier,
        num_classes=num_classes,
        norm_momentum=norm_momentum,
        dtype=jnp.dtype(dtype),
    )
