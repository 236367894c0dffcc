"""Order statistics bit by bit: for any sharding, any platform, any key dtype.

The key of the wanted rank is found from its highest bit down, a few bits with each
read of the arrays: how many keys lie below each candidate says what the bits are.
Nothing but counts crosses devices, so arrays may be sharded on any axis, by ``jit`` or
by hand.

The same counts are written in the way that each platform's compiler turns into one read
of the arrays and few kernels; ``experiments/benchmarks/selection_hlo.py`` shows it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from st3jax.selection.keys import key_dtype, score_dtype, to_key
from st3jax.selection.tally import Tally, tied_to, varies
from st3jax.selection.wide import wide

__all__ = ["neighbours"]

BITS_PER_READ = {"cpu": 1, "gpu": 3, "tpu": 3}
"""On accelerators, several comparisons hide behind one read."""
JOINED = 32
"""So many arrays can be joined before a GPU's compiler writes the result to memory."""


@wide
def neighbours(
    leaves: list[jax.Array],
    rank: jax.Array,
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
        needed: bool [], whether to search at all; a GPU does in any case.
        tally: How the counts of the leaves add up.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``, which decides about speed alone.
        whole: Whether every leaf is one piece of memory on the device that computes.

    Returns:
        Two scalar keys; at the last rank, the second is the first again.
    """
    integer = key_dtype(score_dtype(leaves[0].dtype))
    bits, bits_per_read = jnp.iinfo(integer).bits - 1, BITS_PER_READ[platform]
    reads = -(-bits // bits_per_read)
    digits = jnp.arange(1, 2**bits_per_read, dtype=integer)
    parts = _parts(tally, joined=platform == "gpu" and whole)
    first = [part[0] for part in parts]
    total = Tally(
        tuple(tally.costs[i] for i in first), tuple(tally.axes[i] for i in first)
    )
    count_below = _count_at_once if platform == "gpu" else _count_one_by_one

    def keys(turn: jax.Array) -> list[jax.Array]:
        # Tied to the turn, or the keys of all leaves would be computed before the loop
        # and kept: as much memory again as the arrays.
        held = tied_to(turn, leaves)
        if platform == "tpu":  # whose compiler moves bit patterns past the barrier
            held = [_chosen(turn >= 0, leaf) for leaf in held]
        return [_join([to_key(held[i]) for i in part]) for part in parts]

    def find_digit(turn: jax.Array, low: jax.Array) -> jax.Array:
        shift = (reads - 1 - turn) * bits_per_read
        shift = shift.astype(integer)
        # A digit can reach above the highest bit: such candidates are above all keys.
        fits = digits <= jnp.iinfo(integer).max >> shift
        shifted = digits << jnp.broadcast_to(shift, digits.shape)
        candidates = jnp.where(fits, low | shifted, jnp.iinfo(integer).max)
        counts = [count_below(key, candidates) for key in keys(turn)]
        below = total.total(counts) <= rank
        return low | (jnp.sum(below & fits).astype(integer) << shift)

    start = _varying_as_counts(jnp.zeros([], integer), leaves, tally)
    # On a GPU a number of turns that is not known needs the host, at every turn.
    turns = reads if platform == "gpu" else jnp.where(needed, reads, 0)
    low = lax.fori_loop(0, turns, find_digit, start)
    top = jnp.iinfo(integer).max
    found = keys(low)
    high = total.least([_least_above(key, low) for key in found])
    up_to = total.total([_count_one_by_one(key, [low + 1]) for key in found])
    return low, jnp.where((up_to[0] > rank + 1) | (high == top), low, high)


def _varying_as_counts(
    x: jax.Array, leaves: list[jax.Array], tally: Tally
) -> jax.Array:
    """A number typed to vary over the mesh axes that sums of counts vary over."""
    pairs = zip(leaves, tally.axes, strict=True)
    axes = frozenset().union(*(varies(leaf) - set(own) for leaf, own in pairs))
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


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
    return keys[0] if len(keys) == 1 else jnp.concatenate([key.ravel() for key in keys])


def _enough(key: jax.Array) -> jnp.dtype:
    """A dtype in which as many elements can be counted."""
    few = key.size <= jnp.iinfo(jnp.int32).max
    return jnp.dtype(jnp.int32 if few else jnp.int64)


def _count_one_by_one(key: jax.Array, candidates: Any) -> list[jax.Array]:
    """How many elements lie below each candidate."""
    return [
        jnp.sum(key < candidate, dtype=_enough(key)).astype(jnp.int64)
        for candidate in candidates
    ]


def _count_at_once(key: jax.Array, candidates: Any) -> list[jax.Array]:
    """The same in one reduction: a GPU ends each reduction with a kernel of its own."""
    below = [(key < candidate).astype(_enough(key)) for candidate in candidates]
    none = [jnp.zeros([], _enough(key))] * len(below)

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    counts = lax.reduce(below, none, add, tuple(range(key.ndim)))
    return [count.astype(jnp.int64) for count in counts]


def _least_above(key: jax.Array, low: jax.Array) -> jax.Array:
    """The least element above a bound, the dtype's largest number if there is none."""
    return jnp.min(key, initial=jnp.iinfo(key.dtype).max, where=key > low)


def _chosen(always: jax.Array, leaf: jax.Array) -> jax.Array:
    """The leaf; not for bfloat16, whose subnormal numbers a choice may flush."""
    if leaf.dtype == jnp.bfloat16:
        return leaf
    return jnp.where(always, leaf, jnp.zeros_like(leaf))
