"""Sums of |x| ** p, accumulated so that nothing overflows, underflows or is rounded away.

torch's own fp32 norm on the CPU adds a whole tensor in fp32: 1.1e-2 off at 1e8 elements (pytorch#169237). In float64
x ** 2 of any finite fp32, bf16 or fp16 number is exact, from 1e-45 to 3e38: that is how the compiled kernel adds. If it
was not built, and for what it cannot read, torch's kernels add rows of 64 powers in fp32 and the rows in float64;
rows outside the range of fp32 are added again in float64. Other devices: [Note: how a norm is summed] in
kernels/__init__.py.

Private torch API, read in 2.13: ``_C._nn.flatten_dense_tensors``.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from math import inf, isnan, nan
from operator import attrgetter

import torch
from torch import Tensor

from . import foreach, native, triton
from .bits import Bits, add_integers
from .dtypes import as_real, dtype_of
from .flat import flat_views
from .memory import LOW, check_memory

ROW = 64  # constant data, worst of 20000 values: 1.5e-7 off with rows of 64, 5.8e-7 with 512, in 0.9 of the time
WINDOW = 1 << 14  # rows added in float64 at once: 64 KiB of fp32, 128 KiB of float64
CHUNK = 1 << 16  # elements converted or joined at once: 512 KiB of float64
SMALL = 1 << 14  # smaller tensors are copied into one: 0.4 us and their bytes; rows of their own take 10 us
TAILS = 1 << 10  # ends of tensors, each shorter than a row, kept to be added at once
LEAST = 1e-26  # of a row, on average: fp32 powers that underflowed, flushed or not, took less than 1e-10 of it

PLAIN = {Tensor, torch.nn.Parameter}  # other classes may keep their elements elsewhere

on_cpu = attrgetter("is_cpu")


def local_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the p-norm of each tensor: float64, shape (len(tensors),), on their common device.

    No temporary is as large as a large tensor. No host sync.
    """
    if not tensors or tensors[0].device.type == "cpu":
        if p == inf:
            return torch.tensor([largest([t]) for t in tensors], dtype=torch.float64)
        sums = torch.tensor([power_sum([t], p) for t in tensors], dtype=torch.float64)
        return sums.sqrt() if p == 2 else sums.pow(1 / p)
    check_memory(tensors)
    if triton.chosen(tensors[0].device):
        return triton.local_norms(tensors, p)
    return torch.stack(foreach.norms(tensors, p))  # to write by a list of indices would wait for these to be copied


def sum_over_replicas(
    tensors: Sequence[Tensor],
    by_replicas: Iterable[tuple[int, Sequence[int]]],
    p: float,
    bits: Sequence["Bits | None"] = (),
) -> float:
    """What tensors on the CPU contribute to a sum of |x| ** p over ranks; for p = inf max(|x|), NaN when any x is.

    ``by_replicas``: how many ranks hold the same elements, and which of the tensors those are, all of them once.
    ``bits``: for each of these groups, p < inf, what its elements are added to as integers, if that is wanted.
    """
    if p == inf:
        return largest(tensors)
    amounts = []
    for (replicas, places), each in zip_longest(by_replicas, bits):
        alike = tensors if len(places) == len(tensors) else [tensors[k] for k in places]
        amounts.append(power_sum(alike, p, each) / replicas)
    return sum(amounts, 0.0)


def power_sum(tensors: Sequence[Tensor], p: float, bits: "Bits | None" = None) -> float:
    """The sum of |x| ** p over all elements of ``tensors`` on the CPU, p < inf.

    ``bits``: what all elements are added to as integers, for p = 2 in the same pass over memory.
    """
    if p == 2:
        found, others = sum_of_squares(tensors, bits)
        if bits is not None and others:
            add_integers(bits, others)
        if not others:
            return found
        rows = _Rows()
        for flat in joined(others, p):
            rows.add(flat)
        return found + rows.total()
    if bits is not None:
        add_bits(bits, tensors)
    return sum(_exact_sum(chunk, p) for flat in joined(tensors, p) for chunk in torch.split(flat, CHUNK))


def add_bits(bits: Bits, tensors: Sequence[Tensor]) -> None:
    """Add all elements of ``tensors`` on the CPU to ``bits``, as integers."""
    _, others = sum_of_squares(tensors, bits)
    add_integers(bits, others)


def sum_of_squares(tensors: Sequence[Tensor], bits: "Bits | None" = None) -> tuple[float, Sequence[Tensor]]:
    """The sum of squares of the tensors that the compiled kernel reads, in float64; and the other tensors.

    ``bits``: what the elements of the former are added to as integers.

    It reads fp32, bf16 and fp16 tensors on the CPU that are contiguous, also as channels-last; all are others where no
    library was built. It takes as many threads as torch, and gives the same bits for any number. RuntimeError where the
    memory of a tensor was freed.
    """
    if native.kernel is None:
        return 0.0, tensors
    total, others = 0.0, list[Tensor]()
    dtypes = list(map(dtype_of, tensors))
    kinds = dict.fromkeys(dtypes)
    for dtype in kinds:
        same = tensors if len(kinds) == 1 else [t for t, its in zip(tensors, dtypes, strict=True) if its is dtype]
        read = readable(same) if dtype in native.KINDS else []
        if read:
            total += _sum_of(native.KINDS[dtype], read, bits)
        if len(read) < len(same):
            done = set(map(id, read))
            others += [t for t in same if id(t) not in done]
    return total, others


