"""One JSON object a record, as `metrics.jsonl` of the trainer has them.

JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", which Python's and
JavaScript's number parsers read back.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ..report import Fingerprint
from .record import texts_of


class JsonLines:
    """Appends a line for each record, ``{"step": 10, ...}``, and hands each to the system at once.

    A fingerprint, which no float can hold, has a line of its own, before that of its step.

    A crash loses the last line at most: one that was cut is removed before the next is written. A run that is resumed
    from an earlier step writes its steps again; the later line of a step counts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **numbers})

    def fingerprint(self, fingerprint: Fingerprint, step: int) -> None:
        """What :class:`.log.Log` calls beside records."""
        self._write({"step": step, **texts_of(fingerprint)})

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:  # not before: other ranks have the same sink, and never write
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            cut_to_whole_lines(self.path)
        self._file.write(to_json(record) + "\n")

    def close(self) -> None:
        """A record after this opens the file again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def cut_to_whole_lines(path: Path) -> None:
    """Remove a last line that a crash has cut, to which the next would be joined."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 4096)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


def to_json(record: Mapping[str, Any]) -> str:
    return json.dumps({key: spelled(value) for key, value in record.items()}, allow_nan=False)


def spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
