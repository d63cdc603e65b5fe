"""Copies of gradients that came apart: every rank hears it in the next call of a Clipper, at no cost in between."""

import gc
import re
import warnings
from functools import partial
from math import inf
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW

import distclip
from distclip.piece import local_tensor
from layouts import backward, build, ddp, fsdp2
from ranks import count_collectives, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:copies of gradients differ:RuntimeWarning")
HOST, DEVICE = "host", "device"  # where decisions are read: at once, or, as on accelerators, one call later


def changed(layout: Any, by: float, road: str, norm_type: float = 2.0, fused: bool = True) -> dict[str, Any]:
    """Five steps; before the second, one element on the last rank is multiplied. What each call came to."""
    model = layout()
    make = partial(AdamW, fused=True) if fused else SGD
    optimizer = make(model.parameters(), lr=0.1)
    called, collectives = [], []
    with patch("distclip.clipper.reads_are_free", lambda device: road == HOST):
        clipper = distclip.Clipper(model, 0.1, norm_type=norm_type)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, step)
            if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                gradient = local_tensor(next(model.parameters()).grad).view(-1)
                gradient[gradient.abs().argmax()] *= by
            with count_collectives() as counts:
                try:
                    clipper.step(optimizer)
                    called.append("stepped")
                except distclip.LayoutError as error:
                    called.append(str(error))
            collectives.append(counts.total())
    return {"called": called, "collectives": collectives}


@pytest.mark.parametrize(("by", "norm_type"), [(1e3, 2.0), (1e3, inf), (1e3, 1.0), (1.5, 2.0), (0.5, 1.0)])
def test_all_ranks_raise_in_the_next_call_and_name_who_differs(by, norm_type):
    results = run_ranks(changed, 3, ddp, by, HOST, norm_type)
    for result in results:
        called = result["called"]
        assert called[:2] + called[3:] == ["stepped"] * 4  # the call after the error is free again
        rank_2 = "step 2, " if norm_type == inf else "stopped: copies of gradients differ"  # its own is the largest
        assert re.search(rf"; rank 2: {rank_2}.*; rank 0: stopped: copies of gradients differ .* step 1", called[2])
        assert result["collectives"][:2] == [1, 1]


@pytest.mark.parametrize("fused", [True, False])
def test_on_accelerators_too_without_a_wait(fused):
    results = run_ranks(changed, 2, ddp, 1e3, DEVICE, 2.0, fused)
    for result in results:
        assert result["called"][:2] == ["stepped"] * 2
        assert "copies of gradients differ between ranks since step 1" in result["called"][2]
        assert result["collectives"][:2] == [1, 1]


def test_what_the_accuracy_of_a_norm_may_hide_is_no_error():
    for road in (HOST, DEVICE):
        assert [r["called"] for r in run_ranks(changed, 2, ddp, 1 + 1e-7, road)] == [["stepped"] * 5] * 2


def by_function(others: int) -> list[str]:
    """The same of the function, which is called for ``others`` other models in between."""
    gc.collect()  # modules of other tests that go meanwhile would take plans with them
    model = ddp()
    called = []
    for step in range(3):
        backward(model, step)
        if step == 1 and dist.get_rank() == 1:
            next(model.parameters()).grad.mul_(2)
        for other in [build() for _ in range(others)]:
            backward(other, step)
            distclip.clip_grad_norm_(other.parameters(), 1.0)
        try:
            distclip.clip_grad_norm_(model.parameters(), 1.0, group=dist.group.WORLD)
            called.append("clipped")
        except distclip.LayoutError as error:
            called.append(str(error))
    return called


@pytest.mark.parametrize("others", [0, 3])
def test_a_function_hears_of_it_in_its_next_call(others):
    for first, second, third in run_ranks(by_function, 3, others):
        assert [first, second] == ["clipped"] * 2
        assert "copies of gradients differ between ranks since the call before" in third
        assert "; rank 1: stopped: copies" in third


def test_shards_differ_as_they_must():
    assert [r["called"] for r in run_ranks(changed, 2, fsdp2, 1.0, HOST)] == [["stepped"] * 5] * 2


def experts_that_nobody_declared() -> str:
    """Each rank trains another expert, and no layout says so: their parameters start alike, their gradients do not."""
    model = build()
    clipper = distclip.Clipper(model, 1.0)
    try:
        for step in range(2):
            model.zero_grad()
            backward(model, step * dist.get_world_size() + dist.get_rank())
            clipper.clip_()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_ranks_that_hold_different_parameters_undeclared_do_not_go_on():
    for said in run_ranks(experts_that_nobody_declared, 2):
        assert "copies of gradients differ" in said
        assert "layout=..." in said


def experts_on_one_rank_alone() -> list[float]:
    """All hold the net; rank 1 holds an expert beside it, and rank 0, which does not, must not miss its part."""
    model = build()
    if dist.get_rank() == 1:
        model.expert = nn.Linear(3, 3)
    clipper = distclip.Clipper(model, 1.0, layout=lambda name, _: distclip.Layout(1) if "expert" in name else None)
    norms = []
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        if dist.get_rank() == 1:
            model.expert(torch.ones(3)).sum().backward()
        norms.append(clipper.clip_().norm.item())
    return norms


def test_a_rank_that_holds_copies_alone_beside_one_that_holds_more_is_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first, second), other = run_ranks(experts_on_one_rank_alone, 2)
    assert (first, second) == tuple(other)
    assert min(first, second) > 3  # the expert's part is in it


def looked_at_and_loaded(how: str) -> str:
    model = ddp()
    clipper = distclip.Clipper(model, 1.0)
    state = clipper.state_dict()
    backward(model)
    if dist.get_rank() == 0:
        next(model.parameters()).grad.mul_(2)
    if how == "measured":
        clipper.measure()  # looks at gradients that may not be reduced yet, and leaves nothing behind
    else:
        clipper.clip_()
    if how == "loaded":
        clipper.load_state_dict(state)
    try:
        clipper.measure()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_measure_hears_of_it_and_a_loaded_state_knows_nothing_of_it():
    assert run_ranks(looked_at_and_loaded, 2, "measured") == ["no error"] * 2
    assert run_ranks(looked_at_and_loaded, 2, "loaded") == ["no error"] * 2
    for said in run_ranks(looked_at_and_loaded, 2, "clipped"):
        assert "copies of gradients differ between ranks since step 0" in said


def last_call(road: str, by: float) -> list[str]:
    """The warnings of one call whose gradients, on rank 1, are ``by`` times those of the others."""
    model = ddp()
    with patch("distclip.clipper.reads_are_free", lambda device: road == HOST):
        clipper = distclip.Clipper(model, 0.1)
        backward(model)
        if dist.get_rank() == 1:
            for parameter in model.parameters():
                parameter.grad.mul_(by)
        with warnings.catch_warnings(record=True, action="always") as warned:
            clipper.step(SGD(model.parameters(), lr=0.1))
    return [str(warning.message) for warning in warned]


def test_a_last_call_whose_gradients_differ_is_not_silent():
    for (said,) in run_ranks(last_call, 3, HOST, 1e3):
        assert "copies of gradients differ between ranks since step 0, and here had a norm of" in said
        assert said.endswith("The next call raises on every rank")
    assert run_ranks(last_call, 2, HOST, 1.0) == [[], []]
