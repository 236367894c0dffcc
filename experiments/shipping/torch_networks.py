"""The networks in PyTorch, as functions of the tensors in ``model.pt``.

    weights = torch.load("model.pt", weights_only=True)
    logits = NETWORKS["cifar_resnet"](weights, images, stem_stride=1)

Images are normalised as in training, and as PyTorch has them: [N, channels, H, W], for
the transformer [N, H, W]. An ImageNet ResNet is torchvision's own. It is there to be
copied, and needs PyTorch alone.
"""

import re
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as fn

__all__ = ["NETWORKS"]

Weights = dict[str, Tensor]


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution without bias, each group's inputs as many as its kernel has."""
    kernel = weights[f"{name}.weight"]
    groups = x.shape[1] // kernel.shape[1]
    return fn.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, groups=groups)


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """BatchNorm by running statistics."""
    mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scale, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return fn.batch_norm(x, mean, var, scale, bias, eps=1e-5)


def head(weights: Weights, x: Tensor) -> Tensor:
    """Global average pooling and the logits."""
    return x.mean((2, 3)) @ weights["head.weight"].T


def layers(weights: Weights, pattern: str) -> list[tuple[str, bool]]:
    """The names that begin as a pattern says, and whether a later stage begins."""
    found = dict.fromkeys(
        begin[0] for name in weights if (begin := re.match(pattern, name))
    )
    ordered = sorted(found, key=lambda x: [int(n) for n in re.findall(r"\d+", x)])
    return [(x, bool(re.match(r"stage([2-9]|\d\d+)_\D+1$", x))) for x in ordered]


def resnet(weights: Weights, x: Tensor, stem_stride: int = 1) -> Tensor:
    """A CIFAR or ImageNet ResNet; the second has a stem of 7x7."""
    for_imagenet = weights["stem.weight"].shape[-1] == 7
    stem = conv(weights, "stem", x, 2 if for_imagenet else stem_stride)
    x = fn.relu(norm(weights, "stem_norm", stem))
    if for_imagenet:
        x = fn.max_pool2d(x, 3, 2, 1)
    for name, is_later in layers(weights, r"stage\d+_block\d+"):
        count = sum(bool(re.match(rf"{name}_conv\d+\.", key)) for key in weights)
        y = x
        for i in range(1, count + 1):
            strided = is_later and i == count - 1  # the first 3x3
            y = conv(weights, f"{name}_conv{i}", y, 2 if strided else 1)
            y = norm(weights, f"{name}_norm{i}", y)
            y = fn.relu(y) if i < count else y
        if f"{name}_shortcut.weight" in weights:
            x = conv(weights, f"{name}_shortcut", x, 2 if is_later else 1)
            x = norm(weights, f"{name}_shortcut_norm", x)
        x = fn.relu(x + y)
    return head(weights, x)


def wide_resnet(weights: Weights, x: Tensor) -> Tensor:
    """A WideResNet of pre-activation blocks."""
    x = conv(weights, "stem", x)
    for name, is_later in layers(weights, r"stage\d+_block\d+"):
        stride = 2 if is_later else 1
        y = fn.relu(norm(weights, f"{name}_norm1", x))
        if f"{name}_shortcut.weight" in weights:
            x = conv(weights, f"{name}_shortcut", y, stride)
        y = conv(weights, f"{name}_conv1", y, stride)
        y = fn.relu(norm(weights, f"{name}_norm2", y))
        x = x + conv(weights, f"{name}_conv2", y)
    return head(weights, fn.relu(norm(weights, "last_norm", x)))


def mobilenet_v1(weights: Weights, x: Tensor) -> Tensor:
    """MobileNetV1."""
    x = fn.relu(norm(weights, "stem_norm", conv(weights, "stem", x, 2)))
    for name, _ in layers(weights, r"block\d+"):
        stride = 2 if name in ("block2", "block4", "block6", "block12") else 1
        for part, step in (("depthwise", stride), ("pointwise", 1)):
            y = conv(weights, f"{name}_{part}", x, step)
            x = fn.relu(norm(weights, f"{name}_{part}_norm", y))
    return head(weights, x)


def vgg(weights: Weights, x: Tensor) -> Tensor:
    """A VGG with BatchNorm; a side of odd length is rounded up."""
    for stage in range(1, 6):
        for name, _ in layers(weights, rf"stage{stage}_conv\d+"):
            y = conv(weights, name, x)
            x = fn.relu(norm(weights, name.replace("conv", "norm"), y))
        x = fn.max_pool2d(x, 2, ceil_mode=True)
    return head(weights, x)


def transformer(weights: Weights, x: Tensor, heads: int) -> Tensor:
    """The vision transformer, of which all layers are in a stack."""

    def dense(name: str, x: Tensor) -> Tensor:
        return fn.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(name: str, x: Tensor) -> Tensor:
        own = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return fn.layer_norm(x, x.shape[-1:], *own, eps=1e-6)

    kernel, bias = weights["patches.weight"], weights["patches.bias"]
    patch = kernel.shape[-1] // 2  # windows overlap
    low = patch // 2
    x = fn.pad(x[:, None], (low, patch - low) * 2)
    x = fn.conv2d(x, kernel, bias, patch).flatten(2).mT + weights["places"]
    for name, _ in layers(weights, r"blocks\.\d+"):
        y = layer_norm(f"{name}.norm1", x)
        split = [
            dense(f"{name}.attention.{part}", y).unflatten(-1, (heads, -1))
            for part in ("query", "key", "value")
        ]
        seen = fn.scaled_dot_product_attention(*(x.transpose(1, 2) for x in split))
        x = x + dense(f"{name}.attention.out", seen.transpose(1, 2).flatten(2))
        y = dense(f"{name}.up", layer_norm(f"{name}.norm2", x))
        y = dense(f"{name}.down", fn.gelu(y, approximate="tanh"))
        x = x + y
    return dense("head", layer_norm("norm", x).flatten(1))


NETWORKS: dict[str, Callable[..., Tensor]] = {
    "cifar_resnet": resnet,
    "imagenet_resnet": resnet,
    "mobilenet_v1": mobilenet_v1,
    "transformer": transformer,
    "vgg": vgg,
    "wide_resnet": wide_resnet,
}
"""By name, functions of weights, images and what the names do not say."""
