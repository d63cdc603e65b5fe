"""`metrics.jsonl`: one JSON object per step, and none twice when a run resumes.

Numbers are spelled as telemetry/json_lines.py says.
"""

import json
import os
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, TextIO

from distclip.telemetry.json_lines import to_json
from distclip.train.problem import require

NEEDED: dict[str, Any] = {"step": int, "skip": bool, "coef": (int, float, str)}  # what a run that goes on counts again


def read_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of the first `step` steps."""
    return [record for record in read_records(path) if record["step"] <= step]


def read_records(path: Path) -> list[dict[str, Any]]:
    """One record per step; a last line that a killed run truncated is ignored.

    Raises:
        ConfigError: names the first line that is no record.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [record_in(line, f"{path}, line {n}") for n, line in enumerate(file, 1) if line.endswith(b"\n")]


def record_in(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    right = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in NEEDED.items())
    right = right and all(isinstance(value, (int, float, str, NoneType)) for value in record.values())
    require(right, where, "is not the record of a step: cut the file before it, or go on in another folder")
    return record  # type: ignore[no-any-return]


class MetricsFile:
    """Appends records, each line written at once, so that a run can be watched and killed."""

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
