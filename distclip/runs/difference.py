"""Where two runs part: the first step that is not the same, the parameters that tell, and the drift from there.

Compared are the numbers as they were written; one NaN is the same as another. What a run did not write in a step is
not compared there, with two exceptions: its bound is the one that it wrote last, unless it writes one with every norm,
and a step that it does not call skipped was not, if it ever writes what was skipped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distclip.runs.refusals import no_step_in_common, nothing_to_compare
from distclip.runs.run import Bools, Floats, Run, Series, Steps

AFTER = (0, 1, 10, 100)  # steps after the first that differs, of those that are compared
DRIFTING = ("loss", "norm")
FILLED_IN = ("max_norm", "skip")  # compared in steps in which a run did not write them, too
LAYER, PRINT = "norm/", "fingerprint"


class Column(NamedTuple):
    """What both runs have under one name: their steps, ascending, in which of them they differ, and numbers, if any.

    ``name``: of fingerprints ``"fingerprint"`` for all, ``"fingerprint/<parameter>"`` for each.
    """

    name: str
    steps: Steps
    odd: Bools
    mine: Floats | None = None
    theirs: Floats | None = None

    @property
    def first(self) -> int | None:
        """The first step that differs."""
        return int(self.steps[np.argmax(self.odd)]) if self.odd.any() else None


@dataclass(frozen=True, slots=True)
class Drift:
    """How far apart a column is, relative to the larger number: by step, and where it is farthest."""

    by_step: Mapping[int, float]
    largest: float
    largest_step: int


@dataclass(frozen=True, slots=True)
class Parting:
    """Where runs part.

    * ``step``: the first in which any column differs; ``columns``: those that do, but for single parameters'.
    * ``parameters``: those whose fingerprints differ in ``parameters_step``, the first in which any does; where none
      does, those whose norms differ in ``step``. ``of``: how many have one; ``by``: ``"fingerprint"`` or ``"norm"``.
    * ``drifts``: of loss and norm, from ``step`` on.
    """

    step: int
    columns: tuple[str, ...]
    parameters: tuple[str, ...]
    parameters_step: int
    of: int
    by: str
    drifts: Mapping[str, Drift]


@dataclass(frozen=True, slots=True)
class Difference:
    """What was compared, and where the runs part; ``parting`` is None where they do not.

    ``steps``: how many both have, from ``first`` to ``last``; ``alone``: how many only the one has, and only the other.
    ``prints``: how many of them have fingerprints in both.
    """

    steps: int
    first: int
    last: int
    alone: tuple[int, int]
    columns: tuple[str, ...]
    prints: int
    parting: Parting | None


def difference(one: Run, other: Run) -> Difference:
    """Compare two runs.

    Raises:
        RunError: they have no step in common, or nothing in it.
    """
    mine, theirs = one.logged, other.logged
    steps = np.intersect1d(mine, theirs, assume_unique=True)
    if not len(steps):
        raise no_step_in_common(one, other)
    columns = [*numbers_of(one, other, steps), *prints_of(one, other)]
    if all(each.name in FILLED_IN for each in columns):
        raise nothing_to_compare(one, other)
    firsts = [each.first for each in columns if each.first is not None]
    return Difference(
        steps=len(steps),
        first=int(steps[0]),
        last=int(steps[-1]),
        alone=(len(mine) - len(steps), len(theirs) - len(steps)),
        columns=tuple(dict.fromkeys(kind_of(each.name) for each in columns)),
        prints=max((len(each.steps) for each in columns if each.name.startswith(PRINT)), default=0),
        parting=parting(columns, min(firsts)) if firsts else None,
    )


def numbers_of(one: Run, other: Run, steps: Steps) -> Iterator[Column]:
    """Loss, norms and what was done with them; ``steps``: those in which both runs wrote anything."""
    for name, mine in one.written.items():
        theirs = other.written.get(name)
        if theirs is None:
            continue
        read: Callable[[Series, Steps], Floats]
        match name:
            case "max_norm":
                at, read = np.intersect1d(bounded(one, steps), bounded(other, steps), assume_unique=True), Series.up_to
            case "skip":
                at, read = steps, skipped
            case _:
                at, read = np.intersect1d(mine.step, theirs.step, assume_unique=True), Series.at
        if len(at):
            left, right = read(mine, at), read(theirs, at)
            yield Column(name, at, differ(left, right), left, right)


def bounded(run: Run, steps: Steps) -> Steps:
    """Those of ``steps`` in which the run's bound is known: it is held, or is one of many samples."""
    bound, norm = run.written["max_norm"].step, run.written.get("norm")
    sampled = norm is not None and np.isin(norm.step, bound).all()
    return np.intersect1d(steps, bound, assume_unique=True) if sampled else steps[steps >= bound[0]]


