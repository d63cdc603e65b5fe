"""A call left by an exception, of a signal handler or the optimizer's step: ranks may be a step apart after it."""

from ..errors import FAILURES, LayoutError
from . import refusals


class Interruption:
    """An exception that only this rank has met, which all ranks raise in the next call.

    Until the ranks have decided, those in ``FAILURES`` need no such thing: they are raised on all ranks together, and
    nothing has changed. Afterwards the other ranks step, whatever the exception is.
    """

    __slots__ = ("_in_group", "fault")

    def __init__(self, in_group: bool) -> None:
        """``in_group``: there are other ranks. A single process can go on as it is."""
        self._in_group = in_group
        self.fault: LayoutError | None = None  # raised by every rank in the next call

    def record_unless_shared(self, kind: type[BaseException], committed: bool) -> None:
        """A call was left by an exception of this ``kind``; ``committed``: after the ranks had decided."""
        alarm = issubclass(kind, TimeoutError)  # in FAILURES as an OSError, but a signal handler raises it anywhere
        if committed or alarm or not issubclass(kind, FAILURES):
            self.record(kind)

    def record(self, kind: type[BaseException]) -> None:
        """An exception of this ``kind`` has kept this rank from a step that the others have made."""
        if self._in_group:
            self.fault = refusals.interrupted(kind.__name__)

    def forget(self) -> None:
        """A state was loaded, on all ranks."""
        self.fault = None
