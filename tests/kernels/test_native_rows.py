"""The compiled kernel with one sum for each tensor or row: these depend on their elements alone."""

from pathlib import Path

import pytest
import torch

from distclip.kernels import Cut, native, power_sum, row_sums, sums_of_each
from kernels.test_native import BLOCK, COMPILERS, SHARE, WAVE, built, compiled, noise

pytestmark = built
EACH_DTYPE = pytest.mark.parametrize("dtype", native.KINDS, ids=str)
LENGTHS = [1, 9, 32, 1000, BLOCK // 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> list[Path]:
    return [native.library(), *(compiled(each, tmp_path_factory.mktemp(each)) for each in COMPILERS)]


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
        monkeypatch.setattr(native, "of_rows", library.distclip_sums_of_squares_of_rows)
        for instructions in {native.PORTABLE, native.instructions}:
            monkeypatch.setattr(native, "instructions", instructions)
            for threads in (1, 3):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                assert row_sums([flat], [cut], 2.0).tolist() == right


@EACH_DTYPE
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_one_call_reads_all_rows_that_lie_one_after_the_other(dtype, order, monkeypatch):
    calls = []
    monkeypatch.setattr(native, "of_rows", lambda *arguments: calls.append(arguments))
    tensors = [noise(120, dtype).view(2, 3, 4, 5).to(memory_format=order), noise(60, dtype)]
    row_sums(tensors, [Cut(0, 60, 0, 2), Cut(7, 10, 3, 7)], 2.0)
    assert len(calls) == 1
    assert calls[0][3] == len(tensors)
