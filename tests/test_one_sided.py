"""What only some ranks meet: an error, an argument, an old Clipper. All ranks end alike, none waits for another."""

from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from layouts import backward, build, ddp
from ranks import run_ranks, same_bits


def outcome(call: Any) -> Any:
    try:
        return call()
    except (distclip.LayoutError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


# ---- construction ------------------------------------------------------------------------------------------


def built(how: str) -> str:
    model, rank = build(), dist.get_rank()
    layouts = {
        "a wrong layout": lambda name, p: distclip.Layout(3 if rank == 0 else 2),
        "a wrong layout on all": lambda name, p: distclip.Layout(3),
        "layout on one rank": (lambda name, p: None) if rank == 0 else None,
    }
    return outcome(lambda: str(distclip.Clipper(model, 1.0, layout=layouts[how])))


def test_a_layout_that_one_rank_cannot_read_is_an_error_on_all():
    first, second = run_ranks(built, 2, "a wrong layout", timeout=20)
    assert first.startswith("LayoutError: layout says that 3 ranks hold ")
    assert second.startswith("LayoutError: a rank of the clipping group could not make its Clipper; ")
    assert "rank 0: stopped: layout says that 3 ranks hold" in second


def test_a_layout_that_no_rank_can_read_is_the_same_error_on_all():
    said = run_ranks(built, 2, "a wrong layout on all", timeout=20)
    assert said[0] == said[1]
    assert said[0].startswith("LayoutError: layout says that 3 ranks hold ")


def test_layout_given_on_one_rank_only_is_refused_at_construction():
    """The others would send two words where that one sends four: a norm of 0 there, and a hang here."""
    for said in run_ranks(built, 2, "layout on one rank", timeout=20):
        assert said.startswith("ValueError: split_over or layout must be the same on every rank")
        assert "rank 1: split_over or layout not given; rank 0: split_over or layout given" in said


class Above:
    """A policy that is no dataclass."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def init(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {}

    def decide(self, norm: torch.Tensor, state: Any) -> Any:
        return distclip.Decision(torch.full_like(norm, inf), skip=norm > self.limit), state


class Inside(Above):
    """One that wraps another."""

    def __init__(self, limit: float) -> None:
        super().__init__(1.0)
        self.inner = Above(limit)


def of_policy(kind: type, differs: bool) -> str:
    limit = 100.0 if differs and dist.get_rank() == 1 else 1.0
    return outcome(lambda: distclip.Clipper(build(), kind(limit)) and "built")


@pytest.mark.parametrize("kind", [Above, Inside])
def test_policies_that_are_no_dataclasses_are_compared_by_what_they_hold(kind):
    for said in run_ranks(of_policy, 2, kind, True):
        assert "ValueError: policy must be the same on every rank" in said
        assert "limit=100.0" in said
    assert run_ranks(of_policy, 2, kind, False) == ["built"] * 2


# ---- realigning --------------------------------------------------------------------------------------------


def on_two_meshes(first: str) -> list[Any]:
    """`v` on pairs of ranks, `w` on all four. In the first step ranks 0 and 1 place the gradient of `v` differently."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    pair, rank = mesh["b"], dist.get_rank()
    whole = {"v": (pair, [Replicate()]), "w": (mesh, [Replicate(), Replicate()])}
    model = nn.Module()
    for name in (first, "w" if first == "v" else "v"):
        model.register_parameter(name, nn.Parameter(distribute_tensor(torch.ones(4), *whole[name])))
    clipper = distclip.Clipper(model, 1.0)
    ends = []
    for step in range(2):
        if step == 0 and rank == 1:
            model.v.grad = DTensor.from_local(torch.ones(2), pair, [Shard(0)], run_check=False)
        else:
            model.v.grad = DTensor.from_local(torch.ones(4), pair, [Partial()], run_check=False)
        model.w.grad = DTensor.from_local(torch.ones(4), mesh, [Replicate(), Partial()], run_check=False)
        ends.append(outcome(lambda: clipper.clip_().norm.item()))
    return ends


@pytest.mark.parametrize("first", ["v", "w"])
def test_ranks_of_one_mesh_that_disagree_leave_nobody_waiting_then_or_later(first):
    for said, norm in run_ranks(on_two_meshes, 4, first, timeout=25):
        assert said.startswith("LayoutError: ")
        assert norm == pytest.approx(32**0.5, rel=1e-6)


def plain_for_a_dtensor(realigned: bool) -> list[Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Module()
    model.w = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    clipper = distclip.Clipper(model, 1.0)
    ends = []
    for step in range(2):
        model.w.grad = None
        if step == 1 and dist.get_rank() == 0:
            model.w.grad = torch.ones(4)
        else:
            placements = [Partial() if realigned else Replicate()]
            model.w.grad = DTensor.from_local(torch.ones(4), mesh, placements, run_check=False)
        ends.append(outcome(lambda: clipper.clip_().norm.item()))
    return ends


@pytest.mark.parametrize("realigned", [False, True])
def test_a_plain_gradient_of_a_dtensor_on_one_rank_is_an_error_on_all(realigned):
    for norm, said in run_ranks(plain_for_a_dtensor, 2, realigned, timeout=20):
        assert norm == pytest.approx(4.0 if realigned else 2.0)
        assert said.startswith("LayoutError: ")


# ---- later -------------------------------------------------------------------------------------------------

_kept: list[distclip.Clipper] = []


def with_a_rival_on_rank_0() -> str:
    model = ddp()
    if dist.get_rank() == 0:
        _kept.append(distclip.Clipper(model.module, 1.0, group=dist.new_group([0], use_local_synchronization=True)))
    clipper = distclip.Clipper(model, 1.0)
    backward(model)
    try:
        return outcome(lambda: clipper.verify() or "proved")
    finally:
        _kept.clear()


def test_a_rival_that_one_rank_knows_of_is_an_error_on_all():
    first, second = run_ranks(with_a_rival_on_rank_0, 2)
    assert first.startswith("LayoutError: 1 other Clipper(s) hold parameters")
    assert second.startswith("LayoutError: ")
    assert "rank 0: stopped: 1 other Clipper(s)" in second


def with_another_state_on(ranks: tuple[int, ...]) -> list[Any]:
    """Two steps, then the state of another run on some of the ranks."""
    model = ddp()
    clipper = distclip.Clipper(model, distclip.AutoClip(percentile=50, window=4))
    for step in range(2):
        backward(model, step)
        clipper.clip_()
        model.zero_grad()
    if dist.get_rank() in ranks:
        state = clipper.state_dict()
        state["policy"] = {
            name: value * 2 if value.is_floating_point() else value for name, value in state["policy"].items()
        }
        clipper.load_state_dict(state)
    backward(model, 2)
    return [outcome(lambda: clipper.clip_().max_norm) for _ in range(2)]


def test_a_policy_state_that_one_rank_has_loaded_is_an_error_on_all():
    """The ranks would decide differently, in silence."""
    for said, _ in run_ranks(with_another_state_on, 3, (1,)):
        assert "LayoutError: the ranks of the clipping group do not agree" in said
        assert "rank 1: step 2 after loading a state" in said
    results = run_ranks(with_another_state_on, 3, (0, 1, 2))
    assert same_bits([first for first, _ in results])
    assert all(isinstance(first, torch.Tensor) for first, _ in results)


# ---- a model that is another one by now --------------------------------------------------------------------


def sharded_too_late() -> list[str]:
    model = nn.Linear(4, 2)
    clipper = distclip.Clipper(model, 0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(2, 4)).sum().backward()
    return [
        outcome(lambda: clipper.step(optimizer)),
        outcome(lambda: distclip.Clipper(model, 0.1).step(optimizer).norm.item()),
    ]


def test_a_clipper_built_before_fully_shard_is_refused():
    """It clipped parameters that nobody steps: norm 0, and the step went through unclipped."""
    for said, norm in run_ranks(sharded_too_late, 2):
        assert said.startswith("LayoutError: the model has another weight since the Clipper was built")
        assert norm > 1


@pytest.mark.parametrize("how", ["assigned", "grown", "shrunk"])
@pytest.mark.parametrize("call", ["step", "clip_"])
def test_a_clipper_built_before_its_parameters_were_replaced_is_refused(how, call):
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    clipper = distclip.Clipper(model, 0.1)
    if how == "assigned":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    elif how == "grown":
        model.append(nn.Linear(2, 1))
    else:
        del model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(distclip.LayoutError, match="since the Clipper was built: build it after fully_shard"):
        clipper.step(optimizer) if call == "step" else clipper.clip_()
    assert same_bits([before, [p.detach() for p in model.parameters()]])
