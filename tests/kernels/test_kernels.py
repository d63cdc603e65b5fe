"""The sums: 2e-7 of the float64 oracle at every size, no overflow, no underflow, no gradient-sized temporary.

Each test runs with the compiled kernel, whose sums of squares are within 1e-12, and with torch's kernels alone.
"""

from itertools import product
from math import inf, nan

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distclip
from distclip.kernels import local_norms, native, scale_
from distclip.kernels.sums import CHUNK, ROW, SMALL, WINDOW
from support.oracle import true_norm
from support.samples import crossed

EDGES = [1, 2, ROW - 1, ROW, ROW + 1, 1000, SMALL, SMALL + 1, CHUNK + ROW + 3, 10**6 + 7]
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernel(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "kernel", None)
    elif native.name() == "torch's kernels":
        pytest.skip("needs the compiled kernel, which this install did not build or DISTCLIP_NATIVE=0 leaves alone")
    return request.param


def norm(tensor: Tensor, p: float = 2.0) -> float:
    (value,) = local_norms([tensor], p).tolist()
    return value


def noise(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 2.5, 3.0, inf])
def test_every_size_and_dtype(numel, dtype, p):
    tensor = noise(numel, dtype)
    assert norm(tensor, p) == pytest.approx(true_norm([tensor], p), rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [1 / 3, 0.7, 1.9, 3.14159, 1e-3])
def test_constant_data_where_rounding_has_a_direction(dtype, value, kernel):
    tensor = torch.full((10**6,), value).to(dtype)
    error = 1e-12 if kernel == "compiled" else 2e-7
    assert norm(tensor) == pytest.approx(tensor[0].item() * 1000.0, rel=error)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_hundred_million_elements(dtype, kernel):
    tensor = torch.randn(10**6, generator=torch.Generator().manual_seed(1)).to(dtype)
    one = true_norm([tensor])
    error = 1e-12 if kernel == "compiled" else 2e-7
    assert norm(tensor.repeat(100)) == pytest.approx(10.0 * one, rel=error)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("exponent", range(-30, 31, 5))
@pytest.mark.parametrize("numel", [1, 100_003])
def test_no_overflow_and_no_underflow(numel, exponent, p):
    tensor = noise(numel) * 10.0**exponent
    assert norm(tensor, p) == pytest.approx(true_norm([tensor], p), rel=2e-7)


@pytest.mark.parametrize("numel", [5, 100_003])
def test_the_ends_of_fp32(numel):
    for value in (torch.finfo(torch.float32).max, 1e-45):
        tensor = torch.full((numel,), value)
        assert norm(tensor) == pytest.approx(tensor[0].double().item() * numel**0.5, rel=2e-7)


def test_extreme_rows_among_ordinary_and_empty_ones():
    tensor = noise(10 * CHUNK).view(-1, ROW)
    tensor[3] *= 1e25
    tensor[100:9000] = 0.0
    tensor[9001] *= 1e-25
    assert norm(tensor) == pytest.approx(true_norm([tensor]), rel=2e-7)
    tensor[3] = 0.0
    assert norm(tensor) == pytest.approx(true_norm([tensor]), rel=2e-7)
    assert norm(torch.zeros(10 * CHUNK)) == 0.0


def test_flushed_denormals_change_nothing():
    tensor = noise(10 * SMALL) * 1e-22
    expected = true_norm([tensor])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert norm(tensor) == pytest.approx(expected, rel=2e-7)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [3, 100_003])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_nan_and_inf_are_told_apart(numel, dtype, p, bad):
    tensor = noise(numel, dtype)
    tensor[numel // 2] = bad
    assert norm(tensor, p) == pytest.approx(abs(bad), nan_ok=True)
    tensor[0] = nan
    assert norm(tensor, p) == pytest.approx(nan, nan_ok=True)


VIEWS = {
    "transposed": lambda: noise(600 * 500).view(600, 500).t(),
    "channels_last": lambda: noise(8 * 16 * 32 * 33).view(8, 16, 32, 33).to(memory_format=torch.channels_last),
    "sliced": lambda: noise(600 * 500).view(600, 500)[:, 3:401],
    "strided": lambda: noise(400_000)[::3],
    "expanded": lambda: noise(500).expand(700, 500),
    "scalar": lambda: noise(1)[0],
    "empty": lambda: torch.zeros(0, 7),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("p", [1.0, 2.0, inf])
def test_any_strides(view, p):
    tensor = VIEWS[view]()
    assert norm(tensor, p) == pytest.approx(true_norm([tensor], p), rel=2e-7)


def test_many_tensors_at_once_keep_their_order():
    tensors = [noise(n, dtype) for n in (7, 0, 200_000, 1, SMALL) for dtype in DTYPES]
    expected = [true_norm([t]) for t in tensors]
    assert local_norms(tensors, 2.0).tolist() == pytest.approx(expected, rel=2e-7)


class LargestNewTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("dtype", "p", "factor"), crossed(product(DTYPES, [1.0, 2.0, 3.0, inf]), [1.0, 0.0, 1e-30]))
def test_no_temporary_is_as_large_as_a_gradient(dtype, p, factor):
    tensor = (noise(8 * ROW * WINDOW) * factor).to(dtype)
    parameter = torch.nn.Parameter(torch.zeros_like(tensor))
    parameter.grad = tensor
    with LargestNewTensor() as made:
        distclip.clip_grad_norm_([parameter], 0.5, p)
    assert 0 < made.bytes <= 1 << 20


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("numel", [1, 33, 10_000])
def test_scaling_rounds_once(dtype, numel):
    tensor = noise(numel, dtype)
    exact = (tensor.double() * torch.tensor(0.123456789).double()).to(dtype)
    scale_([tensor], 0.123456789)
    assert torch.equal(tensor, exact)
