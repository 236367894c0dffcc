"""Order statistics bit by bit: for any sharding, any platform, any key dtype.

The key of the wanted rank is found from its highest bit down, a few bits with each
read of the arrays: how many keys lie below each candidate says what the bits are. The
first read looks into a window around a threshold that may be close; if the key is
there, only the window's bits are left to find. Nothing but counts crosses devices, so
arrays may be sharded on any axis, by ``jit`` or by hand.

The same counts are written in the way that each platform's compiler turns into one read
of the arrays and few kernels; ``experiments/benchmarks/selection_hlo.py`` shows it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from st3jax.selection.keys import key_dtype, score_dtype, to_key
from st3jax.selection.tally import Tally, tied_to
from st3jax.selection.wide import wide

__all__ = ["neighbours"]

BITS_PER_READ = {"cpu": 1, "cuda": 3, "rocm": 3, "tpu": 3}
"""On accelerators, several comparisons hide behind one read."""
GPUS = ("cuda", "rocm")
WINDOW = 18
"""Bits of the window around a threshold that may be close: about 1 % each way."""
JOINED = 32
"""So many arrays can be joined before a GPU's compiler writes the result to memory."""
MANY = 1 << 22
"""So many scores take a GPU longer to read than to be told to."""


class Search(NamedTuple):
    """What is searched, and how.

    Attributes:
        leaves: Arrays whose magnitudes count.
        rank: int64 [], the rank that is looked for.
        tally: How the counts of ``parts`` add up.
        parts: Which leaves are counted together.
        platform: What decides how counts are written.
    """

    leaves: list[jax.Array]
    rank: jax.Array
    tally: Tally
    parts: list[list[int]]
    platform: str

    @property
    def step(self) -> int:
        """How many bits one read finds."""
        return BITS_PER_READ[self.platform]

    @property
    def dtype(self) -> jnp.dtype:
        """That of the keys."""
        return key_dtype(score_dtype(self.leaves[0].dtype))

    @property
    def bits(self) -> int:
        """How many bits a key has."""
        return int(jnp.iinfo(self.dtype).bits) - 1

    @property
    def window(self) -> int:
        """The bits of a window that is as wide in value for any dtype."""
        dtype = jnp.float64 if self.dtype == jnp.int64 else jnp.float32
        return WINDOW + int(jnp.finfo(dtype).nmant) - 23


class Bracket(NamedTuple):
    """The keys among which the wanted one is: ``low <= key < low + 2**bits``.

    Attributes:
        low: int32 [] or int64 [], as keys are.
        bits: The same.
    """

    low: jax.Array
    bits: jax.Array


