"""Neighbours in memory are one tensor: gradients that lie side by side are summed and scaled in one run.

DDP buckets, FSDP1 flat gradients and FSDP2 reduce-scatter outputs lay many gradients into one storage. Where they lay
is remembered, never what was there: a kept view would keep the gradients of the last step alive. Every step looks at
what could have changed, and whoever finds a difference looks at each gradient anew; nothing here talks to other ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import add, attrgetter, is_, sub
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import LayoutError
from ..layouts.piece import Piece, local_tensor
from .look import Local
from .sharing import first_shared

attributes = attrgetter("__dict__")  # of a tensor: the same object as long as the tensor is, and it keeps none alive
facts = attrgetter("dtype", "layout")
size_in_bytes = attrgetter("nbytes")
WIDE = (torch.float64, torch.complex128)
LONGEST_REST = 1 << 10


@dataclass(slots=True)
class Run:
    """Elements that lie side by side, ``numel`` of them from ``start`` elements after the first of tensor ``first``.

    ``others``: the tensors that go on where it ends, with their distance in bytes from the first one. ``whole``: it is
    just one tensor, which may then lie in any way.
    """

    first: int
    start: int
    numel: int
    replicas: int
    whole: bool
    others: tuple[tuple[int, int], ...]

    def order(self) -> tuple[int, int]:
        """Runs are summed in the order of the parameters, not of addresses, which differ from process to process."""
        return min((self.first, *(k for k, _ in self.others))), self.start


Shares: TypeAlias = Sequence[tuple[int, Sequence[int]]]


class Kind(NamedTuple):
    """What members of one run have in common."""

    device: str
    dtype: str
    replicas: int
    storage: int


class Member(NamedTuple):
    """A contiguous part of tensor ``k``, from its element ``start`` on, while neighbours are sought; bytes."""

    kind: Kind
    address: int
    end: int
    k: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """Local gradients of one step.

    * ``runs``: what is summed on the host, and scaled: merged where they are neighbours.
    * ``shares``: how many ranks hold the same elements, and which of ``runs`` those are.
    * ``tensors``: one for each gradient that exists, and ``spans``: which of them, and what of it, each piece is.
    * ``indices``: which pieces these are.
    * ``wide``: whether some of them are float64, which their parameters need not be.
    """

    runs: list[Tensor]
    shares: Shares
    tensors: Sequence[Tensor]
    spans: Sequence[tuple[int, slice | None]]
    indices: Sequence[int]
    wide: bool

    def parts(self) -> list[Tensor]:
        """The local gradients piece by piece."""
        return [self.tensors[k] if span is None else self.tensors[k][span] for k, span in self.spans]


class Runs:
    """Where the gradients of one plan lay when it was made."""

    __slots__ = (
        "_addresses",
        "_attributes",
        "_complex",
        "_contiguous",
        "_distances",
        "_facts",
        "_gaps",
        "_indices",
        "_numels",
        "_runs",
        "_shares",
        "_spans",
        "_specs",
        "_strides",
        "_told",
        "_types",
        "_wide",
        "merged",
    )

    def __init__(
        self,
        gradients: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        runs: list[Run],
        spans: list[tuple[int, slice | None]],
        indices: list[int],
    ) -> None:
        present = [g for g in gradients if g is not None]
        self._types = list(map(type, gradients))
        self._gaps = len(present) < len(gradients)
        self._specs: list[Any] | None = None
        if any(isinstance(g, DTensor) for g in present):
            self._specs = [g._spec if isinstance(g, DTensor) else None for g in present]
        self._attributes: list[Any] | None = None
        self._told = self._specs is not None and not any(spec is None for spec in self._specs)
        if not self._gaps and self._specs is None:
            self._attributes = list(map(attributes, tensors))
        self._complex = any(t.is_complex() for t in tensors)
        self._facts = list(map(facts, tensors))
        self._wide = any(t.dtype in WIDE for t in tensors)
        self._numels = list(map(Tensor.numel, tensors))
        self._contiguous = list(map(Tensor.is_contiguous, tensors))
        self._strides = [(k, tensors[k].stride()) for k, each in enumerate(self._contiguous) if not each]
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._runs = runs
        self.merged = any(not run.whole for run in runs)
        others = [(k, run.first, distance) for run in runs for k, distance in run.others]
        self._distances = tuple(map(list, zip(*others, strict=True))) if others else ([], [], [])
        self._shares = shares_of([run.replicas for run in runs])
        self._spans = spans
        self._indices = indices

    @classmethod
    def of(
        cls,
        gradients: Sequence[Tensor | None],
        local: Local,
        pieces: Sequence[Piece],
        sources: Sequence[int],
        replicas: Sequence[int],
    ) -> Self | None:
        """Remember where ``gradients`` lie, in which ``local`` was found; None where some are not plain memory."""
        present = [s for s, gradient in enumerate(gradients) if gradient is not None]
        tensors = [local_tensor(g) for g in gradients if g is not None]
        plain = all(type(t) is Tensor and t.layout == torch.strided for t in tensors)
        if not plain or local.instead or local.misplaced or local.error:
            return None
        position = {source: k for k, source in enumerate(present)}
        spans = [(position[sources[i]], pieces[i].span) for i in local.indices]
        apart: list[Run] = []
        members: list[Member] = []
        starts = list(map(Tensor.data_ptr, local.parts))
        ends = list(map(add, starts, map(size_in_bytes, local.parts)))
        borders = set(starts).intersection(ends)
        for (k, span), i, part, start, end in zip(spans, local.indices, local.parts, starts, ends, strict=True):
            alone = start not in borders and end not in borders
            if span is None and (alone or not part.is_contiguous()):
                if part.numel():
                    apart.append(Run(k, 0, part.numel(), replicas[i], True, ()))
            elif part.numel():
                assert part.is_contiguous(), "a flat gradient is"
                kind = Kind(str(part.device), str(part.dtype), replicas[i], part.untyped_storage().data_ptr())
                members.append(Member(kind, start, end, k, 0 if span is None else span.start, part.numel()))
        merged = list(_merged(members, tensors))
        runs = sorted([*apart, *merged], key=Run.order) if merged else apart  # which are in order
        return cls(gradients, tensors, runs, spans, local.indices)

    def gather(self, gradients: Sequence[Tensor | None], same: bool) -> Gathered | None:
        """The runs of ``gradients``, or None where these do not lie as those did that are remembered."""
        tensors: Any = gradients if same or self._are_the_same(gradients) else self._alike(gradients)
        runs = None if tensors is None else self._found_in(tensors, same)
        if runs is None:
            return None
        return Gathered(runs, self._shares, tensors, self._spans, self._indices, self._wide)

    def are_there(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the very tensors, at the same addresses: what changes one of them in place moves it.

        What makes it smaller in place does not (``gradient.data = gradient.data[:5]``), but is seen by its size.
        """
        tensors: Any = gradients
        return self._are_the_same(gradients) and list(map(Tensor.data_ptr, tensors)) == self._addresses

    def _are_the_same(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the very tensors of the last time, as DDP's bucket views are, and of the same size."""
        if self._attributes is None:
            return False
        try:
            if all(map(is_, map(attributes, gradients), self._attributes)):
                tensors: Any = gradients
                return list(map(Tensor.numel, tensors)) == self._numels and self._lie_alike(tensors)
        except AttributeError:  # None has none
            pass
        self._attributes = None  # they are made anew each step: do not ask again
        return False

    def _alike(self, gradients: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The local tensors of ``gradients`` if these differ from those remembered in nothing but where they lie."""
        if list(map(type, gradients)) != self._types:
            return None
        tensors: list[Any] = [g for g in gradients if g is not None] if self._gaps else list(gradients)
        told = False
        if self._specs is not None:
            specs = [getattr(g, "_spec", None) for g in tensors]
            if specs != self._specs:
                return None
            told = self._told and all(map(is_, specs, self._specs))  # FSDP2 keeps one, in which shape and dtype are
            tensors = [g if s is None else g._local_tensor for g, s in zip(tensors, specs, strict=True)]
        if not told and list(map(facts, tensors)) != self._facts:
            return None
        if not told and list(map(Tensor.numel, tensors)) != self._numels:
            return None
        if self._complex and any(map(Tensor.is_conj, tensors)):
            return None
        return tensors if self._lie_alike(tensors) else None

    def _lie_alike(self, tensors: Sequence[Tensor]) -> bool:
        return list(map(Tensor.is_contiguous, tensors)) == self._contiguous and all(
            tensors[k].stride() == stride for k, stride in self._strides
        )

    def _found_in(self, tensors: list[Tensor], there: bool) -> list[Tensor] | None:
        if not self.merged:
            runs = [tensors[run.first] for run in self._runs]
            # Of two that share a storage and do not begin together one has an offset: 40 ns each to see that none has.
            apart = there or not any(map(Tensor.storage_offset, runs)) or first_shared(runs) is None
            return runs if apart else None
        try:
            moved = False
            if not there:
                addresses = list(map(Tensor.data_ptr, tensors))
                moved = addresses != self._addresses
                if moved and not self._moved_together(addresses):
                    return None
            runs = [
                tensor if run.whole else tensor.as_strided((run.numel,), (1,), tensor.storage_offset() + run.start)
                for run in self._runs
                for tensor in (tensors[run.first],)
            ]
            return None if moved and first_shared(runs) is not None else runs
        except RuntimeError:  # no memory of its own, or side by side by chance, in storages of their own
            return None

    def _moved_together(self, addresses: list[int]) -> bool:
        """Whether the tensors of each run lie as far from each other as before: FSDP2's blocks are new each step."""
        others, firsts, distances = self._distances
        return list(map(sub, map(addresses.__getitem__, others), map(addresses.__getitem__, firsts))) == distances


def shares_of(replicas: Iterable[int]) -> Shares:
    """The positions of equal numbers together: (number, positions), once for each number."""
    positions: dict[int, list[int]] = {}
    for k, number in enumerate(replicas):
        positions.setdefault(number, []).append(k)
    return list(positions.items())


def _merged(members: list[Member], tensors: Sequence[Tensor]) -> Iterator[Run]:
    """The runs of ``members``: each goes on as long as the next of the same kind starts where it ends."""
    run: list[Member] = []
    for member in sorted(members):
        if run and (member.kind != run[-1].kind or member.address != run[-1].end):
            yield _run(run, tensors)
            run = []
        run.append(member)
    if run:
        yield _run(run, tensors)


def _run(members: Sequence[Member], tensors: Sequence[Tensor]) -> Run:
    first = members[0]
    base = tensors[first.k].data_ptr()
    others = {m.k: tensors[m.k].data_ptr() - base for m in members if m.k != first.k}
    whole = not others and sum(m.numel for m in members) == tensors[first.k].numel()
    return Run(first.k, first.start, sum(m.numel for m in members), first.kind.replicas, whole, tuple(others.items()))


class Memory:
    """What a plan remembers of one step for the next: nothing that another rank would have to know.

    Where gradients never lie twice alike, noting where they lie rests for 2, 4, ... up to 1024 steps. ``fault``: what
    this rank saw in the last step, for the next to tell the others.
    """

    __slots__ = ("_calls", "_next", "_rest", "_runs", "fault")

    def __init__(self) -> None:
        self.fault: LayoutError | None = None
        self._runs: Runs | None = None
        self._calls = 0
        self._next = 1
        self._rest = 1

    def knows(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether ``gradients`` are the very tensors that were noted, and where they were."""
        return self._runs is not None and self._runs.are_there(gradients)

    def take_fault(self) -> LayoutError | None:
        """The fault, which is then forgotten."""
        fault, self.fault = self.fault, None
        return fault

    def gather(self, gradients: Sequence[Tensor | None], same: bool) -> Gathered | None:
        """The runs of ``gradients`` if they lie as noted; where none are neighbours, None in calls 4, 8, 16, ... too.

        ``same``: it :meth:`knows` them.
        """
        self._calls += 1
        if self._runs is None:
            return None
        if not self._runs.merged and self._calls & (self._calls - 1) == 0 and self._calls >= self._next:
            return None
        gathered = self._runs.gather(gradients, same)
        if gathered is not None:
            self._rest, self._next = 1, 0
        return gathered

    def remember(
        self,
        gradients: Sequence[Tensor | None],
        local: Local,
        pieces: Sequence[Piece],
        sources: Sequence[int],
        replicas: Sequence[int],
    ) -> Gathered | None:
        """Note where ``gradients`` lie, unless that was of no use lately, and return their runs."""
        if self._calls < self._next:
            return None
        self._runs = Runs.of(gradients, local, pieces, sources, replicas)
        self._rest = min(2 * self._rest, LONGEST_REST)
        self._next = self._calls + self._rest
        return None if self._runs is None else self._runs.gather(gradients, same=False)
