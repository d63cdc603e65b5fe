"""Bits of copies are compared in every step: one that is flipped is seen in that step, on every rank, and named."""

import re
import warnings
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from fuzz import drift as fuzz
from support.layouts import backward, ddp
from support.ranks import count_collectives, run_ranks, same_bits
from support.roads import ROADS

HOST, DEVICE = ROADS


def told(call: Any) -> tuple[str, list[str]]:
    """What a call raises, and what it warns of."""
    said = "done"
    with warnings.catch_warnings(record=True, action="always") as warned:
        try:
            call()
        except distclip.LayoutError as error:
            said = str(error)
    return said, [str(each.message) for each in warned]


def flipped_in_step_2(road: str, bit: int, options: dict[str, Any]) -> dict[str, Any]:
    """Five steps under DDP; in the third a bit of one element flips on rank 1."""
    model = ddp()
    clipper = ROADS[road](model, 1e-3, **options)
    came, untouched, collectives = [], [], []
    for step in range(5):
        model.zero_grad()
        backward(model, step)
        if step == 2 and dist.get_rank() == 1:
            fuzz.flip(model.module.head.weight.grad, 3, bit)
        before = [p.grad.clone() for p in model.parameters()]
        with count_collectives() as counts:
            came.append(told(clipper.clip_))
        collectives.append(counts.total())
        untouched.append(same_bits([before, [p.grad for p in model.parameters()]]))
    return {"came": came, "untouched": untouched, "collectives": collectives}


@pytest.mark.parametrize("bit", [0, 31])
@pytest.mark.parametrize("road", ROADS)
def test_raise_stops_every_rank_in_that_step_before_a_gradient_changes(road, bit):
    for result in run_ranks(flipped_in_step_2, 3, road, bit, {"on_drift": "raise"}):
        said, warned = result["came"][2]
        assert re.match(
            "copies of gradients have drifted apart in step 2: head.weight on rank 1 of ranks 0, 1, 2, ", said
        )
        assert warned == []
        assert result["untouched"] == [False, False, True, False, False]
        assert [said for said, _ in result["came"]].count("done") == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_type": 1.0}, {"norm_type": inf, "on_drift": "warn"}, {"exact": True}, {"watch": "parameters"}],
)
def test_warn_tells_every_rank_once_and_takes_the_step_in_every_kind_of_norm(options):
    for result in run_ranks(flipped_in_step_2, 2, HOST, 0, options):
        assert [said for said, _ in result["came"]] == ["done"] * 5
        assert result["untouched"] == [False] * 5
        assert [len(texts) for _, texts in result["came"]] == [0, 0, 1, 0, 0]
        assert "head.weight on ranks 0, 1, of norm " in result["came"][2][1][0]


def test_ignore_compares_no_bits_and_nothing_more_is_communicated_with_them():
    with_bits, without = (run_ranks(flipped_in_step_2, 2, HOST, 0, {"on_drift": how})[0] for how in ("warn", "ignore"))
    assert without["came"] == [("done", [])] * 5
    assert without["collectives"] == [2, 2, 1, 2, 1]
    assert with_bits["collectives"] == [2, 2, 1 + 4, 2, 1]  # was it the code, which parameter, which ranks, its name


def flips(layout: str, size: int, times: int) -> set[str]:
    found = run_ranks(fuzz.flipped, size, fuzz.LAYOUTS[layout], times, 3)
    assert all(same_bits([ends, found[0]]) for ends in found)
    return set(found[0])


@pytest.mark.parametrize(
    ("layout", "size"), [("data_parallel", 2), ("hsdp", 4), ("fsdp2_tp", 4), ("stages_of_ddp", 4), ("ep_plain", 4)]
)
def test_any_flip_in_any_copy_is_caught_in_its_step(layout, size):
    assert flips(layout, size, 12) <= {"named", "skipped"}


@pytest.mark.parametrize("layout", ["tp", "tp_sequence", "pp_1f1b_tied", "fsdp1_no_shard"])
def test_honest_steps_raise_no_alarm(layout):
    for calls, alarms in run_ranks(fuzz.honest, 2, fuzz.LAYOUTS[layout], 4, 0):
        assert calls >= 16
        assert alarms == []


# ---- copies that are computed on each rank for itself ---------------------------------------------------------


def computed_apart(first: float, later: float, zero_at_first: bool, on_drift: str) -> list[Any]:
    """What calls come to where rank 1 has ``first`` times the gradient of rank 0, and from the third on ``later``."""
    model = nn.ParameterDict({"norm": torch.ones(64), "other": torch.ones(64)})
    clipper = distclip.Clipper(model, inf, on_drift=on_drift)
    came = []
    for step in range(6):
        for name, p in model.items():
            p.grad = torch.linspace(1, 2, 64) * (step + 1)
            if name == "norm":
                p.grad *= 0.0 if zero_at_first and step == 0 else 1.0
                p.grad *= (first if step < 2 else later) if dist.get_rank() else 1.0
        came.append(told(clipper.clip_))
    return came


ROUNDED = 1 + 3e-7


@pytest.mark.parametrize("zero_at_first", [False, True])
@pytest.mark.parametrize("on_drift", ["warn", "raise"])
def test_copies_that_were_never_alike_are_compared_by_amount(on_drift, zero_at_first):
    assert run_ranks(computed_apart, 2, ROUNDED, ROUNDED, zero_at_first, on_drift) == [[("done", [])] * 6] * 2


def test_an_amount_that_is_no_rounding_is_an_error_in_that_step():
    for came in run_ranks(computed_apart, 2, ROUNDED, 1.5, False, "warn"):
        assert came[:2] == [("done", [])] * 2
        assert [said.partition(": ")[2][:6] for said, _ in came[2:]] == ["norm; "] * 4


def test_one_fault_that_stays_warns_once():
    for came in run_ranks(computed_apart, 2, 1.0, ROUNDED, False, "warn"):
        assert [len(warned) for _, warned in came] == [0, 0, 1, 0, 0, 0]
        assert [said for said, _ in came] == ["done"] * 6


# ---- what is refused, and who takes part ----------------------------------------------------------------------


def built(on_drift: Any) -> str:
    try:
        distclip.Clipper(nn.Linear(2, 2), 1.0, on_drift=on_drift[dist.get_rank()])
    except ValueError as error:
        return str(error)
    return "built"


def test_ranks_say_the_same_and_what_there_is():
    for said in run_ranks(built, 2, ["warn", "raise"]):
        assert said.startswith("on_drift must be the same on every rank")
    for said in run_ranks(built, 2, ["loud", "loud"]):
        assert "on_drift must be one of raise, warn, ignore, got 'loud'" in said


def experts_of_one_name() -> list[Any]:
    """Ranks hold experts under one name that the layout calls replicated twice, and nobody says on which ranks."""
    model = nn.ParameterDict({"expert": torch.ones(4)})
    clipper = distclip.Clipper(model, inf, layout=lambda name, p: distclip.Layout(2))
    model["expert"].grad = torch.ones(4) * (1 + dist.get_rank() % 2)
    return [clipper.engine.plan.copies is None, told(clipper.clip_)]


def test_where_nobody_knows_which_ranks_hold_copies_no_bits_are_compared():
    assert run_ranks(experts_of_one_name, 4) == [[True, ("done", [])]] * 4
