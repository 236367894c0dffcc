"""From the fields that somebody set to those that a run has: each of use, or ``None``.

A field that is set counts, by whatever door: in a file, on the command line, from
Python. One that is ``None`` has the value that ``config.defaults`` holds for the
method, or else the one for all methods. What is of no use under the other settings is
``None`` in the end, and an error if it was set.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import base_config
from errors import UserError
from fields import checked, shown
from job.methods import DENSE_WITHIN, METHODS

__all__ = ["Settings", "settle"]


class Settings(NamedTuple):
    """What a run is to do.

    Attributes:
        config: The configuration, where a field without use is ``None``.
        origins: From a field to whose value it has where that is the method's own.
    """

    config: ml_collections.FrozenConfigDict
    origins: dict[str, str]


class Need(NamedTuple):
    """What a field needs to be of use.

    Attributes:
        other: Another field.
        met: Whether a value of that one is such.
        words: Which values are such.
    """

    other: str
    met: Callable[[Any], bool]
    words: str


def _one_of(other: str, *choices: Any) -> Need:
    words = " or ".join(map(repr, choices))
    return Need(other, choices.__contains__, words)


NEEDS = [
    ("data.workers", _one_of("data.in_memory", False)),
    ("data.shift_pixels", _one_of("data.augmentation", "shift")),
    ("learning_rate.warmup_epochs", _one_of("learning_rate.schedule", "cosine")),
    ("learning_rate.drop_epochs", _one_of("learning_rate.schedule", "step")),
    ("learning_rate.drop_factor", _one_of("learning_rate.schedule", "step")),
    ("learning_rate.fine_tune", Need("fine_tune_epochs", lambda x: x != 0, "above 0")),
    ("eval_dense", _one_of("sparsity.method", *DENSE_WITHIN)),
    ("sparsity.final", _one_of("sparsity.layers", ())),
    *(
        (f"sparsity.{name}", need)  # how the zeros spread over layers
        for name in ("distribution", "budget", "criterion")
        for need in (
            _one_of("sparsity.layers", ()),
            Need("sparsity.pattern", lambda x: ":" not in x, "'' or a block"),
        )
    ),
    # It compares weights of different layers.
    ("sparsity.criterion", _one_of("sparsity.distribution", "global")),
]
"""Fields and what they need, beside those of methods."""


def settle(config: ml_collections.ConfigDict) -> Settings:
    """The settings of a run, from a configuration that somebody wrote.

    Args:
        config: A configuration with the fields of ``base_config.py``.

    Raises:
        UserError: With the field, its value and what it may be.
    """
    given = _known(config, base_config.FIELDS | {"defaults": None}, "config")
    defaults = given.pop("defaults")
    given = {field: _checked(field, value) for field, value in given.items()}
    common, own = _defaults(defaults, given)
    values = {
        field: _checked(field, _first(value, own.get(field), common.get(field)), common)
        for field, value in given.items()
    }
    if given["learning_rate.drop_epochs"] is None:  # those of a longer training
        drops = values["learning_rate.drop_epochs"]
        values["learning_rate.drop_epochs"] = tuple(
            epoch for epoch in drops if epoch < values["num_epochs"]
        )
    values = _useful(given, values)
    used = {field: x for field, x in values.items() if x is not None}
    _check_together(used)
    _check_epochs(used)
    origins = {
        field: values["sparsity.method"]
        for field in own
        if given[field] is None and values[field] is not None
    }
    return Settings(ml_collections.FrozenConfigDict(_nested(values)), origins)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _checked(field: str, value: Any, valued: Container[str] = ()) -> Any:
    """The value, as one that the field may have.

    Args:
        field: Its name, with dots.
        value: What it has.
        valued: Fields that have a value, though ``base_config.py`` gives them none.
    """
    kind = KINDS[field]
    unset = value is None and kind.default is None and field not in valued
    return None if unset else checked(field, kind, value)


def _defaults(
    defaults: Any, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.defaults``: what all methods share, and what the method's own are."""
    if not isinstance(defaults, ml_collections.ConfigDict):
        raise UserError(
            f"config.defaults has fields and their values, got {shown(defaults)}"
        )
    for method in defaults:
        if method not in ("common", *METHODS):
            listed = ", ".join(map(repr, ("common", *METHODS)))
            raise UserError(f"config.defaults is one of {listed}, got {method!r}")
    known = base_config.DEFAULTS["common"]
    common = _known(defaults.get("common"), known, "config.defaults.common")
    for method, section in defaults.items():
        if method != "common":
            _check_own(method, section, common)
    own = _flat(defaults.get(given["sparsity.method"], {}))
    if "ramp" in own:
        begin, end = (share * given["num_epochs"] for share in own.pop("ramp"))
        own = {"sparsity.begin_epoch": begin, "sparsity.end_epoch": end, **own}
    return common, own


def _check_own(method: str, section: Any, common: dict[str, Any]) -> None:
    """The defaults of a method are of fields that have one, and that it has."""
    where = f"config.defaults.{method}"
    if not isinstance(section, ml_collections.ConfigDict):
        raise UserError(f"{where} has fields and their values, got {shown(section)}")
    own = _flat(section)
    ramp = own.pop("ramp", None)
    if ramp is not None:
        own["sparsity.begin_epoch"] = ramp
        if not _is_ramp(ramp):
            raise UserError(
                f"{where}.ramp is two shares of num_epochs, (begin, end), got "
                f"{shown(ramp)}"
            )
    for field in own.keys() - common.keys():
        raise UserError(
            f"{where}.{field} is the default of no field: config.defaults.common in "
            "base_config.py has all that have one"
        )
    for field, need in _needs_of_methods(own):
        if not need.met(method):
            raise UserError(
                f"{where}.{field} does nothing, as only {need.words} has that field: "
                "leave it out"
            )


