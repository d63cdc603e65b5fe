"""Neighbours in memory are one tensor: gradients that lie side by side are summed and scaled in one run.

DDP buckets, FSDP1 flat gradients and FSDP2 reduce-scatter outputs lay many gradients into one storage. Here runs are
found; :mod:`.memory` looks in every step whether the gradients still lie so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

from torch import Tensor

from ..kernels.dtypes import size_in_bytes
from ..layouts.piece import Piece
from .local import Local


@dataclass(slots=True)
class Run:
    """Elements that lie side by side, ``numel`` of them from ``start`` elements after the first of tensor ``first``.

    ``others``: the tensors that go on where it ends, with their distance in bytes from the first one. ``whole``: it is
    just one tensor, which may then lie in any way. ``kind``: replicas and family.
    """

    first: int
    start: int
    numel: int
    kind: tuple[int, int]
    whole: bool
    others: tuple[tuple[int, int], ...]

    def order(self) -> tuple[int, int]:
        """Runs are summed in the order of the parameters, not of addresses, which differ from process to process."""
        return min((self.first, *(k for k, _ in self.others))), self.start


class Kind(NamedTuple):
    """What members of one run have in common."""

    device: str
    dtype: str
    copies: tuple[int, int]  # replicas and family
    storage: int


class Member(NamedTuple):
    """A contiguous part of tensor ``k``, from its element ``start`` on, while neighbours are sought; bytes."""

    kind: Kind
    address: int
    end: int
    k: int
    start: int
    numel: int


def spans_of(
    local: Local, gradients: Sequence[Tensor | None], pieces: Sequence[Piece], sources: Sequence[int]
) -> list[tuple[int, slice | None]]:
    """For each piece of ``local``: which of the gradients that exist it lies in, and what of it it is."""
    present = [s for s, gradient in enumerate(gradients) if gradient is not None]
    position = {source: k for k, source in enumerate(present)}
    return [(position[sources[i]], pieces[i].span) for i in local.indices]


def find_runs(
    local: Local, spans: Sequence[tuple[int, slice | None]], tensors: Sequence[Tensor], kinds: Sequence[tuple[int, int]]
) -> list[Run]:
    """The runs of the parts of ``local``, which are ``spans`` of ``tensors``; empty parts are in none."""
    apart: list[Run] = []
    members: list[Member] = []
    parts = local.parts()
    starts = list(map(Tensor.data_ptr, parts))
    ends = list(map(add, starts, map(size_in_bytes, parts)))
    borders = set(starts).intersection(ends)
    for (k, span), i, part, start, end in zip(spans, local.indices, parts, starts, ends, strict=True):
        alone = start not in borders and end not in borders
        if span is None and (alone or not part.is_contiguous()):
            if part.numel():
                apart.append(Run(k, 0, part.numel(), kinds[i], True, ()))
        elif part.numel():
            assert part.is_contiguous(), "a flat gradient is"
            kind = Kind(str(part.device), str(part.dtype), kinds[i], part.untyped_storage().data_ptr())
            members.append(Member(kind, start, end, k, 0 if span is None else span.start, part.numel()))
    merged = list(_merged(members, tensors))
    return sorted([*apart, *merged], key=Run.order) if merged else apart  # which are in order


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
    return Run(first.k, first.start, sum(m.numel for m in members), first.kind.copies, whole, tuple(others.items()))
