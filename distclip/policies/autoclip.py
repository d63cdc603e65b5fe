"""AutoClip: the bound is a percentile of the norms seen so far (Seetharaman, Wichern, Pardo and Le Roux, MLSP 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .adaptive import at_most, coef_to, learnt_from, moved_on, number
from .checks import positive, whole
from .protocol import Decision, State
from .statistic import Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class AutoClip:
    """Bound the norm by the ``percentile``-th percentile of the last ``window`` norms, this step's included.

    * ``percentile``: 0 to 100, interpolated linearly as in ``numpy.percentile``; the paper recommends 10.
    * ``window``: how many norms are kept. The paper keeps all; a bounded window costs the same at every step.
    * ``max_norm``: an upper limit on the bound, above 0; ``inf`` for none.

    Gradients with a norm up to the bound keep their bits, others are scaled by ``bound / norm``: the 1e-6 of torch's
    formula would clip small norms at their own bound. The first step is clipped by ``max_norm`` alone, since no other
    norm is known. Norms that are 0, NaN or inf never enter the window. State: ``norms`` (window,) float64, the newest
    last, and ``count`` int64, the number of norms ever recorded; of each unit inside :class:`PerParameter`.

    Source: https://arxiv.org/abs/2007.14469
    """

    percentile: float = 10
    window: int = 1000
    max_norm: float = inf

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be from 0 to 100, got {self.percentile!r}")
        whole("window", self.window)
        positive("max_norm", self.max_norm)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {
            "norms": torch.full((*units.shape(), self.window), inf, dtype=torch.float64, device=device),
            "count": torch.zeros(units.shape(), dtype=torch.int64, device=device),
        }

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm = statistics.norm()
        counts = learnt_from(norm)  # not 0: steps without gradients would bind all others to zero
        norms = moved_on(state["norms"], norm, counts)
        norms.masked_fill_(norms <= 0, inf)  # which older states hold, and what a damaged one may
        bound = at_most(_percentile(norms, self.percentile), self.max_norm)
        return Decision(bound, coef=coef_to(bound, norm)), {"norms": norms, "count": state["count"] + counts}


def _percentile(norms: Tensor, percentile: float) -> Tensor:
    """The percentile of the finite ones along the last dimension; inf if there are none. No host sync."""
    ordered = norms.sort(-1).values  # unused places hold inf
    if norms.shape[-1] == 1:
        return ordered[..., 0]
    place = (ordered[..., 1:] < inf).sum(-1) * number(percentile / 100)  # that many lie between the first and the last
    below = place.long().clamp_(max=norms.shape[-1] - 2)
    pairs = ordered.unfold(-1, 2, 1)
    low, high = pairs.gather(-2, below[..., None, None].expand(*below.shape, 1, 2)).squeeze(-2).unbind(-1)
    return torch.fmax(torch.lerp(low, high, place - below), low)  # NaN where ``high`` is unused
