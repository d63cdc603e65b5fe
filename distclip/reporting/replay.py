"""What other policies would have done: the policies themselves, run over the norms that were logged."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from statistics import median

import numpy as np
import torch

from distclip import AutoClip, Policy, QuantileTracker, SkipSpikes, Statistics, Units, ZClip
from distclip.runs.run import Floats

CPU = torch.device("cpu")
MOST = 2000  # of the latest norms: a policy takes 60 to 400 us for each
LEAST = 50  # norms tell nothing of a policy that learns from them
POLICIES: dict[str, Policy] = {
    "AutoClip(percentile=10)": AutoClip(),
    "AutoClip(percentile=90)": AutoClip(percentile=90),
    "QuantileTracker(quantile=0.9)": QuantileTracker(quantile=0.9),
    "ZClip(max_norm=inf)": ZClip(max_norm=inf),
    "SkipSpikes()": SkipSpikes(),
}


@dataclass(frozen=True, slots=True)
class Replay:
    """``clipped`` and ``skipped``: shares of ``steps``; ``bound``: the median bound, NaN where none was set."""

    policy: str
    steps: int
    clipped: float
    skipped: float
    bound: float


def replays_of(norm: Floats, advance: Callable[[int], None]) -> list[Replay]:
    """Every policy over the latest norms that are finite. ``advance`` is told of each that is done."""
    norms = norm[np.isfinite(norm)][-MOST:]
    if len(norms) < LEAST:
        return []
    found = []
    for name, policy in POLICIES.items():
        found.append(replay(name, policy, norms))
        advance(1)
    return found


def replay(name: str, policy: Policy, norms: Floats) -> Replay:
    clipped, skipped, bounds, units = 0, 0, [], Units()
    state = policy.init(units, CPU)
    with torch.inference_mode():
        for norm in torch.from_numpy(norms.copy()):
            decision, state = policy.decide(Statistics(norm, units), state)
            bound = float(decision.max_norm)
            coef = min(1.0, bound / (float(norm) + 1e-6)) if decision.coef is None else float(decision.coef)
            skip = bool(decision.skip)
            clipped, skipped = clipped + (coef != 1 and not skip), skipped + skip
            bounds += [bound] if bound < inf else []
    steps = len(norms)
    return Replay(name, steps, clipped / steps, skipped / steps, median(bounds) if bounds else nan)
