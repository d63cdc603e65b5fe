"""The report in a terminal: a table with a column for each run, and the advice."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distclip.reporting.advice import advice_on
from distclip.reporting.analysis import Analysis
from distclip.reporting.document import tiles

COLOURS = {"problem": "bold red", "warning": "yellow", "good": "green", "note": "cyan"}


def show(console: Console, found: list[Analysis]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for each in found:
        table.add_column(escape(each.run.name), overflow="fold")
    for rows in zip(*(tiles(each) for each in found), strict=True):
        cells = [f"{value}  [dim]{escape(below)}[/dim]" for _, value, below in rows]
        table.add_row(rows[0][0], *cells)
    console.print(table)
    for each in found:
        say_advice(console, each, each.run.name if len(found) > 1 else "")


def say_advice(console: Console, found: Analysis, name: str) -> None:
    for each in advice_on(found):
        mark = f"[{COLOURS[each.weight]}]{each.weight}[/]"
        where = f"{escape(name)}: " if name else ""
        console.print(f"\n{mark}  {where}[bold]{escape(each.title)}[/bold]\n{escape(each.reason)}", highlight=False)
    for note in found.run.notes:
        console.print(f"\n[dim]{escape(note)}[/dim]", highlight=False)
