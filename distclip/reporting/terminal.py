"""The report in a terminal: a table with a column for each run, and the advice."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distclip.reporting.advice import Advice, advice_on
from distclip.reporting.analysis import Analysis
from distclip.reporting.comparison import advice_on_all
from distclip.reporting.document import tiles

COLOURS = {"problem": "bold red", "warning": "yellow", "good": "green", "note": "cyan"}


class Terminal(Console):
    """A console that says when nobody reads it any more: rich would end the process, as one that failed."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(console: Console, found: list[Analysis]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for each in found:
        table.add_column(escape(each.run.name), overflow="fold")
    for rows in zip(*(tiles(each) for each in found), strict=True):
        cells = [f"{value}  [dim]{escape(below)}[/dim]" for _, value, below in rows]
        table.add_row(rows[0][0], *cells)
    console.print(table)
    for said in advice_on_all(found):
        say(console, said)
    for each in found:
        for said in advice_on(each):
            say(console, said, f"{each.run.name}: " if len(found) > 1 else "")
        for note in each.run.notes:
            console.print(f"\n[dim]{escape(note)}[/dim]", highlight=False)


def say(console: Console, said: Advice, where: str = "") -> None:
    mark = f"[{COLOURS[said.weight]}]{said.weight}[/]"
    title = f"{escape(where)}[bold]{escape(said.title)}[/bold]"
    console.print(f"\n{mark}  {title}\n{escape(said.reason)}", highlight=False)
