"""The report's file: whole or not at all, and over no file of another's."""

import os
from pathlib import Path

from distclip.reporting.page import GENERATOR
from distclip.runs.refusals import RunError

NAME = "report.html"
BEGIN = 1000  # characters, in which a report says that it is one


def target_of(run: Path, out: Path | None) -> Path:
    """Where the report goes: into the folder of the run, unless said otherwise.

    Raises:
        RunError: nothing can be written there, or it would replace a file that is no report.
    """
    target = out if out is not None else (run if run.is_dir() else run.parent) / NAME
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        why = "it is a folder" if target.is_dir() else f"{target.parent} is no folder to write in"
        raise RunError(f"{target}: cannot be written: {why}: name a file by --out")
    if target.exists() and not is_report(target):
        raise RunError(f"{target}: is no report of distclip's and stays as it is: name another file by --out")
    return target


def is_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(BEGIN)


def write_whole(target: Path, text: str) -> None:
    """Write a file that is there when it is complete, and never in part.

    Raises:
        RunError: it cannot be written; a file that was there before is still there.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, target)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)
