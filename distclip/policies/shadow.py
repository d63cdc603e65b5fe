"""Policies beside the one that acts: what they would have done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adopt import as_policy
from .composed import coef_of, either, joined, name_of, part_of
from .protocol import Decision, Policy, State
from .statistics import Signal, Statistic, Statistics, Units

ACTING = "acting"


@dataclass(frozen=True, slots=True)
class Shadow:
    """Do what ``acting`` decides, and report what ``others`` would have, as in ``Shadow(1.0, zclip=ZClip())``.

    ``report.extra["zclip/coef"]``: by what the norm of the model would have been multiplied, 0-d;
    ``report.extra["zclip/skip"]``: whether the step would have been skipped, 1 or 0. The others keep states of their
    own, as if they had acted on the norms that are seen, which are those of the training that ``acting`` makes.

    * ``acting``, ``others``: policies, or numbers, which mean :class:`MaxNorm`.

    State: ``"acting.key"``, and ``"name.key"`` of each of the others.
    """

    acting: Policy
    others: Mapping[str, Policy]

    def __init__(self, acting: Policy | float, **others: Policy | float) -> None:
        if ACTING in others:
            raise ValueError("Shadow has the acting policy first, and the others by names of their own")
        object.__setattr__(self, "acting", as_policy(acting))
        object.__setattr__(self, "others", {name_of(k, "Shadow"): as_policy(each) for k, each in others.items()})

    def needs(self) -> Sequence[Statistic | Signal]:
        return tuple(dict.fromkeys(each for policy in self._all.values() for each in policy.needs()))

    def init(self, units: Units, device: torch.device) -> State:
        return joined({name: policy.init(units, device) for name, policy in self._all.items()})

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        acting, after = self.acting.decide(statistics, part_of(state, ACTING))
        states, extra = {ACTING: after}, dict(acting.extra)
        for name, policy in self.others.items():
            decision, states[name] = policy.decide(statistics, part_of(state, name))
            extra[f"{name}/coef"] = _overall(decision, statistics)
            extra[f"{name}/skip"] = _number(either(decision.skip, None), statistics.norm())
        return replace(acting, extra=extra), joined(states)

    @property
    def _all(self) -> dict[str, Policy]:
        return {ACTING: self.acting, **self.others}


def _overall(decision: Decision, statistics: Statistics) -> Tensor:
    """By what the norm of the model would be multiplied, 0-d."""
    coefs = coef_of(decision, statistics)
    return statistics.shrunk(statistics.units.by_slot(decision.per, coefs)) if coefs.dim() else coefs


def _number(skip: Tensor | bool | None, like: Tensor) -> Tensor:
    return skip.to(like).reshape(()) if isinstance(skip, Tensor) else torch.full_like(like, float(bool(skip)))
