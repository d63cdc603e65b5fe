"""Coefficients above 1, of policies that scale up: by every route to gradients, and beyond what float32 holds."""

from collections.abc import Callable
from math import inf

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW

import distclip
from distclip.policies.coefficient import LEAST, MOST, factors
from support.roads import clipper_on_device

TARGETS = (1.5, 1e6, 1e30)


class Up:
    """Scales what it clips as a whole to a norm, as one number or as one for each unit."""

    def __init__(self, target: float):
        self.target = target

    def needs(self):
        return ()

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        return distclip.Decision(inf, coef=self.target / statistics.norm()), state


def model_of(dtype: torch.dtype = torch.float32, size: float = 1.0) -> nn.ParameterList:
    seed = torch.Generator().manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((5, 3), (7,)))
    for parameter in model:
        gradient = torch.randn(parameter.shape, generator=seed, dtype=torch.float64)
        parameter.grad = (gradient / gradient.norm() * size).to(dtype)
    return model


def norm_of(model: nn.ParameterList) -> float:
    return torch.cat([p.grad.double().flatten() for p in model]).norm().item()


def by_scaler(model: nn.ParameterList, policy: distclip.Policy) -> distclip.Report:
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for parameter in model:
        parameter.grad.mul_(4)
    return distclip.Clipper(model, policy).step(SGD(model, lr=0.0), scaler=scaler)


ROADS: dict[str, Callable[[nn.ParameterList, distclip.Policy], distclip.Report]] = {
    "host": lambda model, policy: distclip.Clipper(model, policy).clip_(),
    "device": lambda model, policy: clipper_on_device(model, policy).clip_(),
    "step": lambda model, policy: distclip.Clipper(model, policy).step(SGD(model, lr=0.0)),
    "folded": lambda model, policy: distclip.Clipper(model, policy).step(SGD(model, lr=0.0, fused=True)),
    "folded on the device": lambda model, policy: clipper_on_device(model, policy).step(AdamW(model, fused=True)),
    "scaler": by_scaler,
}
EACH_ROAD = pytest.mark.parametrize("road", ROADS)


@EACH_ROAD
@pytest.mark.parametrize("target", TARGETS)
def test_the_model_is_scaled_up_to_its_norm(road, target):
    model = model_of()
    report = ROADS[road](model, Up(target))
    assert norm_of(model) == pytest.approx(target, rel=3e-7)
    assert report.coef.item() == pytest.approx(target / 2**0.5, rel=3e-7)


@EACH_ROAD
@pytest.mark.parametrize("target", TARGETS)
def test_each_parameter_is_scaled_up_to_its_norm(road, target):
    model = model_of()
    report = ROADS[road](model, distclip.PerParameter(Up(target)))
    assert [norm_of([p]) for p in model] == [pytest.approx(target, rel=5e-7)] * 2
    assert report.coef.item() == pytest.approx(target, rel=3e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_other_dtypes_are_too(dtype):
    for policy in (Up(100.0), distclip.PerParameter(Up(100.0))):
        model = model_of(dtype)
        distclip.Clipper(model, policy).clip_()
        total = 100.0 if isinstance(policy, Up) else 100.0 * 2**0.5
        assert norm_of(model) == pytest.approx(total, rel=1e-14 if dtype == torch.float64 else 5e-3)


@pytest.mark.parametrize("road", ["host", "step", "folded"])
@pytest.mark.parametrize("units", [Up, lambda target: distclip.PerParameter(Up(target))], ids=["model", "parameters"])
def test_a_factor_beyond_float32_makes_no_infinities(road, units):
    """1e37 / 1e-38 and its inverse are numbers of float64 alone."""
    model = model_of(size=1e-38)
    report = ROADS[road](model, units(1e37))
    assert 0.99e37 < norm_of(model) < 1.5e37
    assert report.coef == torch.finfo(torch.float32).max


@pytest.mark.parametrize("road", ["device", "folded on the device"])
@pytest.mark.parametrize("units", [Up, lambda target: distclip.PerParameter(Up(target))], ids=["model", "parameters"])
def test_where_the_host_does_not_know_it_the_largest_factor_is_the_inverse_of_the_least(road, units):
    model = model_of(size=1e-38)
    ROADS[road](model, units(1e37))
    assert norm_of(model) == pytest.approx(2**0.5 * 1e-38 * MOST, rel=1e-2)


def test_the_parts_of_a_large_coefficient_are_in_range_and_their_product_exact():
    for coef in (1.0000001, 1e37, 1e38, 1e39, 1e77, 1e300, 1.7e308):
        shown, parts = factors(1.0, inf, coef, torch.float32)
        assert 0 < shown < inf
        assert all(LEAST <= part <= MOST for part in parts)
        assert torch.stack(parts).double().log2().sum().item() == pytest.approx(
            torch.tensor(coef, dtype=torch.float64).log2().item(), rel=1e-7, abs=1e-7
        )
