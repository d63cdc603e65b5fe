"""Policies: the formula of the paper, the first steps, bad norms, and the same decision after any scaling."""

from dataclasses import fields
from math import inf, nan

import numpy as np
import pytest
import torch

from distclip import AutoClip, Clipper, Decision, MaxNorm, Policy, ValueClip

CPU = torch.device("cpu")


def decisions(policy: Policy, norms: list[float]) -> list[float]:
    state, bounds = policy.init(CPU), []
    for norm in norms:
        decision, state = policy.decide(torch.tensor(norm, dtype=torch.float64), state)
        bounds.append(decision.max_norm.item())
    return bounds


@pytest.mark.parametrize("policy", [MaxNorm(1.0), ValueClip(0.5), AutoClip()], ids=repr)
def test_the_protocol(policy):
    assert isinstance(policy, Policy)
    state = policy.init(CPU)
    kept = {name: value.clone() for name, value in state.items()}
    norm = torch.tensor(2.0, dtype=torch.float64)
    decision, after = policy.decide(norm, state)
    assert isinstance(decision, Decision)
    assert decision.max_norm.shape == ()
    assert decision.max_norm.dtype == torch.float64
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
        decision, state = policy.decide(torch.tensor(1.0, dtype=torch.float64), state)
        bounds.append(decision.max_norm.item())
    assert bounds[0] == 2.0  # between 1, just seen, and 3, the only norm of the state
    assert bounds[-1] == 1.0


def test_autoclip_never_clips_the_first_step_nor_a_constant_norm():
    assert decisions(AutoClip(), [3.0]) == [3.0]
    assert decisions(AutoClip(37.7, window=9), [0.1] * 50) == [0.1] * 50


def test_autoclip_is_not_bound_to_zero_by_steps_without_gradients():
    """Its bound was 0, and with it all gradients, until the window had seen nine times as many others."""
    bounds = decisions(AutoClip(), [0.0, 0.0, 0.0, *[5.0] * 30])
    assert min(bounds) > 0
    assert bounds[3] == inf
    assert bounds[-1] == 5.0


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


class Alternating:
    """A policy of a user's own: any object with the two methods, here one that skips every other step."""

    def init(self, device):
        return {"odd": torch.zeros((), dtype=torch.bool, device=device)}

    def decide(self, norm, state):
        return Decision(torch.full_like(norm, 0.5), skip=state["odd"]), {"odd": ~state["odd"]}


@pytest.mark.parametrize("late", [False, True])
def test_a_policy_of_ones_own_may_skip(monkeypatch, late):
    if late:
        monkeypatch.setattr("distclip.clipper.reads_are_free", lambda device: False)
    for optimizer_type, options in ((torch.optim.SGD, {"fused": True}), (torch.optim.RMSprop, {})):
        weight = torch.nn.Linear(2, 1, bias=False)
        optimizer = optimizer_type(weight.parameters(), lr=0.1, **options)
        for nonfinite in ("skip", "propagate"):
            clipper = Clipper(weight, Alternating(), nonfinite=nonfinite)
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

    def init(self, device):
        return {name: torch.full((), inf, dtype=torch.float64, device=device) for name in ("last", "before")}

    def decide(self, norm, state):
        return Decision(state["before"]), {"last": norm, "before": state["last"]}


@pytest.mark.parametrize("late", [False, True])
def test_a_state_may_hand_its_tensors_on(monkeypatch, late):
    if late:
        monkeypatch.setattr("distclip.clipper.reads_are_free", lambda device: False)
    weight = torch.nn.Linear(1, 1, bias=False)
    clipper = Clipper(weight, Delayed())
    bounds = []
    for norm in (1.0, 2.0, 3.0, 4.0):
        weight.weight.grad = torch.full((1, 1), norm)
        bounds.append(clipper.clip_().max_norm.item())
    assert bounds == [inf, inf, 1.0, 2.0]


@pytest.mark.parametrize("late", [False, True])
def test_the_state_stays_where_it_is(monkeypatch, late):
    """A captured CUDA graph reads and writes the same memory at every replay."""
    if late:
        monkeypatch.setattr("distclip.clipper.reads_are_free", lambda device: False)
    model = torch.nn.Linear(2, 1)
    clipper = Clipper(model, AutoClip(window=3))
    addresses = {name: value.data_ptr() for name, value in clipper._state.items()}
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        clipper.clip_()
    assert {name: value.data_ptr() for name, value in clipper._state.items()} == addresses
    assert clipper.state_dict()["policy"]["count"].item() == 5
