"""The steps since the last record: kept as they are, and copied to the host when a record is due.

A step in between costs a reference: its numbers stay on the device. Only when they are on the host is it known which of
the steps were skipped or not finite; each of these becomes a record of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, isfinite

import torch

from ..kernels.transfer import Transfer
from ..report import Report
from . import keys
from .record import Record, numbers_of, tensors_of

MOST = 100  # steps that are kept where whoever decides when a record is due may decide so never


@dataclass(frozen=True, slots=True)
class Sent:
    """Steps whose numbers are on their way. ``due``: whether the last one gets a record whatever it did."""

    steps: Sequence[tuple[Report, int]]
    due: bool
    transfer: Transfer

    def read(self) -> list[Record]:
        """Wait for them."""
        numbers = iter(self.transfer.read())
        return [(numbers_of(each, list(islice(numbers, _width(each)))), step) for each, step in self.steps]


class Window:
    """The steps since the last record; who uses it decides when that is, and how many are kept until then."""

    def __init__(self) -> None:
        self._kept: list[tuple[Report, int]] = []
        self._sent: Sent | None = None
        self._steps, self._clipped, self._largest = 0, 0.0, -inf  # of those that were received since the last record

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, report: Report, step: int) -> None:
        # What a policy reports of itself may be its state, which the next step overwrites in place.
        own = replace(report, extra={name: each.clone() for name, each in report.extra.items()})
        self._kept.append((own if report.extra else report, step))

    def send(self, due: bool) -> None:
        """Start copying what was added, without a wait. ``due``: the last step gets a record."""
        assert self._sent is None, "what was sent before is received first"
        if self._kept:
            rows = torch.cat([each for report, _ in self._kept for each in tensors_of(report)])
            self._sent, self._kept = Sent(self._kept, due, Transfer.begin(rows)), []

    def receive(self) -> list[Record]:
        """Wait for what was sent, if anything was; the records of it, which may be none."""
        if self._sent is None:
            return []
        sent, self._sent = self._sent, None
        records = sent.read()
        for numbers, _ in records:
            self._count(numbers)
        *between, (last, step) = records
        bad = [record for record in (between if sent.due else records) if _is_bad(record[0])]
        return [*bad, (last | self._counts(), step)] if sent.due else bad

    def records(self, due: bool) -> list[Record]:
        """The records so far, waited for; nothing where no record is ``due`` and there is room for more steps."""
        if not due and len(self) < MOST:
            return []
        self.send(due)
        return self.receive()

    @property
    def has_arrived(self) -> bool:
        """Whether something was sent, and :meth:`receive` would not wait for it: it was on the host."""
        return self._sent is not None and self._sent.transfer.arrived is None

    def _count(self, numbers: dict[str, float]) -> None:
        norm = numbers[keys.PRE_CLIP]
        self._steps += 1
        self._clipped += numbers[keys.CLIPPED]
        self._largest = max(self._largest, norm) if isfinite(norm) else self._largest

    def _counts(self) -> dict[str, float]:
        """Those since the last record, which begin anew."""
        largest = {keys.LARGEST: self._largest} if self._largest > -inf else {}
        counts = {keys.FRACTION: self._clipped / self._steps, **largest}
        self._steps, self._clipped, self._largest = 0, 0.0, -inf
        return counts


def _width(report: Report) -> int:
    return 4 + len(report.norms) + len(report.extra)


def _is_bad(numbers: dict[str, float]) -> bool:
    return bool(numbers[keys.SKIPPED]) or not isfinite(numbers[keys.PRE_CLIP])
