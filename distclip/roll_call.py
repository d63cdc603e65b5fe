"""Roll call: which ranks did not come to a collective that failed. Private torch API, 2.13: the default store.

The first that reports asks for all others and writes down the answer; everybody else waits for that. So the store sees
a few requests a rank, however many ranks there are. In Gloo's ring only the neighbours of a dead rank fail at once: the
others look every second whether a roll is called, so that they are not taken for dead. A rank that came late fails as
well, because the others have given up: it is known by how short a time it waited.
"""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 3.0  # seconds for the others to fail too
LOOK = timedelta(seconds=1)  # how often a rank that waits looks
LATE = 0.5  # of the longest wait: who waited less came late
_failed: Counter[str] = Counter()  # collectives of each group that failed


def wait(work: dist.Work, group: str) -> None:
    """Wait for a collective of the group of this name on the host; RuntimeError if it fails, here or elsewhere."""
    while True:
        try:
            work.wait(LOOK)
            return
        except RuntimeError:
            if work.is_completed() or _is_called(group):
                raise


def who_is_missing(group: str, ranks: Sequence[int], waited: float) -> str:
    """Say which of the global ``ranks`` did not report to the job's store that this collective failed for them too.

    ``waited``: for how many seconds this rank was in the collective. Answers within ``PATIENCE`` and a second.
    """
    call = _call(group)
    _failed[group] += 1
    try:
        store = _get_default_store()
        store.set(f"{call}/{dist.get_rank()}", f"{waited:.1f}")
        if store.add(f"{call}/came", 1) == 1:
            store.set(f"{call}/answer", _asked(store, call, ranks))
        store.wait([f"{call}/answer"], timedelta(seconds=PATIENCE + 1))
        return f"a collective of the clipping group failed{store.get(f'{call}/answer').decode()}"
    except RuntimeError as error:
        return f"a collective of the clipping group failed, and the job's store is gone too: {error}"


def _call(group: str) -> str:
    return f"distclip/failed/{group}/{_failed[group]}"


def _is_called(group: str) -> bool:
    try:
        called: bool = _get_default_store().check([f"{_call(group)}/came"])
    except RuntimeError:  # the store is gone: what it could have told, the collective will
        return False
    return called


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
