"""Checks a configuration before anything is loaded or compiled."""

from typing import Any

import jax
import ml_collections

import base_config
from errors import UserError
from job.costs import abstract_variables, kernel_costs
from job.methods import METHODS
from job.optimizers import make_optimizer
from models import create_model

__all__ = ["check_config"]

CHOICES = {
    "sparsity.method": tuple(METHODS),
    "learning_rate.schedule": ("step", "cosine"),
    "data.augmentation": ("none", "shift", "resized_crop"),
    "data.broken_images": ("stop", "skip"),
    "not_finite": ("stop", "skip"),
}
AT_LEAST = {
    "batch_size": 1,
    "num_epochs": 1,
    "fine_tune_epochs": 0,
    "log_every_steps": 1,
    "eval_every_epochs": 1,
    "accumulate_steps": 1,
    "ema_decay": 0,
    "data.image_size": 1,
    "data.workers": 0,
}


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises unless a run with this configuration can start.

    Raises:
        UserError: With the field, its value and what it may be.
    """
    _check_fields(config, base_config.get_config(), "config")
    for field, choices in CHOICES.items():
        value = _get(config, field)
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise UserError(f"config.{field} is one of {listed}, got {value!r}")
    for field, least in AT_LEAST.items():
        value = _get(config, field)
        if value < least:
            raise UserError(f"config.{field} is {least} or more, got {value}")
    _check_batch(config)
    if config.ema_decay >= 1:
        raise UserError(f"config.ema_decay is below 1, got {config.ema_decay}")
    if config.checkpoint_every_epochs <= 0:
        raise UserError(
            "config.checkpoint_every_epochs is above 0, got "
            f"{config.checkpoint_every_epochs}"
        )
    if config.data.in_memory and config.data.augmentation == "resized_crop":
        raise UserError(
            "config.data.in_memory keeps images as large as the network's input, and "
            "config.data.augmentation 'resized_crop' needs them whole: choose one"
        )
    if config.second_cycle and config.sparsity.method == "lrr":
        raise UserError(
            "config.second_cycle rewinds the rates once, and method 'lrr' does so for "
            "each cycle: choose one"
        )
    try:
        model = create_model(config, num_classes=10)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    variables, _ = abstract_variables(model, config)
    weighed = config.sparsity.budget == "multiply_adds"
    costs = kernel_costs(model, config) if weighed else {}
    try:
        optimizer = make_optimizer(config, steps_per_epoch=100, costs=costs)
        jax.eval_shape(optimizer.init, variables["params"])
    except (TypeError, ValueError) as error:
        raise UserError(f"config.sparsity: {error}") from error


def _check_batch(config: ml_collections.ConfigDict) -> None:
    devices, parts = jax.device_count(), config.accumulate_steps
    if config.batch_size % (devices * parts):
        accumulated = f" in {parts} accumulated parts" if parts > 1 else ""
        raise UserError(
            f"config.batch_size {config.batch_size} cannot be split evenly over "
            f"{devices} devices{accumulated}: make it a multiple of {devices * parts}"
        )


def _get(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _check_fields(
    config: ml_collections.ConfigDict, known: ml_collections.ConfigDict, where: str
) -> None:
    """Every field is one of ``base_config.py``; a model's arguments are its own."""
    for name in known:
        if name not in config:
            raise UserError(f"{where}.{name} is missing: start from base_config.py")
    for name, value in config.items():
        if name not in known:
            raise UserError(
                f"{where}.{name} is not a field of a configuration: {where} has "
                f"{', '.join(sorted(known))}"
            )
        if isinstance(known[name], ml_collections.ConfigDict) and name != "model":
            _check_fields(value, known[name], f"{where}.{name}")
