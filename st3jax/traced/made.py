"""What an array is made from, and which axes of parameters its dimensions are."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

__all__ = [
    "CONSTANT",
    "Atom",
    "Made",
    "Part",
    "Value",
    "axes_of",
    "blank",
    "combined",
    "embedded",
    "embedded_share",
    "equals",
    "fitted",
    "forgotten",
    "inserted",
    "largest",
    "merged",
    "parameter",
    "settled",
    "shape_of",
    "without",
]


class Atom(NamedTuple):
    """A factor of a dimension.

    Attributes:
        axes: The axes of the parameter that it runs along; none where values repeat.
        size: Elements.

    Example:
        >>> Atom(frozenset({0}), 4).size
        4
    """

    axes: frozenset[int]
    size: int


Dim = tuple[Atom, ...]
"""A dimension: the product of its atoms, the outermost first."""


class Part(NamedTuple):
    """What comes from one parameter.

    Attributes:
        path: Of the parameter.
        shape: Of the parameter.
        share: Of the elements of the array.
        dims: The dimensions of the array.
        sliced: Axes of the parameter at one position of which the array was taken.

    Example:
        >>> parameter("w", (2, 3)).parts[0].dims[1]
        (Atom(axes=frozenset({1}), size=3),)
    """

    path: str
    shape: tuple[int, ...]
    share: Fraction
    dims: tuple[Dim, ...]
    sliced: frozenset[int] = frozenset()


class Made(NamedTuple):
    """An array that is made from parameters and constants.

    Attributes:
        parts: What comes from parameters; nothing in a constant.
        looked_up: Whether an input says which elements of the parameters these are.

    Example:
        >>> [part.path for part in parameter("w", (2, 3)).parts]
        ['w']
    """

    parts: tuple[Part, ...]
    looked_up: bool = False


Value = Made | None
"""What an array is made from; None if inputs are in its numbers."""

CONSTANT = Made(())
"""An array that is made from neither parameters nor inputs."""


def parameter(path: str, shape: tuple[int, ...]) -> Made:
    """A parameter itself.

    Example:
        >>> parameter("w", (2, 3)).parts[0].share
        Fraction(1, 1)
    """
    dims = tuple((Atom(frozenset({k}), size),) for k, size in enumerate(shape))
    return Made((Part(path, tuple(shape), Fraction(1), dims),))


def blank(size: int) -> Dim:
    """A dimension along which no parameter lies.

    Example:
        >>> blank(3)
        (Atom(axes=frozenset(), size=3),)
    """
    return (Atom(frozenset(), size),)


def axes_of(dims: Iterable[Dim]) -> frozenset[int]:
    """The axes of the parameter that dimensions run along.

    Example:
        >>> sorted(axes_of(parameter("w", (2, 3)).parts[0].dims))
        [0, 1]
    """
    return frozenset().union(*(atom.axes for dim in dims for atom in dim))


def shape_of(part: Part) -> tuple[int, ...]:
    """The shape of the array that a part lies in.

    Example:
        >>> shape_of(parameter("w", (2, 3)).parts[0])
        (2, 3)
    """
    return tuple(math.prod(atom.size for atom in dim) for dim in part.dims)


def fitted(part: Part, shape: Sequence[int]) -> Part:
    """The part once dimensions are cut or extended to a shape of as many.

    Where a dimension has several atoms, it is unknown what is left of each.

    Example:
        >>> shape_of(fitted(parameter("w", (2, 3)).parts[0], (2, 1)))
        (2, 1)
    """
    sizes = zip(part.dims, shape_of(part), shape, strict=True)
    dims = tuple(
        dim if old == new else (Atom(axes_of([dim]), new),) for dim, old, new in sizes
    )
    return part._replace(dims=dims)


def embedded_share(part: Part, shape: Sequence[int]) -> Fraction:
    """The share of the part in a larger array of this shape that it is put into.

    Example:
        >>> embedded_share(parameter("w", (2, 3)).parts[0], (4, 3))
        Fraction(1, 2)
    """
    share = Fraction(math.prod(shape_of(part)), max(1, math.prod(shape)))
    return part.share * min(share, Fraction(1))


def embedded(part: Part, shape: Sequence[int]) -> Part:
    """The part in a larger array of this shape that it is put into.

    Example:
        >>> part = embedded(parameter("w", (2, 3)).parts[0], (4, 3))
        >>> part.share, part.dims[0]
        (Fraction(1, 2), (Atom(axes=frozenset({0}), size=4),))
    """
    return fitted(part, shape)._replace(share=embedded_share(part, shape))


def inserted(part: Part, at: int, size: int) -> Part:
    """The part with a new dimension, along which it repeats.

    Example:
        >>> shape_of(inserted(parameter("w", (2, 3)).parts[0], 1, 5))
        (2, 5, 3)
    """
    dims = (*part.dims[:at], blank(size), *part.dims[at:])
    return part._replace(dims=dims)


def without(part: Part, dims: Sequence[int]) -> Part:
    """The part at one position along dimensions, which are dropped.

    Example:
        >>> part = without(parameter("w", (2, 3)).parts[0], [0])
        >>> shape_of(part), part.sliced
        ((3,), frozenset({0}))
    """
    gone = axes_of(part.dims[k] for k in dims)
    kept = tuple(dim for k, dim in enumerate(part.dims) if k not in dims)
    return part._replace(dims=kept, sliced=part.sliced | gone)


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts with the shares of equal ones added up.

    Example:
        >>> w = parameter("w", (2, 3)).parts[0]._replace(share=Fraction(1, 2))
        >>> [part.share for part in merged([w, w])]
        [Fraction(1, 1)]
    """
    shares: dict[Part, Fraction] = {}
    for part in parts:
        alone = part._replace(share=Fraction(0))
        shares[alone] = shares.get(alone, Fraction(0)) + part.share
    return tuple(part._replace(share=share) for part, share in shares.items())


