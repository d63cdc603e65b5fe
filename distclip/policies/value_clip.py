"""Clipping every element by value: needs no statistic, so every rank clamps its shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from .checks import bounds
from .protocol import Decision, State
from .statistic import Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class ValueClip:
    """Clamp every gradient element to ``[-clip_value, clip_value]``, or to ``(min, max)``.

    The norm before clamping is still measured and reported; ``coef`` is 1. NaN stays NaN, inf becomes a bound.

    >>> ValueClip(0.5)
    ValueClip(clip_value=0.5)
    >>> ValueClip((-1.0, 2.0)).clip_value
    (-1.0, 2.0)
    >>> ValueClip(-1)
    Traceback (most recent call last):
        ...
    ValueError: clip_value must be above 0, got -1
    """

    clip_value: float | tuple[float, float]

    def __post_init__(self) -> None:
        bounds("clip_value", self.clip_value)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        return Decision(inf, bounds=bounds("clip_value", self.clip_value)), state
