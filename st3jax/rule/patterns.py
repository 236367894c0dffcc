"""Patterns: which weights live and die together, so that hardware can skip the zeros.

A pattern turns the one threshold of a leaf into a threshold for each weight; all else
(soft or hard, rescaling, straight-through gradients) stays as it is.

- no pattern: every weight has the threshold ``t`` itself;
- ``"N:M"``: of every M consecutive weights along the inputs, N are kept, of equal ones
  the first. The threshold of a group is its (N+1)-th largest magnitude times ``t``, and
  ``t`` goes from 0 to 1, so that weights pass zero without a jump;
- a shape such as ``(4, 8)``: a block of so many weights, 4 inputs by 8 outputs, is kept
  if its l1 norm is above ``t``, and shrinks by the share ``t / norm``. For blocks of
  one weight that is no pattern at all.

Groups and blocks lie in one kernel, whatever the array that holds it.

Source of the continuous N:M projection: Hu, Zhu and Chen, "S-STE: Continuous Pruning
Function for Efficient 2:4 Sparse Pre-Training", NeurIPS 2024, arXiv:2409.09099.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from st3jax.layout.letters import (
    Layouts,
    broadcast,
    from_kernels,
    kernel_order,
    kernel_shape,
    to_kernels,
)
from st3jax.selection.keys import from_key, is_positive, score_dtype, to_key

__all__ = [
    "ANY",
    "Pattern",
    "block_norms",
    "check_pattern_fits",
    "final_sparsity",
    "norms_of_kernels",
    "parse_pattern",
    "spread",
    "stays",
]


class Pattern(NamedTuple):
    """A parsed pattern.

    Attributes:
        kind: ``"any"``, ``"groups"`` or ``"block"``.
        numbers: Nothing, (N, M), or the shape of a block on the last axes of a kernel.
    """

    kind: str
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        if self.kind == "any":
            return "no pattern"
        between = ":" if self.kind == "groups" else "x"
        return f"the pattern {between.join(map(str, self.numbers))}"


ANY = Pattern("any", ())
"""Zeros may be anywhere."""


def parse_pattern(pattern: str | tuple[int, ...] | None) -> Pattern:
    """Reads a pattern as a user writes it.

    Args:
        pattern: ``None``, ``"N:M"`` such as ``"2:4"``, or the shape of a block on the
            last axes of a kernel, such as ``(16, 1)``.

    Returns:
        The pattern.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> parse_pattern("2:4"), parse_pattern((16, 1))
        (Pattern(kind='groups', numbers=(2, 4)), Pattern(kind='block', numbers=(16, 1)))
    """
    if pattern is None:
        return ANY
    if isinstance(pattern, tuple | list):
        if pattern and all(type(side) is int and side >= 1 for side in pattern):
            return Pattern("block", tuple(pattern))
    elif isinstance(pattern, str):
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        keep, of = (int(number) for number in found.groups()) if found else (0, 0)
        if 0 < keep < of:
            return Pattern("groups", (keep, of))
    raise ValueError(
        "pattern is 'N:M' with 0 < N < M, such as '2:4', or the shape of a block, such "
        f"as (16, 1), got {pattern!r}"
    )


def final_sparsity(pattern: Pattern) -> float | None:
    """The share of zeros that a pattern itself asks for, if it does.

    Example:
        >>> final_sparsity(parse_pattern("1:4")), final_sparsity(ANY)
        (0.75, None)
    """
    if pattern.kind != "groups":
        return None
    keep, of = pattern.numbers
    return (of - keep) / of


def check_pattern_fits(
    pattern: Pattern, leaves: dict[str, Any], layouts: Layouts
) -> None:
    """Raises unless every leaf can be divided into the groups or blocks of a pattern.

    Args:
        pattern: The pattern.
        leaves: From path to array (or abstract array).
        layouts: From path to a letter for each axis.

    Raises:
        ValueError: With all leaves that cannot.

    Example:
        >>> stem = {"stem/kernel": jnp.zeros((3, 3, 3, 64))}
        >>> check_pattern_fits(parse_pattern("2:4"), stem, {"stem/kernel": "wwio"})
        Traceback (most recent call last):
        ValueError: pattern '2:4' does not fit 'stem/kernel' of shape (3, 3, 3, 64): \
