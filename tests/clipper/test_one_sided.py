"""What only some ranks meet: an error, an argument, an old Clipper. All ranks end alike, none waits for another."""

from contextlib import nullcontext
from math import inf, nan
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.errors import FAILURES
from support.layouts import backward, build, ddp
from support.ranks import run_ranks, same_bits


def outcome(call: Any) -> Any:
    try:
        return call()
    except FAILURES as error:
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
    first, second = run_ranks(built, 2, "a wrong layout")
    assert first.startswith("LayoutError: layout says that 3 ranks hold ")
    assert second.startswith("LayoutError: a rank of the clipping group could not make its Clipper; ")
    assert "rank 0: stopped: layout says that 3 ranks hold" in second


def test_a_layout_that_no_rank_can_read_is_the_same_error_on_all():
    said = run_ranks(built, 2, "a wrong layout on all")
    assert said[0] == said[1]
    assert said[0].startswith("LayoutError: layout says that 3 ranks hold ")


def test_layout_given_on_one_rank_only_is_refused_at_construction():
    """The others would send two words where that one sends four: a norm of 0 there, and a hang here."""
    for said in run_ranks(built, 2, "layout on one rank"):
        assert said.startswith("ValueError: layout must be the same on every rank")
        assert "rank 1: layout not given; rank 0: layout given" in said


class Above:
    """A policy that is no dataclass."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def needs(self) -> tuple[()]:
        return ()

    def init(self, units: distclip.Units, device: torch.device) -> dict[str, torch.Tensor]:
        return {}

    def decide(self, statistics: distclip.Statistics, state: Any) -> Any:
        norm = statistics.norm()
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
    for said, norm in run_ranks(on_two_meshes, 4, first):
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
    for norm, said in run_ranks(plain_for_a_dtensor, 2, realigned):
        assert norm == pytest.approx(4.0 if realigned else 2.0)
        assert said.startswith("LayoutError: ")


def of_another_seed(kind: str) -> str:
    return outcome(lambda: distclip.Clipper(build(), Odd(dist.get_rank())) and "built")


class Odd(Above):
    """Its attributes are as a user's may be: another text on every rank, or a circle."""

    def __init__(self, rank: int) -> None:
        super().__init__(1.0)
        self.names, self.file, self.me = {f"name {rank}"}, object(), self


def test_what_may_differ_between_ranks_that_agree_is_not_compared():
    """Sets are in another order in every process, devices and files have the number of the rank."""
    assert run_ranks(of_another_seed, 2, "") == ["built"] * 2


# ---- gradients that torch itself refuses -------------------------------------------------------------------


