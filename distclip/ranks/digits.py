"""The message of an exact norm: whole numbers, which have the same sum in whatever order they are added.

[Note: what travels exactly]
int64 numbers that are summed, modulo 2**64: those of [Note: what travels] in message.py, the agreement word and the
flags, then the **words** of kernels/exact.py, how many elements are NaN and inf and the digits of the sum, and a
**checksum**. Each rank multiplies its words by group size / replicas, so that every element counts group size times,
wherever its replicas are, and nothing is divided before all is added. The checksum is linear: that of the sum of
messages is the sum of theirs, unless a word was altered on its way.
"""

from collections.abc import Sequence
from math import nan

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.exact import count_of, exact_norm
from ..kernels.transfer import sent
from . import refusals
from .agreement import COPIES, Drift, agreement_word
from .connections import all_reduce
from .group import ClippingGroup
from .reduced import Reduced

FAULT = (1 << 53) + 1  # odd: no number of ranks below 2**64 makes it vanish


def no_words(device: torch.device) -> Tensor:
    """The words of no gradients: wide ones, since ranks need not hold the same dtypes, and 8 numbers take as long."""
    return torch.zeros(count_of(2.0, wide=True), dtype=torch.int64, device=device)


def reduce_words(
    group: ClippingGroup, words: Tensor, code: int, faulty: bool, flags: Sequence[bool], call: str
) -> tuple[list[int], bool, tuple[float, ...]]:
    """The sums of ``words`` over the group, (n,) int64 where messages are reduced; whether ranks disagree; the flags.

    One all-reduce of ``n + len(flags) + 2`` int64 numbers, none in one process; it waits, also on accelerators.
    RuntimeError where the message was altered.
    """
    known = torch.tensor([int(agreement_word(code, group.rank, group.size)) + FAULT * faulty, *map(int, flags)])
    message = torch.cat([sent(known, words.device), words, _checksum(words).view(1)])
    length = len(message)
    disagreement, *numbers = all_reduce(group, message, dist.ReduceOp.SUM, _channel_of(length), call).tolist()
    found, numbers, checksum = numbers[: len(flags)], numbers[len(flags) : -1], numbers[-1]
    if disagreement == 0 and int(_checksum(message[len(known) : -1])) != checksum:
        raise RuntimeError(refusals.altered(call))
    return numbers, disagreement != 0, tuple(map(float, found))


def reduce_digits(
    group: ClippingGroup,
    words: Tensor,
    p: float,
    code: int,
    faulty: bool,
    flags: Sequence[bool],
    call: str,
    drift: Drift | None = None,
) -> Reduced:
    """Reduce ``words`` of gradients and their replicas by :func:`reduce_words`, and the word of a ``drift`` with them.

    The norm is the float64 number that is nearest to the true one.
    """
    if drift is not None:
        words = torch.cat([words, torch.as_tensor(drift.word, device=words.device).long().view(1)])
    numbers, disagree, found = reduce_words(group, words, code, faulty, flags, call)
    apart = drift is not None and numbers.pop() % COPIES != 0
    norm = nan if disagree else exact_norm(numbers, p, group.size)
    return Reduced(norm, disagree, found, drift=apart and not disagree)


def _checksum(words: Tensor) -> Tensor:
    """The sum of the words, each times its place, modulo 2**64."""
    return (words * torch.arange(1, len(words) + 1, device=words.device)).sum()


def _channel_of(length: int) -> int:
    """A signed length of its own: messages of other numbers may be as long."""
    return length + (1 << 32)
