"""Smooth clipping: every norm is scaled, and large ones come close to the bound."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .adaptive import LEAST, MOST, number
from .checks import finite
from .protocol import Decision, State
from .statistic import Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class Smooth:
    """Scale all gradients by ``max_norm / (norm + max_norm)``: no kink at the bound, which no norm reaches.

    A norm much smaller than ``max_norm``, a finite number above 0, is nearly kept, one of ``max_norm`` is halved.

    Source: https://arxiv.org/abs/2206.13033 (smoothed normalization, without its normalization)

    >>> Smooth(1.0)
    Smooth(max_norm=1.0)
    """

    max_norm: float

    def __post_init__(self) -> None:
        finite("max_norm", self.max_norm)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        bound = number(self.max_norm)
        coef = (bound / (torch.minimum(statistics.norm(), number(MOST)) + bound)).clamp_(LEAST, 1.0)
        return Decision(float(self.max_norm), coef=coef), state
