"""Policies beside the one that acts: what they would have done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import refusals
from .adopt import as_policy, made
from .answer import ask
from .composed import Skip, any_of, asked_of, checked_name, clamps, joined, needs_of, part_of
from .protocol import Decision, Policy, State
from .statistic import Signal, Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units

ACTING = "acting"


@trusted
@dataclass(frozen=True, slots=True)
class Shadow:
    """Do what ``acting`` decides, and report what ``others`` would have, as in ``Shadow(1.0, zclip=ZClip())``.

    ``report.extra["zclip/coef"]``: the factor that the norm of the model would have had, 0-d;
    ``report.extra["zclip/skip"]``: whether the step would have been skipped, 1 or 0. The others keep states of their
    own, as if they had acted on the norms that are seen, which are those of the training that ``acting`` makes. What
    they report of themselves is ``"zclip/name"``. What ``acting`` reports keeps its name, or is ``"acting/name"`` where
    one of the others has that.

    * ``acting``, ``others``: policies, or numbers, which mean :class:`MaxNorm`.

    State: ``"acting.key"``, and ``"name.key"`` of each of the others.
    """

    acting: Policy
    others: Mapping[str, Policy]

    def __init__(self, acting: Policy | float, /, **others: Policy | float) -> None:
        if ACTING in others:
            raise ValueError("Shadow takes the acting policy first, and others by names that are not 'acting'")
        if "norm" in others:
            raise ValueError("Shadow reports 'norm/coef', the name of a norm that is watched: take another than 'norm'")
        found = {checked_name(name, "Shadow"): as_policy(each) for name, each in others.items()}
        for policy in found.values():
            if clamps(policy):
                raise refusals.clamps_in_shadow(policy)
        object.__setattr__(self, "acting", as_policy(acting))
        object.__setattr__(self, "others", found)

    @property
    def inner(self) -> Mapping[str, Policy]:
        return {ACTING: self.acting, **self.others}

    @property
    def clamps(self) -> bool:
        return clamps(self.acting)

    def needs(self) -> Sequence[Statistic | Signal]:
        return needs_of(self.inner.values())

    def init(self, units: Units, device: torch.device) -> State:
        return joined({name: made(policy, units, device) for name, policy in self.inner.items()})

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        states, extra = dict[str, State](), dict[str, Tensor]()
        for name, policy in self.others.items():
            inner, states[name] = asked_of(policy, statistics, part_of(state, name))
            if inner.decision.bounds is not None:
                raise refusals.clamps_in_shadow(policy)
            by_slot = statistics.units.by_slot(inner.per, inner.coefs(statistics))
            own = {**inner.decision.extra, "coef": statistics.shrunk(by_slot), "skip": _number(inner.skip, by_slot)}
            extra |= {f"{name}/{key}": number for key, number in own.items()}
        acting, states[ACTING] = ask(self.acting, statistics, part_of(state, ACTING))
        own = {f"{ACTING}/{name}" if name in extra else name: number for name, number in acting.extra.items()}
        return replace(acting, extra=own | extra), joined(states)


def _number(skip: Skip, like: Tensor) -> Tensor:
    """Whether it skips, 0-d: 1 or 0."""
    skip = any_of([skip])
    return skip.to(like) if isinstance(skip, Tensor) else like.new_full((), float(skip is True))
