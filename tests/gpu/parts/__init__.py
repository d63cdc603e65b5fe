"""The parts of the check: generators of readings, each run in a process of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Measure = Callable[[Any], Iterator[dict[str, Any]]]
BOTH = ("default", "triton")


@dataclass(frozen=True, slots=True)
class Part:
    """``needs``: the least readings of each kind that prove it. ``seconds``: what it may take on an H200.

    ``rehearsed``: the same of a rehearsal, where that measures less. ``alone``: it measures times, and nothing may run
    beside it. ``stand_in``: rehearsed on the device that is not there, where the road is torch's.
    """

    measure: Measure
    roads: tuple[str, ...] = BOTH
    needs: dict[str, int] = field(default_factory=dict)
    rehearsed: dict[str, int] | None = None
    seconds: int = 60
    alone: bool = False
    stand_in: bool = False


PARTS: dict[str, Part] = {}


def part(**options: Any) -> Callable[[Measure], Measure]:
    def add(measure: Measure) -> Measure:
        PARTS[measure.__name__] = Part(measure, **options)
        return measure

    return add
