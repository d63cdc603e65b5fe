"""Coefficients below float32's normal numbers: finite gradients are neither zeroed nor lose precision by them."""

from collections.abc import Callable, Iterator
from math import inf

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

import distclip
from distclip.policies.coefficient import LEAST, factors
from support.oracle import same_tensors
from support.ranks import run_ranks, same_bits

BOUNDS = (0.1, 1e-3, 1e-6, 1e-7)  # of norms of about 1e39: coefficients from 1e-40 to 1e-46
FLUSHES = pytest.mark.parametrize("flush", [False, True])


@pytest.fixture
def flush(request) -> Iterator[bool]:
    assert torch.set_flush_denormal(request.param), "this processor cannot flush denormals"
    yield request.param
    torch.set_flush_denormal(False)


BOTH = pytest.mark.parametrize("flush", [False, True], indirect=True)


def model_of(dtype: torch.dtype) -> nn.ParameterList:
    """Gradients of 1e38 and of 1e30, of which a bound of 1e-7 leaves 1e-16 or so."""
    seed = torch.Generator().manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (40, 7))
    for parameter, largest in zip(model, (1e38, 1e30), strict=True):
        parameter.grad = (torch.randn(parameter.shape, generator=seed, dtype=torch.float64) * largest).to(dtype)
    return model


def wide(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def clipped(gradients: list[Tensor], bound: float) -> list[Tensor]:
    """What is right, in float64."""
    scale = max(wide(g).abs().max().item() for g in gradients)
    norm = sum((wide(g) / scale).square().sum().item() for g in gradients) ** 0.5
    return [wide(g) / scale * (bound / norm) for g in gradients]


def scaled_by_scaler(model: nn.ParameterList, bound: float) -> None:
    scaler = GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    distclip.Clipper(model, bound).step(SGD(model, lr=0.0), scaler=scaler)


def attached(model: nn.ParameterList, bound: float) -> None:
    optimizer = SGD(model, lr=0.0)
    distclip.attach(optimizer, model, bound)
    optimizer.step()


ROADS: dict[str, Callable[[nn.ParameterList, float], object]] = {
    "clip_": lambda model, bound: distclip.Clipper(model, bound).clip_(),
    "coefficient of a policy": lambda model, bound: distclip.Clipper(model, Scaled(bound)).clip_(),
    "step": lambda model, bound: distclip.Clipper(model, bound).step(SGD(model, lr=0.0)),
    "attach": attached,
    "scaler": scaled_by_scaler,
    "clip_grad_norm_": lambda model, bound: distclip.clip_grad_norm_(model, bound),
    "clip_grads_with_norm_": lambda model, bound: distclip.clip_grads_with_norm_(
        model, bound, torch.linalg.vector_norm(torch.cat([wide(p.grad).flatten() for p in model]))
    ),
}


class Scaled:
    """A policy that says the coefficient."""

    def __init__(self, bound: float):
        self.bound = bound

    def needs(self):
        return ()

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        return distclip.Decision(inf, coef=self.bound / statistics.norm()), state


@BOTH
@pytest.mark.parametrize("road", ROADS)
def test_finite_gradients_are_clipped_to_their_bound_however_small(road, flush):
    for bound in BOUNDS:
        model = model_of(torch.float32)
        right = clipped([p.grad for p in model], bound)
        ROADS[road](model, bound)
        for parameter, expected in zip(model, right, strict=True):
            assert (parameter.grad.double() / expected - 1).abs().max() < 3e-7, bound


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_gradients_of_other_dtypes_are_too(dtype, flush):
    for bound in BOUNDS:
        model = model_of(dtype)
        right = clipped([p.grad for p in model], bound)
        distclip.Clipper(model, bound).clip_()
        for parameter, expected in zip(model, right, strict=True):
            near = (wide(parameter.grad) / expected - 1).abs()[expected != 0]
            assert near.max() < (5e-3 if dtype == torch.bfloat16 else 5e-7), bound


@BOTH
def test_narrow_gradients_beside_float64_ones_are_not_lost(flush):
    """The factor is float64 then, which holds it, and the gradients of fp32 and fp16 would have had it in float32."""
    model = nn.ParameterList(
        nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float64, torch.float32, torch.float16)
    )
    for parameter, value in zip(model, (1e38, 3e37, 6e4), strict=True):
        parameter.grad = torch.full_like(parameter, value)
    right = clipped([p.grad for p in model], 1e-2)
    distclip.Clipper(model, 1e-2).clip_()
    for parameter, expected in zip(model[:2], right[:2], strict=True):
        assert (parameter.grad.double() / expected - 1).abs().max() < 3e-7
    assert model[2].grad.tolist() == [0.0] * 3  # 1e-36, for which fp16 has no number


