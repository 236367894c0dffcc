"""Trains a sparse network: the whole loop, visible from top to bottom.

python experiments/train.py --config=experiments/digits_st3.py

Any field of the configuration can be given on the command line, as in
``--config.sparsity.final=0.95``. Started again, the same command goes on where it
stopped.
"""

import functools
import pathlib
import re
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags, logging
from flax import jax_utils
from flax.training import train_state
from ml_collections import config_flags
from rich.console import Console

import checkpoints
import input_pipeline
import report
import st3jax
from check_config import check_config
from costs import kernel_costs
from errors import UserError
from models import create_model
from models.layers import BATCH_AXIS
from monitor import Monitor
from optimizers import make_optimizer, total_steps


class TrainState(train_state.TrainState):
    """Flax's training state with BatchNorm's running statistics.

    Attributes:
        batch_stats: Running statistics, in the structure of the model.
    """

    batch_stats: Any


def create_train_state(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    channels: int,
    steps_per_epoch: int,
) -> TrainState:
    """Fresh parameters and optimizer for a seed."""
    size = config.data.image_size
    images = jnp.zeros((1, size, size, channels))
    init = jax.jit(
        functools.partial(model.init, train=False),
        # It runs once: compiling fast matters more than running fast.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    variables = init(jax.random.key(config.seed), images)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=make_optimizer(config, steps_per_epoch, kernel_costs(model, config)),
        batch_stats=variables.get("batch_stats", {}),
    )
    return state.replace(step=jnp.zeros([], jnp.int32))


