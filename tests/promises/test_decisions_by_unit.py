"""Decisions for groups, parameters and rows scale each element of every layout by the factor of its unit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip import Decision, Statistic
from support import parallel, trained
from support.mixed import local_of
from support.oracle import rows_in, true_norm
from support.parallel import Job, full_gradients
from support.ranks import run_ranks, same_bits
from support.roads import ROADS
from support.samples import most

SHARES = (0.5, 2.0, 0.9, inf, 0.03)  # of its norm, by which each unit in turn is bounded
COEFS = (0.5, 1.0, 0.25, 0.75)
LEVELS = ("group", "parameter", "row", "column")


@dataclass(frozen=True, slots=True)
class InTurn:
    """Bounds each unit by a share of its norm, or gives it a coefficient."""

    level: Statistic
    by_coef: bool = False

    def needs(self):
        return (self.level,)

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        norms = statistics.norm(self.level)
        turns = in_turn(COEFS if self.by_coef else SHARES, len(norms)).to(norms.device)
        if self.by_coef:
            return Decision(1.0, coef=turns, per=self.level), state
        return Decision(norms * turns + (norms == 0), per=self.level), state


def in_turn(numbers: tuple[float, ...], count: int) -> Tensor:
    return torch.tensor([numbers[k % len(numbers)] for k in range(count)], dtype=torch.float64)


def level_of(per: str, names: list[str]) -> Statistic:
    """Three groups of parameters, and every fourth in none; "column": rows along dim 1."""
    if per == "column":
        return Statistic("row", dims={"*": 1})
    if per != "group":
        return Statistic(per)
    return Statistic("group", groups={name: names[k::4] for k, name in enumerate(("first", "free", "bounded"))})


def units_of(whole: dict[str, Tensor], order: list[str], level: Statistic) -> Iterator[list[Tensor]]:
    """Views of the parts of ``whole`` tensors by name that are one unit, in the order of units: the oracle's."""
    for _, names in level.named:
        yield [whole[name] for name in names if name in whole]
    for name in order if level.per != "group" else ():
        dims = (1,) if level.dims else None
        yield from ([row] for row in rows_in(whole[name], dims)) if level.per == "row" else ([whole[name]],)


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative distance of two elements; inf where one is 0 alone."""
    pairs = [(found[name].double(), wanted[name].double()) for name in wanted]
    return max((torch.where(a == b, 0.0, (a - b).abs() / b.abs())).max().item() for a, b in pairs)


Kept = tuple[Tensor, Tensor, Tensor]  # a parameter, its gradient, and what this rank had of that


@dataclass(frozen=True, slots=True)
class Case:
    per: str
    by_coef: bool = False
    p: float = 2.0
    road: str = "host"


def scaled_each(job_of, cases: list[Case]) -> list[dict[str, Any]]:
    """What a decision for each unit makes of the gradients of one job, case by case."""
    job = job_of()
    watching = distclip.Clipper(job.parts, inf, watch="parameters", **job.options)
    job.backward()
    kept = [(p, p.grad, local_of(p.grad).clone()) for p in watching.engine.holders if p.grad is not None]
    before, names = united(job), list(watching.measure().norms)
    return [scaled(job, kept, before, names, case) for case in cases]


def scaled(job: Job, kept: list[Kept], before: dict[str, Tensor], names: list[str], case: Case) -> dict[str, Any]:
    """What it makes of the gradients, beside what the oracle does with whole ones."""
    for parameter, gradient, values in kept:  # in place: FSDP1's are parts of a flat one
        parameter.grad = gradient
        local_of(gradient).copy_(values)
    level, p = level_of(case.per, names), case.p
    clipper = ROADS[case.road](job.parts, InTurn(level, case.by_coef), norm_type=p, **job.options)
    clipper.measure()
    looked, report = united(job), clipper.clip_()
    after, wanted = united(job), {name: gradient.double().clone() for name, gradient in before.items()}
    kinds = list(units_of(wanted, names, level))
    for unit, share, coef in zip(kinds, in_turn(SHARES, len(kinds)), in_turn(COEFS, len(kinds)), strict=True):
        norm = true_norm(unit, p) if unit else 0.0
        factor = coef.item() if case.by_coef else min(1.0, share.item() * norm / (norm + 1e-6))
        for part in unit:
            part.mul_(factor)
    free = [name for name in names[3::4] if name in before] if case.per == "group" else []
    return {
        "apart": apart(after, wanted),
        "looked": 0.0 if job.realigns else apart(looked, before),
        "free": all(torch.equal(after[name], before[name]) for name in free),
        "ratio": report.coef.item() / (true_norm(wanted.values(), p) / true_norm(before.values(), p)),
        "scaled": sum(not torch.equal(after[name], before[name]) for name in before) / len(before),
        "norm": report.norm,
        "coef": report.coef,
    }


def united(job: Job) -> dict[str, Tensor]:
    shares: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, job.whole())
    return {name: tensor for share in shares for name, tensor in share.items()}


def by_layout(layout, dtype: torch.dtype = torch.float32) -> Job:
    return layout(dtype, 30.0)


def in_training(layout) -> Job:
    training = layout()
    (part,) = training.parts
    return Job([part], partial(training.backward, 0), lambda: full_gradients(part), training.options)


def jobs() -> Iterator[Any]:
    two = [parallel.fsdp1_full, parallel.tp_sequence]
    four = [
        *(parallel.hsdp, parallel.fsdp2_tp, parallel.fsdp2_tp_sequence, parallel.fsdp1_hybrid, parallel.cp_fsdp2),
        *(parallel.by_hand, parallel.by_hand_realigned, parallel.ep_dtensor, parallel.pp_empty),
    ]
    for size, layouts in ((2, two), (3, [parallel.uneven]), (4, four)):
        for layout in layouts:
            yield pytest.param(partial(by_layout, layout), size, id=f"{layout.__name__}-{size}")
    for layout in (trained.stages, trained.experts):
        yield pytest.param(partial(in_training, layout), 4, id=f"{layout.__name__}-4")


JOBS = most(jobs(), "fsdp2_tp_sequence-4", "cp_fsdp2-4", "pp_empty-4")
SOME = [job for job in JOBS if job.id in {"by_hand-4", "fsdp2_tp-4", "fsdp1_hybrid-4", "tp_sequence-2"}]


def levels_of(job: partial[Job]) -> list[str]:
    """Those that it has: flat parameters have no view of columns."""
    return [per for per in LEVELS if per != "column" or "fsdp1" not in job.args[0].__name__]


def check(job: partial[Job], size: int, cases: list[Case], error: float = 1e-6) -> None:
    ranks = run_ranks(scaled_each, size, job, cases)
    assert same_bits([[(found["norm"], found["coef"]) for found in rank] for rank in ranks])
    for rank in ranks:
        for case, found in zip(cases, rank, strict=True):
            assert found["scaled"] > 0.2, f"{case} is vacuous"
            assert found["looked"] == 0, case
            assert found["apart"] < error, case
            assert found["free"], case
            assert found["ratio"] == pytest.approx(1.0, abs=2e-7), case


@pytest.mark.parametrize(("job", "size"), JOBS)
def test_each_element_is_scaled_by_the_factor_of_its_unit(job, size):
    check(job, size, [Case("row", by_coef=True), *(Case(per) for per in levels_of(job))])


@pytest.mark.parametrize("per", LEVELS)
def test_each_may_be_scaled_by_coefficients(per):
    check(partial(by_layout, parallel.by_hand), 4, [Case(per, by_coef=True)])


@pytest.mark.parametrize(("job", "size"), SOME)
def test_with_any_norm(job, size):
    norms = {"parameter": (0.5, inf), "row": (1.0, 3.0, inf), "column": (3.0, inf)}
    check(job, size, [Case(per, p=p) for per in levels_of(job)[1:] for p in norms[per]])


@pytest.mark.parametrize(("job", "size"), SOME)
def test_where_decisions_stay_on_the_device(job, size):
    check(job, size, [Case(per, road="device") for per in levels_of(job)])


@pytest.mark.parametrize(
    "layout", [parallel.by_hand, parallel.fsdp2_tp, parallel.fsdp1_hybrid], ids=lambda f: f.__name__
)
def test_of_bf16_gradients_each_is_rounded_once(layout):
    job = partial(by_layout, layout, torch.bfloat16)
    check(job, 4, [Case(per) for per in levels_of(job)], 2**-8)
