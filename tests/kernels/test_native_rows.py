"""The compiled kernel with one sum, or one factor, for each tensor or row: these depend on their elements alone."""

from collections.abc import Iterator
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distclip.kernels import Cut, Pattern, Table, native, power_sum, row_sums, scale_each_, scale_rows_, sums_of_each
from kernels.test_native import BLOCK, SHARE, WAVE, built, noise

pytestmark = built
EACH_DTYPE = pytest.mark.parametrize("dtype", native.KINDS, ids=str)
LENGTHS = [1, 9, 32, 1000, BLOCK // 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


@pytest.fixture
def libraries(by_compilers) -> list[Path]:
    return [native.library(), *by_compilers]


@EACH_DTYPE
def test_the_sum_of_a_tensor_does_not_depend_on_its_company_nor_on_threads(dtype, monkeypatch):
    small = [noise(1 + k % 300, dtype, k) for k in range(WAVE + 7)]  # more than a wave
    tensors = [noise(BLOCK - 1, dtype), *small, noise(3 * SHARE + 5, dtype), noise(2 * BLOCK + 9, dtype)]
    together = sums_of_each(tensors, 2.0)
    assert together.tolist() == [power_sum([tensor], 2.0) for tensor in tensors]
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(sums_of_each(tensors[::-1], 2.0).flip(0), together)


@EACH_DTYPE
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_have_the_same_bits_for_any_threads_instructions_and_compiler(length, dtype, monkeypatch, libraries):
    whole = max(2, min(2 * SHARE // length + 1, 5000))  # work for two threads, where rows are long
    lengths = [length // 3] * (length > 2) + [length] * whole + [length // 2] * (length > 1)
    flat = noise(sum(lengths), dtype)
    cut = Cut(length // 3, length, length // 2, len(lengths))
    right = [power_sum([row], 2.0) for row in flat.split(lengths)]
    for library in map(native.load, libraries):
        assert library is not None
        monkeypatch.setattr(native, "sum_rows", library.distclip_sums_of_squares_of_rows)
        for instructions in {native.PORTABLE, native.instructions}:
            monkeypatch.setattr(native, "instructions", instructions)
            for threads in (1, 3):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                assert row_sums([flat], [cut], 2.0).tolist() == right


@EACH_DTYPE
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_one_call_reads_all_rows_that_lie_one_after_the_other(dtype, order, monkeypatch):
    calls = []
    monkeypatch.setattr(native, "sum_rows", lambda *arguments: calls.append(arguments))
    tensors = [noise(120, dtype).view(2, 3, 4, 5).to(memory_format=order), noise(60, dtype)]
    row_sums(tensors, [Cut(0, 60, 0, 2), Cut(7, 10, 3, 7)], 2.0)
    assert len(calls) == 1
    assert calls[0][3] == len(tensors)


# ---- factors -------------------------------------------------------------------------------------------------

SCALED = pytest.mark.parametrize("dtype", sorted(native.SCALED, key=str), ids=str)


def on_every_library(libraries, monkeypatch) -> Iterator[None]:
    """Once for each library, instruction set and number of threads, of which nothing may depend."""
    for library in map(native.load, libraries):
        assert library is not None
        monkeypatch.setattr(native, "multiply_rows", library.distclip_multiply_rows)
        for instructions in {native.PORTABLE, native.instructions}:
            monkeypatch.setattr(native, "instructions", instructions)
            for threads in (1, 3):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                yield


@SCALED
@pytest.mark.parametrize("length", LENGTHS)
def test_scaled_rows_have_the_bits_of_torch_for_any_threads_instructions_and_compiler(
    length, dtype, monkeypatch, libraries
):
    whole = max(2, min(2 * SHARE // length + 1, 2000))
    lengths = [length // 3] * (length > 2) + [length] * whole + [length // 2] * (length > 1)
    flat, factors = (
        noise(sum(lengths), dtype),
        torch.rand(len(lengths), generator=torch.Generator().manual_seed(length)),
    )
    factors[1] = 1.0
    rows = flat.split(lengths)
    right = torch.cat(torch._foreach_mul(rows, factors.unbind()))
    for _ in on_every_library(libraries, monkeypatch):
        found = flat.clone()
        scale_rows_([found], [Cut(length // 3, length, length // 2, len(lengths))], factors)
        assert torch.equal(found, right)


@SCALED
def test_more_tensors_than_a_wave_have_factors_of_their_own(dtype, monkeypatch, libraries):
    tensors = [noise(1 + k % 300, dtype, k) for k in range(2 * WAVE + 7)]
    factors = torch.rand(len(tensors), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = torch._foreach_mul(tensors, factors.float().unbind())
    for _ in on_every_library(libraries, monkeypatch):
        found = [tensor.clone() for tensor in tensors]
        scale_each_(found, factors)
        assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("factor", [0.3, 1 - 2**-24, 1.7, 1e30, 3e-39, 2.0**-24, -0.7, 0.0, inf, nan])
def test_every_bf16_number_is_rounded_as_torch_does(factor, monkeypatch, libraries):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    right = torch._foreach_mul([every], [torch.tensor(factor, dtype=torch.float32)])[0]
    for _ in on_every_library(libraries, monkeypatch):
        found = every.clone()
        scale_each_([found], torch.tensor([factor], dtype=torch.float32))
        assert torch.equal(found.isnan(), right.isnan())
        assert torch.equal(found[~found.isnan()].view(torch.int16), right[~right.isnan()].view(torch.int16))


@SCALED
def test_autograd_learns_of_what_was_scaled(dtype):
    tensors = [noise(5, dtype), noise(6, dtype)]
    before = [tensor._version for tensor in tensors]
    scale_each_(tensors, torch.tensor([0.5, 1.0]))
    assert [tensor._version > version for tensor, version in zip(tensors, before, strict=True)] == [True, False]


def test_a_table_of_where_tensors_lay_is_not_used_where_they_moved():
    tensors = [torch.ones(4), torch.ones(6)]
    table, old = Table.of(tensors), tensors[1].detach()
    tensors[1].data = torch.ones(6)
    scale_each_(tensors, torch.tensor([0.5, 0.25]), table)
    scale_rows_(tensors, [Cut(0, 4, 0, 1), Cut(0, 6, 0, 1)], torch.tensor([0.5, 1.0]), table)
    assert [tensor.tolist() for tensor in tensors] == [[0.25] * 4, [0.25] * 6]
    assert old.tolist() == [1.0] * 6


def in_pieces(runs: list[Tensor]) -> list[Tensor]:
    """The parts of three runs in another order, and one that is empty."""
    first, second, third = runs
    return [third, second, torch.empty(0), *first[:12].split([8, 4]), first[12:]]


@pytest.mark.parametrize("by_row", [False, True])
def test_a_pattern_finds_tensors_in_runs_wherever_these_lie(by_row):
    pattern = Pattern()
    cuts = [Cut(0, 4, 0, 3), *(Cut(0, n, 0, 1) for n in (8, 0, 8, 4, 18))]
    factors = torch.rand(8 if by_row else 6, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # each time in other memory
        runs = [noise(30, torch.float32), noise(8, torch.float32), noise(12, torch.float32)]
        copies = [run.clone() for run in runs]
        found, wanted = in_pieces(runs), in_pieces(copies)
        table = pattern.table(found, runs, cuts if by_row else None)
        assert table.tensors is runs
        if by_row:
            assert torch.equal(row_sums(found, cuts, 2.0, table), row_sums(wanted, cuts, 2.0))
            scale_rows_(found, cuts, factors, table)
            scale_rows_(wanted, cuts, factors)
        else:
            assert torch.equal(sums_of_each(found, 2.0, table), sums_of_each(wanted, 2.0))
            scale_each_(found, factors, table)
            scale_each_(wanted, factors)
        assert all(map(torch.equal, runs, copies))
        assert not torch.equal(runs[0], noise(30, torch.float32))


def test_a_pattern_of_nothing_but_empty_tensors():
    assert sums_of_each([torch.empty(0)], 2.0, Pattern().table([torch.empty(0)], [], None)).tolist() == [0.0]


def test_runs_that_the_kernel_cannot_reach_have_no_pattern():
    def gaps() -> Tensor:
        return torch.ones(4, 6)[:, ::2]

    def wide() -> Tensor:
        return torch.ones(3, dtype=torch.float64)

    for runs in ([gaps()], [wide()], [gaps(), wide()], [torch.ones(2), torch.ones(2, dtype=torch.bfloat16)]):
        table = Pattern().table(runs, runs, None)
        assert sums_of_each(runs, 2.0, table).tolist() == [float(run.numel()) for run in runs]
        scale_each_(runs, torch.full((len(runs),), 0.5), table)
        assert all(bool((run == 0.5).all()) for run in runs)
