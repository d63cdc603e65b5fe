"""What policies that wrap others have in common: inner decisions as coefficients, inner states under one roof.

What an inner policy answers is held to the rules of any answer. Where the host knows a number that breaks them, the
error names the inner policy; on an accelerator the number becomes NaN, which the wrapper's own decision is refused for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import inf, nan
from operator import or_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import refusals
from .adaptive import LEAST, number
from .adopt import as_policy, needs
from .answer import ask, bad_units, level_of, on
from .protocol import Decision, Number, Policy, State
from .statistic import MODEL, Signal, Statistic
from .statistics import Statistics
from .trust import is_trusted
from .value_clip import ValueClip

Skip: TypeAlias = Tensor | bool | None
"""Whether to skip, bool: 0-d, or (units,) inside :class:`PerParameter`; None for a policy that does not."""


# ---- at construction ----------------------------------------------------------------------------------------


def on_a_norm(given: Policy | float, wrapper: str) -> Policy:
    """The policy that is ``given``; ValueError unless it decides on one norm, and so can on another in its place."""
    policy = as_policy(given)
    if clamps(policy):
        raise refusals.clamps_inside(policy, wrapper)
    for each in needs(policy):
        if isinstance(each, Statistic):
            raise refusals.finer_inside(policy, wrapper, each)
    return policy


def clamps(policy: Policy) -> bool:
    """Whether it is known to clamp elements, so that nothing can come after it."""
    return isinstance(policy, ValueClip) or bool(getattr(policy, "clamps", False))


def needs_of(policies: Iterable[Policy]) -> tuple[Statistic | Signal, ...]:
    """What all of them need, each once."""
    return tuple(dict.fromkeys(each for policy in policies for each in needs(policy)))


def checked_name(name: Any, wrapper: str) -> str:
    """``name``; ValueError for one that cannot be told from its part in a checkpoint."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"{wrapper} needs names without dots, got {name!r}")
    return name


# ---- in a step ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inner:
    """What an inner policy decides.

    * ``per``: what it bounds, MODEL for the whole. ``max_norm``, ``coef``: as in a :class:`Decision`, numbers of the
      host or float64 where the statistics are.
    """

    decision: Decision
    per: Statistic
    max_norm: Number
    coef: Number | None
    skip: Skip

    @property
    def of(self) -> Statistic | None:
        """Whose norms it bounds, as :meth:`Statistics.norm` takes it."""
        return None if self.per == MODEL else self.per

    @property
    def scales(self) -> bool:
        """Whether it may: not where the host knows that nothing is bounded."""
        return self.coef is not None or isinstance(self.max_norm, Tensor) or self.max_norm < inf

    def coefs(self, statistics: Statistics) -> Tensor:
        """By what it multiplies each unit: float64, 0-d or (units,). No host sync.

        Torch's formula where it names a bound, and no coefficient; above 0 for any finite norm.
        """
        norm, bound = statistics.norm(self.of), self.max_norm
        if self.coef is not None:
            return self.coef if isinstance(self.coef, Tensor) else torch.full_like(norm, self.coef)
        if not self.scales:
            return torch.ones_like(norm)
        if not isinstance(bound, Tensor):
            return (number(bound) / (norm + 1e-6)).clamp_(LEAST, 1.0)
        return (bound / (norm + 1e-6)).clamp_(LEAST, 1.0).masked_fill_(bound == inf, 1.0)


def asked_of(policy: Policy, statistics: Statistics, state: State) -> tuple[Inner, State]:
    """What ``policy`` decides inside another, and its state after that; ValueError as for any policy."""
    known, norm, units = is_trusted(policy), statistics.norm(), statistics.units
    decision, after = ask(policy, statistics if known else statistics.copy(), state)
    per, coef = level_of(decision.per, policy, units), decision.coef
    shape = norm.shape if per is units.bounded else units.shape(per)

    def read(value: Any, field: str) -> Number:
        return value if known and isinstance(value, float) else on(value, field, policy, norm.device, shape)

    bound, coef = read(decision.max_norm, "max_norm"), None if coef is None else read(coef, "coef")
    inner = Inner(decision, per, bound, coef, skip_of(decision, policy, statistics))
    return inner if known else _by_the_rules(inner, policy, statistics), after


def skip_of(decision: Decision, policy: Policy, statistics: Statistics) -> Skip:
    """Whether it skips; ValueError for what is no such answer."""
    if decision.skip is None or isinstance(decision.skip, bool):
        return decision.skip or None
    norm = statistics.norm()
    return on(decision.skip, "skip", policy, norm.device, norm.shape) != 0


def _by_the_rules(inner: Inner, policy: Policy, statistics: Statistics) -> Inner:
    """``inner``, whose coefficients are NaN where they break the rules; ValueError where the host knows that.

    Where the model's norm is not finite none does: who skips such steps looks at no coefficient.
    """
    norm, units = statistics.norm(inner.of), statistics.units
    coefs = inner.coefs(statistics).clone()
    for field, numbers, bad in bad_units(inner.max_norm, inner.coef):
        if norm.device.type != "cpu" or not bool(statistics.norm("model").isfinite()):
            coefs.masked_fill_(bad, nan)
            continue
        skips = any_of([inner.skip])
        for unit in () if skips is not None and bool(skips) else bad.logical_and_(norm.isfinite()).view(-1).nonzero():
            raise refusals.refusal(field, policy, numbers.view(-1)[unit].item(), where=units.where(int(unit), inner.of))
    return replace(inner, coef=coefs)


def any_of(skips: Iterable[Skip]) -> Skip:
    """Whether one of them skips, which of several units is whether one of them does; None if none ever does."""
    found = [skip.any() if isinstance(skip, Tensor) and skip.dim() else skip for skip in skips if skip is not None]
    tensors = [skip for skip in found if isinstance(skip, Tensor)]
    return True if len(tensors) < len(found) else reduce(or_, tensors) if tensors else None


def kept(before: State, after: State, skip: Skip, own: Skip) -> State:
    """The state of a policy after a step, which is skipped where ``skip``: as before, unless it skips it itself.

    So a step that another policy skips leaves nothing in its state. ``own``: its own skip, and where that is (units,)
    each unit's decides on what the state has of it.
    """
    if skip is None or own is True:
        return after
    if skip is True and own is None:
        return before
    others = skip if own is None else ~own & skip
    return {name: _where(others, before[name], value) for name, value in after.items()}


def if_finite(before: State, after: State, statistics: Statistics) -> State:
    """``after``, or ``before`` in a step whose norm is not finite, though that of some units may be."""
    if not after:
        return after
    finite = statistics.norm(MODEL).isfinite()
    return {name: torch.where(finite, value, before[name]) for name, value in after.items()}


def _where(skip: Any, before: Tensor, after: Tensor) -> Tensor:
    """``before`` where ``skip``, 0-d or for each entry of the first dimension; what is of no unit is ``after``."""
    if not skip.dim():
        return torch.where(skip, before, after)
    if not after.dim() or len(after) != len(skip):
        return after
    return torch.where(skip.view(-1, *[1] * (after.dim() - 1)), before, after)


# ---- states -------------------------------------------------------------------------------------------------


def joined(states: Mapping[str, State]) -> State:
    """The states of inner policies as one: ``{"inner.name": ...}``."""
    return {f"{inner}.{name}": value for inner, state in states.items() for name, value in state.items()}


def part_of(state: State, inner: str) -> State:
    """That of one inner policy."""
    start = f"{inner}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
