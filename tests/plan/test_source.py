"""find_source: which rank a NaN comes from, seen before DDP or FSDP2 has reduced gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distclip
from support.ranks import count_collectives, run_ranks


class Net(nn.Module):
    """Three layers, the middle one perhaps computed again in the backward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        x = checkpoint(self.middle, x, use_reentrant=False) if self.again else self.middle(x)
        return self.last(x)


def wrapped(how: str) -> nn.Module:
    net = Net(again="again" in how)
    if how.startswith("ddp"):
        return DistributedDataParallel(net, gradient_as_bucket_view="view" in how)
    if how.startswith("hsdp"):
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bf16" in how else MixedPrecisionPolicy()
    for layer in (net.first, net.middle, net.last):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def with_a_bad_batch(how: str, bad: int, micro: int = 1) -> list[Any]:
    """Three steps, of which the second has a batch with an inf on rank ``bad``: what the Clipper and the source say."""
    model = wrapped(how)
    clipper, told = distclip.Clipper(model, 1.0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with distclip.find_source(model) as source:
        for step in range(3):
            optimizer.zero_grad()
            for k in range(micro):
                x = torch.randn(3, 6)
                if step == 1 and dist.get_rank() == bad and k == 0:
                    x[1, 2] = torch.inf
                model(x).square().mean().backward()
            report = clipper.step(optimizer)
            found = source.culprit()
            told.append((str(report.culprit), str(clipper.culprit), str(found), None if found is None else found.ranks))
    return told


@pytest.mark.parametrize(
    ("how", "size"),
    [("ddp", 2), ("ddp view", 2), ("ddp again", 2), ("fsdp2", 2), ("fsdp2 again", 2), ("fsdp2 bf16", 2), ("hsdp", 4)],
)
def test_a_bad_batch_on_one_rank_is_found_there_and_no_rank_is_blamed_for_the_reduced_gradient(how, size):
    results = run_ranks(with_a_bad_batch, size, how, size - 1)
    assert all(told == results[0] for told in results)
    before, (reduced, kept, found, ranks), after = results[0]
    assert before == after == ("None", "None", "None", None), "the culprit of an earlier step is gone"
    # tanh hides the inf from later layers, and its gradient there is 0 times inf
    assert found == f"first.weight on rank {size - 1} has NaN in its gradient"
    assert ranks == (size - 1,)
    assert "first.weight has NaN in its reduced gradient, held by ranks 0, 1" in reduced
    assert reduced.endswith("; distclip.find_source(model) says which rank it came from")
    assert kept == reduced


def test_all_micro_batches_of_a_step_are_watched():
    results = run_ranks(with_a_bad_batch, 2, "fsdp2", 0, 3)
    assert [told[1][2] for told in results] == ["first.weight on rank 0 has NaN in its gradient"] * 2


def of_several_ranks() -> list[Any]:
    model = wrapped("ddp")
    source = distclip.find_source(model)
    x = torch.full((3, 6), torch.nan if dist.get_rank() else 1.0)
    model(x).square().mean().backward()
    with count_collectives() as counts:
        found = source.culprit()
    source.remove()
    model(x).square().mean().backward()
    return [str(found), found.ranks, counts.total(), source.culprit()]


def test_all_ranks_with_a_bad_batch_are_listed_and_nothing_is_seen_after_remove():
    for found, ranks, collectives, after in run_ranks(of_several_ranks, 3):
        assert found.endswith(" on rank 1 has NaN in its gradient")
        assert found.startswith("last."), "the first that the backward came to"
        assert ranks == (1, 2)
        assert collectives == 3
        assert after is None


def past_the_hooks() -> str:
    """On rank 1 a module of FSDP2 is used by a method that no hook precedes."""
    model = wrapped("fsdp2")
    source = distclip.find_source(model)
    if dist.get_rank():
        source.remove()
    model(torch.ones(3, 6)).square().mean().backward()
    try:
        return str(source.culprit())
    except RuntimeError as error:
        return str(error)


def test_gradients_that_no_hook_saw_are_an_error_on_all_ranks():
    first, second = run_ranks(past_the_hooks, 2)
    assert first.startswith("find_source has not seen the gradients of another rank: ")
    assert second.startswith("find_source has not seen the gradients of first.weight, ")


def under_fsdp1() -> str:
    try:
        return str(distclip.find_source(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))))
    except NotImplementedError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fsdp1_is_refused_by_name():
    for said in run_ranks(under_fsdp1, 2):
        assert said.startswith("find_source cannot see gradients before FSDP1 reduces them")


def own_gradient(how: str) -> list[str]:
    """A NaN that one rank alone has: of an expert, of one copy after DDP, of both copies."""
    model = wrapped("ddp") if how != "expert" else nn.Linear(2, 2)
    layout = (lambda name, p: distclip.Layout(1)) if how == "expert" else None
    clipper = distclip.Clipper(model, 1.0, layout=layout)
    model(torch.ones(3, 2 if how == "expert" else 6)).square().mean().backward()
    if dist.get_rank() or how == "both copies":
        next(model.parameters()).grad.view(-1)[0] = torch.nan
    report = clipper.clip_()
    return [str(report.culprit), list(report.culprit.ranks), report.culprit.reduced]


def test_a_rank_is_blamed_where_the_gradient_is_its_own():
    for said, ranks, reduced in run_ranks(own_gradient, 2, "expert"):
        assert (said, ranks, reduced) == ("weight on rank 1 has NaN in its gradient", [1], False)
    for said, ranks, reduced in run_ranks(own_gradient, 2, "one copy"):
        assert (said, ranks, reduced) == ("first.weight on rank 1 has NaN in its gradient", [1], False)
    for said, ranks, reduced in run_ranks(own_gradient, 2, "both copies"):
        assert said.startswith("first.weight has NaN in its reduced gradient, held by ranks 0, 1; ")
        assert (ranks, reduced) == ([0, 1], True)
