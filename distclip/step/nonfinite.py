"""Steps whose norm is not finite: what caused them, what they do, and how many may come in a row."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import warn_user
from ..plan.build import Plan
from ..plan.culprit import culprit_of
from ..plan.measured import Measured
from ..plan.refusals import nonfinite
from ..report import Culprit
from . import refusals

Nonfinite: TypeAlias = Literal["skip", "raise", "propagate"]
MODES: tuple[Nonfinite, ...] = ("skip", "raise", "propagate")


@dataclass(slots=True)
class Streak:
    """Non-finite steps in a row.

    * ``mode``: ``nonfinite`` of a :class:`Clipper`; ``limit``: its ``max_consecutive_skips``.
    * ``skips``: how many in a row were skipped up to now.
    * ``culprit``: of the latest step; None if its norm was finite.
    """

    mode: Nonfinite
    limit: int | None
    skips: int = 0
    culprit: Culprit | None = None
    warned: bool = False  # of a step without any gradient

    def record_finite(self, norm: float, has_gradients: bool) -> None:
        """A step had a finite ``norm``. Warns, once, where it was 0 and this rank had no gradient."""
        self.skips, self.culprit = 0, None
        if norm == 0 and not has_gradients and not self.warned:
            self.warned = True
            warn_user(refusals.NO_GRADIENT)

    def record_nonfinite(self, plan: Plan, measured: Measured) -> Culprit:
        """A step had a norm that is not finite: find the culprit, count, and raise as ``mode`` and ``limit`` say.

        Three all-reduces, or none, so every rank must call it: see :func:`culprit_of`.
        """
        self.culprit = culprit_of(plan, measured)
        if self.mode == "raise":
            raise nonfinite(plan.p, self.culprit, refusals.SKIP_INSTEAD)
        if self.mode == "skip":
            self.skips += 1
            if self.limit is not None and self.skips > self.limit:
                raise refusals.too_many_skips(self.skips, self.culprit, self.limit)
        return self.culprit
