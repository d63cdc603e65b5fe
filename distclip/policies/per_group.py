"""A policy for each of several groups of parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from . import refusals
from .adopt import made
from .composed import Inner, any_of, asked_of, checked_name, if_finite, joined, kept, needs_of, on_a_norm, part_of
from .protocol import Decision, Policy, State
from .statistic import MODEL, Signal, Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units

Patterns: TypeAlias = str | Sequence[str]


@trusted
@dataclass(frozen=True, slots=True)
class PerGroup:
    """Apply a policy of its own to the norm of each group of parameters.

    * ``groups``: ``{"name": (patterns, policy)}``, where patterns are those of :class:`Statistic`, and a policy is one
      that decides on a norm, a number (:class:`MaxNorm`), or None for a group that is left alone. ValueError, when a
      Clipper is built, for a group that matches nothing, and for a parameter in two groups. Parameters in no group are
      left alone too.

    If one policy skips, the whole step is skipped and those of other groups keep the states that they had; in a step
    whose norm is not finite all keep them. State: ``"name.key"`` for each key of a group's policy; what it reports is
    ``"name/key"``.

    >>> PerGroup({"matrices": ("*.weight", 1.0), "rest": (("*.bias", "*norm*"), None)}).groups["matrices"]
    (('*.weight',), MaxNorm(max_norm=1.0))
    """

    groups: Mapping[str, tuple[tuple[str, ...], Policy | None]]

    def __init__(self, groups: Mapping[str, tuple[Patterns, Policy | float | None]]) -> None:
        pairs = groups.items() if isinstance(groups, Mapping) else ()
        if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for _, pair in pairs):
            raise refusals.no_groups(groups)
        patterns = dict(Statistic("group", groups={checked_name(k, "PerGroup"): each for k, (each, _) in pairs}).named)
        policies = {name: None if given is None else on_a_norm(given, "PerGroup") for name, (_, given) in pairs}
        object.__setattr__(self, "groups", {name: (patterns[name], policy) for name, policy in policies.items()})

    @property
    def inner(self) -> Mapping[str, Policy]:
        return {name: policy for name, (_, policy) in self.groups.items() if policy is not None}

    def needs(self) -> Sequence[Statistic | Signal]:
        return (self._level, *needs_of(self.inner.values()))

    def init(self, units: Units, device: torch.device) -> State:
        level = self._level
        units.must_not_overlap(level)
        places = {name: units.at(level, k) for k, name in enumerate(self.groups)}
        return joined({name: made(policy, places[name], device) for name, policy in self.inner.items()})

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        level, found, states, extra = self._level, dict[str, Inner](), dict[str, State](), dict[str, Tensor]()
        coefs: list[Tensor] = []
        for k, (name, (_, policy)) in enumerate(self.groups.items()):
            own = statistics.at(level, k)
            if policy is None:
                coefs.append(torch.ones_like(own.norm()))
                continue
            inner, states[name] = asked_of(policy, own, part_of(state, name))
            if inner.decision.bounds is not None:
                raise refusals.clamps_inside(policy, "PerGroup")
            if inner.per != MODEL:
                raise refusals.by_unit_inside(policy, "PerGroup", inner.per)
            found[name] = inner
            coefs.append(inner.coefs(own))
            extra |= {f"{name}/{key}": number for key, number in inner.decision.extra.items()}
        skip = any_of(each.skip for each in found.values())
        after = {name: kept(part_of(state, name), states[name], skip, each.skip) for name, each in found.items()}
        decision = Decision(inf, skip, coef=torch.stack(coefs), per=level, extra=extra)
        return decision, if_finite(state, joined(after), statistics)

    @property
    def _level(self) -> Statistic:
        return Statistic("group", groups={name: patterns for name, (patterns, _) in self.groups.items()})
