"""What ST-3 costs on an accelerator, and whether it is right there: one command.

python experiments/benchmarks/accelerator.py --out=accelerator

Needs st3jax, JAX, Flax and Optax alone (and scikit-learn for one part), and takes six
minutes at most on one GPU. Each part is a process with a time limit of its own; its
rows are printed when they are known, and kept in ``--out`` as ``accelerator.md`` and
``accelerator.json``, beside ``accelerator.log`` of what else the parts said. A part
that fails or is stopped says so and the next one goes on. ``--parts=golden,selection``
runs those alone, ``--minutes=12`` gives every part twice its time, and ``--small``
makes everything tiny, to try it on a CPU. Only ratios of one run mean anything.
"""

import argparse
import ast
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import st3jax
from st3jax.selection import threshold

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
SPARSITY = 0.9
RAMP = 40_000  # steps; the timed ones are in its middle
METHODS = {"dense": None, "ST-3": st3jax.st3, "GMP": st3jax.gmp}

Row = dict[str, Any]


def versions(small: bool) -> Iterator[Row]:
    """What this is: versions, and the device."""
    del small
    yield {"what": "Python", "which": platform.python_version()}
    for name in ("st3jax", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from its repository
            version = sys.modules[name].__version__
        yield {"what": name, "which": version}
    device = jax.devices()[0]
    platform_version = ", ".join(device.client.platform_version.split("\n"))
    yield {"what": "platform", "which": platform_version}
    yield {"what": "device", "which": device.device_kind}
    yield {"what": "devices", "which": jax.device_count()}
    limit = (device.memory_stats() or {}).get("bytes_limit")
    yield {"what": "memory to be had, GB", "which": limit and limit / 1e9}
    yield {"what": "XLA_FLAGS", "which": os.environ.get("XLA_FLAGS", "")}


# The recorded trajectories, as tests/test_golden.py meets them.

TRAJECTORIES: dict[str, Callable[..., Any]] = {
    "st3": st3jax.st3,
    "st3_sigma": st3jax.st3,
    "st3_quadratic": st3jax.st3,
    "st3_fixed": st3jax.st3,
    "st3_no_rescale": st3jax.st3,
    "gmp": st3jax.gmp,
    "gmp_sticky": st3jax.gmp,
    "ste_hard": st3jax.ste,
}
LAYERS = {"c1": 1, "c2": 2, "c3": 1, "fc": 0}  # and the strides of convolutions
TOLERANCE = 1e-9


def golden(small: bool) -> Iterator[Row]:
    """How far each recorded trajectory is from what this device computes."""
    jax.config.update("jax_enable_x64", True)
    with ThreadPoolExecutor() as pool:  # compiling takes most of the time
        yield from pool.map(met, ["st3", "gmp"] if small else TRAJECTORIES)


def met(name: str) -> Row:
    """How far one trajectory is from its record."""
    record = np.load(GOLDEN / f"{name}.npz")
    off = {"loss": 0.0, "raw weights": 0.0, "effective weights": 0.0}
    zeros, step = True, 0
    for loss, raw, effective in trajectory(name, record):
        off["loss"] = max(off["loss"], distance(loss, record["loss"][step]))
        found = np.mean(np.concatenate([np.ravel(w) for w in effective]) == 0)
        zeros &= bool(abs(found - record["zero_fraction"][step]) < 1e-12)
        step += 1
        if f"step{step}/raw/fc" not in record:
            continue
        for layer, w, w_eff in zip(LAYERS, raw, effective, strict=True):
            # What a raw weight is under a fixed mask is no part of the method.
            live = np.where(w_eff == 0, 0, 1) if name == "st3_fixed" else 1
            for kind, mine in (("raw weights", w), ("effective weights", w_eff)):
                theirs = record[f"step{step}/{kind.split()[0]}/{layer}"]
                off[kind] = max(off[kind], distance(mine * live, theirs * live))
    return {
        "trajectory": name,
        "steps": step,
        **off,
        "zeros equal": zeros,
        f"all within {TOLERANCE:g}": zeros and max(off.values()) <= TOLERANCE,
    }


def distance(mine: Any, theirs: Any) -> float:
    """Largest relative difference; very small numbers may differ by 1e-13."""
    each = np.abs(np.asarray(mine) - theirs) / (np.abs(theirs) + 1e-13 / TOLERANCE)
    return float(np.max(np.nan_to_num(each, nan=np.inf)))


def trajectory(name: str, record: Any) -> Iterator[Any]:
    """Trains as recorded; yields the loss, raw and effective kernels of each step."""
    meta = ast.literal_eval(str(record["meta"]))
    digits = np.load(GOLDEN / "digits.npz")
    params: Any = {x: {"kernel": jnp.array(record[f"init/{x}"])} for x in LAYERS}
    options: dict[str, Any] = {"sticky": "published"} if name == "gmp_sticky" else {}
    if TRAJECTORIES[name] is st3jax.st3:
        options = {"soft": meta["soft"], "rescale": meta["rescale"]}
    tx = TRAJECTORIES[name](
        optax.chain(
            clip(meta["clip_norm"]),
            optax.add_decayed_weights(meta["weight_decay"]),
            optax.sgd(meta["lr"], momentum=meta["momentum"]),
        ),
        sparsity=st3jax.polynomial_ramp(
            meta["sparsity"], meta["ramp_start"], meta["ramp_end"], meta["power"]
        ),
        criterion={"l1": "l1", "l1std": "l1_sigma"}[meta["criterion"]],
        freeze_step=meta["fix_at"],
        **options,
    )
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            logits = recorded_network(st3jax.sparsify(params, opt_state), images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, new_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, new_state, loss, st3jax.finalize(params, new_state)

    for rows in record["batch_index"]:
        images, labels = digits["images"][rows], digits["labels"][rows]
        params, opt_state, loss, effective = step(params, opt_state, images, labels)
        both = jax.device_get((params, effective))
        yield (loss, *([tree[x]["kernel"] for x in LAYERS] for tree in both))


def recorded_network(params: Any, images: Any) -> jax.Array:
    """Three convolutions and a dense head."""
    x = jnp.asarray(images)
    for name, stride in LAYERS.items():
        kernel = params[name]["kernel"]
        if not stride:
            return x.mean((1, 2)) @ kernel
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(kernel.shape[0] // 2,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x)
    return x


def clip(max_norm: float) -> optax.GradientTransformation:
    """Clipping to a global norm, with the published small constant."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# The networks.


class ResNet(nn.Module):
    """A residual network of bottleneck blocks, without biases, of float32 parameters.

    Attributes:
        stages: Number of blocks of each stage.
        width: Channels of the first stage; each further stage doubles them.
        classes: Outputs of the head.
        large: 7x7 stem of stride 2 and max-pool rather than one 3x3 convolution.
        dtype: Dtype of the computation.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    large: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Any, train: bool) -> Any:
        """Float32 logits of shape ``[B, classes]`` for images ``[B, H, W, C]``."""

        def normed(x: Any, features: int, size: int, stride: int = 1) -> Any:
            pad = [(size // 2, size // 2)] * 2
            sizes, strides = (size, size), (stride, stride)
            x = nn.Conv(
                features, sizes, strides, pad, use_bias=False, dtype=self.dtype
            )(x)
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x)

        size, stride = (7, 2) if self.large else (3, 1)
        x = nn.relu(normed(images, self.width, size, stride))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2)
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                width = self.width * 2**stage
                stride = 2 if stage and not block else 1
                y = nn.relu(normed(x, width, 1))
                y = nn.relu(normed(y, width, 3, stride))
                y = normed(y, 4 * width, 1)
                if x.shape != y.shape:
                    x = normed(x, 4 * width, 1, stride)
                x = nn.relu(x + y)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.classes, use_bias=False, dtype=self.dtype)(x)
        return x.astype(jnp.float32)


class Transformer(nn.Module):
    """A decoder without biases, its layers one after the other.

    Attributes:
        layers: Number of layers.
        width: Channels, of which each head has 64.
        tokens: Size of the vocabulary.
        dtype: Dtype of the computation; parameters are float32.
    """

    layers: int = 12
    width: int = 768
    tokens: int = 16_384
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: Any, train: bool) -> Any:
        """Float32 logits of shape ``[B, T, tokens]`` for tokens ``[B, T]``."""
        del train

        def dense(features: int, x: Any) -> Any:
            return nn.Dense(features, use_bias=False, dtype=self.dtype)(x)

        def norm(x: Any) -> Any:
            return nn.LayerNorm(use_bias=False, dtype=self.dtype)(x)

        batch, length = tokens.shape
        x = nn.Embed(self.tokens, self.width, dtype=self.dtype)(tokens)
        x += nn.Embed(length, self.width, dtype=self.dtype)(jnp.arange(length))
        for _ in range(self.layers):
            qkv = dense(3 * self.width, norm(x)).reshape(batch, length, 3, -1, 64)
            q, k, v = (qkv[:, :, i] for i in range(3))
            seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x += dense(self.width, seen.reshape(batch, length, -1))
            x += dense(self.width, nn.gelu(dense(4 * self.width, norm(x))))
        return dense(self.tokens, norm(x)).astype(jnp.float32)


