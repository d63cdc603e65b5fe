"""A warning points to the line of the user's that made the call, whatever of ours and of torch's lies between."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import distclip
from support.layouts import backward, ddp
from support.ranks import run_ranks
from support.roads import clipper_on_device

Call = Callable[[], object]


def by_step(model: nn.Module, optimizer: Optimizer) -> Call:
    clipper = distclip.Clipper(model, 1.0)
    return lambda: clipper.step(optimizer)


def by_clip(model: nn.Module, optimizer: Optimizer) -> Call:
    return distclip.Clipper(model, 1.0).clip_


def on_device(model: nn.Module, optimizer: Optimizer) -> Call:
    """The step that checks the one before."""
    clipper = clipper_on_device(model, 1.0)
    clipper.step(optimizer)
    return lambda: clipper.step(optimizer)


def by_measure(model: nn.Module, optimizer: Optimizer) -> Call:
    clipper = clipper_on_device(model, 1.0)
    clipper.step(optimizer)
    return lambda: clipper.measure()


def attached(model: nn.Module, optimizer: Optimizer) -> Call:
    distclip.attach(optimizer, model, 1.0)
    return lambda: optimizer.step()


def attached_and_scheduled(model: nn.Module, optimizer: Optimizer) -> Call:
    distclip.attach(optimizer, model, 1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return lambda: optimizer.step()


@pytest.mark.parametrize("way", [by_step, by_clip, on_device, by_measure, attached, attached_and_scheduled])
def test_of_a_step_without_a_gradient(way):
    model = nn.Linear(3, 1)
    call = way(model, AdamW(model.parameters(), fused=True))
    with pytest.warns(RuntimeWarning, match="no gradient on this rank") as caught:
        call()
    assert caught[0].filename == __file__


def by_function(model: nn.Module, optimizer: Optimizer) -> Call:
    return lambda: distclip.clip_grad_norm_(model.parameters(), 1.0, group=dist.group.WORLD)


def copies_apart(way: Callable[[nn.Module, Optimizer], Call]) -> list[str]:
    """Where the warnings of this rank point to, of gradients that only rank 1 has changed."""
    model = ddp()
    optimizer = SGD(model.parameters(), lr=0.1)
    call = way(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):  # a Clipper compares in the first two calls
            optimizer.zero_grad()
            backward(model, step)
            if step == 2 and dist.get_rank() == 1:
                next(model.parameters()).grad.mul_(1.005)
            call()
    return [each.filename for each in caught if "copies of gradients" in str(each.message)]


@pytest.mark.parametrize("way", [by_step, attached, by_function])
def test_of_copies_that_came_apart(way):
    said = run_ranks(copies_apart, 2, way)
    assert any(said)
    assert {file for files in said for file in files} == {__file__}
