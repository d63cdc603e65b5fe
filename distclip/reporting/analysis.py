"""The numbers behind a report: what a run's norms are, and what bounds would have done to them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distclip.reporting.replay import Replay, replays_of
from distclip.reporting.spikes import Level, Shift, Spike, shift_of, spikes_of
from distclip.runs.run import Bools, Floats, Run

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
STARTING = 0.1  # of a run: norms fall then, and tell nothing of the rest
SUGGESTED = 0.95  # quantile of ordinary norms: bounds spikes, and leaves nearly all else as it is
ENOUGH = 50  # norms, to suggest anything
LEAST, MOST = 1e-50, 1e50


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bound, and the share of finite norms that it would have clipped, to the median share ``kept`` of their norm."""

    name: str
    bound: float
    clipped: float
    kept: float


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """``bound``: the run's last, NaN where it logged none; ``moves``: whether it changed. ``clipped``: None: unknown.

    ``suggested``: a fixed bound, NaN for too few norms. ``settled``: the finite norms that it is made from.
    """

    run: Run
    steps: int
    nonfinite: int
    skipped: float
    longest_skips: int
    clipped: float | None
    kept: float  # median coefficient of clipped steps, NaN without any
    bound: float
    moves: bool
    largest: float
    largest_step: int
    quantiles: dict[float, float]
    suggested: float
    settled: Floats
    level: Level
    spikes: list[Spike]
    shift: Shift | None
    candidates: list[Candidate]
    replays: list[Replay]

    @classmethod
    def of(cls, run: Run, advance: Callable[[int], None]) -> "Analysis":
        run = replace(run, norm=tamed(run.norm), max_norm=tamed(run.max_norm))
        finite = run.norm[run.finite]
        level = Level.of(run.norm)
        spikes, shift = spikes_of(run, level), shift_of(level)
        settled = settled_norms(run, spikes, shift)
        suggested = rounded(float(np.quantile(settled, SUGGESTED))) if len(settled) >= ENOUGH else np.nan
        bounds = run.max_norm[np.isfinite(run.max_norm)]
        bound = float(bounds[-1]) if len(bounds) else np.nan
        found = np.quantile(finite, QUANTILES).tolist() if len(finite) else [np.nan] * len(QUANTILES)
        quantiles = dict(zip(QUANTILES, found, strict=True))
        return cls(
            run=run,
            steps=len(run.step),
            nonfinite=int((~run.finite).sum()),
            skipped=float(run.skip.mean()),
            longest_skips=longest(run.skip),
            clipped=float(run.clipped.mean()) if run.bounded else None,
            kept=kept_by(run),
            bound=bound,
            moves=len(bounds) > 0 and bool((bounds != bounds[0]).any()),
            largest=float(finite.max()) if len(finite) else np.nan,
            largest_step=int(run.step[run.finite][finite.argmax()]) if len(finite) else 0,
            quantiles=quantiles,
            suggested=suggested,
            settled=settled,
            level=level,
            spikes=spikes,
            shift=shift,
            candidates=candidates_of(finite, bound, suggested, quantiles),
            replays=replays_of(run.norm, advance),
        )


def tamed(numbers: Floats) -> Floats:
    """Without what no float32 can be, so that ratios and squares of finite numbers are finite."""
    within: Floats = np.where(np.abs(numbers) < LEAST, 0.0, np.clip(numbers, -MOST, MOST))
    return np.where(np.isfinite(numbers), within, numbers)


def settled_norms(run: Run, spikes: list[Spike], shift: Shift | None) -> Floats:
    """Ordinary norms: finite and positive, after the start and the last change of level, without spikes."""
    use = run.finite & (run.norm > 0)
    use[: shift.row if shift else int(STARTING * len(use))] = False
    use[[spike.row for spike in spikes]] = False
    return run.norm[use]


def candidates_of(finite: Floats, bound: float, suggested: float, quantiles: dict[float, float]) -> list[Candidate]:
    """The run's bound, the one suggested and quantiles of its norms, in order."""
    if not len(finite):
        return []
    named = {"the run's bound": bound, "suggested": suggested}
    named |= {f"{q:.0%} quantile".replace("%", " %"): value for q, value in quantiles.items()}
    found = [candidate(name, value, finite) for name, value in named.items() if np.isfinite(value) and value > 0]
    return sorted(found, key=lambda each: each.bound)


def candidate(name: str, bound: float, finite: Floats) -> Candidate:
    above = finite[finite > bound]
    kept = float(np.median(bound / above)) if len(above) else 1.0
    return Candidate(name, bound, len(above) / len(finite), kept)


def kept_by(run: Run) -> float:
    """The median coefficient of clipped steps: as logged, else by the bound."""
    clipped = run.clipped
    if not clipped.any():
        return float("nan")
    coef = np.where(np.isnan(run.coef[clipped]), run.max_norm[clipped] / run.norm[clipped], run.coef[clipped])
    return float(np.median(coef))


def longest(flags: Bools) -> int:
    """The longest row of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def rounded(number: float) -> float:
    """With two digits."""
    return float(f"{number:.2g}")
