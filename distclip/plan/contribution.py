"""What this rank puts into the message: one sum of all its gradients, or one for each slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ..gradients.local import Local
from ..kernels import add_bits, local_norms, native, norms_on_host, sum_over_replicas, zeros_of_each
from ..kernels.bits import Bits
from ..kernels.device import has_float64
from ..kernels.exact import carried, exact_sum
from ..kernels.transfer import sent
from ..ranks.agreement import Drift
from ..ranks.digits import no_words
from ..ranks.message import Scalar, root
from .build import Plan
from .drift_word import counted_for, drift_of
from .families import Comparing
from .measured import Norms
from .slots import ByPiece, Entries, Slots, all_sums, chosen, local_sums, powers


@dataclass(frozen=True, slots=True)
class Beside:
    """What a policy wants to see beside gradients, empty where it does not, or where there will be no decision.

    * ``values``: of the parameters, one local tensor for each piece. ``signals``: of the user, 0-d.
    """

    values: Sequence[Tensor] = ()
    signals: Sequence[Scalar] = ()


NOTHING = Beside()
MANY = 1 << 13  # digits of 32 bits that many times, of that many ranks, still fit into 63


class Contribution(NamedTuple):
    """What this rank sends: ``mine``, and what of its copies; and what it knows of gradients piece by piece.

    ``bits``: on accelerators those of each piece whose bits are compared.
    """

    mine: Scalar
    norms: Norms | None = None
    by_piece: ByPiece | None = None
    drift: Drift | None = None
    bits: Mapping[int, Tensor] = {}


def contribution(
    plan: Plan, gradients: Sequence[Tensor | None], local: Local, beside: Beside, compares: Comparing
) -> Contribution:
    """What this rank sends for ``local``, found in ``gradients``; ``compares``: and of its copies."""
    counted = counted_for(plan, local, compares)
    norms = by_piece = None
    if plan.exact:
        mine: Scalar = _words(plan, local)
    else:
        mine, norms, by_piece = _of_gradients(plan, gradients, local, beside.values, counted)
    if plan.exact or plan.slots is not None or plan.p == inf:  # in no pass over memory yet
        for (_, places), bits in zip(local.by_replicas, counted, strict=False):
            if bits is not None:
                add_bits(bits, [local.runs[k] for k in places])
    drift, bits_of_pieces = drift_of(plan, local, counted, norms, compares)
    if plan.signals:
        first = mine if isinstance(mine, Tensor) else torch.tensor(mine, dtype=torch.float64)
        mine = torch.cat([first.view(-1), _shares(plan, beside.signals)])
    return Contribution(mine, norms, by_piece, drift, bits_of_pieces)


def _words(plan: Plan, local: Local) -> Tensor:
    """The exact sum of powers, each element counted group size / replicas times: int64, where the message is."""
    total, size = no_words(plan.device), plan.group.size
    for replicas, places in local.by_replicas:
        by_device: dict[torch.device, list[Tensor]] = {}
        for k in places:
            by_device.setdefault(local.runs[k].device, []).append(local.runs[k])
        for runs in by_device.values():
            total += sent(exact_sum(runs, plan.p, wide=True), plan.device) * (size // replicas)
    return carried(total) if size > MANY else total


def _shares(plan: Plan, signals: Sequence[Scalar]) -> Tensor:
    """What this rank adds to the means over ranks: (signals,) float64, where the message is."""
    if not signals:
        return torch.zeros(len(plan.signals), dtype=torch.float64, device=plan.device)
    tensors = [each if isinstance(each, Tensor) else torch.scalar_tensor(each, dtype=torch.float64) for each in signals]
    return torch.stack([sent(each, plan.device).double() for each in tensors]) / plan.group.size


def _of_gradients(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    local: Local,
    values: Sequence[Tensor],
    counted: Sequence["Bits | None"],
) -> tuple[Scalar, Norms | None, ByPiece | None]:
    if plan.slots is None:
        norms = None if plan.on_host else norms_on(plan, local.parts(), local.indices)
        mine = (
            sum_over_replicas(local.runs, local.by_replicas, plan.p, counted) if norms is None else _sum_of(plan, norms)
        )
        return mine, norms, None
    slots = plan.slots
    entries = {} if slots.cuts is None else _entries(plan, slots, gradients, local)
    by_piece = ByPiece(local.parts(), local.indices, entries)
    if plan.on_host and plan.p == 2 and native.kernel is not None:
        by_piece = slots.with_table(by_piece, local)
    zeros = torch.zeros(len(by_piece.parts), dtype=torch.float64) if slots.of_zeros and plan.on_host else None
    sums, norms = _sums_and_norms(plan, slots, by_piece, zeros)
    vector = slots.vector(sums, plan.p)
    if slots.of_parameters:
        own = torch.zeros_like(vector)
        if values:
            own = slots.vector(all_sums(slots, ByPiece(values, range(len(values)), {}), plan.p), plan.p)
        vector = torch.cat([vector, own])
    if slots.of_zeros:
        vector = torch.cat([vector, slots.of_numbers(_zeros(plan, by_piece, zeros), by_piece.indices)])
    return vector, norms, by_piece


def _zeros(plan: Plan, by_piece: ByPiece, counted: Tensor | None) -> Tensor:
    """How many elements of each gradient are 0: (parts,) float64 on the plan's device.

    ``counted``: of those in the memory of each part, if that is known. What a sparse gradient does not have is 0.
    """
    found = counted
    if found is None:
        each = [sent(zeros, plan.device) for zeros in zeros_of_each(by_piece.parts)]
        found = torch.stack(each).double() if each else plan.weights.new_zeros(0)
    pairs = zip(by_piece.parts, by_piece.indices, strict=True)
    absent = [0 if plan.in_parts[i] else max(0, plan.pieces[i].here - part.numel()) for part, i in pairs]
    return found + sent(torch.tensor(absent), plan.device) if any(absent) else found


def _entries(plan: Plan, slots: Slots, gradients: Sequence[Tensor | None], local: Local) -> Mapping[int, Entries]:
    """Of each sparse gradient, by piece, in which rows its values are: of these alone its part consists."""
    found = [local.instead.get(k, g) for k, g in enumerate(gradients)]
    sparse = {k: g for k, g in enumerate(found) if g is not None and g.layout == torch.sparse_coo}
    return slots.entries_of([sparse.get(source) for source in plan.sources]) if sparse else {}


def _sums_and_norms(plan: Plan, slots: Slots, by_piece: ByPiece, zeros: Tensor | None) -> tuple[Tensor, Norms | None]:
    """All local sums; and on accelerators the norms of the pieces, which are made of these or they of them."""
    parts, indices, *_ = by_piece
    if plan.on_host:
        return slots.filled(local_sums(slots, by_piece, plan.p, zeros), indices), None
    if slots.cuts is None:
        norms = norms_on(plan, parts, indices)
        return slots.filled(powers(norms.norms, plan.p), indices), norms
    sums = slots.filled(all_sums(slots, by_piece, plan.p), indices)
    norms_of_pieces = root(slots.of_pieces(sums, plan.p), plan.p)
    assert isinstance(norms_of_pieces, Tensor)
    return sums, Norms(chosen(norms_of_pieces, indices), indices, parts)


def _sum_of(plan: Plan, norms: Norms) -> Scalar:
    """This rank's part of the message: the sum of powers of ``norms``, each over its replicas; for inf the largest."""
    if plan.p == inf:
        mine = norms.norms.max() if len(norms.indices) else norms.norms.new_zeros(())
    elif plan.p == 2 and plan.unweighted:
        mine = torch.dot(norms.norms, norms.norms)
    else:
        mine = torch.dot(norms.norms.pow(plan.p), chosen(plan.weights, norms.indices))
    return mine.item() if plan.device.type == "cpu" else mine


def norms_on(plan: Plan, parts: Sequence[Tensor], indices: Sequence[int]) -> Norms:
    """Norms of ``parts``, which are those of the pieces ``indices``."""
    devices = {t.device for t in parts}
    if len(devices) == 1:
        return Norms(_on_one(plan, devices.pop(), parts), indices, parts)
    found: dict[int, Tensor] = {}
    for device in devices:
        here = [i for i, t in enumerate(parts) if t.device == device]
        norms = _on_one(plan, device, [parts[i] for i in here])
        found |= zip(here, norms.unbind(), strict=True)
    every = [found[i] for i in range(len(parts))]
    return Norms(torch.stack(every) if every else plan.weights.new_zeros(0), indices, parts)


def _on_one(plan: Plan, device: torch.device, parts: Sequence[Tensor]) -> Tensor:
    """Norms of ``parts``, all of them on ``device``, brought to the plan's own."""
    norms = local_norms(parts, plan.p) if has_float64(device) else norms_on_host(parts, plan.p)
    return sent(norms, plan.device)
