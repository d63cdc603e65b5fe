"""Where a norm leaves its surroundings: for a step or a few (a spike), or for good (a shift of its level).

The surroundings of a step are the median of the medians of five blocks of steps: a spike does not move it, a level that
lasts moves it within one block, and it takes a pass over a million norms.
"""

from dataclasses import dataclass

import numpy as np

from distclip.runs.run import Floats, Run, Steps

LEAST = 3.0  # times its surroundings is no spike
SIGMAS = 6.0  # robust standard deviations of the logarithm
LASTING = 20  # steps in a row are no spike
NEAR = 3  # steps apart are one spike
SHIFT = 2.5  # times the level before
SHOWN = 3  # layers of a spike
AROUND = 2  # blocks before and after


@dataclass(frozen=True, slots=True)
class Spike:
    """``row``: its steepest step, as a place in the columns. ``height``: the norm there in units of its surroundings.

    ``layers``: the three with the largest shares of the squared norm, and these shares.
    """

    row: int
    height: float
    layers: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Shift:
    """``row``: about where the level changes; ``before`` and ``after``: median norms of the blocks next to it."""

    row: int
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The usual norm around each step with a positive finite one: ``rows`` are these, ``around`` their surroundings."""

    rows: Steps
    around: Floats
    medians: Floats  # of blocks
    size: int  # steps in a block

    @classmethod
    def of(cls, norm: Floats) -> "Level":
        with np.errstate(invalid="ignore"):
            rows = np.flatnonzero(np.isfinite(norm) & (norm > 0))
        size = max(5, min(50, len(rows) // 20))
        blocks = len(rows) // size
        if not blocks:
            around = np.full(len(rows), np.median(norm[rows]) if len(rows) else np.nan)
            return cls(rows, around, around[:1], size)
        medians = np.median(norm[rows][: blocks * size].reshape(blocks, size), axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(medians, AROUND, mode="edge"), 2 * AROUND + 1)
        around = np.repeat(np.median(windows, axis=1), size)
        return cls(rows, np.append(around, np.full(len(rows) - len(around), around[-1])), medians, size)


def spikes_of(run: Run, level: Level) -> list[Spike]:
    """The spikes of a run, the steepest first. Its first block has no surroundings yet, and no spikes."""
    norm = run.norm[level.rows]
    height = norm / level.around
    deviation = 1.4826 * float(np.median(np.abs(np.log(height)))) if len(height) else 0.0
    high = height >= max(LEAST, np.exp(min(SIGMAS * deviation, 700)))
    high[: level.size] = False
    places = np.flatnonzero(high)
    groups = np.split(places, np.flatnonzero(np.diff(places) > NEAR) + 1) if len(places) else []
    tops = [group[np.argmax(height[group])] for group in groups if len(group) <= LASTING]
    tops.sort(key=lambda place: -height[place])
    return [Spike(row := int(level.rows[top]), float(height[top]), top_layers(run, row)) for top in tops]


def top_layers(run: Run, row: int) -> tuple[tuple[str, float], ...]:
    """The layers with the largest shares of the squared norm of a step, if it has any."""
    place = int(np.searchsorted(run.layers.rows, row))
    if place == len(run.layers.rows) or run.layers.rows[place] != row:
        return ()
    shares = shares_at(run, np.array([place]))[0]
    order = np.argsort(-shares, kind="stable")[:SHOWN]
    return tuple((run.layers.names[k], float(shares[k])) for k in order if shares[k] > 0)


def shares_at(run: Run, places: Steps) -> Floats:
    """(places, names): the share that each layer has of the squared norm; 0 where it logged none."""
    norms = run.layers.norms[places].astype(np.float64)
    with np.errstate(all="ignore"):
        shares: Floats = np.square(norms / run.norm[run.layers.rows[places]][:, None])
    return np.where(np.isfinite(shares), np.minimum(shares, 1.0), 0.0)


def shift_of(level: Level) -> Shift | None:
    """The largest change of the level between two windows of five blocks, if it is one, and sudden."""
    medians, width = level.medians, 2 * AROUND + 1
    if len(medians) < 2 * width:
        return None
    windows = np.log(np.median(np.lib.stride_tricks.sliding_window_view(medians, width), axis=1))
    jumps = windows[width:] - windows[:-width]
    place = int(np.argmax(np.abs(jumps)))
    block = place + width  # the first after the change
    sudden = abs(float(np.log(medians[min(block + 1, len(medians) - 1)] / medians[block - 2])))
    if abs(jumps[place]) < np.log(SHIFT) or sudden < 0.7 * abs(jumps[place]):
        return None
    before, after = np.exp(windows[place]), np.exp(windows[place + width])
    return Shift(int(level.rows[block * level.size]), float(before), float(after))
