"""Our collectives and their connections: on the host Gloo connections of our own, separate for each signed length.

Gloo pairs messages by their order alone. In a group that others use too, a rank that misses a call of ours would send
its next gradients where the others send their message: if sizes differ a process ends by ``std::terminate``, and if
they are equal they are summed. On connections of our own the others wait for that rank until the timeout, and then name
it. For the same reason messages of different signed lengths have different connections.

On accelerators the group's own backend is used: communicators are expensive there, and a second one may block the
first.

Private torch API, 2.13: the default store; a process group made by hand, as ``new_group`` makes it. That one itself
needs every rank of the job, or ranks that have made equally many groups before.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
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
"""In place of a signed length: for messages between ranks that are known to agree on the next collective."""

SPIN = 1e-3  # seconds to wait for a collective without sleeping: three times what one takes

_CPU = torch.device("cpu")
_GLOO = dist.ProcessGroup.BackendType.GLOO

give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


@dataclass(slots=True)
class Channel:
    """The connections for messages of one signed length on the host: [Note: what travels] in message.py.

    ``own``: a process group of its own, or None where the clipping group's is used; never keeps the latter alive.
    ``begun``: how many collectives were begun on it, the same on every rank.
    """

    name: str
    own: dist.ProcessGroup | None
    begun: int = 0
    latest: dist.Work | None = None

    def begin(self, process_group: dist.ProcessGroup, message: Tensor, op: dist.ReduceOp.RedOpType) -> dist.Work:
        """Start to reduce ``message`` in place, without a wait."""
        options = dist.AllreduceOptions()
        options.reduceOp = op  # type: ignore[assignment]
        return self._begin(process_group, lambda group: group.allreduce([message], options))

    def begin_all_to_all(
        self, process_group: dist.ProcessGroup, rows: Tensor, received: Tensor, outgoing: list[int], incoming: list[int]
    ) -> dist.Work:
        """Start to exchange rows, so many ``outgoing`` to and ``incoming`` from each rank, without a wait."""
        return self._begin(process_group, lambda group: group.alltoall_base(received, rows, incoming, outgoing))

    def _begin(self, process_group: dist.ProcessGroup, start: Callable[[dist.ProcessGroup], dist.Work]) -> dist.Work:
        self.begun += 1
        if self.own is None:
            return start(process_group)
        # Gloo's thread lets go of a collective a moment after the wait for it, and must not be the last to do so:
        # freeing its tensor takes the GIL, and asking for that aborts a process that is ending.
        self.latest = work = start(self.own)
        return work

    def give_up(self) -> None:
        """Let what is under way fail, on all ranks: this process would not end before the group's timeout otherwise."""
        if self.own is None or self.latest is None or self.latest.is_completed():
            return
        # A receive that times out closes the connections to all ranks; by one that is closed already it fails at once.
        for rank in set(range(self.own.size())) - {self.own.rank()}:
            with suppress(RuntimeError):
                self.own.recv([torch.empty(1)], rank, 0).wait(timedelta(milliseconds=1))


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

    * ``signed_length``: the length of the message, negative if it is not summed. On the host it is never reduced with
      one of another signed length, which a rank that disagrees may send at the same time.
    * ``call``: what errors say that this rank was in.

    Waits for it on the host; not on an accelerator. RuntimeError that names the ranks that did not join, where the
    backend gave up waiting for them.
    """
    if group.reference is not None:
        if message.device.type == "cpu":
            _join(group, lambda own, whole: own.begin(whole, message, op), signed_length, call)
        else:
            _join_on_device(group, lambda whole: dist.all_reduce(message, op, group=whole), signed_length, call)
    return message


def pass_on(group: ClippingGroup, rows: Tensor, places: int, count: int) -> Tensor:
    """Send ``rows`` to the rank so many ``places`` further on, and return the ``count`` rows of the one as far behind.

    One all-to-all, all of whose other parts are empty, for ranks that agree on the next collective. Waits and errors
    are those of :func:`all_reduce`.
    """
    # Not a send and a receive: Gloo closes all connections where the wait for a receive is cut short, as ours are.
    outgoing, incoming = [0] * group.size, [0] * group.size
    outgoing[(group.rank + places) % group.size] = len(rows)
    incoming[(group.rank - places) % group.size] = count
    received = rows.new_empty(count, *rows.shape[1:])
    if rows.device.type == "cpu":
        _join(group, lambda own, whole: own.begin_all_to_all(whole, rows, received, outgoing, incoming))
    else:
        _join_on_device(group, lambda whole: dist.all_to_all_single(received, rows, incoming, outgoing, group=whole))
    return received


def _join(
    group: ClippingGroup,
    begin: Callable[[Channel, dist.ProcessGroup], dist.Work],
    signed_length: int = ANY_LENGTH,
    call: str = "",
) -> None:
    """Begin a collective on the channel of this signed length, and wait for it."""
    process_group, started, opened = _process_group_of(group), time.monotonic(), None
    try:
        opened = channel(process_group, signed_length) or open_channel(process_group, signed_length)
        work = begin(opened, process_group)
        if _is_done_soon(work):
            work.wait()  # raises what went wrong
        else:
            _slow(group, process_group, signed_length, call, opened).wait(work)
    except RuntimeError as error:
        if opened is not None:
            opened.give_up()
        slow = _slow(group, process_group, signed_length, call, opened)
        raise _of_missing(slow, started, error) from error
    awaited.clear()


def _join_on_device(
    group: ClippingGroup, make: Callable[[dist.ProcessGroup], object], signed_length: int = ANY_LENGTH, call: str = ""
) -> None:
    """Queue a collective on the accelerator's own connections."""
    process_group, started = _process_group_of(group), time.monotonic()
    try:
        make(process_group)
    except RuntimeError as error:
        slow = _slow(group, process_group, signed_length, call, None)
        raise _of_missing(slow, started, error) from error
    awaited.clear()


