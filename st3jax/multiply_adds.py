"""Multiply-adds of any model, counted in its traced computation.

Every convolution and matrix product of an activation with a kernel is found in the
jaxpr, whatever layers it was written with, and attributed to the parameter that the
kernel was made from.
"""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from st3jax.trees import named_leaves

__all__ = ["multiply_adds"]

Origin = frozenset[str] | None
"""The paths of the parameters that an array is made from; None if the input is, too."""


def multiply_adds(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, int]:
    """How many multiply-adds one weight of each parameter takes part in.

    A layer with ``m`` of them per weight and ``k`` weights that are not zero costs
    ``m * k`` multiply-adds. For a dense layer, ``m`` is the number of rows that it is
    applied to; for a convolution, the number of output positions, those at a padded
    border included. Products of activations with one another (as in attention), of
    parameters with one another, and elementwise products are not counted.

    Args:
        fn: The model, a function of ``params`` and ``inputs``. It is traced, not run.
        params: Pytree of arrays or of abstract arrays (``jax.ShapeDtypeStruct``).
        *inputs: Example inputs, arrays or abstract arrays. Counts are for all examples
            in them: pass one for the cost of one.

    Returns:
        From path to count, for every parameter that is multiplied with an activation.
        It fits ``costs`` of :func:`st3jax.st3` and :func:`st3jax.prune`.

    Raises:
        ValueError: If a parameter is used in a loop whose number of turns depends on
            data, since it has no fixed cost.

    Example:
        >>> params = {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 8), "float32")}
        >>> images = jax.ShapeDtypeStruct((1, 32, 32, 4), "float32")
        >>> def model(params, images):
        ...     return jax.lax.conv_general_dilated(
        ...         images, params["kernel"], window_strides=(2, 2), padding="SAME",
        ...         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        >>> multiply_adds(model, params, images)
        {'kernel': 256}
    """
    sizes = {path: leaf.size for path, leaf in named_leaves(params).items()}
    jaxpr = jax.make_jaxpr(fn)(params, *inputs).jaxpr
    origins: list[Origin] = [frozenset({path}) for path in sizes]
    origins += [None] * (len(jaxpr.invars) - len(sizes))
    ledger = Ledger(sizes, collections.Counter())
    _walk(jaxpr, origins, ledger, times=1)
    totals = ledger.totals
    return {path: totals[path] // size for path, size in sizes.items() if totals[path]}


class Ledger(NamedTuple):
    """What has been counted so far.

    Attributes:
        sizes: Elements of each parameter.
        totals: Multiply-adds that each parameter takes part in.
    """

    sizes: dict[str, int]
    totals: collections.Counter[str]


def _walk(
    jaxpr: jex.Jaxpr, origins: list[Origin], ledger: Ledger, times: int
) -> list[Origin]:
    """Counts what one jaxpr does, ``times`` over, and says what its results are of."""
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(atom: Any) -> Origin:
        return (
            known.get(atom, frozenset()) if isinstance(atom, jex.Var) else frozenset()
        )

    for eqn in jaxpr.eqns:
        given = [origin(atom) for atom in eqn.invars]
        results = _walk_inside(eqn, given, ledger, times)
        if results is None:
            _count(eqn, given, ledger, times)
            results = [_join(given)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [origin(atom) for atom in jaxpr.outvars]


def _join(origins: list[Origin]) -> Origin:
    """What an array made from arrays of these origins is made from."""
    known = [one for one in origins if one is not None]
    return frozenset().union(*known) if len(known) == len(origins) else None


def _walk_inside(
    eqn: jex.JaxprEqn, given: list[Origin], ledger: Ledger, times: int
) -> list[Origin] | None:
    """The same for an equation that holds jaxprs; None for one that does not."""
    if eqn.primitive.name == "scan":
        return _scan(eqn, given, ledger, times)
    if eqn.primitive.name == "while":
        return _while(eqn, given, ledger)
    if eqn.primitive.name == "cond":
        return _cond(eqn, given[1:], ledger, times)
    for sub in jex.jaxprs_in_params(eqn.params):
        if len(sub.invars) == len(given) and len(sub.outvars) == len(eqn.outvars):
            return _walk(sub, given, ledger, times)
    return None


def _repeat(
    body: jex.Jaxpr, consts: list[Origin], carry: list[Origin], xs: list[Origin]
) -> list[Origin]:
    """What a loop carries, once it is made from the same in every turn."""
    nowhere = Ledger(collections.defaultdict(int), collections.Counter())
    while True:
        results = _walk(body, [*consts, *carry, *xs], nowhere, times=1)
        pairs = zip(carry, results, strict=False)  # what is stacked follows the carry
        after = [_join([before, result]) for before, result in pairs]
        if after == carry:
            return carry
        carry = after


def _scan(
    eqn: jex.JaxprEqn, given: list[Origin], ledger: Ledger, times: int
) -> list[Origin]:
    first, carried = _sizes_of_scan(eqn.params)
    consts, xs = given[:first], given[first + carried :]
    body = eqn.params["jaxpr"].jaxpr
    carry = _repeat(body, consts, given[first : first + carried], xs)
    length = eqn.params["length"]
    return _walk(body, [*consts, *carry, *xs], ledger, times * length)


def _sizes_of_scan(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs are the same in every turn, and how many are carried."""
    if "ft_in" in params:  # JAX 0.11 and newer
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _while(eqn: jex.JaxprEqn, given: list[Origin], ledger: Ledger) -> list[Origin]:
    first, held = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = given[first : first + held], given[first + held :]
    body = eqn.params["body_jaxpr"].jaxpr
    carry = _repeat(body, consts, carry, [])
    used = Ledger(ledger.sizes, collections.Counter())
    _walk(body, [*consts, *carry], used, times=1)
    if used.totals:
        raise ValueError(
            f"parameter '{min(used.totals)}' is used in a loop whose number of turns "
            "depends on data, so its multiply-adds cannot be counted"
        )
    return carry


def _cond(
    eqn: jex.JaxprEqn, given: list[Origin], ledger: Ledger, times: int
) -> list[Origin]:
    """The branch that costs most counts."""
    results: list[list[Origin]] = []
    counts: list[collections.Counter[str]] = []
    for branch in eqn.params["branches"]:
        alone = Ledger(ledger.sizes, collections.Counter())
        results.append(_walk(branch.jaxpr, given, alone, times))
        counts.append(alone.totals)
    ledger.totals.update(max(counts, key=lambda count: sum(count.values())))
    return [_join(list(each)) for each in zip(*results, strict=True)]


def _count(eqn: jex.JaxprEqn, given: list[Origin], ledger: Ledger, times: int) -> None:
    """Adds what a product of an activation with a kernel costs to the kernel."""
    product = PRODUCTS.get(eqn.primitive.name)
    kernels = [one for one in given[:2] if one]
    if product is None or given[:2].count(None) != 1 or not kernels:
        return
    # A kernel may have been scaled by smaller parameters: the largest is the kernel.
    path = max(sorted(kernels[0]), key=ledger.sizes.__getitem__)
    left, right = (atom.aval for atom in eqn.invars[:2])
    ledger.totals[path] += times * product(left, right, eqn.outvars[0].aval, eqn.params)


def _dot_general(left: Any, right: Any, out: Any, params: dict[str, Any]) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return out.size * math.prod(left.shape[axis] for axis in contracted)


def _convolution(images: Any, kernel: Any, out: Any, params: dict[str, Any]) -> int:
    out_axis, in_axis, *_ = params["dimension_numbers"].rhs_spec
    if math.prod(params["lhs_dilation"]) == 1:
        return out.size * kernel.size // kernel.shape[out_axis]
    # Transposed: every input meets the kernel once, the zeros put between them do not.
    groups = params["feature_group_count"]
    return images.size * kernel.size // (kernel.shape[in_axis] * groups)


PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
"""The multiply-adds of the equations that multiply an activation with a kernel."""
