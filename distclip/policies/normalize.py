"""Normalized gradients: every step has the same norm (Hazan, Levy and Shalev-Shwartz, NeurIPS 2015)."""

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
class Normalize:
    """Scale all gradients to a norm of ``norm``, up as well as down: by ``norm / their norm``.

    ``norm``: a finite number above 0. Gradients with a norm of 0 stay 0. State: none.

    Source: https://arxiv.org/abs/1507.02030

    >>> Normalize(1.0)
    Normalize(norm=1.0)
    """

    norm: float

    def __post_init__(self) -> None:
        finite("norm", self.norm)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm = statistics.norm()
        coef = (number(self.norm) / torch.minimum(norm, number(MOST))).clamp_(LEAST, MOST)
        return Decision(float(self.norm), coef=coef.masked_fill_(norm == 0, 1.0)), state
