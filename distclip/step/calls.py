"""The tags of a Clipper's calls, by which ranks that make different calls disagree instead of pairing them.

A tag counts modulo ``CODES``. It is the sum of the step, STRIDE for each Clipper of the group built before, and a bit
for the kind of call: no two calls of N <= 1000 Clippers have the same sum while steps stay below 2**28 / 3N, 9 million
for ten Clippers. Hashes of a loaded state and of the latest decision are added where there are any, and then tags that
should differ are equal about once in 2**32.
"""

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from ..ranks.group import Clippers

COMPARING = 1 << 28  # tag of a call that compares replicas of gradients; bits 29 and 30: VERIFYING, REALIGNED
MEASURING = 1 << 31  # tag of a measurement, so that measure() on one rank never pairs with a step on another
STRIDE = 0x9E3779B  # 2**28 over the golden ratio, which keeps its multiples far apart modulo 2**28


class Call(NamedTuple):
    """One call: its tag in the agreement word, its name in errors, whether replicas of each gradient are compared, and
    whether it steps, so that its gradients are final.
    """

    tag: int
    name: str
    compares: bool
    steps: bool = False


@dataclass(slots=True)
class Calls:
    """The calls of one Clipper.

    * ``number``: how many of the ``clippers`` of its group were built before it.
    * ``steps``: completed calls of ``clip_`` and ``step``, including those before a checkpoint; saved in the state.
    * ``made``: calls of ``clip_`` and ``step``, uncaptured, since the Clipper was built or a state was loaded.
    * ``compare_in``: the value of ``made`` from which on replicas of gradients are compared again; inf for never.
    * ``verify_every``: in which steps the layout is proved, None for none.
    * ``loaded``: hash of a loaded state until the first step after it; ``decided``: hash of the latest decision, where
      the host knows it; else 0. Ranks whose hashes differ disagree in the next call.
    """

    compare_in: float
    verify_every: int | None = None
    number: int = 0
    clippers: Clippers = field(default_factory=Clippers)
    steps: int = 0
    made: int = 0
    loaded: int = 0
    decided: int = 0

    @property
    def new(self) -> bool:
        """Whether no step has been made, and no state of another Clipper loaded."""
        return self.made == self.loaded == 0

    def count_among(self, clippers: Clippers) -> None:
        """Number this Clipper as the next of ``clippers``."""
        self.number, self.clippers = clippers.count, clippers
        clippers.count += 1

    def step(self, captured: bool) -> Call:
        """The next call of ``clip_`` or ``step``; one that is captured in a CUDA graph compares nothing."""
        self.made += not captured
        compares = not captured and self.made >= self.compare_in
        return self._call(f"step {self.steps}", COMPARING * compares, compares)._replace(steps=True)

    def name_of_step(self, committed: bool) -> str:
        """The name of the step being made, which is counted already if it is ``committed``."""
        return self._by_whom(f"step {self.steps - committed}")

    def measurement(self) -> Call:
        """The next call of ``measure``."""
        return self._call(f"measure() in step {self.steps}", MEASURING, False)

    def fingerprinting(self) -> Call:
        """The next call of ``fingerprint``."""
        return self._call(f"fingerprint() in step {self.steps}", MEASURING + COMPARING, False)

    def verification(self) -> Call:
        """The next call of ``verify``."""
        return Call(STRIDE * self.number, self._by_whom("verify()"), False)

    def proof(self) -> Call:
        """The proof of the step being made."""
        return self._call(f"verify() in step {self.steps}", 0, False)

    def proof_is_due(self) -> bool:
        """Whether the step being made is the last of ``verify_every``: by the steps saved, the same after a resume."""
        return self.verify_every is not None and (self.steps + 1) % self.verify_every == 0

    def compared(self) -> None:
        """Replicas were compared in this call: compare them next in calls 2, 4, 8, ..., each twice as far."""
        self.compare_in = 2 * self.made

    def begin_anew(self, steps: int, loaded: int) -> None:
        """Continue from a loaded state: its ``steps``, and ``loaded``, its hash, 0 where nothing is different."""
        self.steps, self.loaded, self.decided = steps, loaded, 0
        self.made, self.compare_in = 0, inf if self.compare_in == inf else 1.0

    def _call(self, name: str, tag: int, compares: bool) -> Call:
        name = self._by_whom(name)
        if self.loaded:
            name = f"{name} after loading a state (hash {self.loaded:x})"
        return Call(self.steps + self.loaded + STRIDE * self.number + tag + self.decided, name, compares)

    def _by_whom(self, name: str) -> str:
        return f"{name} of Clipper {self.number + 1}" if self.clippers.count > 1 else name
