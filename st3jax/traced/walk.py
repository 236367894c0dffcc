"""One walk over a traced computation: what each array is made from, and every use."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex

from st3jax.traced.made import CONSTANT, Value, combined, fitted, parameter, settled
from st3jax.traced.moves import moved, stacked, unstacked
from st3jax.traced.products import PRODUCTS, Use, product_of_parameters, uses_of
from st3jax.trees import named_leaves

__all__ = ["find_uses"]

Walked = tuple[list[Value], list[Use]]
"""What the results are made from, and how parameters were used on the way."""


def find_uses(fn: Callable[..., Any], params: Any, *inputs: Any) -> list[Use]:
    """Every product of an activation with a parameter in a model.

    Args:
        fn: The model, a function of ``params`` and ``inputs``. It is traced, not run.
        params: Pytree of arrays or of abstract arrays.
        *inputs: Example inputs, arrays or abstract arrays.

    Example:
        >>> params = {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}
        >>> x = jax.ShapeDtypeStruct((5, 2), "float32")
        >>> find_uses(lambda params, x: x @ params["kernel"], params, x)
        [Use(path='kernel', axes='io', cost=Fraction(30, 1))]
    """
    leaves = named_leaves(params)
    jaxpr = jax.make_jaxpr(fn)(params, *inputs).jaxpr
    values: list[Value] = [parameter(path, x.shape) for path, x in leaves.items()]
    values += [None] * (len(jaxpr.invars) - len(leaves))
    return _walk(jaxpr, values)[1]


def _walk(jaxpr: jex.Jaxpr, values: list[Value]) -> Walked:
    """What one jaxpr makes of these values."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))

    def value(atom: Any) -> Value:
        return known.get(atom, CONSTANT) if isinstance(atom, jex.Var) else CONSTANT

    uses: list[Use] = []
    for eqn in jaxpr.eqns:
        results, found = _equation(eqn, [value(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
        uses += found
    return [value(atom) for atom in jaxpr.outvars], uses


def _equation(eqn: jex.JaxprEqn, given: list[Value]) -> Walked:
    """What one equation does, with all that is inside it."""
    name, shapes = eqn.primitive.name, _shapes(eqn.outvars)
    if name in CONTROL:
        return CONTROL[name](eqn, given)
    for inside in jex.jaxprs_in_params(eqn.params):
        around = _shapes(eqn.invars), shapes
        if (_shapes(inside.invars), _shapes(inside.outvars)) == around:
            return _walk(inside, given)
    if name in PRODUCTS:
        made = product_of_parameters(name, given, eqn.params, shapes[0])
        return [made], uses_of(eqn, given)
    return moved(name, given, eqn.params, shapes), []


def _shapes(atoms: list[Any]) -> list[tuple[int, ...]]:
    return [getattr(atom.aval, "shape", ()) for atom in atoms]


def _times(uses: list[Use], times: int) -> list[Use]:
    """The same, done several times."""
    return [
        use if use.cost is None else use._replace(cost=use.cost * times) for use in uses
    ]


def _repeat(
    body: jex.Jaxpr, consts: list[Value], carry: list[Value], xs: list[Value]
) -> list[Value]:
    """What a loop carries, once it is made from the same in every turn."""
    while True:
        results, _ = _walk(body, [*consts, *carry, *xs])
        # What is stacked follows the carry.
        after = list(map(settled, carry, results[: len(carry)]))
        if after == carry:
            return carry
        carry = after


def _scan(eqn: jex.JaxprEqn, given: list[Value]) -> Walked:
    first, carried = _sizes_of_scan(eqn.params)
    consts, xs = given[:first], list(map(unstacked, given[first + carried :]))
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    carry = _repeat(body, consts, given[first : first + carried], xs)
    results, uses = _walk(body, [*consts, *carry, *xs])
    ys = [stacked(value, length) for value in results[carried:]]
    return [*carry, *ys], _times(uses, length)


def _sizes_of_scan(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs are the same in every turn, and how many are carried."""
    if "ft_in" in params:  # JAX 0.11 and newer
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _while(eqn: jex.JaxprEqn, given: list[Value]) -> Walked:
    """Nobody knows how often."""
    first, held = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = given[first : first + held], given[first + held :]
    body = eqn.params["body_jaxpr"].jaxpr
    carry = _repeat(body, consts, carry, [])
    _, uses = _walk(body, [*consts, *carry])
    return carry, [use._replace(cost=None) for use in uses]


def _cond(eqn: jex.JaxprEqn, given: list[Value]) -> Walked:
    """The branch that costs most counts; what is used in others costs nothing."""
    branches = eqn.params["branches"]
    walked = [_walk(branch.jaxpr, given[1:]) for branch in branches]
    costs = [sum(use.cost or 0 for use in uses) for _, uses in walked]
    most = costs.index(max(costs))
    uses = [
        use
        for k, (_, found) in enumerate(walked)
        for use in _times(found, int(k == most))
    ]
    together = zip(*(results for results, _ in walked), strict=True)
    return [combined(each) for each in together], uses


def _shard_map(eqn: jex.JaxprEqn, given: list[Value]) -> Walked:
    """Every device does what one does, with its piece of the values."""
    params, body = eqn.params, eqn.params["jaxpr"]
    pieces = list(map(_fitted, given, _shapes(body.invars)))
    results, uses = _walk(body, pieces)
    whole = list(map(_fitted, results, _shapes(eqn.outvars)))
    newer = "newly_manual_axes" in params  # JAX 0.10.1 and newer
    axes = params["newly_manual_axes" if newer else "manual_axes"]
    devices = math.prod(params["mesh"].shape[axis] for axis in axes)
    return whole, _times(uses, devices)


def _fitted(value: Value, shape: tuple[int, ...]) -> Value:
    if value is None:
        return None
    return value._replace(parts=tuple(fitted(part, shape) for part in value.parts))


CONTROL: dict[str, Callable[[jex.JaxprEqn, list[Value]], Walked]] = {
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
"""Equations that do not just do once what is inside them."""
