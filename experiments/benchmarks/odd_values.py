"""Odd values for the fields of a configuration, made from what declares them."""

import contextlib
import fractions
import math
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from harness import EXPERIMENTS  # noqa: F401  makes what follows importable

import digits_st3
from errors import UserError
from fields import Field
from job.build import Job, build
from job.methods import METHODS
from job.settings import KINDS

__all__ = [
    "CONTEXTS",
    "MOBILE",
    "ODD",
    "STEPWISE",
    "WIDE",
    "Change",
    "TooLong",
    "changed",
    "is_in",
    "job_or_sentence",
    "limited",
    "odd_values",
]

WIDE = {"model.name": "wide_resnet", "model.depth": 10, "model.width": None}
MOBILE = {"model.name": "mobilenet_v1", "model.depth": None, "model.width": None}
STEPWISE = {"learning_rate.schedule": "step"}
CONTEXTS: dict[str, dict[str, Any]] = {
    **{method: {"sparsity.method": method} for method in METHODS},
    "model.widen": WIDE,
    "model.dropout": WIDE,
    "model.multiplier": MOBILE,
    "learning_rate.drop_epochs": STEPWISE,
    "learning_rate.drop_factor": STEPWISE,
}
"""What makes a field, or the fields of a section, of use; others are so anyway."""

TEXTS = ["", " ", "abc", "None", "ünïcode", "🙂", "../etc", "/etc", "a\0b", "a\nb", "~"]
PATHS = ["*", "**", "stem/*", "*/kernel", "[", "stem/kernel"]
SPLITS = ["nope", "[:0]", "train[:0]", "train[50%:", "train[9:3]", "all", ".", ".."]
SPLITS += ["train[200%:]", "train+test", "train[:1]", "test", "train"]
OWN: dict[str, list[Any]] = {
    "data.name": ["digits:2.0.0", "a/b", "mnist/nope", "mnist:9.9.9", "cifar10"],
    "data.train_split": SPLITS,
    "data.test_split": SPLITS,
    "data.dir": ["/etc/passwd", "/proc/none", "gs://nope", "x" * 900],
    "sparsity.pattern": ["2:4", "4:2", "0:4", "1x1", "4x8", "0x4", "9" * 30 + "x1"],
    "sparsity.dense": [(path,) for path in PATHS],
}
"""Values that are odd in one field."""
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2, 1.5, -0.0, 5e-324, 1e308, 10**30, 10**5000),
    *(math.nan, math.inf, -math.inf, 1j, fractions.Fraction(1, 3), np.float32("nan")),
    *(np.int64(-1), np.float64(0.5), np.bool_(True), np.ones(2), b"abc", object()),
    *((), [], (1,), [0.5], ((),), {}, {"a": 1}, {"stem": 0.5}, *TEXTS, "x" * 5000),
]
"""Values that are odd in any field."""


def odd_values(name: str) -> list[Any]:
    """Odd values for a field: those for any, its own, and at its bounds and choices."""
    field = KINDS[name]
    values = [*ODD, *OWN.get(name, [])]
    if field.type is tuple:
        each = [*_pairs(), "*"] if field.each is None else [*ODD, *_near(field.each)]
        return [*values, *((x,) for x in each), (each[-1],) * 3]
    return values + _near(field)


def _near(field: Field) -> list[Any]:
    """What lies at the bounds and beside them, and the choices and almost those."""
    values: list[Any] = [*field.choices]
    values += [odd for x in field.choices for odd in (f"{x} ", x.upper())]
    for bound in field.bounds.values():
        if field.type is float:
            beside = [math.nextafter(bound, toward) for toward in (-9e9, 9e9)]
        else:
            beside = [bound - 1, bound + 1]
        values += [bound, -bound, *beside]
    return values


def _pairs() -> Iterator[Any]:
    """Entries of ``layers``: a path and its final."""
    for value in ODD:
        yield ("*", value)
        yield (value, 0.5)
    for path in PATHS:
        yield from ((path, 0.5), (path,), (path, 0.5, 0.5))


class Change(NamedTuple):
    """A value for a field.

    Attributes:
        field: Its name.
        value: An odd value.
        door: Where it is put: before the field's name.
    """

    field: str
    value: Any
    door: str = ""


def changed(fields: dict[str, Any], changes: list[Change]) -> ml_collections.ConfigDict:
    """A small configuration with these fields, and then with odd values."""
    config = digits_st3.get_config().unlock()
    small = {"data.in_memory": False, "model.width": 2, "num_epochs": 40}
    for field, value in (small | fields).items():
        _put(config, field, value)
    for change in changes:
        _put(config, change.door + change.field, change.value)
    return config


def _put(config: ml_collections.ConfigDict, field: str, value: Any) -> None:
    """Sets a field to a value of any type."""
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    if name in config:
        del config[name]  # with the type that it had
    config[name] = value


def job_or_sentence(config: ml_collections.ConfigDict) -> Job | str:
    """The job of a configuration, or why there is none, in one line.

    Raises:
        ValueError: If that takes more than a line.
    """
    try:
        return build(config)
    except UserError as error:
        sentence = str(error)
    if "\n" in sentence:
        raise ValueError(f"more than a line: {sentence!r}")
    return sentence


class TooLong(BaseException):
    """A case that has taken its time."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises ``TooLong`` in what takes more seconds."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_in(config: ml_collections.ConfigDict, field: str) -> bool:
    """Whether a configuration has a field of a dotted name."""
    for name in field.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or name not in config:
            return False
        config = config[name]
    return True