def random_variables(model: nn.Module, inputs: Any) -> Any:
    """Variables of a model without running it: He-normal kernels, on the host."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.asarray(inputs), train=False)
    )
    rng = np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("kernel", "embedding"):
            rows = 2500 if name == "embedding" else math.prod(leaf.shape[:-1])
            scale = np.float32(math.sqrt(2 / rows))
            return rng.standard_normal(leaf.shape, np.float32) * scale
        return np.full(leaf.shape, name in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def resnet50(small: bool, dtype: Any = jnp.float32) -> tuple[ResNet, int]:
    """The network and the size of its images."""
    if small:
        return ResNet(stages=(), width=4, classes=10, dtype=dtype), 8
    return ResNet(dtype=dtype), 224


# The selection alone.


def selection(small: bool) -> Iterator[Row]:
    """What an exact threshold costs next to one read of the weights, and a sort."""
    model, size = resnet50(small)
    variables = random_variables(model, np.zeros((1, size, size, 3), np.float32))
    host = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
    leaves = [jnp.array(x) for x in host]
    magnitudes = np.abs(np.concatenate([np.ravel(x) for x in host]))
    flat = [jnp.array(magnitudes)]
    position = int(SPARSITY * (magnitudes.size - 1))
    t = np.partition(magnitudes, position)[position]
    kept = magnitudes.size - position - 1
    near = {"by 0.2 %": t * np.float32(1.002), "by 30 %": t * np.float32(1.3)}

    def read(weights: Any) -> Any:
        return sum(jnp.sum(jnp.abs(w)) for w in weights)

    def cold(weights: Any) -> Any:
        return threshold(weights, SPARSITY)

    def warm(weights: Any, near: Any) -> Any:
        return threshold(weights, SPARSITY, near=near)

    once = {"one read of one array": Call(read, flat)}
    many = f"of {len(leaves)} arrays"
    groups = [
        {
            f"one read {many}": Call(read, leaves),
            f"threshold {many}, no hint": Call(cold, leaves),
            **{
                f"threshold {many}, hint off {by}": Call(warm, leaves, hint)
                for by, hint in near.items()
            },
        },
        {
            "threshold of one array, no hint": Call(cold, flat),
            "threshold of one array, hint off by 0.2 %": Call(
                warm, flat, near["by 0.2 %"]
            ),
        },
        {"jnp.sort of one array": Call(lambda w: jnp.sort(w[0]), flat)},
        {"jax.lax.top_k of one array": Call(lambda w: jax.lax.top_k(w[0], kept), flat)},
    ]
    for turn, group in enumerate(groups):
        rows = timed_calls({**once, **group}, calls=2 if small else 10)
        for name, row in rows.items():
            if turn and name in once:
                continue
            if name.startswith("threshold"):
                found = np.float32(row.pop("result"))
                below, up_to = np.sum(magnitudes < found), np.sum(magnitudes <= found)
                row["exact"] = bool(below <= position + 1 <= up_to)
            row.pop("result", None)
            yield {"selection": name, **row}


class Call(NamedTuple):
    """A function and what it is called with."""

    function: Callable[..., Any]
    weights: list[jax.Array]
    near: Any = None


def timed_calls(group: dict[str, Call], calls: int) -> dict[str, Row]:
    """Milliseconds of each, in turn; the first of the group is the unit."""
    compiled, rows = {}, {}
    for name, (function, weights, near) in group.items():
        arguments = (weights,) if near is None else (weights, jnp.asarray(near))
        start = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        compiled[name] = program, arguments
        size = sum(w.nbytes for w in weights) / weights[0].dtype.itemsize
        rows[name] = {
            "ms": 0.0,
            "reads": 0.0,
            "exact": None,
            "fusions": str(program.as_text()).count(" fusion("),
            "extra bytes a weight": memory(program, "temp") / size,
            "compile, s": seconds,
        }
    times: dict[str, list[float]] = {name: [] for name in group}
    for turn in range(8):
        for name, (program, arguments) in compiled.items():
            start = time.perf_counter()
            results = [program(*arguments) for _ in range(calls)]
            jax.block_until_ready(results)
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - start) / calls)
            rows[name]["result"] = results[-1]
    unit = np.median(times[next(iter(group))])
    for name, row in rows.items():
        row["ms"] = 1e3 * float(np.median(times[name]))
        row["reads"] = float(np.median(times[name]) / unit)
    return rows


def memory(program: Any, *kinds: str) -> int:
    """Bytes that a compiled program says it needs of these kinds."""
    analysis = program.memory_analysis()
    return sum(getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds)


# Whole training steps.


class Job(NamedTuple):
    """What is trained, apart from the method.

    Attributes:
        model: Called as ``model(inputs, train=...)``.
        variables: Those to start from, on the host.
        inner: The optimizer.
        batch: Inputs and labels.
        unit: What a batch consists of, such as images.
        items: How many of them.
    """

    model: nn.Module
    variables: Any
    inner: optax.GradientTransformation
    batch: tuple[Any, Any]
    unit: str
    items: int


def train_step(model: nn.Module, tx: Any, is_sparse: bool) -> Callable[..., Any]:
    """A training step: (params, statistics, opt_state), batch -> the same, loss."""

    def step(state: Any, batch: Any) -> Any:
        params, statistics, opt_state = state
        inputs, labels = batch

        def loss_fn(params: Any) -> Any:
            weights = st3jax.sparsify(params, opt_state) if is_sparse else params
            logits, moved = model.apply(
                {"params": weights, **statistics},
                inputs,
                train=True,
                mutable=list(statistics),
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), moved

        (loss, moved), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), moved, opt_state), loss

    return step


class Step:
    """A compiled training step, and the state it works on."""

    def __init__(self, job: Job, method: Callable[..., Any] | None):
        """Compiles the step with a method in the middle of its ramp, or without."""
        ramp = st3jax.polynomial_ramp(SPARSITY, 0, RAMP)
        self.tx = job.inner
        if method is not None:
            self.tx = method(job.inner, sparsity=lambda count: ramp(count + RAMP // 2))
        self.variables = job.variables
        self.init = jax.jit(self.tx.init)
        self.batch = jax.device_put(job.batch)
        self.reset()
        step = train_step(job.model, self.tx, is_sparse=method is not None)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self.batch)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        needed = memory(self.compiled, "temp", "argument", "output")
        self.gigabytes = (needed - memory(self.compiled, "alias")) / 1e9

    def reset(self) -> None:
        """Goes back to the start."""
        variables = jax.tree.map(jnp.array, self.variables)
        params = variables.pop("params")
        self.state = params, variables, self.init(params)

    def seconds(self, steps: int) -> float:
        """Wall time of so many steps, of each."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, self.loss = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps

    def repeats(self) -> bool:
        """Whether three steps taken twice end in equal bits."""
        ends = []
        for _ in range(2):
            self.reset()
            self.seconds(3)
            ends.append(jax.device_get(self.state[0]))
        return same_bits(*ends)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays on the host are the same."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def in_turn(pair: list[Step], steps: int, least_seconds: float) -> np.ndarray:
    """Seconds of a step of both, ``[turns, 2]``, in changing order."""
    times: list[list[float]] = []
    end = time.perf_counter() + least_seconds
    while len(times) < 4 or time.perf_counter() < end:
        order = (0, 1) if len(times) % 2 else (1, 0)
        taken = {i: pair[i].seconds(steps) for i in order}
        times.append([taken[0], taken[1]])
    return np.array(times[1:])  # the first warms up


