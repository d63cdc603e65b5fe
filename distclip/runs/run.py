"""One run, in columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Steps: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """Norms by layer, or by whatever else was logged by name.

    ``rows``: (m,) the steps that have them, as places in the columns of the run. ``norms``: (m, names).
    """

    names: tuple[str, ...] = ()
    rows: Steps = field(default_factory=lambda: np.zeros(0, np.int64))
    norms: Floats = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A run: its columns are as long as there are steps with a norm, steps ascend, and none is there twice.

    * ``norm``: before clipping, or what the program logged; NaN and inf are what the run had.
    * ``max_norm``, ``coef``, ``loss``: NaN where the run logged none. ``skip``: whether the step was not taken.
    * ``written``: the numbers that it logged, by the names above and ``norm/<layer>``, also in steps without a norm.
    * ``culprits``: by step, where a norm that is not finite came from.
    * ``prints``: fingerprints by parameter, "" for all, and step.
    * ``notes``: what the reader of the file should know, each a sentence.
    """

    name: str
    path: Path
    program: str
    step: Steps
    norm: Floats
    max_norm: Floats
    coef: Floats
    skip: Bools
    loss: Floats
    written: Mapping[str, "Series"] = field(default_factory=dict)
    layers: Layers = field(default_factory=Layers)
    culprits: Mapping[int, str] = field(default_factory=dict)
    prints: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def logged(self) -> Steps:
        """The steps in which it logged any number or fingerprint, ascending."""
        steps = self.step
        for each in self.written.values():
            if not np.array_equal(each.step, steps):
                steps = np.union1d(steps, each.step)
        return np.union1d(steps, np.fromiter({step for each in self.prints.values() for step in each}, np.int64))

    @property
    def finite(self) -> Bools:
        return np.isfinite(self.norm)

    @property
    def bounded(self) -> bool:
        """Whether the run says what it clipped."""
        return bool(np.isfinite(self.coef).any() or np.isfinite(self.max_norm).any())

    @property
    def clipped(self) -> Bools:
        """By the coefficient, else by the bound; False in steps that were skipped, and where nothing tells."""
        by_bound: Bools = self.norm > self.max_norm  # False for NaN
        clipped: Bools = np.where(np.isnan(self.coef), by_bound, self.coef != 1)
        return clipped & ~self.skip & self.finite & (self.norm > 0)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """What a program logged under one name: (n,) steps and values, in the order of the file."""

    step: Steps
    value: Floats

    def latest(self) -> "Series":
        """In ascending order of steps, of each only what was logged last."""
        if (np.diff(self.step) > 0).all():
            return self
        order = np.argsort(self.step, kind="stable")
        step = self.step[order]
        last = np.append(step[1:] != step[:-1], True)
        return Series(step[last], self.value[order][last])

    def at(self, steps: Steps) -> Floats:
        """The values of exactly these steps, NaN where there is none."""
        place = np.searchsorted(self.step, steps).clip(max=len(self.step) - 1)
        found: Floats = np.where(self.step[place] == steps, self.value[place], np.nan)
        return found

    def up_to(self, steps: Steps) -> Floats:
        """The last value logged up to each of these steps, NaN before the first."""
        place = np.searchsorted(self.step, steps, side="right") - 1
        found: Floats = np.where(place >= 0, self.value[place], np.nan)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """What a reader found in a file: series and texts by the names that the program gave them."""

    name: str
    path: Path
    program: str
    columns: Sequence[str]  # all there are, for messages
    series: Mapping[str, Series]
    texts: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)  # by name and step
    notes: tuple[str, ...] = ()
