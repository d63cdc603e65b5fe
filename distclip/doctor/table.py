"""Columns of plain text."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with a heading and columns as wide as they need; columns without anything are left out."""
    kept = [k for k in range(len(heads)) if any(row[k] for row in rows)]
    widths = [max(len(heads[k]), *(len(row[k]) for row in rows)) for k in kept]
    lines = [[heads[k] for k in kept], ["-" * width for width in widths], *([row[k] for k in kept] for row in rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
