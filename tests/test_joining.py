"""Uneven inputs: steps inside torch's Join, whose ranks without data shadow those that have some."""

import re
from collections.abc import Callable, Sequence
from math import inf
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import distclip
from layouts import WORDS, build, ddp, ddp_bucket_view, ddp_unused, fsdp2
from oracle import true_norm
from ranks import count_collectives, run_ranks, same_bits

LR = 0.1
HOST, DEVICE = "host", "device"  # where decisions are read: at once, or, as on accelerators, one call later


def loss_of(model: nn.Module, rank: int, i: int) -> Tensor:
    """Of batch ``i`` of a rank."""
    chance = torch.Generator().manual_seed(1000 * rank + i)
    words, targets = torch.randint(WORDS, (3, 6), generator=chance), torch.randn(3, 2, generator=chance)
    dtype = next(model.parameters()).dtype
    return (model(words) - targets.to(dtype)).square().mean()


def expected(counts: Sequence[int], max_norm: float, p: float, by_initial: bool) -> tuple[list[float], list[Tensor]]:
    """Norms and parameters of one process that has all data, in float64."""
    model, norms = build(dtype=torch.float64), []
    optimizer = SGD(model.parameters(), lr=LR)
    for i in range(max(counts)):
        active = [rank for rank, count in enumerate(counts) if i < count]
        optimizer.zero_grad()
        (sum(loss_of(model, rank, i) for rank in active) / (len(counts) if by_initial else len(active))).backward()
        norms.append(true_norm([q.grad for q in model.parameters()], p))
        for q in model.parameters():
            q.grad *= min(1.0, max_norm / (norms[-1] + 1e-6))
        optimizer.step()
    return norms, [q.detach() for q in model.parameters()]


def uneven(
    counts: Sequence[int],
    layout: Callable[[], nn.Module] = ddp,
    policy: Any = 0.5,
    p: float = 2.0,
    by_initial: bool = True,
    road: str = HOST,
    attached: bool = False,
    fused: bool = False,
) -> dict[str, Any]:
    model, norms, collectives = layout(), [], []
    optimizer = SGD(model.parameters(), lr=LR, fused=fused)
    with patch("distclip.clipper.reads_are_free", lambda device: road == HOST):
        clipper = distclip.Clipper(model, policy, norm_type=p) if not attached else None
        clipper = clipper or distclip.attach(optimizer, model, policy, norm_type=p)
        with Join([model, clipper], divide_by_initial_world_size=by_initial):
            for i in range(counts[dist.get_rank()]):
                optimizer.zero_grad()
                loss_of(model, dist.get_rank(), i).backward()
                with count_collectives() as counted:
                    optimizer.step() if attached else clipper.step(optimizer)
                collectives.append(counted.total())
                norms.append(clipper.report.norm.item())
        alike = [clipper.report.to_dict(), clipper.state_dict(), [q.detach() for q in model.parameters()]]
        optimizer.zero_grad()  # and all go on together
        loss_of(model, dist.get_rank(), 99).backward()
        clipper.verify()
        together = clipper.measure().norm
    return {"norms": norms, "alike": alike, "together": together, "collectives": collectives}


COUNTS = [(3, 5), (5, 2), (0, 3), (4, 1, 0, 6), (2, 2, 3, 2), (3, 3)]


def compare(counts: Sequence[int], max_norm: float, p: float = 2.0, by_initial: bool = True, **options: Any) -> None:
    norms, parameters = expected(counts, max_norm, p, by_initial)
    assert {norm > max_norm for norm in norms} == {max_norm < 1}
    results = run_ranks(
        uneven_with, len(counts), counts, {"policy": max_norm, "p": p, "by_initial": by_initial} | options
    )
    for count, result in zip(counts, results, strict=True):
        assert result["norms"] == pytest.approx(norms[:count], rel=1e-5)
        assert result["collectives"] == [1] * count
        report, state, found = result["alike"]
        assert report["norm"] == pytest.approx(norms[-1], rel=1e-5)
        assert state["steps"] == max(counts)
        assert all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6) for a, b in zip(found, parameters, strict=True))
    assert same_bits([result["alike"] for result in results])
    assert same_bits([result["together"] for result in results])


