"""Up to 64 ranks in one process, without a backend: what every rank sends is really combined.

    def use(group):  # what one rank does; `group.rank` says which
        return distclip.clip_grad_norm_(tensors[group.rank], 1.0, group=group)

    norms = simulate(use, 64)

A rank runs until it has to wait for the others' messages. Then the next one runs; when all have sent theirs, every rank
starts again from the beginning and is handed what was reduced so far. So `use` may change only what lies behind its
last collective: one call of distclip does. A message sent a second time must have the same bits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.ranks.group import Clippers, ClippingGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Collective:
    """One collective: what each rank sent, and what each of them got."""

    sent: list[Tensor]
    got: list[Tensor]


class Waits(BaseException):
    """A rank has sent its message and cannot go on without those of the others."""

    def __init__(self, message: Tensor, op: Any, outgoing: Sequence[int] = ()) -> None:
        self.message, self.op, self.outgoing = message, op, outgoing


class Done:
    """In place of ``dist.Work``: a collective that needs no waiting."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


@dataclass(eq=False)
class SimulatedBackend:
    """What one of the ranks communicates through, in place of ``dist.ProcessGroup``."""

    rank: int
    past: Sequence[Collective]
    calls: int = 0
    group_name = "simulated"

    def _get_backend(self, device: torch.device) -> Self:
        return self

    def allreduce(self, messages: list[Tensor], options: dist.AllreduceOptions) -> Done:
        (message,) = messages
        return self._exchanged(message, message, Waits(message.clone(), options.reduceOp.op))

    def alltoall_base(self, received: Tensor, rows: Tensor, incoming: list[int], outgoing: list[int]) -> Done:
        assert sum(incoming) == len(received)
        return self._exchanged(rows, received, Waits(rows.clone(), "all-to-all", outgoing))

    def _exchanged(self, sent: Tensor, received: Tensor, waits: Waits) -> Done:
        if self.calls == len(self.past):
            raise waits
        collective = self.past[self.calls]
        self.calls += 1
        before = collective.sent[self.rank]
        assert torch.equal(before.view(torch.uint8), sent.contiguous().view(torch.uint8)), "message changed"
        received.copy_(collective.got[self.rank])
        return Done()


@dataclass(eq=False)
class SimulatedGroup:
    """What :class:`distclip.ranks.group.ClippingGroup` is, for one of ``size`` simulated ranks."""

    size: int
    rank: int
    backend: SimulatedBackend

    def reference(self) -> SimulatedBackend:
        return self.backend

    @property
    def process_group(self) -> SimulatedBackend:
        return self.backend

    @property
    def ranks(self) -> Sequence[int]:
        return range(self.size)

    @property
    def global_rank(self) -> int:
        return self.rank

    @property
    def clippers(self) -> Clippers:
        return Clippers()

    def device_for(self, tensors: Iterable[Tensor]) -> torch.device:
        return torch.device("cpu")


class Groups:
    """Takes the place of ``ClippingGroup`` where distclip looks for a rank's group."""

    of = staticmethod(lambda group: group or ClippingGroup.alone())
    alone = staticmethod(ClippingGroup.alone)


def simulate(use: Callable[[SimulatedGroup], T], size: int, collectives: int | None = None) -> list[T | Exception]:
    """What ``use`` returned or raised on every rank; an AssertionError where some ranks would wait for ever.

    ``collectives``: how many there must have been, if that is known.
    """
    past: list[Collective] = []
    while True:
        ends: list[Any] = [_run(use, SimulatedGroup(size, rank, SimulatedBackend(rank, past))) for rank in range(size)]
        waiting = [end for end in ends if isinstance(end, Waits)]
        if not waiting:
            assert collectives in (None, len(past)), f"{len(past)} collectives"
            return ends
        done = [rank for rank, end in enumerate(ends) if not isinstance(end, Waits)]
        assert not done, f"ranks {done} are done, the others wait in collective {len(past)}: {ends[done[0]]!r}"
        assert len({(end.message.dtype, str(end.op)) for end in waiting}) == 1, "ranks send unlike kinds of messages"
        got = _exchanged(waiting) if waiting[0].outgoing else [_reduced(waiting)] * size
        past.append(Collective([end.message for end in waiting], got))


def _run(use: Callable[[SimulatedGroup], T], group: SimulatedGroup) -> T | Exception | Waits:
    with patch("distclip.plan.arguments.ClippingGroup", Groups), patch("distclip.step.building.ClippingGroup", Groups):
        try:
            return use(group)
        except (Waits, Exception) as end:
            return end


def _exchanged(waiting: Sequence[Waits]) -> list[Tensor]:
    parts = [end.message.split(list(end.outgoing)) for end in waiting]
    return [torch.cat(of_each) for of_each in zip(*parts, strict=True)]


def _reduced(waiting: Sequence[Waits]) -> Tensor:
    """MAX and MIN as Gloo has them, which keep or drop a NaN by the order of ranks."""
    sent, op = [end.message for end in waiting], waiting[0].op
    assert len({message.shape for message in sent}) == 1, "ranks send messages of unlike lengths"
    total = sent[0].clone()
    for words in sent[1:]:
        if op == dist.ReduceOp.SUM:
            total += words
        else:
            total = torch.where(words > total if op == dist.ReduceOp.MAX else words < total, words, total)
    return total
