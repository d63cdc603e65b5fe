"""How much Python a call runs, in functions entered: what a clock would say, the same on a busy machine."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def count_entries() -> Iterator[list[int]]:
    """One number, of the Python functions that this thread has entered inside."""
    entered = [0]

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        entered[0] += event == "call"

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        yield entered
    finally:
        sys.setprofile(before)
