"""Order statistics bit by bit: for any sharding, any platform, any key dtype.

The key of the wanted rank is found from its highest bit down, a few bits with each
read of the arrays: how many keys lie below each candidate says what the bits are.
Nothing but counts crosses devices, so arrays may be sharded on any axis, by ``jit`` or
by hand.
"""

import jax
import jax.numpy as jnp
from jax import lax

from st3jax.keys import key_dtype, score_dtype, to_key
from st3jax.tally import Tally

__all__ = ["neighbours"]


def neighbours(
    leaves: list[jax.Array],
    rank: jax.Array,
    tally: Tally,
    *,
    bits_per_read: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The keys of ranks ``rank`` and ``rank + 1`` (0-based) among all leaves.

    To be called in 64-bit mode.

    Args:
        leaves: Arrays whose magnitudes count; all float64 or none.
        rank: int64 [], at least 0 and less than the size of the tally.
        tally: How the counts of the leaves add up.
        bits_per_read: Bits found with one read, at ``2**bits - 1`` comparisons for each
            element.

    Returns:
        Two scalar keys; at the last rank, the second is the first again.
    """
    integer = key_dtype(score_dtype(leaves[0].dtype))
    bits = jnp.iinfo(integer).bits - 1
    reads = -(-bits // bits_per_read)
    digits = jnp.arange(1, 2**bits_per_read, dtype=integer)

    def counts_below(candidates: jax.Array, turn: jax.Array) -> jax.Array:
        # Tied to the turn, or the keys of all leaves would be computed before the loop
        # and kept: as much memory again as the arrays.
        held, _ = lax.optimization_barrier((leaves, turn))
        return tally.total(
            [
                jnp.stack([count(key < c) for c in candidates])
                for key in map(to_key, held)
            ]
        )

    def find_digit(turn: jax.Array, low: jax.Array) -> jax.Array:
        shift = ((reads - 1 - turn) * bits_per_read).astype(integer)
        # A digit can reach above the highest bit: such candidates are above all keys.
        fits = digits <= jnp.iinfo(integer).max >> shift
        candidates = jnp.where(fits, low | (digits << shift), jnp.iinfo(integer).max)
        below = counts_below(candidates, turn) <= rank
        return low | (jnp.sum(below & fits).astype(integer) << shift)

    # The first digit outside the loop: what the loop carries then varies over the same
    # mesh axes as the keys from its first turn on.
    low = find_digit(jnp.zeros([], jnp.int32), jnp.zeros([], integer))
    low = lax.fori_loop(1, reads, find_digit, low)
    top = jnp.iinfo(integer).max
    above = [jnp.min(k, initial=top, where=k > low) for k in map(to_key, leaves)]
    high = tally.least(above)
    up_to = tally.total([count(to_key(x) <= low) for x in leaves])
    return low, jnp.where((up_to > rank + 1) | (high == top), low, high)


def count(chosen: jax.Array) -> jax.Array:
    """How many elements are true, int32 [] unless that could overflow."""
    few = chosen.size <= jnp.iinfo(jnp.int32).max
    return jnp.sum(chosen, dtype=jnp.int32 if few else jnp.int64)
