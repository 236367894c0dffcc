"""Order statistics by digits: few reads of arrays that are whole on a CPU.

Each round looks at a window of keys. One read turns every key into a digit of one byte,
its level among 254 in the window; eight counts over the bytes find the level that holds
the wanted rank. A window that is guessed well (near the threshold before, or where a
sample says) holds it, and the next one is 254 times narrower: two rounds, five to
seven reads. Guesses decide only about speed. What is known is exact: the bracket of
keys that holds the rank, and how many keys lie below each of its ends.

Counts run over tiles with one counter a lane, since XLA on a CPU would write an array
of all comparisons before summing them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from st3jax.selection.keys import to_key
from st3jax.selection.tally import Tally

__all__ = ["neighbours"]

LEVELS = 254  # digits -127..126 are levels; -128 and 127 lie outside the window
TILE = 8192  # elements counted at a time, one counter each
FLUSH = 127  # tiles until a counter of one byte could overflow
SAMPLE = 65_536  # elements looked at for the first guess
SMOOTH = 1 << 18  # in brackets up to this width, keys are taken to lie evenly


class Bracket(NamedTuple):
    """The keys among which the wanted one is: ``low <= key < high``.

    Attributes:
        low: int32 [].
        high: int32 [].
        below_low: int64 [], how many keys are below ``low``, at most the rank.
        below_high: int64 [], how many keys are below ``high``, more than the rank.
    """

    low: jax.Array
    high: jax.Array
    below_low: jax.Array
    below_high: jax.Array


class Guess(NamedTuple):
    """Where to look next: ``start <= key < stop``, and whether there is reason to.

    Attributes:
        start: int32 [].
        stop: int32 [].
        good: bool [].
    """

    start: jax.Array
    stop: jax.Array
    good: jax.Array


def neighbours(
    leaves: list[jax.Array],
    rank: jax.Array,
    near: jax.Array,
    tally: Tally,
    *,
    margin: int,
) -> tuple[jax.Array, jax.Array]:
    """The keys of ranks ``rank`` and ``rank + 1`` (0-based) among all leaves.

    To be called in 64-bit mode.

    Args:
        leaves: Arrays whose magnitudes count, none of them float64.
        rank: int64 [], at least 0 and less than the size of the tally.
        near: float32 [], a threshold that may be close; not above 0 if there is none.
        tally: How the counts of the leaves add up.
        margin: How far from it to look, in keys.

    Returns:
        Two scalar keys; at the last rank, the second is the first again.
    """
    size = jnp.array(tally.size(leaves), jnp.int64)
    top = to_key(jnp.array(jnp.nan, jnp.float32)) + 1
    zero = jnp.zeros_like(size)
    bracket = Bracket(jnp.zeros_like(top), top, zero, size)
    around = to_key(near)
    guess = Guess(around - margin, around + margin, near > 0)

    mean_cost = tally.size(leaves) / tally._replace(costs=(1,) * len(leaves)).size(
        leaves
    )

    def unfinished(carry: Any) -> jax.Array:
        bracket, *_ = carry
        return bracket.high - bracket.low > 1

    def look(carry: Any) -> Any:
        bracket, guess, sampled, _ = carry
        wide = bracket.high - bracket.low > SMOOTH
        sample = wide & ~guess.good & ~sampled
        guess = lax.cond(
            sample,
            lambda: _sampled(leaves, rank / size, tally),
            lambda: guess,
        )
        bracket, missed, after = _narrow(leaves, rank, bracket, guess, tally)
        guess = _next(rank, bracket, missed, mean_cost)
        return bracket, guess, sampled | sample, after

    start = (bracket, guess, jnp.zeros([], bool), -jnp.ones_like(top))
    bracket, _, _, after = lax.while_loop(unfinished, look, start)
    low = bracket.low
    tied = (bracket.below_high > rank + 1) | (rank + 1 == size)

    def search_all() -> jax.Array:
        return tally.least([_least_above(x.reshape(-1), low, to_key) for x in leaves])

    # Seldom: no other key within 254 of this one.
    after = lax.cond(tied | (after >= 0), lambda: after, search_all)
    return low, jnp.where(tied, low, after)


def _narrow(
    leaves: list[jax.Array],
    rank: jax.Array,
    bracket: Bracket,
    guess: Guess,
    tally: Tally,
) -> tuple[Bracket, jax.Array, jax.Array]:
    """One round: a narrower bracket, whether the guess missed, the key that follows.

    The key that follows the wanted one is -1 unless it can be told from the digits.
    """
    start = jnp.clip(guess.start, bracket.low, bracket.high - 1)
    # At least one key wide, whatever was guessed: each round makes progress.
    width = jnp.clip(guess.stop, start + 1, bracket.high) - start
    levels = jnp.maximum(-(-width // LEVELS), 1)
    shift = 32 - lax.clz(levels - 1)
    # Tied to the bracket, or the keys of all leaves would be computed before the loop
    # and kept: as much memory again as the arrays. One by one: a barrier makes all that
    # it holds vary over the same mesh axes.
    held = [lax.optimization_barrier((leaf, bracket))[0] for leaf in leaves]
    digits = [_digits(leaf, start, shift) for leaf in held]

    def set_bit(i: jax.Array, found: Any) -> Any:
        digit, below, above = found
        candidate = digit + (128 >> i)
        bound = candidate.astype(jnp.int8)
        (count,) = tally.total([[_count_below(d, bound)] for d in digits])
        up = count <= rank
        return (
            jnp.where(up, candidate, digit),
            jnp.where(up, count, below),
            jnp.where(up, above, count),
        )

    digit, below, above = lax.fori_loop(
        0, 8, set_bit, (jnp.int32(-128), bracket.below_low, bracket.below_high)
    )
    under, over = digit == -128, digit == 127
    # In 64 bits: the end of a level can lie above the highest key.
    level = (digit + 127).astype(jnp.int64)
    begin, end = (start + (edge << shift) for edge in (level, level + 1))
    low = jnp.where(under, bracket.low, begin).astype(start.dtype)
    end = jnp.where(over, bracket.high, jnp.minimum(end, bracket.high))
    high = jnp.where(under, start, end).astype(start.dtype)

    def following() -> jax.Array:
        bound = digit.astype(jnp.int8)
        least = tally.least([_least_above(d, bound) for d in digits])
        next_digit = least.astype(jnp.int32)
        return jnp.where(next_digit < 127, start + next_digit + 127, -1)

    told = (shift == 0) & ~under & (high - low <= 1)
    after = lax.cond(told, following, lambda: jnp.full_like(start, -1))
    return Bracket(low, high, below, above), under | over, after


def _next(
    rank: jax.Array, bracket: Bracket, missed: jax.Array, mean_cost: float
) -> Guess:
    """Where the rank should be if the keys of a narrow bracket lie evenly in it."""
    width = bracket.high - bracket.low
    inside = (bracket.below_high - bracket.below_low).astype(jnp.float64)
    share = (rank - bracket.below_low).astype(jnp.float64) / inside
    slack = 2 * width / jnp.sqrt(inside / mean_cost) + 2
    start = jnp.maximum(share * width - slack, 0).astype(jnp.int32)
    stop = jnp.minimum(share * width + slack, width).astype(jnp.int32) + 1
    even = ~missed & (width > LEVELS) & (width <= SMOOTH)
    return Guess(
        jnp.where(even, bracket.low + start, bracket.low),
        jnp.where(even, bracket.low + stop, bracket.high),
        even,
    )


def _sampled(leaves: list[jax.Array], share: jax.Array, tally: Tally) -> Guess:
    """Where a share of all is below, by a sample: four standard deviations each way."""
    local = sum(leaf.size for leaf in leaves)
    stride = max(1, local // SAMPLE) | 1  # odd, to be out of step with the channels
    picked = [
        leaf.reshape(-1)[stride // 2 % max(leaf.size, 1) :: stride] for leaf in leaves
    ]
    keys = to_key(jnp.concatenate(picked))
    everywhere = tuple(sorted({axis for axes in tally.axes for axis in axes}))

    def weight(cost: int, axes: tuple[str, ...]) -> float:
        """Relative to the highest cost, and to the copies that are counted with it."""
        copies = math.prod(lax.axis_size(a) for a in everywhere if a not in axes)
        return cost / max(tally.costs) / copies

    weights = jnp.concatenate(
        [
            jnp.full(part.size, weight(cost, axes), jnp.float32)
            for part, cost, axes in zip(picked, tally.costs, tally.axes, strict=True)
        ]
    )

    def drawn(weights: jax.Array) -> jax.Array:
        mass = jnp.sum(weights)
        return lax.psum(mass, everywhere) if everywhere else mass

    share = share.astype(jnp.float32)
    spread = 4 * jnp.sqrt(jnp.maximum(share * (1 - share), 1e-6) * drawn(weights**2))
    spread += 1
    bounds = share * drawn(weights) + jnp.stack([-spread, spread])

    def set_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidates = found | (jnp.int32(1) << (30 - i))
        below = [drawn(jnp.where(keys < c, weights, 0)) for c in candidates]
        return jnp.where(jnp.stack(below) <= bounds, candidates, found)

    start, stop = lax.fori_loop(0, 31, set_bit, jnp.zeros(2, jnp.int32))
    # Past all keys, the highest number has been found: one more would overflow.
    stop = jnp.minimum(stop, jnp.iinfo(stop.dtype).max - 1) + 1
    return Guess(start, stop, jnp.ones([], bool))


def _digits(leaf: jax.Array, start: jax.Array, shift: jax.Array) -> jax.Array:
    """The levels of all elements in the window, int8 [size]."""
    level = lax.shift_right_arithmetic(to_key(leaf) - start, shift)
    return (jnp.clip(level, -1, LEVELS) - 127).astype(jnp.int8).reshape(-1)


def _count_below(digits: jax.Array, digit: jax.Array) -> jax.Array:
    """How many digits are below one, int32 [] or int64 []."""
    tiles = digits.size // TILE

    def add(i: jax.Array, counts: jax.Array) -> jax.Array:
        tile = lax.dynamic_slice(digits, (i * TILE,), (TILE,))
        return counts + (tile < digit).astype(jnp.int8)

    def add_tiles(i: jax.Array, counts: jax.Array) -> jax.Array:
        first, none = i * FLUSH, _filled(digits, 0, jnp.int8)
        last = jnp.minimum(first + FLUSH, tiles)
        return counts + lax.fori_loop(first, last, add, none).astype(jnp.int32)

    rest = jnp.sum(digits[tiles * TILE :] < digit, dtype=jnp.int32)
    if not tiles:
        return rest
    counts = lax.fori_loop(0, -(-tiles // FLUSH), add_tiles, _filled(digits, 0))
    return rest + jnp.sum(counts, dtype=jnp.int64)


def _least_above(
    flat: jax.Array,
    bound: jax.Array,
    convert: Callable[[jax.Array], jax.Array] = lambda tile: tile,
) -> jax.Array:
    """The least element above a bound, once converted to the bound's integer dtype.

    It is the dtype's largest number if there is none.
    """
    tiles = flat.size // TILE
    none = jnp.iinfo(bound.dtype).max

    def above(tile: jax.Array) -> jax.Array:
        converted = convert(tile)
        return jnp.where(converted > bound, converted, none)

    def take_least(i: jax.Array, least: jax.Array) -> jax.Array:
        tile = lax.dynamic_slice(flat, (i * TILE,), (TILE,))
        return jnp.minimum(least, above(tile))

    rest = jnp.min(above(flat[tiles * TILE :]), initial=none)
    if not tiles:
        return rest
    least = _filled(flat, none, bound.dtype)
    return jnp.minimum(rest, jnp.min(lax.fori_loop(0, tiles, take_least, least)))


def _filled(flat: jax.Array, value: int, dtype: Any = jnp.int32) -> jax.Array:
    """A tile of one number, typed to vary over the mesh axes that ``flat`` does."""
    tile = jnp.full(TILE, value, dtype)
    return jnp.where(flat[:TILE] == 0, tile, tile)
