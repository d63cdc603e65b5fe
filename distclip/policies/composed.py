"""What policies that wrap others have in common: inner decisions as coefficients, inner states under one roof."""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from .protocol import Decision, Policy, State
from .statistics import MODEL, Statistic, Statistics, asked


def coef_of(decision: Decision, statistics: Statistics) -> Tensor:
    """By what ``decision`` multiplies each unit of its level: float64, 0-d or (units,), 1 where nothing bounds it.

    Torch's formula where it names a bound, and no coefficient. No host sync.
    """
    per = None if asked(decision.per) == MODEL else decision.per
    norm = statistics.norm(per)
    if decision.coef is not None:
        return torch.as_tensor(decision.coef, dtype=torch.float64).to(norm.device).expand_as(norm)
    bound = decision.max_norm
    if not isinstance(bound, Tensor):
        if bound == inf:
            return torch.ones_like(norm)
        bound = torch.scalar_tensor(bound, dtype=torch.float64)  # of the host: an argument of the kernel, never a copy
        return (bound / (norm + 1e-6)).clamp_(max=1.0)
    bound = bound.to(norm)
    return (bound / (norm + 1e-6)).clamp_(max=1.0).masked_fill_(bound == inf, 1.0)


def either(skip: Tensor | bool | None, other: Tensor | bool | None) -> Tensor | bool | None:
    """Whether one of two decisions skips, which for units is whether one of them does; None where both never do."""
    if skip is None or other is None:
        return _any(other if skip is None else skip)
    skip, other = _any(skip), _any(other)
    if isinstance(skip, Tensor) and isinstance(other, Tensor):
        return (skip != 0) | (other != 0)
    number, tensor = (skip, other) if isinstance(other, Tensor) else (other, skip)
    return True if number else tensor


def _any(skip: Tensor | bool | None) -> Tensor | bool | None:
    return skip.any() if isinstance(skip, Tensor) and skip.dim() else skip


def joined(states: Mapping[str, State]) -> State:
    """The states of inner policies as one: ``{"inner.name": ...}``."""
    return {f"{inner}.{name}": value for inner, state in states.items() for name, value in state.items()}


def part_of(state: State, inner: str) -> State:
    """That of one inner policy."""
    start = f"{inner}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def on_a_norm(policy: Policy, wrapper: str) -> None:
    """ValueError unless ``policy`` decides on one norm, and so can on another in its place."""
    finer = [each for each in policy.needs() if isinstance(each, Statistic) and each != MODEL]
    if finer:
        raise ValueError(
            f"{wrapper} gives a policy other norms than the model's, and {type(policy).__qualname__} decides by "
            f"{finer[0].per} itself: use it as it is, or in a Chain"
        )


def on_norms(decision: Decision, wrapper: str) -> Decision:
    """``decision``; ValueError where it clamps elements, which has no units."""
    if decision.bounds is not None:
        raise ValueError(f"{wrapper} has a policy that clamps elements: put ValueClip last in a Chain instead")
    return decision


def name_of(name: str, wrapper: str) -> str:
    """``name``; ValueError for one that cannot be told from its part in a checkpoint."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"{wrapper} needs names without dots, got {name!r}")
    return name
