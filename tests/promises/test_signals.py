"""Numbers of the user travel with the norm: their mean over ranks, in the one all-reduce, and no wait for it."""

from fractions import Fraction
from functools import partial
from math import inf, isnan
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

import distclip
from support import trained
from support.accelerator import DEVICE, EXISTS, no_waits, raw
from support.own_policy import OwnGate
from support.parallel import mesh_of
from support.ranks import count_collectives, run_ranks, same_bits
from support.roads import ROADS
from support.samples import crossed

GATE = OwnGate()
KINDS = {
    "numbers": lambda number: number,
    "whole numbers": int,
    "numpy": numpy.float32,
    "fractions": Fraction,
    "a loss": lambda number: torch.tensor(number, requires_grad=True) * 1,
    "one element": lambda number: torch.full((1, 1), number),
    "bf16": lambda number: torch.tensor(number, dtype=torch.bfloat16),
    "int64": lambda number: torch.tensor(int(number)),
}
CASES = [
    *((trained.one, 1), (trained.ddp, 2), (trained.fsdp2, 2), (trained.stages, 2), (trained.fsdp1_flat, 2)),
    *((trained.fsdp2, 4), (trained.fsdp2_tp, 4), (trained.fsdp2_tp_sequence, 4), (trained.stages, 4)),
]


def means(layout, road: str) -> list[tuple[dict[str, float], int]]:
    """What is reported of the signals of each kind, and how many all-reduces that took."""
    training, found = layout(), []
    clipper = ROADS[road](training.parts, GATE, **training.options)
    for step, kind in enumerate(KINDS.values()):
        training.backward(step)
        signals = {"loss": kind(float(dist.get_rank())), "tokens": kind(2.0 + step)}
        with count_collectives() as counts:
            report = clipper.clip_(signals=signals)
        found.append((report.to_dict(), counts["allreduce"]))
    return found


@pytest.mark.parametrize(("layout", "size", "road"), crossed(CASES, ROADS))
def test_a_signal_is_the_mean_over_ranks_in_the_all_reduce_of_the_norm(layout, size, road):
    ranks = run_ranks(means, size, layout, road)
    assert same_bits([[report for report, _ in rank] for rank in ranks])
    for step, (report, count) in enumerate(ranks[0]):
        assert (report["loss"], report["tokens"]) == ((size - 1) / 2, 2 + step)
        assert not report["skip"]
        if step in (2, 4, 5, 6) and layout is not trained.fsdp2_tp_sequence:  # copies are compared in calls 1, 2, 4, 8
            assert count == 1


def trained_with_a_gate(state: Any = None) -> tuple[list[bool], list[torch.Tensor], dict[str, Any]]:
    """Steps whose loss is above the bound on one rank alone, by so much that the mean is; and one that is NaN there."""
    training = trained.fsdp2()
    optimizer = torch.optim.SGD(training.parts[0].parameters(), lr=0.1)
    clipper = distclip.Clipper(training.parts, GATE, **training.options)
    if state is not None:
        clipper.load_state_dict(state)
    skips = []
    for loss in (0.5, 9.0, float("nan"), 1.0):
        training.backward(0)
        mine = loss if dist.get_rank() == 1 else 1.0
        skips.append(bool(clipper.step(optimizer, signals={"loss": mine, "tokens": 1}).skip))
        optimizer.zero_grad()
    clipper_state = clipper.state_dict()
    return skips, list(trained.united(training).values()), clipper_state


def test_all_ranks_skip_for_the_loss_of_one_and_resume():
    ranks = run_ranks(trained_with_a_gate, 2)
    assert same_bits(ranks)
    skips, _, state = ranks[0]
    assert skips == [False, True, False, False]
    assert state["policy"]["loss"].item() == 1.0
    assert run_ranks(trained_with_a_gate, 2, state)[0][2]["steps"] == 8


BAD = {
    "none": lambda: None,
    "one is missing": lambda: {"loss": 1.0},
    "one is unknown": lambda: {"loss": 1.0, "tokens": 1, "lr": 0.1},
    "a list": lambda: [1.0, 2.0],
    "a vector": lambda: {"loss": torch.ones(2), "tokens": 1},
    "nothing in it": lambda: {"loss": torch.ones(0), "tokens": 1},
    "complex": lambda: {"loss": torch.ones((), dtype=torch.complex64), "tokens": 1},
    "a text": lambda: {"loss": "1.0", "tokens": 1},
    "beyond float64": lambda: {"loss": 10**400, "tokens": 1},
    "sparse": lambda: {"loss": torch.ones(1).to_sparse(), "tokens": 1},
    "meta": lambda: {"loss": torch.ones((), device="meta"), "tokens": 1},
    "distributed": lambda: {
        "loss": distribute_tensor(torch.ones(()), mesh_of(("dp", dist.get_world_size())), [Replicate()]),
        "tokens": 1,
    },
}


