"""Several policies, one after the other, on one measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from . import refusals
from .adaptive import LEAST, MOST
from .adopt import as_policy, made
from .answer import ask
from .composed import Inner, any_of, asked_of, clamps, joined, kept, needs_of, part_of
from .protocol import Decision, Number, Policy, State
from .statistic import LEVELS, MODEL, PARAMETERS, Signal, Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class Chain:
    """Apply each of ``policies`` to gradients as those before it leave them: ``Chain(AdaGC(), MaxNorm(1.0))``.

    Norms scale linearly, so each sees the reduced statistics times the coefficients before it: no second pass over
    gradients, and no second all-reduce. The step is skipped if one of them skips it; the others then keep the states
    that they had. One that clamps elements (:class:`ValueClip`) must be the last. With a policy that decides by group
    the norms of all parameters travel, by which it is combined with the others.

    * ``policies``: or numbers, which mean :class:`MaxNorm`.

    State: ``"0.key"``, ``"1.key"``, ... by the place of each. What they report keeps its name; a name that one before
    it has used gets the place in front: ``"1/name"``.

    >>> Chain(2.0, 1.0).policies
    (MaxNorm(max_norm=2.0), MaxNorm(max_norm=1.0))
    """

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy | float) -> None:
        if not policies:
            raise ValueError("Chain needs at least one policy")
        object.__setattr__(self, "policies", tuple(map(as_policy, policies)))
        for policy in self.policies[:-1]:
            if clamps(policy):
                raise refusals.clamps_before(policy)

    @property
    def inner(self) -> Mapping[str, Policy]:
        return {str(place): policy for place, policy in enumerate(self.policies)}

    @property
    def clamps(self) -> bool:
        return clamps(self.policies[-1])

    def needs(self) -> Sequence[Statistic | Signal]:
        asked = needs_of(self.policies)
        by_group = any(isinstance(each, Statistic) and each.per == "group" for each in asked)
        return tuple(dict.fromkeys((*asked, PARAMETERS))) if by_group and len(self.policies) > 1 else asked

    def init(self, units: Units, device: torch.device) -> State:
        return joined({place: made(policy, units, device) for place, policy in self.inner.items()})

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        if len(self.policies) == 1:
            decision, own = ask(self.policies[0], statistics, part_of(state, "0"))
            return decision, joined({"0": own})
        found, states, extra, seen = list[_Link](), dict[str, State](), dict[str, Tensor](), statistics
        for place, policy in self.inner.items():
            if found and found[-1].inner.decision.bounds is not None:
                raise refusals.clamps_before(self.policies[len(found) - 1])
            inner, states[place] = asked_of(policy, seen, part_of(state, place))
            found.append(link := _Link(inner, inner.coefs(seen) if inner.scales else None))
            seen = seen if link.coefs is None else seen.after(link.coefs, inner.per)
            extra |= {f"{place}/{name}" if name in extra else name: v for name, v in inner.decision.extra.items()}
        skips = [link.inner.skip for link in found]
        skip = any_of(skips)
        after = {k: kept(part_of(state, k), states[k], skip, own) for k, own in zip(states, skips, strict=True)}
        combined = _combined([link for link in found if link.coefs is not None], statistics.units)
        return replace(combined, skip=skip, bounds=found[-1].inner.decision.bounds, extra=extra), joined(after)


class _Link(NamedTuple):
    """One of a chain: what it decides, and by what it multiplies each unit, None where it scales nothing."""

    inner: Inner
    coefs: Tensor | None


def _combined(links: Sequence[_Link], units: Units) -> Decision:
    """One decision that scales as all ``links`` do, which is that of the only one."""
    if len(links) < 2:
        return links[0].inner.decision if links else Decision(inf)
    finest = _finest([link.inner.per for link in links])
    product: Tensor | None = None
    for inner, coefs in links:
        assert coefs is not None
        own = coefs if inner.per in (MODEL, finest) else units.spread(coefs, inner.per, finest)
        product = own if product is None else product * own
    assert product is not None
    bounds = [inner.max_norm for inner, _ in links if inner.per == MODEL]
    return Decision(reduce(_least, bounds) if finest == MODEL else inf, coef=product.clamp_(LEAST, MOST), per=finest)


def _finest(levels: Sequence[Statistic]) -> Statistic:
    """Of which each of ``levels`` is made up; parameters for groups, which may leave some of these out."""
    finest = max(levels, key=lambda each: LEVELS.index(each.per))
    return PARAMETERS if finest.per == "group" and len({*levels}) > 1 else finest


def _least(bound: Number, other: Number) -> Number:
    if isinstance(bound, Tensor) and isinstance(other, Tensor):
        return torch.minimum(bound, other)
    if isinstance(bound, Tensor):
        bound, other = other, bound
    return other.clamp(max=bound) if isinstance(other, Tensor) else min(bound, other)