def effective_params(
    config: ml_collections.ConfigDict, params: Any, opt_state: Any
) -> Any:
    """The weights that the model sees."""
    if config.sparsity.method == "none":
        return params
    return st3jax.sparsify(params, opt_state)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], config: ml_collections.ConfigDict
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on one device's part of the batch."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index(BATCH_AXIS))
    augment_key, dropout_key = jax.random.split(key)
    images = input_pipeline.normalise(batch["image"], config)
    images = input_pipeline.augment(images, augment_key, config)

    def loss_fn(params: Any) -> Any:
        params = effective_params(config, params, state.opt_state)
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch["label"], logits.shape[-1]), config.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (logits, updates["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
    grads, metrics = jax.lax.pmean(
        (grads, {"train_loss": loss, "train_accuracy": accuracy}), BATCH_AXIS
    )
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), metrics


def eval_step(
    state: TrainState, batch: dict[str, jax.Array], config: ml_collections.ConfigDict
) -> dict[str, jax.Array]:
    """How many images of the batch are classified right, over all devices."""
    logits = state.apply_fn(
        {
            "params": effective_params(config, state.params, state.opt_state),
            "batch_stats": state.batch_stats,
        },
        input_pipeline.normalise(batch["image"], config),
        train=False,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    sums = {
        "correct": jnp.sum((logits.argmax(-1) == batch["label"]) & batch["valid"]),
        "loss": jnp.sum(losses * batch["valid"]),
        "images": jnp.sum(batch["valid"]),
    }
    return jax.lax.psum(sums, BATCH_AXIS)


def split_over_devices(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``[B, ...]`` to ``[devices, B / devices, ...]``."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


def evaluate(
    p_eval_step: Any, state: TrainState, data: Any, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """Accuracy and loss over every test image, with the weights that will ship."""
    sums = [
        p_eval_step(state, split_over_devices(batch))
        for batch in input_pipeline.test_batches(data, config)
    ]
    total = jax.tree.map(
        lambda *xs: float(sum(x[0] for x in xs)), *jax.device_get(sums)
    )
    return {
        "test_accuracy": total["correct"] / total["images"],
        "test_loss": total["loss"] / total["images"],
    }


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
    """Trains to the end, from the beginning or from where the workdir's run stopped.

    Args:
        config: A configuration with the fields of ``base_config.py``.
        workdir: Folder for checkpoints, logs and the report.

    Returns:
        The report, as in ``report.json``.

    Raises:
        UserError: If the configuration, the data or the workdir is not usable.
    """
    console = Console()
    check_config(config)
    data = input_pipeline.load(config)
    checkpoints.claim_workdir(workdir, config)
    config = ml_collections.FrozenConfigDict(config)

    steps_per_epoch = len(data.train) // config.batch_size
    steps = total_steps(config, steps_per_epoch)
    model = create_model(config, data.num_classes)
    state = create_train_state(config, model, data.channels, steps_per_epoch)
    batches = input_pipeline.train_batches(data, config)
    manager = checkpoints.open_checkpoints(workdir)
    state = checkpoints.restore(manager, state, batches)
    start = int(state.step)
    report.print_settings(
        console,
        config,
        {
            "workdir": workdir,
            "images": f"{len(data.train):,} to train on, {len(data.test):,} to test on",
            "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
            "kernel weights": f"{st3jax.summary(state.params).weights:,}",
            "steps": f"{start:,} to {steps:,}, {steps_per_epoch:,} an epoch",
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        },
    )

    # Laid out as pmap lays out its results, or the second step would compile again.
    state = jax_utils.replicate(state, axis_name=BATCH_AXIS)
    p_train_step = jax.pmap(
        functools.partial(train_step, config=config), BATCH_AXIS, donate_argnums=0
    )
    p_eval_step = jax.pmap(functools.partial(eval_step, config=config), BATCH_AXIS)
    count_zeros = jax.jit(
        lambda params, opt_state: st3jax.summary(
            effective_params(config, params, opt_state)
        )
    )

    def sparsity_of(state: TrainState) -> float:
        local = jax_utils.unreplicate((state.params, state.opt_state))
        return float(count_zeros(*local).sparsity)

    with manager, Monitor(workdir, console, start, steps) as monitor:
        recent: list[Any] = []
        since = time.monotonic()
        for step in range(start + 1, steps + 1):
            state, metrics = p_train_step(state, split_over_devices(next(batches)))
            recent.append(metrics)
            epoch, past = divmod(step, steps_per_epoch)
            last, epoch_ends = step == steps, past == 0

            if last or step % config.log_every_steps == 0:
                rows = jax.device_get(recent)
                means = {
                    name: float(np.mean([row[name] for row in rows]))
                    for name in metrics
                }
                images = len(recent) * config.batch_size
                means["images_per_second"] = images / (time.monotonic() - since)
                means["sparsity"] = sparsity_of(state)
                monitor.record(step, means)
                recent, since = [], time.monotonic()

            if last or (epoch_ends and epoch % config.eval_every_epochs == 0):
                tests = evaluate(p_eval_step, state, data, config)
                tests["sparsity"] = sparsity_of(state)
                monitor.record(step, tests)

            if last or (epoch_ends and epoch % config.checkpoint_every_epochs == 0):
                checkpoints.save(manager, step, jax_utils.unreplicate(state), batches)

    if start == steps:  # an ended run was started again
        tests = evaluate(p_eval_step, state, data, config)
    state = jax_utils.unreplicate(state)
    params = effective_params(config, state.params, state.opt_state)
    costs = kernel_costs(model, config)
    return report.write_report(
        workdir, console, config, params, costs, tests["test_accuracy"], steps
    )


def default_workdir(config_file: str, overrides: dict[str, Any]) -> pathlib.Path:
    """``runs/<configuration>``, with the fields that the command line changed."""
    changes = [f"{name}={value}" for name, value in sorted(overrides.items())]
    return pathlib.Path("runs", "-".join([pathlib.Path(config_file).stem, *changes]))


CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, logs and the report; a run that is in it "
    "is continued. Default: a folder under runs/ named after the settings.",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Reads the flags and trains."""
    flag = flags.FLAGS["config"]
    config_file = config_flags.get_config_filename(flag)
    try:
        if argv[1:]:
            raise UserError(f"unknown argument {argv[1]!r}: settings are --config.x=y")
        if not pathlib.Path(config_file).is_file():
            raise UserError(f"there is no configuration file {config_file}")
        workdir = WORKDIR.value or default_workdir(
            config_file, config_flags.get_override_values(flag)
        )
        train_and_evaluate(CONFIG.value, pathlib.Path(workdir))
    except UserError as error:
        sys.exit(f"error: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line; a field that does not exist is told in a sentence."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # from ml_collections
        field = re.search(r"\w+", str(error))
        meant = re.search(r'mean "(\w+)"', str(error))
        sys.exit(
            f"error: the configuration has no field {field and field[0]!r}"
            f"{f', did you mean {meant[1]!r}' if meant else ''}: experiments/"
            "base_config.py lists them all"
        )


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
