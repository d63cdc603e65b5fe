"""Where words on the host travel: through Gloo connections of our own, for each length of message other ones.

Gloo matches messages by their order alone. In a group that others use too, a rank that misses a call of ours puts its
next gradients where the others put their words: where sizes differ a process ends by ``std::terminate``, and equal ones
are added up. On connections of our own that rank is missed, until the timeout, and named. Two calls of ours that send
other numbers of words never meet for the same reason.

A channel is opened by the ranks of the clipping group when they first send a message of its length, which takes them
1 ms (two ranks), a thread and a socket to each other rank, and is closed with the group. Accelerators' backends
keep the group they are given: communicators are dear there, and a second one may block the first.

Private torch API, 2.13: the default store; a process group made by hand, as ``new_group`` makes it. That one itself
needs every rank of the job, or ranks that have made equally many groups before.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

TALK = 0
"""In place of a number of words, for messages of any length between ranks that have agreed to exchange them."""

_CPU = torch.device("cpu")
_GLOO = dist.ProcessGroup.BackendType.GLOO


@dataclass(slots=True)
class Channel:
    """``own``: connections of its own, or None for those of the clipping group. Keeps that group alive in no case.

    ``latest``: Gloo's thread lets go of an all-reduce a moment after the wait for it, and must not be the last to do
    so: freeing its tensor takes the GIL, and asking for that aborts a process that is ending.
    """

    own: dist.ProcessGroup | None
    latest: dist.Work | None = None

    def begin(self, process_group: dist.ProcessGroup, words: torch.Tensor, op: dist.ReduceOp.RedOpType) -> dist.Work:
        """Begin to reduce ``words`` in place."""
        options = dist.AllreduceOptions()
        options.reduceOp = op  # type: ignore[assignment]
        if self.own is None:
            return process_group.allreduce([words], options)
        self.latest = work = self.own.allreduce([words], options)
        return work


_opened: Counter[str] = Counter()  # by name, which a group may have after another that was destroyed
_channels: WeakKeyDictionary[dist.ProcessGroup, dict[int, Channel]] = WeakKeyDictionary()


def channel(process_group: dist.ProcessGroup, words: int) -> Channel | None:
    """That for messages of so many ``words`` between the ranks of ``process_group``, if it is open."""
    known = _channels.get(process_group)
    return None if known is None else known.get(words)


def open_channel(process_group: dist.ProcessGroup, words: int) -> Channel:
    """Open it, by all ranks of the group alike; RuntimeError where not all come within the group's timeout.

    It has connections of its own where the group's backend on the host is Gloo.
    """
    own = None
    backend: Any = process_group._get_backend(_CPU)
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
    if dist.is_gloo_available() and isinstance(backend, c10d.ProcessGroupGloo) and process_group.size() > 1:
        own = _connected(process_group, f"distclip/{process_group.group_name}/{words}", backend.options)
    opened = _channels.setdefault(process_group, {})[words] = Channel(own)
    return opened


def _connected(process_group: dist.ProcessGroup, name: str, theirs: Any) -> dist.ProcessGroup:
    """A group of the same ranks; ``theirs``: the options of Gloo in ``process_group``."""
    rank, size = process_group.rank(), process_group.size()
    _opened[name] += 1
    store = c10d.PrefixStore(f"{name}/{_opened[name]}", c10d._get_default_store())
    options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._threads = theirs._timeout, 1  # one message at a time
    options._devices = theirs._devices  # the same network, and a thread that is awake more often than one of our own
    if store.add("came", 1) == size:
        store.set("all", "")
    store.wait(["all"], options._timeout)  # Gloo's own wait may be several times as long
    gloo = c10d.ProcessGroupGloo(store, rank, size, options)
    gloo._set_sequence_number_for_group()
    own = dist.ProcessGroup(store, rank, size)
    own._set_default_backend(_GLOO)
    own._register_backend(_CPU, _GLOO, gloo)
    return own
