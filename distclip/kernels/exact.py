"""Exact sums of |x| and of x ** 2: int64 words that add in any order, and the correctly rounded norm they make.

A sum is a row of words: how many elements are NaN, how many are inf, then digits of 32 bits of the sum of all others,
the lowest first. Words of ranks are added like numbers, by an all-reduce or in any other way: the digits are below
2 ** 32, so that those of 2 ** 31 ranks do not overflow, and the last one has room for more elements than memory has
addresses. The same elements make the same words, however they are split, on any device and any number of threads. For
p = inf there is one word, which is not added: the largest one counts.

fp32, bf16, fp16 and complex64 numbers make 22 words. With a float64 or complex128 tensor anywhere it takes 136, into
which those of others fit. The square of a complex number is that of its two parts; its modulus is a root, which is no
finite sum of bits, so that only p = 2 is exact there.
"""

from array import array
from collections.abc import Collection, Iterator, Sequence
from math import inf, isqrt, nan
from struct import pack, unpack
from sys import float_info

import torch
from torch import Tensor

from . import native
from .dtypes import COMPLEX, WIDE, as_real
from .memory import check_memory
from .sums import joined, local_norms, readable

BITS = 32  # of a digit
LOWER = (1 << BITS) - 1
NARROW, NARROW_BASE = 20, -298  # digits, and of 2 the exponent of a unit: the square of the least fp32 number
WIDEST, WIDE_BASE = 134, NARROW_BASE - BITS * 58  # the same of float64
COUNTS = 2  # words before the digits
CHUNK = 1 << 16  # elements taken apart at once: 512 KiB for each of their halves


def refusal(p: float, dtypes: Collection[torch.dtype]) -> str | None:
    """Why the norm of order ``p`` of such tensors cannot be exact; None where it can."""
    if p not in (1, 2, inf):
        return f"a sum of |x| ** {p:g} is no finite sum of bits: exact norms are those of order 1, 2 and inf"
    if p != 2 and not set(COMPLEX).isdisjoint(dtypes):
        return f"the modulus of a complex number is a root: of complex gradients the 2-norm is exact, no {p:g}-norm"
    return None


def is_wide(dtypes: Collection[torch.dtype]) -> bool:
    """Whether sums of such tensors take wide words, as all that are added to them then must."""
    return not set(WIDE).isdisjoint(dtypes)


def count_of(p: float, wide: bool) -> int:
    """How many words a sum has."""
    return 1 if p == inf else COUNTS + (WIDEST if wide else NARROW)


