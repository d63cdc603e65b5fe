"""One sum for each tensor or row, and a factor for each: the float64 oracle's sums, the bits of scaling each alone.

Each test on the CPU runs with the compiled kernel, whose sums of squares are within 1e-12, and with torch's alone.
"""

from collections.abc import Sequence
from itertools import product
from math import inf, isnan, nan

import pytest
import torch
from torch import Tensor

from distclip.kernels import Cut, native, row_sums, scale_, scale_each_, scale_rows_, sums_of_each
from distclip.kernels.sums import CHUNK
from support.samples import crossed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
POWERS = (0.5, 1.0, 2.0, 3.0, inf)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_POWER = pytest.mark.parametrize("p", POWERS)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernel(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "kernel", None)
    elif native.name() == "torch's kernels":
        pytest.skip("needs the compiled kernel, which this install did not build or DISTCLIP_NATIVE=0 leaves alone")
    return request.param


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    pairs = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return (torch.complex(*pairs) if dtype.is_complex else pairs[0]).to(dtype)


def cases(dtype: torch.dtype) -> tuple[list[Tensor], list[Cut]]:
    """Tensors of every kind, and how they fall into rows."""
    both = [
        (noise(6, 20, dtype=dtype), Cut(0, 20, 0, 6)),
        (noise(7, dtype=dtype), Cut(0, 7, 0, 1)),
        (noise(dtype=dtype), Cut(0, 1, 0, 1)),
        (noise(0, dtype=dtype), Cut(0, 0, 0, 1)),
        (noise(0, 5, dtype=dtype), Cut(0, 5, 0, 0)),
        (noise(4, 0, dtype=dtype), Cut(0, 0, 0, 4)),
        (noise(3, CHUNK + 3, dtype=dtype), Cut(0, CHUNK + 3, 0, 3)),
        (noise(5001, 33, dtype=dtype), Cut(0, 33, 0, 5001)),
        (noise(4, 3, 5, 2, dtype=dtype).to(memory_format=torch.channels_last), Cut(0, 30, 0, 4)),
        (noise(3, 2, 2, 2, 2, dtype=dtype).to(memory_format=torch.channels_last_3d), Cut(0, 16, 0, 3)),
        (noise(6, 20, dtype=dtype, seed=1).t(), Cut(0, 6, 0, 20)),
        (noise(1, 6, 20, dtype=dtype).transpose(1, 2), Cut(0, 120, 0, 1)),
        (noise(9, 40, dtype=dtype)[::2, 3:21], Cut(0, 18, 0, 5)),
        (noise(50, dtype=dtype)[::3], Cut(0, 17, 0, 1)),
        (noise(5 + 3 * 10 + 2, dtype=dtype), Cut(5, 10, 2, 5)),
        (noise(5 + 30, dtype=dtype), Cut(5, 10, 0, 4)),
        (noise(32, dtype=dtype), Cut(0, 10, 2, 4)),
        (noise(9, dtype=dtype), Cut(4, 10, 5, 2)),
        (noise(4, dtype=dtype), Cut(4, 10, 0, 1)),
        (noise(4, dtype=dtype, seed=1), Cut(0, 10, 4, 1)),
    ]
    return [tensor for tensor, _ in both], [cut for _, cut in both]


def rows(tensor: Tensor, cut: Cut) -> list[Tensor]:
    """Views of the rows, each as the definition of a cut has it."""
    if not tensor.is_contiguous():
        return list(tensor) if cut.count == len(tensor) else [tensor]
    lengths = [cut.head] * (cut.head > 0)
    lengths += [cut.length] * (cut.count - (cut.head > 0) - (cut.tail > 0))
    lengths += [cut.tail] * (cut.tail > 0)
    return list(tensor.view(-1).split(lengths)) if lengths else []


def right_sum(tensor: Tensor, p: float) -> float:
    x = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).abs().flatten()
    if not x.numel():
        return 0.0
    return (x.max() if p == inf else x.pow(p).sum()).item()


