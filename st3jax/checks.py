"""Checks of what a user passes in, with a sentence that names value and way out."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

__all__ = [
    "as_mapping",
    "check_choice",
    "check_cost",
    "check_fraction",
    "check_optimizer",
    "check_positive",
    "check_predicate",
    "check_steps",
    "check_whole_channels",
    "is_concrete",
]


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at now, rather than only while a program runs.

    Example:
        >>> is_concrete(0.9)
        True
    """
    return not isinstance(value, jax.core.Tracer)


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """The value as a dictionary if it is a mapping of any kind, else ``None``.

    A ``ConfigDict`` of ml_collections is one, though not by its type. It sorts its
    keys, by which ``"*"`` would come before all other paths: here the longest is first.

    Example:
        >>> as_mapping({"*": 0.9}), as_mapping(0.9)
        ({'*': 0.9}, None)
    """
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "keys") and hasattr(value, "__getitem__"):
        keys = sorted(value.keys(), key=lambda key: (-len(key), key))
        return {key: value[key] for key in keys}
    return None


def check_predicate(value: Any) -> None:
    """Raises unless ``value`` can say which leaves are prunable.

    Raises:
        TypeError: With what was passed instead.

    Example:
        >>> check_predicate("head")
        Traceback (most recent call last):
        TypeError: prunable is a function of (path, leaf) that says whether to prune \
the leaf, got 'head'
    """
    if not callable(value):
        raise TypeError(
            "prunable is a function of (path, leaf) that says whether to prune the "
            f"leaf, got {value!r}"
        )


def check_whole_channels(axis_name: Any) -> None:
    """Raises where weights are sharded by hand, so that channels may not be whole.

    Raises:
        ValueError: With the name of the axes.

    Example:
        >>> check_whole_channels(None)
    """
    if axis_name is not None:
        raise ValueError(
            f"rescaling needs whole output channels, which weights sharded over "
            f"{axis_name!r} by hand may not have: pass rescale=False, or leave "
            "the sharding to jit, without axis_name"
        )


def check_fraction(value: Any, name: str) -> None:
    """Raises unless ``value`` is a scalar in [0, 1]; traced values pass.

    Args:
        value: What the user passed.
        name: What the user calls it, for the message.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].

    Example:
        >>> check_fraction(90, "sparsity")
        Traceback (most recent call last):
        ValueError: sparsity is a fraction in [0, 1], got 90: for 90 % write 0.9
    """
    if np.ndim(value) != 0:
        got = repr(value) if is_concrete(value) else f"shape {np.shape(value)}"
        raise TypeError(f"{name} is a number in [0, 1], got {got}")
    if not is_concrete(value):
        return
    if np.asarray(value).dtype.kind in "USb":  # text or a truth value
        raise TypeError(f"{name} is a number in [0, 1], got {value!r}")
    try:
        number = float(value)
    except TypeError:
        raise TypeError(f"{name} is a number in [0, 1], got {value!r}") from None
    if not 0.0 <= number <= 1.0:
        percent = 2.0 <= number <= 100.0
        hint = f": for {number:g} % write {number / 100:g}" if percent else ""
        raise ValueError(f"{name} is a fraction in [0, 1], got {value}{hint}")


def check_steps(value: Any, name: str, at_least: int) -> None:
    """Raises unless ``value`` is a whole number of steps, ``at_least`` or more.

    Args:
        value: What the user passed.
        name: What the user calls it, for the message.
        at_least: The smallest allowed number.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is too small.

    Example:
        >>> check_steps(-5, "begin", 0)
        Traceback (most recent call last):
        ValueError: begin is a number of steps, 0 or more, got -5
    """
    if not is_concrete(value):
        return
    if not _is_real(value) or not math.isfinite(value) or value != int(value):
        raise TypeError(f"{name} is a whole number of steps, got {value!r}")
    if value < at_least:
        raise ValueError(
            f"{name} is a number of steps, {at_least} or more, got {value}"
        )


def _is_real(value: Any) -> bool:
    """Whether a value is one real number, and not a truth value."""
    return (
        np.ndim(value) == 0
        and not isinstance(value, bool | np.bool_)
        and np.issubdtype(np.asarray(value).dtype, np.number)
        and np.isrealobj(value)
    )


def check_positive(value: Any, name: str) -> None:
    """Raises unless ``value`` is a finite number above 0.

    Args:
        value: What the user passed.
        name: What the user calls it, for the message.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not above 0.

    Example:
        >>> check_positive(0, "power")
        Traceback (most recent call last):
        ValueError: power is a number above 0, got 0
    """
    if not _is_real(value):
        raise TypeError(f"{name} is a number above 0, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} is a number above 0, got {value}")


def check_cost(value: Any, name: str = "a cost") -> int:
    """The value as an integer, if it is a whole number of 0 or more.

    Args:
        value: What the user passed.
        name: What the user calls it, for the message.

    Returns:
        The same number, exactly.

    Raises:
        TypeError: If it is not a whole number, or only known while a program runs.
        ValueError: If it is negative.

    Example:
        >>> check_cost(-3)
        Traceback (most recent call last):
        ValueError: a cost is a whole number, 0 or more, got -3
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value  # of any size, also beyond 64 bits
    whole = is_concrete(value) and _is_real(value) and math.isfinite(value)
    if not whole or value != int(value):
        raise TypeError(f"{name} is a whole number, 0 or more, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} is a whole number, 0 or more, got {value}")
    return int(value)


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``.

    Raises:
        ValueError: With the choices in its text.

    Example:
        >>> check_choice("l2", "criterion", ("l1", "l1_sigma"))
        Traceback (most recent call last):
        ValueError: criterion is one of 'l1', 'l1_sigma', got 'l2'
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is one of {listed}, got {value!r}")


def check_optimizer(value: Any) -> None:
    """Raises unless ``value`` is an optimizer that a method can wrap.

    Raises:
        TypeError: With what was passed instead.

    Example:
        >>> check_optimizer(3)
        Traceback (most recent call last):
        TypeError: what comes first is the optimizer to wrap, as optax.sgd(0.1), got int
    """
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            "what comes first is the optimizer to wrap, as optax.sgd(0.1), got "
            f"{type(value).__name__}"
        )
