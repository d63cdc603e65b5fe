"""Log: the records of a Clipper, every few steps, to sinks."""

from types import TracebackType
from typing import Self

from ..clipper import Clipper
from ..report import Report
from .record import Record
from .sink import Guarded, Sink
from .window import Window


class Log:
    """Writes what ``clipper`` does to ``sinks``, from now on: in a loop, under :func:`attach` and in frameworks.

    * ``sinks``: functions of the numbers, by the names in :mod:`distclip.telemetry.keys`, and the step, counted as
      ``clipper.steps``: ``accelerator.log``, ``fabric.log_dict``, or one of this package.
    * ``every``: how many steps there are from record to record. A step in between that is skipped, or whose norm is not
      finite, has a record too; that is written with the next one, steps in order.

    Only the first rank of the Clipper's group calls the sinks; the numbers are the same on all. A sink that raises is a
    warning, once, and is called again with the next record.

    No collective. On an accelerator no host sync but one a record, on all ranks alike: the numbers are read in the step
    after, so that they have arrived by then. Kept meanwhile: the reports of ``every`` steps.

    ``close``, or leaving ``with Log(...)``, writes what has not been written, the last step with it. Replays of a CUDA
    graph have no records.
    """

    def __init__(self, clipper: Clipper, *sinks: Sink, every: int = 10) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps, 1 or more, got {every!r}")
        if not sinks or not all(map(callable, sinks)):
            raise ValueError(
                f"Log takes functions of the numbers and the step, got {list(sinks)}: JsonLines(path) makes one"
            )
        self.every = every
        self._sinks = list(map(Guarded, sinks)) if clipper.engine.plan.group.rank == 0 else []
        self._window, self._latest = Window(), 0
        self._handle = clipper.register_report_hook(self._add)

    def close(self) -> None:
        """Write the rest, close the sinks that can be closed, and leave the Clipper; waits for the device."""
        self._handle.remove()
        self._write(self._window.receive())
        self._write(self._window.rest(due=True))
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, report: Report, step: int) -> None:
        self._write(self._window.receive())  # of the step before, on an accelerator
        if step <= self._latest:  # a state of an earlier step was loaded: what is not written never was
            self._window = Window()
        self._latest = step
        if report.fingerprint is not None:
            for sink in self._sinks:
                sink.fingerprint(report.fingerprint, step)
        self._window.add(report, step)
        if step % self.every == 0 or len(self._window) >= self.every:  # as where a loaded state had other steps
            self._window.send(due=True)
            if self._window.has_arrived:
                self._write(self._window.receive())

    def _write(self, records: list[Record]) -> None:
        for numbers, step in records:
            for sink in self._sinks:
                sink.write(numbers, step)