def exact(dtype: torch.dtype, p: float, kernel: str) -> float:
    """The relative error that a sum may have: twice that of a norm where rows of 64 squares are added in fp32."""
    narrow = dtype not in (torch.float64, torch.complex128)
    return 4e-7 if kernel == "torch" and p == 2 and narrow else 1e-12


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """With the same strides, gaps included."""
    made = []
    for tensor in tensors:
        like = torch.empty(2 * tensor.numel() * 3 + 1, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
        made.append(like.copy_(tensor))
    return made


# ---- sums ----------------------------------------------------------------------------------------------------


@EACH_DTYPE
@EACH_POWER
def test_the_sum_of_each_tensor(dtype, p, kernel):
    tensors, _ = cases(dtype)
    found = sums_of_each(tensors, p)
    assert (found.dtype, found.shape) == (torch.float64, (len(tensors),))
    assert found.tolist() == pytest.approx([right_sum(t, p) for t in tensors], rel=exact(dtype, p, kernel), abs=0)


@EACH_DTYPE
@EACH_POWER
def test_the_sum_of_each_row(dtype, p, kernel):
    tensors, cuts = cases(dtype)
    right = [right_sum(row, p) for tensor, cut in zip(tensors, cuts, strict=True) for row in rows(tensor, cut)]
    found = row_sums(tensors, cuts, p)
    assert (found.dtype, found.shape) == (torch.float64, (sum(cut.count for cut in cuts),))
    assert found.tolist() == pytest.approx(right, rel=exact(dtype, p, kernel), abs=0)


@EACH_POWER
def test_dtypes_in_one_list_keep_their_order(p):
    both = [cases(dtype) for dtype in DTYPES]
    mixed = [tensors[k] for k in range(len(both[0][0])) for tensors, _ in both]
    cuts = [cut for cut in both[0][1] for _ in both]
    assert torch.equal(sums_of_each(mixed, p), torch.cat([sums_of_each([tensor], p) for tensor in mixed]))
    alone = [row_sums([tensor], [cut], p) for tensor, cut in zip(mixed, cuts, strict=True)]
    assert torch.equal(row_sums(mixed, cuts, p), torch.cat(alone))


@EACH_POWER
def test_of_nothing(p):
    assert sums_of_each([], p).shape == row_sums([], [], p).shape == (0,)


@pytest.mark.parametrize(("dtype", "bad", "p"), crossed(product(DTYPES, [nan, inf, -inf]), POWERS))
def test_what_is_not_finite_stays_in_its_unit(dtype, p, bad):
    tensors, cuts = cases(dtype)
    tensors[7][70, 5] = tensors[14][3] = bad
    each, every = sums_of_each(tensors, p), row_sums(tensors, cuts, p)
    first = [sum(cut.count for cut in cuts[:k]) for k in (7, 14)]
    for found, places in ((each, [7, 14]), (every, [first[0] + 70, first[1]])):
        assert (~found.isfinite()).nonzero().flatten().tolist() == places
        assert all(isnan(found[k]) == isnan(bad) for k in places)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_ends_of_the_range_of_a_dtype(dtype, kernel):
    info = torch.finfo(dtype)
    tensors = [torch.full((2, 100), value, dtype=dtype) for value in (info.max, info.tiny, info.tiny / 64, 0.0)]
    each = [row for tensor in tensors for row in tensor]
    right = pytest.approx([right_sum(row, 2.0) for row in each], rel=exact(dtype, 2.0, kernel), abs=0)
    assert row_sums(tensors, [Cut(0, 100, 0, 2)] * 4, 2.0).tolist() == right
    assert sums_of_each(each, 2.0).tolist() == right


def test_freed_and_shared_memory_is_an_error():
    freed, one = torch.ones(2, 50), torch.ones(2, 50)
    freed.untyped_storage().resize_(0)
    cuts, factors = [Cut(0, 50, 0, 2)] * 2, torch.full((4,), 0.5)
    for bad, said in (([one, freed], "its storage was freed"), ([one, one], "shares memory with another")):
        for p in (2.0, 3.0):
            with pytest.raises(RuntimeError, match=said):
                row_sums(bad, cuts, p)
        with pytest.raises(RuntimeError, match=said):
            scale_each_(bad, factors[:2])
        with pytest.raises(RuntimeError, match=said):
            scale_rows_(bad, cuts, factors)
    with pytest.raises(RuntimeError, match="its storage was freed"):
        sums_of_each([one, freed], 2.0)
    assert torch.equal(one, torch.ones(2, 50))
    scale_each_(one.view(-1).split(50), factors[:2])  # parts of one tensor share nothing
    assert torch.equal(one, torch.full((2, 50), 0.5))


def test_only_flat_tensors_are_cut_within_rows():
    with pytest.raises(AssertionError, match="only flat tensors"):
        row_sums([noise(4, 6).t()], [Cut(2, 4, 2, 7)], 3.0)


# ---- scaling -------------------------------------------------------------------------------------------------


def factors_of(count: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)


@EACH_DTYPE
@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
def test_scaling_each_has_the_bits_of_scaling_each_alone(dtype, of):
    tensors, cuts = cases(dtype)
    factors = factors_of(len(tensors), of)
    wanted, found = copies(tensors), copies(tensors)
    for tensor, factor in zip(wanted, factors, strict=True):
        scale_([tensor], factor)
    scale_each_(found, factors)
    assert same(found, wanted)
    assert not same(found, tensors)
    factors = factors_of(sum(cut.count for cut in cuts), of)
    wanted, found = copies(tensors), copies(tensors)
    every = [row for tensor, cut in zip(wanted, cuts, strict=True) for row in rows(tensor, cut)]
    for row, factor in zip(every, factors, strict=True):
        scale_([row], factor)
    scale_rows_(found, cuts, factors)
    assert same(found, wanted)
    assert not same(found, tensors)


@EACH_DTYPE
def test_what_has_the_factor_1_is_not_touched_and_nan_stays_in_its_unit(dtype):
    tensors, cuts = cases(dtype)
    tensors = copies(tensors)
    first, kept = sum(cut.count for cut in cuts[:7]), copies(tensors)
    each, every = torch.ones(len(tensors)), torch.ones(sum(cut.count for cut in cuts))
    each[6], every[first + 70] = nan, nan
    before = [tensor._version for tensor in tensors]
    scale_each_(tensors, each)
    scale_rows_(tensors, cuts, every)
    changed = [k for k, tensor in enumerate(tensors) if tensor._version != before[k] or not tensor.equal(kept[k])]
    assert changed == [6, 7]
    assert tensors[6].isnan().all()
    others = torch.arange(len(tensors[7])) != 70
    assert tensors[7][70].isnan().all()
    assert torch.equal(tensors[7][others], kept[7][others])


def test_tensors_of_inference_mode_are_scaled():
    with torch.inference_mode():
        made = [torch.ones(2, 3), torch.ones(3)]
    scale_each_(made, torch.tensor([0.5, 1.0]))
    scale_rows_(made, [Cut(0, 3, 0, 2), Cut(0, 3, 0, 1)], torch.tensor([1.0, 4.0, 0.5]))
    assert [tensor.tolist() for tensor in made] == [[[0.5] * 3, [2.0] * 3], [0.5] * 3]
