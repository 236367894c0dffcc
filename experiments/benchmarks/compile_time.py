"""How long a method takes to trace and compile, next to the same without it.

python experiments/benchmarks/compile_time.py

Compiles the update of an optimizer on ResNet-50's 54 kernels and on twice as many, and
a whole training step of ResNet-20 at batch 128, dense and with ST-3, each anew
``--repetitions`` times and in turn. Prints medians in seconds as a table in Markdown,
and what an update costs that nobody has compiled. No compilation cache is used.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from harness import run_main

import cifar10_st3
import imagenet_st3
import st3jax
from job.costs import abstract_variables
from models import create_model
from models.layers import BATCH_AXIS
from paths import kernels

REPETITIONS = flags.DEFINE_integer("repetitions", 3, "Compilations of each row.")
SGD = optax.sgd(0.1, momentum=0.9)
RAMP = st3jax.polynomial_ramp(0.9, begin=10, end=90)
METHODS: dict[str, Any] = {
    "sgd": SGD,
    "st3(sgd, 0.9)": st3jax.st3(SGD, 0.9),
    "st3(sgd, ramp, freeze_step)": st3jax.st3(SGD, RAMP, freeze_step=100),
}


class Program(NamedTuple):
    """What is compiled: a function and the shapes that it is called with."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


def resnet50_update(tx: Any, times: int) -> Program:
    """The update of ResNet-50's kernels, so many times over."""
    config = imagenet_st3.get_config()
    variables, _ = abstract_variables(create_model(config, 1000), config)
    shapes = kernels(variables["params"])
    params = {f"{path}_{i}": w for i in range(times) for path, w in shapes.items()}
    nested = {path: {"kernel": w} for path, w in params.items()}
    state = jax.eval_shape(tx.init, nested)
    return Program(lambda *args: tx.update(*args), (nested, state, nested))


def resnet20_step(tx: Any, sparse: bool) -> Program:
    """A whole training step of ResNet-20 on 128 images, as one device has it."""
    config = cifar10_st3.get_config()
    model = create_model(config, 10)
    variables, image = abstract_variables(model, config)
    images = jax.ShapeDtypeStruct((128, *image.shape[1:]), image.dtype)
    labels = jax.ShapeDtypeStruct((128,), jnp.int32)

    def step(params: Any, statistics: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            weights = st3jax.sparsify(params, state) if sparse else params
            logits, moved = model.apply(
                {"params": weights, "batch_stats": statistics},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), moved

        grads, moved = jax.grad(loss_fn, has_aux=True)(params)
        updates, new_state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), moved["batch_stats"], new_state

    params, statistics = variables["params"], variables["batch_stats"]
    state = jax.eval_shape(tx.init, params)
    one = jax.make_mesh((1,), (BATCH_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.shard_map(
        step, mesh=one, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
    return Program(step, (params, statistics, state, images, labels))


def seconds(program: Program) -> tuple[float, float]:
    """To trace it, lowering included, and to compile it."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(program.fn).lower(*program.args)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def eager_milliseconds(tx: Any) -> float:
    """An update of a small tree that nobody has compiled, from its second call on."""
    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": jnp.asarray(rng.standard_normal((32, 32), np.float32))}
        for i in range(4)
    }
    state, taken = tx.init(params), []
    for _ in range(6):
        start = time.perf_counter()
        _, state = jax.block_until_ready(tx.update(params, state, params))
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken[1:]))


def main(argv: list[str]) -> None:
    """Compiles all rows and prints the table."""
    del argv
    programs = {
        f"update of {54 * times} kernels, {name}": resnet50_update(tx, times)
        for times in (1, 2)
        for name, tx in METHODS.items()
    } | {
        f"ResNet-20's step, {name}": resnet20_step(tx, sparse=name != "sgd")
        for name, tx in METHODS.items()
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(REPETITIONS.value):
        for name, program in programs.items():
            taken[name].append(seconds(program))
    print("| | trace, s | compile, s | together | of sgd |\n|---|---|---|---|---|")
    for name, pairs in taken.items():
        trace, compiling = np.median(pairs, axis=0)
        total = {key: np.median(np.sum(taken[key], axis=1)) for key in taken}
        plain = total[f"{name.split(',')[0]}, sgd"]
        print(
            f"| {name} | {trace:.1f} | {compiling:.1f} | {total[name]:.1f} | "
            f"{total[name] / plain:.2f} |"
        )
    for name, tx in METHODS.items():
        print(f"eager update, {name}: {eager_milliseconds(tx):.1f} ms")


if __name__ == "__main__":
    run_main(main)
