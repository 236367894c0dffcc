"""What an array is made from that several were put into."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from st3jax.traced.made import Made, Part, embedded, inserted, largest, merged
from st3jax.traced.rows import scattered

__all__ = ["JOINS"]

Shape = tuple[int, ...]


def _concatenate(made: Sequence[Made], params: dict[str, Any], shape: Shape) -> Made:
    return _together(embedded(part, shape) for one in made for part in one.parts)


def _stack(made: Sequence[Made], params: dict[str, Any], shape: Shape) -> Made:
    along = [inserted(part, params["axis"], 1) for one in made for part in one.parts]
    return _together(embedded(part, shape) for part in along)


def _dynamic_update_slice(
    made: Sequence[Made], params: dict[str, Any], shape: Shape
) -> Made:
    under, over = made[:2]
    return _written(under, [embedded(part, shape) for part in over.parts])


def _scatter(made: Sequence[Made], params: dict[str, Any], shape: Shape) -> Made:
    under, _, over = made
    return _written(under, [scattered(part, params, shape) for part in over.parts])


def _select(made: Sequence[Made], params: dict[str, Any], shape: Shape) -> Made:
    """What is chosen from; what chooses does not matter."""
    return largest(made[1:])


def _written(under: Made, over: Sequence[Part]) -> Made:
    """What is written over a part of an array, and what is left of that."""
    free = 1 - sum(part.share for part in over)
    kept = [part._replace(share=part.share * free) for part in under.parts]
    return _together([*kept, *over])


def _together(parts: Iterable[Part]) -> Made:
    return Made(merged(part for part in parts if part.share))


Join = Callable[[Sequence[Made], dict[str, Any], Shape], Made]

JOINS: dict[str, Join] = {
    "concatenate": _concatenate,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "select_n": _select,
    "stack": _stack,
}
"""Operations with several operands that are not alike."""
