"""Every policy on a norm answers what its paper does, in every layout, for 60 steps, and when resumed on other ranks.

One Clipper has them all beside each other, in a :class:`Shadow`. What they report is compared with the loops over
Python numbers of policies/reference.py, on the float64 norms of whole gradients in one process. Gradients are mixed of
a few real ones, and are spikes, another level, zeros, or NaN on one rank alone.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from math import inf, isfinite, isnan, nan, sqrt
from random import Random
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from distclip import (
    AutoClip,
    Cosine,
    MaxNorm,
    Normalize,
    PerGroup,
    PerParameter,
    Policy,
    QuantileTracker,
    Shadow,
    SkipSpikes,
    Smooth,
    Warmup,
    ZClip,
)
from policies import reference
from policies.reference import Answer, Row
from support import trained
from support.mixed import MIXED, Mixture, shares
from support.oracle import true_norm
from support.ranks import count_collectives, run_ranks, same_bits
from support.roads import ROADS
from support.samples import crossed, most

STEPS, CUTS = 60, (0, 20, 40, 60)
SPIKES, BROKEN, EMPTY, SHIFT = (5, 43), (12, 33), (9, 50), 36  # one of each is in the warm-up
LOSSES = {28: 9.0, 30: nan}  # a spike; and NaN, on one rank alone
COUNTED = (6, 9, 20, 43, 59)  # not every step, which takes long; copies are compared in calls 1, 2, 4, ...
MATRICES = ("*.weight", "*.w")


# ---- policies, and their papers -------------------------------------------------------------------------------


class Norms(NamedTuple):
    """Of one step: of all gradients, of each parameter's; and the loss. All are NaN where one is."""

    model: float
    each: dict[str, float]
    loss: float


@dataclass(frozen=True)
class Case:
    """``answers``: coefficients and skips by its paper, step by step."""

    policy: Policy
    answers: Callable[[Sequence[Norms]], list[tuple[float, bool]]]


def of_model(policy: Policy | float, paper: Callable[[list[Row]], list[Answer]], loss: bool = False) -> Case:
    def answers(steps: Sequence[Norms]) -> list[tuple[float, bool]]:
        return [each[1:] for each in paper([(norm, here)[: 1 + loss] for norm, _, here in steps])]

    return Case(policy, answers)


def by_unit(policy: Policy, unit_of: Callable[[str], str], papers: Callable[[str], Any]) -> Case:
    """Each unit by its own paper; reported is what the norm of the model is multiplied by."""

    def answers(steps: Sequence[Norms]) -> list[tuple[float, bool]]:
        units = sorted({unit_of(name) for name in steps[0].each})
        norms = {
            u: [true_sum(n for name, n in step.each.items() if unit_of(name) == u) for step in steps] for u in units
        }
        coefs = {u: [coef for _, coef, _ in papers(u)([(norm,) for norm in norms[u]])] for u in units}
        after = [true_sum(coefs[u][k] * norms[u][k] for u in units) for k in range(len(steps))]
        return [(new / step.model if step.model else 1.0, False) for new, step in zip(after, steps, strict=True)]

    return Case(policy, answers)


def true_sum(norms) -> float:
    return sqrt(sum(norm * norm for norm in norms))


def sawtooth(step: Any) -> Any:
    return 0.5 + step % 3