def uneven_with(counts: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
    return uneven(counts, **options)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_a_rank_that_has_run_out_of_data_shadows_the_steps_of_the_others(counts, max_norm):
    compare(counts, max_norm)


@pytest.mark.parametrize("p", [1.0, 3.0, inf])
@pytest.mark.parametrize("by_initial", [True, False])
def test_every_norm_and_both_ways_of_ddp_to_divide(p, by_initial):
    compare((1, 3, 2), 0.05, p, by_initial)


@pytest.mark.parametrize(
    "options",
    [
        {"attached": True},
        {"fused": True},
        {"road": DEVICE},
        {"road": DEVICE, "fused": True},
        {"layout": ddp_bucket_view},
    ],
    ids=str,
)
def test_attached_folded_and_read_late(options):
    compare((1, 3), 0.05, **options)


def test_a_policy_knows_the_same_on_all_ranks():
    policy = distclip.AutoClip(percentile=50, window=4)
    results = run_ranks(uneven_with, 3, (2, 6, 0), {"policy": policy, "layout": ddp_unused})
    assert same_bits([result["alike"] for result in results])
    assert results[0]["alike"][1]["steps"] == 6


# ---- what goes wrong in a step that is shadowed ------------------------------------------------------------------


def with_nan(nonfinite: str, road: str) -> dict[str, Any]:
    """Rank 1 has four batches, the last of which is bad; rank 0 has one."""
    model = ddp()
    optimizer = SGD(model.parameters(), lr=LR)
    with patch("distclip.clipper.reads_are_free", lambda device: road == HOST):
        clipper = distclip.Clipper(model, 0.5, nonfinite=nonfinite)
        raised = ""
        try:
            with Join([model, clipper]):
                for i in range(1 + 3 * dist.get_rank()):
                    optimizer.zero_grad()
                    (loss_of(model, dist.get_rank(), i) * (torch.nan if i == 3 else 1)).backward()
                    clipper.step(optimizer)
        except distclip.NonFiniteError as error:
            raised = str(error)
        return {"raised": raised, "steps": clipper.state_dict()["steps"], "culprit": str(clipper.culprit)}


@pytest.mark.parametrize("road", [HOST, DEVICE])
def test_a_step_that_is_not_finite_is_skipped_or_raised_on_all_ranks(road):
    for nonfinite, steps in [("skip", 4), ("raise", 3)]:
        results = run_ranks(with_nan, 2, nonfinite, road)
        assert same_bits(results)
        assert results[0]["steps"] == steps
        assert "embed.weight on rank 1" in results[0]["culprit"]
        assert ("non-finite" in results[0]["raised"]) == (nonfinite == "raise")


def with_a_damaged_copy() -> str:
    """Of ranks 1 and 2, which have data when rank 0 has none."""
    model = ddp()
    optimizer = SGD(model.parameters(), lr=LR)
    clipper = distclip.Clipper(model, 0.5)
    try:
        with Join([model, clipper]):
            for i in range(1 if dist.get_rank() == 0 else 4):
                optimizer.zero_grad()
                loss_of(model, dist.get_rank(), i).backward()
                if i == 2 and dist.get_rank() == 2:
                    next(model.parameters()).grad.mul_(2)
                clipper.step(optimizer)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


@pytest.mark.filterwarnings("ignore:copies of gradients differ:RuntimeWarning")
def test_copies_that_came_apart_are_told_to_all_ranks():
    for said in run_ranks(with_a_damaged_copy, 3):
        assert re.search("rank [12].*: stopped: copies of gradients differ between ranks since step 2", said)


def with_freed_memory() -> str:
    """On rank 1, whose error is torch's own, beside rank 2; rank 0 has no data by then."""
    model = ddp()
    clipper = distclip.Clipper(model, 0.5)
    try:
        with Join([model, clipper]):
            for i in range(1 if dist.get_rank() == 0 else 2):
                model.zero_grad()
                loss_of(model, dist.get_rank(), i).backward()
                if i == 1 and dist.get_rank() == 1:
                    next(model.parameters()).grad.untyped_storage().resize_(0)
                clipper.clip_()
    except (distclip.LayoutError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_of_one_rank_is_told_to_one_without_data():
    idle, faulty, other = run_ranks(with_freed_memory, 3)
    assert faulty.startswith("RuntimeError")
    assert re.search("LayoutError.*rank 1: stopped: .*storage", idle)
    assert other == idle


def with_another_step_number() -> str:
    model = ddp()
    clipper = distclip.Clipper(model, 0.5)
    try:
        with Join([model, clipper]):
            for i in range(1 if dist.get_rank() == 0 else 3):
                model.zero_grad()
                loss_of(model, dist.get_rank(), i).backward()
                if i == 2 and dist.get_rank() == 1:
                    clipper.load_state_dict(clipper.state_dict() | {"steps": 7})
                clipper.clip_()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree_are_named_beside_one_without_data():
    for said in run_ranks(with_another_step_number, 3):
        assert "rank 1: step 7" in said


# ---- what is refused, on all ranks alike and before anybody waits ------------------------------------------------


def refused(what: str) -> tuple[str, int]:
    """The error of the first call inside ``model.join()``, and how many collectives it made."""
    model = ddp()
    optimizer = SGD(model.parameters(), lr=LR)
    make = distclip.attach if what == "attached" else lambda _, *arguments: distclip.Clipper(*arguments)
    clipper = make(optimizer, model, 0.5)
    calls = {
        "step": lambda: clipper.step(optimizer),
        "clip_": clipper.clip_,
        "measure": clipper.measure,
        "verify": clipper.verify,
        "attached": optimizer.step,
    }
    with model.join():
        loss_of(model, dist.get_rank(), 0).backward()
        with count_collectives() as counted, pytest.raises(RuntimeError) as error:
            calls[what]()
    model.join(enable=False)  # as the error says of a join that is over
    clipper.verify()
    return str(error.value), counted.total()


@pytest.mark.parametrize("what", ["step", "clip_", "measure", "verify", "attached"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_clipper_inside_the_join_of_ddp_alone_does_not_wait_for_ever(what, size):
    for said, collectives in run_ranks(refused, size, what):
        assert "with Join([model, clipper]):" in said
        assert collectives == 0


def built_wrongly(what: str) -> str:
    model = fsdp2() if what == "fsdp2" else ddp_bucket_view()
    joined = [model]
    options: dict[str, Any] = {}
    if what == "split_over":
        options["split_over"] = [dist.new_group([dist.get_rank()], use_local_synchronization=True)]
    clipper = distclip.Clipper(model.module if what == "inner" else model, 0.5, overlap=what == "overlap", **options)
    joined = [clipper, model] if what == "order" else [clipper] if what == "alone" else [model, clipper]
    with pytest.raises(ValueError, match=r"Clipper|Join") as error:
        Join(joined[1:] if what == "fsdp2" else joined)
    return str(error.value)


@pytest.mark.parametrize("what", ["order", "alone", "inner", "overlap", "split_over", "fsdp2"])
def test_what_could_not_be_shadowed_is_refused_before_the_first_iteration(what):
    first, *others = run_ranks(built_wrongly, 2, what)
    assert others == [first]
    assert ("Join([model, clipper])" in first) == (what in ("order", "alone", "inner", "fsdp2"))


def in_another_rhythm(what: str) -> str:
    """Two iterations of which only the second steps, or one that steps twice, by ranks that both have data."""
    model = ddp()
    optimizer = SGD(model.parameters(), lr=LR)
    clipper = distclip.Clipper(model, 0.5)
    try:
        with Join([model, clipper]):
            for i in range(2):
                loss_of(model, dist.get_rank(), i).backward()
                if what == "measure":
                    clipper.measure()
                if what == "scaler":
                    clipper.step(optimizer, scaler=GradScaler("cpu"))
                if what == "twice":
                    clipper.clip_()
                if i == 1 or what == "twice":
                    clipper.step(optimizer)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["accumulating", "twice", "measure", "scaler"])
def test_a_loop_that_ranks_without_data_could_not_follow_raises_at_once(what):
    first, *others = run_ranks(in_another_rhythm, 2, what)
    assert others == [first]
    assert ("model.no_sync()" in first) == (what in ("accumulating", "twice"))
    assert ("outside of Join" in first) == (what in ("measure", "scaler"))


# ---- what works as it did ----------------------------------------------------------------------------------------


def accumulated() -> tuple[list[float], dict[str, Any]]:
    """Two batches a step, the first of them inside no_sync."""
    model, norms = ddp(), []
    optimizer = SGD(model.parameters(), lr=LR)
    clipper = distclip.Clipper(model, 0.05)
    with Join([model, clipper]):
        for step in range(1 + dist.get_rank()):
            optimizer.zero_grad()
            with model.no_sync():
                loss_of(model, dist.get_rank(), 2 * step).backward()
            loss_of(model, dist.get_rank(), 2 * step + 1).backward()
            norms.append(clipper.step(optimizer).norm.item())
    return norms, clipper.state_dict()


def test_gradients_are_accumulated_inside_no_sync():
    model = build(dtype=torch.float64)
    (sum(loss_of(model, rank, i) for rank in range(2) for i in range(2)) / 2).backward()
    first = true_norm([q.grad for q in model.parameters()])
    (norms, state), (others, same) = run_ranks(accumulated, 2)
    assert norms == others[:1] == [pytest.approx(first, rel=1e-5)]
    assert state["steps"] == same["steps"] == 2


def by_function(module: bool) -> tuple[list[float], int]:
    model, norms, collectives = ddp(), [], 0
    optimizer = SGD(model.parameters(), lr=LR)
    with model.join():
        for i in range(1 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            loss_of(model, dist.get_rank(), i).backward()
            with count_collectives() as counted:
                norms.append(distclip.clip_grad_norm_(model if module else model.parameters(), 0.05).item())
            collectives += counted.total()
            optimizer.step()
    return norms, collectives


@pytest.mark.parametrize("module", [True, False])
def test_the_functions_make_no_collective_and_work_inside_join(module):
    norms, _ = expected((1, 3), 0.05, 2.0, True)
    for rank, (found, collectives) in enumerate(run_ranks(by_function, 2, module)):
        assert found == pytest.approx(norms[: 1 + 2 * rank], rel=1e-5)
        assert collectives == 0


def ended_early() -> tuple[str, int]:
    model = ddp()
    optimizer = AdamW(model.parameters(), fused=True)
    clipper = distclip.Clipper(model, 0.05)
    try:
        with model.join(throw_on_early_termination=True):
            for i in range(2 + 2 * dist.get_rank()):
                optimizer.zero_grad()
                loss_of(model, dist.get_rank(), i).backward()
                clipper.step(optimizer)
    except RuntimeError as error:
        return str(error), clipper.state_dict()["steps"]
    return "no error", -1


def test_a_join_that_ends_with_the_first_rank_needs_no_shadow():
    (first, steps), (second, others) = run_ranks(ended_early, 2)
    assert "exhausted all inputs" in first
    assert "at least one rank that exhausted inputs" in second
    assert steps == others == 2


def epochs() -> list[Any]:
    """Two models with a Clipper each, in three Joins with an even stretch between them."""
    models = [ddp(), DistributedDataParallel(build().head)]
    clippers = [distclip.Clipper(model, 0.05) for model in models]
    optimizers = [SGD(model.parameters(), lr=LR) for model in models]
    seen = []
    for epoch in range(3):
        with Join([*models, *clippers]):
            for i in range(1 + 2 * (dist.get_rank() == epoch % 2)):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss_of(models[0], dist.get_rank(), i).backward()
                models[1](torch.ones(1, 12) * (i + 1)).square().sum().backward()
                for clipper, optimizer in zip(clippers, optimizers, strict=True):
                    clipper.step(optimizer)
        for model, clipper, optimizer in zip(models, clippers, optimizers, strict=True):
            optimizer.zero_grad()
            for _ in range(2):  # accumulates, which a Join would refuse
                model(torch.ones(1, 6, dtype=torch.int64) if model is models[0] else torch.ones(1, 12)).sum().backward()
            seen.append(clipper.step(optimizer).norm)
        seen += [clipper.state_dict() for clipper in clippers]
    return seen


def test_epochs_and_several_models():
    first, second = run_ranks(epochs, 2)
    assert same_bits([first, second])
    assert [state["steps"] for state in first[2:4]] == [4, 4]
    assert [state["steps"] for state in first[-2:]] == [12, 12]