its input axis of 3 weights does not divide by 4; leave it out with prunable=...
    """
    if pattern.kind == "any":
        return
    name = (
        "'{}:{}'".format(*pattern.numbers)
        if pattern.kind == "groups"
        else f"{pattern.numbers}"
    )
    problems = [
        f"'{path}' of shape {jnp.shape(leaf)}: {problem}"
        for path, leaf in leaves.items()
        if (problem := _misfit(pattern, layouts[path], jnp.shape(leaf)))
    ]
    if problems:
        them = "it" if len(problems) == 1 else "them"
        raise ValueError(
            f"pattern {name} does not fit {', and '.join(problems)}; "
            f"leave {them} out with prunable=..."
        )


def _misfit(pattern: Pattern, layout: str, shape: tuple[int, ...]) -> str:
    sides = kernel_shape(layout, shape)
    if pattern.kind == "groups":
        if "i" not in layout:
            return "it has no input axis"
        size, of = sides[layout.count("w")], pattern.numbers[1]
        return f"its input axis of {size} weights does not divide by {of}" * (
            size % of > 0
        )
    block = pattern.numbers
    if len(sides) < len(block):
        return f"it has fewer than {len(block)} axes"
    pairs = zip(sides[len(sides) - len(block) :], block, strict=True)
    odd = [f"{size} by {side}" for size, side in pairs if size % side]
    return f"{', '.join(odd)} does not divide" if odd else ""


def block_norms(
    w: jax.Array, shape: tuple[int, ...], order: Sequence[int] | None = None
) -> jax.Array:
    """The l1 norm of every block, with the same bits wherever it is computed.

    Sums are made of single additions in a fixed order, since a compiler may order those
    of a reduction differently from one place to the next.

    Args:
        w: Weights; the blocks tile its last axes.
        shape: Shape of a block.
        order: The axes in the order in which they are added up, that of the array by
            default.

    Returns:
        float64 for float64 weights and float32 otherwise, with the blocked axes of
        ``w`` divided by the sides of a block.

    Example:
        >>> block_norms(jnp.array([[1.0, -2.0, 0.0, 4.0]]), (1, 2)).tolist()
        [[3.0, 4.0]]
    """
    norms = from_key(to_key(w))  # by bits: a conversion may see w not yet rounded
    sides = (1,) * (w.ndim - len(shape)) + tuple(shape)
    for axis in range(w.ndim) if order is None else order:
        if sides[axis] > 1:
            norms = _add_up(_split(norms, axis, sides[axis]), axis + 1)
    return norms


def norms_of_kernels(pattern: Pattern, w: jax.Array, layout: str) -> jax.Array:
    """The norms of all blocks of a leaf, stacked axes first.

    Example:
        >>> w = jnp.ones((4, 2, 6))  # two kernels
        >>> norms_of_kernels(parse_pattern((2, 3)), w, "iso").shape
        (2, 2, 2)
    """
    whole, letters = _unbroken(pattern, w, layout)
    norms = _norms(pattern, whole, letters)
    return to_kernels(norms, letters) if "s" in letters else norms


def _unbroken(pattern: Pattern, w: jax.Array, layout: str) -> tuple[jax.Array, str]:
    """The leaf, or its kernels if a group or block would cross axes of the leaf.

    As it is stored it keeps its sharding. The second is the layout of the result.
    """
    sides = _sides(pattern, layout)
    if all(size % side == 0 for size, side in zip(w.shape, sides, strict=True)):
        return w, layout
    letters = "s" * layout.count("s") + "w" * layout.count("w")
    letters += "".join(letter for letter in "io" if letter in layout)
    return to_kernels(w, layout), letters


def _sides(pattern: Pattern, layout: str) -> tuple[int, ...]:
    """How many weights a group or block takes of each axis, of the last of a letter."""
    if pattern.kind == "groups":
        of = {layout.rindex("i"): pattern.numbers[1]}
    else:
        window = [axis for axis, letter in enumerate(layout) if letter == "w"]
        ends = [layout.rindex(letter) for letter in "io" if letter in layout]
        axes = (window + ends)[-len(pattern.numbers) :]
        of = dict(zip(axes, pattern.numbers, strict=True))
    return tuple(of.get(axis, 1) for axis in range(len(layout)))


def _norms(pattern: Pattern, w: jax.Array, layout: str) -> jax.Array:
    """Added up in the order of a kernel's axes, however they are stored."""
    return block_norms(w, _sides(pattern, layout), kernel_order(layout))


