"""The fingerprint of the gradients of all ranks: one number of 64 bits for each parameter, whatever the layout.

[Note: fingerprints of replicas]
Each rank sends the two halves, of 32 bits, of the fingerprint of its piece, each group size / replicas times, as int64
that are summed. So every element counts group size times, wherever its replicas are, the sum divides by group size, and
what is left, modulo 2**64, is the fingerprint of the whole. A half that does not divide tells that replicas differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor

from ..errors import FAILURES
from ..kernels.fingerprint import LOWER, Place, fingerprints, order_of, seed_of
from ..kernels.transfer import sent
from ..layouts.piece import local_tensor
from ..layouts.places import place_of
from ..ranks.digits import reduce_words
from ..report import Fingerprint
from . import refusals
from .build import Plan
from .table import Others, Parameter, labels, table_of

MOST_RANKS = 46340  # of so many, halves of 32 bits that each counts so many times still add up to less than 2**63
MODULUS = 1 << 64


@dataclass(frozen=True, slots=True)
class Prints:
    """How the pieces of a ``plan`` make up fingerprints. Built by :meth:`of`.

    * ``names``: of all parameters, the same list on every rank, and what seeds them.
    * ``numbers``: of each piece: which of them it is.
    * ``places``: of pieces that were there, by piece and order in memory.
    """

    plan: Plan
    names: Sequence[str]
    numbers: Sequence[int]
    places: dict[tuple[int, tuple[int, ...] | None], Place] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, others: Sequence[Others]) -> "Prints":
        """``others``: of all ranks, the same on each; one all-reduce if there are some.

        LayoutError where it cannot be known which ranks hold the same, or where in the whole a part is. ValueError
        on all of more than MOST_RANKS.
        """
        if plan.group.size > MOST_RANKS:
            raise refusals.too_many_ranks(plan.group.size, MOST_RANKS)
        table, numbers = table_of(plan, None, others)
        prints = cls(plan, _names(table), numbers)
        plan.check_shares("fingerprints")
        for i in range(len(plan.pieces)):
            prints.place(i, None)
        return prints

    def place(self, index: int, order: tuple[int, ...] | None) -> Place:
        """Where the elements of piece ``index`` are that lie in this ``order``."""
        key = index, order
        if key not in self.places:
            if self.plan.in_parts[index]:
                raise refusals.unknown_places(self.plan.label(index))
            self.places[key] = place_of(self.plan.pieces[index], order)
        return self.places[key]

    def fingerprint(self, gradients: Sequence[Tensor | None], code: int, call: str) -> Fingerprint | None:
        """Of measured ``gradients``, one for each source: one all-reduce, and a host sync. None where ranks disagree.

        ``code``: compared between ranks. ``call``: what errors say that this rank was in.
        """
        plan, failed = self.plan, None
        words = torch.zeros(2 * len(self.names), dtype=torch.int64, device=plan.device)
        try:
            words = self._words(gradients)
        except FAILURES as error:  # the others wait
            failed = error
        code += crc32(repr(self.names).encode())
        numbers, disagree, _ = reduce_words(plan.group, words, code, failed is not None, (), call)
        if failed is not None:
            raise failed
        return None if disagree else self._found(numbers[: len(self.names)], numbers[len(self.names) :])

    def _words(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The lower halves of all parameters, then the upper ones: (2 * names,) int64, on the plan's device."""
        halves = torch.zeros(2, len(self.names), dtype=torch.int64, device=self.plan.device)
        local = self.plan.look(gradients)
        if local.error is not None:
            raise local.error
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for i, part in zip(local.indices, local.parts(), strict=True):
            dense = _dense(gradients[self.plan.sources[i]], part)
            by_device.setdefault(part.device, []).append((i, dense))
        for found in by_device.values():
            which = [i for i, _ in found]
            mixed = sent(self._mixed(which, [part for _, part in found]), self.plan.device)
            times = [self.plan.group.size // self.plan.replicas[i] for i in which]
            shares = torch.stack([mixed & LOWER, mixed >> 32 & LOWER]) * sent(torch.tensor(times), self.plan.device)
            halves.index_add_(1, sent(torch.tensor([self.numbers[i] for i in which]), self.plan.device), shares)
        return halves.view(-1)

    def _mixed(self, which: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
        """The fingerprint of each of these ``parts``, of the pieces ``which``."""
        orders = [None if part.is_contiguous() else order_of(part) for part in parts]
        places = [self.place(i, order) for i, order in zip(which, orders, strict=True)]
        return fingerprints(parts, places, [seed_of(self.names[self.numbers[i]]) for i in which])

    def _found(self, lower: Sequence[int], upper: Sequence[int]) -> Fingerprint:
        """What the sums of the halves of each parameter tell."""
        size = self.plan.group.size
        found, differ = {}, []
        for name, low, high in zip(self.names, lower, upper, strict=True):
            found[name] = (low + (high << 32)) // size % MODULUS
            if low % size or high % size:
                differ.append(name)
        return Fingerprint(sum(found.values()) % MODULUS, found, tuple(differ))


def _names(table: Sequence[Parameter]) -> list[str]:
    """Those of the whole model in one process, where that is known.

    So without the number of a part and without its place: unless two parameters would be called alike.
    """
    plain = len({(each.bare, each.where) for each in table}) == len(table)
    return labels([each.bare if plain else each.name for each in table], table)


def _dense(gradient: Tensor | None, part: Tensor) -> Tensor:
    """``part`` of this gradient, or a copy in which all elements of a sparse one are there."""
    assert gradient is not None
    local = local_tensor(gradient)
    return local.to_dense() if local.layout == torch.sparse_coo else part
