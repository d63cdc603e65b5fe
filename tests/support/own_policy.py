"""A policy that somebody else might write: all of it, in one file apart from the package."""

from dataclasses import dataclass
from math import inf

import torch

from distclip import Decision, Statistic


@dataclass(frozen=True, slots=True)
class OwnRunningMean:
    """Bounds each parameter by ``times`` the running mean of its own clipped norms, in the manner of AdaGC."""

    times: float = 1.05
    beta: float = 0.75

    def needs(self):
        return (Statistic("parameter"),)

    def init(self, units, device):
        return {"mean": torch.zeros(units.shape("parameter"), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        norms, mean = statistics.norm("parameter"), state["mean"]
        bounds = torch.where(mean > 0, self.times * mean, inf)
        clipped = torch.minimum(norms, bounds)
        mean = torch.where(mean > 0, self.beta * mean + (1 - self.beta) * clipped, clipped)
        return Decision(bounds, per="parameter"), {"mean": mean}
