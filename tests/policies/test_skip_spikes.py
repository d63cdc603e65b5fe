"""SkipSpikes: signals, patience, and what is wrong in the optimizers of OLMo-core."""

from collections.abc import Sequence
from math import inf, nan
from random import Random

import pytest
import torch

from distclip import Chain, Clipper, MaxNorm, Policy, SkipSpikes, Units
from policies import reference
from policies.reference import Row
from policies.streams import CPU, norms_of, run, statistics


def with_signals(policy: Policy, rows: Sequence[Row], names: Sequence[str]) -> list[bool]:
    state, skips = policy.init(Units(), CPU), []
    for norm, *numbers in rows:
        decision, state = policy.decide(statistics(norm, dict(zip(names, numbers, strict=True))), state)
        skips.append(bool(decision.skip))
    return skips


def losses() -> list[list[float]]:
    """Norm, loss and another signal, some below 0; the loss spikes at 60, is NaN at 70, and takes a new level at 90."""
    random = Random(3)
    rows = [[norm, random.gauss(0, 0.1), random.gauss(-5, 1)] for norm in norms_of(seed=100, steps=200, shift=500)]
    rows[60][1], rows[70][1], rows[75][0], rows[80][0] = 30.0, nan, nan, 9.0
    rows[20][2] = 1e6
    for row in rows[90:]:
        row[1] += 10.0
    return rows


@pytest.mark.parametrize("on", [("norm", "loss", "other"), ("loss", "other")])
def test_skip_spikes_looks_at_signals(on):
    policy = SkipSpikes(window=32, patience=8, on=on)
    assert [each.name for each in policy.needs()] == ["loss", "other"]
    rows = losses()
    wanted = reference.skip_spikes(rows, window=32, patience=8, signals_only="norm" not in on)
    skips = with_signals(policy, rows, ("loss", "other"))
    assert skips == [skip for _, _, skip in wanted]
    assert [skips[60], skips[70], skips[75], skips[80]] == [True, True, False, "norm" in on]
    assert skips[90:95] == [True] * 5
    assert sum(skips[95:]) <= 4


def test_skip_spikes_does_not_skip_healthy_steps_after_one_of_nan():
    """OLMo-core skipped the next 128."""
    norms = norms_of(seed=100, steps=300, shift=500)
    norms[100] = nan
    assert not any(skip for _, _, skip in run(SkipSpikes(), norms)[0])


def test_skip_spikes_takes_a_level_for_normal_after_its_patience():
    norms = norms_of(seed=100, steps=400, shift=200, level=1000.0)
    skips = [skip for _, _, skip in run(SkipSpikes(), norms)[0]]
    assert skips[200:216] == [True] * 16
    assert sum(skips[216:]) <= 1


def test_skip_spikes_goes_by_olmos_numbers_where_there_are_no_spikes():
    random = Random(5)
    norms = [random.uniform(0.8, 1.2) for _ in range(150)]
    _, state = run(SkipSpikes(sigma=4.0), norms)
    std, mean = torch.std_mean(torch.tensor(norms[-128:], dtype=torch.float64))
    limit = (mean + 4.0 * std).item()
    for factor, wanted in ((1 - 1e-9, False), (1 + 1e-9, True)):
        assert run(SkipSpikes(sigma=4.0), [limit * factor], state)[0][0][2] is wanted


def test_skip_spikes_does_not_take_rounding_for_a_spike():
    """OLMo-core divides by a deviation of 0, and skips every step for good."""
    norms = [0.1 * (1 + 1e-15 * (step % 2)) for step in range(200)]
    assert not any(skip for _, _, skip in run(SkipSpikes(), norms)[0])


def test_a_skipped_step_leaves_gradients_and_parameters_alone():
    """OLMo-core multiplied the update by 0, and made NaN of inf."""
    model = torch.nn.Linear(2, 1, bias=False)
    clipper = Clipper(model, Chain(SkipSpikes(window=8, patience=8, on=("norm", "loss")), MaxNorm(1.0)))
    optimizer, skips = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), []
    for loss in (1.0, 1.1, 0.9, 1.0, inf, 50.0, 1.0):
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[3.0, 4.0]]) * (2.0 - loss if loss < 2 else 1.0)
        report = clipper.step(optimizer, signals={"loss": loss})
        skips.append(report.skip.item())
        assert torch.equal(model.weight, before) == skips[-1]
    assert skips == [False] * 4 + [True, True, False]
