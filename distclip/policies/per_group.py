"""A policy for each of several groups of parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from .adopt import as_policy
from .composed import coef_of, either, joined, name_of, on_a_norm, on_norms, part_of
from .protocol import Decision, Policy, State
from .statistics import Signal, Statistic, Statistics, Units

Patterns: TypeAlias = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class PerGroup:
    """Apply a policy of its own to the norm of each group of parameters.

    * ``groups``: ``{"name": (patterns, policy)}``, where patterns are those of :class:`Statistic`, and a policy is one
      that decides on a norm, a number (:class:`MaxNorm`), or None for a group that is left alone. ValueError, when a
      Clipper is built, for a pattern that matches nothing, and for a parameter in two groups. Parameters in no group
      are left alone too.

    A policy that skips skips the whole step. State: ``"name.key"`` for each key of a group's policy.

    >>> PerGroup({"matrices": ("*.weight", 1.0), "rest": (("*.bias", "*norm*"), None)}).groups["matrices"]
    ('*.weight', MaxNorm(max_norm=1.0))
    """

    groups: Mapping[str, tuple[Patterns, Policy | None]]

    def __init__(self, groups: Mapping[str, tuple[Patterns, Policy | float | None]]) -> None:
        found = {}
        for name, (patterns, given) in groups.items():
            policy = None if given is None else as_policy(given)
            if policy is not None:
                on_a_norm(policy, "PerGroup")
            found[name_of(name, "PerGroup")] = patterns, policy
        object.__setattr__(self, "groups", found)
        if not found:
            raise ValueError("PerGroup needs at least one group: {'name': (patterns, policy)}")

    def needs(self) -> Sequence[Statistic | Signal]:
        return (self._level, *(each for _, policy in self._members for each in policy.needs()))

    def init(self, units: Units, device: torch.device) -> State:
        units.must_not_overlap(self._level)
        return joined(
            {
                name: policy.init(units.at(self._level, k), device)
                for k, (name, (_, policy)) in enumerate(self.groups.items())
                if policy is not None
            }
        )

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        coefs: list[Tensor] = []
        skip: Tensor | bool | None = None
        states: dict[str, State] = {}
        extra: dict[str, Tensor] = {}
        for k, (name, (_, policy)) in enumerate(self.groups.items()):
            own = statistics.at(self._level, k)
            if policy is None:
                coefs.append(torch.ones_like(own.norm()))
                continue
            decision, states[name] = policy.decide(own, part_of(state, name))
            coefs.append(coef_of(on_norms(decision, "PerGroup"), own))
            skip = either(skip, decision.skip)
            extra |= {f"{name}/{key}": number for key, number in decision.extra.items()}
        return Decision(inf, skip, coef=torch.stack(coefs), per=self._level, extra=extra), joined(states)

    @property
    def _level(self) -> Statistic:
        return Statistic("group", groups={name: patterns for name, (patterns, _) in self.groups.items()})

    @property
    def _members(self) -> list[tuple[str, Policy]]:
        return [(name, policy) for name, (_, policy) in self.groups.items() if policy is not None]
