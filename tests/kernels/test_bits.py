"""All elements added as integers: the same sum however they lie, and another one for every bit that is flipped."""

from unittest.mock import patch

import pytest
import torch

from distclip.kernels import add_bits, bits_of_each, native, no_bits, power_sum
from distclip.kernels.bits import MODULUS
from fuzz.drift import flip

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def bits_of(tensors: list[torch.Tensor], p: float = 2.0) -> int:
    bits = no_bits()
    power_sum(tensors, p, bits)
    return bits[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_that_of_the_integers_compiled_or_not_for_any_split_and_p(dtype):
    whole = noise(70, 41, dtype=dtype)
    right = int(bits_of_each([whole])[0])
    assert bits_of([whole]) == bits_of([whole], 3.0) == right
    assert bits_of([*whole[:33].split(5), whole[33:].clone(memory_format=torch.contiguous_format)]) == right
    assert bits_of([whole.t()]) == bits_of([whole[:, ::2], whole[:, 1::2]]) == right
    with patch.object(native, "kernel", None):
        assert bits_of([whole]) == bits_of([whole], 1.0) == right
    twice = no_bits()
    add_bits(twice, [whole])
    add_bits(twice, [whole])
    assert twice[0] == 2 * right % MODULUS


def test_nothing_has_a_sum_of_0_and_so_have_zeros_but_not_those_below():
    assert bits_of([]) == bits_of([torch.empty(0)]) == bits_of([torch.zeros(7)]) == 0
    assert bits_of([-torch.zeros(1)]) == (1 << 31) + (1 << 30)  # of its upper half the square too
    assert bits_of_each([torch.zeros(3), torch.empty(0), -torch.zeros(1)]).tolist() == [0, 0, (1 << 31) + (1 << 30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1, 37])
def test_every_single_flip_of_a_bit_changes_it(dtype, numel):
    values = noise(numel, dtype=dtype)
    before = bits_of([values])
    for bit in range(8 * values.element_size()):
        flip(values, numel // 2, bit)
        assert bits_of([values]) != before
        flip(values, numel // 2, bit)
    assert bits_of([values]) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, -4.0, 1 / 65536, 65536.0])
def test_a_copy_negated_or_times_a_power_of_two_has_another_sum(dtype, factor):
    values = noise(512, 512, dtype=dtype).clamp(-1, 1)  # so many elements that what each adds is 0 modulo 2 ** 32
    values = torch.where(values == 0, torch.ones_like(values), values)
    assert bits_of([values * factor]) != bits_of([values])
