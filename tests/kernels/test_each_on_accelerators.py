"""One sum and one factor for each tensor or row on an accelerator that is not there: few launches, no wait."""

from collections.abc import Callable
from math import inf, isnan, nan
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distclip.kernels import Cut, device as devices, row_sums, scale_each_, scale_rows_
from distclip.kernels.foreach import LARGE, SMALL
from kernels.test_each import factors_of, noise, right_sum, rows, same
from support import accelerator
from support.accelerator import DEVICE, EXISTS, counted_launches, largest_tensor, no_waits, raw, use_accelerator
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")

POWERS = (0.5, 1.0, 2.0, 3.0, inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)


def cases() -> tuple[list[Tensor], list[Cut]]:
    """Tensors of the host: many of one length, few, flat ones cut within rows, long rows, none, and a large tensor."""
    both = [(noise(6, 20, dtype=dtype, seed=k), Cut(0, 20, 0, 6)) for k in range(5) for dtype in DTYPES]
    both += [(noise(20, dtype=dtype), Cut(0, 20, 0, 1)) for dtype in DTYPES]
    both += [(noise(5 + 30 + 2, dtype=dtype), Cut(5, 10, 2, 5)) for dtype in DTYPES]
    both += [(noise(), Cut(0, 1, 0, 1)), (noise(0, 5), Cut(0, 5, 0, 0)), (noise(3, 0), Cut(0, 0, 0, 3))]
    both += [(noise(2, SMALL + 1), Cut(0, SMALL + 1, 0, 2)), (noise(LARGE // 999, 2000), Cut(0, 2000, 0, LARGE // 999))]
    return [tensor for tensor, _ in both], [cut for _, cut in both]


def here(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().to(DEVICE) for tensor in tensors]


def summed(p: float) -> tuple[list[float], int]:
    """The sums, and the bytes of the largest tensor made for them."""
    use_accelerator()
    tensors, cuts = cases()
    tensors[0][2, 3], tensors[1][4, 0] = nan, inf
    on_device = here(tensors)
    with no_waits(), largest_tensor() as largest:
        found = row_sums(on_device, cuts, p)
    assert (found.dtype, found.device.type) == (torch.float64, DEVICE)
    return raw(found).tolist(), largest[0]


@pytest.mark.parametrize("p", POWERS)
def test_the_sum_of_each_row(p):
    ((found, largest),) = run_ranks(summed, 1, p, fresh=True)
    tensors, cuts = cases()
    right = [right_sum(row, p) for tensor, cut in zip(tensors, cuts, strict=True) for row in rows(tensor, cut)]
    assert isnan(found[2])
    assert found[6 + 4] == inf
    found[2], found[6 + 4] = right[2], right[6 + 4]
    assert found == pytest.approx(right, rel=1e-12, abs=0)
    assert largest <= 8 * LARGE


def scaled(of: torch.dtype) -> tuple[list[Tensor], int]:
    """The tensors after scaling each and then each row, and the bytes of the largest tensor made for it."""
    use_accelerator()
    tensors, cuts = cases()
    on_device = here(tensors)
    each, every = factors_of(len(tensors), of).to(DEVICE), factors_of(sum(cut.count for cut in cuts), of).to(DEVICE)
    with no_waits(), largest_tensor() as largest:
        scale_each_(on_device, each)
        scale_rows_(on_device, cuts, every)
    return [raw(tensor) for tensor in on_device], largest[0]


@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
def test_scaling_has_the_bits_of_the_host(of):
    ((found, largest),) = run_ranks(scaled, 1, of, fresh=True)
    tensors, cuts = cases()
    scale_each_(tensors, factors_of(len(tensors), of))
    scale_rows_(tensors, cuts, factors_of(sum(cut.count for cut in cuts), of))
    assert same(found, tensors)
    assert not any(torch.equal(a, b) for a, b in zip(found, cases()[0], strict=True) if a.numel())
    assert largest <= 4 * LARGE


def launches() -> list[dict[str, int]]:
    """Launches on one tensor each, with 8 and with 80 small tensors of two kinds."""
    use_accelerator()
    found = []
    for many in (8, 80):
        tensors = [t.to(DEVICE) for k in range(many) for t in (noise(6, 20, seed=k), noise(20, seed=k).bfloat16())]
        cuts = [Cut(0, 20, 0, 6), Cut(0, 20, 0, 1)] * many
        factors = torch.ones(7 * many).to(DEVICE)
        calls: dict[str, tuple[Callable[..., object], ...]] = {
            "row_sums": (row_sums, tensors, cuts, 2.0),
            "scale_each_": (scale_each_, tensors, factors[: len(tensors)]),
            "scale_rows_": (scale_rows_, tensors, cuts, factors),
        }
        counts = {}
        for name, (call, *arguments) in calls.items():
            with counted_launches() as seen:
                call(*arguments)
            counts[name] = len(seen)
        found.append(counts)
    return found


def test_small_tensors_share_launches():
    few, many = run_ranks(launches, 1, fresh=True)[0]
    assert few == many
    assert all(0 < count < 8 for count in few.values())


SHAPES = ((6, 20), (37,))
CUTS = [Cut(0, 20, 0, 6), Cut(5, 10, 2, 5)]
wrapped = accelerator.wrapped


def refusing(tensor: Tensor) -> Tensor:
    assert tensor.dtype != torch.float64, "the device has no float64"
    return wrapped(tensor)


def without_float64() -> tuple[list[float], list[Tensor]]:
    with patch.object(devices, "WITHOUT_FLOAT64", {DEVICE}), patch.object(accelerator, "wrapped", refusing):
        use_accelerator()
        on_device = here([noise(*shape, dtype=torch.bfloat16) for shape in SHAPES])
        found = row_sums(on_device, CUTS, 2.0)
        assert found.is_cpu
        scale_each_(on_device, factors_of(2, torch.float64))
        scale_rows_(on_device, CUTS, factors_of(11, torch.float32))
    return found.tolist(), [raw(tensor) for tensor in on_device]


def test_a_device_without_float64_is_summed_on_the_host():
    ((found, left),) = run_ranks(without_float64, 1, fresh=True)
    tensors = [noise(*shape, dtype=torch.bfloat16) for shape in SHAPES]
    assert found == row_sums(tensors, CUTS, 2.0).tolist()
    scale_each_(tensors, factors_of(2, torch.float64))
    scale_rows_(tensors, CUTS, factors_of(11, torch.float32))
    assert same(left, tensors)


def on_two_devices() -> list[Tensor]:
    use_accelerator()
    mixed = [noise(6, 20, seed=k) for k in range(4)]
    mixed[1::2] = here(mixed[1::2])
    scale_each_(mixed, factors_of(4, torch.float32).to(DEVICE))
    scale_rows_(mixed, CUTS[:1] * 4, factors_of(24, torch.float32))
    return [raw(tensor) for tensor in mixed]


def test_factors_go_to_the_device_of_their_tensors():
    (found,) = run_ranks(on_two_devices, 1, fresh=True)
    tensors = [noise(6, 20, seed=k) for k in range(4)]
    scale_each_(tensors, factors_of(4, torch.float32))
    scale_rows_(tensors, CUTS[:1] * 4, factors_of(24, torch.float32))
    assert same(found, tensors)