AUTOCLIP = AutoClip(30, window=20), partial(reference.autoclip, percentile=30, window=20)
ZCLIP = ZClip(0.9, 2.0, inf, 1e-6, 14), partial(reference.zclip, alpha=0.9, z_thresh=2.0, max_norm=inf, warmup_steps=14)
SKIPS = {"sigma": 4.0, "window": 16, "patience": 3}  # which a new level outlasts
CASES = {
    "fixed": of_model(MaxNorm(0.9), reference.scheduled(lambda step: 0.9)),
    "warmup": of_model(MaxNorm(Warmup(5.0, 0.5, 30)), reference.scheduled(reference.warmup(5.0, 0.5, 30))),
    "cosine": of_model(MaxNorm(Cosine(0.2, 3.0, 50)), reference.scheduled(reference.cosine(0.2, 3.0, 50))),
    "function": of_model(MaxNorm(sawtooth), reference.scheduled(sawtooth)),
    "smooth": of_model(Smooth(0.7), partial(reference.smooth, max_norm=0.7)),
    "normalize": of_model(Normalize(3.0), partial(reference.normalize, target=3.0)),
    "autoclip": of_model(*AUTOCLIP),
    "median": of_model(QuantileTracker(), partial(reference.quantile_tracker, quantile=0.5, eta=0.2)),
    "tracker": of_model(
        QuantileTracker(0.8, 0.1, 1.5), partial(reference.quantile_tracker, quantile=0.8, eta=0.1, max_norm=1.5)
    ),
    "zclip": of_model(*ZCLIP),
    "zclip as it is": of_model(ZClip(), reference.zclip),
    "skip": of_model(SkipSpikes(**SKIPS), partial(reference.skip_spikes, **SKIPS)),
    "skip above": of_model(SkipSpikes(3.0, inf), partial(reference.skip_spikes, max_norm=3.0, window=10**9)),
    "skip by loss": of_model(
        SkipSpikes(**SKIPS, on=("norm", "loss")), partial(reference.skip_spikes, **SKIPS), loss=True
    ),
    "each autoclip": by_unit(PerParameter(AUTOCLIP[0]), str, lambda _: AUTOCLIP[1]),
    "each zclip": by_unit(PerParameter(ZCLIP[0]), str, lambda _: ZCLIP[1]),
    "groups": by_unit(
        PerGroup({"matrices": (MATRICES, AUTOCLIP[0]), "rest": ("*.bias", ZCLIP[0])}),
        lambda name: "rest" if name.endswith("bias") else "matrices",
        lambda group: {"matrices": AUTOCLIP[1], "rest": ZCLIP[1]}[group],
    ),
}
ALL = Shadow(CASES["zclip"].policy, **{name: case.policy for name, case in CASES.items()})


# ---- gradients ------------------------------------------------------------------------------------------------


def shares_of(step: int) -> list[float]:
    """How much of each of the mixed gradients is in those of a step."""
    return shares(step, (1e3 if step in SPIKES else 1.0) * (2.0 if step >= SHIFT else 1.0) * (step not in EMPTY))


def loss_of(step: int) -> float:
    return LOSSES.get(step, Random(-step).gauss(2.0, 0.1))


@lru_cache
def one_process(of_experts: bool) -> tuple[float, list[Norms]]:
    """By what gradients are multiplied so that a norm is about 1, and the norms of all steps."""
    training = trained.all_experts() if of_experts else trained.one()
    (model,), mixture = training.parts, Mixture.of(training)
    names = [name for name, _ in model.named_parameters()]
    unit = 1 / true_norm(mixture.mixed([1.0] * len(MIXED)))
    steps = []
    for step in range(STEPS):
        each = [nan if step in BROKEN else true_norm([unit * g]) for g in mixture.mixed(shares_of(step))]
        steps.append(Norms(true_sum(each), dict(zip(names, each, strict=True)), loss_of(step)))
    return unit, steps


# ---- on ranks -------------------------------------------------------------------------------------------------


def clip(layout, unit: float, road: str, first: int, end: int, begun: Any = None) -> dict[str, Any]:
    """Steps of the Clipper, from a state: reports, the state after them, and how many collectives some took."""
    training = layout()
    mixture = Mixture.of(training)
    clipper = ROADS[road](training.parts, ALL, **training.options)
    if begun:
        clipper.load_state_dict(begun)
    rank, size = dist.get_rank(), dist.get_world_size()
    reports, counts = [], []
    for step in range(first, end):
        mixture.mix([unit * share for share in shares_of(step)])
        if step in BROKEN and rank == size // 2:
            mixture.break_()
        loss = loss_of(step) if rank == size - 1 or not isnan(loss_of(step)) else 1.0
        with count_collectives() if step in COUNTED else nullcontext({}) as collectives:
            report = clipper.clip_(signals={"loss": loss + rank - (size - 1) / 2})
        reports.append(report.to_dict())
        counts += collectives.values()
    return {"reports": reports, "counts": counts, "state": clipper.state_dict()}


