"""Sums of each row of a piece."""

from typing import NamedTuple


class Cut(NamedTuple):
    """How the elements of a piece fall into rows, in the order of its memory.

    ``head`` elements end the first row, whole rows of ``length`` follow, ``tail`` elements begin the last one:
    ``count`` rows in all.
    """

    head: int
    length: int
    tail: int
    count: int  # type: ignore[assignment]
