"""Bounds that change with the step."""

from math import nan

import pytest
import torch

from distclip import Cosine, MaxNorm, PerParameter, Units, Warmup
from distclip.policies.adopt import spelled
from distclip.policies.trust import is_trusted
from policies.streams import CPU, of_units, units_of


def test_a_schedule_counts_the_steps_of_the_model_whatever_the_level():
    policy = PerParameter(MaxNorm(Warmup(1.0, 2.0, 10)))
    state = policy.init(units_of(3), CPU)
    for norms in ((1.0, 2.0, 3.0), (nan, 1.0, 1.0), (0.0, 0.0, 0.0)):
        _, state = policy.decide(of_units(norms), state)
    assert state["step"].shape == ()
    assert state["step"] == 2


def test_a_bound_that_is_a_number_has_no_state():
    assert MaxNorm(1.0).init(Units(), CPU) == {}
    assert is_trusted(MaxNorm(1.0))


def test_schedules_are_spelled_with_their_numbers():
    """So that ranks which were given different ones say so."""
    assert spelled(MaxNorm(Warmup(1.0, 2.0, 10))) == "MaxNorm(max_norm=Warmup(start=1.0, end=2.0, steps=10))"
    assert spelled(MaxNorm(lambda step: 1.0)) == "MaxNorm(max_norm=function)"


def test_schedules_end_exactly():
    for kind in (Warmup, Cosine):
        bounds = [kind(0.3, 0.7, 9)(torch.tensor(step)).item() for step in (0, 9, 10, 2**62)]
        assert bounds == [0.3, 0.7, 0.7, 0.7]
    assert Cosine(3.0, 1.0, 4)(2).item() == pytest.approx(2.0)


def test_a_schedule_that_says_no_bound_is_refused_before_anything_changes(clipper_of):
    model = torch.nn.Linear(2, 1, bias=False)
    clipper = clipper_of(model, MaxNorm(lambda step: 1.0 - step))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clipper.clip_().max_norm == 1
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    calls = [clipper.clip_] * (2 if clipper.engine.progress.on_device else 1)  # there the next call says it
    with pytest.raises(ValueError, match=r"MaxNorm\.decide returned .*max_norm.*return a number above 0"):
        any(call() is None for call in calls)
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