def spread(pattern: Pattern, w: jax.Array, t: jax.Array, layout: str) -> jax.Array:
    """The threshold on each weight, from the threshold of its kernel.

    Args:
        pattern: The pattern.
        w: Weights of one leaf.
        t: Threshold of the leaf, a scalar, or one for each of its stacked kernels; off
            while not above zero.
        layout: A letter for each axis of the leaf.

    Returns:
        Array that broadcasts to ``w``, of the dtype of its scores, cut off from
        differentiation.

    Example:
        >>> w = jnp.array([[6.0], [-2.0], [1.0], [1.0]])
        >>> groups, blocks = parse_pattern("2:4"), parse_pattern((2, 1))
        >>> spread(groups, w, jnp.array(1.0), "io").ravel().tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> spread(blocks, w, jnp.array(4.0), "io").ravel().tolist()
        [3.0, 1.0, inf, inf]
    """
    if pattern.kind == "any":
        return broadcast(t, layout)
    w, t = jax.lax.stop_gradient((w, t.astype(score_dtype(w.dtype))))
    whole, letters = _unbroken(pattern, w, layout)
    own = broadcast(t, letters)
    if pattern.kind == "groups":
        keys = _keys_of_groups(pattern, whole, own, letters.rindex("i"))
        each = from_key(jnp.maximum(keys, 0))
    else:
        each = _of_blocks(pattern, whole, own, letters)
    t = broadcast(t, layout)
    return jnp.where(is_positive(t), _stored(each, letters, layout, w), t)


def _stored(each: jax.Array, letters: str, layout: str, w: jax.Array) -> jax.Array:
    """Values of weights as the leaf stores these."""
    return each if letters == layout else from_kernels(each, layout, w)


def stays(pattern: Pattern, scores: jax.Array, t: jax.Array, layout: str) -> jax.Array:
    """Which weights of a leaf stay, by scores that may be zero where weights are not.

    The same as scores above :func:`spread`, but that a threshold of zero is one: below
    it are the scores of zero. So zeros may be among those that N:M keeps.

    Args:
        pattern: The pattern.
        scores: Scores of the weights of one leaf, compared by magnitude.
        t: Threshold of the leaf, a scalar, or one for each of its stacked kernels; off
            while it is negative.
        layout: A letter for each axis of the leaf.

    Returns:
        Boolean array of the shape of the scores.

    Example:
        >>> scores = jnp.array([[6.0], [0.0], [0.0], [0.0]])
        >>> stays(ANY, scores, jnp.array(0.0), "io").ravel().tolist()
        [True, False, False, False]
        >>> stays(parse_pattern("2:4"), scores, jnp.array(1.0), "io").ravel().tolist()
        [True, True, False, False]
    """
    t = t.astype(score_dtype(scores.dtype))
    bound = jnp.where(t < 0, -1, to_key(t))
    off = broadcast(bound < 0, layout)
    if pattern.kind == "any":
        return to_key(scores) > broadcast(bound, layout)
    whole, letters = _unbroken(pattern, scores, layout)
    if pattern.kind == "groups":
        own, axis = broadcast(t, letters), letters.rindex("i")
        kept = to_key(whole) > _keys_of_groups(pattern, whole, own, axis)
    else:
        above = to_key(_norms(pattern, whole, letters)) > broadcast(bound, letters)
        kept = _each_weight(above, _sides(pattern, letters))
    return off | _stored(kept, letters, layout, scores)


