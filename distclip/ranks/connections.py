"""The all-reduce, and what it goes through: on the host, Gloo connections of our own, others for each kind of message.

Gloo matches messages by their order alone. In a group that others use too, a rank that misses a call of ours would send
its next gradients where the others send their message: where sizes differ a process ends by ``std::terminate``, and
equal ones are added up. On connections of our own that rank is missed, until the timeout, and named. Two calls of ours
with messages of other lengths never meet for the same reason.

Accelerators' backends keep the group they are given: communicators are expensive there, and a second one may block the
first.

Private torch API, 2.13: the default store; a process group made by hand, as ``new_group`` makes it. That one itself
needs every rank of the job, or ranks that have made equally many groups before.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from . import refusals
from .group import ClippingGroup
from .roll_call import awaited
from .slow_collective import SlowCollective, given_up

ANY_LENGTH = 0
"""In place of a signed length, for messages of any length between ranks that have agreed to exchange them."""

SPIN = 1e-3  # seconds to wait for a collective without sleeping: three times what one takes

_CPU = torch.device("cpu")
_GLOO = dist.ProcessGroup.BackendType.GLOO

give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


@dataclass(slots=True)
class Channel:
    """What messages of one signed length go through on the host: [Note: what travels] in message.py.

    ``own``: connections of its own, or None for those of the clipping group. Never keeps that group alive.
    ``begun``: how many collectives went through it, the same on every rank.
    """

    name: str
    own: dist.ProcessGroup | None
    begun: int = 0
    latest: dist.Work | None = None

    def begin(self, process_group: dist.ProcessGroup, message: Tensor, op: dist.ReduceOp.RedOpType) -> dist.Work:
        """Begin to reduce ``message`` in place."""
        self.begun += 1
        options = dist.AllreduceOptions()
        options.reduceOp = op  # type: ignore[assignment]
        if self.own is None:
            return process_group.allreduce([message], options)
        # Gloo's thread lets go of an all-reduce a moment after the wait for it, and must not be the last to do so:
        # freeing its tensor takes the GIL, and asking for that aborts a process that is ending.
        self.latest = work = self.own.allreduce([message], options)
        return work


_opened: Counter[str] = Counter()  # channels by name: a group may have that of another which was destroyed
_channels: WeakKeyDictionary[dist.ProcessGroup, dict[int, Channel]] = WeakKeyDictionary()


def all_reduce(
    group: ClippingGroup,
    message: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    signed_length: int = ANY_LENGTH,
    call: str = "",
) -> Tensor:
    """Reduce ``message`` in place over the group and return it: one collective, or none in one process.

    ``signed_length``: the length of the message, below 0 if it is not added up, where ranks that disagree might send
    others at the same time; on the host it then meets none of another signed length. ``call``: what this rank makes it
    for, as errors say.

    Waits for it on the host; not on an accelerator. RuntimeError that names the ranks that did not join, where the
    backend gave up waiting for them.
    """
    if group.reference is None:
        return message
    process_group = group.reference() or group.process_group  # the latter raises: it was destroyed
    assert process_group is not None
    started, opened = time.monotonic(), None
    try:
        if message.device.type == "cpu":
            opened = channel(process_group, signed_length) or open_channel(process_group, signed_length)
            work = opened.begin(process_group, message, op)
            if _is_done_soon(work):
                work.wait()  # raises what went wrong
            else:
                _slow(group, process_group, signed_length, call, opened).wait(work)
        else:
            dist.all_reduce(message, op, group=process_group)
    except RuntimeError as error:
        missing = _slow(group, process_group, signed_length, call, opened).who_is_missing(time.monotonic() - started)
        raise RuntimeError(f"{missing} ({str(error).splitlines()[0]})") from error
    awaited.clear()
    return message


def _is_done_soon(work: dist.Work) -> bool:
    """Wait a little without sleeping, while others on this core may run."""
    # Who sleeps is woken behind whatever has begun to run meanwhile: with as many ranks as cores one all-reduce in four
    # of 0.3 ms then took 1 to 4 ms.
    end = time.perf_counter() + SPIN
    while not work.is_completed():
        if time.perf_counter() > end:
            return False
        give_way()
    return True


def _slow(
    group: ClippingGroup, process_group: dist.ProcessGroup, signed_length: int, call: str, opened: Channel | None
) -> SlowCollective:
    name = "" if opened is None else f"{opened.name}/{opened.begun}"
    return SlowCollective(group.ranks, process_group.group_name, signed_length, call, name)


def channel(process_group: dist.ProcessGroup, signed_length: int) -> Channel | None:
    """That for messages of this signed length between the ranks of ``process_group``, if it is open."""
    known = _channels.get(process_group)
    return None if known is None else known.get(signed_length)


def open_channel(process_group: dist.ProcessGroup, signed_length: int) -> Channel:
    """Open it, by all ranks of the group alike; RuntimeError where not all come within the group's timeout.

    It has connections of its own where the group's backend on the host is Gloo: these take 1 ms (two ranks), a thread
    and a socket to each other rank, and are closed with the group.
    """
    name, own = f"{process_group.group_name}/{signed_length}", None
    backend: Any = process_group._get_backend(_CPU)
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
    if dist.is_gloo_available() and isinstance(backend, c10d.ProcessGroupGloo) and process_group.size() > 1:
        if given_up(process_group.group_name, signed_length):
            raise RuntimeError(refusals.GIVEN_UP)
        _opened[name] += 1  # here alone: a group of one rank may have had the name on that rank
        own = _connected(process_group, f"distclip/{name}/{_opened[name]}", backend.options)
    opened = _channels.setdefault(process_group, {})[signed_length] = Channel(f"{name}/{_opened[name]}", own)
    return opened


def _connected(process_group: dist.ProcessGroup, name: str, theirs: Any) -> dist.ProcessGroup:
    """A group of the same ranks; ``theirs``: the options of Gloo in ``process_group``."""
    rank, size = process_group.rank(), process_group.size()
    store = c10d.PrefixStore(name, c10d._get_default_store())
    options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._threads = theirs._timeout, 1  # one collective at a time
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
