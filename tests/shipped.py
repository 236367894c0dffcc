"""Small networks to export, with zeros, and with BatchNorm as if it were trained."""

import jax
import jax.numpy as jnp
import numpy as np
from flagless import imported
from flax import nnx

from models import MODELS
from shipping.network import Network

transformer = imported("transformer")


def of_model(name, size=8, channels=3, sparsity=0.5, **options):
    """One of ``experiments/models``."""
    model = MODELS[name](num_classes=10, **options)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, size, size, channels), np.float32)
    images.setflags(write=False)  # as those of JAX are
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.asarray(images), train=False)
    )
    variables = jax.tree_util.tree_map_with_path(drawn(rng), shapes)
    params = variables["params"]
    variables["params"] = jax.tree_util.tree_map_with_path(pruned(sparsity), params)
    settings = {"config": {"model": {"name": name, **options}}}
    return Network(
        name,
        lambda variables, images: model.apply(variables, images, train=False),
        variables,
        images,
        {"network": name, **settings},
    )


def of_transformer():
    """The vision transformer, of two stacked layers."""
    model = transformer.ViT(8, 2, width=32, layers=2, heads=2, seed=0)
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(drawn(rng), nnx.to_pure_dict(state))
    return Network(
        "transformer",
        lambda variables, images: nnx.merge(graph, variables)(images),
        variables,
        rng.uniform(size=(3, 8, 8)).astype(np.float32),
        {},
    )


def of_function(apply, params, shape, name="mine"):
    """A network of one's own."""
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    return Network(name, apply, params, images, {"of": "mine"})


def drawn(rng):
    """A function from path and leaf to what a trained network could have there."""

    def values(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        if name in ("bias", "mean"):
            return rng.normal(0.0, 0.3, shape).astype(np.float32)
        scale = np.sqrt(2 / max(1, np.prod(shape[:-1])))
        return scale.astype(np.float32) * rng.standard_normal(shape, np.float32)

    return values


def pruned(sparsity):
    """A function from path and leaf to the leaf, with so many zeros if a kernel."""

    def sparse(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        return np.where(np.abs(leaf) > np.quantile(np.abs(leaf), sparsity), leaf, 0)

    return sparse
