"""The steps since the last record: kept as they are, and copied to the host when a record is due.

A step in between costs a reference: its numbers stay on the device. Only when they are on the host is it known which of
the steps were skipped or not finite; each of these becomes a record of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import NamedTuple

from ..kernels.transfer import Transfer
from ..report import Report
from . import keys
from .record import Record, is_clipped, numbers_of, row_of, width

MOST = 100  # steps that are kept where whoever decides when a record is due may decide so never


class Row(NamedTuple):
    """The numbers of a step, in the order of :func:`.record.row_of`."""

    report: Report
    step: int
    numbers: list[float]

    @property
    def is_bad(self) -> bool:
        return bool(self.numbers[3]) or not isfinite(self.numbers[0])

    def record(self) -> Record:
        return numbers_of(self.report, self.numbers), self.step


@dataclass(frozen=True, slots=True)
class Sent:
    """Steps whose numbers are on their way. ``due``: whether the last one gets a record whatever it did."""

    steps: Sequence[tuple[Report, int]]
    due: bool
    transfer: Transfer

    def read(self) -> list[Row]:
        """Wait for them."""
        numbers, end, rows = self.transfer.read(), 0, []
        for report, step in self.steps:
            begin, end = end, end + width(report)
            rows.append(Row(report, step, numbers[begin:end]))
        return rows


class Window:
    """The steps since the last record; who uses it decides when that is, and how many are kept until then."""

    def __init__(self) -> None:
        self._kept: list[tuple[Report, int]] = []
        self._sent: Sent | None = None
        self._steps, self._clipped, self._largest = 0, 0, -inf  # of those that were received since the last record

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, report: Report, step: int) -> None:
        if report.extra:  # which may be a policy's state, that the next step overwrites in place
            report = replace(report, extra={name: each.clone() for name, each in report.extra.items()})
        self._kept.append((report, step))

    def send(self, due: bool) -> None:
        """Start copying what was added, without a wait. ``due``: the last step gets a record."""
        assert self._sent is None, "what was sent before is received first"
        if self._kept:
            transfer = Transfer.begin(row_of([report for report, _ in self._kept]))
            self._sent, self._kept = Sent(self._kept, due, transfer), []

    def receive(self) -> list[Record]:
        """Wait for what was sent, if anything was; the records of it, which may be none."""
        if self._sent is None:
            return []
        sent, self._sent = self._sent, None
        rows = sent.read()
        for row in rows:
            self._count(*row.numbers[:3])
        *between, last = rows
        bad = [row.record() for row in (between if sent.due else rows) if row.is_bad]
        if not sent.due:
            return bad
        numbers, step = last.record()
        return [*bad, (numbers | self._counts(), step)]

    def records(self, due: bool) -> list[Record]:
        """The records so far, waited for; none where no record is ``due`` and there is room for more steps."""
        return self.rest(due) if due or len(self) >= MOST else []

    def rest(self, due: bool = False) -> list[Record]:
        """The records of all that was added, waited for: of bad steps, and of the last one if it is ``due``."""
        self.send(due)
        return self.receive()

    @property
    def has_arrived(self) -> bool:
        """Whether something was sent, and :meth:`receive` would not wait for it: it was on the host."""
        return self._sent is not None and self._sent.transfer.arrived is None

    def _count(self, norm: float, _: float, coef: float) -> None:
        self._steps += 1
        self._clipped += is_clipped(coef)
        self._largest = max(self._largest, norm) if isfinite(norm) else self._largest

    def _counts(self) -> dict[str, float]:
        """Those since the last record, which begin anew."""
        largest = {keys.LARGEST: self._largest} if self._largest > -inf else {}
        counts = {keys.FRACTION: self._clipped / self._steps, **largest}
        self._steps, self._clipped, self._largest = 0, 0, -inf
        return counts
