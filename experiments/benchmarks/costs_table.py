"""What the published networks cost, and what sparsity leaves of ResNet-50's cost.

python experiments/benchmarks/costs_table.py

Prints two tables. The cost of a layer is its multiply-adds for one image times its
share of non-zero weights, summed over all convolutions and the dense head; BatchNorm
and the rest are not counted.

The first table has each network as it is built here, with its weights and its cost
computed, next to the cost that was published for the same network.

The second is about ResNet-50 at 224x224. Published (arXiv:2212.01076) are accuracy and
cost of networks trained with ST-3 and ST-3-sigma. Computed here is what the same
sparsity costs where ``st3jax.prune`` takes the smallest of freshly initialised weights:
over all layers by either criterion, or layer by layer in the uniform and the ERK
distribution. The uniform cost is a matter of arithmetic, and so is ERK's, but training
moves weights between layers: the other two columns are where ST-3 starts from, not what
it ends with, and no accuracy belongs to any of the four.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from harness import run_main
from rich.console import Console
from rich.table import Table

import base_config
import imagenet_st3
import paths
import st3jax
from job.costs import abstract_variables, kernels_of
from models import create_model


class Network(NamedTuple):
    """A row of the first table.

    Attributes:
        label: What it is called.
        size: Height and width of an image, pixels.
        classes: Outputs of the head.
        model: The model's name.
        arguments: The model's own arguments.
        published: Its multiply-adds for one image, in millions.
        source: Where that is published.
    """

    label: str
    size: int
    classes: int
    model: str
    arguments: dict[str, Any]
    published: float | None = None
    source: str = ""


FILTERS, MEDIAN = "arXiv:1608.08710", "arXiv:1811.00250"
TORCHVISION, MOBILENETS = "torchvision", "arXiv:1704.04861"
NOTES = (
    "(a) without 1x1 convolutions in the shortcuts, which take 0.26 million\n"
    "(b) with 124 million for three dense layers in place of the head"
)
CIFAR10, CIFAR100, IMAGENET = (32, 10), (32, 100), (224, 1000)
NETWORKS = (
    Network(
        "ResNet-20", *CIFAR10, "cifar_resnet", {"depth": 20}, 40.6, f"{MEDIAN} (a)"
    ),
    Network(
        "ResNet-56", *CIFAR10, "cifar_resnet", {"depth": 56}, 125, f"{FILTERS} (a)"
    ),
    Network(
        "ResNet-110", *CIFAR10, "cifar_resnet", {"depth": 110}, 253, f"{FILTERS} (a)"
    ),
    Network("WideResNet-34-2", *CIFAR100, "wide_resnet", {"depth": 34, "widen": 2}),
    Network("WideResNet-28-10", *CIFAR10, "wide_resnet", {"depth": 28, "widen": 10}),
    Network("VGG-16", *CIFAR10, "vgg", {"depth": 16}, 313, FILTERS),
    *[
        Network(
            f"ResNet-{depth}",
            *IMAGENET,
            "imagenet_resnet",
            {"depth": depth},
            published,
            TORCHVISION,
        )
        for depth, published in zip(
            (18, 34, 50, 101, 152), (1810, 3660, 4090, 7800, 11510), strict=True
        )
    ],
    *[
        Network(
            f"VGG-{depth}",
            *IMAGENET,
            "vgg",
            {"depth": depth},
            published,
            f"{TORCHVISION} (b)",
        )
        for depth, published in zip(
            (11, 13, 16, 19), (7610, 11310, 15470, 19630), strict=True
        )
    ],
    *[
        Network(
            f"MobileNetV1, x{width}",
            *IMAGENET,
            "mobilenet_v1",
            {"width": width},
            published,
            MOBILENETS,
        )
        for width, published in zip(
            (1.0, 0.75, 0.5, 0.25), (569, 325, 149, 41), strict=True
        )
    ],
)

PUBLISHED = {  # sparsity: top-1 accuracy, % and cost, millions, by criterion
    0.0: {"l1": (77.10, 4089), "l1_sigma": (77.10, 4089)},
    0.8: {"l1": (76.95, 1215), "l1_sigma": (76.44, 739)},
    0.9: {"l1": (76.03, 764), "l1_sigma": (75.28, 397)},
    0.95: {"l1": (74.46, 436), "l1_sigma": (73.69, 219)},
    0.965: {"l1": (73.31, 351), "l1_sigma": (72.62, 167)},
    0.98: {"l1": (70.46, 220), "l1_sigma": (69.75, 116)},
    0.99: {"l1": (63.88, 120), "l1_sigma": (63.25, 69)},
}
PRUNED: dict[str, dict[str, Any]] = {
    "l1": {"criterion": "l1"},
    "l1_sigma": {"criterion": "l1_sigma"},
    "uniform": {"distribution": "uniform"},
    "ERK": {"distribution": "erk"},
}


def weights_and_cost(network: Network) -> tuple[int, int]:
    """Kernel weights and multiply-adds of the dense network; nothing is computed."""
    config = base_config.get_config()
    config.data.image_size = network.size
    config.data.mean = (0.0,) * 3
    config.model = ml_collections.ConfigDict(
        {"name": network.model, **network.arguments}
    )
    model = create_model(config, network.classes)
    variables, _ = abstract_variables(model, config)
    kernels = paths.kernels(variables["params"])
    costs = kernels_of(model, config).costs
    return (
        sum(kernel.size for kernel in kernels.values()),
        sum(costs[path] * kernel.size for path, kernel in kernels.items()),
    )


def networks_table() -> Table:
    """Every network, and what it costs here and elsewhere."""
    table = Table(
        title="networks, with millions of multiply-adds for one image",
        caption=NOTES,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("network")
    for heading in ("image", "kernel weights", "multiply-\nadds", "published"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for row, network in enumerate(NETWORKS):
        weights, cost = weights_and_cost(network)
        published = network.published
        table.add_row(
            network.label,
            str(network.size),
            f"{weights:,}",
            f"{cost / 1e6:,.1f}",
            "" if published is None else f"{published:,}",
            network.source,
            end_section=NETWORKS[row : row + 2][-1].size != network.size,
        )
    return table


def fresh_kernels() -> tuple[dict[str, jax.Array], dict[str, int]]:
    """ResNet-50's kernels as they are initialised, and what a weight of each costs."""
    config = imagenet_st3.get_config()
    model = create_model(config, 1000)
    init = jax.jit(
        functools.partial(model.init, train=False),
        # It runs once: compiling fast matters more than running fast.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    variables = init(jax.random.key(config.seed), jnp.zeros((1, 32, 32, 3)))
    return paths.kernels(variables["params"]), kernels_of(model, config).costs


def pruned_costs() -> dict[str, dict[float, float]]:
    """Millions of multiply-adds that are left, by column and sparsity."""
    kernels, costs = fresh_kernels()

    def zeros(sparsity: float, **arguments: Any) -> dict[str, jax.Array]:
        layers = st3jax.summary(st3jax.prune(kernels, sparsity, **arguments)).layers
        return {path: layer.zeros for path, layer in layers.items()}

    found: dict[str, dict[float, float]] = {}
    for column, arguments in PRUNED.items():
        compiled = jax.jit(functools.partial(zeros, **arguments))
        found[column] = {}
        for sparsity in PUBLISHED:
            gone = jax.device_get(compiled(sparsity))
            left = sum(costs[k] * (kernels[k].size - int(gone[k])) for k in kernels)
            found[column][sparsity] = left / 1e6
    return found


def sparsity_table() -> Table:
    """ResNet-50 by sparsity: published for ST-3, and computed for fresh weights."""
    table = Table(
        title="ResNet-50 at 224x224, with millions of multiply-adds for one image",
        caption="ST-3: published, after training; the others: computed, before any",
        title_justify="left",
        caption_justify="left",
    )
    headings = (
        "sparsity",
        "ST-3\ntop-1",
        "\ncost",
        "ST-3-sigma\ntop-1",
        "\ncost",
        "l1\nfresh",
        "l1_sigma\nfresh",
        "uniform\nfresh",
        "ERK\nfresh",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    computed = pruned_costs()
    for sparsity, published in PUBLISHED.items():
        table.add_row(
            f"{100 * sparsity:g} %",
            *[
                cell
                for accuracy, cost in published.values()
                for cell in (f"{accuracy:.2f}", f"{cost:,}")
            ],
            *[f"{column[sparsity]:,.0f}" for column in computed.values()],
        )
    return table


def main(argv: list[str]) -> None:
    """Prints both tables."""
    del argv
    console = Console()
    console.print(networks_table())
    console.print()
    console.print(sparsity_table())


if __name__ == "__main__":
    run_main(main)
