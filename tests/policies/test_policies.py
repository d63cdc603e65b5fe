"""Policies: the formula of the paper, the first steps, bad norms, and the same decision after any scaling."""

from dataclasses import fields
from math import inf, nan

import numpy as np
import pytest
import torch

from distclip import AutoClip, Clipper, Decision, MaxNorm, Policy, Statistics, Units, ValueClip
from support.roads import clipper_on_device

CPU = torch.device("cpu")


def statistics(norm: float) -> Statistics:
    return Statistics(torch.tensor(norm, dtype=torch.float64), Units())


def decisions(policy: Policy, norms: list[float]) -> list[float]:
    state, bounds = policy.init(Units(), CPU), []
    for norm in norms:
        decision, state = policy.decide(statistics(norm), state)
        bounds.append(decision.max_norm.item())
    return bounds


@pytest.mark.parametrize("policy", [MaxNorm(1.0), ValueClip(0.5), AutoClip()], ids=repr)
def test_the_protocol(policy):
    assert isinstance(policy, Policy)
    assert policy.needs() == ()
    state = policy.init(Units(), CPU)
    kept = {name: value.clone() for name, value in state.items()}
    decision, after = policy.decide(statistics(2.0), state)
    assert isinstance(decision, Decision)
    bound = torch.as_tensor(decision.max_norm, dtype=torch.float64)  # a number where the host knows it
    assert bound.shape == ()
    assert bound > 0
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {n: (v.shape, v.dtype) for n, v in state.items()}
    assert all(torch.equal(kept[name], state[name]) for name in kept), "decide changed its argument"
    with pytest.raises(AttributeError):
        setattr(policy, fields(policy)[0].name, 3.0)
    assert hash(policy) == hash(policy)


@pytest.mark.parametrize("percentile", [0, 10, 33.3, 50, 90, 100])
@pytest.mark.parametrize("window", [1, 2, 7, 1000])
def test_autoclip_is_the_percentile_of_the_window(percentile, window):
    norms = np.random.default_rng(0).lognormal(size=60).tolist()
    expected = [np.percentile(norms[max(0, i + 1 - window) : i + 1], percentile) for i in range(len(norms))]
    assert decisions(AutoClip(percentile, window), norms) == pytest.approx(expected, rel=1e-12)


def test_autoclip_keeps_bad_norms_out():
    good = [1.0, 2.0, 3.0, 4.0, 5.0]
    mixed = [nan, 1.0, inf, 2.0, nan, nan, 3.0, inf, 4.0, 5.0]
    bounds = decisions(AutoClip(50, window=3), mixed)
    assert [b for b, n in zip(bounds, mixed, strict=True) if n in good] == decisions(AutoClip(50, window=3), good)
    assert decisions(AutoClip(), [nan, inf, nan]) == [inf] * 3


def test_autoclip_never_turns_gradients_round_whatever_state_was_loaded():
    policy = AutoClip(50, window=4)
    state = {"norms": torch.tensor([-inf, -2.0, 3.0, inf], dtype=torch.float64), "count": torch.tensor(2**63 - 1)}
    bounds = []
    for _ in range(6):
        decision, state = policy.decide(statistics(1.0), state)
        bounds.append(decision.max_norm.item())
    assert bounds[0] == 2.0  # between 1, just seen, and 3, the only norm of the state
    assert bounds[-1] == 1.0


def test_autoclip_never_clips_the_first_step_nor_a_constant_norm():
    assert decisions(AutoClip(), [3.0]) == [3.0]
    assert decisions(AutoClip(37.7, window=9), [0.1] * 50) == [0.1] * 50


