"""A job: all that a run is made of, from its configuration and its data."""

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import optax

import paths
from base_config import EPOCHS
from data import sources
from data.input_pipeline import steps_per_epoch
from errors import UserError
from job.costs import abstract_variables, kernels_of
from job.optimizers import make_optimizer
from job.rates import cycles, learning_rate, total_steps
from job.settings import Settings, settle
from models import create_model

__all__ = ["Job", "assemble", "build"]

LAST_STEP = 2**31 - 1
"""Steps are counted in 32 bits."""


class Job(NamedTuple):
    """What trains.

    Attributes:
        config: The settings: every field that is of use has its value.
        origins: From a field to whose value it has where that is the method's own.
        data: The images.
        model: The network.
        costs: From path to the multiply-adds of one weight, for one image.
        layouts: From path to a letter for each axis of a kernel.
        tx: The optimizer, wrapped in the sparse-training method.
        steps_per_epoch: Optimizer steps in an epoch.
        steps: Optimizer steps of the whole run.
    """

    config: ml_collections.FrozenConfigDict
    origins: dict[str, str]
    data: sources.Data
    model: nn.Module
    costs: dict[str, int]
    layouts: dict[str, str]
    tx: optax.GradientTransformationExtraArgs
    steps_per_epoch: int
    steps: int


def build(config: ml_collections.ConfigDict) -> Job:
    """The job of a configuration; its data set is opened, and nothing is trained.

    Args:
        config: A configuration with the fields of ``base_config.py``.

    Raises:
        UserError: If the configuration or the data is not usable.
    """
    settings = settle(config)
    return assemble(settings, sources.load(settings.config))


def assemble(settings: Settings, data: sources.Data) -> Job:
    """The job of settings and the data that goes with them.

    Raises:
        UserError: If they do not make one.
    """
    config = settings.config
    epoch = steps_per_epoch(data, config)
    with _told("model"):
        model = create_model(config, data.num_classes)
        params = abstract_variables(model, config)[0]["params"]
        kernels = kernels_of(model, config)
    with _told("sparsity"):
        _check_dense(config, params)
        _check_length(config, epoch)
        steps = total_steps(config, epoch)
    with _told("learning_rate"):
        jax.eval_shape(learning_rate(config, epoch), 0)
    with _told("sparsity"):
        tx = make_optimizer(config, epoch, kernels.costs, kernels.layouts)
        jax.eval_shape(tx.init, params)
    return Job(
        config=config,
        origins=settings.origins,
        data=data,
        model=model,
        costs=kernels.costs,
        layouts=kernels.layouts,
        tx=tx,
        steps_per_epoch=epoch,
        steps=steps,
    )


@contextlib.contextmanager
def _told(section: str) -> Iterator[None]:
    """Says of which section of the configuration something cannot be built."""
    try:
        yield
    except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
        text = str(error).replace("prunable=...", "config.sparsity.dense")
        raise UserError(f"config.{section}: {text}") from error


def _check_dense(config: ml_collections.ConfigDict, params: Any) -> None:
    """Every path of ``config.sparsity.dense`` is that of a kernel."""
    names = list(paths.kernels(params))
    dense = config.sparsity.dense or ()
    for path in dense:
        if not any(fnmatch.fnmatchcase(name, path) for name in names):
            raise ValueError(
                f"the path {path!r} of dense matches no kernel: there are "
                f"{', '.join(names[:3])} and {len(names) - 3} more"
            )
    if all(any(fnmatch.fnmatchcase(name, x) for x in dense) for name in names):
        raise ValueError(
            f"no parameter is prunable, as a path of dense matches each kernel, got "
            f"{dense!r}"
        )


def _check_length(config: ml_collections.ConfigDict, steps_per_epoch: int) -> None:
    """The run comes to an end, and its steps can be counted on the device."""
    times = cycles(config) + config.second_cycle
    rounds = f" in {times:,} cycles" if times > 1 else ""
    if config.sparsity.method == "lrr":
        rounds += f", as config.lrr.keep is {config.lrr.keep}"
    for count, most, unit in (
        (total_steps(config, 1), EPOCHS, "epochs"),
        (total_steps(config, steps_per_epoch), LAST_STEP, "steps"),
    ):
        if count > most:
            raise UserError(
                f"the run has {most:,} {unit} or less, got {count:,}: "
                f"config.num_epochs is {config.num_epochs:,}{rounds}, and "
                f"config.fine_tune_epochs {config.fine_tune_epochs:,}"
            )
