"""`metrics.jsonl`: one JSON object a step, and nothing twice when a run goes on.

JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", which
Python's and JavaScript's number parsers read back.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


def to_json(record: dict[str, Any]) -> str:
    return json.dumps({key: spelled(value) for key, value in record.items()}, allow_nan=False)


def spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of the first `step` steps; a last line that a killed run has cut short is not one."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in map(json.loads, whole) if record["step"] <= step]


class MetricsFile:
    """Appends records, each line at once on disk, so that a run can be watched and killed."""

    def __init__(self, path: Path, kept: list[dict[str, Any]]) -> None:
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(to_json(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(rewritten, path)
        self.file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(to_json(record) + "\n")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.file.close()
