"""Steps whose norm is not finite: whom they come from, what becomes of them, and how many may come in a row."""

from dataclasses import dataclass
from typing import Literal, TypeAlias
from warnings import warn

from ..errors import NonFiniteError
from ..plan.build import Plan
from ..plan.culprit import find_culprit
from ..plan.measure import norms_of
from ..plan.measured import Measured
from ..plan.refusals import ABSENT, nonfinite
from ..report import Culprit

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
            warn(f"no gradient on this rank, and a norm of 0 over all: {ABSENT}", RuntimeWarning, stacklevel=6)

    def add(self, plan: Plan, measured: Measured) -> Culprit:
        """A step had a norm that is not finite: name the culprit, count, and raise where that was asked for.

        Three all-reduces: see :func:`find_culprit`.
        """
        self.culprit = find_culprit(plan, norms_of(plan, measured))
        if self.mode == "raise":
            raise nonfinite(plan.p, self.culprit, "To skip such steps on all ranks, say nonfinite='skip'")
        if self.mode == "skip":
            self.skips += 1
            if self.most is not None and self.skips > self.most:
                raise NonFiniteError(
                    f"{self.skips} steps in a row had a norm that is not finite: {self.culprit}; "
                    f"max_consecutive_skips={self.most} allows no more"
                )
        return self.culprit
