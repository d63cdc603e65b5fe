"""AdaGC: each parameter is bounded by the running mean of its own clipped norms (Wang et al., 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .adaptive import LEAST, coef_to, learnt_from, number
from .checks import finite, positive, share, whole
from .protocol import Decision, State
from .statistic import PARAMETERS, Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class AdaGC:
    """Bound each parameter's norm ``n`` by ``lambda_rel`` times the running mean ``m`` of what it was clipped to.

    1. In the first ``warm_up`` steps all are multiplied by ``h = min(1, lambda_abs / norm)``, with the norm of all
       gradients, and ``m = min(m, h * n)``, so that spikes leave no mark.
    2. After them each is multiplied by its own ``h = min(1, lambda_rel * m / n)``, and
       ``m = beta * m + (1 - beta) * h * n``.

    * ``lambda_abs``: above 0, ``inf`` for a warm-up that only watches. ``lambda_rel``: finite, at least 1. ``beta``:
      above 0 and below 1. ``warm_up``: how many steps, from 0.

    Unlike the paper: a parameter without a mean, which had no gradient yet, is in its warm-up whenever its
    first one comes; norms of 0 are in no mean, since they would bind all others to 0; and a step whose norm is NaN or
    inf is none, it changes nothing.

    State: ``means`` (parameters,) float64, inf where nothing was seen, and ``count`` 0-d int64, the steps.

    Source: https://arxiv.org/abs/2502.11034
    """

    lambda_abs: float = 1.0
    lambda_rel: float = 1.05
    beta: float = 0.98
    warm_up: int = 100

    def __post_init__(self) -> None:
        positive("lambda_abs", self.lambda_abs)
        if finite("lambda_rel", self.lambda_rel) < 1:
            raise ValueError(f"lambda_rel must be at least 1, or means could only shrink, got {self.lambda_rel!r}")
        share("beta", self.beta)
        whole("warm_up", self.warm_up, least=0)

    def needs(self) -> Sequence[Statistic]:
        return (PARAMETERS,)

    def init(self, units: Units, device: torch.device) -> State:
        return {
            "means": torch.full(units.shape(PARAMETERS), inf, dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm, norms = statistics.norm(), statistics.norm(PARAMETERS)
        means = state["means"].masked_fill(state["means"] <= 0, inf)  # which a damaged state may hold
        warm = (state["count"] < self.warm_up) | (means == inf)
        bounds = (means * self.lambda_rel).masked_fill_(warm, inf)
        coefs = torch.where(warm, coef_to(number(self.lambda_abs), norm), coef_to(bounds, norms))
        finite = norm.isfinite()
        after = torch.where(finite & learnt_from(norms), self._followed(means, norms * coefs, warm), means)
        return Decision(bounds, coef=coefs, per=PARAMETERS), {"means": after, "count": state["count"] + finite}

    def _followed(self, means: Tensor, clipped: Tensor, warm: Tensor) -> Tensor:
        mean = means * self.beta + clipped * (1 - self.beta)
        return torch.where(warm, torch.minimum(means, clipped), mean).clamp_(min=LEAST)