def _is_ramp(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(x, int | float | np.number) and 0 <= x <= 1 for x in value)
    )


def _useful(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values with ``None`` for those of no use; an error if one was given."""
    values = dict(values)
    for field, need in [*_needs_of_methods(given), *NEEDS]:
        if values[need.other] is None or need.met(values[need.other]):
            continue
        if given[field] is not None:
            raise UserError(
                f"config.{field} is {given[field]!r}, but does nothing while "
                f"config.{need.other} is {values[need.other]!r}, only where that is "
                f"{need.words}: leave it out, or let a file set "
                f"config.defaults.common.{field}"
            )
        values[field] = None
    return values


def _needs_of_methods(fields: Iterable[str]) -> Iterator[tuple[str, Need]]:
    """Which methods each field of a method needs."""
    for field in fields:
        section, _, name = field.rpartition(".")
        if section in METHODS:
            yield field, _one_of("sparsity.method", section)
        elif section == "sparsity" and name != "method":
            having = [key for key, method in METHODS.items() if name in method.fields]
            yield field, _one_of("sparsity.method", *having)


def _check_together(values: dict[str, Any]) -> None:
    """What relates one field to another, but for epochs."""
    channels = len(values["data.mean"])
    if channels not in (1, 3) or len(values["data.std"]) != channels:
        raise UserError(
            "config.data.mean and config.data.std have a number for each channel, 1 or "
            f"3, got {channels} and {len(values['data.std'])}"
        )
    if values["data.test_split"] == values["data.train_split"]:
        raise UserError(
            f"config.data.test_split {values['data.test_split']!r} is what config.data."
            "train_split is: test on other images than those to train on"
        )
    size = values["data.image_size"]
    if values.get("data.shift_pixels", 0) > size:
        raise UserError(
            f"config.data.shift_pixels is {size} or less, as config.data.image_size is "
            f"{size}, got {values['data.shift_pixels']}"
        )
    devices, parts = jax.device_count(), values["accumulate_steps"]
    if values["batch_size"] % (devices * parts):
        accumulated = f" in {parts} accumulated parts" if parts > 1 else ""
        raise UserError(
            f"config.batch_size {values['batch_size']} cannot be split evenly over "
            f"{devices} devices{accumulated}: make it a multiple of {devices * parts}"
        )
    if values["data.in_memory"] and values["data.augmentation"] == "resized_crop":
        raise UserError(
            "config.data.in_memory keeps images as large as the network's input, and "
            "config.data.augmentation 'resized_crop' needs them whole: choose one"
        )
    paths = [path for path, _ in values.get("sparsity.layers", ())]
    if not all(isinstance(path, str) for path in paths) or len({*paths}) < len(paths):
        raise UserError(
            "config.sparsity: the paths of layers are texts, each once, got "
            f"{shown(paths)}"
        )
    if values["second_cycle"] and values["sparsity.method"] == "lrr":
        raise UserError(
            "config.second_cycle rewinds the rates once, and method 'lrr' does so for "
            "each cycle: choose one"
        )


def _check_epochs(values: dict[str, Any]) -> None:
    """What happens at an epoch happens while the network trains."""
    epochs = values["num_epochs"]
    begin, end = (values.get(f"sparsity.{name}_epoch") for name in ("begin", "end"))
    if end is not None and end <= begin:
        raise UserError(
            f"config.sparsity.end_epoch {end} is not after config.sparsity.begin_epoch "
            f"{begin}: the ramp takes some time between them"
        )
    warmup = values.get("learning_rate.warmup_epochs", 0)
    for field, last, bound in (
        ("sparsity.end_epoch", end or 0, epochs),
        ("learning_rate.warmup_epochs", warmup, epochs - 1),
    ):
        if last > bound:
            raise UserError(
                f"config.{field} is {bound} or less, as config.num_epochs is {epochs}, "
                f"got {last}"
            )
    drops = values.get("learning_rate.drop_epochs", ())
    if not all(0 < x < epochs for x in drops) or sorted({*drops}) != [*drops]:
        raise UserError(
            "config.learning_rate.drop_epochs are whole numbers above 0 and below "
            f"config.num_epochs, {epochs}, each after the one before, got "
            f"{shown(drops)}"
        )


def _known(config: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of fields, with dots in their names; each is one of the known ones."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{where} has fields and their values, got {shown(config)}")
    for name in known:
        if name not in config:
            raise UserError(f"{where}.{name} is missing: start from base_config.py")
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name not in known:
            raise UserError(
                f"{where}.{name} is not a field of a configuration: {where} has "
                f"{', '.join(sorted(known))}"
            )
        if isinstance(known[name], dict):
            inner = _known(value, known[name], f"{where}.{name}")
            flat |= {f"{name}.{key}": x for key, x in inner.items()}
        else:
            flat[name] = value
    return flat


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of nested configurations with dots in their names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, dict | ml_collections.ConfigDict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """What ``_flat`` made flat."""
    tree: dict[str, Any] = {}
    for field, value in flat.items():
        *sections, name = field.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


KINDS = _flat(base_config.FIELDS)
"""Every field of a configuration, with dots in its name."""
