"""Records, one after another, become columns: a million of them in seconds."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from distclip.runs.names import STEP, Names, known
from distclip.runs.refusals import no_column, no_step
from distclip.runs.run import Log, Series, Steps

MOST = 2**53  # whole numbers beyond are not exact in float64


class Table:
    """Numbers and texts by column, each with the row that it stands in: not every row has every column."""

    def __init__(self, matters: Callable[[str], bool] = lambda name: True) -> None:
        self.matters, self.length = matters, 0
        self.columns: dict[str, bool] = {}  # all there are, and which matter
        self.rows: dict[str, array[int]] = {}
        self.values: dict[str, array[float]] = {}
        self.texts: dict[str, dict[int, str]] = {}
        self.bools: dict[str, bool] = {}  # by column, one of its true and false, which are numbers too

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append rows. Strings that spell a number are numbers; what is neither number nor text is left out."""
        for key in dict.fromkeys(chain.from_iterable(records)):
            if self.keeps(key):
                self.add_column(key, [record.get(key) for record in records])
        self.length += len(records)

    def keeps(self, key: str) -> bool:
        return self.columns[key] if key in self.columns else self.columns.setdefault(key, self.matters(key))

    def add_column(self, key: str, values: Sequence[Any]) -> None:
        """The next values of one column, one a row."""
        if bool in set(map(type, values)):
            self.bools[key] = next(value for value in values if isinstance(value, bool))
        try:
            numbers = array("d", values)
        except (TypeError, OverflowError):  # some are no numbers
            for row, value in enumerate(values, self.length):
                self.add_value(key, row, value)
        else:
            self.of(self.rows, key, "q").extend(range(self.length, self.length + len(values)))
            self.of(self.values, key, "d").extend(numbers)

    def add_value(self, key: str, row: int, value: Any) -> None:
        number = as_number(value)
        if number is not None:
            self.of(self.rows, key, "q").append(row)
            self.of(self.values, key, "d").append(number)
        elif isinstance(value, str) and value.strip():
            self.texts.setdefault(key, {})[row] = value

    def of(self, columns: dict[str, Any], key: str, kind: str) -> Any:
        return columns[key] if key in columns else columns.setdefault(key, array(kind))

    def to_log(self, path: Path, program: str, names: Names, notes: Sequence[str] = (), name: str = "") -> Log:
        """The same by step: the column of steps, or the number of the row, counted from 1.

        Raises:
            RunError: the user's column of steps is not there, or holds what is no step.
        """
        column = known(self.values, STEP) if names.step is None else names.step
        if column is not None and column not in self.values:
            raise no_column(path, "--step", column, tuple(self.columns))
        steps = np.arange(1, self.length + 1) if column is None else self.steps(path, column)
        series = {}
        for key, rows in self.rows.items():
            at = np.frombuffer(rows, np.int64)
            there = steps[at] >= 0
            if there.any():
                series[key] = Series(steps[at][there], np.frombuffer(self.values[key], np.float64)[there])
        texts = {
            key: {int(steps[k]): text for k, text in each.items() if steps[k] >= 0} for key, each in self.texts.items()
        }
        columns = tuple(self.columns)
        return Log(name or named(path), path, program, columns, series, texts, tuple(notes))

    def steps(self, path: Path, column: str) -> Steps:
        """The step of each row; -1 where it has none."""
        if column in self.bools:
            raise no_step(path, column, self.bools[column])
        values = np.frombuffer(self.values[column], np.float64)
        wrong = ~((values >= 0) & (values < MOST) & (values == np.floor(values)))
        if wrong.any():
            raise no_step(path, column, float(values[wrong][0]))
        steps = np.full(self.length, -1, np.int64)
        steps[np.frombuffer(self.rows[column], np.int64)] = values.astype(np.int64)
        return steps


def as_number(value: Any) -> float | None:
    """The number that it is or spells, or None."""
    if not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if isinstance(value, int) and value > 0 else float("-inf")
    except ValueError:
        return None


def named(path: Path) -> str:
    """What to call a run by its path: the folder, where the file has a name that every run's has."""
    general = path.stem in ("metrics", "trainer_state", "log", "logs", "history", "telemetry")
    return (path.resolve().parent.name if general else path.stem) or str(path)
