"""AutoClip: the bound is a percentile of the norms seen so far (Seetharaman, Wichern, Pardo and Le Roux, MLSP 2020)."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .checks import positive
from .policy import Decision, State


@dataclass(frozen=True, slots=True)
class AutoClip:
    """Bound the norm by the ``percentile``-th percentile of the last ``window`` norms, this step's included.

    * ``percentile``: 0 to 100, linear between neighbours as ``numpy.percentile``; the paper recommends 10.
    * ``window``: how many norms are kept. The paper keeps all; a bounded window costs the same at every step.
    * ``max_norm``: an upper limit on the bound, above 0; ``inf`` for none.

    Norms that are NaN or inf never enter the window. State: ``norms`` (window,) float64 and ``count`` 0-d int64, the
    number of norms ever recorded. The first step is never clipped, since the only norm known is its own.

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
        finite = norm.isfinite()
        slot = torch.arange(self.window, device=norm.device) == state["count"] % self.window
        norms = torch.where(slot & finite, norm, state["norms"])
        # Unused slots hold inf and sort last. So does what was no norm: a damaged state must not turn gradients round.
        ordered = torch.where(norms >= 0, norms, inf).sort().values
        bound = _percentile(ordered, ordered.isfinite().sum(), self.percentile)
        bound = torch.where(bound > 0, bound, inf)  # of steps without gradients: it would make all others zero
        return Decision(bound.clamp(max=self.max_norm)), {"norms": norms, "count": state["count"] + finite}


def _percentile(ordered: Tensor, count: Tensor, percentile: float) -> Tensor:
    """The percentile of the first ``count`` of ``ordered``; inf when there are none. No number goes to the host."""
    position = (count - 1).clamp(min=0).double() * (percentile / 100)
    below = position.floor()
    low = ordered.gather(0, below.long().view(1)).squeeze(0)
    high = ordered.gather(0, position.ceil().long().view(1)).squeeze(0)
    return torch.where(low == high, low, torch.lerp(low, high, position - below))
