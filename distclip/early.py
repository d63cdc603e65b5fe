"""What is kept of a block of gradients that was summed during the backward, and whether it is still theirs.

A sum counts where its gradients are still the very tensors, at the same address and version, that were summed. Versions
alone do not tell: collectives, ``.data`` and foreach functions on DTensors (GradScaler unscales by one) leave them as
they are. So some elements of every gradient are kept and compared too, which shows whatever changes a gradient as a
whole. What changes few elements and no version is not seen: ``gradient.data[rows] = 0``, or torch's foreach clamp on
DTensors.

On the host a block is one number, and comparing costs nothing. On an accelerator the norm of each gradient waits in a
slot; the device compares by itself, in the kernels of the step, and sums again what has changed: the host never knows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from .flags import in_capture
from .gradient import COMPLEX, REAL
from .kernels import triton
from .kernels.triton.slots import SAMPLES
from .measured import NOTHING, Taken
from .neighbours import attributes
from .piece import local_tensor
from .plan import Plan

SUMMED = REAL + COMPLEX
version = attrgetter("_version")

Block: TypeAlias = tuple[int, ...]
"""The sources of the gradients that are reduced together."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The gradients of one block, by what the host sees change when they do."""

    attributes: list[Any]
    versions: list[int]
    addresses: list[int]

    @classmethod
    def of(cls, gradients: Sequence[Tensor]) -> Self:
        return cls(_identity(gradients), _versions(gradients), _addresses(gradients))

    def holds(self, gradients: Sequence[Tensor]) -> bool:
        """Whether ``gradients`` are what was seen."""
        if not all(map(is_, _identity(gradients), self.attributes)) or _versions(gradients) != self.versions:
            return False
        return _addresses(gradients) == self.addresses


class Early(Protocol):
    """Where sums are kept: :class:`OnHost` or :class:`OnDevice`."""

    def take(self, block: Block, gradients: Sequence[Tensor]) -> Seen | None:
        """Sum the gradients of ``block``, all of them; None where they cannot be summed as they are."""

    def taken(self, holding: Mapping[Block, Seen]) -> Taken:
        """What was taken of these blocks, in whose gradients the host saw no change."""

    def forget(self) -> None:
        """After a step: its sums are of no use for the next."""


@dataclass(frozen=True, slots=True)
class Sum(Seen):
    """On the host; with one number for the block, and samples of its gradients."""

    amount: float
    samples: list[Tensor]

    def holds(self, gradients: Sequence[Tensor]) -> bool:
        if not Seen.holds(self, gradients):
            return False
        return all(map(torch.equal, map(_sample, map(local_tensor, gradients)), self.samples))


class OnHost:
    """Sums of gradients on the CPU."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._replicas = dict(zip(plan.sources, plan.replicas, strict=True))  # FSDP1, one source of many, has no hook

    def take(self, block: Block, gradients: Sequence[Tensor]) -> Sum | None:
        """None also where zeros would hide that a gradient is scaled later."""
        replicas = {self._replicas[source] for source in block}
        tensors = list(map(local_tensor, gradients))
        if len(replicas) > 1 or not all(map(_is_plain, tensors)):
            return None
        samples = list(map(_sample, tensors))
        if not all(len(few) == t.numel() or few.any() for few, t in zip(samples, tensors, strict=True)):
            return None
        seen = _identity(gradients), _versions(gradients), _addresses(gradients)
        return Sum(*seen, self._plan.sum_on_host(tensors, replicas.pop()), samples)

    def taken(self, holding: Mapping[Block, Seen]) -> Taken:
        amounts = [seen.amount for seen in holding.values() if isinstance(seen, Sum)]
        return Taken(amounts, frozenset(source for block in holding for source in block))

    def forget(self) -> None:
        """Blocks are kept by the caller."""


class OnDevice:
    """Norms of gradients on one NVIDIA GPU, by Triton's kernels.

    They are taken on the stream that the hook runs on, into memory made here. A step waits for them on its own stream,
    and hooks of the next backward for the step; the host waits for nobody.
    """

    def __init__(self, plan: Plan) -> None:
        """NotImplementedError where Triton's kernels were not asked for, or do not run."""
        devices = {piece.device for piece in plan.pieces}
        if len(devices) > 1 or not all(map(triton.chosen, devices)):
            raise NotImplementedError(
                "overlap=True on accelerators takes Triton's kernels on one NVIDIA GPU a rank, which have not run on a "
                "GPU yet: set DISTCLIP_TRITON=1 to try them, or leave overlap out"
            )
        self._p = plan.p
        self._device = devices.pop()
        self._places = {source: place for place, source in enumerate(plan.sources)}
        self._slots = triton.Slots.of(len(plan.pieces), self._device)
        self._arrived: dict[Block, torch.cuda.Event | None] = {}  # blocks with norms in slots, and when they are there
        self._read: torch.cuda.Event | None = None  # when the latest step had read the slots

    def take(self, block: Block, gradients: Sequence[Tensor]) -> Seen | None:
        tensors = list(map(local_tensor, gradients))
        alike = all(map(_is_plain, tensors)) and all(t.device == self._device for t in tensors)
        if not alike or in_capture(self._device):
            return None
        if self._read is not None:
            torch.cuda.current_stream(self._device).wait_event(self._read)
        done = triton.take_norms(tensors, self._p, self._slots, [self._places[source] for source in block])
        self._arrived[block] = self._recorded()
        return Seen.of(gradients) if done else None

    def taken(self, holding: Mapping[Block, Seen]) -> Taken:
        """Nothing inside the capture of a CUDA graph, which no hook would precede in a replay."""
        if in_capture(self._device):
            return NOTHING
        for event in self._arrived.values():
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
        sources = frozenset(source for block in holding for source in block)
        late = {source for block in self._arrived for source in block if source not in sources}
        self._slots.forget([self._places[source] for source in late])
        return Taken(sources=sources, slots=self._slots)

    def forget(self) -> None:
        if in_capture(self._device):
            return
        self._slots.forget()
        self._arrived.clear()
        self._read = self._recorded()

    def _recorded(self) -> torch.cuda.Event | None:
        """An event on the current stream; there are none on the CPU, in Triton's interpreter."""
        if self._device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dtype in SUMMED and not tensor.is_conj()


def _identity(gradients: Sequence[Tensor]) -> list[Any]:
    """What belongs to each gradient, and to the local tensor of each DTensor, and to no other."""
    return [attributes(t) for t in (*gradients, *map(local_tensor, gradients))]


def _versions(gradients: Sequence[Tensor]) -> list[int]:
    """What changes a DTensor raises its own version, or its local tensor's, seldom both."""
    return [version(t) for t in (*gradients, *map(local_tensor, gradients))]


def _addresses(gradients: Sequence[Tensor]) -> list[int]:
    return [local_tensor(gradient).data_ptr() for gradient in gradients]


def _sample(tensor: Tensor) -> Tensor:
    """Elements spread over ``tensor``, copied: all of a small one. 3 us."""
    step = -(-tensor.numel() // SAMPLES) | 1  # odd, or all might be of one column
    return tensor.take(torch.arange(0, tensor.numel(), step))
