"""The message: the numbers of the one all-reduce, and what their reduced values say.

[Note: what travels]
* **message**: what a rank sends in one all-reduce. For p < inf float64 numbers that are summed, the sum of powers and
  the agreement word; for p = inf int64 numbers of which the maximum is taken, the **bits** of the norm, ``code`` and
  ``-code``. Then one number for each yes-or-no question that the plan asks all ranks.
* **vector**: where more than the model's norm is asked for, the numbers that travel in place of the one: a sum of
  powers (a maximum for p = inf) for each slot ([Note: units and slots] in policies/statistics.py), as many of
  parameters' values where these are asked for, and the signals.
* **bits**: a float64 that is not negative, read as int64. They have the same order, with inf above every finite number
  and NaN above inf: an integer MAX keeps what Gloo's MAX of floats drops, a NaN, and needs no word beside it.
* **code**: a 32-bit hash of what ranks must have in common: parameters, step, kind of call, settings.
* **agreement word**: the form in which a code is summed. The words of all ranks add up to 0 if all sent the same code,
  and every rank sees the same sum and reaches the same verdict. Two different codes never add up to 0, however many
  ranks sent each; three or more do by chance, about once in 2**32.
* **fault**: a rank with an error of its own adds inf to its word, or 1 to ``code`` but not to ``-code``: a disagreement
  whatever the others send.
* **signed length**: the length of the message, negative where the maximum is taken. Ranks that disagree may send
  messages of different signed lengths at the same time, and these must not be reduced together.
* **channel**: the connections that messages of one signed length use on the host (connections.py).
* **roll call**: how ranks find out, through the job's store, who did not join a collective (roll_call.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, nan, sqrt
from struct import pack, unpack
from typing import NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .connections import all_reduce
from .group import ClippingGroup

CODES = 1 << 32
MAGNITUDE = (1 << 63) - 1  # all bits of a float64 but that of the sign, which -0.0 and some NaN have set

Scalar: TypeAlias = Tensor | float
"""A number where messages are reduced on the host, a 0-d float64 tensor where they are reduced on an accelerator."""


S = TypeVar("S", float, Tensor)


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
    * ``sums``: the reduced vector where one was sent, (n,) float64, on the device of the message.
    """

    norm: Scalar
    disagree: Tensor | bool
    flags: tuple[Scalar, ...]
    own: Scalar | None = None
    who: str = ""
    row: Tensor | None = None
    sums: Tensor | None = None

    def unscaled(self, scale: float, p: float) -> "Reduced":
        """The same for gradients divided by ``scale``; ``sums`` stay as they are."""
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
    slots: int = 0,
) -> Reduced:
    """Reduce ``local`` over the group: this rank's sum of powers divided by replicas, or for p = inf its norm.

    One all-reduce of two float64 numbers (p = inf: three int64) and one for each of ``flags``, which every rank of the
    group makes whatever it holds; none in one process. It waits on the host, and never on an accelerator.

    * ``local``: or a vector of such numbers, (n,) float64 where messages are reduced, n the same on every rank. It
      travels in place of the one number. The norm is made of its first ``slots``; the others only travel along.
    * ``code``: compared between ranks modulo ``CODES``; see [Note: what travels] above.
    * ``faulty``: this rank is about to raise, and takes part so that the others do not wait for it.
    * ``replicated``: every rank of the group holds all that is summed.
    * ``call``: what errors say that this rank was in.
    """
    on_host = not isinstance(local, Tensor) or (local.ndim > 0 and local.device.type == "cpu")
    if isinstance(local, Tensor) and not on_host and group.reference is None:  # nobody to disagree with, no message
        norm = root(_of_model(local, slots, p), p)
        return Reduced(norm, False, tuple(flags), sums=local if local.ndim else None)
    known = _known(group, p, code % CODES, faulty, flags)
    if not isinstance(local, Tensor):
        return _reduce_number(group, local, p, known, replicated, call)
    reduce = _reduce_vector if on_host else _reduce_tensor
    return reduce(group, local, p, known, replicated, call, slots)


def _known(group: ClippingGroup, p: float, code: int, faulty: bool, flags: Sequence[bool]) -> list[float] | list[int]:
    """What travels behind this rank's own numbers, which the host knows."""
    if p == inf:
        return [code + faulty, -code, *map(int, flags)]
    return [agreement_word(code, group.rank, len(group.ranks)) + (inf if faulty else 0.0), *map(float, flags)]


def _reduce_number(
    group: ClippingGroup, local: float, p: float, known: Sequence[float], replicated: bool, call: str
) -> Reduced:
    """From a number on the host."""
    numbers = [_bits(local) if p == inf else local, *known]
    if group.reference is not None:
        numbers = _all_reduce(group, torch.tensor(numbers, dtype=_dtype(p)), p, call).tolist()
    first, *rest = numbers
    norm = _number(int(first)) if p == inf else root(first, p)
    disagree, found = _verdict(rest, p)
    return Reduced(norm, disagree, found, local if replicated else None)


