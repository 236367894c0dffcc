"""A vision transformer that trains to exact zeros: one file to read and to copy.

python experiments/transformer.py
python experiments/transformer.py --sparsity=0
python experiments/transformer.py --dataset=fashion_mnist --epochs=8

Flax NNX, layers in one stack, AdamW, ``jit`` over a mesh of all devices. Beside st3jax
it needs JAX, Flax, Optax, Orbax, absl and NumPy; scikit-learn has the digits, and
Debian's package dataset-fashion-mnist the other images.
"""

import gzip
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import st3jax

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
PATCH = {"digits": 2, "fashion_mnist": 4}  # pixels, of images of 8x8 and 28x28
INIT = jax.nn.initializers.normal(0.06)
Split = tuple[np.ndarray, np.ndarray]  # images [N, size, size] in [0, 1], labels [N]


class Block(nnx.Module):
    """One layer: attention, then an MLP."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, kernel_init=INIT, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, kernel_init=INIT, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, T, width]`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    """Patches, stacked layers (kernels are ``[layers, ...]``), a head on all patches.

    The kernels of all layers begin at one scale: of layers that begin smaller, one
    threshold for all would take nearly all weights before they have learned.
    """

    def __init__(
        self, size: int, patch: int, width: int, layers: int, heads: int, seed: int
    ):
        rngs, tokens = nnx.Rngs(seed), (size // patch) ** 2
        window = (2 * patch, 2 * patch)  # patches overlap
        self.patches = nnx.Conv(1, width, window, strides=patch, rngs=rngs)
        self.places = nnx.Param(jax.random.normal(rngs.params(), (tokens, width)))

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, rngs=rngs)

        self.blocks = stacked(rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(tokens * width, 10, kernel_init=INIT, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[B, 10]`` of images ``[B, size, size]``."""
        x = self.patches(images[..., None])
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.places

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        x = self.norm(through(self.blocks, x))
        return self.head(x.reshape(x.shape[0], -1))


def make_optimizer(
    model: ViT, sparsity: float, learning_rate: float, steps: int
) -> nnx.Optimizer[ViT]:
    """AdamW with warm-up and cosine, wrapped in ST-3; 0 zeros is dense training."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    adamw = optax.adamw(rate, weight_decay=0.05, mask=st3jax.kernel_mask)
    inner = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    ramp = st3jax.polynomial_ramp(sparsity, begin=steps // 10, end=steps // 2)
    layout = st3jax.nnx.layouts(model)
    tx = st3jax.st3(inner, ramp, freeze_step=steps * 6 // 10, layout=layout)
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(
    model: ViT, optimizer: nnx.Optimizer[ViT], images: jax.Array, labels: jax.Array
) -> jax.Array:
    """One step; returns the loss before it."""

    def loss_fn(model: ViT) -> jax.Array:
        logits = st3jax.nnx.sparsify(model, optimizer)(images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def count_correct(model: ViT, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How many images the model gets right."""
    return (model(images).argmax(-1) == labels).sum()


def evaluate(model: ViT, test: Split, batch_size: int, parts: NamedSharding) -> float:
    """Share of test images that the model gets right."""
    missing = -len(test[1]) % batch_size  # to fill the last batch
    images = np.pad(test[0], ((0, missing), (0, 0), (0, 0)))
    labels = np.pad(test[1], (0, missing), constant_values=-1)  # never right
    correct = 0
    for i in range(0, len(labels), batch_size):
        batch = images[i : i + batch_size], labels[i : i + batch_size]
        correct += int(count_correct(model, *jax.device_put(batch, parts)))
    return correct / len(test[1])


def load(dataset: str) -> tuple[Split, Split]:
    """What to train on, and what to test on: of the digits every fifth."""
    if dataset == "fashion_mnist":
        return read_idx("train"), read_idx("t10k")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(np.float32) / 16, digits.target
    test = np.arange(len(labels)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test])


