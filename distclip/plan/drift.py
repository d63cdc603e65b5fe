"""The second look: which copies have drifted apart, on which ranks.

Copies whose bits agreed once must agree in every later call. Where they have not by then, as norm layers beside tensor
parallelism that each rank computes for itself, they are loose: what two of them differ by is compared with what bf16
would make of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from ..errors import LayoutError, and_more, warn_user
from ..kernels import add_bits, no_bits
from ..kernels.transfer import sent
from ..ranks.agreement import COPIES, mixed_on_device
from ..ranks.compare import broadcast_text
from ..ranks.connections import all_reduce
from . import refusals
from .build import Plan
from .copies import compare_gradients, drift_words, drifted, norms_and_projections
from .families import ALIKE, WEIGHTY, Copies
from .measure import norms_of
from .measured import Measured, Norms


def compare_now(plan: Plan, measured: Measured, call: str) -> bool:
    """Compare the copies of each gradient that was measured, on every rank; False where nothing can be said of them.

    See :func:`judge`, or where no bits are compared :func:`.copies.compare_gradients`. Reads the reduced numbers, so
    that ranks that disagree part here.
    """
    if plan.copies is None:
        return compare_gradients(plan, measured)
    norm, disagree, _ = measured.reduced.read()
    if disagree or not isfinite(norm):
        return False
    judge(plan, measured, norm, call)
    return True


def judge(plan: Plan, measured: Measured, norm: float, call: str) -> None:
    """Look at the copies of each piece, on every rank; raise LayoutError or warn where they have drifted apart.

    ``measured``: on accelerators the gradients may have changed since, or be gone. ``norm``: of all; one that is not
    finite is not known.

    Copies that are apart by more than the arithmetic of bf16 raise, whatever is said; others whose bits differ are
    loose from now on if they were never alike, or else have drifted. One all-reduce of six numbers for each parameter
    that has copies; where some have drifted two more, of two numbers a rank and of 1024 bytes. A host sync for each.
    """
    copies = plan.copies
    assert copies is not None
    known = isfinite(norm)
    if not (known or copies.stops):  # the culprit of such a norm is found otherwise
        return
    norms = norms_of(plan, measured, frozenset(copies.slots))
    own = _bits(plan, copies, norms, measured.bits)
    words = _looked(plan, copies, norms, own, norm)
    apart = set(drifted(words[:5], ALIKE, WEIGHTY * ALIKE).nonzero().flatten().tolist()) if known else set[int]()
    differ = set((words[5] % COPIES != 0).nonzero().flatten().tolist()) - copies.loose
    if apart - copies.proved:
        raise refusals.not_replicas([_named(plan, copies, sorted(apart), _first_rank(copies, min(apart)))])
    found = sorted(apart) or sorted(differ & copies.proved)
    if not found and known:
        copies.proved |= set(words[3].nonzero().flatten().tolist()) - differ - copies.loose
        _loosen(plan, copies, differ)
    if not found:
        return
    text = _told(plan, copies, found, own, norms, call)
    if apart or copies.stops:
        raise LayoutError(text)
    _loosen(plan, copies, differ)
    warn_user(text)  # on every rank: where it is made an error, all raise


def _loosen(plan: Plan, copies: Copies, slots: set[int]) -> None:
    if slots:
        copies.loosen(slots)
        plan.memory.forget()


def _bits(plan: Plan, copies: Copies, norms: Norms, bits: Mapping[int, Tensor]) -> Tensor:
    """The bits of each piece of this rank that has copies, 0 where it has no gradient: int64, where messages are."""
    if not plan.on_host:
        none = torch.zeros((), dtype=torch.int64, device=plan.device)
        return torch.stack([bits.get(i, none) for i in copies.slots]) if copies.slots else none[None][:0]
    found = dict.fromkeys(copies.slots, 0)
    for i, part in zip(norms.indices, norms.parts, strict=True):
        if i in found:
            counted = no_bits()
            add_bits(counted, [part])
            found[i] = counted[0]
    return torch.tensor(list(found.values()), dtype=torch.int64)


def _looked(plan: Plan, copies: Copies, norms: Norms, own: Tensor, norm: float) -> Tensor:
    """The reduced words of :func:`.copies.drift_words`, and that of the bits, for each slot: (6, slots) on the host."""
    pieces = list(copies.slots)
    signs = sent(torch.tensor([copies.sign(i) for i in pieces], dtype=torch.int64), plan.device)
    numbers = norms_and_projections(plan, norms, pieces)
    words = drift_words(numbers / norm if isfinite(norm) and norm else numbers, signs.double())
    bits = (mixed_on_device(own) * signs % COPIES).double()
    message = torch.zeros(6, copies.count, dtype=torch.float64, device=plan.device)
    slots = sent(torch.tensor(list(copies.slots.values()), dtype=torch.int64), plan.device)
    message.index_copy_(1, slots, torch.cat([words, bits.view(1, -1)]))
    return all_reduce(plan.group, message).cpu()


def _told(plan: Plan, copies: Copies, found: Sequence[int], own: Tensor, norms: Norms, call: str) -> str:
    """Which parameters have drifted, and on which ranks and by how much the first of them; the same on every rank."""
    group = plan.group
    rows = torch.zeros(group.size, 2, dtype=torch.float64)
    for (i, slot), bits in zip(copies.slots.items(), own.tolist(), strict=True):
        if slot == found[0]:
            known = dict(zip(norms.indices, norms.norms.tolist(), strict=True))
            rows[group.rank] = torch.tensor([bits, known.get(i, 0.0)], dtype=torch.float64)
    told = all_reduce(group, sent(rows, plan.device)).tolist()
    for each in copies.sets:
        codes = Counter(told[rank][0] for rank in each.ranks)
        if each.first <= found[0] < each.first + each.pieces and len(codes) > 1:
            (usual, times), *_ = codes.most_common()
            odd = [rank for rank in each.ranks if told[rank][0] != usual or 2 * times <= len(each.ranks)]
            shown = {group.ranks[rank]: told[rank][1] for rank in (*odd, *(r for r in each.ranks if r not in odd))}
            names = _named(plan, copies, found, odd[0])
            return refusals.drifted(call, names, [group.ranks[rank] for rank in odd], shown)
    return refusals.drifted(call, _named(plan, copies, found, _first_rank(copies, found[0])), [], {})


def _first_rank(copies: Copies, slot: int) -> int:
    return next(each.ranks[0] for each in copies.sets if each.first <= slot < each.first + each.pieces)


def _named(plan: Plan, copies: Copies, slots: Sequence[int], rank: int) -> str:
    """What rank ``rank`` calls those of these slots that it holds, on every rank: one all-reduce of 1024 bytes."""
    here = {slot: i for i, slot in copies.slots.items()}
    names = and_more([plan.label(here[slot]) for slot in slots if slot in here])
    return broadcast_text(plan.group, plan.device, rank, names)
