"""ZClip: norms that are outliers by their z-score are clipped (Kumar, Owen, Roy Chowdhury and Guera, 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .adaptive import LEAST, coef_to, learnt_from, moved_on, winsorised
from .checks import finite, positive, share, whole
from .protocol import Decision, State
from .statistic import Statistic
from .statistics import Statistics
from .trust import trusted
from .units import Units

BELOW = 1e150  # larger norms have squares that may not add up in float64


@trusted
@dataclass(frozen=True, slots=True)
class ZClip:
    """Clip a norm far above the running mean of norms: the farther above, the closer to the mean.

    With the running ``mean`` and ``std`` of norms, ``scale = std + eps * mean`` and ``z = (norm - mean) / scale``, a
    norm with ``z > z_thresh`` is clipped to ``mean + z_thresh * std / (z / z_thresh)``. What it was clipped to, or a
    norm that was not, is ``x`` in ``mean = alpha * mean + (1 - alpha) * x`` and then
    ``std**2 = alpha * std**2 + (1 - alpha) * (x - mean)**2``.

    * ``max_norm``: the bound in every step, and the only one during warm-up; ``inf`` for none.
    * ``warmup_steps``: how many norms mean and standard deviation start from, as they are at least 1.

    Unlike the paper's code: the norms of the warm-up are winsorised, those more than ``z_thresh`` robust
    deviations from their median, so that a spike there does not hide the next ones; after ``warmup_steps`` outliers in
    a row, which are a new level of norms and no spikes, their norms are a new warm-up, where the code would clip for
    good; norms that are 0, NaN or inf change nothing; ``eps`` is a share of the mean, not a norm.

    State, float64 and int64: ``mean`` and ``std``; ``norms``, the last ``warmup_steps`` of them, the newest last;
    ``count``, the number of norms seen; ``outliers``, how many in a row the last ones were.

    Source: https://arxiv.org/abs/2504.02507
    """

    alpha: float = 0.97
    z_thresh: float = 2.5
    max_norm: float = 1.0
    eps: float = 1e-6
    warmup_steps: int = 25

    def __post_init__(self) -> None:
        share("alpha", self.alpha)
        finite("z_thresh", self.z_thresh)
        positive("max_norm", self.max_norm)
        finite("eps", self.eps)
        whole("warmup_steps", self.warmup_steps)

    def needs(self) -> Sequence[Statistic]:
        return ()

    def init(self, units: Units, device: torch.device) -> State:
        shape = units.shape()
        found = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in ("mean", "std")}
        found |= {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("count", "outliers")}
        return found | {"norms": torch.full((*shape, self.warmup_steps), inf, dtype=torch.float64, device=device)}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm, mean, std = statistics.norm(), state["mean"], state["std"]
        above, scale = norm - mean, std + self.eps * mean
        limit = mean + self.z_thresh**2 * std * scale / above
        outlier = (above > self.z_thresh * scale) & (state["count"] >= self.warmup_steps)
        outlier &= limit > 0  # which it is, unless a damaged state was loaded
        bound = torch.where(outlier, limit, inf).clamp_(LEAST, self.max_norm)
        return Decision(bound, coef=coef_to(bound, norm)), self._learn(norm, outlier, limit, state)

    def _learn(self, norm: Tensor, outlier: Tensor, limit: Tensor, state: State) -> State:
        learns, mean, std = learnt_from(norm, BELOW), state["mean"], state["std"]
        norms, count = moved_on(state["norms"], norm, learns), state["count"] + learns
        outliers = torch.where(learns, (state["outliers"] + 1) * outlier, state["outliers"])
        starts = learns & ((count == self.warmup_steps) | (outliers == self.warmup_steps))
        # ``learns`` from here on: of a norm after the warm-up, whose numbers are 0.
        learns = learns & (count > self.warmup_steps)
        x = torch.where(outlier, limit, norm)
        new_mean = self.alpha * mean + (1 - self.alpha) * x
        new_std = (self.alpha * std.square() + (1 - self.alpha) * (x - new_mean).square()).sqrt()
        first_mean, first_std = _of(winsorised(norms, self.z_thresh))
        return {
            "mean": torch.where(starts, first_mean, torch.where(learns, new_mean, mean)),
            "std": torch.where(starts, first_std, torch.where(learns, new_std, std)),
            "count": count,
            "outliers": outliers.masked_fill(starts, 0),
            "norms": norms,
        }


def _of(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along the last dimension."""
    mean = norms.mean(-1, keepdim=True)
    return mean.squeeze(-1), (norms - mean).square().mean(-1).sqrt()
