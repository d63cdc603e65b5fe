"""Where records go: any function, and what happens when it fails."""

from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

from ..errors import warn_user
from ..report import Fingerprint

Sink: TypeAlias = Callable[[dict[str, float], int], object]
"""Called with the numbers of a step and the step; what it returns is ignored. If it has a ``close``, Log calls it, and
``fingerprint(fingerprint, step)`` of steps that have one."""


class Guarded:
    """A sink that never stops training: what it raises is a warning, once, and the next record is tried again.

    A tracker that is away for an hour of a long run loses that hour, and no more.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._failed = False

    def write(self, numbers: dict[str, float], step: int) -> None:
        with self:
            self.sink(dict(numbers), step)  # of its own: trackers add to what they are given

    def fingerprint(self, fingerprint: Fingerprint, step: int) -> None:
        with self:
            getattr(self.sink, "fingerprint", lambda *_: None)(fingerprint, step)

    def close(self) -> None:
        with self:
            getattr(self.sink, "close", lambda: None)()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """Whatever a tracker raises ends here; not KeyboardInterrupt and its like."""
        if not isinstance(error, Exception):
            return False
        if not self._failed:
            self._failed = True
            name = getattr(self.sink, "__qualname__", type(self.sink).__name__)
            warn_user(
                f"{name} failed, so that a record of the Log is lost: {type(error).__name__}: {error}. Training goes "
                "on, each record is tried once, and further failures are not shown"
            )
        return True
