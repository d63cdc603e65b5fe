"""Clipping by a bound on the global norm (Mikolov 2012; Pascanu, Mikolov and Bengio, ICML 2013)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import positive
from .protocol import Decision, State
from .schedules import Schedule
from .statistic import Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class MaxNorm:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``.

    ``max_norm``: a number above 0, in the unit of the gradients; ``inf`` only measures. (torch accepts 0, which
    zeroes every gradient; here it is a ValueError.) Or a schedule: :class:`Warmup`, :class:`Cosine`, or a function of
    how many steps were made, a 0-d int64 tensor, that returns such a number or a 0-d tensor. On an accelerator a Python
    ``if`` on that tensor is a host sync: write ``torch.where``.

    State: none; with a schedule ``step``, 0-d int64, the number of steps whose norm was finite.

    >>> MaxNorm(1.0)
    MaxNorm(max_norm=1.0)
    >>> MaxNorm(0)
    Traceback (most recent call last):
        ...
    ValueError: max_norm must be above 0 (inf measures only), got 0
    """

    max_norm: float | Schedule

    def __post_init__(self) -> None:
        if not callable(self.max_norm):
            positive("max_norm", self.max_norm, "inf measures only")

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {"step": torch.zeros((), dtype=torch.int64, device=device)} if callable(self.max_norm) else {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        if not callable(self.max_norm):
            return Decision(float(self.max_norm)), state
        made = state["step"] + statistics.norm("model").isfinite()
        return Decision(self.max_norm(state["step"])), {"step": made}
