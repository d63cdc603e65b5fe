"""Clipper.history and register_report_hook: what all steps have been, and who is told of each."""

from math import inf, nan

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st
from torch import nn

import distclip
from distclip import Clipper, History, LayoutError
from distclip.step.history import KEPT
from support.layouts import backward, fsdp2
from support.ranks import run_ranks

NORMS = [1.0, 0.5, nan, 4.0, inf, nan, 3.0, 0.0]


def stepped(clipper: Clipper, weight: nn.Module, norms: list[float]) -> Clipper:
    for norm in norms:
        weight.weight.grad = torch.full((1, 1), norm)
        clipper.clip_()
    return clipper


def weight() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


@pytest.mark.parametrize("rounds", [1, 2 * KEPT // len(NORMS) + 3])
def test_it_counts_what_was_decided(clipper_of, rounds):
    model = weight()
    history = stepped(clipper_of(model, 2.0), model, NORMS * rounds).history
    counts = (history.steps, history.clipped, history.skipped, history.nonfinite)
    assert counts == (8 * rounds, 2 * rounds, 3 * rounds, 3 * rounds)
    assert (history.longest_skips, history.current_skips, history.largest, history.largest_step) == (2, 0, 4.0, 4)
    assert history.quantile(0) == 0
    assert history.quantile(1) == pytest.approx(4.0, rel=0.01)
    assert history.to_dict()["fraction_clipped"] == 0.25


def test_a_run_of_skips_crosses_what_is_read_together(clipper_of):
    model = weight()
    clipper = stepped(clipper_of(model, 1.0), model, [1.0] * (KEPT - 3) + [nan] * 7)
    assert (clipper.history.longest_skips, clipper.history.current_skips) == (7, 7)
    assert stepped(clipper, model, [nan, 1.0]).history.longest_skips == 8


def test_propagated_steps_are_not_skipped(clipper_of):
    model = weight()
    history = stepped(clipper_of(model, 1.0, nonfinite="propagate"), model, [nan, 1.0]).history
    assert (history.nonfinite, history.skipped) == (1, 0)


def test_it_is_a_copy_and_reading_it_changes_nothing(clipper_of):
    model = weight()
    clipper = stepped(clipper_of(model, 1.0), model, [3.0])
    clipper.history.add(1e9, 1.0, True)
    assert clipper.history == stepped(clipper_of(model, 1.0), model, [3.0]).history
    with pytest.raises(AttributeError, match="read-only"):
        clipper.history = History()


@given(st.lists(st.floats(1e-20, 1e20), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_within_one_percent_of_a_norm_that_was_seen(norms, q):
    history = History()
    for norm in norms:
        history.add(norm, 1.0, False)
    exact = np.quantile(norms, q, method="lower")
    assert history.quantile(q) == pytest.approx(exact, rel=0.0100001)


def test_norms_out_of_reach_count_at_the_ends():
    history = History()
    for norm in (0.0, 1e-45, 1e38):
        history.add(norm, 1.0, False)
    assert [history.quantile(q) for q in (0, 0.5, 1)] == [
        0.0,
        pytest.approx(1e-20, rel=0.02),
        pytest.approx(1e20, rel=0.02),
    ]
    assert np.isnan(History().quantile(0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        history.quantile(1.5)


def test_it_goes_on_after_a_checkpoint(clipper_of, tmp_path):
    model = weight()
    first = stepped(clipper_of(model, 2.0), model, NORMS[:5])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = clipper_of(model, 2.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.history == first.history
    assert stepped(second, model, NORMS[5:]).history == stepped(clipper_of(model, 2.0), model, NORMS).history


def test_a_state_of_an_older_version_has_none():
    model = weight()
    state = stepped(Clipper(model, 2.0), model, [1.0]).state_dict()
    del state["history"]
    clipper = Clipper(model, 2.0)
    clipper.load_state_dict(state)
    assert (clipper.steps, clipper.history) == (1, History())


def test_a_hook_sees_every_step_until_it_is_removed(clipper_of):
    model, seen = weight(), []
    clipper = clipper_of(model, 2.0)
    handle = clipper.register_report_hook(lambda report, step: seen.append((step, report.norm.item())))
    stepped(clipper, model, [1.0, 3.0])
    clipper.measure()
    handle.remove()
    stepped(clipper, model, [5.0])
    assert seen == [(1, 1.0), (2, 3.0)]


def test_an_attached_optimizer_tells_hooks_too():
    model, seen = weight(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    clipper = distclip.attach(optimizer, model, 2.0)
    clipper.register_report_hook(lambda report, step: seen.append(step))
    for _ in range(3):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert seen == [1, 2, 3]
    assert clipper.history.steps == 3


def ranks_count() -> tuple[History, list[int]]:
    model, told = fsdp2(), []
    clipper = Clipper(model, 1.0)
    clipper.register_report_hook(lambda report, step: told.append(step))
    for step in range(3):
        backward(model, step)
        clipper.clip_()
        model.zero_grad()
    return clipper.history, told


def test_all_ranks_count_the_same():
    (first, told), (second, as_well) = run_ranks(ranks_count, 2)
    assert first == second
    assert told == as_well == [1, 2, 3]
    assert first.steps == 3
    assert first.largest > 0


def hook_that_fails() -> list[str]:
    model, met = weight(), []
    clipper = Clipper(model, 1.0)
    handle = clipper.register_report_hook(lambda report, step: 1 / dist.get_rank())
    model.weight.grad = torch.ones(1, 1)
    for _ in range(2):
        try:
            clipper.clip_()
            met.append("")
        except (ZeroDivisionError, LayoutError) as error:
            met.append(str(error))
        handle.remove()
    return met


def test_a_hook_that_fails_on_one_rank_stops_the_others():
    failed, other = run_ranks(hook_that_fails, 2)
    assert "division by zero" in failed[0]
    assert other[0] == ""
    assert "rank 0" in failed[1]
    assert "rank 0" in other[1]
