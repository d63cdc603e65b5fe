"""A call that was broken off, by a signal handler or in the optimizer's step: ranks may be a step apart after it."""

from ..errors import FAILURES, LayoutError
from . import refusals


class Interruption:
    """Knows of a call that was broken off, and says how to go on.

    What is among ``FAILURES`` has an answer of its own until the ranks have decided: they raise together, and nothing
    has changed. After that the others go on, whatever it is.
    """

    __slots__ = ("_in_group", "fault")

    def __init__(self, in_group: bool) -> None:
        """``in_group``: there are other ranks. One process alone goes on as it is."""
        self._in_group = in_group
        self.fault: LayoutError | None = None  # what every rank is told in the next call

    def record_unless_shared(self, kind: type[BaseException], committed: bool) -> None:
        """A call was left by an exception of this ``kind``; ``committed``: after the ranks had decided."""
        alarm = issubclass(kind, TimeoutError)  # an OSError that handlers raise, wherever the call is
        if committed or alarm or not issubclass(kind, FAILURES):
            self.record(kind)

    def record(self, kind: type[BaseException]) -> None:
        """An exception of this ``kind`` has broken a step off after the ranks had decided."""
        if self._in_group:
            self.fault = refusals.interrupted(kind.__name__)

    def forget(self) -> None:
        """All ranks have begun anew."""
        self.fault = None
