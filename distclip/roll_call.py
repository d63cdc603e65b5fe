"""Roll call: which ranks did not come to a collective that failed. Private torch API, 2.13: the default store."""

import time
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 5.0  # seconds for the others to fail too: they began to wait at other times
_calls = 0


def who_is_missing(ranks: Sequence[int]) -> str:
    """Say which of the global ``ranks`` did not report to the job's store that this collective failed for them too."""
    global _calls
    _calls += 1
    store, deadline = _get_default_store(), time.monotonic() + PATIENCE
    keys = {rank: f"distclip/failed/{_calls}/{rank}" for rank in ranks}
    try:
        store.set(keys[dist.get_rank()], "here")
        missing = list(ranks)
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([keys[rank]])]
            time.sleep(0.05)
    except RuntimeError as error:
        return f"a collective of the clipping group failed, and the job's store is gone too: {error}"
    if not missing:
        return "a collective of the clipping group failed on all of its ranks: see the backend's message"
    return (
        f"a collective of the clipping group failed: rank {', '.join(map(str, missing))} did not come to it or died; "
        "let every rank of the group make the same calls, and see that rank's own output"
    )