def coefficients(policy: Policy, norms: list[float], state=None) -> list[float]:
    """What a Clipper multiplies gradients of these norms by, one step after the other."""
    weight = torch.nn.Linear(1, 1, bias=False)
    clipper, coefs = Clipper(weight, policy), []
    if state is not None:
        clipper.load_state_dict({"policy": state, "steps": 0, "consecutive_skips": 0})
    for norm in norms:
        weight.weight.grad = before = torch.full((1, 1), norm)
        kept = before.clone()
        coefs.append(clipper.clip_().coef.item())
        assert torch.equal(before, kept) == (coefs[-1] == 1.0 or norm == 0.0)
    return coefs


def test_autoclip_is_not_bound_to_zero_by_steps_without_gradients():
    """Its bound was 0, and with it all gradients, until the window had seen nine times as many others."""
    bounds = decisions(AutoClip(), [0.0, 0.0, 0.0, *[5.0] * 30])
    assert bounds == [inf] * 3 + [5.0] * 30


def test_a_steady_share_of_norms_of_zero_does_not_turn_autoclip_off():
    """One in five is more than its percentile of 10: the bound became 0, which was taken for none, for good."""
    norms = [0.0 if step % 5 == 0 else 1.0 + step % 7 for step in range(200)]
    bounds = decisions(AutoClip(window=50), norms)
    assert bounds == pytest.approx(without_zeros(norms), rel=1e-12)
    assert max(bounds[10:]) < 3
    assert min(coefficients(AutoClip(window=50), norms)) < 0.5


def without_zeros(norms: list[float], window: int = 50) -> list[float]:
    """The bound is that of the norms above 0 so far."""
    above = [[n for n in norms[: i + 1] if n > 0][-window:] for i in range(len(norms))]
    return [float(np.percentile(kept, 10)) if kept else inf for kept in above]


@pytest.mark.parametrize("norm", [1e-30, 1e-6, 1.0, 16.0, 3e38])
@pytest.mark.parametrize("percentile", [0, 10, 100])
def test_autoclip_keeps_the_bits_of_the_first_step_and_of_a_norm_that_stays(norm, percentile):
    """By torch's formula a norm of 1e-6 was halved at its own bound, and norms below 16 were counted as clipped."""
    assert coefficients(AutoClip(percentile), [norm] * 4) == [1.0] * 4


def test_autoclip_at_percentile_100_never_clips():
    norms = np.random.default_rng(2).lognormal(-8, 3, size=60).tolist()
    assert coefficients(AutoClip(100, window=60), norms) == [1.0] * 60


def test_autoclip_scales_a_larger_norm_to_its_bound_exactly():
    norms = [1e-6, 3e-6]
    assert coefficients(AutoClip(0), norms) == [1.0, pytest.approx(1 / 3, rel=1e-7)]


def test_autoclip_goes_on_from_a_state_that_holds_zeros():
    """As those saved when norms of zero were recorded."""
    for zeros in (2, 4):
        norms = torch.full((4,), inf, dtype=torch.float64)
        norms[:zeros] = 0.0
        state = {"norms": norms, "count": torch.tensor(zeros)}
        assert coefficients(AutoClip(50, window=4), [2.0, 2.0, 8.0], state) == [1.0, 1.0, 0.25]


def test_autoclip_takes_a_coefficient_that_no_float64_holds_for_the_least(clipper_of):
    weight = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    clipper = clipper_of(weight, AutoClip(0), norm_type=inf)
    for norm in (1e-30, 1e300):
        weight.weight.grad = torch.full((1, 1), norm, dtype=torch.float64)
        coef = clipper.clip_().coef.item()
    assert 0 < coef < 1e-37
    assert 0 < weight.weight.grad.item() < 1e-7


