"""MaxRMS, AdaGC and AGC train as their papers say, in every layout: with a spike, a NaN and a level shift, and resumed.

Against loops over numbers in one process: policies/reference_by_unit.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip import AGC, AdaGC, MaxRMS
from policies.reference_by_unit import AdaptiveClipping, BlockRMS, UnitwiseClipping
from support import trained
from support.mixed import Mixture, shares
from support.oracle import rows_in
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import crossed, most
from support.trained import Training, Whole, united

STEPS, HALF = 60, 31
SPIKES, BROKEN = (5, 40), (12, 33)  # one step of each is in the warm-up
SHIFT, WARM_UP = 36, 20
RENEWED = (0, HALF)  # steps before which the mixed gradients are made anew, of the weights of that time
COUNTED = (6, 20, STEPS - 1)  # copies are compared in calls 1, 2, 4, ...

POLICIES: dict[str, tuple[tuple[Any, Callable[[], Any]], ...]] = {  # for the net, and for the experts
    "MaxRMS": tuple((MaxRMS(d), partial(BlockRMS, d)) for d in (0.1, 3.0)),
    "AdaGC": tuple((AdaGC(a, 1.5, 0.9, WARM_UP), partial(AdaptiveClipping, a, 1.5, 0.9, WARM_UP)) for a in (6.0, 20.0)),
    "AGC": tuple((AGC(c, 1e-2), partial(UnitwiseClipping, c, 1e-2)) for c in (0.1, 2.0)),
}


def shares_of(step: int) -> list[float]:
    """How much of each of the mixed gradients is in those of a step."""
    size = (1e3 if step in SPIKES else 1.0) * (2.0 if step >= SHIFT else 1.0)
    return shares(step, size * trained.SCALES[step % len(trained.SCALES)])


def train(layout, name: str, first: int, end: int, begun: dict[str, Any] | None = None) -> dict[str, Any]:
    """Steps of SGD from ``begun``: weights, state and counts of collectives after them."""
    training = layout(begun and begun["weights"])
    optimizer = torch.optim.SGD([p for part in training.parts for p in part.parameters()], lr=trained.LR)
    clipper = distclip.Clipper(training.parts, POLICIES[name]["experts" in layout.__name__][0], **training.options)
    if begun:
        clipper.load_state_dict(begun["state"])
    counts, skipped = [], []
    for step in range(first, end):
        if step in RENEWED:
            mixture = Mixture.of(training)
        mixture.mix(shares_of(step))
        if step in BROKEN and dist.get_rank() == dist.get_world_size() // 2:
            mixture.break_()
        with count_collectives() if step in COUNTED else nullcontext({}) as collectives:
            report = clipper.step(optimizer)
        counts += collectives.values()
        skipped.append(bool(report.skip))
        optimizer.zero_grad()
    assert [first + k for k, skip in enumerate(skipped) if skip] == [k for k in BROKEN if first <= k < end]
    return {"weights": united(training), "state": clipper.state_dict(), "counts": counts, "units": training.units}


def alone(training: Training, reference: Any) -> tuple[Whole, float]:
    """The weights after all steps in one process; and the share of units that were clipped."""
    parameters, clipped, units = dict(training.parts[0].named_parameters()), 0, 0
    for step in range(STEPS):
        if step in RENEWED:
            mixture = Mixture.of(training)
        mixture.mix(shares_of(step))
        gradients = {name: p.grad for name, p in parameters.items()}
        if step not in BROKEN:
            factors = reference.factors(gradients, {name: p.detach() for name, p in parameters.items()})
            for name, p in parameters.items():
                scale(gradients[name], factors[name])
                p.data.sub_(trained.LR * gradients[name])
            clipped += sum(factor < 1 for each in factors.values() for factor in each)
            units += sum(map(len, factors.values()))
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
CASES = [  # norms of units are those of whole tensors in every layout: one policy shows what it does with them
    pytest.param(layout, size, name, id=f"{layout.__name__}-{size}-{name}")
    for size, listed in LAYOUTS.items()
    for layout, name in (product(listed, POLICIES) if size == 1 else zip(listed, cycle(POLICIES), strict=False))
]
CASES = most(
    CASES,
    *("fsdp2-4-MaxRMS", "fsdp2_tp_sequence-4-MaxRMS", "fsdp1-4-AdaGC", "stages-4-MaxRMS", "experts-4-AGC"),
    "experts_of_equal_names-4-MaxRMS",
)


@pytest.mark.parametrize(("layout", "size", "name"), CASES)
def test_it_trains_as_its_paper_says_in_one_process(layout, size, name):
    found = run_ranks(train, size, layout, name, 0, STEPS)
    check(found, name, "experts" in layout.__name__)
    if layout is not trained.fsdp2_tp_sequence:  # whose gradients are realigned
        assert [rank["counts"] for rank in found] == [[1] * len(COUNTED)] * size


ROUTES = [
    (trained.fsdp2_tp, 4, trained.one, 1),
    (trained.one, 1, trained.stages, 4),
    (trained.stages, 4, trained.fsdp2, 2),
    (trained.fsdp1_flat, 4, trained.ddp, 2),
    (trained.experts, 4, trained.all_experts, 1),
    (trained.experts_of_equal_names, 4, trained.experts_of_equal_names, 2),
]


@pytest.mark.parametrize(("layout", "size", "later", "later_size", "name"), crossed(ROUTES, POLICIES))
def test_a_run_goes_on_in_another_layout(layout, size, later, later_size, name):
    begun = run_ranks(train, size, layout, name, 0, HALF)[0]
    check(run_ranks(train, later_size, later, name, HALF, STEPS, begun), name, "experts" in layout.__name__)
