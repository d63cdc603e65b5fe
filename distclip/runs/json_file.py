"""JSON: lines of records (ours, telemetry's, anybody's), a list of them, columns, or a Transformers trainer_state.json.

The last line may be cut short: a crash loses that one.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from distclip.runs.names import Names, matters
from distclip.runs.refusals import empty, no_history, no_json
from distclip.runs.run import Log
from distclip.runs.table import Table, named
from distclip.telemetry import keys

CHUNK = 1 << 20  # bytes of lines that are parsed at once: by themselves a million take 1.3 times as long
CUT = "The last line is cut short, as a crash leaves it, and is left out."


def read_json(path: Path, names: Names, advance: Callable[[int], None]) -> list[Log]:
    """Read a file of JSON, of whichever kind it is.

    Raises:
        RunError: names the first line that is no JSON object, or says that there are no steps.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        first = file.readline()
        while first and not first.strip():
            first = file.readline()
        if not first:
            raise empty(path)
        file.seek(0)
        if is_record(first) or path.suffix in (".jsonl", ".ndjson"):
            return [read_lines(path, file, names, advance)]
        return [read_document(path, file, names, advance)]


def is_record(line: bytes) -> bool:
    """Whether it is a record of its own, and no document in one line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or isinstance(value.get("log_history"), list):
        return False
    return not value or not all(isinstance(each, (dict, list)) for each in value.values())  # else columns


def read_lines(path: Path, file: BinaryIO, names: Names, advance: Callable[[int], None]) -> Log:
    table, notes, before = Table(partial(matters, names=names)), [], 0
    while lines := file.readlines(CHUNK):
        records = parsed_at_once(lines)
        if records is None:
            records = parsed_singly(path, lines, before)
            if len(records) < sum(1 for line in lines if line.strip()):
                notes.append(CUT)
        table.add(records)
        before += len(lines)
        advance(sum(map(len, lines)))
    if not table.length:
        raise empty(path)
    return table.to_log(path, program_of(table), names, notes)


def parsed_at_once(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """The records of these lines, or None unless each is one."""
    try:
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        return None
    return records if len(records) == len(lines) and all(type(record) is dict for record in records) else None


def parsed_singly(path: Path, lines: list[bytes], before: int) -> list[dict[str, Any]]:
    """The same, line by line; empty lines, and a last one that was cut short, are left out."""
    records = []
    for number, line in enumerate(lines, before + 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                raise no_json(path, f"line {number}", reason(error)) from None
            continue  # only the last line of a file has no end
        if not isinstance(record, dict):
            raise no_json(path, f"line {number}", f"it holds {str(record)[:40]}")
        records.append(record)
    return records


def reason(error: ValueError | RecursionError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read as one"


def program_of(table: Table) -> str:
    if keys.PRE_CLIP in table.values:
        return "distclip telemetry"
    if {"norm", "max_norm", "coef", "skip"} <= table.values.keys():
        return "distclip train"
    return "W&B" if "_step" in table.values else "JSON lines"


def read_document(path: Path, file: BinaryIO, names: Names, advance: Callable[[int], None]) -> Log:
    content = file.read()
    advance(len(content))
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        raise no_json(path, f"line {error.lineno}", error.msg) from None
    except (ValueError, RecursionError):
        raise no_json(path, "line 1", "it cannot be read as one") from None
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        return log_of(document["log_history"], path, "Transformers", names)
    if isinstance(document, list):
        return log_of(document, path, "JSON", names)
    return log_of(records_of_columns(document), path, "JSON", names)


def records_of_columns(document: Any) -> list[Any]:
    """Columns as pandas writes them by default, {name: {row: value}}, or as lists, {name: [value]}."""
    columns = {}
    for name, column in document.items() if isinstance(document, dict) else ():
        if isinstance(column, (dict, list)):
            columns[name] = column if isinstance(column, dict) else dict(enumerate(column))
    rows = {row: None for column in columns.values() for row in column}
    return [{name: column[row] for name, column in columns.items() if row in column} for row in rows]


def log_of(records: list[Any], path: Path, program: str, names: Names) -> Log:
    table = Table(partial(matters, names=names))
    table.add([record for record in records if isinstance(record, dict)])
    if not table.length:
        raise no_history(path)
    return table.to_log(path, "W&B" if "_step" in table.values else program, names, name=named(path))
