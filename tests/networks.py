"""Tiny networks of every kind, as trained ones are: zeros, and statistics of images."""

import jax
import numpy as np
from flax import nnx

import transformer
from models import MODELS
from shipping.network import Network

SPARSITY = 0.7
TINY = {  # arguments, size of images, channels
    "cifar_resnet": ({"depth": 8, "width": 8}, 8, 1),
    "imagenet_resnet": ({"depth": 50, "width": 4}, 33, 3),
    "mobilenet_v1": ({"multiplier": 0.125}, 33, 3),
    "vgg": ({"depth": 11}, 9, 3),
    "wide_resnet": ({"depth": 10, "widen": 1}, 8, 3),
}


def convolutional(name, **changed):
    """A published network with zeros; scales, biases, statistics are random."""
    options, size, channels = TINY[name]
    options = options | changed
    model = MODELS[name](num_classes=10, **options)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((5, size, size, channels)).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))
    variables = drawn(dict(shapes), rng)

    def apply(variables, images):
        return model.apply(variables, images, train=False)

    metadata = {"sparsity": SPARSITY, "config": {"model": {"name": name, **options}}}
    return Network(name, apply, variables, pixels, metadata)


def vit():
    """The transformer, with two stacked layers."""
    shape = {"size": 8, "patch": 2, "width": 16, "layers": 2, "heads": 2, "seed": 0}
    model = transformer.ViT(**shape)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)
    variables = drawn(nnx.to_pure_dict(weights), rng)

    def apply(weights, images):
        return nnx.merge(graph, weights, rest)(images)

    pixels = rng.random((5, 8, 8)).astype(np.float32)
    metadata = {"network": "transformer", "dataset": "digits", "model": shape}
    return Network("transformer", apply, variables, pixels, metadata)


def tiny_network(name):
    """One of ``TINY``, or ``"transformer"``."""
    return vit() if name == "transformer" else convolutional(name)


def drawn(shapes, rng):
    """Variables of these shapes."""
    return jax.tree.map_with_path(lambda *x: _drawn(rng, *x), shapes)


def _drawn(rng, path, leaf):
    """As after some training: biases of 0 and variances of 1 would tell little."""
    kind = path[-1].key
    if kind in ("scale", "var"):
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if kind == "kernel" else 10
    values = rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
    if kind == "kernel":
        values *= rng.random(leaf.shape) > SPARSITY
    return values.astype(np.float32)
