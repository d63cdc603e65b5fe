"""Devices without float64: on one that is not there, which refuses it as MPS does, and with tensors of the CPU."""

from math import inf, isnan, nan
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip.kernels import device as devices, norms_on_host
from distclip.kernels.device import has_float64
from distclip.kernels.without_float64 import CHUNK
from distclip.ranks.group import ClippingGroup
from support import accelerator
from support.accelerator import DEVICE, EXISTS, raw, use_accelerator
from support.oracle import true_norm
from support.ranks import run_ranks, same_bits
from support.samples import crossed


def noise(numel: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(numel, generator=torch.Generator().manual_seed(numel))).to(dtype)


TENSORS = {
    "sizes": [noise(n) for n in (1, 2, 63, 64, 65, 1000, CHUNK + 77)],
    "bf16": [noise(n, dtype=torch.bfloat16) for n in (7, 640, 1001)],
    "fp16": [noise(n, 100.0, torch.float16) for n in (7, 640, 1001)],
    "constants": [torch.full((64 * 99 + 5,), v) for v in (1 / 3, 0.7, 1.9, 3.14159)],
    "beyond fp32": [noise(1000, v) for v in (1e-42, 1e-30, 1e-20, 1e19, 1e30)],
    "gaps": [noise(6000).view(60, 100)[:, 3:41], noise(4000)[::3], noise(600).view(20, 30).t()],
    "complex": [torch.complex(noise(500), noise(501)[1:])],
    "zeros": [torch.zeros(0), torch.zeros(500), torch.zeros(())],
}


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 0.5, inf])
@pytest.mark.parametrize("name", TENSORS)
def test_norms_on_the_host_are_right(name, p):
    norms = norms_on_host(TENSORS[name], p)
    assert (norms.dtype, norms.device.type) == (torch.float64, "cpu")
    for norm, tensor in zip(norms.tolist(), TENSORS[name], strict=True):
        wide = tensor.to(torch.complex128) if tensor.is_complex() else tensor
        right = true_norm([wide.abs()], p)
        assert norm == pytest.approx(right, rel=2e-7)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
def test_what_is_not_finite_is_seen(p):
    tensors = [noise(1000) for _ in range(2)]
    tensors[0][70], tensors[1][999] = nan, -inf
    bad, infinite = norms_on_host(tensors, p).tolist()
    assert isnan(bad)
    assert infinite == inf
    assert norms_on_host([], p).shape == (0,)


def test_mps_has_no_float64_and_xpu_says_so_itself(monkeypatch):
    assert not has_float64(torch.device("mps"))
    assert all(map(has_float64, map(torch.device, ("cpu", "cuda", "xla"))))
    properties = type("Properties", (), {"has_fp64": False})
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    assert not has_float64(torch.device("xpu", 0))


def refusing(tensor: Tensor) -> Tensor:
    """In place of ``accelerator.wrapped``: what MPS says to a float64 tensor."""
    if tensor.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a tensor to float64 dtype: the device does not support it")
    return wrapped(tensor)


wrapped = accelerator.wrapped


def trained(options: dict[str, object]) -> list[tuple[float, float, float, float]]:
    """Reported norms beside those of an oracle, and norms left beside those wanted."""
    seen = []
    with patch.object(devices, "WITHOUT_FLOAT64", {DEVICE}), patch.object(accelerator, "wrapped", refusing):
        use_accelerator()
        model = nn.ParameterList(nn.Parameter(noise(n).to(DEVICE)) for n in (3, 640, 1001))
        clipper = distclip.Clipper(model, distclip.MaxNorm(1.0), **options)
        p = options.get("norm_type", 2.0)
        for step, scale in enumerate((1.0, 1e-6, 1e25)):
            for by in ("clip_", "clip_grad_norm_", "with_norm", "step"):
                for parameter in model:
                    parameter.grad = noise(parameter.numel(), scale).to(DEVICE)
                right = true_norm([raw(q.grad) for q in model], p)
                if by == "clip_":
                    norm = clipper.clip_().norm
                elif by == "step":
                    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, foreach=False)
                    norm = clipper.step(optimizer).norm
                elif by == "clip_grad_norm_":
                    norm = distclip.clip_grad_norm_(model.parameters(), 1.0, norm_type=p)
                else:
                    norm = distclip.get_total_norm([q.grad for q in model], norm_type=p)
                    on_device = norm.to(DEVICE) if step else norm
                    distclip.clip_grads_with_norm_(model.parameters(), 1.0, on_device)
                left = true_norm([raw(q.grad) for q in model], p)
                seen.append((norm.item(), right, left, min(1.0, right)))
        clipper.verify()
        clipper.load_state_dict(clipper.state_dict())
    return seen


BY_MAXIMA = {"norm_type": inf}
OPTIONS = [{}, {"norm_type": 1.0}, BY_MAXIMA, BY_MAXIMA | {"on_drift": "raise"}, {"nonfinite": "propagate"}]


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize(("options", "size"), crossed(OPTIONS, (2, 1)))
def test_a_device_that_refuses_float64_clips_all_the_same(options, size):
    results = run_ranks(trained, size, options, fresh=True)
    for norm, right, left, wanted in results[0]:
        assert norm == pytest.approx(right, rel=2e-7)
        assert left == pytest.approx(wanted, rel=2e-6)
    assert same_bits([torch.tensor([row[0] for row in seen]) for seen in results])


def test_a_group_that_reduces_only_where_there_is_no_float64_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"cuda"})
    monkeypatch.setattr(ClippingGroup, "process_group", object())
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"float64, which cuda:0 does not have.*'cpu:gloo,cuda:nccl'"):
        ClippingGroup(None, (0, 1), 0).device_for([])


def steps_on(device: str) -> list[tuple[float, float, float]]:
    """Norm, factor and what is left of each step of fused AdamW, of policies, dtypes, and gradients on two devices."""
    seen = []
    for policy in (distclip.AutoClip(percentile=50, window=3), distclip.ValueClip((-0.2, 0.1)), 1.0):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = [noise(n, dtype=dtype).to(device) for n in (3, 640, 1001)] + [noise(5)]
            model = nn.ParameterList(map(nn.Parameter, values))
            clipper = distclip.Clipper(model, policy)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
            for step in range(6):
                for parameter in model:
                    parameter.grad = noise(parameter.numel(), 1.0 + step, parameter.dtype).to(parameter.device)
                if step == 2:
                    raw(model[1].grad)[7] = nan
                report = clipper.step(optimizer) if step % 2 else clipper.clip_()
                left = true_norm([raw(q.grad).nan_to_num() for q in model])
                seen.append((report.norm.nan_to_num(-1.0).item(), report.coef.item(), left))
    return seen


def on_both() -> list[list[tuple[float, float, float]]]:
    with patch.object(devices, "WITHOUT_FLOAT64", {DEVICE}), patch.object(accelerator, "wrapped", refusing):
        use_accelerator()
        return [steps_on(DEVICE), steps_on("cpu")]


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_policies_decide_without_float64_as_they_do_on_the_host():
    here, host = run_ranks(on_both, 1, fresh=True)[0]
    assert len({coef for _, coef, _ in host}) > 6
    for got, right in zip(here, host, strict=True):
        assert got == pytest.approx(right, rel=3e-7)
