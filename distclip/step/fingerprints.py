"""The fingerprints of one Clipper: in which steps they are due, and how they are made of what was measured."""

from functools import partial

from ..plan.build import Plan
from ..plan.construction import agreed
from ..plan.fingerprint import Prints
from ..plan.measured import Measured
from ..report import Fingerprint
from . import refusals
from .calls import Call


class Fingerprints:
    """Those of one Clipper's gradients, in steps number ``every``, 2 * ``every``, ...; None: in none."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._prints: Prints | None = None  # what ranks agree on once, before the first

    def prepare(self, plan: Plan) -> None:
        """Where steps make fingerprints, let ranks agree now on what they are of, or all raise."""
        if self._every is not None:
            self._agree(plan)

    def in_step(self, plan: Plan, step: int, measured: Measured, call: Call) -> Fingerprint | None:
        """That of ``step``, counted from 1; None where none is due."""
        return None if self._every is None or step % self._every else self.of(plan, measured, call)

    def of(self, plan: Plan, measured: Measured, call: Call) -> Fingerprint:
        """Of what was ``measured`` in this ``call``, on all ranks, or LayoutError on all.

        One all-reduce of two int64 numbers a parameter and two more, with a host sync, and another host sync on
        accelerators. The first one lets ranks agree before, where :meth:`prepare` has not.
        """
        if measured.reduced.read()[1]:
            raise refusals.ranks_disagree(measured.reduced.who)
        found = (self._prints or self._agree(plan)).fingerprint(measured.gradients, call.tag, call.name)
        if found is None:
            raise refusals.ranks_disagree()
        return found

    def _agree(self, plan: Plan) -> Prints:
        self._prints = agreed(plan, (), partial(Prints.of, plan), "fingerprints")
        return self._prints
