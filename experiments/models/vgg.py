"""VGG networks with BatchNorm and, in place of the dense layers, one dense head."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from models.layers import conv, head, norm

__all__ = ["VGG", "vgg"]

WIDTHS = (64, 128, 256, 512, 512)
STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """A VGG network, for images of any size.

    Each stage ends with a 2x2 max-pool; a side of odd length is rounded up.

    Attributes:
        stages: Number of convolutions of each of the five stages.
        num_classes: Outputs of the head.
        norm_momentum: Share of the old running statistics that BatchNorm keeps a step.
        dtype: Dtype of the computation; parameters are float32.
    """

    stages: tuple[int, ...]
    num_classes: int
    norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, images: Any, train: bool) -> Any:
        """Logits of shape ``[B, num_classes]`` for images ``[B, H, W, C]``."""
        bn = norm(self.dtype, self.norm_momentum, train)
        x = images
        for stage, (layers, width) in enumerate(zip(self.stages, WIDTHS, strict=True)):
            for layer in range(layers):
                name = f"stage{stage + 1}_{{}}{layer + 1}"
                x = conv(self.dtype, width, 3, name=name.format("conv"))(x)
                x = nn.relu(bn(name=name.format("norm"))(x))
            x = nn.max_pool(x, (2, 2), (2, 2), "SAME")
        return head(self.dtype, self.num_classes, x)


def vgg(
    depth: int, num_classes: int, norm_momentum: float = 0.99, dtype: str = "float32"
) -> VGG:
    """VGG-11, -13, -16 or -19, named for its layers before BatchNorm came.

    Raises:
        ValueError: If there is no such depth.
    """
    if depth not in STAGES:
        raise ValueError(f"a VGG has depth 11/13/16/19, got {depth}")
    return VGG(
        stages=STAGES[depth],
        num_classes=num_classes,
        norm_momentum=norm_momentum,
        dtype=jnp.dtype(dtype),
    )
