"""Several policies, one after the other, on one measurement."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .adopt import as_policy
from .composed import coef_of, either, joined, part_of
from .protocol import Decision, Number, Policy, State
from .statistics import LEVELS, MODEL, Signal, Statistic, Statistics, Units, asked


@dataclass(frozen=True, slots=True)
class Chain:
    """Apply each of ``policies`` to gradients as those before it leave them: ``Chain(AdaGC(), MaxNorm(1.0))``.

    Norms scale linearly, so each sees the reduced statistics times the coefficients before it: no second pass over
    gradients, and no second all-reduce. The step is skipped if one of them skips it; each sees the step all the same.
    One that clamps elements (:class:`ValueClip`) must be the last.

    * ``policies``: or numbers, which mean :class:`MaxNorm`. Those that decide by group must all name the same groups,
      unless another decides by parameter or by row.

    State: ``"0.key"``, ``"1.key"``, ... by the place of each.

    >>> Chain(2.0, 1.0).policies
    (MaxNorm(max_norm=2.0), MaxNorm(max_norm=1.0))
    """

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy | float) -> None:
        if not policies:
            raise ValueError("Chain needs at least one policy")
        object.__setattr__(self, "policies", tuple(map(as_policy, policies)))

    def needs(self) -> Sequence[Statistic | Signal]:
        return tuple(dict.fromkeys(each for policy in self.policies for each in policy.needs()))

    def init(self, units: Units, device: torch.device) -> State:
        return joined({str(k): policy.init(units, device) for k, policy in enumerate(self.policies)})

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        if len(self.policies) == 1:
            decision, after = self.policies[0].decide(statistics, part_of(state, "0"))
            return decision, joined({"0": after})
        found: list[tuple[Statistic, Tensor]] = []
        skip: Tensor | bool | None = None
        bounds: tuple[Number, Number] | None = None
        bound: Number = inf
        extra: dict[str, Tensor] = {}
        states: dict[str, State] = {}
        seen = statistics
        for k, policy in enumerate(self.policies):
            if bounds is not None:
                raise ValueError(f"{type(self.policies[k - 1]).__qualname__} clamps elements: put it last in the Chain")
            decision, states[str(k)] = policy.decide(seen, part_of(state, str(k)))
            skip = either(skip, decision.skip)
            bounds, coefs = decision.bounds, coef_of(decision, seen)
            seen = seen.after(coefs, decision.per)
            found.append((asked(decision.per), coefs))
            bound = _least(bound, decision.max_norm) if found[-1][0] == MODEL else bound
            extra |= decision.extra
        coef, per = _product(found, statistics)
        return Decision(bound if per == MODEL else inf, skip, bounds, coef, per, extra), joined(states)


def _least(bound: Number, other: Number) -> Number:
    if isinstance(bound, Tensor) and isinstance(other, Tensor):
        return torch.minimum(bound, other)
    if isinstance(bound, Tensor):
        bound, other = other, bound
    return other.clamp(max=bound) if isinstance(other, Tensor) else min(bound, other)


def _product(found: Sequence[tuple[Statistic, Tensor]], statistics: Statistics) -> tuple[Tensor, Statistic]:
    """All coefficients as one for each unit of the finest level among them."""
    finest = max((per for per, _ in found), key=lambda per: LEVELS.index(per.per))
    product: Tensor | None = None
    for per, coefs in found:
        own = coefs if per in (MODEL, finest) else statistics.units.spread(coefs, per, finest)
        product = own if product is None else product * own
    assert product is not None
    return product, finest