def readable(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those whose elements lie side by side in the memory of this process."""
    if set(map(type, tensors)) <= PLAIN and all(map(on_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors)):
        return tensors  # 0.1 us each; one by one 0.5
    return [
        t
        for t in tensors
        if type(t) in PLAIN and t.is_cpu and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last))
    ]


def _sum_of(kind: int, tensors: Sequence[Tensor], bits: "Bits | None") -> float:
    addresses = array("Q", map(Tensor.data_ptr, tensors))
    numels = array("Q", map(Tensor.numel, tensors))
    if min(addresses) < LOW or len(set(addresses)) < len(addresses):  # rare, and most of those are empty tensors
        check_memory(tensors, addresses)
    assert native.kernel is not None
    where = addresses.buffer_info()[0], numels.buffer_info()[0], len(tensors)
    counted = None if bits is None else bits.buffer_info()[0]
    return native.kernel(*where, kind, native.instructions, torch.get_num_threads(), counted)


def largest(tensors: Sequence[Tensor]) -> float:
    """max(|x|) over all elements of ``tensors`` on the CPU: NaN if any element is, 0 if there are none."""
    found = [0.0]
    for flat in joined(tensors, inf):
        if flat.is_complex():
            found += (_float64(chunk).max().item() for chunk in torch.split(flat, CHUNK))
        else:
            low, high = flat.aminmax()
            found += (-low.item(), high.item())
    return nan if any(map(isnan, found)) else max(found)


class _Rows:
    """A sum of squares: norms of fp32 rows are collected until there are enough for one float64 sum."""

    __slots__ = ("_converted", "_count", "_norms", "_parts", "_tails", "_total")

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._parts: list[tuple[Tensor, int, int]] = []  # whose rows these are: elements from, to
        self._count = 0
        self._tails: list[Tensor] = []  # ends of tensors, shorter than a row
        self._converted: Tensor | None = None
        self._total = 0.0

    def add(self, flat: Tensor) -> None:
        """Add a contiguous 1-D tensor of real numbers."""
        found, others = sum_of_squares([flat])
        self._total += found
        if not others:
            return
        if flat.dtype == torch.float32:
            self._add_rows(flat, flat)
        elif flat.dtype == torch.float64:
            self._total += flat.dot(flat).item()
        else:
            if self._converted is None:
                self._converted = torch.empty(CHUNK)
            for chunk in torch.split(flat, CHUNK):
                self._add_rows(self._converted[: len(chunk)].copy_(chunk), chunk)

    def total(self) -> float:
        """The sum of everything added."""
        self._add_up()
        if self._tails:
            self._total += _exact_sum(_one(self._tails), 2)
            self._tails.clear()
        return self._total

    def _add_rows(self, flat: Tensor, source: Tensor) -> None:
        """Add ``flat``, fp32; ``source``: the numbers that it was converted from."""
        assert flat.is_contiguous()
        numel, start, done = flat.numel(), flat.storage_offset(), 0
        while numel - done >= ROW:
            count = min((numel - done) // ROW, WINDOW - self._count)
            rows = flat.as_strided((count, ROW), (ROW, 1), start + done)
            self._norms.append(torch.linalg.vector_norm(rows, 2, 1))
            self._parts.append((source, done, done + count * ROW))
            self._count += count
            done += count * ROW
            if self._count == WINDOW:
                self._add_up()
        if done < numel:
            self._tails.append(source[done:])
            if len(self._tails) == TAILS:
                self._total += _exact_sum(torch.cat(self._tails), 2)
                self._tails.clear()

    def _add_up(self) -> None:
        if not self._norms:
            return
        norms = _one(self._norms).double()
        found = norms.dot(norms).item()
        if not self._count * LEAST <= found < inf:  # true for NaN too
            found = sum(_extreme_sum(source[start:end]) for source, start, end in self._parts)
        self._total += found
        self._norms.clear()
        self._parts.clear()
        self._count = 0


def joined(tensors: Sequence[Tensor], p: float) -> Iterator[Tensor]:
    """Contiguous 1-D tensors that hold every element once: views of large tensors, and copies of many small ones.

    The last comes first: scaling them afterwards, from the first on, finds those in the cache.
    """
    check_memory(tensors)
    small: list[Tensor] = []
    waiting = 0
    for tensor in reversed(tensors):
        numel = tensor.numel()
        if numel > SMALL:
            yield from flat_views(_real(tensor, p))
        elif numel:
            small.append(tensor)
            waiting += numel
            if waiting > CHUNK - SMALL:
                yield from _flattened(small, p)
                small.clear()
                waiting = 0
    if small:
        yield from _flattened(small, p)


def _flattened(tensors: list[Tensor], p: float) -> Iterator[Tensor]:
    """One copy per dtype."""
    dtypes = dict.fromkeys(map(dtype_of, tensors))  # in their order, which sets have not in common between processes
    for dtype in dtypes:
        same = tensors if len(dtypes) == 1 else [t for t in tensors if t.dtype == dtype]
        yield torch._C._nn.flatten_dense_tensors([_real(t, p) for t in same] if dtype.is_complex else same)


def _real(tensor: Tensor, p: float) -> Tensor:
    """Complex numbers as pairs if their moduli are not needed: |z| ** 2 is a sum of two squares."""
    return as_real(tensor) if p == 2 else tensor


def _one(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _extreme_sum(chunk: Tensor) -> float:
    """The sum of squares of a 1-D chunk beyond the range of fp32; cheap if all of it is zero."""
    return sum(_exact_sum(block, 2) for block in torch.split(chunk, CHUNK) if largest([block]) != 0)


def _exact_sum(chunk: Tensor, p: float) -> float:
    """The sum of |x| ** p of a 1-D chunk, every operation in float64."""
    x = _float64(chunk)
    return (x.dot(x) if p == 2 else x.abs().pow_(p).sum()).item()


def _float64(chunk: Tensor) -> Tensor:
    """The numbers, or the moduli of complex ones."""
    return chunk.to(torch.complex128).abs() if chunk.is_complex() else chunk.double()
