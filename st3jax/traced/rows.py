"""Where the axes of a parameter go when rows are picked, or put elsewhere."""

from typing import Any

from st3jax.traced.made import Atom, Dim, Part, axes_of, blank, embedded_share, fitted

__all__ = ["gathered", "scattered", "taken"]

Shape = tuple[int, ...]


def gathered(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    """The part in rows that constants choose: they still lie along their axis.

    Args:
        part: Of the array that rows are of.
        params: Of the operation in the jaxpr.
        shape: Of the result.

    Example:
        >>> import jax
        >>> from st3jax.traced.made import parameter
        >>> fn = jax.make_jaxpr(lambda w, i: w.at[i].get(mode="clip"))
        >>> eqn = fn(jax.numpy.ones((4, 2)), jax.numpy.array([1, 2, 3])).eqns[-1]
        >>> part = parameter("w", (4, 2)).parts[0]
        >>> gathered(part, eqn.params, (3, 2)).dims[0]
        (Atom(axes=frozenset({0}), size=3),)
    """
    numbers = params["dimension_numbers"]
    chosen = numbers.collapsed_slice_dims
    dims, rest = _rows(part, params, shape)
    gone = axes_of(part.dims[k] for k in (*chosen, *numbers.operand_batching_dims))
    if len(chosen) == 1 and not numbers.operand_batching_dims and rest:
        for k in rest:
            dims[k] = (Atom(gone, shape[k]),)
        return part._replace(dims=tuple(dims))
    return part._replace(dims=tuple(dims), sliced=part.sliced | gone)


def _rows(
    part: Part, params: dict[str, Any], shape: Shape
) -> tuple[list[Dim], list[int]]:
    """The dimensions of what is gathered, and which of them number the rows."""
    numbers = params["dimension_numbers"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    inner = fitted(part, params["slice_sizes"]).dims
    kept = [dim for k, dim in enumerate(inner) if k not in dropped]
    dims = [blank(size) for size in shape]
    for k, dim in zip(numbers.offset_dims, kept, strict=True):
        dims[k] = dim
    return dims, [k for k in range(len(shape)) if k not in numbers.offset_dims]


def taken(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    """The same in rows that inputs choose: each is its own.

    Example:
        >>> import jax
        >>> from st3jax.traced.made import parameter
        >>> fn = jax.make_jaxpr(lambda w, i: w.at[i].get(mode="clip"))
        >>> eqn = fn(jax.numpy.ones((4, 2)), jax.numpy.array([1, 2, 3])).eqns[-1]
        >>> part = parameter("w", (4, 2)).parts[0]
        >>> taken(part, eqn.params, (3, 2)).sliced
        frozenset({0})
    """
    dims = tuple(_rows(part, params, shape)[0])
    gone = axes_of(part.dims) - axes_of(dims)
    return part._replace(dims=dims, sliced=part.sliced | gone)


def scattered(part: Part, params: dict[str, Any], shape: Shape) -> Part:
    """The part of what is written into an array of this shape.

    Args:
        part: Of what is written.
        params: Of the operation in the jaxpr.
        shape: Of the result.

    Example:
        >>> import jax
        >>> from st3jax.traced.made import parameter
        >>> zeros = jax.numpy.zeros((4, 6))
        >>> eqn = jax.make_jaxpr(zeros.at[:, 1:4].set)(jax.numpy.ones((4, 3))).eqns[-1]
        >>> part = parameter("w", (4, 3)).parts[0]
        >>> scattered(part, eqn.params, (4, 6)).share
        Fraction(1, 2)
    """
    numbers = params["dimension_numbers"]
    window = numbers.update_window_dims
    apart = [*numbers.inserted_window_dims, *numbers.operand_batching_dims]
    rows = axes_of(dim for k, dim in enumerate(part.dims) if k not in window)
    dims = [blank(size) for size in shape]
    kept = [k for k in range(len(shape)) if k not in apart]
    for k, at in zip(kept, window, strict=True):
        dims[k] = part.dims[at]
    if len(apart) == 1:
        dims[apart[0]] = (Atom(rows, shape[apart[0]]),)
    share = embedded_share(part, shape)
    within = part._replace(dims=tuple(dims), share=share)
    return fitted(within, shape)
