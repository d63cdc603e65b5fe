"""A call that was broken off, by a signal handler or in the optimizer's step: ranks may be a step apart after it."""

from types import TracebackType

from ..errors import FAILURES, LayoutError


class BrokenOff:
    """Watches calls, as a context that may be nested, and says of one that was broken off how to go on.

    What is among ``FAILURES`` has an answer of its own until the ranks have decided: they raise together, and nothing
    has changed. After that the others go on, whatever it is.
    """

    __slots__ = ("_by", "_decided", "_in_group")

    def __init__(self, in_group: bool) -> None:
        """``in_group``: there are other ranks. One process alone goes on as it is."""
        self._in_group = in_group
        self._by: str | None = None
        self._decided = False

    def __enter__(self) -> None:
        self._decided = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            return
        alarm = issubclass(kind, TimeoutError)  # an OSError that handlers raise, wherever the call is
        if self._decided or alarm or not issubclass(kind, FAILURES):
            self.note(kind)

    def decided(self) -> None:
        """The ranks have decided in this call, and the others will step."""
        self._decided = True

    def note(self, kind: type[BaseException]) -> None:
        """An exception of this ``kind`` has broken a step off after the ranks had decided."""
        if self._in_group:
            self._by = kind.__name__

    def fault(self) -> LayoutError | None:
        """What every rank is told in the next call."""
        if self._by is None:
            return None
        return LayoutError(
            f"an earlier call was broken off by {self._by} on this rank, so that ranks may be a step apart: load one "
            "checkpoint on every rank, model and optimizer and Clipper.load_state_dict(), or start anew"
        )

    def forget(self) -> None:
        """All ranks have begun anew."""
        self._by = None
