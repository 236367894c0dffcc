"""Rules: which weights go first, made from the arguments that methods share."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from st3jax.checks import as_mapping, check_choice, check_fraction, is_concrete
from st3jax.layout.letters import Layouts
from st3jax.rule.costs import Costs, check_costs, largest_share
from st3jax.rule.distributions import DISTRIBUTIONS, by_path
from st3jax.rule.patterns import (
    ANY,
    Pattern,
    check_pattern_fits,
    final_sparsity,
    parse_pattern,
)
from st3jax.rule.scores import CRITERIA
from st3jax.schedules import LAST_STEP, Sparsity, at_step
from st3jax.selection.tally import AxisName
from st3jax.trees import named_leaves

__all__ = [
    "CLOSE",
    "Rule",
    "check_final_sparsity",
    "check_fits",
    "check_schedules",
    "make_rule",
]

CLOSE = 1e-6
"""A sparsity so near to that of a pattern is meant to be it."""


class Rule(NamedTuple):
    """Which weights go first, whatever their number.

    Attributes:
        criterion: How weights of different layers are compared.
        distribution: Over what they are compared, all layers or one.
        costs: What one weight of each leaf counts for; 1 if ``None``.
        pattern: Which weights go together.
        axis_name: Axes of ``shard_map`` that the weights are sharded over.
    """

    criterion: str = "l1"
    distribution: str = "global"
    costs: Costs | None = None
    pattern: Pattern = ANY
    axis_name: AxisName = None

    def of_each(self, sparsity: Any) -> bool:
        """Whether every kernel has a sparsity of its own."""
        return self.distribution != "global" or isinstance(sparsity, Mapping)

    def needs(self, sparsity: Any) -> dict[str, str]:
        """What depends on layouts, and how far; see :func:`st3jax.layout.settle`."""
        needs = {}
        if self.pattern.kind != "any":
            flat = len(self.pattern.numbers) <= 2  # no side lies in the window
            groups = self.pattern.kind == "groups"
            how = "groups" if groups else "matrix" if flat else "axes"
            needs[str(self.pattern)] = how
        if self.criterion == "l1_sigma":
            needs["criterion 'l1_sigma'"] = "axes"
        if self.distribution == "erk":
            needs["distribution 'erk'"] = "axes"
        if self.of_each(sparsity):
            needs["the sparsity of each kernel"] = "kernels"
        return needs


def make_rule(
    *,
    criterion: str,
    distribution: str,
    costs: Costs | None,
    pattern: str | tuple[int, ...] | None,
    axis_name: AxisName = None,
) -> Rule:
    """The rule that the arguments of a method ask for.

    Raises:
        ValueError: If an argument is not one of its choices, or two exclude each other.
        TypeError: If ``costs`` is not a mapping.
    """
    check_choice(criterion, "criterion", CRITERIA)
    check_choice(distribution, "distribution", DISTRIBUTIONS)
    parsed = parse_pattern(pattern)
    if costs is not None:
        mapping = as_mapping(costs)
        if mapping is None:
            raise TypeError(
                "costs is a mapping from the path of a leaf to the multiply-adds of "
                "one of its weights, such as {'Dense_0/kernel': 1}, got "
                f"{type(costs).__name__}"
            )
        costs = mapping
        if distribution != "global":
            raise ValueError(
                f"costs need distribution 'global', got {distribution!r}: a layer with "
                "a sparsity of its own saves that share of its multiply-adds anyway"
            )
    if axis_name is not None and (criterion == "l1_sigma" or distribution == "erk"):
        raise ValueError(
            f"criterion {criterion!r} and distribution {distribution!r} depend on the "
            "whole shapes of leaves, which shards do not show: with axis_name use "
            "'l1', or leave the sharding to jit, without axis_name"
        )
    if parsed.kind == "groups" and (distribution != "global" or costs is not None):
        raise ValueError(
            f"pattern {pattern!r} says itself how many weights of each layer go: leave "
            "out distribution and costs"
        )
    return Rule(criterion, distribution, costs, parsed, axis_name)


def check_final_sparsity(rule: Rule, sparsity: Any) -> None:
    """Raises unless a sparsity is one that the rule can end at.

    Args:
        rule: The rule.
        sparsity: A fraction, or one for each path.

    Raises:
        ValueError: If a fraction is not in [0, 1] or not the one of an N:M pattern.
        TypeError: If one is not a number.

    Example:
        >>> check_final_sparsity(Rule(pattern=parse_pattern("2:4")), 0.9)
        Traceback (most recent call last):
        ValueError: pattern '2:4' ends at a sparsity of 0.5, got 0.9
    """
    if isinstance(sparsity, Mapping):
        if (
            rule.distribution == "uniform"
            or rule.costs
            or rule.pattern.kind == "groups"
        ):
            raise ValueError(
                "a sparsity for each path is a distribution of its own: leave out "
                "distribution 'uniform', costs and an N:M pattern"
            )
        for path, one in sparsity.items():
            check_fraction(one, f"sparsity of {path!r}")
        return
    check_fraction(sparsity, "sparsity")
    wanted = final_sparsity(rule.pattern)
    if wanted is None or not is_concrete(sparsity):
        return
    if abs(float(sparsity) - wanted) > CLOSE:
        keep, of = rule.pattern.numbers
        raise ValueError(
            f"pattern '{keep}:{of}' ends at a sparsity of {wanted:g}, got "
            f"{float(sparsity):g}"
        )


def check_schedules(rule: Rule, sparsity: Sparsity, freeze_step: int | None) -> None:
    """Raises unless a rule can follow this sparsity, and reach its end to be fixed.

    Args:
        rule: The rule.
        sparsity: A fraction, a schedule, or one of them for each path.
        freeze_step: Completed steps at which the mask is fixed, if it is.

    Raises:
        ValueError: If a fraction is not in [0, 1] or not the one of an N:M pattern, or
            if it still grows after ``freeze_step``.
        TypeError: If one is not a number.
    """
    named = sparsity if isinstance(sparsity, Mapping) else {None: sparsity}
    with jax.ensure_compile_time_eval():
        for path, one in named.items():
            name = "sparsity" if path is None else f"sparsity of {path!r}"
            if callable(one):
                _check_schedule(one, name, freeze_step)
            else:
                check_fraction(one, name)
        final = at_step(sparsity, jnp.array(LAST_STEP))
    check_final_sparsity(rule, final)


def _check_schedule(sparsity: Any, name: str, freeze_step: int | None) -> None:
    final = sparsity(jnp.array(LAST_STEP))
    check_fraction(sparsity(jnp.array(0)), f"the {name} schedule at step 0")
    check_fraction(final, f"the final value of the {name} schedule")
    if freeze_step is None or not is_concrete(final):
        return
    then = sparsity(jnp.array(freeze_step))
    if then < final:
        raise ValueError(
            f"freeze_step {freeze_step} comes before the ramp is over: the {name} is "
            f"{float(then):g} then and {float(final):g} at the end"
        )


def check_fits(
    rule: Rule, leaves: dict[str, Any], layouts: Layouts, params: Any, sparsity: Any
) -> None:
    """Raises unless the rule and the sparsity it ends at can be met by these weights.

    Args:
        rule: The rule.
        leaves: The prunable leaves by path, arrays or abstract arrays.
        layouts: From path to a letter for each axis.
        params: Pytree of all parameters.
        sparsity: A fraction, a schedule, or one of them for each path.

    Raises:
        ValueError: If a pattern or the costs do not fit, if a path matches nothing, or
            if the prunable leaves cost less than asked for.
    """
    check_pattern_fits(rule.pattern, leaves, layouts)
    _check_stacks(rule, layouts, sparsity)
    if isinstance(sparsity, Mapping):
        by_path(sparsity, list(leaves))
    if rule.costs is None:
        return
    check_costs(rule.costs, leaves, params)
    most = largest_share(rule.costs, leaves, named_leaves(params), rule.axis_name)
    with jax.ensure_compile_time_eval():
        final = at_step(sparsity, jnp.array(LAST_STEP))
    if is_concrete(final) and float(final) > most:
        raise ValueError(
            f"a share of {float(final):g} of the multiply-adds cannot be removed: "
            f"the prunable leaves take part in {most:.3g} of them"
        )


def _check_stacks(rule: Rule, layouts: Layouts, sparsity: Any) -> None:
    """Raises where stacked kernels may lie on several devices, each with thresholds."""
    stacked = next((path for path, letters in layouts.items() if "s" in letters), None)
    if rule.axis_name is not None and rule.of_each(sparsity) and stacked is not None:
        raise ValueError(
            f"'{stacked}' holds stacked kernels, each with a threshold of its own, and "
            f"its axes may be sharded over {rule.axis_name!r} by hand: leave the "
            "sharding to jit, without axis_name, or use distribution 'global'"
        )
