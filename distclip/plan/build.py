"""Plan: made once from the parameters; says what is summed together, where, and whether ranks communicate at all.

Which collectives run, and their shape, follow from the plan and never from which gradients exist: a rank without
tokens for its experts, with an empty shard or with gradients that are None contributes zeros and takes part; where it
lacks the gradient of a replica that all hold, ranks disagree. What a plan learns from gradients is where they lay in
this rank's memory, which no other rank needs to know.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import repeat
from math import inf
from typing import Self

import torch
from torch import Tensor

from ..errors import LayoutError
from ..gradients.local import Local
from ..gradients.look import look
from ..gradients.memory import Memory
from ..gradients.realign import is_candidate
from ..kernels import triton
from ..kernels.device import reads_are_free
from ..kernels.dtypes import WIDE
from ..kernels.exact import refusal
from ..kernels.transfer import sent
from ..layouts.layout import LayoutFn, LayoutReader, Replication
from ..layouts.piece import Held, Piece, holders_of, once
from ..ranks.group import Axis, ClippingGroup
from . import refusals
from .families import NO_FAMILY, Copies
from .slots import Slots


@dataclass(frozen=True, slots=True)
class Plan:
    """Built by :meth:`of`. Keeps no parameter and no gradient alive."""

    pieces: tuple[Piece, ...]
    sources: tuple[int, ...]  # of each piece: in the gradient of which holder it lies
    group: ClippingGroup
    p: float
    replicas: tuple[int, ...]  # of each piece
    weights: Tensor  # (len(pieces),) float64 on `device`: 1 / replicas, or 1 when no rank communicates
    device: torch.device
    on_host: bool  # whether all gradients and the message are on the CPU
    reads_are_free: bool  # whether the host reads reduced numbers without a host sync, as from the CPU
    wide: bool  # whether this rank has float64 parameters
    unweighted: bool  # whether nothing is replicated, so that all weights are 1
    known_to_all: tuple[bool, ...]  # which pieces every rank of the group must know
    represents: tuple[bool, ...]  # which pieces this rank has for all their replicas, where these are compared
    by_split_over: tuple[int, ...]  # pieces that other ranks do not hold only because split_over says so
    on_all_or_none: tuple[tuple[int, int], ...]  # pieces whose gradients all ranks have or none: place in known, source
    code: int  # hash of the pieces that are known to all
    sends_flags: bool  # whether two flags travel with the norm: some rank has misplaced gradients, some has float64
    reads_flags: bool  # whether a rank other than this one may have set one of them, so that they must be read
    fully_replicated: bool  # whether every rank of the group holds all pieces and no others, as under DDP
    where: tuple[str | None, ...]  # of each piece: see Replication
    in_parts: tuple[bool, ...]  # of each piece: whether it is a part of which no rank knows where in the whole it lies
    alike: tuple[int, ...]  # of each piece: those of the same number are cut and replicated over the same ranks
    slots: Slots | None = None  # where sums finer than the model's go; None where nobody asked
    signals: tuple[str, ...] = ()  # names of the user's numbers that travel too
    numbered: bool = False  # whether names begin with the number of the part of the model in which they are
    exact: bool = False  # whether digits of the exact sum travel; the host reads them
    copies: Copies | None = field(default=None, compare=False)  # whose bits travel too; None where nobody asked
    memory: Memory = field(default_factory=Memory, compare=False)

    @classmethod
    def of(
        cls,
        listed: Sequence[Held],
        p: float,
        group: ClippingGroup,
        split_over: Sequence[Axis] = (),
        layout: LayoutFn | None = None,
        sends_flags: bool = False,
    ) -> "Plan":
        """Read every piece's layout; a parameter listed twice counts once. No collective.

        Its sources are ``holders_of(listed)``. ``sends_flags``: the flags travel also where this rank would set none.
        """
        kept = once(listed)
        pieces = tuple(item.piece for item in kept)
        position = {id(holder): k for k, holder in enumerate(holders_of(kept))}
        reader = LayoutReader(group, split_over, layout)
        replications = [reader.read(item, i) for i, item in enumerate(kept)]
        digest = blake2b(_described(zip(pieces, replications, strict=True)).encode(), digest_size=6)
        device = group.device_for(item.holder for item in kept)
        replicas = tuple(each.replicas for each in replications)
        triton.check_choice(piece.device for piece in pieces)
        known = (i for i, each in enumerate(replications) if each.known_to_all)
        # Not those that may be terms of a pending sum, in which a missing term is zero.
        whole = [(k, i) for k, i in enumerate(known) if replicas[i] == group.size > 1 and not is_candidate(pieces[i])]
        sources = tuple(position[id(item.holder)] for item in kept)
        reads_flags = group.size > 1 and (bool(split_over or layout) or any(map(is_candidate, pieces)))
        return cls(
            pieces=pieces,
            sources=sources,
            group=group,
            p=p,
            replicas=replicas,
            weights=sent(torch.tensor(replicas, dtype=torch.float64).reciprocal(), device),
            device=device,
            on_host=all(d.type == "cpu" for d in (device, *(piece.device for piece in pieces))),
            reads_are_free=reads_are_free(device),
            wide=any(piece.dtype in WIDE for piece in pieces),
            unweighted=all(number == 1 for number in replicas),
            known_to_all=tuple(each.known_to_all for each in replications),
            represents=tuple(each.represents for each in replications),
            by_split_over=tuple(i for i, each in enumerate(replications) if each.by_split_over),
            on_all_or_none=tuple((k, sources[i]) for k, i in whole),
            code=int.from_bytes(digest.digest()),
            sends_flags=sends_flags or reads_flags,
            reads_flags=reads_flags,
            fully_replicated=group.size > 1 and set(replicas) == {group.size} and not (split_over or layout),
            where=tuple(each.where for each in replications),
            in_parts=tuple(each.parts for each in replications),
            alike=tuple(map(_numbered(replications).__getitem__, map(id, replications))),
        )

    def with_slots(self, slots: Slots, table: str) -> Self:
        """The same with ``slots`` for the units of this ``table``, which ranks must have in common."""
        digest = blake2b(f"{self.code}|{slots.length}|{table}".encode(), digest_size=6)
        return replace(self, slots=slots, code=int.from_bytes(digest.digest()))

    def exactly(self) -> Self:
        """The same for the exact sum of powers; ValueError where that cannot be."""
        why = refusal(self.p, {piece.dtype for piece in self.pieces})
        if why is not None:
            raise refusals.not_exact(why)
        self.check_shares("exact=True")
        return replace(self, exact=self.p < inf, reads_are_free=self.reads_are_free or self.p < inf)

    def check_shares(self, what: str) -> None:
        """LayoutError where replicas do not divide the ranks, so that ``what`` cannot be counted in whole numbers."""
        for i, replicas in enumerate(self.replicas):
            if self.group.size % replicas:
                raise refusals.shares_not_whole(what, self.label(i), replicas, self.group.size)

    @property
    def length(self) -> int | None:
        """How many sums this rank sends in one message; None for a number instead of a vector."""
        if self.slots is None and not self.signals:
            return None
        return (1 if self.slots is None else self.slots.length) + len(self.signals)

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """Of each piece, its replicas and its family of copies."""
        families = repeat(NO_FAMILY) if self.copies is None else self.copies.families
        return list(zip(self.replicas, families, strict=False))

    @property
    def known(self) -> list[int]:
        """The pieces that every rank of the group must know, in an order that is the same on all of them."""
        return [i for i, is_known in enumerate(self.known_to_all) if is_known]

    def look(self, gradients: Sequence[Tensor | None], error: LayoutError | None = None) -> Local:
        """Look at ``gradients``, one for each source, piece by piece: see :func:`.gradients.look.look`."""
        return look(self.pieces, self.sources, self.kinds, gradients, error)

    def held(self, holders: Sequence[Tensor]) -> list[Held]:
        """The pieces, and those of the ``holders``, one for each source, in which they are."""
        return [Held(piece, holders[source]) for piece, source in zip(self.pieces, self.sources, strict=True)]

    def label(self, index: int) -> str:
        """What errors call piece ``index``."""
        return self.pieces[index].label(index)


def _numbered(replications: Sequence[Replication]) -> dict[int, int]:
    """A number for each, by ``id``: pieces that lie alike share one."""
    return {key: k for k, key in enumerate(dict.fromkeys(map(id, replications)))}


def _described(pieces: Iterable[tuple[Piece, Replication]]) -> str:
    """What ranks must have in common."""
    lines: list[str] = []
    kinds: dict[tuple[int, torch.dtype], str] = {}  # pieces that lie alike share one replication
    for piece, replication in pieces:
        if not replication.known_to_all:
            continue
        kind = kinds.get((id(replication), piece.dtype))
        if kind is None:
            placements = () if piece.spec is None else piece.spec.placements
            kind = kinds[id(replication), piece.dtype] = f"{piece.dtype}|{placements}|{replication.replicas}"
        whole = piece.is_dtensor or (piece.spec is None and not piece.flat_over)
        shape = piece.shape if whole else piece.size  # local shapes of pieces differ between ranks
        lines.append(f"{piece.name}|{shape}|{kind}")
    return ";".join(lines)
