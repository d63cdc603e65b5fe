"""The clipping group: which ranks make one norm together, and on which device. It communicates nothing itself."""

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
from . import refusals

Axis: TypeAlias = DeviceMesh | dist.ProcessGroup
"""Ranks along one mesh axis: a 1-D slice such as ``mesh["pp"]``, or a process group."""


@dataclass(slots=True)
class Clippers:
    """How many Clippers were built for one group: the same on all of its ranks, which build them together."""

    count: int = 0


_clippers: WeakKeyDictionary[dist.ProcessGroup, Clippers] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ClippingGroup:
    """The ranks that take part, in group order. One process without torch.distributed has nothing to communicate.

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
                raise ValueError(refusals.NOT_INITIALISED)
            return cls(None, (0,), 0)
        process_group = group or dist.group.WORLD
        assert process_group is not None
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError(refusals.NOT_IN_GROUP.format(rank=dist.get_rank()))
        return cls(ref(process_group), _compact(dist.get_process_group_ranks(process_group)), rank)

    @classmethod
    def alone(cls) -> Self:
        """This process without anybody else: nothing is reduced."""
        initialised = dist.is_available() and dist.is_initialized()
        return cls(None, (dist.get_rank() if initialised else 0,), 0)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks, None for one process alone; RuntimeError after it was destroyed."""
        if self.reference is None:
            return None
        process_group = self.reference()
        if process_group is None:
            raise RuntimeError(refusals.DESTROYED)
        return process_group

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def global_rank(self) -> int:
        return self.ranks[self.rank]

    @property
    def clippers(self) -> "Clippers":
        """The count of Clippers built for this group, kept as long as its process group lives."""
        process_group = self.process_group
        return Clippers() if process_group is None else _clippers.setdefault(process_group, Clippers())

    def device_for(self, tensors: Iterable[Tensor]) -> torch.device:
        """The device of the message: that of most elements if the group's backend reduces there, else the CPU.

        Tensors on the meta device do not count. ValueError where the group reduces only on devices without float64.
        """
        # NCCL reduces on CUDA only. Gloo would copy a message on CUDA to the host and back.
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
            raise ValueError(refusals.NO_FLOAT64.format(device=device, kind=kind, backend=backends[kind]))
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
            raise ValueError(refusals.NOT_ONE_DIM.format(ndim=axis.ndim, mesh=axis))
        axis = axis.get_group()
    if not isinstance(axis, dist.ProcessGroup):
        raise ValueError(refusals.NOT_ON_THIS_AXIS.format(rank=dist.get_rank()))
    return tuple(dist.get_process_group_ranks(axis))