def freed_on_rank_1() -> Any:
    model = ddp()
    clipper = distclip.Clipper(model, 1.0)
    backward(model)
    if dist.get_rank() == 1:
        next(model.parameters()).grad.untyped_storage().resize_(0)
    try:
        return clipper.clip_().norm.item()
    except (distclip.LayoutError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_gradient_whose_memory_was_freed_on_one_rank_leaves_none_waiting():
    first, second = run_ranks(freed_on_rank_1, 2)
    assert first.startswith("LayoutError: the ranks of the clipping group do not agree")
    assert "rank 1: stopped: " in first
    assert second.startswith("RuntimeError: ")


def lazy_dtensor(kind: str) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dtype = torch.complex64 if kind == "conjugated" else torch.float32
    whole = torch.randn(6, 4, dtype=dtype)
    model = nn.Module()
    model.w = nn.Parameter(distribute_tensor(torch.ones(6, 4, dtype=dtype), mesh, [Shard(0)]))
    local = distribute_tensor(whole, mesh, [Shard(0)]).to_local()
    if kind == "conjugated":
        local = local.conj() if dist.get_rank() == 0 else local.conj().resolve_conj()
    else:
        whole, local = torch.ones(6, 4), torch.ones(1, 1).expand(3, 4)
    model.w.grad = DTensor.from_local(local, mesh, [Shard(0)])
    norm = distclip.Clipper(model, 0.1).clip_().norm.item()
    return norm, torch.linalg.vector_norm(whole).item(), torch.linalg.vector_norm(model.w.grad.full_tensor()).item()


@pytest.mark.parametrize("kind", ["conjugated", "expanded"])
def test_a_dtensor_gradient_that_is_no_plain_memory_is_summed_and_scaled(kind):
    for norm, true, after in run_ranks(lazy_dtensor, 2, kind):
        assert norm == pytest.approx(true, rel=1e-6)
        assert after == pytest.approx(0.1, rel=1e-5)


def on_a_mesh_of_two() -> str:
    model = nn.Module()
    mesh = DeviceMesh("cpu", [0, 1])
    model.w = nn.Parameter(distribute_tensor(torch.ones(6, 3), mesh, [Shard(0)]))
    return outcome(lambda: distclip.Clipper(model, 1.0) and "built")


def test_a_parameter_that_some_ranks_hold_nothing_of_is_refused():
    """They counted as ranks that hold copies: the norm was too small by the root of 2."""
    said = run_ranks(on_a_mesh_of_two, 4)
    assert all(text.startswith("LayoutError: ") for text in said)
    assert "w lives on 2 ranks, and rank 2 is none of them" in said[2]


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


def with_the_state_of_a_new_one(ranks: tuple[int, ...], steps: int) -> list[Any]:
    """As torchft does before the first step: each rank of a replica group heals, or does not, by itself."""
    model = ddp()
    policy = distclip.AutoClip(percentile=50, window=4)
    new, clipper = distclip.Clipper(model, policy).state_dict(), distclip.Clipper(model, policy)
    for step in range(steps):
        backward(model, step)
        clipper.clip_()
        model.zero_grad()
    if dist.get_rank() in ranks:
        clipper.load_state_dict(new)
    backward(model, steps)
    return [outcome(lambda: clipper.clip_().max_norm) for _ in range(2)]


def test_the_state_of_a_new_clipper_may_be_loaded_into_one_on_some_ranks_alone():
    """It said that the ranks do not agree, where all had the same state."""
    results = [first for first, _ in run_ranks(with_the_state_of_a_new_one, 3, (1,), 0)]
    assert all(isinstance(first, torch.Tensor) for first in results)
    assert same_bits(results)
    for said, _ in run_ranks(with_the_state_of_a_new_one, 3, (1,), 1):
        assert "rank 1: step 0 of Clipper 2 after loading a state" in said


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
    for _ in range(2):
        with pytest.raises(distclip.LayoutError, match="since the Clipper was built: build it anew, after fully_shard"):
            clipper.step(optimizer) if call == "step" else clipper.clip_()
    assert same_bits([before, [p.detach() for p in model.parameters()]])


def part_of_a_sharded_model(keeps: bool) -> list[Any]:
    """A Clipper of one layer of what FSDP2 manages as a whole, whose unsharded copies show in the first step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=False)
    if keeps:
        net.set_reshard_after_backward(False)
    clipper, holders = distclip.Clipper(net[0], 0.1), list(net[0].parameters())
    net(torch.randn(4, 8)).square().mean().backward()
    if not keeps:
        with torch.no_grad():
            net(torch.randn(4, 8))
    true = torch.cat([p.grad.full_tensor().double().flatten() for p in holders]).norm().item()
    return [outcome(lambda: clipper.clip_().norm.item()), true]


@pytest.mark.parametrize("keeps", [True, False])
def test_unsharded_copies_are_no_other_parameters(keeps):
    for norm, true in run_ranks(part_of_a_sharded_model, 2, keeps):
        assert norm == pytest.approx(true, rel=1e-6)


# ---- functions whose plan fails ----------------------------------------------------------------------------


class Strange(torch.Tensor):
    """A subclass that refuses what it does not know."""

    def numel(self):
        raise TypeError("no numbers here")


def cut_unlike(mesh: DeviceMesh, by: Any) -> nn.Parameter:
    """A DTensor on ``mesh`` with a gradient."""
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, by))
    weight.grad = distribute_tensor(torch.ones(4, 4), mesh, by)
    return weight


def told(how: str, norm_type: float = 2.0) -> str:
    """What a function says where only the last rank has a reason of its own to fail."""
    size, last = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    whole, plain = init_device_mesh("cpu", (size,)), nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    sharded = cut_unlike(whole, [Shard(0)])
    model = ddp()
    backward(model)

    def lost(name: str, parameter: Any) -> distclip.Layout:
        return {}[name] if last else distclip.Layout(size)

    listed: list[Any] = [sharded, 3 if how == "no tensor" and last else plain]
    if how == "subclass" and last:
        listed = [sharded, plain.data.as_subclass(Strange)]
    if how == "of another mesh":  # on the last rank its placements say nothing that is known
        by = [Partial()] if last else [Replicate()]
        listed = [nn.Parameter(DTensor.from_local(torch.ones(3), whole, by, run_check=False), requires_grad=False)]
    if how == "norm of gradients":
        return outcome(lambda: str(distclip.get_total_norm([sharded.grad, "x" if last else plain.grad])))
    calls = {
        "layout": lambda: distclip.clip_grad_norm_(model.parameters(), 1.0, norm_type, layout=lost),
        "bound": lambda: distclip.clip_grad_norm_(listed, nan if last else 1.0, norm_type),
        "bound in a group": lambda: distclip.clip_grad_norm_(
            model, nan if last else 1.0, norm_type, group=dist.group.WORLD
        ),
        "order": lambda: distclip.clip_grad_norm_(listed, 1.0, -1.0 if last else norm_type),
    }
    return outcome(calls.get(how, lambda: str(distclip.clip_grad_norm_(listed, 1.0, norm_type))))


OWN = {
    "no tensor": "ValueError: parameters must be tensors or modules, got int",
    "subclass": "TypeError: no numbers here",
    "of another mesh": "LayoutError: parameter 0 of shape (3,) is placed as",
    "norm of gradients": "AttributeError: 'str' object has no attribute",
    "layout": "KeyError: ",
    "bound": "ValueError: max_norm must be",
    "bound in a group": "ValueError: max_norm must be",
    "order": "ValueError: norm_type must be",
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", OWN)
def test_a_function_that_fails_on_one_rank_before_it_has_a_plan_leaves_none_waiting(how, size):
    *others, last = run_ranks(told, size, how)
    assert last.startswith(OWN[how])
    for said in others:
        assert said.startswith("LayoutError: the ranks of the clipping group passed other parameters")
        assert f"; rank {size - 1}: stopped: " in said


@pytest.mark.parametrize("how", ["no tensor", "layout", "bound in a group"])
def test_the_same_where_maxima_travel(how):
    first, last = run_ranks(told, 2, how, inf)
    assert first.startswith("LayoutError: the ranks of the clipping group passed other parameters")
    assert last.startswith(OWN[how])


def on_meshes_that_do_not_tile() -> str:
    """FSDP2 over rank 0 alone, and over ranks 1 and 2: no plan on two ranks."""
    rank = dist.get_rank()
    meshes = DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1, 2])
    model = nn.Linear(4, 4 + (rank > 0))
    fully_shard(model, mesh=meshes[rank > 0])
    model(torch.ones(2, 4)).sum().backward()
    return outcome(lambda: str(distclip.clip_grad_norm_(model.parameters(), 1.0)))


def test_a_function_whose_plan_fails_on_some_ranks_leaves_none_waiting():
    first, *others = run_ranks(on_meshes_that_do_not_tile, 3)
    assert "; rank 1: stopped: parameter 0 of shape (5, 4) is cut into 2 pieces" in first
    assert all(said.startswith("LayoutError: parameter 0 of shape (5, 4) is cut into 2 pieces") for said in others)


def built_where_layout_raises() -> str:
    def lost(name: str, parameter: Any) -> distclip.Layout:
        return {}[name] if dist.get_rank() else distclip.Layout(2)

    return outcome(lambda: str(distclip.Clipper(build(), 1.0, layout=lost)))


def test_a_layout_that_raises_on_one_rank_leaves_none_waiting_for_its_clipper():
    first, second = run_ranks(built_where_layout_raises, 2)
    assert "rank 1: stopped: KeyError 'embed.weight'" in first
    assert second == "KeyError: 'embed.weight'"


class Raising(Above):
    """A policy that cannot make its state."""

    def init(self, units: distclip.Units, device: torch.device) -> dict[str, torch.Tensor]:
        raise OSError("disk")


WRONG = {
    "nonfinite": {"nonfinite": "no"},
    "skips": {"max_consecutive_skips": 0},
    "norm_type": {"norm_type": "x"},
    "no policy": {"policy": "x"},
    "below 0": {"policy": -1.0},
    "policy": {"policy": Raising(1.0)},
    "model": {"model": [3]},
    "layout": {"layout": lambda name, parameter: Path("/nowhere/layout").read_text()},
    "lacking": {"layout": lambda name, parameter: __import__("nowhere")},
}


def built_with_something_wrong(what: str, ranks: list[int]) -> list[str]:
    right = {"model": build(), "policy": 1.0}
    if what in ("layout", "lacking"):
        right["layout"] = lambda name, parameter: None
    settings = {**right, **WRONG[what]} if dist.get_rank() in ranks else right
    return [outcome(lambda each=each: str(distclip.Clipper(**each))) for each in (settings, right)]


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_on_one_rank_only_leaves_none_waiting_for_its_clipper(what):
    (told, after), (own, own_after) = run_ranks(built_with_something_wrong, 2, what, [1])
    assert told.startswith("LayoutError: a rank of the clipping group could not make its Clipper; ")
    assert "rank 1: stopped: " in told
    assert not own.startswith("LayoutError")
    assert after == own_after
    assert after.startswith("Clipper(")


def test_what_is_wrong_on_all_ranks_is_the_same_error_on_all_clippers():
    for said, after in run_ranks(built_with_something_wrong, 2, "norm_type", [0, 1]):
        assert said.startswith("ValueError: norm_type must be ")
        assert after.startswith("Clipper(")


def stepped_with_wrong_optimizers(what: str) -> list[str]:
    model = ddp()
    clipper, optimizer = distclip.Clipper(model, 1.0), torch.optim.SGD(model.parameters(), lr=0.1)
    wrong = {"none": [], "twice": [optimizer] * 2, "a list": [[optimizer]]}[what]
    said = []
    for given in (wrong if dist.get_rank() else [optimizer], [optimizer]):
        backward(model)
        said.append(outcome(lambda given=given: str(clipper.step(*given)) and "right"))
    return [*said, str(clipper.steps)]


@pytest.mark.parametrize("what", ["none", "twice", "a list"])
def test_wrong_optimizers_on_one_rank_only_leave_none_waiting_for_the_step(what):
    told, own = run_ranks(stepped_with_wrong_optimizers, 2, what)
    assert told[0].startswith("LayoutError: the ranks of the clipping group do not agree")
    assert "rank 1: stopped: step() " in told[0]
    assert own[0].startswith("ValueError: step() ")
    assert told[1:] == own[1:] == ["right", "1"]


def with_a_gradient_that_cannot_be_read(how: str, by: str) -> list[str]:
    """On the last rank, in the first of two calls: something raises that is neither of ours nor a RuntimeError."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    clipper, said = distclip.Clipper(model, 1.0), []
    call = clipper.clip_ if how == "clipper" else lambda: distclip.clip_grad_norm_(model, 1.0)
    for step in range(2):
        model.weight.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        failing = step == 0 and dist.get_rank() == dist.get_world_size() - 1
        with patch("distclip.plan.build.look", side_effect=OF_OTHERS[by]) if failing else nullcontext():
            said.append(outcome(lambda: "right" if call() is not None else ""))
    return said


OF_OTHERS = {"zip": ValueError("zip() argument 2 is longer"), "key": KeyError("w"), "subclass": TypeError("no numbers")}


@pytest.mark.parametrize("by", OF_OTHERS)
@pytest.mark.parametrize("how", ["clipper", "function"])
def test_any_exception_while_gradients_are_read_on_one_rank_leaves_none_waiting(how, by):
    *others, last = run_ranks(with_a_gradient_that_cannot_be_read, 3, how, by)
    assert last[0].startswith(f"{type(OF_OTHERS[by]).__name__}: ")
    for first, second in others:
        assert first.startswith("LayoutError: the ranks of the clipping group ")
        assert "; rank 2: stopped: " in first
        assert second == last[1]
    assert last[1] == "right"
