"""Exact sums: the words are those of rational arithmetic for any numbers, split, order, threads and instructions."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import inf, isinf, isnan, nan, nextafter

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from distclip.kernels import exact, native
from distclip.kernels.exact import COUNTS, LOWER, count_of, exact_norm, exact_sum, is_wide, refusal
from distclip.kernels.fingerprint import fingerprints, whole
from kernels.test_native import BLOCK, SHARE, WAVE

PART = 1 << 12  # as in exact.c
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_P = pytest.mark.parametrize("p", [1.0, 2.0])


def roads() -> list[str]:
    if native.exact_sum is None:
        return ["torch"]
    return ["torch", *(str(each) for each in range(native.widest + 1))]


COMPILED = pytest.mark.parametrize("road", roads()[1:], indirect=True)


@pytest.fixture(params=roads(), autouse=True)
def road(request, monkeypatch) -> str:
    """torch's kernels, or the compiled one with each instruction set of this processor."""
    if request.param == "torch":
        monkeypatch.setattr(native, "exact_sum", None)
    else:
        monkeypatch.setattr(native, "widest", int(request.param))
    return request.param


def bits(values: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The numbers that have these bits."""
    size = 8 * dtype.itemsize
    signed = [value - (value >> (size - 1) << size) for value in values]
    return torch.tensor(signed, dtype=INTEGERS[dtype.itemsize]).view(dtype)


def spread(numel: int, dtype: torch.dtype, decades: float, seed: int = 0) -> Tensor:
    """Numbers over that many decades on both sides of 1, with zeros of both signs."""
    chance = torch.Generator().manual_seed(numel + seed)
    x = torch.randn(numel, generator=chance, dtype=torch.float64)
    x *= 10.0 ** ((torch.rand(numel, generator=chance, dtype=torch.float64) * 2 - 1) * decades)
    x[torch.rand(numel, generator=chance) < 0.1] *= 0.0
    return x.to(dtype)


def true_sum(tensors: Sequence[Tensor], p: float) -> Fraction:
    """Of the finite elements, those of complex tensors as pairs."""
    flat = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    values = [x for t in flat for x in t.double().flatten().tolist()]
    return sum((abs(Fraction(x)) ** int(p) for x in values if not isnan(x) and not isinf(x)), Fraction(0))


def sum_in(words: Tensor) -> Fraction:
    base = exact.NARROW_BASE if len(words) == COUNTS + exact.NARROW else exact.WIDE_BASE
    digits = words.tolist()[COUNTS:]
    assert all(0 <= digit <= LOWER for digit in digits[:-1])
    return sum(digit << 32 * k for k, digit in enumerate(digits)) * Fraction(2) ** base


def words_of(tensors: Sequence[Tensor], p: float, wide: bool | None = None) -> Tensor:
    dtypes = {t.dtype for t in tensors}
    assert refusal(p, dtypes) is None
    words = exact_sum(tensors, p, is_wide(dtypes) if wide is None else wide)
    assert words.dtype == torch.int64
    assert len(words) == count_of(p, is_wide(dtypes) if wide is None else wide)
    return words


def is_rounded_once(norm: float, total: Fraction, p: float) -> bool:
    """Whether no other float is nearer to the root of ``total``."""
    below, above = (Fraction(norm) + Fraction(nextafter(norm, to)) for to in (-inf, inf))
    return max(below, Fraction(0)) ** int(p) <= total * 2 ** int(p) <= above ** int(p)


PATTERNS = {
    16: st.integers(0, (1 << 16) - 1),
    32: st.integers(0, (1 << 32) - 1),
    64: st.integers(0, (1 << 64) - 1),
}


@EACH_DTYPE
@EACH_P
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bits(dtype, p, data):
    patterns = data.draw(st.lists(PATTERNS[8 * dtype.itemsize], max_size=50))
    x = bits(patterns, dtype)
    words = words_of([x], p)
    total = true_sum([x], p)
    assert sum_in(words) == total
    assert words[:COUNTS].tolist() == [int(x.isnan().sum()), int(x.isinf().sum())]
    finite = exact_norm([0, 0, *words.tolist()[COUNTS:]], p)
    assert finite == 1.7976931348623157e308 or is_rounded_once(finite, total, p)


@EACH_DTYPE
@EACH_P
def test_any_spread_and_length(dtype, p):
    for decades in (0, 3, 8, 20, 38, 60):
        for numel in (0, 1, 31, 65, 1000):
            x = spread(numel, dtype, decades)
            assert sum_in(words_of([x], p)) == true_sum([x], p)
    x = spread(PART + 1, dtype, 4)
    assert sum_in(words_of([x], p)) == true_sum([x], p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH_P
def test_windows_overflow_for_no_distance_of_the_least_number(dtype, p):
    """The most that fits into a lane of each window: a part of the largest significands, and two numbers far below."""
    largest = torch.full((PART - 2,), 2 - torch.finfo(dtype).eps, dtype=dtype)
    for distance in range(14 if dtype == torch.float16 else 50):
        least = torch.full((2,), 2.0**-distance * (1 + torch.finfo(dtype).eps), dtype=dtype)
        found = sum_in(words_of([torch.cat([largest, least])], p))
        assert found == len(largest) * true_sum([largest[:1]], p) + true_sum([least], p)


@pytest.mark.parametrize("value", [1e-45, 3.4e38, -1e-45, 1.1754944e-38])
@EACH_P
def test_the_ends_of_fp32(value, p):
    x = torch.full((PART + 3,), value)
    total = true_sum([x], p)
    assert sum_in(words_of([x], p)) == total > 0
    assert is_rounded_once(exact_norm(words_of([x], p), p), total, p)
    mixed = torch.cat([x, torch.tensor([1e-45, 1.0, -0.0, 3e38, 7e-42])])
    assert sum_in(words_of([mixed], p)) == true_sum([mixed], p)


@EACH_P
def test_numbers_that_the_processor_was_told_to_read_as_zero(p):
    x = bits([1, 5, 0x7FFFFF, 0x80000001, 0x3F800000], torch.float32)
    total = true_sum([x], p)
    torch.set_flush_denormal(True)
    try:
        words = words_of([x, x.bfloat16()], p)
    finally:
        torch.set_flush_denormal(False)
    assert sum_in(words) == total + true_sum([x.bfloat16()], p)


@EACH_DTYPE
@EACH_P
def test_words_of_parts_add_up_to_those_of_the_whole(dtype, p):
    x = spread(3 * BLOCK // 2, dtype, 4)
    whole = words_of([x], p)
    chance = torch.Generator().manual_seed(1)
    for pieces in (2, 7, 64):
        cuts = torch.randint(len(x) + 1, (pieces - 1,), generator=chance).sort().values.tolist()
        parts = list(torch.tensor_split(x, cuts))
        order = torch.randperm(pieces, generator=chance).tolist()
        total = sum((words_of([parts[k]], p) for k in order), torch.zeros_like(whole))
        assert exact_norm(total, p) == exact_norm(whole, p)
        assert sum(d << 32 * k for k, d in enumerate(total.tolist()[COUNTS:])) == sum(
            d << 32 * k for k, d in enumerate(whole.tolist()[COUNTS:])
        )
        assert torch.equal(words_of([parts[k] for k in order], p), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@COMPILED
def test_the_same_words_for_any_threads_as_by_torch(dtype, monkeypatch, road):
    tensors = [spread(n, dtype, 2, n) for n in (3 * SHARE + 5, 1000, BLOCK + 1)]
    tensors += [spread(1 + k % 40, dtype, 9, k) for k in range(WAVE + 7)]
    tensors[0][[5, 70_000]] = torch.tensor([nan, -inf], dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(words_of(tensors, 2.0).tolist())
    monkeypatch.setattr(native, "exact_sum", None)
    assert found == [words_of(tensors, 2.0).tolist()] * 3
    assert found[0][:COUNTS] == [1, 1]


@pytest.mark.parametrize("road", roads()[-1:], indirect=True)
def test_the_same_words_and_fingerprints_by_any_compiler(by_compilers, monkeypatch, road):
    tensors = [spread(n, dtype, 6, n) for n in (PART + 77, 1000) for dtype in DTYPES]
    places = [whole(t.numel()) for t in tensors]
    words, numbers = words_of(tensors, 2.0), fingerprints(tensors, places, [1] * len(tensors))
    for loaded in map(native.load, by_compilers):
        assert loaded is not None
        monkeypatch.setattr(native, "exact_sum", loaded.distclip_exact_sum)
        monkeypatch.setattr(native, "fingerprints", loaded.distclip_fingerprints)
        for instructions in range(loaded.distclip_widest_instructions() + 1):
            monkeypatch.setattr(native, "widest", instructions)
            assert torch.equal(words_of(tensors, 2.0), words)
            assert torch.equal(fingerprints(tensors, places, [1] * len(tensors)), numbers)


@EACH_P
def test_all_dtypes_in_one_sum(p):
    narrow = [spread(100, dtype, 3) for dtype in DTYPES[:3]]
    total = true_sum(narrow, p)
    assert sum_in(words_of(narrow, p)) == sum_in(words_of(narrow, p, wide=True)) == total
    wide = [*narrow, spread(100, torch.float64, 100)]
    assert sum_in(words_of(wide, p)) == true_sum(wide, p)
    added = words_of(narrow, p, wide=True) + words_of(wide[-1:], p)
    assert exact_norm(added, p) == exact_norm(words_of(wide, p), p)


def test_complex_numbers_are_pairs():
    x = torch.complex(spread(70, torch.float32, 5), spread(70, torch.float32, 5, 1))
    assert sum_in(words_of([x], 2.0)) == true_sum([x], 2.0)
    assert sum_in(words_of([x.to(torch.complex128)], 2.0)) == true_sum([x], 2.0)


def views() -> Iterator[Tensor]:
    base = spread(6 * 5 * 4 * 3, torch.float32, 3).view(6, 5, 4, 3)
    yield base.to(memory_format=torch.channels_last)
    yield base.transpose(0, 2)
    yield base[:, 1:3]
    yield base[:, :, ::2]
    yield torch.ones(3, 1).expand(3, 1000)
    yield spread(300_000, torch.float32, 3).view(300, 1000)[:, ::3]
    yield torch.tensor(3.0)
    yield base[:0]


def test_views_of_any_strides():
    for view in views():
        assert sum_in(words_of([view], 2.0)) == true_sum([view], 2.0)


def test_any_address():
    numbers = spread(1000, torch.float32, 3)
    words = words_of([numbers], 2.0)
    memory = bytearray(8 + numbers.nbytes)
    for offset in range(8):
        moved = torch.frombuffer(memory, dtype=torch.float32, count=1000, offset=offset).copy_(numbers)
        assert torch.equal(words_of([moved], 2.0), words)


def test_freed_memory_is_an_error_and_no_crash():
    freed = torch.ones(100)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage was freed"):
        exact_sum([torch.ones(3), freed], 2.0, wide=False)


@EACH_P
def test_the_norm_tells_nan_before_inf(p):
    x = torch.tensor([1.0, inf, -inf, nan])
    assert isnan(exact_norm(words_of([x], p), p))
    assert exact_norm(words_of([x[:3]], p), p) == inf
    assert exact_norm(words_of([x[:1]], p), p) == 1.0
    assert exact_norm(words_of([], p), p) == exact_norm(words_of([torch.tensor([-0.0])], p), p) == 0.0


def test_a_finite_norm_beyond_float64_is_the_largest_float():
    x = torch.full((3,), 1.7e308, dtype=torch.float64)
    for p in (1.0, 2.0):
        assert exact_norm(words_of([x], p), p) == 1.7976931348623157e308


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_order_inf_the_largest_word_counts(dtype):
    parts = [spread(100, dtype, 4, seed) for seed in range(3)]
    words = torch.stack([words_of([part], inf) for part in parts])
    right = max(part.abs().max().item() for part in parts)
    assert exact_norm(words.amax(0), inf) == exact_norm(words_of(parts, inf), inf) == right
    assert exact_norm(words_of([], inf), inf) == 0.0
    beyond = [words_of([torch.tensor([number], dtype=dtype)], inf) for number in (-inf, nan, -nan)]
    assert exact_norm(torch.stack([*words, beyond[0]]).amax(0), inf) == inf
    for of_nan in beyond[1:]:
        assert isnan(exact_norm(torch.stack([of_nan, *words, beyond[0]]).amax(0), inf))


def test_what_cannot_be_exact_is_refused_with_the_reason():
    assert "no finite sum of bits" in str(refusal(3.0, [torch.float32]))
    for p in (1.0, inf):
        assert "of complex gradients the 2-norm is exact" in str(refusal(p, [torch.float32, torch.complex64]))
    assert refusal(2.0, [torch.complex128]) is None


def test_words_of_many_ranks_do_not_overflow():
    """At most 2 ** 32 - 1 a digit from each of 2 ** 31 ranks; and a last digit for 2 ** 64 of the largest elements."""
    assert LOWER << 31 < 1 << 63
    for base, digits, largest in ((exact.NARROW_BASE, exact.NARROW, 256), (exact.WIDE_BASE, exact.WIDEST, 2048)):
        assert largest + 64 <= base + 32 * (digits - 1) + 63
