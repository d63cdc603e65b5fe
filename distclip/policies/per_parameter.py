"""A policy for each parameter's own norm, in place of that of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .adopt import as_policy
from .composed import either, on_a_norm, on_norms
from .protocol import Decision, Policy, State
from .statistics import Signal, Statistic, Statistics, Units

PARAMETERS = Statistic("parameter")


@dataclass(frozen=True, slots=True)
class PerParameter:
    """Apply ``policy`` to each parameter by itself: its own norm, its own state, its own coefficient.

    * ``policy``: one that decides on a norm, or a number, which means :class:`MaxNorm`. A policy that skips skips the
      whole step as soon as one parameter makes it.

    State: that of ``policy``, with an entry for each parameter.

    >>> PerParameter(1.0)
    PerParameter(policy=MaxNorm(max_norm=1.0))
    """

    policy: Policy

    def __init__(self, policy: Policy | float) -> None:
        inner = as_policy(policy)
        on_a_norm(inner, "PerParameter")
        object.__setattr__(self, "policy", inner)

    def needs(self) -> Sequence[Statistic | Signal]:
        return (PARAMETERS, *self.policy.needs())

    def init(self, units: Units, device: torch.device) -> State:
        return self.policy.init(units.at(PARAMETERS), device)

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        decision, state = self.policy.decide(statistics.at(PARAMETERS), state)
        decision = on_norms(decision, "PerParameter")
        return replace(decision, per=PARAMETERS, skip=either(decision.skip, None), extra={}), state
