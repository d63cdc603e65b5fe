"""AutoClip: the bound is a percentile of the norms seen so far (Seetharaman, Wichern, Pardo and Le Roux, MLSP 2020)."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .checks import positive
from .policy import Decision, State

LEAST = torch.finfo(torch.float64).smallest_normal


@dataclass(frozen=True, slots=True)
class AutoClip:
    """Bound the norm by the ``percentile``-th percentile of the last ``window`` norms, this step's included.

    * ``percentile``: 0 to 100, linear between neighbours as ``numpy.percentile``; the paper recommends 10.
    * ``window``: how many norms are kept. The paper keeps all; a bounded window costs the same at every step.
    * ``max_norm``: an upper limit on the bound, above 0; ``inf`` for none.

    Gradients with a norm up to the bound keep their bits, others are scaled by ``bound / norm``: the 1e-6 of torch's
    formula would clip small norms at their own bound. The first step is clipped by ``max_norm`` alone, since the only
    norm known is its own. Norms that are 0, NaN or inf never enter the window. State: ``norms`` (window,) float64 and
    ``count`` 0-d int64, the number of norms ever recorded.

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

    def init(self, device: torch.device) -> State:
        return {
            "norms": torch.full((self.window,), inf, dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }

    def decide(self, norm: Tensor, state: State) -> tuple[Decision, State]:
        counts = (norm > 0) & (norm < inf)  # steps without gradients would bind all others to zero
        slot = torch.arange(self.window, device=norm.device) == state["count"] % self.window
        norms = torch.where(slot & counts, norm, state["norms"])
        # Unused slots hold inf and sort last. So do zeros, which older states hold, and what a damaged one may.
        ordered = torch.where(norms > 0, norms, inf).sort().values
        bound = _percentile(ordered, (ordered < inf).sum(), self.percentile).clamp(max=self.max_norm)
        coef = torch.where(norm <= bound, 1.0, (bound / norm).clamp(min=LEAST))
        return Decision(bound, coef=coef), {"norms": norms, "count": state["count"] + counts}


def _percentile(ordered: Tensor, count: Tensor, percentile: float) -> Tensor:
    """The percentile of the first ``count`` of ``ordered``; inf when there are none. No number goes to the host."""
    position = (count - 1).clamp(min=0).double() * (percentile / 100)
    below = position.floor()
    low = ordered.gather(0, below.long().view(1)).squeeze(0)
    high = ordered.gather(0, position.ceil().long().view(1)).squeeze(0)
    return torch.where(low == high, low, torch.lerp(low, high, position - below))
