"""Slots: where in the message the sums go that are finer than the model's, and what this rank puts there.

A local sum is that of one piece, or of one row of it where rows were asked for: [Note: units and slots] in
policies/statistics.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..gradients.local import Local
from ..kernels import Cut, Table, local_norms, norms_on_host, row_sums, scale_each_, scale_rows_, sums_of_each
from ..kernels.device import device_of, has_float64
from ..kernels.transfer import sent
from ..policies.units import Gather, RowNames, Units


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Where a plan's sums go, the same number of slots on every rank.

    * ``count``: slots of gradients. ``of_parameters``: as many of parameters' values follow them; where zeros
      of gradients are counted, as many numbers of them come last.
    * ``units``: what slots make up, as policies see it. ``names``: of parameters and their rows, one for each slot;
      None where the slots are those of groups.
    * ``here``: how this rank's local sums make up slots. ``slot_of_sum``: (local sums,) int64, where each goes.
    * ``per_piece``: how many local sums each piece has; ``of_pieces``: how these make up one for each piece; ``cuts``:
      how the elements of a piece fall into rows, None where nobody asked for rows; ``along``: the row dims of each;
      ``moves``: of pieces where others come before these.
    * ``weights``: (local sums,) float64, 1 / replicas of each; None where nothing is replicated.
    * ``firsts``: (pieces,) int64, the first local sum of each; None where zeros are not counted.
    """

    count: int
    of_parameters: bool
    units: Units
    names: RowNames | None
    here: Gather
    slot_of_sum: Tensor
    per_piece: tuple[int, ...]
    of_pieces: Gather
    cuts: tuple[Cut, ...] | None
    along: Sequence[Sequence[int]]
    moves: Mapping[int, Sequence[int]]
    weights: Tensor | None
    firsts: Tensor | None

    @property
    def of_zeros(self) -> bool:
        """Whether zeros of gradients are counted."""
        return self.firsts is not None

    @property
    def length(self) -> int:
        """How many numbers travel."""
        return self.count * (1 + self.of_parameters + self.of_zeros)

    def vector(self, sums: Tensor, p: float) -> Tensor:
        """What this rank contributes, of all its local ``sums``: (count,) float64."""
        if self.weights is not None and p < inf:
            sums = sums * self.weights
        return self.here(sums, p)

    def of_numbers(self, numbers: Tensor, indices: Sequence[int]) -> Tensor:
        """What this rank contributes of ``numbers`` of the pieces ``indices`` that are summed: (count,) float64."""
        if self.cuts is None:
            return self.vector(self.filled(numbers, indices), 1)
        assert self.firsts is not None
        if len(indices) < len(self.per_piece):
            found, nothing = dict(zip(indices, numbers.unbind(), strict=True)), numbers.new_zeros(())
            numbers = torch.stack([found.get(i, nothing) for i in range(len(self.per_piece))])
        sums = numbers.new_zeros(sum(self.per_piece))  # in the first row of each; a piece without rows is empty
        return self.vector(sums.index_add_(0, self.firsts, numbers) if len(sums) else sums, 1)

    def filled(self, sums: Tensor, indices: Sequence[int]) -> Tensor:
        """``sums`` of the pieces ``indices``, and zeros for the others: (local sums,)."""
        if len(indices) == len(self.per_piece):
            return sums
        found = dict(zip(indices, torch.split(sums, [self.per_piece[i] for i in indices]), strict=True))
        nothing = sums.new_zeros(max(self.per_piece, default=0))
        return torch.cat([found.get(i, nothing[:count]) for i, count in enumerate(self.per_piece)])

    def scale_(self, by_piece: "ByPiece", factors: Tensor) -> None:
        """Multiply gradients in place by ``factors``, (slots,), each element by that of its slot."""
        parts, indices, entries, _ = by_piece
        own = factors if self.here.is_nothing else factors.index_select(0, self.slot_of_sum)
        if self.cuts is None:
            scale_each_(parts, chosen(own, indices), by_piece.table)
            return
        if len(indices) < len(self.per_piece) or entries:
            every = torch.split(own, list(self.per_piece))
            found = [every[i].index_select(0, entries[i].rows) if i in entries else every[i] for i in indices]
            own = torch.cat(found) if found else own[:0]
        scale_rows_(self.rows_first(by_piece), self.cuts_of(by_piece), own, by_piece.table)

    def with_table(self, by_piece: "ByPiece", local: Local) -> "ByPiece":
        """The same, found in ``local``, with a table of where its rows lie."""
        cuts, rows = None if self.cuts is None else self.cuts_of(by_piece), self.rows_first(by_piece)
        if local.pattern is None or rows is not by_piece.parts:
            return by_piece._replace(table=Table.of(rows, cuts))
        return by_piece._replace(table=local.pattern.table(rows, local.runs, cuts))

    def cuts_of(self, by_piece: "ByPiece") -> Sequence[Cut]:
        """How each of the parts falls into rows, the entries of a sparse one into rows of their own."""
        assert self.cuts is not None
        parts, indices, entries, _ = by_piece
        if not entries and len(indices) == len(self.cuts):
            return self.cuts
        pairs = zip(parts, indices, strict=True)
        return [entries[i].cut(part.numel()) if i in entries else self.cuts[i] for part, i in pairs]

    def entries_of(self, sparse: Sequence[Tensor | None]) -> dict[int, "Entries"]:
        """``sparse``: the gradient of each piece where that is sparse."""
        return {i: Entries.of(g, self.along[i]) for i, g in enumerate(sparse) if g is not None}

    def rows_first(self, by_piece: "ByPiece") -> Sequence[Tensor]:
        """Views of the parts, whose rows are along the first dimensions."""
        parts, indices, entries, _ = by_piece
        if not (self.moves or entries):
            return parts
        first = {**self.moves} | {i: each.first for i, each in entries.items()}
        return [_moved(part, first[i]) if i in first else part for part, i in zip(parts, indices, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Where the values of a sparse gradient are: ``rows`` of its piece, (rows of values,) int64.

    ``first``: the dimensions of the values that have to come first, so that they fall into these.
    """

    rows: Tensor
    first: Sequence[int]

    @classmethod
    def of(cls, gradient: Tensor, dims: Sequence[int]) -> Self:
        """Those of a coalesced ``gradient`` with rows along ``dims``, some of which may be dense."""
        indices, shape, sparse = gradient._indices(), gradient.shape, gradient.sparse_dim()
        dense = [dim for dim in dims if dim >= sparse]
        rows = indices.new_zeros(indices.shape[1])
        for dim in dims[: len(dims) - len(dense)]:
            rows = rows * shape[dim] + indices[dim]
        if dense:
            count = prod(shape[dim] for dim in dense)
            rows = (rows.view(-1, 1) * count + torch.arange(count, device=rows.device)).flatten()
        return cls(rows, (0, *(dim - sparse + 1 for dim in dense)))

    def cut(self, elements: int) -> Cut:
        """How that many values fall into rows."""
        count = len(self.rows)
        return Cut(0, elements // count if count else 0, 0, count)


class ByPiece(NamedTuple):
    """Gradients piece by piece: the local tensors ``parts`` of the pieces ``indices``.

    ``entries``: of the pieces whose gradients are sparse, where sums are by rows. ``table``: where the rows lie, where
    the compiled kernel sums them.
    """

    parts: Sequence[Tensor]
    indices: Sequence[int]
    entries: Mapping[int, Entries]
    table: Table | None = None


def firsts_of(counts: Sequence[int]) -> Tensor:
    """Where the local sums of each piece begin, that many each: (pieces,) int64, none of them beyond the last."""
    every = torch.tensor(counts, dtype=torch.int64)
    return (every.cumsum(0) - every).clamp(max=max(0, sum(counts) - 1))


def all_sums(slots: Slots, by_piece: ByPiece, p: float) -> Tensor:
    """The local sums of these pieces, where the message is."""
    parts, indices, entries, _ = by_piece
    home = slots.slot_of_sum.device
    devices = dict.fromkeys(map(device_of, parts))
    if len(devices) <= 1:
        return sent(local_sums(slots, by_piece, p), home)
    found: dict[int, Tensor] = {}
    for device in devices:
        here = [k for k, part in enumerate(parts) if part.device == device]
        own = [indices[k] for k in here]
        sums = sent(local_sums(slots, ByPiece([parts[k] for k in here], own, entries), p), home)
        found |= zip(here, torch.split(sums, [slots.per_piece[i] for i in own]), strict=True)
    return torch.cat([found[k] for k in range(len(parts))])


def local_sums(slots: Slots, by_piece: ByPiece, p: float, zeros: Tensor | None = None) -> Tensor:
    """The local sums of parts on one device; on the host where that has no float64.

    ``zeros``: how many elements of each part are 0 is written to it, (parts,) float64, where these are on the CPU.
    """
    parts, indices, entries, _ = by_piece
    if slots.cuts is None:
        if not parts or parts[0].is_cpu:
            return sums_of_each(parts, p, by_piece.table, zeros)
        norms = local_norms(parts, p) if has_float64(parts[0].device) else norms_on_host(parts, p)
        return powers(norms, p)
    cuts = slots.cuts_of(by_piece)
    sums = row_sums(slots.rows_first(by_piece), cuts, p, by_piece.table, zeros)
    if not entries:
        return sums
    every = zip(indices, torch.split(sums, [cut.count for cut in cuts]), strict=True)
    return torch.cat([_added(own, entries[i].rows, slots.per_piece[i], p) if i in entries else own for i, own in every])


def chosen(numbers: Tensor, indices: Sequence[int]) -> Tensor:
    """Those of ``numbers`` with these ascending ``indices``, without a host sync: a list would be copied to them."""
    if len(indices) == len(numbers):
        return numbers
    every = numbers.unbind()
    return torch.stack([every[i] for i in indices]) if indices else numbers[:0]


def powers(norms: Tensor, p: float) -> Tensor:
    """The sums of powers of which ``norms`` are the norms; for p = inf the norms."""
    return norms if p == inf else norms.square() if p == 2 else norms.pow(p)


def _moved(part: Tensor, first: Sequence[int]) -> Tensor:
    return part.movedim(tuple(first), tuple(range(len(first)))) if part.numel() else part


def _added(sums: Tensor, rows: Tensor, count: int, p: float) -> Tensor:
    """What those in these ``rows`` add up to, (count,): a row has several where other dimensions are sparse."""
    if p == inf:
        return sums.new_zeros(count).scatter_reduce_(0, rows, sums, "amax")  # index_reduce_ warns
    return sums.new_zeros(count).index_put_((rows,), sums, accumulate=True)  # on CUDA it sorts: in a fixed order
