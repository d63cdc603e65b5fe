"""Clipping by a fixed bound on the global norm (Mikolov 2012; Pascanu, Mikolov and Bengio, ICML 2013)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import positive
from .protocol import Decision, State
from .statistics import Statistic, Statistics, Units
from .trust import trusted


@trusted
@dataclass(frozen=True, slots=True)
class MaxNorm:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``.

    ``max_norm``: a number above 0, in the unit of the gradients; ``inf`` only measures. (torch accepts 0, which
    zeroes every gradient; here it is a ValueError.)

    >>> MaxNorm(1.0)
    MaxNorm(max_norm=1.0)
    >>> MaxNorm(0)
    Traceback (most recent call last):
        ...
    ValueError: max_norm must be above 0 (inf measures only), got 0
    """

    max_norm: float

    def __post_init__(self) -> None:
        positive("max_norm", self.max_norm, "inf measures only")

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        return Decision(float(self.max_norm)), state
