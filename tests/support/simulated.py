"""Up to 64 ranks in one process, without a backend: what every rank sends is really combined.

    def use(group):  # what one rank does; `group.rank` says which
        return distclip.clip_grad_norm_(tensors[group.rank], 1.0, group=group)

    norms = simulate(use, 64)

A rank runs until it has to wait for the others' words. Then the next one runs; when all have sent theirs, every rank
starts again from the beginning and is handed what was reduced so far. So `use` may change only what lies behind its
last collective: one call of distclip does. Words sent a second time must have the same bits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.ranks.group import ClippingGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Collective:
    """One all-reduce: what each rank sent, and what all of them got."""

    op: Any
    sent: list[Tensor]
    got: Tensor


class Waits(BaseException):
    """A rank has sent its words and cannot go on without those of the others."""

    def __init__(self, words: Tensor, op: Any) -> None:
        self.words, self.op = words, op


@dataclass(eq=False)
class SimulatedGroup:
    """What :class:`distclip.ranks.group.ClippingGroup` is, for one of ``size`` simulated ranks."""

    size: int
    rank: int
    past: Sequence[Collective]
    calls: int = field(default=0)

    @property
    def process_group(self) -> str:
        return "simulated"

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(range(self.size))

    @property
    def global_rank(self) -> int:
        return self.rank

    clippers = 1

    def add_clipper(self) -> int:
        return 0

    def all_reduce(self, words: Tensor, op: Any = dist.ReduceOp.SUM, number: int = 0, call: str = "") -> Tensor:
        if self.calls == len(self.past):
            raise Waits(words.clone(), op)
        collective = self.past[self.calls]
        self.calls += 1
        sent = collective.sent[self.rank]
        assert torch.equal(sent.view(torch.uint8), words.contiguous().view(torch.uint8)), "words changed"
        return words.copy_(collective.got)

    def device_for(self, tensors: Iterable[Tensor]) -> torch.device:
        return torch.device("cpu")


class Groups:
    """Takes the place of ``ClippingGroup`` where distclip looks for a rank's group."""

    of = staticmethod(lambda group: group or ClippingGroup.alone())
    alone = staticmethod(ClippingGroup.alone)


def simulate(use: Callable[[SimulatedGroup], T], size: int, words: int | None = None) -> list[T | Exception]:
    """What ``use`` returned or raised on every rank; an AssertionError where some ranks would wait for ever.

    ``words``: how many all-reduces there must have been, if that is known.
    """
    past: list[Collective] = []
    while True:
        ends: list[Any] = [_run(use, SimulatedGroup(size, rank, past)) for rank in range(size)]
        waiting = [end for end in ends if isinstance(end, Waits)]
        if not waiting:
            assert words in (None, len(past)), f"{len(past)} collectives"
            return ends
        done = [rank for rank, end in enumerate(ends) if not isinstance(end, Waits)]
        assert not done, f"ranks {done} are done, the others wait in collective {len(past)}: {ends[done[0]]!r}"
        assert len({end.words.shape for end in waiting}) == 1, "ranks send unlike numbers of words"
        assert len({(end.words.dtype, str(end.op)) for end in waiting}) == 1, "ranks send unlike kinds of words"
        sent, op = [end.words for end in waiting], waiting[0].op
        past.append(Collective(op, sent, _reduced(sent, op)))


def _run(use: Callable[[SimulatedGroup], T], group: SimulatedGroup) -> T | Exception | Waits:
    with patch("distclip.plan.arguments.ClippingGroup", Groups), patch("distclip.clipper.ClippingGroup", Groups):
        try:
            return use(group)
        except (Waits, Exception) as end:
            return end


def _reduced(sent: Sequence[Tensor], op: Any) -> Tensor:
    """MAX and MIN as Gloo has them, which keep or drop a NaN by the order of ranks."""
    total = sent[0].clone()
    for words in sent[1:]:
        if op == dist.ReduceOp.SUM:
            total += words
        else:
            total = torch.where(words > total if op == dist.ReduceOp.MAX else words < total, words, total)
    return total
