"""A call left by an exception, of a policy, a signal handler or the optimizer: ranks may be a step apart after it."""

from ..errors import FAILURES, LayoutError, NonFiniteError
from ..ranks.group import ClippingGroup
from ..ranks.refusals import in_short
from ..ranks.stopped import tell
from . import refusals
from .calls import Calls


class Interruption:
    """An exception that only this rank has met. The others are told if they wait, and all raise in the next call.

    Until the ranks have decided, those in ``FAILURES`` are no error of the next call: as a rule they are raised on all
    ranks together, and nothing has changed. Afterwards the other ranks step, whatever the exception is.
    """

    __slots__ = ("_calls", "_group", "fault")

    def __init__(self, group: ClippingGroup, calls: Calls) -> None:
        self._group, self._calls = group, calls
        self.fault: LayoutError | None = None  # raised by every rank in the next call

    def leave(self, verb: str, error: BaseException, committed: bool) -> None:
        """``error`` leaves this call of an engine; ``committed``: after the ranks had decided."""
        calls, verbs = self._calls, ("measure", "fingerprint", "verify")
        looks = dict(zip(verbs, (calls.measurement, calls.fingerprinting, calls.verification), strict=True)).get(verb)
        if not isinstance(error, NonFiniteError):  # which all ranks raise
            name = calls.name_of_step(committed) if looks is None else looks().name
            tell(self._group, name, in_short(error))
        alarm = isinstance(error, TimeoutError)  # in FAILURES as an OSError, but a signal handler raises it anywhere
        if looks is None and (committed or alarm or not isinstance(error, FAILURES)):
            self._note(type(error))

    def record(self, kind: type[BaseException]) -> None:
        """An exception of this ``kind`` has kept this rank from a step that the others have made."""
        tell(self._group, self._calls.name_of_step(committed=True), kind.__name__)
        self._note(kind)

    def forget(self) -> None:
        """A state was loaded, on all ranks."""
        self.fault = None

    def _note(self, kind: type[BaseException]) -> None:
        if self._group.size > 1:  # a single process can go on as it is
            self.fault = refusals.interrupted(kind.__name__)