def _keys_of_groups(
    pattern: Pattern, w: jax.Array, t: jax.Array, axis: int
) -> jax.Array:
    """The key up to which each weight goes; of a zero that stays, -1."""
    keep, of = pattern.numbers
    split = _split(to_key(w), axis, of)
    lanes = [jax.lax.index_in_dim(split, i, axis + 1) for i in range(of)]
    least = _kth_largest(lanes, keep)
    bound = from_key(least)
    bound = jnp.where(t < 1, bound * t, bound)  # at 1, with the bits of the weight
    each = _below_first_ties(lanes, least, to_key(bound), keep)
    return jnp.concatenate(each, axis + 1).reshape(w.shape)


def _below_first_ties(
    lanes: list[jax.Array], least: jax.Array, bound: jax.Array, keep: int
) -> list[jax.Array]:
    """The bound of each lane, just below the first of equal weights, which stay."""
    room = keep - sum((lane > least).astype(jnp.int32) for lane in lanes)
    each = []
    for lane in lanes:
        stays = (lane > least) | ((lane == least) & (room > 0))
        room -= (lane == least).astype(jnp.int32)
        each.append(jnp.where(stays, jnp.minimum(bound, lane - 1), bound))
    return each


def _of_blocks(pattern: Pattern, w: jax.Array, t: jax.Array, layout: str) -> jax.Array:
    size, norms = from_key(to_key(w)), _norms(pattern, w, layout)
    share = jnp.where(to_key(norms) > to_key(t), t / norms, jnp.inf)
    share = _each_weight(share, _sides(pattern, layout))
    # Of a block that is kept no weight becomes zero, however small it is.
    below = from_key(jnp.maximum(to_key(size) - 1, 0))
    return jnp.where(share < jnp.inf, jnp.minimum(size * share, below), share)


def _each_weight(x: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """What blocks have, for each of their weights."""
    for axis, side in enumerate(sides):
        x = _repeat(x, axis, side)
    return x


def _split(x: jax.Array, axis: int, side: int) -> jax.Array:
    """An axis divided into parts of ``side``, which become an axis of their own."""
    shape = (*x.shape[:axis], x.shape[axis] // side, side, *x.shape[axis + 1 :])
    return x.reshape(shape)


def _repeat(x: jax.Array, axis: int, side: int) -> jax.Array:
    """Every element ``side`` times along an axis."""
    if side == 1:
        return x
    shape = (*x.shape[: axis + 1], side, *x.shape[axis + 1 :])
    joined = (*x.shape[:axis], x.shape[axis] * side, *x.shape[axis + 1 :])
    return jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape).reshape(joined)


def _add_up(x: jax.Array, axis: int) -> jax.Array:
    """The sum over an axis, by halves."""
    while (size := x.shape[axis]) > 1:
        half = size // 2
        low = jax.lax.slice_in_dim(x, 0, half, axis=axis)
        high = jax.lax.slice_in_dim(x, half, 2 * half, axis=axis)
        rest = jax.lax.slice_in_dim(x, 2 * half, size, axis=axis)
        x = jnp.concatenate([low + high, rest], axis) if size % 2 else low + high
    return x.squeeze(axis)


def _kth_largest(lanes: list[jax.Array], k: int) -> jax.Array:
    """Elementwise over arrays, the one that is larger than all but ``k`` (from 0)."""
    lanes = list(lanes)
    up = k >= len(lanes) // 2  # nearer to the smallest: bring those to the front
    first, second = (jnp.minimum, jnp.maximum) if up else (jnp.maximum, jnp.minimum)
    place = len(lanes) - 1 - k if up else k
    for done in range(place + 1):
        for i in range(len(lanes) - 1, done, -1):
            a, b = lanes[i - 1], lanes[i]
            lanes[i - 1], lanes[i] = first(a, b), second(a, b)
    return lanes[place]
