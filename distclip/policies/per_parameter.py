"""A policy for each parameter's own norm, in place of that of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from . import refusals
from .adopt import made
from .answer import ask, level_of
from .composed import any_of, if_finite, kept, needs_of, on_a_norm, skip_of
from .protocol import Decision, Policy, State
from .statistic import PARAMETERS, Signal, Statistic
from .statistics import Statistics
from .trust import is_trusted, trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class PerParameter:
    """Apply ``policy`` to each parameter by itself: its own norm, its own state, its own coefficient.

    * ``policy``: one that decides on a norm, or a number, which means :class:`MaxNorm`. If it skips for
      one parameter the whole step is skipped, and the others keep the states that they had. A step whose norm is not
      finite leaves nothing in the state of any.

    State: that of ``policy``, with an entry for each parameter. What it reports of single parameters is left out.

    >>> PerParameter(1.0)
    PerParameter(policy=MaxNorm(max_norm=1.0))
    """

    policy: Policy

    def __init__(self, policy: Policy | float) -> None:
        object.__setattr__(self, "policy", on_a_norm(policy, "PerParameter"))

    @property
    def inner(self) -> Mapping[str, Policy]:
        return {"": self.policy}

    def needs(self) -> Sequence[Statistic | Signal]:
        return (PARAMETERS, *needs_of([self.policy]))

    def init(self, units: Units, device: torch.device) -> State:
        return made(self.policy, units.at(PARAMETERS), device)

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        own = statistics.at(PARAMETERS)
        decision, after = ask(self.policy, own if is_trusted(self.policy) else own.copy(), state)
        if decision.bounds is not None:
            raise refusals.clamps_inside(self.policy, "PerParameter")
        if level_of(decision.per, self.policy, own.units) != PARAMETERS:
            raise refusals.by_unit_inside(self.policy, "PerParameter", decision.per)
        skips = skip_of(decision, self.policy, own)
        skip, extra = any_of([skips]), {name: each for name, each in decision.extra.items() if not each.dim()}
        after = if_finite(state, kept(state, after, skip, skips), statistics)
        return replace(decision, per=PARAMETERS, skip=skip, extra=extra), after