def read_idx(split: str) -> Split:
    """A split of Fashion-MNIST: bytes behind headers of 16 and 8 bytes."""
    names = [f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    try:
        files = [(FASHION_MNIST / name).read_bytes() for name in names]
    except FileNotFoundError as error:
        sys.exit(f"error: no {error.filename}: apt-get install dataset-fashion-mnist")
    images, labels = map(gzip.decompress, files)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels.astype(np.float32) / 255, np.frombuffer(labels[8:], np.int8)


def batches(train: Split, batch_size: int, seed: list[int]) -> Iterator[Split]:
    """An epoch: all images in random order, each shifted by up to a pixel."""
    rng = np.random.default_rng(seed)
    size = train[0].shape[1]
    padded = np.pad(train[0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
    order = rng.permutation(len(padded))
    for i in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[i : i + batch_size]
        down, right = rng.integers(0, 3, (2, batch_size))
        yield windows[rows, down, right], train[1][rows]


def make_mesh(devices: int | None, batch_size: int) -> Mesh:
    """So many devices, along the one axis ``data``."""
    count = devices or jax.device_count()
    if count > jax.device_count():
        sys.exit(f"error: --devices={count}, but there are {jax.device_count()}")
    if batch_size % count:
        sys.exit(f"error: --batch_size={batch_size} does not divide by {count} devices")
    used = jax.devices()[:count]
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=used)


def fit(
    model: ViT,
    optimizer: nnx.Optimizer[ViT],
    epochs: Iterator[Iterator[Split]],
    parts: NamedSharding,
) -> tuple[list[list[float]], list[float]]:
    """Trains; all thresholds after each epoch, and how many images it took a second."""
    thresholds, rates = [], []
    for number, epoch in enumerate(epochs, 1):
        begin, images, losses = time.perf_counter(), 0, []
        for batch in epoch:
            losses.append(train_step(model, optimizer, *jax.device_put(batch, parts)))
            images += len(batch[1])
        loss = np.mean(jax.device_get(losses))
        rates.append(images / (time.perf_counter() - begin))
        state: Any = st3jax.find_state(nnx.as_pure(optimizer.opt_state))
        each = np.hstack(jax.tree.leaves(jax.device_get(state.per_leaf)))
        thresholds.append(each.tolist())
        print(f"epoch {number}: loss {loss:.4f}, mean threshold {each.mean():.7f}")
    return thresholds, rates


def run(
    dataset: str,
    sparsity: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    devices: int | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Trains, tests and saves the network; arguments are those of the command line.

    Returns:
        The final ``model``, its ``accuracy``, ``zeros`` and ``weights``; after each
        epoch the ``thresholds``; ``images_per_second`` of the median epoch.
    """
    mesh = make_mesh(devices, batch_size)
    whole = NamedSharding(mesh, PartitionSpec())  # on each device: weights, optimizer
    parts = NamedSharding(mesh, PartitionSpec("data"))  # one on each device: batches
    if out and (folder := pathlib.Path(out).absolute()).exists():
        sys.exit(f"error: {out} exists: name another folder with --out=...")
    train, test = load(dataset)
    shape = {"size": train[0].shape[1], "patch": PATCH[dataset]}
    shape |= {"width": 64, "layers": 4, "heads": 4, "seed": seed}
    model = ViT(**shape)
    if (steps := epochs * (len(train[1]) // batch_size)) < 10:
        sys.exit(f"error: {steps} steps are too few: more epochs or a smaller batch")
    optimizer = make_optimizer(model, sparsity, learning_rate, steps)
    for each in (model, optimizer):
        nnx.update(each, jax.device_put(nnx.state(each), whole))

    data = (batches(train, batch_size, [seed, epoch]) for epoch in range(epochs))
    thresholds, rates = fit(model, optimizer, data, parts)
    final = st3jax.nnx.finalize(model, optimizer)
    weights = nnx.as_pure(nnx.state(final, nnx.Param))
    summary = st3jax.summary(weights)
    accuracy = evaluate(final, test, batch_size, parts)
    if out:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, weights)
        about = {
            "network": "transformer",
            "dataset": dataset,
            "model": shape,
            "sparsity": int(summary.zeros) / summary.weights,
            "test_accuracy": accuracy,
        }
        layout = st3jax.nnx.layouts(final)
        st3jax.save_sparse(folder / "model.st3", weights, metadata=about, layout=layout)
    return {
        "model": final,
        "accuracy": accuracy,
        "zeros": int(summary.zeros),
        "weights": summary.weights,
        "thresholds": thresholds,
        "images_per_second": float(np.median(rates)),
    }


SETTINGS = [
    flags.DEFINE_enum("dataset", "digits", list(PATCH), "What to train on."),
    flags.DEFINE_float("sparsity", 0.9, "Share of zeros; 0 trains dense.", 0, 1),
    flags.DEFINE_integer("epochs", 40, "How often every image is seen.", 1),
    flags.DEFINE_integer("batch_size", 32, "Images of a step, over all devices.", 1),
    flags.DEFINE_float("learning_rate", 3e-3, "At the end of the warm-up.", 0),
    flags.DEFINE_integer("seed", 0, "Of weights, and of the order of images.", 0),
    flags.DEFINE_integer("devices", None, "How many; by default all.", 1),
    flags.DEFINE_string("out", None, "New folder for the final weights."),
]


def main(argv: list[str]) -> None:
    """Trains as the flags say, and prints what came out."""
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}: settings are --name=value")
    settings: dict[str, Any] = {setting.name: setting.value for setting in SETTINGS}
    end = run(**settings)
    print(
        f"test accuracy {100 * end['accuracy']:.2f} %, {end['zeros']:,} zeros of "
        f"{end['weights']:,} weights, {end['images_per_second']:,.0f} images/s"
    )


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    app.run(main)