def skipped(series: Series, steps: Steps) -> Floats:
    return (series.at(steps) > 0).astype(np.float64)


def prints_of(one: Run, other: Run) -> Iterator[Column]:
    """Fingerprints that both have; that of all unless they name other parameters."""
    alike = one.prints.keys() == other.prints.keys() or {""} in (one.prints.keys(), other.prints.keys())
    for name, mine in one.prints.items():
        theirs = other.prints.get(name, {})
        steps = sorted(mine.keys() & theirs.keys())
        if steps and (name or alike):
            odd = np.array([mine[step] != theirs[step] for step in steps])
            yield Column(f"{PRINT}/{name}" if name else PRINT, np.array(steps), odd)


def differ(mine: Floats, theirs: Floats) -> Bools:
    odd: Bools = (mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs))
    return odd


def kind_of(name: str) -> str:
    """Without the parameter: one word for all norms of layers, and for all fingerprints."""
    return name.partition("/")[0] if name.startswith(f"{PRINT}/") else "norms of layers" if LAYER in name else name


def parting(columns: Sequence[Column], step: int) -> Parting:
    """Where these part, in ``step`` first."""
    prints = [each.first for each in columns if each.name.startswith(PRINT) and each.first is not None]
    at, by = (min(prints), PRINT) if prints else (step, "norm")
    odd, of = named(columns, f"{by}/", at)
    return Parting(
        step=step,
        columns=tuple(dict.fromkeys(kind_of(each.name) for each in columns if each.first == step)),
        parameters=odd,
        parameters_step=at,
        of=of,
        by=by,
        drifts={each.name: drift(each, step) for each in columns if each.name in DRIFTING and each.steps[-1] >= step},
    )


def named(columns: Sequence[Column], prefix: str, step: int) -> tuple[tuple[str, ...], int]:
    """The parameters with such columns that differ first in ``step``, and how many there are."""
    those = [each for each in columns if each.name.startswith(prefix)]
    return tuple(each.name.removeprefix(prefix) for each in those if each.first == step), len(those)


def drift(column: Column, step: int) -> Drift:
    """How a column drifts from ``step`` on."""
    begin = int(np.searchsorted(column.steps, step))
    assert column.mine is not None
    assert column.theirs is not None
    steps, mine, theirs = column.steps[begin:], column.mine[begin:], column.theirs[begin:]
    apart = np.where(column.odd[begin:], relative(mine, theirs), 0.0)
    places = [k for k in AFTER if k < len(steps)] + [len(steps) - 1]
    top = int(np.argmax(apart))
    return Drift({int(steps[k]): float(apart[k]) for k in places}, float(apart[top]), int(steps[top]))


def relative(mine: Floats, theirs: Floats) -> Floats:
    """|mine - theirs| by the larger of both; inf where one is not finite, or both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        larger = np.maximum(np.abs(mine), np.abs(theirs))
        unit = np.where(larger > 1, 0.5, 1.0)  # else the difference of numbers beyond half the largest would be inf
        apart = np.abs(mine * unit - theirs * unit) / (larger * unit)
    return np.where(np.isfinite(apart), apart, np.inf)