def exact_sum(tensors: Sequence[Tensor], p: float, wide: bool) -> Tensor:
    """The words of the sum of |x| ** ``p`` over all elements, p = 1 or 2: int64, on the common device, or the CPU.

    ``wide``: of these tensors, or of others that will be added. RuntimeError where the memory of a tensor was freed. No
    temporary is as large as a large tensor. No host sync.
    """
    if p == inf:
        return _largest(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    words = torch.zeros(count_of(p, wide), dtype=torch.int64, device=device)
    by_hand = native.exact_sum is None or device.type != "cpu"
    for same in _by_dtype(list(map(as_real, tensors))):
        read: Sequence[Tensor] = [] if by_hand else readable(same)
        if read:
            _add_compiled(words, read, int(p))
        done = set(map(id, read))
        for flat in joined([t for t in same if id(t) not in done], p):
            if by_hand:
                _add_by_exponent(words, flat, int(p))
            else:
                _add_compiled(words, [flat], int(p))
    return carried(words) if by_hand else words


def exact_norm(words: Tensor | Sequence[int], p: float, times: int = 1) -> float:
    """The norm of order ``p`` that words make, rounded once; NaN if an element is, else inf if one is.

    ``times``: how often each element is in them, p < inf.

    The norm of finite elements is finite: the largest float where it is above that. Waits for words on an accelerator.
    """
    found: Sequence[int] = words.tolist() if isinstance(words, Tensor) else words
    if p == inf:
        (largest,) = unpack("d", pack("q", found[0]))
        return float(largest)
    nans, infs, *digits = found
    if nans or infs:
        return nan if nans else inf
    total = sum(digit << BITS * k for k, digit in enumerate(digits))
    base = NARROW_BASE if len(digits) == NARROW else WIDE_BASE
    try:
        return total / (times << -base) if p == 1 else _root(total, times, base)
    except OverflowError:
        return float_info.max


def _root(total: int, times: int, base: int) -> float:
    """The root of total / times * 2 ** base, base even: integer division is rounded once, and so sees the last bit set
    where bits of the root are left.
    """
    more = max(0, 2 * 64 + times.bit_length() - total.bit_length() + 1) // 2  # the root has 64 bits or more
    square, rest = divmod(total << 2 * more, times)
    root = isqrt(square)
    root = 2 * root + (rest > 0 or root * root != square)
    scale = base // 2 - more - 1
    return root / (1 << -scale) if scale < 0 else float(root << scale)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """One word: the bits of max(|x|) in float64, which are ordered like numbers; those of a NaN are above all."""
    norms = local_norms(tensors, inf).double() if tensors else torch.zeros(0, dtype=torch.float64)
    largest = torch.cat([norms, norms.new_zeros(1)]).max()
    return torch.where(largest.isnan(), nan, largest).view(torch.int64).view(1)


def _by_dtype(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    dtypes = dict.fromkeys(t.dtype for t in tensors)
    return ([t for t in tensors if t.dtype == dtype] for dtype in dtypes)


def _add_compiled(words: Tensor, tensors: Sequence[Tensor], p: int) -> None:
    addresses = array("Q", map(Tensor.data_ptr, tensors))
    numels = array("Q", map(Tensor.numel, tensors))
    check_memory(tensors, addresses)
    dtype = tensors[0].dtype
    where = addresses.buffer_info()[0], numels.buffer_info()[0], len(tensors), native.EXACT_KINDS[dtype], p
    assert native.exact_sum is not None
    native.exact_sum(*where, native.widest, torch.get_num_threads(), words.data_ptr(), len(words) - COUNTS)


def _add_by_exponent(words: Tensor, flat: Tensor, p: int) -> None:
    """Add the numbers of each exponent as integers, in two halves; then these sums to the digits where they belong."""
    is_double = flat.dtype == torch.float64
    behind, fields = (52, 2048) if is_double else (23, 256)  # bits behind the point, and exponents
    sums: dict[int, Tensor] = {}  # by how much further up they belong
    for chunk in torch.split(flat, CHUNK):
        bits = chunk.view(torch.int64) if is_double else chunk.float().view(torch.int32).long()
        field, rest = bits >> behind & fields - 1, bits & (1 << behind) - 1
        beyond = field == fields - 1
        words[0] += (beyond & (rest != 0)).sum()
        words[1] += (beyond & (rest == 0)).sum()
        m = (rest | (field > 0).long() << behind).masked_fill(beyond, 0)
        for up, part in _powers(m, p, is_double):
            for half, numbers in ((0, part & LOWER), (BITS, part >> BITS)):
                if up + half not in sums:
                    sums[up + half] = words.new_zeros(fields)
                sums[up + half].index_add_(0, field, numbers)
    base = WIDE_BASE if len(words) == COUNTS + WIDEST else NARROW_BASE
    exponents = torch.arange(fields, device=words.device).clamp(min=1)
    for up, numbers in sums.items():
        _deposit(words, numbers, p * (exponents - (fields // 2 - 1) - behind) - base + up)


def _powers(m: Tensor, p: int, is_double: bool) -> Iterator[tuple[int, Tensor]]:
    """The power of each integer as sums of others below 2 ** 54, and by how many bits those belong further up."""
    if p == 1:
        yield 0, m
    elif not is_double:
        yield 0, m * m
    else:
        upper, lower = m >> 27, m & (1 << 27) - 1
        yield from ((0, lower * lower), (27, 2 * upper * lower), (54, upper * upper))


def _deposit(words: Tensor, numbers: Tensor, positions: Tensor) -> None:
    """Add each of ``numbers`` * 2 ** its position; none is below 0. Where it is 0 the position may be outside."""
    positions = positions * (numbers != 0)
    digit, shift = COUNTS + positions // BITS, positions % BITS
    low, high = (numbers & LOWER) << shift, (numbers >> BITS) << shift
    words.index_add_(0, digit, low & LOWER)
    words.index_add_(0, digit + 1, (low >> BITS) + (high & LOWER))
    words.index_add_(0, digit + 2, high >> BITS)


def carried(words: Tensor) -> Tensor:
    """The same sum in digits below 2 ** 32, but for the last one."""
    for k in range(COUNTS, len(words) - 1):
        words[k + 1] += words[k] >> BITS
        words[k] &= LOWER
    return words