@BOTH
def test_a_factor_below_float64_is_no_zero(flush):
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    weight.grad = torch.full_like(weight, 1e307)
    report = distclip.Clipper(nn.ParameterList([weight]), 1e-6, norm_type=inf).clip_()
    assert weight.grad.tolist() == [pytest.approx(1e-6, rel=1e-14)] * 2
    assert report.coef > 0


@BOTH
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_fused_optimizers_do_not_divide_by_what_float32_cannot_hold(optimizer, flush):
    for bound in BOUNDS:
        mine, theirs = model_of(torch.float32), model_of(torch.float32)
        for parameter, right in zip(theirs, clipped([p.grad for p in theirs], bound), strict=True):
            parameter.grad = right.float()
        options = {"lr": 1.0 / bound} if optimizer is SGD else {"lr": 0.1, "eps": 1e-30}
        distclip.Clipper(mine, bound).step(optimizer(mine, fused=True, **options))
        optimizer(theirs, fused=True, **options).step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@BOTH
def test_the_coefficient_of_a_finite_norm_is_shown_as_more_than_zero(flush):
    for bound in (*BOUNDS, 1e-30):
        report = distclip.Clipper(model_of(torch.float32), bound).clip_()
        assert 0 < report.coef.item() <= LEAST
        assert report.coef.dtype == torch.float32


def test_the_parts_of_a_coefficient_are_normal_and_their_product_exact():
    for norm in (1.0, 3e38, 7e44, 1e300, 1.7e308):
        for bound in (5e-324, 1e-300, 1e-44, 3e-38, 1e-7, 0.3):
            shown, parts = factors(norm, bound, None, torch.float64)
            assert shown > 0
            assert all(LEAST <= part <= 1 for part in parts)
            exact = torch.tensor([bound / (norm + 1e-6)], dtype=torch.float64)
            if exact > 1e-300:
                assert torch.stack(parts).log2().sum().item() == pytest.approx(exact.log2().item(), rel=1e-14)


def on_shards(flush: bool) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """FSDP2 on two ranks, by a Clipper and by the function."""
    torch.set_flush_denormal(flush)
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    found, coefs = [], []
    for clip in (lambda: distclip.Clipper(model, 1e-3).clip_().coef, lambda: distclip.clip_grad_norm_(model, 1e-3)):
        model(torch.ones(2, 8)).sum().backward()
        for parameter in model.parameters():
            parameter.grad.to_local().fill_(1e38)
        coefs.append(clip())
        found.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    torch.set_flush_denormal(False)
    return *found, *coefs


@FLUSHES
def test_shards_are_clipped_alike_on_all_ranks(flush):
    results = run_ranks(on_shards, 2, flush)
    assert same_bits(results)
    by_clipper, by_function, coef, norm = results[0]
    assert same_tensors(by_clipper, by_function)
    assert by_clipper[0].flatten()[0].item() == pytest.approx(1e-3 / 72**0.5, rel=3e-7)
    assert coef > 0
    assert norm == torch.finfo(torch.float32).max
