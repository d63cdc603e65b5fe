"""Roll call: which ranks did not come to a collective that failed. Private torch API, 2.13: the default store.

The first that reports asks for all others and writes down the answer; everybody else waits for that. So the store sees
a few requests a rank, however many ranks there are.
"""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 5.0  # seconds for the others to fail too: they began to wait at other times
_calls = 0


def who_is_missing(ranks: Sequence[int]) -> str:
    """Say which of the global ``ranks`` did not report to the job's store that this collective failed for them too."""
    global _calls
    _calls += 1
    call = f"distclip/failed/{_calls}"
    store = _get_default_store()
    try:
        store.set(f"{call}/{dist.get_rank()}", "here")
        if store.add(f"{call}/came", 1) == 1:
            store.set(f"{call}/missing", " ".join(map(str, _absent(store, call, ranks))))
        store.wait([f"{call}/missing"], timedelta(seconds=4 * PATIENCE))
        missing = store.get(f"{call}/missing").decode().split()
    except RuntimeError as error:
        return f"a collective of the clipping group failed, and the job's store is gone too: {error}"
    if not missing:
        return "a collective of the clipping group failed on all of its ranks: see the backend's message"
    return (
        f"a collective of the clipping group failed: rank {', '.join(missing)} did not come to it or died; "
        "let every rank of the group make the same calls, and see that rank's own output"
    )


def _absent(store: Any, call: str, ranks: Sequence[int]) -> list[int]:
    """The ranks that have not reported after a while; one request for each is made only if some have not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if store.add(f"{call}/came", 0) >= len(ranks):
            return []
        time.sleep(0.05)
    return [rank for rank in ranks if not store.check([f"{call}/{rank}"])]
