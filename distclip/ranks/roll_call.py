"""Roll call: which ranks did not come to a collective that failed. Private torch API, 2.13: the default store.

The first that reports asks for all others and writes down the answer; everybody else waits for that. So the store sees
a few requests a rank, however many ranks there are. In Gloo's ring only the neighbours of a dead rank fail at once: the
others look every second whether a roll is called, so that they are not taken for dead. A rank that came late fails as
well, because the others have given up: it is known by how short a time it waited. One that is missed here and waits in
another call of ours says in which.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar
from warnings import warn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

SPIN = 1e-3  # seconds to wait for a collective without sleeping: three times what one takes
PATIENCE = 3.0  # seconds for the others to fail too
LOOK = timedelta(seconds=1)  # how often a rank that waits looks
LONG = 30  # looks after which it says for whom
LATE = 0.5  # of the longest wait: who waited less came late
FEW = 3  # ranks whose whereabouts are told
give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))
_failed: Counter[str] = Counter()  # collectives of each clipping group that failed
_begun: Counter[tuple[str, int]] = Counter()  # collectives of each channel
_stuck: list[Thread] = []  # in a request to a store that does not answer
_waits_in: list[str] = []  # the collective that this rank waits in, or that failed
T = TypeVar("T")


@dataclass(slots=True)
class Meeting:
    """One collective of the clipping group of this name, whose global ``ranks`` meet in the channel for ``words``.

    ``call``: what this rank makes it for, empty where nobody could be in another call.
    """

    group: str
    words: int
    ranks: Sequence[int]
    call: str = ""

    def open(self) -> None:
        """Before its channel is made: RuntimeError where the others have given up waiting for that."""
        if self._is_called():
            raise RuntimeError("the others have given up")

    def wait(self, work: dist.Work) -> None:
        """Wait for it on the host; RuntimeError if it fails, here or elsewhere.

        After half a minute, a RuntimeWarning on the first rank that came says which have not come.
        """
        _begun[self.group, self.words] += 1
        _spin(work)
        looks = 0
        while True:
            try:
                work.wait(LOOK)
                break
            except RuntimeError:
                _waits_in[:] = [self.call]
                if work.is_completed():  # it failed, or it was done just after we looked
                    work.wait()
                    break
                looks += 1
                if looks in (1, LONG):
                    self._say_for_whom(looks)
                if self._is_called():
                    raise
        _waits_in.clear()

    def who_is_missing(self, waited: float) -> str:
        """Say which ranks did not report to the job's store that this collective failed for them too.

        ``waited``: for how many seconds this rank was in the collective. Answers within ``PATIENCE`` and a second.
        """
        key = self._key
        _failed[self.group] += 1
        what = f"a collective of the clipping group failed{f' in {self.call}' if self.call else ''}"
        try:
            return f"{what}{_within(PATIENCE + 2, lambda: self._told(key, waited))}"
        except RuntimeError as error:
            return f"{what}, and the job's store is gone too: {error}"

    @property
    def _key(self) -> str:
        return f"distclip/failed/{self.group}/{_failed[self.group]}"

    def _told(self, key: str, waited: float) -> str:
        """What the first that reports has found."""
        store, rank, roll = _get_default_store(), dist.get_rank(), f"{key}/{self.words}"
        store.set(f"{key}/in/{rank}", self.call)
        store.set(f"{roll}/{rank}", f"{waited:.1f}")
        if store.add(f"{roll}/came", 1) == 1:
            store.set(f"{roll}/answer", self._asked(store, key))
        store.wait([f"{roll}/answer"], timedelta(seconds=PATIENCE + 1))
        answer: str = store.get(f"{roll}/answer").decode()
        return answer

    def _asked(self, store: Any, key: str) -> str:
        roll = f"{key}/{self.words}"
        missing = self._absent(store, roll)
        if missing:
            came = [rank for rank in self.ranks if rank not in missing]
            only = f", only rank {_listed(came)} did" if len(came) <= len(missing) else ""
            return (
                f": rank {_listed(missing)} did not come to it or died{only}{_elsewhere(store, key, missing)}; let "
                "every rank of the group make the same calls, and see that rank's own output"
            )
        waits = [float(seconds) for seconds in store.multi_get([f"{roll}/{rank}" for rank in self.ranks])]
        late = [rank for rank, seconds in zip(self.ranks, waits, strict=True) if seconds < LATE * max(waits)]
        if late and max(waits) > LOOK.total_seconds():
            return f": rank {_listed(late)} came late to it, when others had waited for {max(waits) - min(waits):.1f} s"
        return " on all of its ranks: see the backend's message"

    def _absent(self, store: Any, roll: str) -> list[int]:
        """The ranks that have not reported after a while; one request for each is made only if some have not."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if store.add(f"{roll}/came", 0) >= len(self.ranks):
                return []
            time.sleep(0.05)
        return [rank for rank in self.ranks if not store.check([f"{roll}/{rank}"])]

    def _is_called(self) -> bool:
        key = f"{self._key}/{self.words}/came"
        try:
            return _within(LOOK.total_seconds(), lambda: _get_default_store().check([key]))
        except RuntimeError:  # the store is gone: what it could have told, the collective will
            return False

    def _say_for_whom(self, looks: int) -> None:
        """Tell the others that this rank waits; long after, the first that did warns of those who do not."""
        key = f"distclip/waits/{self.group}/{self.words}/{_begun[self.group, self.words]}"

        def ask() -> list[int]:
            store = _get_default_store()
            if looks == 1:
                store.set(f"{key}/{dist.get_rank()}", "")
            elif store.add(f"{key}/asked", 1) == 1:
                return [rank for rank in self.ranks if not store.check([f"{key}/{rank}"])]
            return []

        try:
            late = _within(LOOK.total_seconds(), ask)
        except RuntimeError:  # the store is gone: the collective will fail, and that says so
            return
        if late:
            where, seconds = f" in {self.call}" if self.call else "", looks * LOOK.total_seconds()
            warn(
                f"rank {dist.get_rank()} has waited{where} for {seconds:.0f} s: rank {_listed(late)} has not come. "
                "Let every rank of the group make the same calls",
                RuntimeWarning,
                stacklevel=3,
            )