def compare(job: Job, small: bool) -> Iterator[Row]:
    """Whole steps next to dense ones."""
    dense = Step(job, None)
    dense_repeats = dense.repeats()
    for name in ("ST-3", "GMP"):
        step = Step(job, METHODS[name])
        repeats = step.repeats()
        times = in_turn(
            [dense, step], 2 if small else 5, least_seconds=0 if small else 6
        )
        medians = np.median(times, axis=0)
        yield {
            "method": name,
            "time, of dense": float(np.median(times[:, 1] / times[:, 0])),
            "dense, ms": 1e3 * float(medians[0]),
            "ms": 1e3 * float(medians[1]),
            f"dense, {job.unit} a second": round(job.items / medians[0]),
            f"{job.unit} a second": round(job.items / medians[1]),
            "memory, of dense": step.gigabytes / dense.gigabytes,
            "dense, GB": dense.gigabytes,
            "GB": step.gigabytes,
            "dense, compile, s": dense.compile_seconds,
            "compile, s": step.compile_seconds,
            "loss at the end": float(step.loss),
            "dense, equal bits twice": dense_repeats,
            "equal bits twice": repeats,
        }


def resnet(dtype: str, batch: int) -> Callable[[bool], Iterator[Row]]:
    """The part of ResNet-50's step with this dtype and batch."""

    def part(small: bool) -> Iterator[Row]:
        model, size = resnet50(small, jnp.dtype(dtype))
        rng = np.random.default_rng(0)
        items = batch // 32 if small else batch
        images = rng.standard_normal((items, size, size, 3), np.float32)
        labels = rng.integers(0, model.classes, items, np.int32)
        inner = optax.chain(
            optax.add_decayed_weights(5e-5), optax.sgd(0.01, momentum=0.9)
        )
        variables = random_variables(model, images[:1])
        data = images, labels
        return compare(Job(model, variables, inner, data, "images", items), small)

    return part


