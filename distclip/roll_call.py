"""Roll call: which ranks did not come to a collective that failed. Private torch API, 2.13: the default store.

The first that reports asks for all others and writes down the answer; everybody else waits for that. So the store sees
a few requests a rank, however many ranks there are. In Gloo's ring only the neighbours of a dead rank fail at once: the
others look every second whether a roll is called, so that they are not taken for dead. A rank that came late fails as
well, because the others have given up: it is known by how short a time it waited.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 3.0  # seconds for the others to fail too
LOOK = timedelta(seconds=1)  # how often a rank that waits looks
LATE = 0.5  # of the longest wait: who waited less came late
_failed: Counter[str] = Counter()  # collectives of each group that failed
_stuck: list[Thread] = []  # in a request to a store that does not answer
T = TypeVar("T")


def wait(work: dist.Work, group: str) -> None:
    """Wait for a collective of the group of this name on the host; RuntimeError if it fails, here or elsewhere."""
    while True:
        try:
            work.wait(LOOK)
            return
        except RuntimeError:
            if work.is_completed():  # it failed, or it was done just after we looked
                work.wait()
                return
            if _is_called(group):
                raise


def who_is_missing(group: str, ranks: Sequence[int], waited: float) -> str:
    """Say which of the global ``ranks`` did not report to the job's store that this collective failed for them too.

    ``waited``: for how many seconds this rank was in the collective. Answers within ``PATIENCE`` and a second.
    """
    call = _call(group)
    _failed[group] += 1
    try:
        return f"a collective of the clipping group failed{_within(PATIENCE + 2, lambda: _told(call, ranks, waited))}"
    except RuntimeError as error:
        return f"a collective of the clipping group failed, and the job's store is gone too: {error}"


def _told(call: str, ranks: Sequence[int], waited: float) -> str:
    """What the first that reports has found."""
    store = _get_default_store()
    store.set(f"{call}/{dist.get_rank()}", f"{waited:.1f}")
    if store.add(f"{call}/came", 1) == 1:
        store.set(f"{call}/answer", _asked(store, call, ranks))
    store.wait([f"{call}/answer"], timedelta(seconds=PATIENCE + 1))
    answer: str = store.get(f"{call}/answer").decode()
    return answer


def _call(group: str) -> str:
    return f"distclip/failed/{group}/{_failed[group]}"


def _is_called(group: str) -> bool:
    call = _call(group)
    try:
        return _within(LOOK.total_seconds(), lambda: _get_default_store().check([f"{call}/came"]))
    except RuntimeError:  # the store is gone: what it could have told, the collective will
        return False


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


def _asked(store: Any, call: str, ranks: Sequence[int]) -> str:
    missing = _absent(store, call, ranks)
    if missing:
        return (
            f": rank {_listed(missing)} did not come to it or died; let every rank of the group make the same calls, "
            "and see that rank's own output"
        )
    waits = [float(seconds) for seconds in store.multi_get([f"{call}/{rank}" for rank in ranks])]
    late = [rank for rank, seconds in zip(ranks, waits, strict=True) if seconds < LATE * max(waits)]
    if late and max(waits) > LOOK.total_seconds():
        return f": rank {_listed(late)} came late to it, when others had waited for {max(waits) - min(waits):.1f} s"
    return " on all of its ranks: see the backend's message"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _absent(store: Any, call: str, ranks: Sequence[int]) -> list[int]:
    """The ranks that have not reported after a while; one request for each is made only if some have not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if store.add(f"{call}/came", 0) >= len(ranks):
            return []
        time.sleep(0.05)
    return [rank for rank in ranks if not store.check([f"{call}/{rank}"])]
