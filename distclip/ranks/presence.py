"""Which rank is gone, where a collective of torch has failed: torch's own error names an address, or nothing.

    with name_lost_ranks():
        train()  # RuntimeError: no answer from rank 3: dead, stopped or out of reach (...)

A dead rank breaks the connections of its neighbours alone. The others wait for these in collectives that only a timeout
ends, so a thread of each rank asks the job's store, once a second, whether a roll is called. A rank that leaves by an
exception of its own writes that down before its connections close.

Private torch API, 2.13: the default store.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeGuard

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from .roll_call import waits_in

MEETING_POINT = "DISTCLIP_MEETING_POINT"  # in the environment: where ranks meet that `distclip train` has started
LOOK = 1.0  # seconds between looks at the store
PATIENCE = 5.0  # seconds for an answer: a look, and a machine with more to do
LIMIT = 12.0  # seconds for the whole roll call: a store behind a link that is down never answers
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun may keep one store for all starts of a job
HERE = "here"  # the answer of a rank that waits for nothing of ours
LONGEST = 500  # characters of an exception that others are told of

# Gloo raises plain RuntimeErrors. These are in all those of torch 2.13 that a peer's end or silence causes.
GLOO = ("gloo", "Application timeout caused pair closure")


@contextmanager
def name_lost_ranks() -> Iterator[None]:
    """Inside, a collective that fails raises a RuntimeError that says which rank is gone, or what that rank raised.

    For every rank of the job, around the loop, after ``init_process_group``. Any collective: those of DDP, FSDP2 and
    DTensor too. Answers within 12 s; torch's error is the cause. What a rank raises by itself leaves it as it is. No
    collective, and one request a second to the job's store meanwhile. RuntimeError where there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError("name_lost_ranks() needs the job's store: call init_process_group first")
    with Presence():
        try:
            yield
        except RuntimeError as error:
            if not of_backend(error):
                raise
            raise RuntimeError(f"{who_is_gone().story} ({first_sentence(error)})") from error


@dataclass(frozen=True, slots=True)
class Roll:
    """What a roll call found, the same on every rank, and whether it was this one that called it."""

    story: str
    called_here: bool


class Presence:
    """While entered, this rank answers."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.store = _get_default_store()
        self.thread = threading.Thread(target=self.answer, daemon=True)

    def answer(self) -> None:
        try:
            while not self.left.wait(LOOK):
                if self.store.check([f"{call()}/called"]):
                    self.store.set(f"{call()}/{dist.get_rank()}", whereabouts())
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
        if error is None or of_backend(error) or of_backend(error.__cause__) or self.thread.is_alive():
            return  # all is well, or another rank is to blame, or the store does not answer
        said = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
        with suppress(RuntimeError):  # the store is gone
            self.store.set(f"{call()}/failed", f"rank {dist.get_rank()} failed: {said}")


def who_is_gone() -> Roll:
    """Call the roll and say what became of the other ranks.

    Takes ``LIMIT`` seconds at most. Every rank calls whose collective failed, and ends after that.
    """
    rolls: list[Roll] = []
    thread = threading.Thread(target=lambda: rolls.append(roll_called()), daemon=True)
    thread.start()
    thread.join(LIMIT)
    return rolls[0] if rolls else Roll(f"the job's store does not answer: {holder()} cannot be reached", True)


def roll_called() -> Roll:
    store, world = _get_default_store(), dist.get_world_size()
    try:
        store.set(f"{call()}/{dist.get_rank()}", whereabouts())
        store.set(f"{call()}/called", "")
        if store.add(f"{call()}/callers", 1) > 1:
            store.wait([f"{call()}/over"], timedelta(seconds=LIMIT))  # rank 0 may hold the store: it must not go yet
            return Roll(store.get(f"{call()}/over").decode(), False)
        story = told(store, world)
        store.set(f"{call()}/over", story)
    except RuntimeError:
        return Roll(f"the job's store is gone: {holder()} has ended or cannot be reached", True)
    return Roll(story, True)


def told(store: Any, world: int) -> str:
    """What a rank wrote down before it left, or who does not answer."""
    deadline = time.monotonic() + PATIENCE
    gone = list(range(world))
    while gone and time.monotonic() < deadline:
        if store.check([f"{call()}/failed"]):
            return str(store.get(f"{call()}/failed").decode())
        gone = [rank for rank in gone if not store.check([f"{call()}/{rank}"])]
        time.sleep(0.1)
    if gone:
        return f"no answer from {named(gone)}: dead, stopped or out of reach"
    places = [str(where.decode()) for where in store.multi_get([f"{call()}/{rank}" for rank in range(world)])]
    clipping = [rank for rank, where in enumerate(places) if where != HERE]
    if 0 < len(clipping) < world:
        others = [rank for rank, where in enumerate(places) if where == HERE]
        return f"{named(clipping)} waited in {places[clipping[0]]} of distclip, and {named(others)} did not"
    return "a connection broke, or a rank was slower than the timeout allows; all ranks are alive"


def whereabouts() -> str:
    """What this rank waits for in a collective of ours, or ``HERE``."""
    where = waits_in()
    return HERE if where is None else where or "a collective"


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def call() -> str:
    """The name of this start's roll call."""
    return f"distclip/roll/{os.environ.get(RESTARTS, '0')}"


def holder() -> str:
    """Who holds the store. Torchrun's agent does unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set."""
    if MEETING_POINT in os.environ:
        return "the folder where ranks meet"
    return "the launcher of rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def of_backend(error: BaseException | None) -> TypeGuard[RuntimeError]:
    """Whether it is torch.distributed that failed, and not a model or a loop."""
    plain = type(error) is RuntimeError and any(words in str(error) for words in GLOO)
    return plain or isinstance(error, dist.DistError)


def first_sentence(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
