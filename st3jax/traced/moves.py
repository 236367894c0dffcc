"""Where the axes of a parameter go when an array is moved, cut, joined or reduced."""

import math
from collections.abc import Callable
from typing import Any

from st3jax.traced.joins import JOINS
from st3jax.traced.made import (
    Made,
    Part,
    Value,
    axes_of,
    blank,
    embedded,
    equals,
    fitted,
    forgotten,
    inserted,
    largest,
    shape_of,
    without,
)
from st3jax.traced.reshape import reshaped
from st3jax.traced.rows import gathered, taken

__all__ = ["moved", "stacked", "unstacked"]

Shape = tuple[int, ...]


def moved(
    name: str, given: list[Value], params: dict[str, Any], shapes: list[Shape]
) -> list[Value]:
    """What the results of an operation other than a product are made from.

    Args:
        name: Of the operation in the jaxpr.
        given: What its operands are made from.
        params: Of the operation.
        shapes: Of its results.

    Example:
        >>> from st3jax.traced.made import parameter
        >>> w = parameter("w", (2, 3))
        >>> moved("transpose", [w], {"permutation": (1, 0)}, [(3, 2)])[0].parts[0].dims
        ((Atom(axes=frozenset({1}), size=3),), (Atom(axes=frozenset({0}), size=2),))
    """
    if name in EACH_FOR_ITSELF and len(given) == len(shapes):
        return given
    if name in TAKES and given[0] is not None and None in given[1:]:
        return [_looked_up(given[0], name, params, shape) for shape in shapes]
    made = [value for value in given if value is not None]
    if len(made) < len(given):
        alone = name not in {*JOINS, *MOVES, *TAKES}
        return [_touched(made, shape) if alone else None for shape in shapes]
    looked_up = any(one.looked_up for one in made)
    results = (_result(name, made, params, shape) for shape in shapes)
    return [result._replace(looked_up=looked_up) for result in results]


def _result(name: str, made: list[Made], params: dict[str, Any], shape: Shape) -> Made:
    """What one result is made from that has nothing to do with an input."""
    if name in JOINS:
        result = JOINS[name](made, params, shape)
    elif name in MOVES:
        parts = (MOVES[name](part, params, shape) for part in made[0].parts)
        result = Made(tuple(parts))
    else:
        result = equals(made)
    fits = all(shape_of(part) == shape for part in result.parts)
    return result if fits else forgotten(result, shape)


def _touched(made: list[Made], shape: Shape) -> Value:
    """A whole kernel that inputs scale or mask, weight by weight, is a kernel still."""
    result = largest(made)
    whole = bool(result.parts) and all(
        shape_of(part) == shape and _is_whole(part) for part in result.parts
    )
    return result._replace(looked_up=True) if whole else None


def _is_whole(part: Part) -> bool:
    """Whether nothing of it is repeated, and two axes or more are left."""
    large = [dim for dim in part.dims if math.prod(atom.size for atom in dim) > 1]
    return len(large) > 1 and all(axes_of([dim]) for dim in large)


def _looked_up(made: Made, name: str, params: dict[str, Any], shape: Shape) -> Value:
    """Elements that inputs choose: still a kernel if two whole axes are left."""
    for part in made.parts:
        sizes = zip(part.dims, shape_of(part), params["slice_sizes"], strict=True)
        if sum(bool(axes_of([dim])) and old == new for dim, old, new in sizes) < 2:
            return None
    parts = tuple(TAKES[name](part, params, shape) for part in made.parts)
    return Made(parts, looked_up=True) if parts else None


def unstacked(value: Value) -> Value:
    """One of the arrays that a scan takes off a stack.

    Example:
        >>> from st3jax.traced.made import parameter
        >>> part = unstacked(parameter("w", (2, 3))).parts[0]
        >>> part.dims, part.sliced
        (((Atom(axes=frozenset({1}), size=3),),), frozenset({0}))
    """
    if value is None:
        return None
    parts = tuple(without(part, [0]) for part in value.parts)
    return value._replace(parts=parts)


def stacked(value: Value, length: int) -> Value:
    """The stack that a scan makes of the arrays of its turns.

    Example:
        >>> from st3jax.traced.made import parameter
        >>> stacked(parameter("w", (3,)), 2).parts[0].dims[0]
        (Atom(axes=frozenset(), size=2),)
    """
    if value is None:
        return None
    parts = tuple(inserted(part, 0, length) for part in value.parts)
    return value._replace(parts=parts)


def _transpose(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    return part._replace(dims=tuple(part.dims[k] for k in params["permutation"]))


def _squeeze(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    return without(part, params["dimensions"])


def _reduce(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    """Of the axes that are summed over nothing is known."""
    return without(part, params["axes"])._replace(sliced=part.sliced)


def _broadcast(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    """New dimensions, and those of size one that are repeated, have no axes."""
    dims = [blank(size) for size in shape]
    sliced = part.sliced
    for dim, old, k in zip(
        part.dims, shape_of(part), params["broadcast_dimensions"], strict=True
    ):
        if old == shape[k]:
            dims[k] = dim
        else:
            sliced |= axes_of([dim])
    return part._replace(dims=tuple(dims), sliced=sliced)


def _cut(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    return fitted(part, shape)


def _pad(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    return embedded(part, shape)


def _tile(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    dims = zip(params["reps"], part.dims, strict=True)
    return part._replace(
        dims=tuple(dim if reps == 1 else (*blank(reps), *dim) for reps, dim in dims)
    )


def _unstack(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    return without(part, [params["axis"]])


def _all_gather(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    at = params["all_gather_dimension"]
    if params["tiled"]:
        return fitted(part, shape)
    return inserted(part, at, shape[at])


def _reshape(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    order = params["dimensions"]
    if order is not None:  # what vmap makes of a convolution
        part = _transpose(part, {"permutation": order}, shape)
    return reshaped(part, shape)


Move = Callable[[Part, dict[str, Any], Shape], Part]

MOVES: dict[str, Move] = {
    "all_gather": _all_gather,
    "broadcast_in_dim": _broadcast,
    "dynamic_slice": _cut,
    "gather": gathered,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _cut,
    "split": _cut,
    "squeeze": _squeeze,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    **dict.fromkeys(
        ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
         "reduce_prod", "reduce_sum"),
        _reduce,
    ),
}  # fmt: skip
"""Operations that take their first operand to a result."""

TAKES: dict[str, Move] = {"dynamic_slice": _cut, "gather": taken}
"""Operations that take elements at positions which may be an input."""

EACH_FOR_ITSELF = frozenset(
    {"optimization_barrier", "pmax", "pmin", "psum", "psum_invariant", "pvary"}
)
"""Operations that return every operand in its place."""
