"""Where a non-finite gradient comes from: the rank on which it was so before ranks were reduced. No cost unless used.

Hooks on parameters see gradients before DDP reduces them. FSDP2 reduces those of unsharded copies, one object for each
parameter from its first forward on, which its modules show during the forward: hooks are put on them there.
"""

from collections.abc import Sequence
from functools import partial
from math import inf
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..kernels import local_norms
from ..layouts.fsdp2 import groups_of
from ..layouts.model import held_in, parts_of
from ..layouts.piece import local_tensor
from ..ranks.compare import broadcast_text
from ..ranks.connections import all_reduce
from ..ranks.group import ClippingGroup
from ..report import Culprit
from ..shield import shielded
from . import refusals
from .culprit import KINDS, NOBODY, ranks_that


class Source:
    """What :func:`find_source` returns: hooks that watch each backward, until :meth:`remove` or the end of ``with``.

    Where gradients show before they are reduced depends on the wrapper: [Note: a new sharding] in layouts/__init__.py.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], group: dist.ProcessGroup | None) -> None:
        parts = parts_of(model)
        modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
        if any(isinstance(module, FullyShardedDataParallel) for module in modules):
            raise refusals.no_source_in_fsdp1()
        self._group = ClippingGroup.of(group)
        listed = held_in(parts)
        self._device = self._group.device_for(item.holder for item in listed)
        self._names = {id(item.holder): item.piece.label(i) for i, item in enumerate(listed)}
        self._holders = [item.holder for item in listed]
        self._peaks: dict[str, Tensor] = {}  # the largest |gradient| of each parameter, in the order of the backward
        self._watched: set[str] = set()  # whose gradients were seen, ever
        self._handles: list[Any] = []
        self._shown: dict[str, Any] = {}  # handles of hooks on what FSDP2 shows
        managed = set()
        for module in modules:
            if isinstance(module, FSDPModule):
                entries = [entry for entries in groups_of(module) for entry in entries]
                managed |= {id(entry.sharded_param) for entry in entries}
                self._handles.append(module.register_forward_pre_hook(partial(self._watch_shown, entries)))
        for holder in self._holders:
            if holder.requires_grad and id(holder) not in managed:
                self._handles.append(self._hook(holder, self._names[id(holder)]))

    @shielded
    def culprit(self) -> Culprit | None:
        """Which rank and parameter were the first whose gradient was not finite, since the call before; None for none.

        Every rank calls, after a backward; all get the same answer: of the lowest such rank, the parameter that its
        backward came to first. ``ranks`` are all of them. None also where a gradient became so by being reduced. One
        all-reduce of two int64 numbers, two more where there is a culprit, a host sync each. RuntimeError, on all
        ranks, where some have gradients that no hook has seen.
        """
        peaks, self._peaks = self._peaks, {}
        names = list(peaks)
        largest = torch.stack([peak.to(self._device) for peak in peaks.values()]).tolist() if names else []
        bad = [k for k, peak in enumerate(largest) if not peak < inf]
        group, first = self._group, NOBODY
        if bad:
            first = group.rank << 34 | bad[0] << 2 | (2 if largest[bad[0]] == inf else 1)
        unseen = [
            self._names[id(h)] for h in self._holders if h.grad is not None and self._names[id(h)] not in self._watched
        ]
        words = torch.tensor([first, -len(unseen)], device=self._device)
        winner, missed = map(int, all_reduce(group, words, dist.ReduceOp.MIN).tolist())
        if missed:
            raise refusals.unseen_gradients(unseen)
        if winner == NOBODY:
            return None
        rank, index, kind = winner >> 34, winner >> 2 & 0xFFFFFFFF, KINDS[winner & 3]
        name = broadcast_text(group, self._device, rank, names[index] if group.rank == rank else "")
        return Culprit(kind, name, group.ranks[rank], ranks_that(group, self._device, bool(bad)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in (*self._handles, *self._shown.values()):
            handle.remove()
        self._handles.clear()
        self._shown.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()

    def _watch_shown(self, entries: Sequence[Any], *_: Any) -> None:
        """Before a forward of an FSDP2 module: hooks on what it shows, once on each."""
        for entry in entries:
            name, where = self._names[id(entry.sharded_param)], entry._module_info
            shown = getattr(where.module, where.param_name)
            if shown is not entry.sharded_param and shown.requires_grad:
                if name in self._shown:
                    self._shown[name].remove()
                self._shown[name] = self._hook(shown, name)

    def _hook(self, tensor: Any, name: str) -> Any:
        return tensor.register_hook(partial(self._see, name))

    @shielded
    def _see(self, name: str, gradient: Tensor) -> None:
        values = local_tensor(gradient)
        if values.layout == torch.sparse_coo:
            values = values.coalesce().values()
        self._watched.add(name)
        if values.numel():
            peak = local_norms([values], inf)[0]
            known = self._peaks.get(name)
            self._peaks[name] = peak if known is None else torch.maximum(known, peak)


def find_source(model: nn.Module | Sequence[nn.Module], *, group: dist.ProcessGroup | None = None) -> Source:
    """Watch gradients before DDP or FSDP2 reduces them, to say which rank a NaN or inf comes from.

    * ``model``: what the Clipper was given, wrapped already. NotImplementedError with FSDP1, where no hook sees them.
    * ``group``: the ranks that answer together; None is the default group.

    Reads every gradient once more, in hooks of the backward, from now until ``remove()`` or the end of ``with``; they
    wait for nothing. :meth:`Source.culprit` asks the ranks. Private torch API, read in 2.13: where FSDP2 shows
    parameters.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> with find_source(model) as source:
    ...     model(torch.tensor([[1.0, float("nan")]])).sum().backward()
    ...     print(source.culprit())
    weight on rank 0 has NaN in its gradient
    """
    return Source(model, group)
