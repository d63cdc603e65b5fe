"""A bound that follows a quantile of the norms (Andrew, Thakkar, McMahan and Ramaswamy, NeurIPS 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf

import torch

from .adaptive import LEAST, MOST, at_most, coef_to, learnt_from
from .checks import finite, positive, share
from .protocol import Decision, State
from .statistic import Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class QuantileTracker:
    """Bound the norm by a running estimate of a quantile of the norms, one number of state.

    After each step ``bound *= exp(-eta * ((norm <= bound) - quantile))``: it settles where that share of norms
    lies below it.

    * ``quantile``: above 0 and below 1; the paper takes the median, 0.5. :class:`AutoClip` takes 0.1.
    * ``eta``: how fast the bound moves, above 0: by a factor of at most ``exp(eta)`` a step.
    * ``max_norm``: an upper limit on the bound, above 0; ``inf`` for none.

    The first norm is the first bound, since there is no other, and counts as no step: it is clipped by ``max_norm``
    alone, and a spike there is forgotten in ``log(spike) / (eta * (1 - quantile))`` steps. (The paper starts at 0.1,
    whatever the norms are.) Gradients with a norm up to the bound keep their bits, others are scaled by
    ``bound / norm``. Norms that are 0, NaN or inf change nothing. State: ``bound``, float64, inf before the first norm.

    Source: https://arxiv.org/abs/1905.03871
    """

    quantile: float = 0.5
    eta: float = 0.2
    max_norm: float = inf

    def __post_init__(self) -> None:
        share("quantile", self.quantile)
        finite("eta", self.eta)
        positive("max_norm", self.max_norm)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        return {"bound": torch.full(units.shape(), inf, dtype=torch.float64, device=device)}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm, before = statistics.norm(), state["bound"]
        learns, began = learnt_from(norm), before < inf
        bound = torch.where(learns > began, norm, before)
        down, up = exp(-self.eta * (1 - self.quantile)), exp(self.eta * self.quantile)
        moved = torch.where(norm <= bound, bound * down, bound * up).clamp_(LEAST, MOST)
        limit = at_most(bound, self.max_norm)
        return Decision(limit, coef=coef_to(limit, norm)), {"bound": torch.where(learns & began, moved, bound)}
