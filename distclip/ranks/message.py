"""The message: the few float64 numbers of the one all-reduce, and what their reduced values say.

[Note: what travels]
* **message**: what a rank sends in one all-reduce. For p < inf two numbers that are summed, the sum of powers and the
  agreement word; for p = inf four of which the maximum is taken, the norm, a flag for inf or NaN, ``code`` and
  ``-code``. Then one number for each yes-or-no question that the plan asks all ranks.
* **code**: a 32-bit hash of what ranks must have in common: parameters, step, kind of call, settings.
* **agreement word**: the form in which a code is summed. The words of all ranks add up to 0 if all sent the same code,
  and every rank sees the same sum and reaches the same verdict. Two different codes never add up to 0, however many
  ranks sent each; three or more do by chance, about once in 2**32.
* **fault**: a rank with an error of its own adds inf to its word or code: a disagreement whatever the others send.
* **signed length**: the length of the message, negative where the maximum is taken. Ranks that disagree may send
  messages of different signed lengths at the same time, and these must not be reduced together.
* **channel**: the connections that messages of one signed length use on the host (connections.py).
* **roll call**: how ranks find out, through the job's store, who did not join a collective (roll_call.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isinf, isnan, nan, sqrt
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .connections import all_reduce
from .group import ClippingGroup

CODES = 1 << 32

Scalar: TypeAlias = Tensor | float
"""A number where messages are reduced on the host, a 0-d float64 tensor where they are reduced on an accelerator."""


class HostNumbers(NamedTuple):
    """A reduced message as the host has read it, and ``more`` numbers that were copied behind it."""

    own: float
    norm: float
    disagree: float  # 0 if all ranks agree
    more: Sequence[float]


@dataclass(frozen=True, slots=True)
class Reduced:
    """The reduced message, the same on every rank except for ``own``: numbers on the host, 0-d tensors elsewhere.

    * ``norm``: the total norm, float64; a tensor is NaN where ranks disagree.
    * ``disagree``: whether ranks sent different codes or reported a fault.
    * ``flags``: for each flag of the message, whether some rank has set it: a number above 0.
    * ``own``: what this rank sent for the norm, if every rank holds all gradients whole; else None. For p < inf its sum
      of powers divided by the number of replicas, for p = inf its norm.
    * ``who``: appended to the error on a disagreement: which ranks differ; empty if nobody asked.
    * ``row``: own, norm and disagreement as a view of the message, (3,) float64, if they are neighbours there: the host
      can then copy them without a kernel that gathers them.
    """

    norm: Scalar
    disagree: Tensor | bool
    flags: tuple[Scalar, ...]
    own: Scalar | None = None
    who: str = ""
    row: Tensor | None = None

    def unscaled(self, scale: float, p: float) -> "Reduced":
        """The same for gradients divided by ``scale``."""
        own = self.own
        if own is not None:  # scale ** p may leave float64 where this does not
            own = own / scale if p == inf else _power(root(own, p) / scale, p)
        return replace(self, norm=self.norm / scale, own=own, row=None)

    def tensor(self, device: torch.device) -> Tensor:
        """The norm as a 0-d float64 tensor, NaN where ranks disagree. ``device``: where messages are reduced."""
        if isinstance(self.norm, Tensor):
            return self.norm
        return torch.scalar_tensor(nan if self.disagree else self.norm, dtype=torch.float64, device=device)

    def for_host(self, device: torch.device) -> Tensor:
        """What the host will want to know, 1-D float64 on ``device``; :meth:`from_copy` reads a copy of it."""
        if self.row is not None:
            return self.row
        norm = self.tensor(device)
        if self._is_norm_alone():
            return norm.view(1)
        own = norm if self.own is None else self.own
        return torch.stack([_beside(norm, scalar) for scalar in (own, norm, self.disagree)])

    def from_copy(self, numbers: Sequence[float]) -> HostNumbers:
        """The numbers of :meth:`for_host`, and those that were copied behind them."""
        if self._is_norm_alone():
            return HostNumbers(numbers[0], numbers[0], 0.0, numbers[1:])
        own, norm, disagree, *more = numbers
        return HostNumbers(own, norm, disagree, more)

    def _is_norm_alone(self) -> bool:
        """Whether there are no other ranks to disagree with or to compare ``own`` with."""
        return self.disagree is False and self.own is None

    def read(self) -> tuple[float, bool, list[bool]]:
        """Norm, disagreement and flags as numbers: one host sync if they are on an accelerator."""
        if not isinstance(self.norm, Tensor):
            return self.norm, bool(self.disagree), [float(flag) > 0 for flag in self.flags]
        row = torch.stack([_beside(self.norm, scalar) for scalar in (self.norm, self.disagree, *self.flags)])
        norm, disagree, *flags = row.tolist()
        return norm, bool(disagree), [flag > 0 for flag in flags]


def _beside(norm: Tensor, scalar: Scalar) -> Tensor:
    """``scalar`` as float64 on the device of ``norm``."""
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
    """Reduce ``local`` over the group: this rank's sum of powers divided by replicas, or for p = inf its norm.

    One all-reduce of two float64 numbers (p = inf: four) and one for each of ``flags``, which every rank of the group
    makes whatever it holds; none in one process. It waits on the host, and never on an accelerator.

    * ``code``: compared between ranks modulo ``CODES``; see [Note: what travels] above.
    * ``faulty``: this rank is about to raise, and takes part so that the others do not wait for it.
    * ``replicated``: every rank of the group holds all that is summed.
    * ``call``: what errors say that this rank was in.
    """
    if isinstance(local, Tensor) and group.reference is None:  # nobody to disagree with, and no message to make
        return Reduced(local if p == inf else root(local, p), False, tuple(flags))
    fault, own_flags = inf if faulty else 0.0, list(map(float, flags))
    if p == inf:
        verdict = _reduce_max(group, local, code % CODES, fault, own_flags, call)
    else:
        verdict = _reduce_sum(group, local, p, code % CODES, fault, own_flags, call)
    norm, disagree, found, row = verdict
    if isinstance(norm, Tensor):
        assert isinstance(disagree, Tensor)
        norm.masked_fill_(disagree, nan)
    return Reduced(norm, disagree, tuple(found), local if replicated else None, row=row)


class _Verdict(NamedTuple):
    """Norm, disagreement, flags and row of :class:`Reduced`; a norm that is a tensor is not NaN yet."""

    norm: Scalar
    disagree: Tensor | bool
    flags: Sequence[Scalar]
    row: Tensor | None = None


def _reduce_sum(
    group: ClippingGroup, local: Scalar, p: float, code: int, fault: float, flags: list[float], call: str
) -> _Verdict:
    word = agreement_word(code, group.rank, len(group.ranks))
    (total, words, *found), row = _all_reduce(group, [local], [word + fault, *flags], dist.ReduceOp.SUM, call)
    if row is None:
        return _Verdict(root(total, p), words != 0, found)
    norm = total.sqrt_() if p == 2 else total.pow_(1 / p)  # in place: `row` then holds the norm, not its power
    return _Verdict(norm, words != 0, found, row)


def _reduce_max(
    group: ClippingGroup, local: Scalar, code: int, fault: float, flags: list[float], call: str
) -> _Verdict:
    known = [code + fault, -float(code), *flags]
    # Gloo's MAX drops NaN by position: what is not finite travels as a flag beside a norm of 0.
    if not isinstance(local, Tensor):
        kind = 2.0 if isnan(local) else 1.0 if isinf(local) else 0.0
        own = [0.0 if kind else local, kind]
        (norm, kind, high, low, *found), _ = _all_reduce(group, own, known, dist.ReduceOp.MAX, call)
        return _Verdict(nan if kind == 2 else inf if kind == 1 else norm, high != -low, found)
    kinds = torch.where(local.isnan(), 2.0, torch.where(local.isinf(), 1.0, 0.0)).to(local)
    finite = torch.where(kinds == 0, local, 0.0)
    (norm, kinds, high, low, *found), _ = _all_reduce(group, [finite, kinds], known, dist.ReduceOp.MAX, call)
    return _Verdict(torch.where(kinds == 2, nan, torch.where(kinds == 1, inf, norm)), high != -low, found)


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
) -> tuple[Sequence[Any], Tensor | None]:
    """Reduce the message ``[*own, *known]``: numbers if ``own`` are numbers, else 0-d tensors and a row of three.

    The row is ``own[0]`` as this rank sent it and the first two reduced numbers, neighbours in memory.
    """
    first, signed_length = own[0], len(own) + len(known)
    if op != dist.ReduceOp.SUM:
        signed_length = -signed_length
    if isinstance(first, Tensor):
        filled = {number: torch.full_like(first, number) for number in known}  # one kernel for all that are 0
        memory = torch.stack([first, *own, *(filled[number] for number in known)])  # type: ignore[list-item]
        all_reduce(group, memory[1:], op, signed_length, call)
        return memory[1:].unbind(), memory[:3]
    if group.reference is None:
        return [*own, *known], None
    message = torch.tensor([*own, *known], dtype=torch.float64)
    return all_reduce(group, message, op, signed_length, call).tolist(), None


def _power(norm: Scalar, p: float) -> Scalar:
    """The sum of powers of which ``norm`` is the norm, p < inf."""
    return norm.pow(p) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64).pow(p).item()


def root(total: Scalar, p: float) -> Scalar:
    """The norm of which ``total`` is the sum of powers, p < inf."""
    if p == 2:
        return total.sqrt() if isinstance(total, Tensor) else sqrt(total)
    if isinstance(total, Tensor):
        return total.pow(1 / p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()  # Python's own raises where it overflows