def transformer(small: bool) -> Iterator[Row]:
    """A decoder's step, 97.5 million kernel weights, AdamW, 16 sequences of 1,024."""
    model = Transformer(layers=1, width=64, tokens=128) if small else Transformer()
    shape = (2, 16) if small else (16, 1024)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.tokens, (2, *shape), np.int32)
    variables = random_variables(model, tokens[0][:1])
    items = math.prod(shape)
    return compare(
        Job(model, variables, optax.adamw(1e-4), tuple(tokens), "tokens", items), small
    )


# A short job to its end.


def digits(small: bool) -> Iterator[Row]:
    """Trains on scikit-learn's digits to the end, twice with each method."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        yield {"method": "not run: scikit-learn is not there"}
        return
    loaded = load_digits()
    images = loaded.images[..., None].astype(np.float32) / 16
    labels = loaded.target.astype(np.int32)
    test = np.arange(len(labels)) % 5 == 4
    data = images[~test], labels[~test]
    stages, width, epochs = ((), 4, 1) if small else ((1, 1, 1), 16, 15)
    model = ResNet(stages=stages, width=width, classes=10, large=False)

    def ended(name: str) -> Row:
        first, second = train_twice(model, METHODS[name], data, epochs)
        logits: Any = model.apply(first, images[test], train=False)
        right = np.argmax(logits, -1) == labels[test]
        zeros = st3jax.summary(first["params"])
        return {
            "method": name,
            "test accuracy, %": 100 * float(np.mean(right)),
            "zeros": int(zeros.zeros),
            "weights": int(zeros.weights),
            "equal bits twice": same_bits(first, second),
        }

    with ThreadPoolExecutor() as pool:
        yield from pool.map(ended, METHODS)


def train_twice(model: nn.Module, method: Any, data: Any, epochs: int) -> list[Any]:
    """Variables at the end of both runs, on the host, their zeros in place."""
    images, labels = data
    steps_per_epoch = len(labels) // 64
    steps = epochs * steps_per_epoch
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    if method is not None:
        ramp = st3jax.polynomial_ramp(SPARSITY, steps // 10, steps * 2 // 3)
        tx = method(tx, sparsity=ramp)
    step = jax.jit(train_step(model, tx, is_sparse=method is not None))
    ends = []
    for _ in range(2):
        variables = jax.tree.map(jnp.array, random_variables(model, images[:1]))
        params = variables.pop("params")
        state = params, variables, tx.init(params)
        rng = np.random.default_rng(0)
        for _ in range(epochs):
            order = rng.permutation(len(labels))[: 64 * steps_per_epoch]
            for rows in order.reshape(-1, 64):
                state, _ = step(state, (images[rows], labels[rows]))
        params, statistics, opt_state = state
        if method is not None:
            params = st3jax.finalize(params, opt_state)
        ends.append(jax.device_get({"params": params, **statistics}))
    return ends


# The parts, one process after the other.


class Part(NamedTuple):
    """One part of the run.

    Attributes:
        rows: Its rows, each when it is known, tiny if it is called with True.
        seconds: Its time limit.
        about: What a reader of its table has to know.
    """

    rows: Callable[[bool], Iterator[Row]]
    seconds: float
    about: str


STEPS = (
    "Whole training steps at 90 % in the middle of a ramp, timed in turn with dense "
    "ones. The dense step is compiled first, and what it tunes is not tuned again."
)
RESNET = f"ResNet-50, {{}}, batch {{}}, SGD with momentum. {STEPS}"
TF32 = "float32 (at JAX's default precision)"
PARTS = {
    "versions": Part(versions, 30, "What this was run with."),
    "golden": Part(
        golden,
        75,
        "The recorded trajectories in float64: largest relative differences.",
    ),
    "selection": Part(
        selection,
        75,
        "The exact threshold at 90 % of ResNet-50's kernels; no call waits for the one "
        "before. Fusions are those of the compiled program, in loops once.",
    ),
    "resnet-bfloat16-128": Part(
        resnet("bfloat16", 128), 120, RESNET.format("bfloat16", 128)
    ),
    "transformer": Part(
        transformer,
        100,
        "A decoder of 12 layers and 768 channels, 97.5 million kernel weights, "
        f"bfloat16, 16 sequences of 1,024 tokens, AdamW. {STEPS}",
    ),
    "resnet-float32-128": Part(resnet("float32", 128), 90, RESNET.format(TF32, 128)),
    "digits": Part(
        digits,
        45,
        "A small ResNet on scikit-learn's digits, 15 epochs, 90 % zeros, trained twice "
        "from one seed.",
    ),
    "resnet-bfloat16-256": Part(
        resnet("bfloat16", 256), 90, RESNET.format("bfloat16", 256)
    ),
    "resnet-float32-256": Part(resnet("float32", 256), 90, RESNET.format(TF32, 256)),
}


class Report:
    """What is known so far, printed and written at once."""

    def __init__(self, folder: pathlib.Path):
        """Begins new files in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.markdown = folder / "accelerator.md"
        self.json = folder / "accelerator.json"
        self.log = folder / "accelerator.log"
        self.parts: dict[str, dict[str, Any]] = {}
        for path in (self.markdown, self.log):
            path.write_text("")

    def say(self, text: str) -> None:
        """Adds lines, and keeps all rows."""
        print(text, flush=True)
        with self.markdown.open("a") as file:
            file.write(f"{text}\n")
        self.json.write_text(json.dumps(self.parts, indent=1) + "\n")

    def begin(self, name: str, about: str) -> None:
        """Begins a part."""
        self.parts[name] = {"rows": [], "ended": "not ended", "seconds": 0.0}
        self.say(f"\n## {name}\n\n{about}\n")

    def add(self, name: str, row: Row) -> None:
        """Adds a row to its table."""
        rows = self.parts[name]["rows"]
        rows.append(row)
        lines = [list(row), ["---"] * len(row)] if len(rows) == 1 else []
        lines.append([cell(value) for value in row.values()])
        self.say("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def end(self, name: str, sentence: str, seconds: float) -> None:
        """Ends a part."""
        self.parts[name] |= {"ended": sentence, "seconds": seconds}
        self.say(f"\n{sentence} ({seconds:.0f} s)")


def cell(value: Any) -> str:
    """A value as a reader likes it."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_part(name: str, small: bool, seconds: float, report: Report) -> str:
    """Runs a part as a process, no longer than this; says how it ended."""
    command = [sys.executable, __file__, f"--part={name}", *["--small"] * small]
    stopped = threading.Event()
    with (
        report.log.open("a+") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        begin = log.tell()

        def stop() -> None:
            stopped.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                report.add(name, json.loads(line))
            else:
                log.write(line)
        code = process.wait()
        timer.cancel()
        log.seek(begin)
        said = log.read()
    if stopped.is_set():
        return f"Stopped at its limit of {seconds:.0f} s."
    if code == 0:
        return "Complete."
    errors = re.findall(r"^\S*(?:Error|Exception)\b.*", said, re.MULTILINE)
    last = (errors or said.splitlines() or ["no word"])[-1]
    return f"Failed with exit code {code}: {last}"


def run(names: list[str], small: bool, minutes: float, folder: pathlib.Path) -> bool:
    """Runs the parts one after the other; whether all are complete."""
    report = Report(folder)
    report.say("# ST-3 on an accelerator")
    end = time.monotonic() + 60 * minutes - 5
    for name in names:
        report.begin(name, PARTS[name].about)
        start = time.monotonic()
        seconds = min(PARTS[name].seconds * minutes / 6, end - start)
        if seconds > 0:
            sentence = run_part(name, small, seconds, report)
        else:
            sentence = f"Not run: the {minutes:g} minutes are over."
        report.end(name, sentence, time.monotonic() - start)
    return all(part["ended"] == "Complete." for part in report.parts.values())


def main() -> None:
    """Runs all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default="accelerator")
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all of it")
    parser.add_argument("--small", action="store_true", help="tiny, to try it")
    parser.add_argument("--part", choices=PARTS, help="one part, here, rows as JSON")
    args = parser.parse_args()
    if args.part:
        for row in PARTS[args.part].rows(args.small):
            print(json.dumps(row), flush=True)
        return
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as cache:
        # A new one: with another's programs, compile times would mean nothing.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        complete = run(names, args.small, args.minutes, args.out)
    sys.exit(not complete)


if __name__ == "__main__":
    main()
