"""Wide residual networks: pre-activation blocks with dropout."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from models.layers import conv, head, norm

__all__ = ["WideResNet", "wide_resnet"]


class WideResNet(nn.Module):
    """WideResNet-(6n+4)-k.

    Attributes:
        blocks: Blocks of each of the three stages, n.
        widen: Width factor, k: the stages have 16k, 32k and 64k channels.
        dropout: Rate of dropout between the two convolutions of a block.
        num_classes: Outputs of the head.
        norm_momentum: Share of the old running statistics that BatchNorm keeps a step.
        dtype: Dtype of the computation; parameters are float32.
    """

    blocks: int
    widen: int
    dropout: float
    num_classes: int
    norm_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, images: Any, train: bool) -> Any:
        """Logits of shape ``[B, num_classes]`` for images ``[B, H, W, C]``."""
        bn = norm(self.dtype, self.norm_momentum, train)
        x = conv(self.dtype, 16, 3, name="stem")(images)
        for stage in range(3):
            for block in range(self.blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                width = 16 * self.widen * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(bn(name=f"{name}_norm1")(x))
                shortcut = x
                if x.shape[-1] != width or stride != 1:
                    shortcut = conv(
                        self.dtype, width, 1, stride, name=f"{name}_shortcut"
                    )(y)
                y = conv(self.dtype, width, 3, stride, name=f"{name}_conv1")(y)
                y = nn.relu(bn(name=f"{name}_norm2")(y))
                y = nn.Dropout(self.dropout, deterministic=not train)(y)
                y = conv(self.dtype, width, 3, name=f"{name}_conv2")(y)
                x = shortcut + y
        x = nn.relu(bn(name="last_norm")(x))
        return head(self.dtype, self.num_classes, x)


def wide_resnet(
    depth: int,
    num_classes: int,
    widen: int = 2,
    dropout: float = 0.2,
    norm_momentum: float = 0.99,
    dtype: str = "float32",
) -> WideResNet:
    """WideResNet of 6n+4 layers.

    Raises:
        ValueError: If ``depth`` is not 6n+4.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"a WideResNet has 10, 16, 22, ... layers (6n+4), got {depth}")
    return WideResNet(
        blocks, widen, dropout, num_classes, norm_momentum, jnp.dtype(dtype)
    )
