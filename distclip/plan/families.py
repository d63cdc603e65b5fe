"""Copies: which pieces other ranks hold the same bits of, and what all ranks know of them by now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NO_FAMILY = -1
ALIKE = 1e-2  # copies that were computed in bf16, each for itself, may be so far apart
WEIGHTY = 0.1  # of the tolerance: by how much of the model's norm copies must differ, or noise around 0 would count


class CopySet(NamedTuple):
    """Ranks of the group, by index, that hold copies of so many ``pieces``, which have the slots from ``first`` on."""

    first: int
    pieces: int
    ranks: Sequence[int]


class Comparing(NamedTuple):
    """Whether the bits of copies are compared in a call, as in each that steps, and whether a norm on an accelerator is
    NaN where they differ, as where nobody looks before the step.
    """

    bits: bool = False
    stops: bool = False


NOT_COMPARING = Comparing()


def comparing(copies: "Copies | None", steps: bool, looks: bool) -> Comparing:
    """What a call does that ``steps`` or only measures; ``looks``: at the copies of every piece, before it decides."""
    return NOT_COMPARING if copies is None or not steps else Comparing(bits=True, stops=copies.stops and not looks)


@dataclass(slots=True)
class Copies:
    """The pieces whose bits are compared, in families: a family lies on the same ranks, one of its sets of copies here.

    Slots number the pieces of all ranks, each once, however many sets of copies it has.

    * ``home``: the family of each piece of this rank, or ``NO_FAMILY``. ``families``: the same of those whose bits are
      compared today.
    * ``signs``: of each family, 1 - replicas where this rank represents its copies, else 1. ``everywhere``: whether all
      ranks hold copies of it.
    * ``slots``: of the pieces of this rank that have a home; ``count``: how many there are on all ranks.
    * ``sets``: those of all ranks. ``stops``: no step is made where copies have drifted.
    * ``proved``: slots whose copies had the same bits once, not all of them 0. ``loose``: slots that have not: they are
      computed on each rank for itself, and compared by amount. Both the same on every rank, from reduced numbers.
    """

    home: Sequence[int]
    signs: Sequence[int]
    everywhere: Sequence[bool]
    slots: Mapping[int, int]
    count: int
    sets: Sequence[CopySet]
    stops: bool
    families: Sequence[int]
    proved: set[int] = field(default_factory=set)
    loose: set[int] = field(default_factory=set)

    def loosen(self, slots: set[int]) -> None:
        """Compare these by amount from now on."""
        self.loose |= slots
        self.families = [NO_FAMILY if self.slots.get(i) in self.loose else home for i, home in enumerate(self.home)]

    def sign(self, piece: int) -> int:
        """Of a piece that has a home."""
        return self.signs[self.home[piece]]

    def loose_here(self) -> list[int]:
        """The pieces of this rank that are compared by amount."""
        return [i for i, slot in self.slots.items() if slot in self.loose]
