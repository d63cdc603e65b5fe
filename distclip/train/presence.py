"""Which ranks are gone, once a collective has failed: every rank that lives answers a roll call, wherever it is stuck.

A dead rank breaks the connections of its neighbours alone. The others wait for these in collectives that only a timeout
ends, so a thread of each rank asks the job's store, once a second, whether a roll is called.

Private torch API, 2.13: the default store.
"""

import os
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from distclip.train.place import MEETING_POINT

LOOK = 1.0  # seconds between looks at the store
PATIENCE = 5.0  # seconds for an answer: a look, and a machine with more to do
LIMIT = 12.0  # seconds for the whole roll call: a store behind a link that is down never answers
CALL = "distclip/roll"


class Presence:
    """While entered, this rank answers."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.answer, args=(_get_default_store(),), daemon=True)

    def answer(self, store: Any) -> None:
        try:
            while not self.left.wait(LOOK):
                if store.check([f"{CALL}/called"]):
                    store.set(f"{CALL}/{dist.get_rank()}", "here")
                    return
        except RuntimeError:  # the store is gone, and nobody can call
            pass

    def __enter__(self) -> "Presence":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.left.set()
        self.thread.join(2 * LOOK)


def who_is_gone() -> str | None:
    """Call the roll and say what became of the other ranks; None where another rank says it already.

    Takes `LIMIT` seconds at most. Every rank calls whose collective failed, and ends after that.
    """
    story: list[str | None] = []
    thread = threading.Thread(target=lambda: story.append(roll_called()), daemon=True)
    thread.start()
    thread.join(LIMIT)
    return story[0] if story else f"the job's store does not answer: {holder()} cannot be reached"


def roll_called() -> str | None:
    store, world = _get_default_store(), dist.get_world_size()
    try:
        store.set(f"{CALL}/{dist.get_rank()}", "here")
        store.set(f"{CALL}/called", "")
        if store.add(f"{CALL}/callers", 1) > 1:
            store.wait([f"{CALL}/over"], timedelta(seconds=LIMIT))  # rank 0 may hold the store: it must not go yet
            return None
        gone = silent(store, world)
        store.set(f"{CALL}/over", "")
    except RuntimeError:
        return f"the job's store is gone: {holder()} has ended or cannot be reached"
    if not gone:
        return "a connection broke, or a rank was slower than parallel.timeout allows; all ranks are alive"
    ranks = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
    return f"no answer from {ranks}: dead, stopped or out of reach"


def silent(store: Any, world: int) -> list[int]:
    """The ranks that have not answered after a while."""
    deadline = time.monotonic() + PATIENCE
    ranks = list(range(world))
    while ranks and time.monotonic() < deadline:
        ranks = [rank for rank in ranks if not store.check([f"{CALL}/{rank}"])]
        time.sleep(0.1)
    return ranks


def holder() -> str:
    """Who holds the store. Torchrun's agent does unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set."""
    if MEETING_POINT in os.environ:
        return "the folder where ranks meet"
    return "the launcher of rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