def test_autoclip_keeps_under_its_limit():
    assert decisions(AutoClip(50, max_norm=2.5), [1.0, 9.0, 9.0]) == [1.0, 2.5, 2.5]


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_autoclip_is_equivariant(factor):
    norms = np.random.default_rng(1).lognormal(size=40).tolist()
    scaled = decisions(AutoClip(window=11), [n * factor for n in norms])
    assert scaled == [b * factor for b in decisions(AutoClip(window=11), norms)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MaxNorm(0), "max_norm must be above 0"),
        (lambda: MaxNorm(nan), "max_norm"),
        (lambda: MaxNorm("1"), None),
        (lambda: ValueClip(-1), "clip_value must be above 0"),
        (lambda: ValueClip((1, -1)), "min <= 0 <= max"),
        (lambda: AutoClip(-1), "percentile must be from 0 to 100"),
        (lambda: AutoClip(nan), "percentile"),
        (lambda: AutoClip(window=0), "window must be a whole number of at least 1"),
        (lambda: AutoClip(window=2.5), "window"),
        (lambda: AutoClip(max_norm=-1), "max_norm"),
    ],
)
def test_bad_settings_are_refused_by_name(make, says):
    if says is None:
        make()
        return
    with pytest.raises(ValueError, match=says):
        make()


class OfTheNorm:
    """Has two methods of the three."""

    def init(self, device):
        return {}

    def decide(self, norm, state):
        return Decision(norm), state


def test_a_policy_without_needs_is_refused_by_what_it_lacks():
    with pytest.raises(ValueError, match=r"policy must be a number or have needs\(\), init\(\) and decide\(\) of"):
        Clipper(torch.nn.Linear(1, 1), OfTheNorm())


class Alternating:
    """A policy of a user's own: any object with the three methods, here one that skips every other step."""

    def needs(self):
        return ()

    def init(self, units, device):
        return {"odd": torch.zeros((), dtype=torch.bool, device=device)}

    def decide(self, statistics, state):
        return Decision(torch.full_like(statistics.norm(), 0.5), skip=state["odd"]), {"odd": ~state["odd"]}


def test_a_policy_of_ones_own_may_skip(clipper_of):
    for optimizer_type, options in ((torch.optim.SGD, {"fused": True}), (torch.optim.RMSprop, {})):
        weight = torch.nn.Linear(2, 1, bias=False)
        optimizer = optimizer_type(weight.parameters(), lr=0.1, **options)
        for nonfinite in ("skip", "propagate"):
            clipper = clipper_of(weight, Alternating(), nonfinite=nonfinite)
            moved = []
            for _ in range(4):
                before = weight.weight.detach().clone()
                weight.weight.grad = torch.ones(1, 2)
                skip = clipper.step(optimizer).skip.item()
                moved.append(not torch.equal(before, weight.weight))
                assert skip != moved[-1]
            assert moved == [True, False, True, False]


class Delayed:
    """Bounds the norm by that of the step before the last; the state hands one tensor on to another."""

    def needs(self):
        return ()

    def init(self, units, device):
        return {name: torch.full((), inf, dtype=torch.float64, device=device) for name in ("last", "before")}

    def decide(self, statistics, state):
        return Decision(state["before"]), {"last": statistics.norm(), "before": state["last"]}


def test_a_state_may_hand_its_tensors_on(clipper_of):
    weight = torch.nn.Linear(1, 1, bias=False)
    clipper = clipper_of(weight, Delayed())
    bounds = []
    for norm in (1.0, 2.0, 3.0, 4.0):
        weight.weight.grad = torch.full((1, 1), norm)
        bounds.append(clipper.clip_().max_norm.item())
    assert bounds == [inf, inf, 1.0, 2.0]


def test_the_state_stays_where_it_was_captured(monkeypatch):
    """A captured CUDA graph reads and writes the same memory at every replay."""
    model = torch.nn.Linear(2, 1)
    clipper, addresses = clipper_on_device(model, AutoClip(window=3)), {}
    for step in range(5):
        monkeypatch.setattr("distclip.step.progress.in_capture", lambda device, step=step: step == 1)
        if step == 1:
            addresses = {name: value.data_ptr() for name, value in clipper.engine.progress.state.items()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        clipper.clip_()
    assert {name: value.data_ptr() for name, value in clipper.engine.progress.state.items()} == addresses
    assert clipper.state_dict()["policy"]["count"].item() == 5
