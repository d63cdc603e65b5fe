"""The message: the few float64 numbers of the one all-reduce, and what their reduced values say.

[Note: what travels]
* **message**: what a rank sends in one all-reduce. For p < inf two numbers that are added up, the sum of powers and the
  agreement word; for p = inf four of which the largest is taken, the norm, a flag for inf or NaN, ``code`` and
  ``-code``. One number more for each yes-or-no question that the plan asks all ranks.
* **code**: a 32-bit hash of what ranks must have in common: parameters, step, kind of call, settings.
* **agreement word**: the form in which a code is summed. The words of all ranks add up to 0 if all sent the same code,
  and every rank sees the same sum and reaches the same verdict. Two different codes never add up to 0, however many
  ranks sent each; three or more do by chance, about once in 2**32.
* **fault**: a rank with an error of its own adds inf to its word or code: a disagreement whatever the others send.
* **signed length**: the length of the message, below 0 where the largest is taken. Ranks that disagree may send
  messages of other signed lengths at the same time, which must not meet.
* **channel**: what messages of one signed length go through on the host (connections.py).
* **roll call**: how ranks find out, in the job's store, who did not join a collective (roll_call.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isinf, isnan, nan, sqrt
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .connections import all_reduce
from .group import ClippingGroup

CODES = 1 << 32

Scalar: TypeAlias = Tensor | float
"""A number where messages are reduced on the host, a 0-d float64 tensor where that is an accelerator."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What the reduced message says, the same on every rank: numbers on the host, 0-d tensors on an accelerator.

    * ``norm``: the total norm, float64; a tensor is NaN where ranks disagree.
    * ``disagree``: whether ranks sent different codes or reported a fault.
    * ``flags``: for each that was sent, whether some rank has set it: a number above 0.
    * ``own``: what this rank alone has put in, where every rank holds all gradients whole; else None.
    * ``who``: after what an error says of the disagreement, which ranks it is; empty where that was not asked.
    * ``row``: own number, norm and disagreement side by side in memory, (3,) float64, where they lie so.
    """

    norm: Scalar
    disagree: Tensor | bool
    flags: tuple[Scalar, ...]
    own: Scalar | None = None
    who: str = ""
    row: Tensor | None = None

    def unscaled(self, scale: float, p: float) -> "Reduced":
        """The same of gradients that are ``scale`` times smaller."""
        power = scale if p == inf else scale**p
        return replace(self, norm=self.norm / scale, own=None if self.own is None else self.own / power, row=None)

    def tensor(self, device: torch.device) -> Tensor:
        """The norm as a 0-d tensor on ``device``, where it is; NaN where ranks disagree."""
        if isinstance(self.norm, Tensor):
            return self.norm
        return torch.scalar_tensor(nan if self.disagree else self.norm, dtype=torch.float64, device=device)

    def to_send(self, device: torch.device) -> Tensor:
        """What the host wants to know of them, on ``device``, 1-D float64, for :meth:`sent`."""
        if self.row is not None:
            return self.row
        norm = self.tensor(device)
        if self._is_of_one():
            return norm.view(1)
        return torch.stack(
            [_beside(norm, scalar) for scalar in (norm if self.own is None else self.own, norm, self.disagree)]
        )

    def sent(self, numbers: Sequence[float]) -> tuple[float, float, float, Sequence[float]]:
        """Own number, norm, disagreement and what was sent after them."""
        if self._is_of_one():
            return numbers[0], numbers[0], 0.0, numbers[1:]
        own, norm, disagree, *more = numbers
        return own, norm, disagree, more

    def _is_of_one(self) -> bool:
        """Whether there is nothing but the norm: nobody to disagree with, and no replicas."""
        return self.disagree is False and self.own is None

    def read(self) -> tuple[float, bool, list[bool]]:
        """Norm, disagreement and flags as numbers: one host sync if they are on an accelerator."""
        if not isinstance(self.norm, Tensor):
            return self.norm, bool(self.disagree), [float(flag) > 0 for flag in self.flags]
        row = torch.stack([_beside(self.norm, scalar) for scalar in (self.norm, self.disagree, *self.flags)])
        norm, disagree, *flags = row.tolist()
        return norm, bool(disagree), [flag > 0 for flag in flags]


def _beside(norm: Tensor, scalar: Scalar) -> Tensor:
    """``scalar`` in float64 where ``norm`` is."""
    return scalar.double() if isinstance(scalar, Tensor) else torch.full_like(norm, scalar)


def reduce_norm(
    group: ClippingGroup,
    local: Scalar,
    p: float,
    code: int,
    faulty: bool,
    flags: Sequence[bool],
    replicated: bool = False,
    call: str = "",
) -> Reduced:
    """Make ``local``, this rank's sum of powers over replicas (p = inf: its largest norm), global.

    One all-reduce of two float64 numbers (p = inf: four) and one for each of ``flags``, made by every rank of the
    group whatever it holds; none in one process. See [Note: what travels] above. A ``faulty`` rank, which is about to
    raise, takes part so that the others do not wait for it. ``replicated``: every rank of the group holds all that is
    summed. ``call``: what it is for, as errors say.
    """
    if isinstance(local, Tensor) and group.reference is None:  # nobody to disagree with, and no message to be made
        return Reduced(local if p == inf else root(local, p), False, tuple(flags))
    reduce = _reduce_max if p == inf else _reduce_sum
    fault, own_flags = inf if faulty else 0.0, list(map(float, flags))
    row, norm, disagree, *found = reduce(group, local, p, code % CODES, fault, own_flags, call)
    own = local if replicated else None
    if isinstance(norm, Tensor):
        norm.masked_fill_(disagree, nan)
    return Reduced(norm, disagree, tuple(found), own, row=row)


def _reduce_sum(
    group: ClippingGroup,
    local: Scalar,
    p: float,
    code: int,
    fault: float,
    own_flags: list[float],
    call: str,
) -> tuple[Any, ...]:
    word = agreement_word(code, group.rank, len(group.ranks))
    row, (total, agreement, *found) = _all_reduce(group, [local], [word + fault, *own_flags], dist.ReduceOp.SUM, call)
    if row is None:
        return None, root(total, p), agreement != 0, *found
    norm = total.sqrt_() if p == 2 else total.pow_(1 / p)  # where they lie, for the host to have them as they do
    return row, norm, agreement != 0, *found


def _reduce_max(
    group: ClippingGroup,
    local: Scalar,
    p: float,
    code: int,
    fault: float,
    own_flags: list[float],
    call: str,
) -> tuple[Any, ...]:
    known = [code + fault, -float(code), *own_flags]
    # Gloo's MAX drops NaN by position: what is not finite travels as a flag beside a norm of 0.
    if not isinstance(local, Tensor):
        flag = 2.0 if isnan(local) else 1.0 if isinf(local) else 0.0
        own = [0.0 if flag else local, flag]
        _, (norm, flag, high, low, *found) = _all_reduce(group, own, known, dist.ReduceOp.MAX, call)
        return None, nan if flag == 2 else inf if flag == 1 else norm, high != -low, *found
    flags = torch.where(local.isnan(), 2.0, torch.where(local.isinf(), 1.0, 0.0)).to(local)
    finite = torch.where(flags == 0, local, 0.0)
    _, (norm, flags, high, low, *found) = _all_reduce(group, [finite, flags], known, dist.ReduceOp.MAX, call)
    return None, torch.where(flags == 2, nan, torch.where(flags == 1, inf, norm)), high != -low, *found


def agreement_word(code: int, rank: int, size: int) -> float:
    """What rank ``rank`` of ``size`` sends for ``code``, below ``CODES``: the words of all add up to 0 if codes agree.

    A whole number below 2**52 for up to 2**20 ranks, so that float64 adds them exactly in any order.
    """
    # The sum is that of all differences from rank 0's code. Codes are linear in the step: without a mix a rank ahead
    # and one as far behind would cancel. This one is lowbias32 of Chris Wellons' hash-prospector; it is bijective, so
    # that different codes stay different.
    code ^= code >> 16
    code = code * 0x7FEB352D % CODES
    code ^= code >> 15
    code = code * 0x846CA68B % CODES
    code ^= code >> 16
    return float(code * (1 - size) if rank == 0 else code)


def _all_reduce(
    group: ClippingGroup, own: Sequence[Scalar], known: Sequence[float], op: dist.ReduceOp.RedOpType, call: str
) -> tuple[Tensor | None, Sequence[Any]]:
    """The reduced message, ``own`` scalars first: numbers if these are, 0-d tensors on their device otherwise.

    There they lie side by side, the first of ``own`` as it was before them: a row of that and two reduced scalars.
    """
    first, signed_length = own[0], len(own) + len(known)
    if op != dist.ReduceOp.SUM:
        signed_length = -signed_length  # a message as long may be added up, and say the opposite: they must not meet
    if isinstance(first, Tensor):
        made = {number: torch.full_like(first, number) for number in known}
        memory = torch.stack([first, *own, *(made[number] for number in known)])  # type: ignore[list-item]
        all_reduce(group, memory[1:], op, signed_length, call)
        return memory[:3], memory[1:].unbind()
    if group.reference is None:
        return None, [*own, *known]
    message = torch.tensor([*own, *known], dtype=torch.float64)
    return None, all_reduce(group, message, op, signed_length, call).tolist()


def root(total: Scalar, p: float) -> Scalar:
    """The norm of which ``total`` is the sum of powers, p < inf."""
    if p == 2:
        return total.sqrt() if isinstance(total, Tensor) else sqrt(total)
    if isinstance(total, Tensor):
        return total.pow(1 / p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()  # Python's own raises where it overflows
