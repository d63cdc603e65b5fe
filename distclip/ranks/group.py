"""The clipping group: the ranks that make one norm together, and where their words are reduced."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.device import device_of, has_float64
from .connections import TALK, channel, open_channel
from .roll_call import Meeting

Axis: TypeAlias = DeviceMesh | dist.ProcessGroup
"""Ranks along one mesh axis: a 1-D slice such as ``mesh["pp"]``, or a process group."""


_clippers: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ClippingGroup:
    """The ranks that take part, in group order; nothing to talk through for one process without torch.distributed.

    ``rank`` is this process's index in ``ranks``; ``ranks`` holds global ranks, as a range where they can be one: a
    plan keeps no more for 16384 ranks than for two.
    """

    reference: ref[dist.ProcessGroup] | None  # weak: a plan must not keep a group alive that was destroyed
    ranks: Sequence[int]
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Self:
        """``group``, or the default group, or this process alone when torch.distributed is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ValueError("group was given but torch.distributed is not initialised: call init_process_group")
            return cls(None, (0,), 0)
        process_group = group or dist.group.WORLD
        assert process_group is not None
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the clipping group: only the ranks of `group` may call")
        return cls(ref(process_group), _compact(dist.get_process_group_ranks(process_group)), rank)

    @classmethod
    def alone(cls) -> Self:
        """This process without anybody else: nothing is reduced."""
        initialised = dist.is_available() and dist.is_initialized()
        return cls(None, (dist.get_rank() if initialised else 0,), 0)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """What the group talks through, or None; RuntimeError after it was destroyed."""
        if self.reference is None:
            return None
        process_group = self.reference()
        if process_group is None:
            raise RuntimeError("the process group was destroyed: build the Clipper anew")
        return process_group

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def global_rank(self) -> int:
        return self.ranks[self.rank]

    @property
    def clippers(self) -> int:
        """How many Clippers were built for it."""
        process_group = self.process_group
        return 1 if process_group is None else _clippers.get(process_group, 0)

    def add_clipper(self) -> int:
        """Count one more, which its ranks build together; how many there were, the same on all of them."""
        process_group = self.process_group
        if process_group is None:
            return 0
        number = _clippers.get(process_group, 0)
        _clippers[process_group] = number + 1
        return number

    def all_reduce(
        self,
        words: Tensor,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        number: int = TALK,
        call: str = "",
    ) -> Tensor:
        """Reduce ``words`` in place over the group and return them: one collective, or none in one process.

        ``number``: how many words there are, below 0 if they are not added up, where ranks that disagree might send
        others at the same time; words on the host then meet none of another number. ``call``: what this rank makes it
        for, as errors say.
        RuntimeError that names the ranks that did not come, where the backend gave up waiting for them.
        """
        process_group = self.process_group
        if process_group is not None:
            meeting = Meeting(process_group.group_name, number, self.ranks, call)
            start = time.monotonic()
            try:
                if words.device.type == "cpu":
                    through = channel(process_group, number)
                    if through is None:
                        meeting.open()
                        through = open_channel(process_group, number)
                    meeting.wait(through.begin(process_group, words, op))
                else:
                    dist.all_reduce(words, op, group=process_group)
            except RuntimeError as error:
                missing = meeting.who_is_missing(time.monotonic() - start)
                raise RuntimeError(f"{missing} ({str(error).splitlines()[0]})") from error
        return words

    def device_for(self, tensors: Iterable[Tensor]) -> torch.device:
        """Where the reduced words live: the device of most elements if the group's backend reduces there.

        NCCL reduces on CUDA only. Gloo would copy CUDA words to the host and back, so its words live on the CPU.
        What is on the meta device has no gradient. Words are float64: of a device without it they live on the CPU,
        and a group that reduces nowhere else is a ValueError.
        """
        home = _home_of(list(tensors))
        if self.process_group is None:
            return home if has_float64(home) else torch.device("cpu")
        backends = dict(
            pair.split(":", 1) for pair in dist.get_backend_config(self.process_group).split(",") if ":" in pair
        )
        if home.type != "cpu" and backends.get(home.type) not in (None, "gloo", "fake") and has_float64(home):
            return home
        if "cpu" in backends:
            return torch.device("cpu")
        kind = next(iter(backends))
        device = torch.device(kind, torch.get_device_module(kind).current_device())
        if not has_float64(device):
            raise ValueError(
                f"norms are reduced in float64, which {device} has not, and this group reduces nowhere else: give it a "
                f"backend for the CPU too, as in init_process_group('cpu:gloo,{kind}:{backends[kind]}')"
            )
        return device


def _home_of(tensors: Sequence[Tensor]) -> torch.device:
    devices = {device for device in map(device_of, tensors) if device.type != "meta"}
    if len(devices) < 2:
        return devices.pop() if devices else torch.device("cpu")
    elements: Counter[torch.device] = Counter()
    for tensor in tensors:
        if not tensor.is_meta:
            elements[tensor.device] += tensor.numel()
    return elements.most_common(1)[0][0]


def _compact(ranks: list[int]) -> Sequence[int]:
    run = range(ranks[0], ranks[0] + len(ranks))
    return run if ranks == list(run) else tuple(ranks)


def axis_ranks(axis: Axis) -> tuple[int, ...]:
    """The global ranks along ``axis`` that share this rank's other coordinates."""
    if isinstance(axis, DeviceMesh):
        if axis.ndim != 1:
            raise ValueError(f"split_over takes 1-D mesh slices such as mesh['pp']; got a {axis.ndim}-D mesh {axis}")
        axis = axis.get_group()
    if not isinstance(axis, dist.ProcessGroup):
        raise ValueError(
            f"split_over names a group that rank {dist.get_rank()} is no member of: give every rank the group that it "
            "is in itself, as mesh['pp'] and dist.new_subgroups() do, or say layout="
        )
    return tuple(dist.get_process_group_ranks(axis))