def _process_group_of(group: ClippingGroup) -> dist.ProcessGroup:
    process_group = (group.reference and group.reference()) or group.process_group  # the latter raises: destroyed
    assert process_group is not None
    return process_group


def _of_missing(slow: SlowCollective, started: float, error: RuntimeError) -> RuntimeError:
    """The error that says which ranks are missing in a collective that has failed with ``error``."""
    return RuntimeError(f"{slow.who_is_missing(time.monotonic() - started)} ({str(error).splitlines()[0]})")


def _is_done_soon(work: dist.Work) -> bool:
    """Whether it is done within ``SPIN`` seconds, waited for without sleeping, while others on this core may run."""
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
    stopped = following(process_group, int(opened is None))
    return SlowCollective(group.ranks, process_group.group_name, signed_length, call, name, stopped)


def following(process_group: dist.ProcessGroup, ahead: int = 1) -> str:
    """Where in the store ranks say that they stopped before a collective: the latest here, or so many ``ahead`` of it.

    The same on every rank, whatever the channel; empty before the first channel is open.
    """
    opened = list(_channels.get(process_group, {}).values())
    number = sum(channel.begun for channel in opened) + ahead
    return f"distclip/stopped/{opened[0].name}/{number}" if opened else ""


def channel(process_group: dist.ProcessGroup, signed_length: int) -> Channel | None:
    """The channel of ``process_group`` for messages of this signed length, None if it is not open yet."""
    known = _channels.get(process_group)
    return None if known is None else known.get(signed_length)


def open_channel(process_group: dist.ProcessGroup, signed_length: int) -> Channel:
    """Open that channel: every rank of the group must call. RuntimeError where not all do within the group's timeout.

    It has connections of its own where the group's backend on the host is Gloo: they cost 1 ms (two ranks), a thread
    and a socket to each other rank, and close with the group.
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
    """A new Gloo group of the same ranks; ``theirs``: the Gloo options of ``process_group``."""
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
