"""Which format a path is in, and the runs that it holds."""

from collections.abc import Callable
from pathlib import Path

from distclip.runs.assembly import assembled
from distclip.runs.csv_file import read_csv
from distclip.runs.json_file import read_json
from distclip.runs.names import Names
from distclip.runs.refusals import missing, no_file, no_run, no_text, several, unreadable
from distclip.runs.run import Log, Run
from distclip.runs.tensorboard import EVENTS, read_events

# What a folder may hold, in this order: the first of these that is there. Of several the newest, unless it is a guess.
OURS = ("metrics.jsonl", "telemetry.jsonl", "trainer_state.json", "metrics.csv")
NEWEST = ("checkpoint-*/trainer_state.json", "version_*/metrics.csv", "lightning_logs/version_*/metrics.csv")
GUESSES = ("*.jsonl", "*.ndjson", "*.csv")


def nothing(_: int) -> None:
    """For a reader that nobody watches."""


def open_runs(path: Path, names: Names | None = None, advance: Callable[[int], None] = nothing) -> list[Run]:
    """Read the runs at a path, mostly one: a file, or the folder of a run. ``advance`` is told of bytes that are read.

    Raises:
        RunError: one line that says what is wrong.
    """
    names = names or Names()
    try:
        runs = [assembled(log, names) for found in sources(path) for log in read(found, names, advance)]
    except OSError as error:
        raise unreadable(path, error.strerror) from None
    return runs


def size_of(path: Path) -> int:
    """The bytes that reading it takes, for a bar.

    Raises:
        RunError: there is no run.
    """
    try:
        found = [file for each in sources(path) for file in (each.glob(EVENTS) if each.is_dir() else [each])]
        return sum(file.stat().st_size for file in found)
    except OSError as error:
        raise unreadable(path, error.strerror) from None


def sources(path: Path) -> list[Path]:
    """The files, or folders of events, that hold the runs of a path."""
    if not path.exists():
        raise missing(path)
    if path.is_dir():
        return in_folder(path)
    if not path.is_file():
        raise no_file(path)
    return [path]


def in_folder(folder: Path) -> list[Path]:
    for name in OURS:
        if (folder / name).is_file():
            return [folder / name]
    for pattern in NEWEST:
        if found := list(folder.glob(pattern)):
            return [max(found, key=lambda file: (number_of(file.parent.name), file))]
    if found := sorted({events.parent for events in folder.rglob(EVENTS)}):
        return found
    for pattern in GUESSES:
        if found := sorted(folder.glob(pattern)):
            if len(found) > 1:
                raise several(folder, found)
            return found
    raise no_run(folder)


def number_of(name: str) -> int:
    """12 of checkpoint-12 and version_12."""
    digits = name.replace("_", "-").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def read(path: Path, names: Names, advance: Callable[[int], None]) -> list[Log]:
    if path.is_dir() or ".tfevents." in path.name:
        return read_events(path, advance)
    with path.open("rb") as file:
        begin = file.read(4096)
    if b"\0" in begin:
        raise no_text(path)
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return read_json(path, names, advance)
    return read_csv(path, names, advance)
