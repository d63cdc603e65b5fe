"""Overlap: sums taken during the backward, as soon as FSDP2 or DDP has reduced a block of gradients.

The block is in the cache then, and the ranks may still be talking about others. After the backward only the one
all-reduce is left. A sum counts where its gradients have not changed since (:mod:`.early`); all others are summed again
as if there had been no hook. No hook talks for us.

Private torch API, read in 2.13: FSDP2's parameter groups, which call the post-accumulate hooks of sharded parameters on
the stream that reduced them, and ``DistributedDataParallel._comm_hooks``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any
from weakref import finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .early import Block, Early, OnDevice, OnHost, Seen
from .fsdp2 import groups_of
from .measured import Taken
from .plan import Plan
from .shield import shielded

_first = itemgetter(0)


class Overlap:
    """The hooks of one Clipper, and the sums that they took since its last step."""

    def __init__(self, models: Iterable[nn.Module], plan: Plan, holders: Sequence[Tensor]) -> None:
        """Register hooks; ValueError where a model does not let them see its gradients reduced.

        NotImplementedError where gradients lie on accelerators that cannot sum them (:class:`.early.OnDevice`).
        """
        self._early: Early = OnHost(plan) if plan.on_host else OnDevice(plan)
        self._holders = holders
        common = {source for source, each in zip(plan.sources, plan.common, strict=True) if each}
        # of others (tied across stages) the user adds up gradients after the backward, a few rows perhaps
        self._source = {id(holder): source for source, holder in enumerate(holders) if source in common}
        self._blocks: dict[Block, Seen | None] = {}
        self._arrived: dict[Block, set[int]] = {}
        self._watched: set[Block] = set()
        handles: list[Any] = []
        finalize(self, _remove, handles)  # with the Clipper goes its last reference
        self._handles = handles
        modules = list(dict.fromkeys(module for model in models for module in model.modules()))
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                _check_ddp(module)
        for module in modules:
            if isinstance(module, FSDPModule):
                handles += self._watch_fsdp(module)
            elif isinstance(module, DistributedDataParallel):
                module.register_comm_hook((module.process_group, ref(self)), _reduce_and_sum)

    def remove(self) -> None:
        """Take all hooks away. DDP keeps one that does what it does without: torch cannot take that back."""
        _remove(self._handles)
        self._blocks.clear()

    def taken(self, gradients: Sequence[Tensor | None]) -> Taken:
        """The sums that still hold for ``gradients``, and the sources that need not be summed again."""
        holding: dict[Block, Seen] = {}
        for block, seen in sorted(self._blocks.items(), key=_first):  # added in one order in every process
            found = [g for source in block if (g := gradients[source]) is not None]
            if seen is not None and len(found) == len(block) and seen.holds(found):
                holding[block] = seen
        return self._early.taken(holding)

    def forget(self) -> None:
        """After a step: its sums are of no use for the next."""
        self._blocks = dict.fromkeys(self._blocks)
        self._early.forget()

    def _watch_fsdp(self, module: FSDPModule) -> Iterator[Any]:
        """Hooks on the parameters of each group of ``module``, which FSDP2 reduces as one block."""
        for entries in groups_of(module):
            if any(entry.offload_to_cpu for entry in entries):
                raise ValueError("overlap=True cannot see gradients that CPUOffloadPolicy moves: leave out one of both")
            parameters = [entry.sharded_param for entry in entries if entry.sharded_param.requires_grad]
            sources = [self._source.get(id(parameter)) for parameter in parameters]
            block = tuple(source for source in sources if source is not None)
            if block in self._watched or len(block) < len(sources):  # several modules in one fully_shard share a group
                continue
            self._watched.add(block)
            for parameter, source in zip(parameters, block, strict=True):
                yield parameter.register_post_accumulate_grad_hook(_Arrival(ref(self), block, source))

    def arrived(self, block: Block, source: int) -> None:
        """The gradient of ``source`` is final for this backward; sum its block with the last of them."""
        self._blocks[block] = None
        waiting = self._arrived.setdefault(block, set())
        waiting.add(source)
        if len(waiting) == len(block):
            waiting.clear()
            self._sum(block)

    def sum_bucket(self, parameters: Iterable[Tensor]) -> None:
        """The gradients of ``parameters``, one bucket of DDP, are reduced."""
        sources = [self._source.get(id(parameter)) for parameter in parameters]
        block = tuple(source for source in sources if source is not None)
        for other in list(self._blocks):  # buckets arrive on several threads of Gloo
            if other != block and not set(block).isdisjoint(other):
                self._blocks.pop(other, None)  # DDP lays its buckets out anew after the first backward
        if len(block) == len(sources):
            self._sum(block)

    @shielded
    def _sum(self, block: Block) -> None:
        found = [g for source in block if (g := self._holders[source].grad) is not None]
        self._blocks[block] = self._early.take(block, found) if len(found) == len(block) else None


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A hook that keeps no Clipper alive."""

    overlap: "ref[Overlap]"
    block: Block
    source: int

    def __call__(self, parameter: Tensor) -> None:
        overlap = self.overlap()
        if overlap is not None:
            overlap.arrived(self.block, self.source)


def _reduce_and_sum(
    state: "tuple[dist.ProcessGroup, ref[Overlap]]",
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """What DDP does without a hook, the mean over its ranks; then the bucket is summed."""
    process_group, reference = state
    parameters = bucket.parameters()

    def then(done: torch.futures.Future[torch.Tensor]) -> Tensor:
        overlap = reference()
        if overlap is not None:
            overlap.sum_bucket(parameters)
        return done.value()

    return allreduce_hook(process_group, bucket).then(then)


def _check_ddp(module: DistributedDataParallel) -> None:
    if not module.gradient_as_bucket_view:
        raise ValueError("overlap=True sums DDP's buckets: build DistributedDataParallel(gradient_as_bucket_view=True)")
    if module._comm_hooks:
        raise ValueError("overlap=True needs DDP's one communication hook, which is taken: leave out one of both")


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
