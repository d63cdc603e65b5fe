"""Fingerprints: every bit of every element and its place count; order, split, threads and instructions do not."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from distclip.kernels import native
from distclip.kernels.fingerprint import Place, fingerprints, order_of, seed_of, whole
from kernels.test_exact import PATTERNS, bits
from kernels.test_native import BLOCK, SHARE, WAVE, noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SEED = seed_of("layer.weight")
ALL = (1 << 64) - 1


def roads() -> list[str]:
    return ["torch"] if native.fingerprints is None else ["torch", *map(str, range(native.widest + 1))]


COMPILED = pytest.mark.parametrize("road", roads()[1:], indirect=True)


@pytest.fixture(params=roads(), autouse=True)
def road(request, monkeypatch) -> str:
    """torch's kernels, or the compiled one with each instruction set of this processor."""
    if request.param == "torch":
        monkeypatch.setattr(native, "fingerprints", None)
    else:
        monkeypatch.setattr(native, "widest", int(request.param))
    return request.param


def words_in(tensor: Tensor) -> list[int]:
    """Words of 32 bits of each element in row-major order, or of 16."""
    flat = tensor.contiguous().view(-1)
    flat = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
    size = min(flat.itemsize, 4)
    return [word & ((1 << 8 * size) - 1) for word in flat.view({2: torch.int16, 4: torch.int32}[size]).tolist()]