def check(reports: list[dict[str, float]], of_experts: bool) -> None:
    """As the papers have it."""
    _, steps = one_process(of_experts)
    wanted = {name: case.answers(steps) for name, case in CASES.items()}
    for step, (report, norms) in enumerate(zip(reports, steps, strict=True)):
        assert report["skip"] == (step in BROKEN)
        if isfinite(norms.model):
            assert report["norm"] == pytest.approx(norms.model, rel=1e-12)
            assert report["coef"] == pytest.approx(wanted["zclip"][step][0], rel=1e-9)
        for name in CASES:
            coef, skip = wanted[name][step]
            assert report[f"{name}/skip"] == skip, (name, step)
            if isfinite(norms.model):
                assert report[f"{name}/coef"] == pytest.approx(coef, rel=1e-9), (name, step)


@pytest.mark.parametrize("of_experts", [False, True])
def test_no_case_is_vacuous(of_experts):
    """Each policy acts on some steps and lets others pass; a loss is a spike where no norm is; patience ends."""
    _, steps = one_process(of_experts)
    for name, case in CASES.items():
        answers = [(coef, skip) for (coef, skip), norms in zip(case.answers(steps), steps, strict=True) if norms.model]
        acts = [skip or abs(coef - 1) > 0.01 for coef, skip in answers if isfinite(coef)]
        assert sum(acts) >= 2, name
        assert not all(acts) or name in ("smooth", "normalize"), name
    skips = [skip for _, skip in CASES["skip by loss"].answers(steps)]
    assert [k for k, skip in enumerate(skips) if skip] == [*LOSSES, *range(SHIFT, SHIFT + SKIPS["patience"]), SPIKES[1]]


LAYOUTS = {
    1: [trained.one],
    2: [trained.ddp, trained.fsdp2, trained.fsdp1_flat, trained.stages, trained.experts],
    3: [trained.fsdp2],  # with shards that are empty
    4: [
        *(trained.ddp, trained.fsdp2, trained.hsdp, trained.fsdp2_tp, trained.fsdp1_flat, trained.stages),
        *(trained.stages_of_equal_names, trained.experts, trained.experts_of_equal_names, trained.experts_by_dtensor),
    ],
}
EACH = most(  # what policies see is the norm, which is the same in every layout
    [
        pytest.param(layout, size, id=f"{layout.__name__}-{size}")
        for size, listed in LAYOUTS.items()
        for layout in listed
    ],
    *("fsdp2-2", "fsdp1_flat-2", "stages-2", "experts-2", "ddp-4", "fsdp2-4", "hsdp-4", "stages-4", "experts-4"),
)


@pytest.mark.parametrize(("layout", "size"), EACH)
def test_every_policy_is_its_paper_by_one_all_reduce_a_step(layout, size):
    of_experts = "experts" in layout.__name__
    found = run_ranks(clip, size, layout, one_process(of_experts)[0], "host", 0, STEPS)
    assert same_bits([(rank["reports"], rank["state"]) for rank in found])
    check(found[0]["reports"], of_experts)
    assert [rank["counts"] for rank in found] == [[1] * len(COUNTED)] * size


ROUTES = {
    "sharded": ((trained.fsdp2_tp, 4), (trained.fsdp2, 2), (trained.one, 1)),
    "staged": ((trained.stages, 4), (trained.ddp, 2), (trained.one, 1)),
    "hybrid": ((trained.hsdp, 4), (trained.fsdp1_flat, 2), (trained.one, 1)),
    "to more ranks": ((trained.one, 1), (trained.stages, 2), (trained.fsdp2, 4)),
    "experts": ((trained.experts, 4), (trained.experts, 2), (trained.all_experts, 1)),
}


@pytest.mark.parametrize(("route", "road"), crossed(ROUTES, ROADS))
def test_every_policy_goes_on_on_other_ranks(route, road):
    of_experts, state, reports = route == "experts", None, []
    for (layout, size), first, end in zip(ROUTES[route], CUTS, CUTS[1:], strict=False):
        found = run_ranks(clip, size, layout, one_process(of_experts)[0], road, first, end, state)
        assert same_bits([(rank["reports"], rank["state"]) for rank in found])
        state = found[0]["state"]
        reports.append(found[0]["reports"])
    check(list(chain(*reports)), of_experts)