@wide
def neighbours(
    leaves: list[jax.Array],
    rank: jax.Array,
    near: jax.Array,
    needed: jax.Array,
    tally: Tally,
    *,
    platform: str,
    whole: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The keys of ranks ``rank`` and ``rank + 1`` (0-based) among all leaves.

    Args:
        leaves: Arrays whose magnitudes count; all float64 or none.
        rank: int64 [], at least 0 and less than the size of the tally.
        near: float32 [] or float64 [], a threshold that may be close; not above 0 if
            there is none.
        needed: bool [], whether to search at all; a GPU may do in any case.
        tally: How the counts of the leaves add up.
        platform: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``, which decides about
            speed alone.
        whole: Whether every leaf is one piece of memory on the device that computes.

    Returns:
        Two scalar keys; at the last rank, the second is the first again.
    """
    on_gpu = platform in GPUS
    if on_gpu and whole:
        # In one order here, or every read would put them in it, where they are stored
        # in another, as convolutions like it.
        leaves = [leaf.ravel() for leaf in leaves]
    parts = _parts(tally, joined=on_gpu and whole)
    first = [part[0] for part in parts]
    alike = Tally(
        tuple(tally.costs[i] for i in first), tuple(tally.axes[i] for i in first)
    )
    search = Search(leaves, rank, alike, parts, platform)
    if not on_gpu:
        bracket = lax.while_loop(
            lambda bracket: needed & (bracket.bits > search.step),
            lambda bracket: _look(search, bracket),
            _look_around(search, near, near > 0),
        )
    elif platform == "cuda" and whole and not any(tally.axes) and _many(leaves):
        bracket = _in_branches(search, near, needed)
    else:
        # A number of turns that is not known needs the host, at every turn.
        bracket = _look_around(search, near, jnp.zeros([], bool))
        turns = _turns(search, search.bits - search.step)
        bracket = lax.fori_loop(0, turns, lambda _, b: _look(search, b), bracket)
    return _look_last(search, bracket.low)


def _many(leaves: list[jax.Array]) -> bool:
    return sum(leaf.size for leaf in leaves) >= MANY


def _turns(search: Search, bits: int) -> int:
    """How many turns leave no more bits than the last read finds."""
    return -(-(bits - search.step) // search.step)


def _in_branches(search: Search, near: jax.Array, needed: jax.Array) -> Bracket:
    """All but the last bits, with a branch for what lies outside the window.

    A GPU of NVIDIA takes a branch without its host if there are only kernels in it. So
    turns are written out, those after the window's bits in the branch.
    """
    turns = _turns(search, search.window - search.step)
    others = _turns(search, search.bits - turns * search.step)

    def go_on(bracket: Bracket, turns: int) -> Bracket:
        for _ in range(turns):
            bracket = _look(search, bracket)
        return bracket

    bracket = go_on(_look_around(search, near, near > 0), turns)
    return lax.cond(
        needed & (bracket.bits > search.step),
        lambda bracket: go_on(bracket, others),
        lambda bracket: bracket,
        bracket,
    )


def _look_around(search: Search, near: jax.Array, hinted: jax.Array) -> Bracket:
    """The first read: the highest bits in the window, or of all where it missed."""
    window, bits = search.window, search.bits
    around = jnp.maximum(to_key(near) - (1 << (window - 1)), 0)
    start = jnp.where(hinted, around, 0)
    shift = (jnp.where(hinted, window, bits) - search.step).astype(search.dtype)
    below = _below(search, start, _edges(start, shift, range(2**search.step + 1)))
    digit = jnp.sum(below[1:-1] <= search.rank).astype(search.dtype)
    there = (below[0] <= search.rank) & (search.rank < below[-1])
    return Bracket(
        jnp.where(there, start + (digit << shift), 0), jnp.where(there, shift, bits)
    )


def _look(search: Search, bracket: Bracket) -> Bracket:
    """One read: a bracket of fewer bits."""
    low, bits = bracket
    shift = jnp.maximum(bits - search.step, 0)
    below = _below(search, low, _edges(low, shift, range(1, 2**search.step)))
    digit = jnp.sum(below <= search.rank).astype(search.dtype)
    return Bracket(low + (digit << shift), shift)


def _look_last(search: Search, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last read: the key, and the one that follows, wherever it is."""
    levels = 2**search.step
    edges = _edges(low, jnp.zeros_like(low), range(1, levels + 1))
    found = [_count(search, key, edges, least=True) for key in _keys(search, low)]
    below = search.tally.total([counts for counts, _ in found])
    beyond = search.tally.least([least for _, least in found])
    ranks = search.rank, search.rank + 1
    digit, after = (jnp.sum(below <= r).astype(search.dtype) for r in ranks)
    key = low + digit
    beyond = jnp.where(beyond == jnp.iinfo(search.dtype).max, key, beyond)
    return key, jnp.where(after < levels, low + after, beyond)


def _edges(low: jax.Array, shift: jax.Array, digits: Iterable[int]) -> list[jax.Array]:
    """Where these digits begin; above all keys what is no number any more."""
    top, each = jnp.iinfo(low.dtype).max, np.array(list(digits), low.dtype)
    fits = each <= (top - low) >> shift
    edges = jnp.where(fits, low + (each << jnp.broadcast_to(shift, each.shape)), top)
    return list(edges)


def _below(search: Search, low: jax.Array, edges: list[jax.Array]) -> jax.Array:
    """How many keys lie below each edge: int64 [edges]."""
    counts = [_count(search, key, edges)[0] for key in _keys(search, low)]
    return search.tally.total(counts)


def _keys(search: Search, low: jax.Array) -> list[jax.Array]:
    """The keys of each part, read anew."""
    # Tied to the bracket, or the keys of all leaves would be computed once and kept:
    # as much memory again as the arrays.
    held = tied_to(low, search.leaves)
    if search.platform == "tpu":  # whose compiler moves bit patterns past the barrier
        held = [_chosen(low >= 0, leaf) for leaf in held]
    return [_join([to_key(held[i]) for i in part]) for part in search.parts]


def _parts(tally: Tally, *, joined: bool) -> list[list[int]]:
    """Which leaves are counted together: alike in cost and axes, or each by itself."""
    if not joined:
        return [[i] for i in range(len(tally.costs))]
    return [
        group[first : first + JOINED]
        for group in tally.kinds().values()
        for first in range(0, len(group), JOINED)
    ]


def _join(keys: list[jax.Array]) -> jax.Array:
    """Many arrays as one, which a GPU's compiler reads where they are."""
    return keys[0] if len(keys) == 1 else jnp.concatenate(keys)


def _count(
    search: Search, key: jax.Array, edges: list[jax.Array], *, least: bool = False
) -> tuple[list[jax.Array], jax.Array]:
    """How many elements lie below each edge; the least that is not below the last.

    The least is the dtype's largest number if there is none, or nobody asks.
    """
    top, some = jnp.iinfo(key.dtype).max, [key < edge for edge in edges]
    # A dtype in which as many elements can be counted.
    wide = jnp.int32 if key.size <= jnp.iinfo(jnp.int32).max else jnp.int64
    if search.platform not in GPUS:
        counts = [jnp.sum(below, dtype=wide).astype(jnp.int64) for below in some]
        found = jnp.min(key, initial=top, where=~some[-1]) if least else top
        return counts, jnp.asarray(found, key.dtype)
    # In one reduction: a GPU ends each reduction with a kernel of its own.
    zero, highest = jnp.zeros([], wide), jnp.array(top, key.dtype)
    each = [below.astype(wide) for below in some]
    above = jnp.where(some[-1], highest, key)
    if key.ndim != 1 and least:  # keys of more axes would be written to memory for it
        return _count(search, key, edges)[0], jnp.min(above, initial=top)
    others = [above] if least else []

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        sums = [x + y for x, y in zip(a[: len(each)], b[: len(each)], strict=True)]
        rest = zip(a[len(each) :], b[len(each) :], strict=True)
        return sums + [jnp.minimum(x, y) for x, y in rest]

    reduced = lax.reduce(
        [*each, *others],
        [zero] * len(each) + [highest] * len(others),
        add,
        tuple(range(key.ndim)),
    )
    counts = [count.astype(jnp.int64) for count in reduced[: len(each)]]
    return counts, reduced[-1] if least else highest


def _chosen(always: jax.Array, leaf: jax.Array) -> jax.Array:
    """The leaf; not for bfloat16, whose subnormal numbers a choice may flush."""
    if leaf.dtype == jnp.bfloat16:
        return leaf
    return jnp.where(always, leaf, jnp.zeros_like(leaf))
