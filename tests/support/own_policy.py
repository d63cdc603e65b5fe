"""Policies that somebody else might write: all of them, in one file apart from the package."""

from dataclasses import dataclass
from math import inf

import torch

from distclip import Decision, Signal, Statistic


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


@dataclass(frozen=True, slots=True)
class OwnGate:
    """Skips a step whose loss, the mean over ranks, is above ``most``; remembers the last that it let pass."""

    most: float = 2.0

    def needs(self):
        return (Signal("loss"), Signal("tokens"))

    def init(self, units, device):
        return {"loss": torch.zeros((), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        loss = statistics.signal("loss")
        skip = loss > self.most
        extra = {"loss": loss, "tokens": statistics.signal("tokens")}
        return Decision(1.0, skip=skip, extra=extra), {"loss": torch.where(skip, state["loss"], loss)}


@dataclass(frozen=True, slots=True)
class OwnSpikes:
    """Decides on whatever norm it is given: skips one above ``times`` the largest before, and bounds by that."""

    times: float = 4.0

    def needs(self):
        return ()

    def init(self, units, device):
        return {"most": torch.zeros(units.shape(), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        norm, most = statistics.norm(), state["most"]
        usable = (norm > 0) & (norm < inf)
        skip = usable & (most > 0) & (norm > self.times * most)
        bound = torch.where(most > 0, most, inf)
        kept = torch.where(usable & ~skip, torch.maximum(norm, most), most)
        return Decision(bound, skip=skip), {"most": kept}
