"""Order statistics by digits: few reads of arrays that are whole on a CPU.

Each round looks at a window of keys. One read turns every key into a digit of one byte,
its level among 254 in the window; eight counts over the bytes find the level that holds
the wanted rank. A window that is guessed well (near the threshold before, or where a
sample says) holds it, and the next one is 254 times narrower: two rounds, five to
seven reads. Guesses decide only about speed. What is known is exact: the bracket of
keys that holds the rank, and how many keys lie below each of its ends.

The digits of small arrays lie in one buffer, so that counting is compiled for a few
buffers, however many arrays there are. Counts run over tiles with one counter a lane,
since XLA on a CPU would write an array of all comparisons before summing them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from st3jax.selection.keys import joined_keys, to_key
from st3jax.selection.tally import Tally, tied_to
from st3jax.selection.wide import wide

__all__ = ["neighbours"]

LEVELS = 254  # digits -127..126 are levels; -128 and 127 lie outside the window
TILE = 8192  # elements counted at a time, one counter each
FLUSH = 127  # tiles until a counter of one byte could overflow
SAMPLE = 65_536  # elements looked at for the first guess, of 16 times as many or more
SMOOTH = 1 << 18  # in brackets up to this width, keys are taken to lie evenly
ALONE = 32  # a leaf with more than this part of all elements is counted by itself
AHEAD = LEVELS << 8  # how far the key that follows is looked for at first


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


class Sample(NamedTuple):
    """Some keys of all leaves.

    Attributes:
        keys: int32 [samples].
        weights: float32 [samples], what each stands for, relative to one another.
    """

    keys: jax.Array
    weights: jax.Array


class Search(NamedTuple):
    """One loop finds both keys, the second from where the first has been found.

    Attributes:
        rank: int64 [], the rank that is looked for.
        bracket: Where its key is.
        guess: Where to look next.
        sampled: bool [], whether the sample has been asked.
        low: int32 [], the key of the first rank, -1 until it is found.
        high: int32 [], that of the second rank, likewise.
    """

    rank: jax.Array
    bracket: Bracket
    guess: Guess
    sampled: jax.Array
    low: jax.Array
    high: jax.Array


@wide
def neighbours(
    leaves: list[jax.Array],
    rank: jax.Array,
    near: jax.Array,
    needed: jax.Array,
    tally: Tally,
    *,
    margin: int,
) -> tuple[jax.Array, jax.Array]:
    """The keys of ranks ``rank`` and ``rank + 1`` (0-based) among all leaves.

    Args:
        leaves: Arrays whose magnitudes count, none of them float64.
        rank: int64 [], at least 0 and less than the size of the tally.
        near: float32 [], a threshold that may be close; not above 0 if there is none.
        needed: bool [], whether to search at all.
        tally: How the counts of the leaves add up.
        margin: How far from it to look, in keys.

    Returns:
        Two scalar keys; at the last rank, the second is the first again.
    """
    total = tally.size(leaves)
    mean_cost = total / tally._replace(costs=(1,) * len(leaves)).size(leaves)
    size = jnp.array(total, jnp.int64)
    top = to_key(jnp.array(jnp.nan, jnp.float32)) + 1
    missing = -jnp.ones_like(top)
    last = rank + 1 == size
    everywhere = _everywhere(tally)
    many = sum(leaf.size for leaf in leaves) > 16 * SAMPLE
    sample = _draw(leaves, tally) if many else None

    def unfinished(search: Search) -> jax.Array:
        return needed & (search.high < 0)

    def look(search: Search) -> Search:
        bracket, guess = search.bracket, search.guess
        ask = (bracket.high - bracket.low > SMOOTH) & ~guess.good & ~search.sampled
        if sample is not None:
            share = search.rank.astype(jnp.float64) / total
            guess = lax.cond(
                ask, lambda: _from_sample(sample, share, everywhere), lambda: guess
            )
        bracket, missed, after = _narrow(leaves, search.rank, bracket, guess, tally)
        guess = _next(search.rank, bracket, missed, mean_cost)
        found = bracket.high - bracket.low <= 1
        first = found & (search.low < 0)
        tied = last | (bracket.below_high > search.rank + 1)
        both = first & (tied | (after >= 0))
        low = jnp.where(first, bracket.low, search.low)
        high = jnp.where(found & ~first, bracket.low, search.high)
        high = jnp.where(both, jnp.where(tied, low, after), high)
        # Seldom: no other key within 254 of this one, so its rank is looked for, too.
        next_bracket = Bracket(low + 1, top, bracket.below_high, size)
        next_guess = Guess(low + 1, low + 1 + AHEAD, jnp.ones([], bool))
        bracket, guess = jax.tree.map(
            functools.partial(jnp.where, first & ~both),
            (next_bracket, next_guess),
            (bracket, guess),
        )
        rank = jnp.where(first, search.rank + 1, search.rank)
        return Search(rank, bracket, guess, search.sampled | ask, low, high)

    around = to_key(near)
    search = lax.while_loop(
        unfinished,
        look,
        Search(
            rank=rank,
            bracket=Bracket(jnp.zeros_like(top), top, jnp.zeros_like(size), size),
            guess=Guess(around - margin, around + margin, near > 0),
            sampled=jnp.zeros([], bool),
            low=missing,
            high=missing,
        ),
    )
    return search.low, search.high


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
    # and kept: as much memory again as the arrays.
    held = tied_to(start, leaves)
    digits, tally = _buffers([_digits(leaf, start, shift) for leaf in held], tally)

    def set_bit(i: jax.Array, found: Any) -> Any:
        digit, below, above = found
        candidate = digit + (128 >> i.astype(jnp.int32))
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
    level, first = (digit + 127).astype(jnp.int64), start.astype(jnp.int64)
    begin, end = (
        first + (edge << shift.astype(jnp.int64)) for edge in (level, level + 1)
    )
    begin = begin.astype(start.dtype)
    end = jnp.minimum(end, bracket.high.astype(jnp.int64)).astype(start.dtype)
    low = jnp.where(under, bracket.low, begin)
    high = jnp.where(under, start, jnp.where(over, bracket.high, end))

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
    keys = width.astype(jnp.float64)
    inside = (bracket.below_high - bracket.below_low).astype(jnp.float64)
    share = (rank - bracket.below_low).astype(jnp.float64) / inside
    slack = 2 * keys / jnp.sqrt(inside / mean_cost) + 2
    start = jnp.maximum(share * keys - slack, 0).astype(jnp.int32)
    stop = jnp.minimum(share * keys + slack, keys).astype(jnp.int32) + 1
    even = ~missed & (width > LEVELS) & (width <= SMOOTH)
    return Guess(
        jnp.where(even, bracket.low + start, bracket.low),
        jnp.where(even, bracket.low + stop, bracket.high),
        even,
    )


def _draw(leaves: list[jax.Array], tally: Tally) -> Sample:
    """Some keys of all leaves; always, as it is cheap, and a branch long to compile."""
    local = sum(leaf.size for leaf in leaves)
    stride = max(1, local // SAMPLE) | 1  # odd, to be out of step with the channels
    kinds = tally.kinds()
    picked = {
        kind: [_every(leaves[i], stride) for i in alike]
        for kind, alike in kinds.items()
    }
    everywhere = _everywhere(tally)

    def weight(cost: int, axes: tuple[str, ...]) -> float:
        """Relative to the highest cost, and to the copies that are counted with it."""
        copies = math.prod(lax.axis_size(a) for a in everywhere if a not in axes)
        return cost / max(tally.costs) / copies

    return Sample(
        joined_keys([part for parts in picked.values() for part in parts]),
        jnp.concatenate(
            [
                jnp.full(sum(part.size for part in parts), weight(*kind), jnp.float32)
                for kind, parts in picked.items()
            ]
        ),
    )


def _everywhere(tally: Tally) -> tuple[str, ...]:
    """All mesh axes that any leaf is sharded over."""
    return tuple(sorted({axis for axes in tally.axes for axis in axes}))


def _from_sample(sample: Sample, share: jax.Array, axes: tuple[str, ...]) -> Guess:
    """Where a share of all is below, four standard deviations each way."""
    keys, weights = sample

    def drawn(weights: jax.Array) -> jax.Array:
        mass = jnp.sum(weights)
        return lax.psum(mass, axes) if axes else mass

    share = share.astype(jnp.float32)
    spread = 4 * jnp.sqrt(jnp.maximum(share * (1 - share), 1e-6) * drawn(weights**2))
    spread += 1
    bounds = share * drawn(weights) + jnp.stack([-spread, spread])

    def set_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidates = found | (jnp.int32(1) << (30 - i.astype(jnp.int32)))
        below = [drawn(jnp.where(keys < c, weights, 0)) for c in candidates]
        return jnp.where(jnp.stack(below) <= bounds, candidates, found)

    start, stop = lax.fori_loop(0, 31, set_bit, jnp.zeros(2, jnp.int32))
    # Past all keys, the highest number has been found: one more would overflow.
    stop = jnp.minimum(stop, jnp.iinfo(stop.dtype).max - 1) + 1
    return Guess(start, stop, jnp.ones([], bool))


def _every(leaf: jax.Array, stride: int) -> jax.Array:
    """Some elements of an array, one at least."""
    return leaf.reshape(-1)[stride // 2 % max(leaf.size, 1) :: stride]


@jax.jit
def _digits(leaf: jax.Array, start: jax.Array, shift: jax.Array) -> jax.Array:
    """The levels of all elements in the window, int8 [size]."""
    level = lax.shift_right_arithmetic(
        to_key(leaf) - start, jnp.broadcast_to(shift, leaf.shape)
    )
    return (jnp.clip(level, -1, LEVELS) - 127).astype(jnp.int8).reshape(-1)


def _buffers(digits: list[jax.Array], tally: Tally) -> tuple[list[jax.Array], Tally]:
    """The digits to count: of large leaves as they are, of others in one buffer."""
    large = sum(d.size for d in digits) // ALONE
    buffers, kinds = [], []
    for kind, alike in tally.kinds().items():
        small = [digits[i] for i in alike if digits[i].size <= large]
        joined = [jnp.concatenate(small)] if small else []
        own = joined + [digits[i] for i in alike if digits[i].size > large]
        buffers += own
        kinds += [kind] * len(own)
    return buffers, Tally(*(tuple(part) for part in zip(*kinds, strict=True)))


def _count_below(digits: jax.Array, digit: jax.Array) -> jax.Array:
    """How many digits are below one, int64 []."""
    tiles = digits.size // TILE

    def add(i: jax.Array, counts: jax.Array) -> jax.Array:
        tile = lax.dynamic_slice(digits, (i * TILE,), (TILE,))
        return counts + (tile < digit).astype(jnp.int8)

    def add_tiles(i: jax.Array, counts: jax.Array) -> jax.Array:
        first, none = i * FLUSH, _filled(digits, 0, jnp.int8)
        last = jnp.minimum(first + FLUSH, tiles)
        return counts + lax.fori_loop(first, last, add, none).astype(jnp.int32)

    rest = jnp.sum(digits[tiles * TILE :] < digit, dtype=jnp.int64)
    if not tiles:
        return rest
    counts = lax.fori_loop(0, -(-tiles // FLUSH), add_tiles, _filled(digits, 0))
    return rest + jnp.sum(counts, dtype=jnp.int64)


def _least_above(digits: jax.Array, bound: jax.Array) -> jax.Array:
    """The least digit above a bound, 127 if there is none."""
    tiles = digits.size // TILE
    none = jnp.iinfo(digits.dtype).max

    def above(tile: jax.Array) -> jax.Array:
        return jnp.where(tile > bound, tile, none)

    def take_least(i: jax.Array, least: jax.Array) -> jax.Array:
        tile = lax.dynamic_slice(digits, (i * TILE,), (TILE,))
        return jnp.minimum(least, above(tile))

    rest = jnp.min(above(digits[tiles * TILE :]), initial=none)
    if not tiles:
        return rest
    least = _filled(digits, none, digits.dtype)
    return jnp.minimum(rest, jnp.min(lax.fori_loop(0, tiles, take_least, least)))


def _filled(digits: jax.Array, value: int, dtype: Any = jnp.int32) -> jax.Array:
    """A tile of one number, typed to vary over the mesh axes that ``digits`` does."""
    tile = jnp.full(TILE, value, dtype)
    return jnp.where(digits[:TILE] == 0, tile, tile)
