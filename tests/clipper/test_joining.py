"""Uneven inputs: inside DDP's join() a Clipper would wait for ranks that have run out of data."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.optim import SGD, AdamW

import distclip
from support.layouts import WORDS, build, ddp
from support.oracle import true_norm
from support.ranks import count_collectives, run_ranks

LR = 0.1


def loss_of(model: nn.Module, rank: int, i: int) -> Tensor:
    """Of batch ``i`` of a rank."""
    chance = torch.Generator().manual_seed(1000 * rank + i)
    words, targets = torch.randint(WORDS, (3, 6), generator=chance), torch.randn(3, 2, generator=chance)
    dtype = next(model.parameters()).dtype
    return (model(words) - targets.to(dtype)).square().mean()


def expected(counts: Sequence[int], max_norm: float) -> list[float]:
    """Norms of one process that has all data, in float64."""
    model, norms = build(dtype=torch.float64), []
    optimizer = SGD(model.parameters(), lr=LR)
    for i in range(max(counts)):
        optimizer.zero_grad()
        (sum(loss_of(model, rank, i) for rank, count in enumerate(counts) if i < count) / len(counts)).backward()
        norms.append(true_norm([q.grad for q in model.parameters()]))
        for q in model.parameters():
            q.grad *= min(1.0, max_norm / (norms[-1] + 1e-6))
        optimizer.step()
    return norms


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
        "Join": lambda: clipper.step(optimizer),
    }
    with Join([model]) if what == "Join" else model.join():
        loss_of(model, dist.get_rank(), 0).backward()
        with count_collectives() as counted, pytest.raises(RuntimeError) as error:
            calls[what]()
    model.join(enable=False)  # as the error says of a join that is over
    clipper.verify()
    return str(error.value), counted.total()


@pytest.mark.parametrize("what", ["step", "clip_", "measure", "verify", "attached", "Join"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_clipper_inside_the_join_of_ddp_does_not_wait_for_ever(what, size):
    for said, collectives in run_ranks(refused, size, what):
        assert "the model is inside join(), where a Clipper's all-reduce would wait" in said
        assert "distclip.clip_grad_norm_" in said
        assert collectives == 0


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
    norms = expected((1, 3), 0.05)
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


def test_a_join_that_ends_with_the_first_rank_is_no_hindrance():
    (first, steps), (second, others) = run_ranks(ended_early, 2)
    assert "exhausted all inputs" in first
    assert "at least one rank that exhausted inputs" in second
    assert steps == others == 2
