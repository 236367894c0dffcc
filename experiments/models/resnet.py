"""Residual networks for CIFAR (6n+2 layers) and for ImageNet."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from models.layers import conv, head, norm

__all__ = ["ResNet", "cifar_resnet", "imagenet_resnet"]

IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(nn.Module):
    """A residual network.

    Attributes:
        stages: Number of blocks of each stage.
        width: Channels of the first stage; each further stage doubles them.
        bottleneck: Bottleneck blocks (1x1, 3x3, 1x1 with 4 times the channels) rather
            than basic ones (3x3, 3x3).
        imagenet_stem: 7x7 stride-2 stem and max-pool rather than one 3x3 convolution.
        stem_stride: Stride of the 3x3 stem.
        num_classes: Outputs of the head.
        norm_momentum: Share of the old running statistics that BatchNorm keeps a step.
        dtype: Dtype of the computation; parameters are float32.
    """

    stages: tuple[int, ...]
    width: int
    bottleneck: bool
    imagenet_stem: bool
    stem_stride: int
    num_classes: int
    norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, images: Any, train: bool) -> Any:
        """Logits of shape ``[B, num_classes]`` for images ``[B, H, W, C]``."""
        bn = norm(self.dtype, self.norm_momentum, train)
        stem = (7, 2) if self.imagenet_stem else (3, self.stem_stride)
        x = conv(self.dtype, self.width, *stem, name="stem")(images)
        x = nn.relu(bn(name="stem_norm")(x))
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2)
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = self.block(
                    x,
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    name=f"stage{stage + 1}_block{block + 1}",
                    bn=bn,
                )
        return head(self.dtype, self.num_classes, x)

    def block(self, x: Any, width: int, stride: int, name: str, bn: Any) -> Any:
        """Adds a residual branch; the shortcut is projected where shapes differ."""
        if self.bottleneck:
            branch = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        else:
            branch = [(width, 3, stride), (width, 3, 1)]
        y = x
        for i, (features, size, step) in enumerate(branch):
            y = conv(self.dtype, features, size, step, name=f"{name}_conv{i + 1}")(y)
            y = bn(name=f"{name}_norm{i + 1}")(y)
            if i + 1 < len(branch):
                y = nn.relu(y)
        if x.shape != y.shape:
            features = y.shape[-1]
            x = conv(self.dtype, features, 1, stride, name=f"{name}_shortcut")(x)
            x = bn(name=f"{name}_shortcut_norm")(x)
        return nn.relu(x + y)


def cifar_resnet(
    depth: int,
    num_classes: int,
    width: int = 16,
    stem_stride: int = 1,
    norm_momentum: float = 0.99,
    dtype: str = "float32",
) -> ResNet:
    """The CIFAR ResNet of 6n+2 layers: three stages of n basic blocks.

    A stem with stride 2 makes it about four times cheaper.

    Raises:
        ValueError: If ``depth`` is not 6n+2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(
            f"a CIFAR ResNet has 8, 14, 20, ... layers (6n+2), got {depth}"
        )
    return ResNet(
        stages=(blocks,) * 3,
        width=width,
        bottleneck=False,
        imagenet_stem=False,
        stem_stride=stem_stride,
        num_classes=num_classes,
        norm_momentum=norm_momentum,
        dtype=jnp.dtype(dtype),
    )


def imagenet_resnet(
    depth: int,
    num_classes: int,
    width: int = 64,
    norm_momentum: float = 0.99,
    dtype: str = "float32",
) -> ResNet:
    """The ImageNet ResNet-18, -34, -50, -101 or -152, the stride on the 3x3.

    Raises:
        ValueError: If there is no such depth.
    """
    if depth not in IMAGENET_STAGES:
        raise ValueError(f"an ImageNet ResNet has depth 18/34/50/101/152, got {depth}")
    return ResNet(
        stages=IMAGENET_STAGES[depth],
        width=width,
        bottleneck=depth >= 50,
        imagenet_stem=True,
        stem_stride=2,
        num_classes=num_classes,
        norm_momentum=norm_momentum,
        dtype=jnp.dtype(dtype),
    )
