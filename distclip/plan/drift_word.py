"""What a rank sends of its copies in each call: the drift word, and of loose copies by how much they are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, nan

import torch
from torch import Tensor

from ..gradients.local import Local
from ..kernels import bits_of_each, no_bits, power_sum
from ..kernels.bits import MODULUS, Bits
from ..kernels.transfer import sent
from ..ranks.agreement import Drift, drift_word, drift_word_on_device
from ..ranks.message import Reduced, Scalar
from .build import Plan
from .families import ALIKE, NO_FAMILY, WEIGHTY, Comparing, Copies
from .measured import Norms
from .slots import powers


def counted_for(plan: Plan, local: Local, compares: Comparing) -> list["Bits | None"]:
    """What the bits of each group of ``local`` are added to, on the host, while it is summed."""
    if not (compares.bits and plan.on_host and plan.copies):
        return []
    return [None if family == NO_FAMILY else no_bits() for family in local.families]


def drift_of(
    plan: Plan, local: Local, counted: Sequence["Bits | None"], norms: Norms | None, compares: Comparing
) -> tuple[Drift | None, Mapping[int, Tensor]]:
    """What this rank sends of its copies; and on accelerators the bits of each piece, for a look in the next call."""
    copies = plan.copies
    if copies is None or not compares.bits:
        return silence(plan), {}
    bits = {} if plan.on_host else _bits_on_device(plan, copies, local)
    word = _word_on_host(plan, copies, local, counted) if plan.on_host else _word_on_device(plan, copies, bits)
    amounts = _amounts(plan, copies, local, norms) if _sends_amounts(plan, copies) else ()
    return Drift(word, amounts, compares.stops), bits


def silence(plan: Plan) -> Drift | None:
    """What a rank sends that says nothing of its copies."""
    return None if plan.copies is None else Drift(0.0, (0.0, 0.0) if _sends_amounts(plan, plan.copies) else ())


def _sends_amounts(plan: Plan, copies: Copies) -> bool:
    return bool(copies.loose) and plan.p < inf and not plan.exact


def _word_on_host(plan: Plan, copies: Copies, local: Local, counted: Sequence["Bits | None"]) -> float:
    sums: dict[int, int] = {}
    for family, bits in zip(local.families, counted, strict=True):
        if bits is not None:
            sums[family] = (sums.get(family, 0) + bits[0]) % MODULUS
    if plan.p == inf:
        return drift_word({k: number for k, number in sums.items() if copies.everywhere[k]}, [1] * len(copies.signs))
    return drift_word(sums, copies.signs)


def _word_on_device(plan: Plan, copies: Copies, bits: Mapping[int, Tensor]) -> Scalar:
    found: dict[int, list[Tensor]] = {}
    for i, number in bits.items():
        if plan.p < inf or copies.everywhere[copies.home[i]]:
            found.setdefault(copies.home[i], []).append(number)
    if not found:
        return 0.0
    sums = torch.stack([torch.stack(numbers).sum() % MODULUS for numbers in found.values()])
    word = drift_word_on_device(sums, [1 if plan.p == inf else copies.signs[k] for k in found])
    return word.item() if plan.device.type == "cpu" else word  # numbers of an accelerator that the host reduces


def _bits_on_device(plan: Plan, copies: Copies, local: Local) -> dict[int, Tensor]:
    """The bits of each piece whose bits are compared, 0-d int64 where messages are."""
    kept = [(i, t) for i, t in zip(local.indices, local.parts(), strict=True) if copies.families[i] != NO_FAMILY]
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(t.device for _, t in kept):
        here = [(i, t) for i, t in kept if t.device == device]
        bits = sent(bits_of_each([t for _, t in here]), plan.device)
        found |= zip((i for i, _ in here), bits.unbind(), strict=True)
    return found


def _amounts(plan: Plan, copies: Copies, local: Local, norms: Norms | None) -> tuple[Scalar, Scalar]:
    """Of loose copies: by how much their sum of powers is more than if all were as that which represents them; and all.

    Differences that cancel are not seen here, but in calls 1, 2, 4, ..., where the squares of norms are compared too.
    """
    loose = frozenset(copies.loose_here())
    if norms is None:
        parts = zip(local.indices, local.parts(), strict=True)
        sums = {i: power_sum([part], plan.p) for i, part in parts if i in loose}
        return sum(copies.sign(i) * each for i, each in sums.items()), sum(sums.values())
    each = zip(norms.indices, powers(norms.norms, plan.p).unbind(), strict=True)
    found = [(copies.sign(i), number) for i, number in each if i in loose]
    if not found:
        return 0.0, 0.0
    return torch.stack([sign * number for sign, number in found]).sum(), torch.stack([n for _, n in found]).sum()


def with_amounts(plan: Plan, reduced: Reduced, stops: bool) -> Reduced:
    """``reduced``, which has drifted also where loose copies are further apart than the arithmetic of bf16 brings them.

    The p-th power of a norm that is 1 % off is p % off.
    """
    amounts = reduced.amounts
    if not amounts or reduced.disagree is True:
        return reduced
    apart, total = amounts
    limit = plan.p * ALIKE
    if not isinstance(reduced.norm, Tensor):
        far = abs(apart) > limit * max(total, WEIGHTY * reduced.norm**plan.p)
        return replace(reduced, drift=bool(far) or reduced.drift)
    assert isinstance(total, Tensor)
    assert isinstance(apart, Tensor)
    drift = (apart.abs() > limit * (WEIGHTY * reduced.norm.pow(plan.p)).maximum(total)) | reduced.drift
    norm = reduced.norm.masked_fill(drift, nan) if stops else reduced.norm
    return replace(reduced, norm=norm, drift=drift, row=None)
