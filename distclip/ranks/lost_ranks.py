"""Which rank is gone, where any collective of the job has failed: torch's own error names an address, or nothing.

    with name_lost_ranks():
        train()  # RuntimeError: no answer from rank 3: dead, stopped or out of reach (...)

A dead rank breaks only its neighbours' connections. The other ranks wait for those in collectives that only a timeout
ends; so on each rank a thread looks once a second in the job's store whether a roll is called.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType
from typing import TypeGuard

import torch.distributed as dist

from . import refusals
from .roll_call import LOOK, Roll, awaited, within

MEETING_POINT = "DISTCLIP_MEETING_POINT"  # in the environment: where ranks meet that `distclip train` has started
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun may keep one store for all starts of a job
ANSWERED = 5.0  # seconds for the others' threads to answer: a look, and a machine with more to do
LIMIT = 12.0  # seconds for the whole roll call: a store behind a link that is down never answers
HERE = "here"  # the answer of a rank that waits in no collective of ours

# Gloo raises plain RuntimeErrors. These are in all those of torch 2.13 that a peer's end or silence causes.
GLOO = ("gloo", "Application timeout caused pair closure")


@contextmanager
def name_lost_ranks() -> Iterator[None]:
    """Inside, a collective that fails raises a RuntimeError that says which rank is gone, or what that rank raised.

    For every rank of the job, around the loop, after ``init_process_group``: RuntimeError without one. It covers any
    collective, those of DDP, FSDP2 and DTensor too, and answers within 12 s with torch's error as the cause. What a
    rank raises by itself passes unchanged. It makes no collective, and one request a second to the job's store.
    """
    if not dist.is_initialized():
        raise RuntimeError(refusals.NO_STORE)
    with Presence():
        try:
            yield
        except RuntimeError as error:
            if not of_backend(error):
                raise
            raise RuntimeError(f"{who_is_gone().story} ({first_sentence(error)})") from error


class Presence:
    """While entered, a thread of this rank answers when the roll of the whole job is called."""

    def __init__(self) -> None:
        self.over = Event()
        self.thread = Thread(target=self.answer, daemon=True)

    def answer(self) -> None:
        roll = _of_job()
        with suppress(RuntimeError):  # the store is gone, and nobody can call
            while not self.over.wait(LOOK):
                if roll.is_called():
                    roll.answer(_whereabouts())
                    return

    def __enter__(self) -> "Presence":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join(2 * LOOK)
        if error is None or of_backend(error) or of_backend(error.__cause__) or self.thread.is_alive():
            return  # all is well, or another rank is to blame, or the store does not answer
        with suppress(RuntimeError):  # the store is gone
            _of_job().leave(refusals.raised(dist.get_rank(), error))  # before this rank's connections close


@dataclass(frozen=True, slots=True)
class Finding:
    """The ``story`` of a roll call, the same on every rank, and whether this rank asked for it."""

    story: str
    called_here: bool


def who_is_gone() -> Finding:
    """Call the roll of the whole job, within ``LIMIT`` seconds; for every rank whose collective failed."""
    roll = _of_job()

    def call() -> tuple[str, bool]:
        return roll.call(_whereabouts(), lambda: _story(roll), LIMIT - 1)

    try:
        return Finding(*within(LIMIT, call, behind=True))
    except RuntimeError:
        return Finding(refusals.store_gone(_holder()), True)


def _of_job() -> Roll:
    """The roll of this start of the job."""
    return Roll(f"distclip/roll/{os.environ.get(RESTARTS, '0')}", range(dist.get_world_size()))


def _story(roll: Roll) -> str:
    gone = roll.absent(ANSWERED)
    left = roll.left()
    if left or gone:
        return left or refusals.no_answer(gone)
    places = roll.answers(roll.ranks)
    clipping = [rank for rank, where in enumerate(places) if where != HERE]
    others = [rank for rank, where in enumerate(places) if where == HERE]
    if clipping and others:
        return refusals.only_some_clip(clipping, places[clipping[0]], others)
    return refusals.ALL_ALIVE


def _holder() -> str:
    """Who holds the store. Torchrun's agent does unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set."""
    if MEETING_POINT in os.environ:
        return refusals.FOLDER
    return refusals.LAUNCHER if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else refusals.RANK_0


def _whereabouts() -> str:
    """What this rank waits for in a collective of ours, or ``HERE``."""
    for call in awaited[:1]:  # by one operation: the main thread may clear it meanwhile
        return call or "a collective"
    return HERE


def of_backend(error: BaseException | None) -> TypeGuard[RuntimeError]:
    """Whether it is torch.distributed that failed, and not a model or a loop."""
    plain = type(error) is RuntimeError and any(text in str(error) for text in GLOO)
    return plain or isinstance(error, dist.DistError)


def first_sentence(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
