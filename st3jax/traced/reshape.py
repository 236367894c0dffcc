"""Where the axes of a parameter go when an array is reshaped."""

import itertools
import math
from collections.abc import Iterable, Iterator

from st3jax.traced.made import (
    Atom,
    Dim,
    Made,
    Part,
    axes_of,
    blank,
    forgotten,
    shape_of,
)

__all__ = ["reshaped"]

Shape = tuple[int, ...]


def reshaped(part: Part, shape: Shape) -> Part:
    """The part in another shape.

    Within the smallest groups of dimensions that have equal products, atoms are dealt
    out anew.

    Example:
        >>> from st3jax.traced.made import parameter
        >>> reshaped(parameter("w", (2, 3)).parts[0], (6,)).dims[0]
        (Atom(axes=frozenset({0}), size=2), Atom(axes=frozenset({1}), size=3))
    """
    if math.prod(shape) == 0:
        return forgotten(Made((part,)), shape).parts[0]
    dims: list[Dim] = []
    dropped: set[int] = set()
    for old, new in _groups(shape_of(part), shape):
        atoms = [atom for dim in part.dims[old] for atom in dim]
        dealt = _dealt(atoms, shape[new])
        dropped |= _axes_of_size_one(atoms)
        dropped -= _axes_of_size_one(atom for dim in dealt for atom in dim)
        dims += dealt
    return part._replace(dims=tuple(dims), sliced=part.sliced | dropped)


def _axes_of_size_one(atoms: Iterable[Atom]) -> frozenset[int]:
    """The axes of which one position is left."""
    return axes_of([tuple(atom for atom in atoms if atom.size == 1)])


def _groups(old: Shape, new: Shape) -> Iterator[tuple[slice, slice]]:
    """The smallest pairs of runs of dimensions that have as many elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[start:i])) != (right := math.prod(new[begin:j])):
            i, j = (i + 1, j) if left < right else (i, j + 1)
        yield slice(start, i), slice(begin, j)


def _dealt(atoms: list[Atom], sizes: Shape) -> list[Dim]:
    """Atoms, laid end to end, cut into dimensions of these sizes.

    Where an atom cannot be cut, every dimension is of all of them.
    """
    rest = list(atoms)
    dims: list[Dim] = []
    for size in sizes:
        if size == 1:
            dims.append((rest.pop(0),) if rest and rest[0].size == 1 else blank(1))
            continue
        dim: list[Atom] = []
        while size > 1:
            atom = rest.pop(0)
            taken = math.gcd(atom.size, size)
            if taken != min(atom.size, size):
                mixed = axes_of([tuple(atoms)])
                return [(Atom(mixed, each),) for each in sizes]
            size //= taken
            if atom.size > taken:
                rest.insert(0, Atom(atom.axes, atom.size // taken))
            if atom.size > 1:
                dim.append(Atom(atom.axes, taken))
        dims.append(_joined(dim))
    return dims


def _joined(dim: list[Atom]) -> Dim:
    """The dimension with neighbouring atoms of the same axes made one."""
    runs = [(axes, list(run)) for axes, run in itertools.groupby(dim, _axes)]
    return tuple(Atom(axes, math.prod(a.size for a in run)) for axes, run in runs)


def _axes(atom: Atom) -> frozenset[int]:
    return atom.axes