def expected(tensor: Tensor, seed: int = SEED, first: int = 0) -> int:
    """Of a row-major part of a parameter that begins with element ``first``, by the words of the module's docstring."""
    total, words = 0, words_in(tensor)
    first *= max(1, tensor.itemsize // 4)
    for place, word in enumerate(words, first):
        z = (seed + place * 0x9E3779B97F4A7C15 & ALL) ^ word
        z = z + (z & 0xFFFFFFFF) * (z >> 32) & ALL
        z ^= z >> 32
        total += z + (z & 0xFFFFFFFF) * (z >> 32)
    return total & ALL


def mixed(tensor: Tensor, place: Place | None = None, seed: int = SEED) -> int:
    (number,) = fingerprints([tensor], [whole(tensor.numel()) if place is None else place], [seed]).tolist()
    return number & ALL


@EACH_DTYPE
def test_it_is_the_sum_of_mixed_words(dtype):
    for numel in (0, 1, 7, 63, 64, 65, 500, 2001):
        x = noise(numel, torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
        assert mixed(x) == expected(x)


@EACH_DTYPE
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_bit_and_its_place_count(dtype, data):
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    count = 2 if dtype.is_complex else 1
    width = 8 * real.itemsize
    patterns = data.draw(st.lists(PATTERNS[width], min_size=2, max_size=200).filter(lambda x: len(x) % 2 == 0))

    def tensor() -> Tensor:
        x = bits(patterns, real)
        return torch.view_as_complex(x.view(-1, 2)) if count == 2 else x

    before = mixed(tensor())
    assert before == expected(tensor())
    k, bit = data.draw(st.integers(0, len(patterns) - 1)), data.draw(st.integers(0, width - 1))
    patterns[k] ^= 1 << bit
    assert mixed(tensor()) != before
    patterns[k] ^= 1 << bit
    j = data.draw(st.integers(0, len(patterns) - 1))
    patterns[j], patterns[k] = patterns[k], patterns[j]
    assert (mixed(tensor()) == before) == (patterns[j] == patterns[k])


def test_zeros_of_both_signs_and_each_nan_differ():
    zero, minus = torch.zeros(5), torch.tensor([0.0, 0.0, -0.0, 0.0, 0.0])
    assert mixed(zero) != mixed(minus)
    assert mixed(bits([0x7FC00000], torch.float32)) != mixed(bits([0x7FC00001], torch.float32))


def test_seeds_tell_parameters_apart_and_the_dtype_does_not():
    x = noise(100, torch.float32)
    assert mixed(x) != mixed(x, seed=seed_of("layer.bias"))
    assert mixed(x, seed=0) == expected(x, 0)
    assert mixed(x, seed=ALL) == expected(x, ALL)
    assert mixed(torch.zeros(10)) == mixed(torch.zeros(10, dtype=torch.bfloat16))


@EACH_DTYPE
def test_parts_add_up_to_the_whole(dtype):
    x = noise(BLOCK + 12345, torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    cuts = torch.randint(len(x), (6,), generator=torch.Generator().manual_seed(0)).sort().values.tolist()
    parts = torch.tensor_split(x, cuts)
    start = torch.zeros(1, dtype=torch.int64)
    places = [whole(len(x))._replace(starts=start, skip=first) for first in (0, *cuts)]
    found = fingerprints(parts[::-1], places[::-1], [SEED] * len(parts))
    assert int(found.sum()) & ALL == mixed(x)


def test_equal_flips_in_many_elements_do_not_cancel():
    """The worst that a sum of mixes can meet: one bit, or all bits, of every element, or of two; and rows exchanged."""
    x = torch.zeros(1 << 12)
    seen = {mixed(x)}
    for bit in range(32):
        flipped = bits([1 << bit], torch.float32)
        for which in (slice(None), slice(0, 2), slice(0, None, 2), slice(0, 1 << 11), [5, 2000]):
            y = x.clone()
            y[which] = flipped
            number = mixed(y)
            assert number not in seen
            seen.add(number)
    square = noise(1 << 12, torch.float32).view(64, 64)
    for other in (square.flip(0), square.flip(1), square.t().contiguous(), square.roll(1, 0), -square):
        number = mixed(other)
        assert number not in seen
        seen.add(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_runs_of_any_length_and_step(dtype):
    """Runs of a parameter: `length` elements, `step` apart, from any element of the first run on."""
    parameter = noise(4000, torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    one = [expected(each.view(1), first=k) for k, each in enumerate(parameter)]
    for length, step, skip in ((1, 1, 0), (3, 1, 2), (97, 1, 5), (300, 1, 200), (50, 7, 3), (1, 5, 0)):
        starts = torch.tensor([1500, 0, 2500, 700])
        index = (starts.view(-1, 1) + torch.arange(length) * step).flatten()[skip:]
        place = Place(starts, length, step, skip)
        assert mixed(parameter[index], place) == sum(one[k] for k in index.tolist()) & ALL


def layouts(base: Tensor) -> list[Tensor]:
    return [
        base.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
        base.to(memory_format=torch.channels_last),
        torch.stack([base, base], 2)[:, :, 0],  # with gaps
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_tensor_in_any_order_of_memory(dtype):
    base = noise(2 * 5 * 4 * 3, torch.float64).to(dtype).view(2, 5, 4, 3)
    where = torch.arange(base.numel()).view(base.shape)
    for tensor in layouts(base):
        assert torch.equal(tensor, base)
        starts = where.permute(order_of(tensor)).flatten()
        assert mixed(tensor, Place(starts, 1)) == mixed(base)
    wide = noise(3 * 100_000, torch.float32).view(3, 100_000).to(dtype)
    gaps = torch.stack([wide, wide], 2)[:, :, 0]
    assert mixed(gaps) == mixed(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@COMPILED
def test_the_same_numbers_for_any_threads_as_by_torch(dtype, monkeypatch, road):
    numels = [3 * SHARE + 5, 1000, BLOCK + 1, *(1 + k % 40 for k in range(WAVE + 7))]
    tensors = [noise(n, torch.float32).to(dtype) for n in numels]
    places, seeds = [whole(n) for n in numels], list(range(len(numels)))
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(fingerprints(tensors, places, seeds))
    monkeypatch.setattr(native, "fingerprints", None)
    right = fingerprints(tensors, places, seeds)
    assert all(torch.equal(each, right) for each in found)


def test_any_address():
    numbers = noise(1000, torch.float32)
    memory = bytearray(8 + numbers.nbytes)
    for offset in range(8):
        moved = torch.frombuffer(memory, dtype=torch.float32, count=1000, offset=offset).copy_(numbers)
        assert mixed(moved) == mixed(numbers)


def test_tensors_of_all_sizes_in_one_call():
    tensors: Sequence[Tensor] = [noise(50, torch.float64).to(d) for d in DTYPES] + [torch.zeros(0), torch.tensor(3.0)]
    places = [whole(t.numel()) for t in tensors]
    found = fingerprints(tensors, places, list(range(len(tensors)))).tolist()
    assert [number & ALL for number in found] == [expected(t, k) for k, t in enumerate(tensors)]
    assert fingerprints([], [], []).tolist() == []


def test_freed_memory_is_an_error_and_no_crash():
    freed = torch.ones(100)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage was freed"):
        fingerprints([torch.ones(3), freed], [whole(3), whole(100)], [0, 1])
