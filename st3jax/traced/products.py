"""Products of an activation with a kernel: what they cost, and what its axes are."""

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import jax.extend.core as jex

from st3jax.traced.made import (
    Atom,
    Dim,
    Made,
    Part,
    Value,
    axes_of,
    blank,
    combined,
    forgotten,
)

__all__ = ["PRODUCTS", "Product", "Use", "product_of_parameters", "uses_of"]

Letters = Iterator[tuple[Atom, str]]


class Use(NamedTuple):
    """A product that a parameter takes part in.

    Attributes:
        path: Of the parameter.
        axes: A letter for each of its axes, as :func:`read_axes` tells them.
        cost: Multiply-adds; None if it is unknown how often they are done.

    Example:
        >>> Use("kernel", "io", Fraction(24)).cost
        Fraction(24, 1)
    """

    path: str
    axes: str
    cost: Fraction | None


def uses_of(eqn: jex.JaxprEqn, given: list[Value]) -> list[Use]:
    """The uses of parameters in one equation, done once.

    Args:
        eqn: The equation.
        given: What its operands are made from.

    Example:
        >>> import jax
        >>> from st3jax.traced.made import parameter
        >>> eqn = jax.make_jaxpr(jax.numpy.matmul)(jax.numpy.ones((5, 2)),
        ...                                        jax.numpy.ones((2, 3))).eqns[0]
        >>> uses_of(eqn, [None, parameter("kernel", (2, 3))])
        [Use(path='kernel', axes='io', cost=Fraction(30, 1))]
    """
    product = PRODUCTS.get(eqn.primitive.name)
    side = _side_of_kernel(given)
    if product is None or side is None:
        return []
    left, right = (atom.aval for atom in eqn.invars[:2])
    cost = product.cost(left, right, eqn.outvars[0].aval, eqn.params)
    uses = []
    for part in _parts(given[side]):
        axes = _reading(part, product.letters(part.dims, side, eqn.params))
        uses.append(Use(part.path, axes, cost * part.share))
    return uses


def product_of_parameters(
    name: str, given: list[Value], params: dict[str, Any], shape: tuple[int, ...]
) -> Value:
    """What a product is made from; of the larger one if both are made of parameters.

    Args:
        name: Of the operation, one of ``PRODUCTS``.
        given: What its operands are made from.
        params: Of the operation.
        shape: Of the product.

    Example:
        >>> from st3jax.traced.made import parameter
        >>> given = [parameter("a", (4, 2)), parameter("b", (2, 3))]
        >>> numbers = (((1,), (0,)), ((), ()))
        >>> made = product_of_parameters(
        ...     "dot_general", given, {"dimension_numbers": numbers}, (4, 3))
        >>> made.parts[0].path, made.parts[0].dims[1]
        ('a', (Atom(axes=frozenset(), size=3),))
    """
    if any(_is_activation(value) for value in given[:2]):
        return None
    best = combined(given[:2])
    if best is None or name != "dot_general":
        return best and forgotten(best, shape)
    side = 0 if best.parts == _parts(given[0]) else 1
    parts = [_of_dot_general(part, side, params, shape) for part in best.parts]
    return Made(tuple(parts))


def _of_dot_general(
    part: Part, side: int, params: dict[str, Any], shape: tuple[int, ...]
) -> Part:
    """Batch dimensions come first, then the free ones of the left and of the right."""
    contracted, batch = (pair[side] for pair in params["dimension_numbers"])
    free = [k for k in range(len(part.dims)) if k not in (*contracted, *batch)]
    start = len(batch) if side == 0 else len(shape) - len(free)
    dims = [blank(size) for size in shape]
    for to, k in [*enumerate(batch), *enumerate(free, start)]:
        dims[to] = part.dims[k]
    return part._replace(dims=tuple(dims))


def _parts(value: Value) -> tuple[Part, ...]:
    return () if value is None else value.parts


def _is_activation(value: Value) -> bool:
    return value is None or value.looked_up


