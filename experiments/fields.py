"""The kinds of fields that a configuration has: each says what its value may be.

``base_config.py`` declares every field with one of them, and ``job/settings.py`` holds
each value against that.
"""

import math
import numbers
import operator
from typing import Any, NamedTuple

import numpy as np

from errors import UserError

__all__ = [
    "Field",
    "checked",
    "choice",
    "described",
    "flag",
    "number",
    "numbers_of",
    "pairs",
    "shown",
    "text",
    "texts",
    "whole",
    "wholes",
]

LONGEST = 1000  # characters of a text
SHOWN = 200  # characters of a value in a sentence

BOUNDS = {
    "at_least": (operator.ge, "{} or more"),
    "above": (operator.gt, "above {}"),
    "below": (operator.lt, "below {}"),
    "at_most": (operator.le, "{} or less"),
}
"""From the name of a bound to what holds for a number within it, and how it is said."""


class Field(NamedTuple):
    """What a field is.

    Attributes:
        type: Of its value, in plain Python.
        words: What that is, as the end of a sentence that begins with the field.
        default: Its value; ``None`` if it has none until somebody sets it.
        bounds: Of a number, or of each in a tuple, by their names in ``BOUNDS``.
        choices: The texts that it may be, if not any.
        each: Of a tuple: what each of its entries is; ``None`` for pairs.
    """

    type: type
    words: str
    default: Any = None
    bounds: dict[str, float] = {}  # noqa: RUF012  never changed
    choices: tuple[str, ...] = ()
    each: Any = None


def whole(
    default: int | None = None, says: str = "a whole number", **bounds: float
) -> Field:
    """A whole number; ``says`` is how that is told."""
    return Field(int, f"is {says}", default, bounds)


def number(
    default: float | None = None, says: str = "a number", **bounds: float
) -> Field:
    """A number; a finite one if it has bounds. ``says`` is how that is told."""
    return Field(float, f"is {says}", default, bounds)


def flag(default: bool | None = None) -> Field:
    """A truth value."""
    return Field(bool, "is True or False", default)


def choice(default: str | None, *choices: str) -> Field:
    """One of some texts."""
    words = f"is one of {', '.join(map(repr, choices))}"
    return Field(str, words, default, choices=choices)


def text(default: str | None = None, says: str = "a text") -> Field:
    """Any text that can be printed on a line; ``says`` is what it stands for."""
    words = f"is {says}, up to {LONGEST:,} printable characters"
    return Field(str, words, default)


def numbers_of(default: tuple[float, ...] | None = None, **bounds: float) -> Field:
    """Numbers, any number of them."""
    return Field(
        tuple, "is made of numbers", default, each=number(None, "a number", **bounds)
    )


def wholes(what: str) -> Field:
    """Whole numbers, such as the words say."""
    return Field(tuple, f"are whole numbers {what}", each=whole())


def texts() -> Field:
    """Texts."""
    return Field(tuple, "is made of texts", each=text())


def pairs(what: str, **bounds: float) -> Field:
    """Tuples of anything and a number."""
    return Field(tuple, f"are pairs of {what}", bounds=bounds)


def checked(name: str, field: Field, value: Any) -> Any:
    """The value as one of plain Python.

    Raises:
        UserError: With the name, the value and what it may be.
    """
    try:
        return _plain(field, value)
    except (TypeError, ValueError) as error:
        bounds = _said(_bounds(field))
        more = f": {'each' if field.each else 'it'} is {bounds}"
        told = bounds in ("", str(error).removeprefix("is "))
        raise UserError(
            f"config.{name} {error}, got {shown(value)}{'' if told else more}"
        ) from None


def described(field: Field) -> str:
    """What the field may be, as the end of a sentence that begins with its name."""
    bounds = _said(_bounds(field))
    return f"{field.words}, {bounds}" if bounds else field.words


def shown(value: Any) -> str:
    """The value on one line that is not too long."""
    value = value.to_dict() if hasattr(value, "to_dict") else value  # a section
    try:
        line = " ".join(repr(value).split())
    except ValueError:  # Python prints no number of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to print"
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}... ({len(line):,} long)"


def _bounds(field: Field) -> dict[str, float]:
    return field.each.bounds if field.each else field.bounds


def _said(bounds: dict[str, float]) -> str:
    if bounds.keys() == {"at_least", "at_most"}:
        return f"from {bounds['at_least']} to {bounds['at_most']}"
    return " and ".join(BOUNDS[key][1].format(x) for key, x in bounds.items())


def _plain(field: Field, value: Any) -> Any:
    """The value as one of plain Python.

    Raises:
        TypeError: If it is of another kind; ``ValueError`` if it is out of its range.
    """
    if field.type is tuple:
        return _plain_tuple(field, value)
    value = value.item() if isinstance(value, np.generic) else value
    if not _is_a(field.type, value):
        raise TypeError(field.words)
    if field.type is str:
        fits = value in field.choices if field.choices else _is_printable(value)
        if not fits:
            raise ValueError(field.words)
    if field.type is float:
        value = _as_float(value)
        if value == math.inf and field.bounds:
            raise ValueError("is below inf")
    for key, bound in field.bounds.items():
        holds, words = BOUNDS[key]
        if not holds(value, bound):
            raise ValueError(f"is {words.format(bound)}")
    return value


def _plain_tuple(field: Field, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError(field.words)
    if field.each is None and not all(map(_is_pair, value)):
        raise TypeError(field.words)
    try:
        if field.each is None:
            second = number(None, "a number", **field.bounds)
            return tuple((x, _plain(second, y)) for x, y in value)
        entries = tuple(_plain(field.each._replace(bounds={}), x) for x in value)
    except (TypeError, ValueError):
        raise TypeError(field.words) from None
    if any(isinstance(x, float) and not math.isfinite(x) for x in entries):
        raise TypeError(field.words)
    return tuple(_plain(field.each, x) for x in entries)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value stands for one of a type; a truth value is no number."""
    if kind is int or kind is float:
        of = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, of) and not isinstance(value, bool)
    return isinstance(value, kind)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.copysign(math.inf, 1 if value > 0 else -1)


def _is_printable(value: str) -> bool:
    return len(value) <= LONGEST and value.isprintable()