def forgotten(made: Made, shape: Sequence[int]) -> Made:
    """An array of this shape made from the same, it is unknown how.

    Example:
        >>> forgotten(parameter("w", (2, 3)), (4,)).parts[0].dims
        ((Atom(axes=frozenset(), size=4),),)
    """
    dims = tuple(blank(size) for size in shape)
    total = sum(part.share for part in made.parts) or 1
    parts = (
        Part(part.path, part.shape, part.share / total, dims) for part in made.parts
    )
    return Made(merged(parts), made.looked_up)


def combined(values: Sequence[Value]) -> Value:
    """What one of several values is, whichever it is; None if one of them is.

    Example:
        >>> w, scale = parameter("w", (2, 3)), parameter("scale", (3,))
        >>> combined([scale, w]) == w, combined([w, None])
        (True, None)
    """
    made = [value for value in values if value is not None]
    if len(made) < len(values):
        return None
    looked_up = any(one.looked_up for one in made)
    return largest(made)._replace(looked_up=looked_up)


def largest(made: Sequence[Made]) -> Made:
    """What an array computed from others is: that of them of the largest parameters.

    So a kernel that smaller parameters scale stays the kernel. Of equal ones, that
    counts of which more is known; if that leaves several that read the same parameter
    differently, as a matrix and its transposed, nothing is known.

    Example:
        >>> w, scale = parameter("w", (2, 3)), parameter("scale", (3,))
        >>> largest([scale, w]) == w
        True
    """
    best = min(made, key=_place, default=CONSTANT)
    rivals = [one for one in made if _place(one) == _place(best)]
    if any(_readings(one) != _readings(best) for one in rivals):
        return forgotten(best, shape_of(best.parts[0]))
    return best


def equals(made: Sequence[Made]) -> Made:
    """What an array computed from others weight by weight is: the largest, or several.

    Parameters of one size that are added or multiplied, such as the two parts of
    complex weights, or weights and their mask, are all kernels.

    Example:
        >>> a, b = parameter("a", (2, 3)), parameter("b", (2, 3))
        >>> [part.path for part in equals([b, a]).parts]
        ['a', 'b']
    """
    best = largest(made)
    size, known, paths = _place(best)
    alike = {
        tuple(_place(one)[2]): one for one in made if _place(one)[:2] == (size, known)
    }
    others = [one for own, one in sorted(alike.items()) if not {*own} & {*paths}]
    parts = (*best.parts, *(part for one in others for part in one.parts))
    return best._replace(parts=merged(parts))


def settled(before: Value, after: Value) -> Value:
    """What a loop carries, from what it is before and after one turn.

    Repeated, it comes to an end: parameters only give way to larger ones, and what is
    forgotten stays so.

    Example:
        >>> w = parameter("w", (2, 2))
        >>> settled(CONSTANT, w) == w, settled(w, None)
        (True, None)
    """
    if before is None or after is None:
        return None
    looked_up = before.looked_up or after.looked_up
    if _weight(before) != _weight(after):
        return min(before, after, key=_weight)._replace(looked_up=looked_up)
    if before.parts != after.parts:
        before = forgotten(before, shape_of(before.parts[0]))
    return before._replace(looked_up=looked_up)


def _weight(made: Made) -> tuple[int, list[str]]:
    """The larger its parameters, the lower; by name among equals."""
    sizes = {part.path: math.prod(part.shape) for part in made.parts}
    return -sum(sizes.values()), sorted(sizes)


def _place(made: Made) -> tuple[int, int, list[str]]:
    """The lowest is the one that counts."""
    size, paths = _weight(made)
    known = sum(len(axes_of(part.dims) | part.sliced) for part in made.parts)
    return size, -known, paths


def _readings(made: Made) -> set[Part]:
    """Its parts, however much of it they are."""
    return {part._replace(share=Fraction(0)) for part in made.parts}
