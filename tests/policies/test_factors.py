"""QuantileTracker, Smooth and Normalize."""

from math import inf, nan
from random import Random

import pytest
import torch

from distclip import Normalize, PerGroup, PerParameter, QuantileTracker, Smooth, ZClip
from policies.streams import run


def test_the_first_norm_starts_the_tracker_and_is_not_clipped():
    assert run(QuantileTracker(), [nan, 0.0, 7.0, 7.0])[0][2] == (7.0, 1.0, False)
    assert run(QuantileTracker(), [nan, 0.0])[1]["bound"] == inf


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_tracker_finds_the_quantile(quantile):
    random = Random(1)
    norms = [random.lognormvariate(0, 1) for _ in range(6000)]
    answers, _ = run(QuantileTracker(quantile, eta=0.05), norms)
    below = sum(norm <= bound for (bound, _, _), norm in zip(answers, norms, strict=True))
    assert below / len(norms) == pytest.approx(quantile, abs=0.02)


def test_extreme_norms_have_coefficients_that_are_numbers():
    for policy in (
        Smooth(1e308),
        Smooth(1e-308),
        Normalize(1e308),
        Normalize(1e-308),
        QuantileTracker(),
        ZClip(max_norm=inf),
    ):
        norms = [5e-324, 1e308, 1e-300, 1.0, 1e300] * 20
        answers, state = run(policy, norms)
        assert all(0 < coef < inf for _, coef, _ in answers), policy
        assert not any(value.isnan().any() for value in state.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Normalize(3.0),
        lambda: PerParameter(Normalize(3.0)),
        lambda: PerGroup({"all": ("*", Normalize(3.0))}),
    ],
)
def test_normalize_scales_up_and_leaves_zeros(make, clipper_of):
    model = torch.nn.Linear(2, 1, bias=False)
    clipper = clipper_of(model, make())
    for gradient, norm in ((0.001, 3.0), (1000.0, 3.0), (0.0, 0.0)):
        model.weight.grad = torch.full((1, 2), gradient)
        report = clipper.clip_()
        assert model.weight.grad.norm().item() == pytest.approx(norm, rel=1e-6)
    assert report.coef == 1
