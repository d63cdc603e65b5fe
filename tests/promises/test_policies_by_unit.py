"""MaxRMS, AdaGC and AGC train as their papers say, in every layout: with a spike, a NaN and a level shift, and resumed.

Against loops over numbers in one process: policies/reference_by_unit.py.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip import AGC, AdaGC, MaxRMS
from policies.reference_by_unit import AdaptiveClipping, BlockRMS, UnitwiseClipping
from support import trained
from support.oracle import rows_in
from support.ranks import count_collectives, run_ranks, same_bits
from support.trained import Training, Whole, united

STEPS, HALF = 60, 31
SPIKES, BROKEN = (5, 40), (12, 33)  # one step of each is in the warm-up
SHIFT, WARM_UP = 36, 20

POLICIES: dict[str, tuple[tuple[Any, Callable[[], Any]], ...]] = {  # for the net, and for the experts
    "MaxRMS": tuple((MaxRMS(d), partial(BlockRMS, d)) for d in (0.1, 3.0)),
    "AdaGC": tuple((AdaGC(a, 1.5, 0.9, WARM_UP), partial(AdaptiveClipping, a, 1.5, 0.9, WARM_UP)) for a in (2.0, 20.0)),
    "AGC": tuple((AGC(c, 1e-2), partial(UnitwiseClipping, c, 1e-2)) for c in (0.1, 2.0)),
}


def size_of(step: int) -> float:
    """By what the gradients of a step are multiplied."""
    return (1e3 if step in SPIKES else 1.0) * (2.0 if step >= SHIFT else 1.0)


def train(layout, name: str, first: int, end: int, begun: dict[str, Any] | None = None) -> dict[str, Any]:
    """Steps of SGD from ``begun``: weights, state and counts of collectives after them."""
    training = layout(begun and begun["weights"])
    parameters = [p for part in training.parts for p in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=trained.LR)
    clipper = distclip.Clipper(training.parts, POLICIES[name]["experts" in layout.__name__][0], **training.options)
    if begun:
        clipper.load_state_dict(begun["state"])
    counts, skipped = [], []
    for step in range(first, end):
        training.backward(step)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(size_of(step))
        if step in BROKEN and dist.get_rank() == dist.get_world_size() // 2:
            next(local for p in parameters if (local := local_of(p.grad)).numel()).view(-1)[0] = float("nan")
        with count_collectives() as collectives:
            report = clipper.step(optimizer)
        counts.append(collectives["allreduce"])
        skipped.append(bool(report.skip))
        optimizer.zero_grad()
    assert [first + k for k, skip in enumerate(skipped) if skip] == [k for k in BROKEN if first <= k < end]
    return {"weights": united(training), "state": clipper.state_dict(), "counts": counts, "units": training.units}


def local_of(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def alone(training: Training, reference: Any) -> tuple[Whole, float]:
    """The weights after all steps in one process; and the share of units that were clipped."""
    parameters, clipped, units = dict(training.parts[0].named_parameters()), 0, 0
    for step in range(STEPS):
        training.backward(step)
        gradients = {name: p.grad * size_of(step) for name, p in parameters.items()}
        if step not in BROKEN:
            factors = reference.factors(gradients, {name: p.detach() for name, p in parameters.items()})
            for name, p in parameters.items():
                scale(gradients[name], factors[name])
                p.data.sub_(trained.LR * gradients[name])
            clipped += sum(factor < 1 for each in factors.values() for factor in each)
            units += sum(map(len, factors.values()))
        for p in parameters.values():
            p.grad = None
    return {name: p.detach() for name, p in parameters.items()}, clipped / units


def scale(gradient: Tensor, factors: list[float]) -> None:
    parts = [gradient] if len(factors) == 1 else rows_in(gradient)
    for part, factor in zip(parts, factors, strict=False):  # no factors for what is exempt
        part.mul_(factor)


@lru_cache
def in_one_process(name: str, of_experts: bool) -> tuple[Whole, float]:
    return alone(trained.all_experts() if of_experts else trained.one(), POLICIES[name][of_experts][1]())


def check(found: list[dict[str, Any]], name: str, of_experts: bool) -> None:
    weights, clipped = in_one_process(name, of_experts)
    assert 0.1 < clipped < 0.9, "a vacuous case"
    assert same_bits([rank["state"] for rank in found])
    assert found[0]["weights"].keys() == weights.keys()
    for each, value in weights.items():
        torch.testing.assert_close(found[0]["weights"][each], value, rtol=1e-9, atol=1e-11)


LAYOUTS = {
    1: [trained.one, trained.all_experts],
    2: [trained.ddp, trained.fsdp2, trained.stages, trained.experts],
    3: [trained.fsdp2],  # with shards that are empty
    4: [
        *(trained.fsdp2, trained.hsdp, trained.fsdp2_tp, trained.fsdp2_tp_sequence, trained.fsdp1, trained.fsdp1_flat),
        *(trained.stages, trained.stages_of_equal_names, trained.experts, trained.experts_of_equal_names),
        trained.experts_by_dtensor,
    ],
}
CASES = [
    pytest.param(layout, size, id=f"{layout.__name__}-{size}") for size, listed in LAYOUTS.items() for layout in listed
]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("layout", "size"), CASES)
def test_it_trains_as_its_paper_says_in_one_process(layout, size, name):
    found = run_ranks(train, size, layout, name, 0, STEPS)
    check(found, name, "experts" in layout.__name__)
    if layout is not trained.fsdp2_tp_sequence:  # whose gradients are realigned
        assert {rank["counts"][k] for rank in found for k in (6, 20, STEPS - 1)} == {1}


ROUTES = [
    (trained.fsdp2_tp, 4, trained.one, 1),
    (trained.one, 1, trained.stages, 4),
    (trained.stages, 4, trained.fsdp2, 2),
    (trained.fsdp1_flat, 4, trained.ddp, 2),
    (trained.experts, 4, trained.all_experts, 1),
    (trained.experts_of_equal_names, 4, trained.experts_of_equal_names, 2),
]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("layout", "size", "later", "later_size"), ROUTES)
def test_a_run_goes_on_in_another_layout(layout, size, later, later_size, name):
    begun = run_ranks(train, size, layout, name, 0, HALF)[0]
    check(run_ranks(train, later_size, later, name, HALF, STEPS, begun), name, "experts" in layout.__name__)