def _spin(work: dist.Work) -> None:
    """Wait a little without sleeping, while others on this core may run.

    Who sleeps is woken behind whatever has begun to run meanwhile: with as many ranks as cores one all-reduce in four
    of 0.3 ms then took 1 to 4 ms.
    """
    end = time.perf_counter() + SPIN
    while not work.is_completed() and time.perf_counter() < end:
        give_way()


def waits_in() -> str | None:
    """What this rank waits for in a collective of ours, for a second by now, or what one that failed was for."""
    return _waits_in[0] if _waits_in else None


def _elsewhere(store: Any, key: str, ranks: Sequence[int]) -> str:
    """In which other call of ours some of ``ranks`` wait."""
    found = [rank for rank in ranks if store.check([f"{key}/in/{rank}"])]
    calls = {rank: store.get(f"{key}/in/{rank}").decode() for rank in found[:FEW]}
    return "".join(f", rank {rank} was in {call or 'another call'}" for rank, call in calls.items())


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What the job's store answers; RuntimeError where it does not, as behind a link that is down.

    Such a request ends with TCP's own patience, which is a quarter of an hour: it is left to a thread.
    """
    _stuck[:] = [thread for thread in _stuck if thread.is_alive()]
    answers: list[T] = []
    errors: list[RuntimeError] = []

    def request() -> None:
        try:
            answers.append(ask())
        except RuntimeError as error:
            errors.append(error)

    if not _stuck:
        thread = Thread(target=request, daemon=True)
        thread.start()
        thread.join(seconds)
        _stuck[:] = [thread] if thread.is_alive() else []
    if errors:
        raise errors[0]
    if not answers:
        raise RuntimeError("it does not answer")
    return answers[0]
