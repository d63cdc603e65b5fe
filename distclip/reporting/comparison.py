"""What runs say of each other: norms that differ by one factor in every step are the same norm, measured otherwise.

That is how a norm shows that misses ranks, or counts some twice: by the square root of their number, as squares add
up. Users see it as another norm with FSDP than with DDP.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from distclip.reporting.advice import Advice
from distclip.reporting.analysis import ENOUGH, Analysis
from distclip.reporting.words import counted, percent, short

FACTOR, SPREAD = 1.05, 0.03  # at least so far apart, and at most so much from step to step
MOST_RANKS = 4096
EXACT = 0.01  # of a square root


def advice_on_all(found: list[Analysis]) -> list[Advice]:
    return [each for one, other in combinations(found, 2) for each in one_factor(one, other)]


def one_factor(one: Analysis, other: Analysis) -> Iterator[Advice]:
    """Two runs whose norms have the same ratio in all steps that both have."""
    _, here, there = np.intersect1d(one.run.step, other.run.step, assume_unique=True, return_indices=True)
    norms, others = one.run.norm[here], other.run.norm[there]
    good = np.isfinite(norms) & np.isfinite(others) & (norms > 0) & (others > 0)
    if good.sum() < ENOUGH:
        return
    logs = np.log(others[good] / norms[good])
    spread, factor = 1.4826 * float(np.median(np.abs(logs - np.median(logs)))), float(np.exp(np.median(logs)))
    if spread > SPREAD or max(factor, 1 / factor) < FACTOR:
        return
    small, large, factor = (one, other, factor) if factor > 1 else (other, one, 1 / factor)
    title = f"The norms of {large.run.name} are {short(factor)} times those of {small.run.name}, in every step"
    reason = f"In {counted(int(good.sum()), 'step')} that both have the ratio varies by {percent(spread)}. "
    ranks = round(factor**2)
    if ranks <= MOST_RANKS and abs(factor / ranks**0.5 - 1) < EXACT:
        reason += f"It is the square root of {ranks}: a norm that leaves out all but one of {ranks} ranks, or counts "
        reason += f"{ranks} copies, differs so. "
    reason += "If both trained the same model on the same data, one of the two is not the norm of all gradients, or "
    yield Advice("factor", "warning", title, f"{reason}one sums losses or gradients where the other takes their mean.")
