"""Networks of random weights, pruned in several ways, as ONNX files to time."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import st3jax
import transformer
from models.mobilenet import mobilenet_v1
from models.resnet import imagenet_resnet
from paths import by_path
from shipping.network import Network

__all__ = ["DISTRIBUTIONS", "NETWORKS", "pruned", "random_network"]

SIZE = 224  # pixels


def _linen(name: str, model: nn.Module) -> Network:
    """A convolutional network as it might come out of training.

    Kernels are He-normal; the statistics, scales and biases of norms are random, or a
    folded network would have no biases and variances of 1.
    """
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    init = jax.jit(lambda key: model.init(key, images[:1], train=False))
    variables = jax.device_get(init(jax.random.key(0)))

    def drawn(path: Any, leaf: np.ndarray) -> np.ndarray:
        kind = path[-1].key
        if kind in ("scale", "var"):
            leaf = rng.uniform(0.5, 1.5, leaf.shape)
        elif kind in ("bias", "mean"):
            leaf = 0.1 * rng.standard_normal(leaf.shape)
        return np.asarray(leaf, np.float32)

    variables = jax.tree.map_with_path(drawn, variables)
    return Network(
        name, lambda v, x: model.apply(v, x, train=False), variables, images, {}
    )


def _transformer() -> Network:
    """The one of ``transformer.py``: 6 layers of width 192, patches of 16 pixels.

    All its kernels are of one scale, as it says that they have to begin.
    """
    model = transformer.ViT(SIZE, patch=16, width=192, layers=6, heads=3, seed=0)
    graph, weights = nnx.split(model)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, SIZE, SIZE)).astype(np.float32)

    def drawn(path: str, leaf: jax.Array) -> np.ndarray:
        if not st3jax.is_kernel(path, leaf):
            return np.asarray(leaf)
        return 0.06 * rng.standard_normal(leaf.shape).astype(np.float32)

    names = by_path(nnx.to_pure_dict(weights))
    leaves = [drawn(path, leaf) for path, leaf in names.items()]
    structure = jax.tree.structure(nnx.to_pure_dict(weights))
    variables = {"params": jax.tree.unflatten(structure, leaves)}

    def apply(variables: Any, images: Any) -> Any:
        state = nnx.clone(weights)
        nnx.replace_by_pure_dict(state, variables["params"])
        return nnx.merge(graph, state)(images)

    return Network("ViT", apply, variables, images, {})


NETWORKS: dict[str, Callable[[], Network]] = {
    "ResNet-50": lambda: _linen("ResNet-50", imagenet_resnet(50, 1000)),
    "MobileNetV1": lambda: _linen("MobileNetV1", mobilenet_v1(1000)),
    "ViT": _transformer,
}
"""What is timed, by name."""

DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "global": {},
    "l1_sigma": {"criterion": "l1_sigma"},
    "uniform": {"distribution": "uniform"},
    "costs": {"costs": True},
}
"""Which weights are pruned, as arguments of ``st3jax.prune``."""


@functools.cache
def random_network(name: str) -> Network:
    """One of ``NETWORKS``, with all its weights."""
    return NETWORKS[name]()


def pruned(network: Network, sparsity: float, distribution: str) -> Network:
    """The network with some weights zero.

    Args:
        network: A dense one.
        sparsity: Share of the weights to be zero; with ``"costs"``, of multiply-adds.
        distribution: One of ``DISTRIBUTIONS``.
    """
    variables, image = network.variables, network.images[:1]

    def logits(params: Any, image: Any) -> Any:
        return network.apply({**variables, "params": params}, image)

    params = variables["params"]
    options = dict(DISTRIBUTIONS[distribution])
    if "costs" in options:
        options["costs"] = st3jax.multiply_adds(logits, params, image)
    options["layout"] = st3jax.layouts(logits, params, image)
    zeroed = jax.device_get(st3jax.prune(params, sparsity, **options))
    return network._replace(variables={**variables, "params": zeroed})
