"""CSV: Lightning's metrics.csv, a download of Weights & Biases' charts, or anybody's with a line of names."""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO, TypeVar

from distclip.runs.json_file import CUT
from distclip.runs.names import Names, matters
from distclip.runs.refusals import empty, no_table, no_text
from distclip.runs.run import Log
from distclip.runs.table import Table, named

T = TypeVar("T")
ROWS = 10_000  # at once
OF_A_RUN = re.compile(r"(?P<run>.+?) - (?P<name>.+?)(?P<of_a_group>__(?:MIN|MAX))?")  # a column of W&B's charts


def read_csv(path: Path, names: Names, advance: Callable[[int], None]) -> list[Log]:
    """Read a CSV file: one run, or those that a chart of W&B shows.

    Raises:
        RunError: it is no text, or names the first line that cannot be read.
        OSError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return logs_of(path, rows_of(path, file, advance), names)
    except UnicodeDecodeError:
        raise no_text(path) from None


def rows_of(path: Path, file: TextIO, advance: Callable[[int], None]) -> Iterator[list[list[str]]]:
    """The names of the columns alone, and then many rows at a time."""
    first, read = file.readline(), 0
    if not first.strip():
        raise empty(path)
    file.seek(0)
    rows = csv.reader(file, delimiter=max(",\t;", key=first.count))
    try:
        yield [next(rows)]
        while chunk := list(islice(rows, ROWS)):
            yield chunk
            advance(file.buffer.tell() - read)
            read = file.buffer.tell()
    except csv.Error as error:
        raise no_table(path, rows.line_num, error) from None


def logs_of(path: Path, chunks: Iterator[list[list[str]]], names: Names) -> list[Log]:
    (header,) = next(chunks)
    groups = runs_of_a_chart(header)
    table = Table() if groups else Table(partial(matters, names=names))
    notes = [CUT] if fill(table, path, header, chunks) else []
    if not table.length:
        raise empty(path)
    if groups:
        return [part(table, columns).to_log(path, "W&B", names, notes, run) for run, columns in groups.items()]
    program = "Lightning" if path.name == "metrics.csv" and {"epoch", "step"} <= {*header} else "CSV"
    return [table.to_log(path, program, names, notes, named(path))]


def fill(table: Table, path: Path, header: list[str], chunks: Iterator[list[list[str]]]) -> bool:
    """Add all rows to the table, and return whether the last of the file was cut short and is left out."""
    line, cut = 1, False
    for rows in chunks:
        odd = [k for k, row in enumerate(rows) if row and len(row) != len(header)]
        cut = bool(odd) and not any(rows[odd[0] + 1 :]) and len(rows[odd[0]]) < len(header) and len(rows) < ROWS
        if odd and not cut:
            why = f"it has {len(rows[odd[0]])} cells, and the line of names {len(header)}"
            raise no_table(path, line + 1 + odd[0], why)
        whole = [row for row in rows if len(row) == len(header)]
        for name, cells in zip(header, zip(*whole, strict=True), strict=bool(whole)):
            if table.keeps(name):
                table.add_column(name, numbers_if_all(cells))
        table.length, line = table.length + len(whole), line + len(rows)
    return cut


def numbers_if_all(cells: Sequence[str]) -> Sequence[float | str]:
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return cells


def runs_of_a_chart(header: list[str]) -> dict[str, dict[str, str]]:
    """For each run in a chart of W&B's, what its columns are called there; empty for another file."""
    runs: dict[str, dict[str, str]] = {}
    for column in header[1:]:
        match = OF_A_RUN.fullmatch(column)
        if match is None:
            return {}
        if not match["of_a_group"]:
            runs.setdefault(match["run"], {header[0]: header[0]})[column] = match["name"]
    return runs


def part(table: Table, columns: dict[str, str]) -> Table:
    """Some columns of a table under other names."""
    chosen = Table()
    chosen.length, chosen.columns = table.length, dict.fromkeys(columns.values(), True)
    chosen.rows = renamed(table.rows, columns)
    chosen.values = renamed(table.values, columns)
    chosen.texts = renamed(table.texts, columns)
    return chosen


def renamed(by_column: dict[str, T], columns: dict[str, str]) -> dict[str, T]:
    return {name: by_column[column] for column, name in columns.items() if column in by_column}
