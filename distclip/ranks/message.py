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
  and every rank sees the same sum and reaches the same verdict. **drift word**: the same of the bits of copies, where
  they are compared; for p = inf these bits and ``-bits``. [Note: words that vanish] in agreement.py.
* **fault**: a rank with an error of its own adds inf to its word, or 1 to ``code`` but not to ``-code``: a disagreement
  whatever the others send.
* **signed length**: the length of the message, negative where the maximum is taken. Ranks that disagree may send
  messages of different signed lengths at the same time, and these must not be reduced together.
* **channel**: the connections that messages of one signed length use on the host (connections.py).
* **roll call**: how ranks find out, through the job's store, who did not join a collective (roll_call.py).
"""

from collections.abc import Sequence
from math import inf, isfinite, nan
from struct import pack, unpack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import CODES as CODES, COPIES, Drift, agreement_word, is_settled
from .connections import all_reduce
from .group import ClippingGroup
from .reduced import Reduced as Reduced, Scalar as Scalar, root as root

MAGNITUDE = (1 << 63) - 1  # all bits of a float64 but that of the sign, which -0.0 and some NaN have set


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
    drift: Drift | None = None,
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
    * ``drift``: what travels of copies, on all ranks or on none: a number more on accelerators, none on the host (for
      p = inf two everywhere), and one for each of its amounts.
    """
    on_host = not isinstance(local, Tensor) or (local.ndim > 0 and local.device.type == "cpu")
    if isinstance(local, Tensor) and not on_host and group.reference is None:  # nobody to disagree with, no message
        norm = root(_of_model(local, slots, p), p)
        return Reduced(norm, False, tuple(flags), sums=local if local.ndim else None)
    behind = _behind(group, p, code % CODES, faulty, flags, drift, on_host)
    asked = Asked(group, p, call, slots, replicated, drift, behind)
    if not isinstance(local, Tensor):
        return _reduce_number(asked, local)
    return _reduce_vector(asked, local) if on_host else _reduce_tensor(asked, local)


class Behind(NamedTuple):
    """What travels behind this rank's own numbers: ``words``, of its code and its copies, and then ``more``.

    ``flags``: how many of these are flags; the others are amounts.
    """

    words: list[Scalar]
    flags: int
    more: list[Scalar]


class Asked(NamedTuple):
    """What :func:`reduce_norm` was asked for, and what travels ``behind`` the numbers."""

    group: ClippingGroup
    p: float
    call: str
    slots: int
    replicated: bool
    drift: Drift | None
    behind: Behind


def _behind(
    group: ClippingGroup, p: float, code: int, faulty: bool, flags: Sequence[bool], drift: Drift | None, on_host: bool
) -> Behind:
    more: list[Scalar] = [*map(float, flags), *(() if drift is None else drift.amounts)]
    if p == inf:
        bits = [] if drift is None else [drift.word, -drift.word]
        return Behind([code + faulty, -code, *bits], len(flags), more)
    word = agreement_word(code, group.rank, len(group.ranks)) + (inf if faulty else 0.0)
    if drift is None:
        return Behind([word], len(flags), more)
    return Behind([word + drift.word] if on_host else [word, drift.word], len(flags), more)


def _reduce_number(asked: Asked, local: float) -> Reduced:
    """From a number on the host."""
    p, behind = asked.p, asked.behind
    numbers = [_bits(local) if p == inf else local, *behind.words, *behind.more]
    if asked.group.reference is not None:
        numbers = _all_reduce(asked, torch.tensor(numbers, dtype=_dtype(p))).tolist()
    first, *rest = numbers
    norm = _number(int(first)) if p == inf else root(first, p)
    return Reduced(norm, *_verdict(asked, rest, local if asked.replicated else None))


def _reduce_vector(asked: Asked, local: Tensor) -> Reduced:
    """From a vector on the host."""
    p, slots = asked.p, asked.slots
    sums, rest = local, [*asked.behind.words, *asked.behind.more]
    if asked.group.reference is not None:
        message = _all_reduce(asked, torch.cat([_sent(local, p), torch.tensor(rest, dtype=_dtype(p))]))
        sums, rest = message[: len(local)].view(torch.float64), message[len(local) :].tolist()
    own = _of_model(local, slots, p).item() if asked.replicated else None
    norm = root(_of_model(sums, slots, p).item(), p)
    return Reduced(norm, *_verdict(asked, rest, own), sums=sums)


def _reduce_tensor(asked: Asked, local: Tensor) -> Reduced:
    """From a 0-d tensor or a vector on an accelerator."""
    p, slots, drift = asked.p, asked.slots, asked.drift
    own = _sent(local.view(-1), p)
    before = [] if local.ndim or p == inf else [own]
    memory = torch.cat([*before, own, *_on_device([*asked.behind.words, *asked.behind.more], own)])
    message = _all_reduce(asked, memory[len(before) :])
    sums, rest = message[: len(own)].view(torch.float64), message[len(own) :].unbind()
    total = _of_model(sums if local.ndim else sums[0], slots, p)
    norm = total if p == inf else total.sqrt_() if p == 2 else total.pow_(1 / p)  # in place: that of a row too
    verdict = _verdict(asked, rest, _of_model(local, slots, p) if asked.replicated else None)
    void = verdict[0] | verdict[3] if drift is not None and drift.stops else verdict[0]
    assert isinstance(void, Tensor)
    norm.masked_fill_(void, nan)
    row = memory[: 2 + len(asked.behind.words)] if before else None
    return Reduced(norm, *verdict, row=row, sums=sums if local.ndim else None)


def _on_device(numbers: Sequence[Scalar], like: Tensor) -> list[Tensor]:
    """Each of them, (1,), in the dtype and on the device of ``like``, without a host sync."""
    filled = {n: like.new_full((1,), n) for n in numbers if not isinstance(n, Tensor)}  # one kernel for all that are 0
    return [n.to(like.dtype).view(1) if isinstance(n, Tensor) else filled[n] for n in numbers]


def _verdict(
    asked: Asked, rest: Sequence[Any], own: Scalar | None
) -> tuple[Tensor | bool, tuple[Scalar, ...], Scalar | None, Tensor | bool, tuple[Scalar, ...]]:
    """Disagreement, flags, ``own``, drift and amounts, from what was reduced behind the ranks' own numbers."""
    words, more = rest[: len(asked.behind.words)], rest[len(asked.behind.words) :]
    drifts, apart = asked.drift is not None, False
    if asked.p == inf:
        disagree = words[0] != -words[1]
        apart = drifts and words[2] != -words[3]
    elif drifts and len(words) == 1:
        disagree = not is_settled(words[0], asked.group.size)
        apart = disagree and isfinite(words[0])
    else:
        disagree = words[0] != 0
        apart = drifts and words[1] % COPIES != 0
    flags = asked.behind.flags
    return disagree, tuple(more[:flags]), own, apart, tuple(more[flags:])


def _all_reduce(asked: Asked, message: Tensor) -> Tensor:
    """Reduce ``message`` in place and return it: the maximum for p = inf, else the sum."""
    if asked.p == inf:
        return all_reduce(asked.group, message, dist.ReduceOp.MAX, -len(message), asked.call)
    return all_reduce(asked.group, message, dist.ReduceOp.SUM, len(message), asked.call)


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
