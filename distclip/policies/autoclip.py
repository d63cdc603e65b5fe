"""AutoClip: the bound is a percentile of the norms seen so far (Seetharaman, Wichern, Pardo and Le Roux, MLSP 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .checks import positive
from .protocol import Decision, State
from .statistics import Statistic, Statistics, Units
from .trust import trusted

LEAST = torch.finfo(torch.float64).smallest_normal
MOST = torch.finfo(torch.float64).max


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
    last, and ``count`` 0-d int64, the number of norms ever recorded.

    Source: https://arxiv.org/abs/2007.14469
    """

    percentile: float = 10
    window: int = 1000
    max_norm: float = inf

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be from 0 to 100, got {self.percentile!r}")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {self.window!r}")
        positive("max_norm", self.max_norm)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {
            "norms": torch.full((self.window,), inf, dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm = statistics.norm()
        counts = torch.logical_and(norm, norm < inf)  # not 0: steps without gradients would bind all others to zero
        norms = torch.where(counts, torch.cat([state["norms"][1:], norm.view(1)]), state["norms"])
        norms.masked_fill_(norms <= 0, inf)  # which older states hold, and what a damaged one may
        bound = _percentile(norms, self.percentile)
        bound = bound.clamp(max=self.max_norm) if self.max_norm < inf else bound
        coef = (bound / torch.minimum(norm, _number(MOST))).clamp_(LEAST, 1.0)  # exactly 1 up to the bound
        return Decision(bound, coef=coef), {"norms": norms, "count": state["count"] + counts}


def _percentile(norms: Tensor, percentile: float) -> Tensor:
    """The percentile of the finite ones; inf if there are none. No host sync."""
    ordered = norms.sort().values  # unused places hold inf
    if len(norms) == 1:
        return ordered[0]
    place = (ordered[1:] < inf).sum() * _number(percentile / 100)  # that many lie between the first and the last
    below = place.long().clamp_(max=len(norms) - 2)
    low, high = ordered.unfold(0, 2, 1).index_select(0, below.view(1))[0]
    return torch.fmax(torch.lerp(low, high, place - below), low)  # NaN where ``high`` is unused


def _number(value: float) -> Tensor:
    """A host number: an argument of the kernel, never a copy."""
    return torch.scalar_tensor(value, dtype=torch.float64)
