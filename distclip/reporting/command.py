"""`distclip report`: read, analyse, write, say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from distclip import __version__
from distclip.reporting.analysis import Analysis
from distclip.reporting.document import document_of
from distclip.reporting.page import page_of
from distclip.reporting.replay import POLICIES
from distclip.reporting.terminal import show
from distclip.reporting.writing import target_of, write_whole
from distclip.runs import Names, Run, open_runs, size_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``out``: None for report.html in the folder of the first run."""

    runs: Sequence[Path]
    out: Path | None = None
    names: Names = field(default_factory=Names)


def report(options: Options, console: Console) -> Path:
    """Write the report, sum it up on the console, and return where it is.

    Raises:
        RunError: what is wrong, in one line; nothing is written.
    """
    target = target_of(options.runs[0], options.out)
    found = analyses(options, console)
    write_whole(target, page_of(document_of(found, __version__)))
    show(console, found)
    console.print(f"\nreport  {target}", soft_wrap=True, markup=False, highlight=False)
    return target


def analyses(options: Options, console: Console) -> list[Analysis]:
    """Read and analyse all runs, with a bar on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        runs = [run for path in options.runs for run in read(path, options.names, progress)]
        task = progress.add_task("replaying policies", total=len(runs) * len(POLICIES))
        return [Analysis.of(run, lambda done: progress.advance(task, done)) for run in runs]


def read(path: Path, names: Names, progress: Progress) -> list[Run]:
    task = progress.add_task(f"reading {path.name}", total=size_of(path))
    return open_runs(path, names, lambda size: progress.advance(task, size))
