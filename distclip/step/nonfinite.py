"""Steps whose norm is not finite: whom they come from, what becomes of them, and how many may come in a row."""

from dataclasses import dataclass
from typing import Literal, TypeAlias
from warnings import warn

from ..plan.build import Plan
from ..plan.culprit import find_culprit
from ..plan.measure import norms_of
from ..plan.measured import Measured
from ..plan.refusals import nonfinite
from ..report import Culprit
from . import refusals

Nonfinite: TypeAlias = Literal["skip", "raise", "propagate"]
MODES: tuple[Nonfinite, ...] = ("skip", "raise", "propagate")


@dataclass(slots=True)
class Streak:
    """``mode``: see ``nonfinite`` of a Clipper. ``most``: so many in a row are skipped, None for any number.

    ``skips``: how many came in a row up to now; ``culprit``: of the latest step, None if its norm was finite.
    """

    mode: Nonfinite
    most: int | None
    skips: int = 0
    culprit: Culprit | None = None
    warned: bool = False  # of a step without any gradient

    def end(self, norm: float, has_gradients: bool) -> None:
        """A step had a finite ``norm``; warn, once, of one that had no gradient at all."""
        self.skips, self.culprit = 0, None
        if norm == 0 and not has_gradients and not self.warned:
            self.warned = True
            warn(refusals.NO_GRADIENT, RuntimeWarning, stacklevel=6)

    def add(self, plan: Plan, measured: Measured) -> Culprit:
        """A step had a norm that is not finite: name the culprit, count, and raise where that was asked for.

        Three all-reduces: see :func:`find_culprit`.
        """
        self.culprit = find_culprit(plan, norms_of(plan, measured))
        if self.mode == "raise":
            raise nonfinite(plan.p, self.culprit, refusals.SKIP_INSTEAD)
        if self.mode == "skip":
            self.skips += 1
            if self.most is not None and self.skips > self.most:
                raise refusals.too_many_skips(self.skips, self.culprit, self.most)
        return self.culprit