def _reduce_vector(
    group: ClippingGroup, local: Tensor, p: float, known: Sequence[float], replicated: bool, call: str, slots: int
) -> Reduced:
    """From a vector on the host."""
    sums, rest = local, known
    if group.reference is not None:
        message = _all_reduce(group, torch.cat([_sent(local, p), torch.tensor(known, dtype=_dtype(p))]), p, call)
        sums, rest = message[: len(local)].view(torch.float64), message[len(local) :].tolist()
    disagree, found = _verdict(rest, p)
    own = _of_model(local, slots, p).item() if replicated else None
    return Reduced(root(_of_model(sums, slots, p).item(), p), disagree, found, own, sums=sums)


def _reduce_tensor(
    group: ClippingGroup, local: Tensor, p: float, known: Sequence[float], replicated: bool, call: str, slots: int
) -> Reduced:
    """From a 0-d tensor or a vector on an accelerator."""
    own = _sent(local.view(-1), p)
    filled = {number: own.new_full((1,), number) for number in known}  # one kernel for all that are 0
    before = [] if local.ndim or p == inf else [own]
    memory = torch.cat([*before, own, *(filled[number] for number in known)])
    message = _all_reduce(group, memory[len(before) :], p, call)
    sums, rest = message[: len(own)].view(torch.float64), message[len(own) :].unbind()
    total = _of_model(sums if local.ndim else sums[0], slots, p)
    norm = total if p == inf else total.sqrt_() if p == 2 else total.pow_(1 / p)  # in place: that of a row too
    disagree, found = _verdict(rest, p)
    assert isinstance(disagree, Tensor)
    norm.masked_fill_(disagree, nan)
    mine, row = _of_model(local, slots, p) if replicated else None, memory[:3] if before else None
    return Reduced(norm, disagree, found, mine, row=row, sums=sums if local.ndim else None)


def _verdict(rest: Sequence[S], p: float) -> tuple[Tensor | bool, tuple[S, ...]]:
    """Whether ranks disagree, and the flags, from what was reduced behind their own numbers."""
    if p == inf:
        return rest[0] != -rest[1], tuple(rest[2:])
    return rest[0] != 0, tuple(rest[1:])


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


def _all_reduce(group: ClippingGroup, message: Tensor, p: float, call: str) -> Tensor:
    """Reduce ``message`` in place and return it: the maximum for p = inf, else the sum."""
    if p == inf:
        return all_reduce(group, message, dist.ReduceOp.MAX, -len(message), call)
    return all_reduce(group, message, dist.ReduceOp.SUM, len(message), call)


def _dtype(p: float) -> torch.dtype:
    return torch.int64 if p == inf else torch.float64


def _sent(numbers: Tensor, p: float) -> Tensor:
    """(n,) float64 as they travel: as they are, or their bits."""
    return numbers.view(torch.int64) & MAGNITUDE if p == inf else numbers


def _bits(number: float) -> int:
    bits: int = unpack("q", pack("d", number))[0]
    return bits & MAGNITUDE


def _number(bits: int) -> float:
    number: float = unpack("d", pack("q", bits))[0]
    return number


def _of_model(numbers: Tensor, slots: int, p: float) -> Tensor:
    """What the model's norm is made of: the one number, or a vector's first ``slots``, combined."""
    return combined(numbers[:slots], p) if numbers.ndim else numbers


def combined(numbers: Tensor, p: float) -> Tensor:
    """The sum of (n,) float64, or their maximum for p = inf, 0-d: 0 if there are none. The same bits on every rank."""
    if numbers.device.type == "cpu":  # torch's sum adds in an order that depends on the number of threads
        how, lengths = "max" if p == inf else "sum", torch.tensor([len(numbers)])
        return torch.segment_reduce(numbers, how, lengths=lengths, unsafe=True, initial=0)[0]
    return numbers.max() if p == inf and len(numbers) else numbers.sum()


def _power(norm: Scalar, p: float) -> Scalar:
    """The sum of powers of which ``norm`` is the norm, p < inf."""
    return norm.pow(p) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64).pow(p).item()


def root(total: Scalar, p: float) -> Scalar:
    """The norm of which ``total`` is the sum of powers, or for p = inf itself the norm."""
    if p == inf:
        return total
    if p == 2:
        return total.sqrt() if isinstance(total, Tensor) else sqrt(total)
    if isinstance(total, Tensor):
        return total.pow(1 / p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()  # Python's own raises where it overflows
