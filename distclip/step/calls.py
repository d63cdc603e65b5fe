"""The tags of a Clipper's calls, by which ranks that make different calls disagree instead of pairing them."""

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from ..ranks.group import Clippers

COMPARING = 1 << 12  # tag of a call that compares replicas of gradients
TURN = 45499  # odd, with multiples far apart: the tags of two Clippers of one group never meet, whatever their steps
MEASURING = 1 << 15  # tag of a measurement, so that measure() on one rank never pairs with a step on another


class Call(NamedTuple):
    """One call: what goes into the agreement word, its name in errors, whether replicas of gradients are compared."""

    tag: int
    name: str
    compares: bool


@dataclass(slots=True)
class Calls:
    """The calls of one Clipper; ``number``: how many of the ``clippers`` of its group were built before.

    * ``steps``: how many times ``clip_`` or ``step`` were called, ever: it is saved.
    * ``made``: the same since the Clipper was built or a state was loaded, and ``compare_in``: in which of these copies
      of gradients are compared next.
    * ``loaded``: hash of a state that no step was made with yet; ``decided``: of the latest decision, where the host
      knows it; 0 otherwise. Ranks that loaded or decided otherwise disagree in the next call.
    """

    compare_in: float
    number: int = 0
    clippers: Clippers = field(default_factory=Clippers)
    steps: int = 0
    made: int = 0
    loaded: int = 0
    decided: int = 0

    def count_among(self, clippers: Clippers) -> None:
        """This Clipper is built, and is one of these."""
        self.number, self.clippers = clippers.count, clippers
        clippers.count += 1

    def step(self, captured: bool) -> Call:
        """The call of ``clip_`` or ``step`` that comes now; one that is captured in a CUDA graph compares nothing."""
        self.made += not captured
        compares = not captured and self.made >= self.compare_in
        return self._call(f"step {self.steps}", COMPARING * compares, compares)

    def measurement(self) -> Call:
        """The call of ``measure`` that comes now."""
        return self._call(f"measure() in step {self.steps}", MEASURING, False)

    def verification(self) -> Call:
        """The call of ``verify`` that comes now."""
        return Call(TURN * self.number, self._by_whom("verify()"), False)

    def compared(self) -> None:
        """Replicas were compared in this call; next in one twice as far from the beginning: calls 1, 2, 4, 8, ..."""
        self.compare_in = 2 * self.made

    def begin_anew(self, steps: int, loaded: int) -> None:
        """A state with so many ``steps`` was loaded; ``loaded``: its hash."""
        self.steps, self.loaded, self.decided = steps, loaded, 0
        self.made, self.compare_in = 0, inf if self.compare_in == inf else 1.0

    def _call(self, name: str, tag: int, compares: bool) -> Call:
        name = self._by_whom(name)
        if self.loaded:
            name = f"{name} after loading a state (hash {self.loaded:x})"
        return Call(self.steps + self.loaded + TURN * self.number + tag + self.decided, name, compares)

    def _by_whom(self, name: str) -> str:
        return f"{name} of Clipper {self.number + 1}" if self.clippers.count > 1 else name