def bad_signals(name: str, where: tuple[int, ...], verb: str) -> tuple[str, bool, bool]:
    """What is said on this rank, whether gradients and state are as before, and whether the next call works."""
    training, good = trained.fsdp2(), {"loss": 1.0, "tokens": 1}
    optimizer = torch.optim.SGD(training.parts[0].parameters(), lr=0.1)
    clipper = distclip.Clipper(training.parts, GATE, **training.options)
    training.backward(0)
    bad = BAD[name]()
    before = [p.grad.to_local().clone() for p in training.parts[0].parameters()]
    call = {"step": partial(clipper.step, optimizer), "clip_": clipper.clip_, "measure": clipper.measure}[verb]
    try:
        call(signals=bad if dist.get_rank() in where else good)
        said = ""
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    same = same_bits([before, [p.grad.to_local() for p in training.parts[0].parameters()]])
    return said, same, clipper.clip_(signals=good).to_dict()["loss"] == 1.0


@pytest.mark.parametrize(("name", "verb"), crossed(BAD, ["step", "clip_", "measure"]))
def test_bad_signals_are_an_error_on_all_ranks_that_touches_nothing(name, verb):
    for said, same, goes_on in run_ranks(bad_signals, 2, name, (0, 1), verb):
        assert said.startswith(
            ("ValueError: signal loss must be a number or a real", "ValueError: the policy asks for")
        )
        assert same
        assert goes_on


@pytest.mark.parametrize("verb", ["step", "clip_", "measure"])
def test_a_rank_whose_signals_alone_are_bad_does_not_leave_the_others_waiting(verb):
    ends = run_ranks(bad_signals, 2, "one is missing", (1,), verb)
    assert ends[1][0].startswith("ValueError: the policy asks for signals={'loss': ..., 'tokens': ...} in every call")
    assert ends[0][0].startswith("LayoutError: the ranks of the clipping group do not agree: one of them stopped")
    assert "the policy asks for signals=" in ends[0][0]
    assert [end[1:] for end in ends] == [(True, True)] * 2


def of_a_mean_of_maxima() -> str:
    try:
        distclip.Clipper(nn.Linear(2, 1), GATE, norm_type=inf)
    except ValueError as error:
        return str(error)
    return ""


def test_means_do_not_travel_with_maxima():
    for said in run_ranks(of_a_mean_of_maxima, 2):
        assert said.startswith("this policy asks for signals, means over ranks, which cannot travel with the maxima")


def test_signals_that_no_policy_asks_for_are_refused():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    clipper = distclip.Clipper(model, 1.0)
    with pytest.raises(ValueError, match="signals= were given, and the policy asks for none"):
        clipper.clip_(signals={"loss": 1.0})
    assert clipper.clip_(signals={}).coef < 1


def attached() -> tuple[str, float]:
    """What attach says, and the weights after a step of the optimizer, which it has left alone."""
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    said = ""
    try:
        distclip.attach(optimizer, model, GATE)
    except ValueError as error:
        said = str(error)
    model.weight.grad = torch.full((1, 2), 10.0)
    optimizer.step()
    return said, model.weight[0, 0].item()


def test_an_optimizer_that_clips_by_itself_is_not_attached_to_for_signals():
    for said, weight in run_ranks(attached, 2):
        assert said.startswith(
            "OwnGate asks for the signals loss, tokens, and nobody passes signals= where optimizer.s"
        )
        assert weight == -10.0


def verified() -> int:
    training = trained.fsdp2()
    clipper = distclip.Clipper(training.parts, GATE, **training.options)
    training.backward(0)
    with count_collectives() as counts:
        clipper.verify()
    return counts["allreduce"]


def test_verify_needs_no_signals():
    assert run_ranks(verified, 2) == [3, 3]


# ---- on an accelerator --------------------------------------------------------------------------------------


def without_waiting() -> list[float]:
    from promises.test_accelerator import fill, layers, on_the_accelerator

    found = []
    with on_the_accelerator():
        model = layers()
        clipper = distclip.Clipper(model, GATE)
        for step, loss in enumerate((torch.tensor(1.5).to(DEVICE), 1.5, torch.tensor(1.5), torch.tensor(3).to(DEVICE))):
            fill(model, step)
            with no_waits() if step == 2 or dist.get_world_size() == 1 else torch.no_grad():
                report = clipper.clip_(signals={"loss": loss, "tokens": step})
            found += [raw(report.extra["loss"]).item(), raw(report.extra["tokens"]).item()]
        found.append(raw(clipper.clip_(signals={"loss": float("nan"), "tokens": 0}).extra["loss"]).item())
    return found


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("size", [1, 2])
def test_signals_on_either_side_cost_no_wait(size):
    for *found, last in run_ranks(without_waiting, size, fresh=True):
        assert found == [1.5, 0, 1.5, 1, 1.5, 2, 3, 3]
        assert isnan(last)
