"""Block RMS: each parameter's gradient has at most this root mean square (Shazeer and Stern, Adafactor, ICML 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .adaptive import coef_to
from .checks import euclidean, positive
from .protocol import Decision, State
from .statistic import PARAMETERS, Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class MaxRMS:
    """Scale each parameter's gradient by ``1 / max(1, rms / max_rms)``, where ``rms = norm / sqrt(size)``.

    * ``max_rms``: above 0, in the unit of one element of the gradients; ``inf`` only measures.

    Of a complex parameter each number counts once, by its absolute value. ValueError, when a Clipper is built, for a
    ``norm_type`` other than 2. Optax's ``clip_by_block_rms`` is the same.

    Source: https://arxiv.org/abs/1804.04235, section 6, where it clips updates.

    >>> MaxRMS()
    MaxRMS(max_rms=1.0)
    """

    max_rms: float = 1.0

    def __post_init__(self) -> None:
        positive("max_rms", self.max_rms, "inf measures only")

    def needs(self) -> Sequence[Statistic]:
        return (PARAMETERS,)

    def init(self, units: Units, device: torch.device) -> State:
        euclidean(self, units)
        return {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        sizes = statistics.units.sizes(PARAMETERS).clamp(min=1)  # an empty parameter has a norm of 0
        bounds = sizes.sqrt() * self.max_rms
        return Decision(bounds, coef=coef_to(bounds, statistics.norm(PARAMETERS)), per=PARAMETERS), state
