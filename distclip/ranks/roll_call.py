"""Roll calls in the job's store: which ranks answer, after a collective of some of them has failed.

The first caller asks all others and stores what it found, the story; all later callers wait for that. So each rank
makes a few requests to the store, however many ranks there are. slow_collective.py calls the roll after a collective of
ours, lost_ranks.py after any of the job; in those of stopped.py ranks answer uncalled. Private torch API, 2.13: the
default store.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from . import refusals

LOOK = 1.0  # seconds between two looks of a rank that waits: whether a roll is called

awaited: list[str] = []  # the call of ours in whose collective this rank waits for a second or more, or failed last
_stuck: list[Thread] = []  # in a request to a store that does not answer
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Roll:
    """One roll call among ``ranks``, under a name in the store."""

    name: str
    ranks: Sequence[int]

    def is_called(self) -> bool:
        return _get_default_store().check([f"{self.name}/callers"])

    def answer(self, text: str) -> None:
        _get_default_store().set(f"{self.name}/{dist.get_rank()}", text)

    def leave(self, text: str) -> None:
        """Say why this rank leaves, which ends the roll call at once for whoever asks."""
        _get_default_store().set(f"{self.name}/left", text)

    def is_first(self) -> bool:
        """Call the roll, and return whether this rank is the first to do so."""
        return _get_default_store().add(f"{self.name}/callers", 1) == 1

    def call(self, text: str, ask: Callable[[], str], seconds: float) -> tuple[str, bool]:
        """Answer with ``text`` and call the roll.

        Returns the story, the same on every rank, and whether this rank made it by ``ask``. RuntimeError where another
        rank does not store it within ``seconds``.
        """
        store, story = _get_default_store(), f"{self.name}/story"
        self.answer(text)  # before the call, as others do: who asks does not ask itself
        if self.is_first():
            found = ask()
            store.set(story, found)
            return found, True
        store.wait([story], timedelta(seconds=seconds))  # a process that holds the store does not leave before either
        return store.get(story).decode(), False

    def absent(self, seconds: float = 0.0) -> list[int]:
        """Which ranks have not answered, after so many seconds or as soon as all have or one has left."""
        store, deadline = _get_default_store(), time.monotonic() + seconds
        keys = [f"{self.name}/{rank}" for rank in self.ranks]
        while time.monotonic() < deadline and not self.left():
            if store.check(keys):
                return []
            time.sleep(0.05)
        return [rank for rank, key in zip(self.ranks, keys, strict=True) if not store.check([key])]

    def left(self) -> str:
        store, key = _get_default_store(), f"{self.name}/left"
        return store.get(key).decode() if store.check([key]) else ""

    def some_answers(self) -> dict[int, str]:
        """The answers of the first ranks that have answered."""
        absent = set(self.absent())
        few = [rank for rank in self.ranks if rank not in absent][: refusals.FEW_CALLS]
        return dict(zip(few, self.answers(few), strict=True))

    def answers(self, ranks: Sequence[int]) -> list[str]:
        """The answers of ``ranks``, all of which must have answered."""
        keys = [f"{self.name}/{rank}" for rank in ranks]
        return [answer.decode() for answer in _get_default_store().multi_get(keys)] if keys else []


def within(seconds: float, ask: Callable[[], T], behind: bool = False) -> T:
    """Return ``ask()``, a request to the store; RuntimeError after ``seconds`` without an answer, as on a dead link.

    ``behind``: ask even while an earlier request has not been answered.
    """
    # A request down such a link ends with TCP's own patience, a quarter of an hour: it is left to a thread.
    _stuck[:] = [thread for thread in _stuck if thread.is_alive()]
    found: list[T] = []
    failures: list[RuntimeError] = []

    def request() -> None:
        try:
            found.append(ask())
        except RuntimeError as error:
            failures.append(error)

    if behind or not _stuck:
        thread = Thread(target=request, daemon=True)
        thread.start()
        thread.join(seconds)
        _stuck.extend([thread] if thread.is_alive() else [])
    if failures:
        raise failures[0]
    if not found:
        raise RuntimeError(refusals.NO_ANSWER)
    return found[0]