def _side_of_kernel(given: list[Value]) -> int | None:
    """Which operand is made from parameters, if the other one is an activation.

    What inputs look up is an activation, but a kernel where it meets another.
    """
    fixed = [k for k in range(2) if not _is_activation(given[k])]
    found = fixed or [k for k in range(2) if given[k] is not None]
    return found[0] if len(found) == 1 and _parts(given[found[0]]) else None


def _reading(part: Part, letters: Iterable[tuple[Atom, str]]) -> str:
    """The letter of each axis of a parameter that is used in this part."""
    found: list[set[str]] = [set() for _ in part.shape]
    for atom, letter in letters:
        for axis in atom.axes:
            found[axis].add(letter)
    for axis in part.sliced:
        found[axis].add("s")
    return "".join(one.pop() if len(one) == 1 else "?" for one in found)


def _dot_general(left: Any, right: Any, out: Any, params: dict[str, Any]) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return out.size * math.prod(left.shape[axis] for axis in contracted)


def _letters_of_dot_general(
    dims: tuple[Dim, ...], side: int, params: dict[str, Any]
) -> Letters:
    contracted, batch = (pair[side] for pair in params["dimension_numbers"])
    for k, dim in enumerate(dims):
        letter = "i" if k in contracted else "s" if k in batch else "o"
        yield from ((atom, letter) for atom in dim)


def _convolution(images: Any, kernel: Any, out: Any, params: dict[str, Any]) -> int:
    out_axis, in_axis, *_ = params["dimension_numbers"].rhs_spec
    if math.prod(params["lhs_dilation"]) == 1:
        return out.size * kernel.size // kernel.shape[out_axis]
    # Transposed: every input meets the kernel once, the zeros put between them do not.
    groups = params["feature_group_count"]
    return images.size * kernel.size // (kernel.shape[in_axis] * groups)


def _letters_of_convolution(
    dims: tuple[Dim, ...], side: int, params: dict[str, Any]
) -> Letters:
    out_axis, in_axis, *window = params["dimension_numbers"][side]
    yield from ((atom, "w") for k in window for atom in dims[k])
    yield from ((atom, "i") for atom in dims[in_axis])
    yield from _letters_of_outputs(dims[out_axis], params["feature_group_count"])


def _letters_of_outputs(dim: Dim, groups: int) -> Letters:
    """Convolutions that ``vmap`` does at once are the outermost groups of one."""
    for k, atom in enumerate(dim):
        before, after = dim[: k + 1], dim[k + 1 :]
        apart = after and not atom.axes & axes_of([after])
        divides = groups % math.prod(one.size for one in before) == 0
        yield atom, "s" if apart and divides else "o"


def _ragged_dot(left: Any, right: Any, out: Any, params: dict[str, Any]) -> int:
    """Each row meets the matrix of its group; or a group of rows adds up to one."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    size = out.size * math.prod(left.shape[axis] for axis in contracted)
    if set(numbers.lhs_ragged_dimensions) & set(contracted):
        return size // out.shape[0]
    return size


def _letters_of_ragged_dot(
    dims: tuple[Dim, ...], side: int, params: dict[str, Any]
) -> Letters:
    numbers = params["ragged_dot_dimension_numbers"]
    contracted, batch = (pair[side] for pair in numbers.dot_dimension_numbers)
    apart = [*batch, *(numbers.rhs_group_dimensions if side == 1 else ())]
    within = {"dimension_numbers": ((contracted,) * 2, (apart,) * 2)}
    return _letters_of_dot_general(dims, side, within)


class Product(NamedTuple):
    """An operation that multiplies an activation with a kernel.

    Attributes:
        cost: Its multiply-adds.
        letters: What the atoms of the kernel's dimensions are.
    """

    cost: Callable[[Any, Any, Any, dict[str, Any]], int]
    letters: Callable[[tuple[Dim, ...], int, dict[str, Any]], Letters]


PRODUCTS = {
    "conv_general_dilated": Product(_convolution, _letters_of_convolution),
    "dot_general": Product(_dot_general, _letters_of_dot_general),
    "ragged_dot_general": Product(_ragged_dot, _letters_of_ragged_dot),
}
"""By the name in the jaxpr."""
