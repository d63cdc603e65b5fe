"""Copies of gradients that came apart where no bits are compared: in calls 1, 2, 4, ... of a Clipper every rank raises,
else in the next call. What bits tell is tested in test_drift.py.
"""

import gc
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import distclip
from distclip.layouts.piece import local_tensor
from support.layouts import backward, build, ddp, fsdp2
from support.ranks import count_collectives, run_ranks
from support.roads import ROADS
from support.samples import crossed

pytestmark = pytest.mark.filterwarnings("ignore:copies of gradients differ:RuntimeWarning")
HOST, DEVICE = ROADS


def changed(layout: Any, by: float, road: str, norm_type: float = 2.0, fused: bool = True) -> dict[str, Any]:
    """Six steps; before the third, one element on the last rank is multiplied. What each call came to."""
    model = layout()
    make = partial(AdamW, fused=True) if fused else SGD
    optimizer = make(model.parameters(), lr=0.1)
    called, collectives = [], []
    clipper = ROADS[road](model, 0.1, norm_type=norm_type, on_drift="ignore")
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            gradient = local_tensor(next(model.parameters()).grad).view(-1)
            gradient[gradient.abs().argmax()] *= by
        with count_collectives() as counts:
            try:
                clipper.step(optimizer)
                called.append("stepped")
            except distclip.LayoutError as error:
                called.append(str(error))
        collectives.append(counts.total())
    return {"called": called, "collectives": collectives}


@pytest.mark.parametrize(("by", "norm_type"), [(1e3, 2.0), (1e3, inf), (1e3, 1.0), (1.5, 2.0), (0.5, 1.0)])
def test_all_ranks_raise_in_the_next_call_and_name_who_differs(by, norm_type):
    results = run_ranks(changed, 3, ddp, by, HOST, norm_type)
    for result in results:
        called = result["called"]
        assert called[:3] + called[4:] == ["stepped"] * 5  # the call after the error is free again
        rank_2 = "step 3, " if norm_type == inf else "stopped: copies of gradients differ"  # its own is the largest
        assert re.search(rf"; rank 2: {rank_2}.*; rank 0: stopped: copies of gradients differ .* step 2", called[3])
        assert result["collectives"][:3] == [2, 2, 1]


@pytest.mark.parametrize("fused", [True, False])
def test_on_accelerators_too_without_a_wait(fused):
    results = run_ranks(changed, 2, ddp, 1e3, DEVICE, 2.0, fused)
    for result in results:
        assert result["called"][:3] == ["stepped"] * 3
        assert "copies of gradients differ between ranks since step 2" in result["called"][3]
        assert result["collectives"][:3] == [2, 2, 1]


def test_what_the_accuracy_of_a_norm_may_hide_is_no_error():
    for road in (HOST, DEVICE):
        assert [r["called"] for r in run_ranks(changed, 2, ddp, 1 + 1e-7, road)] == [["stepped"] * 6] * 2


def by_function(others: int) -> list[str]:
    """The same of the function, which is called for ``others`` other models in between."""
    gc.collect()  # modules of other tests that go meanwhile would take plans with them
    model = ddp()
    called = []
    for step in range(3):
        backward(model, step)
        if step == 1 and dist.get_rank() == 1:
            next(model.parameters()).grad.mul_(2)
        for other in [build() for _ in range(others)]:
            backward(other, step)
            distclip.clip_grad_norm_(other.parameters(), 1.0)
        try:
            distclip.clip_grad_norm_(model.parameters(), 1.0, group=dist.group.WORLD)
            called.append("clipped")
        except distclip.LayoutError as error:
            called.append(str(error))
    return called


@pytest.mark.parametrize("others", [0, 3])
def test_a_function_hears_of_it_in_its_next_call(others):
    for first, second, third in run_ranks(by_function, 3, others):
        assert [first, second] == ["clipped"] * 2
        assert "copies of gradients differ between ranks since the call before" in third
        assert "; rank 1: stopped: copies" in third


def test_shards_differ_as_they_must():
    assert [r["called"] for r in run_ranks(changed, 2, fsdp2, 1.0, HOST)] == [["stepped"] * 6] * 2


def experts_on_one_rank_alone() -> list[float]:
    """All hold the net; rank 1 holds an expert beside it, and rank 0, which does not, must not miss its part."""
    model, net = build(), build()
    if dist.get_rank() == 1:
        model.expert = nn.Linear(3, 3)
    clipper = distclip.Clipper(model, 1.0, layout=lambda name, _: distclip.Layout(1) if "expert" in name else None)
    norms = []
    for _ in range(2):
        model.zero_grad()
        net.zero_grad()
        backward(net, 0)
        for parameter, copy in zip(model.parameters(), net.parameters(), strict=False):
            parameter.grad = copy.grad.clone()
            dist.all_reduce(parameter.grad)
        if dist.get_rank() == 1:
            model.expert(torch.ones(3)).sum().backward()
        norms.append(clipper.clip_().norm.item())
    return norms


def test_a_rank_that_holds_copies_alone_beside_one_that_holds_more_is_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first, second), other = run_ranks(experts_on_one_rank_alone, 2)
    assert (first, second) == tuple(other)
    assert min(first, second) > 3  # the expert's part is in it


def looked_at_and_loaded(how: str) -> str:
    model = ddp()
    clipper = distclip.Clipper(model, 1.0, on_drift="ignore")
    state = clipper.state_dict()
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        if step < 2:
            clipper.clip_()
    if dist.get_rank() == 0:
        next(model.parameters()).grad.mul_(2)
    if how == "measured":
        clipper.measure()  # looks at gradients that may not be reduced yet, and leaves nothing behind
    else:
        clipper.clip_()
    if how == "loaded":
        clipper.load_state_dict(state)
    try:
        clipper.measure()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_measure_hears_of_it_and_a_loaded_state_knows_nothing_of_it():
    assert run_ranks(looked_at_and_loaded, 2, "measured") == ["no error"] * 2
    assert run_ranks(looked_at_and_loaded, 2, "loaded") == ["no error"] * 2
    for said in run_ranks(looked_at_and_loaded, 2, "clipped"):
        assert "copies of gradients differ between ranks since step 2" in said


def last_call(by: float) -> list[str]:
    """The warnings of one call whose gradients, on rank 1, are ``by`` times those of the others."""
    model = ddp()
    clipper = distclip.Clipper(model, 0.1, on_drift="ignore")
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        if step < 2:
            clipper.clip_()
    if dist.get_rank() == 1:
        for parameter in model.parameters():
            parameter.grad.mul_(by)
    with warnings.catch_warnings(record=True, action="always") as warned:
        clipper.step(SGD(model.parameters(), lr=0.1))
    return [str(warning.message) for warning in warned]


def test_a_last_call_whose_gradients_differ_is_not_silent():
    for (said,) in run_ranks(last_call, 3, 1e3):
        assert "copies of gradients differ between ranks since step 2, and here had a norm of" in said
        assert said.endswith("The next call raises on every rank")
    assert run_ranks(last_call, 2, 1.0) == [[], []]


# ---- the first call, and calls 2, 4, 8, ... ------------------------------------------------------------------


class Reducing(SGD):
    """An optimizer that reduces gradients in its own step(), as nanochat's does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        return super().step(closure)


def said_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def before_it_is_reduced(how: str) -> list[Any]:
    """What the first two steps say, and whether parameters are what they were."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    if how == "no_sync":
        model = DistributedDataParallel(model)
    optimizer = (SGD if how == "no_sync" else Reducing)(model.parameters(), lr=0.1)
    if how == "attached":
        distclip.attach(optimizer, model, 1.0)
        step = optimizer.step
    else:
        step = partial(distclip.Clipper(model, 1.0).step, optimizer)
    before, said = [p.detach().clone() for p in model.parameters()], []
    for _ in range(2):
        optimizer.zero_grad()
        with model.no_sync() if how == "no_sync" else nullcontext():
            model(torch.randn(4, 8) + dist.get_rank()).square().sum().backward()
        said.append(said_by(step))
    return [*said, all(map(torch.equal, before, (p.detach() for p in model.parameters())))]


@pytest.mark.parametrize(("how", "size"), crossed(["clipper", "attached", "no_sync"], [2, 4]))
def test_an_optimizer_that_reduces_or_a_forgotten_reduction_is_an_error_in_the_first_call(how, size):
    for first, second, untouched in run_ranks(before_it_is_reduced, size, how):
        assert "ranks that should hold the same gradient do not: " in first
        assert "weight" in first
        assert first == second
        assert untouched


def experts_alike(declared: bool, cut: bool) -> list[Any]:
    """Experts of one rank, or of two where they are ``cut`` by FSDP2, that start alike, beside FSDP2 parameters."""
    torch.manual_seed(0)
    model = nn.Module()
    model.dense, model.expert = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    size = dist.get_world_size()
    if cut:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("ep", "dp"))
        fully_shard(model.expert, mesh=mesh["dp"])
    fully_shard(model.dense)
    here = 10.0 if dist.get_rank() >= size // 2 else 1.0
    layout = (lambda name, p: distclip.Layout(1) if "expert" in name else None) if declared else None
    clipper = distclip.Clipper(model, 1.0, layout=layout)
    (here * model.expert(model.dense(torch.ones(2, 4))).sum()).backward()
    squares = sum(local_tensor(p.grad).double().square().sum() for p in model.parameters())
    dist.all_reduce(squares)
    norms: list[float] = []
    return [said_by(lambda: norms.append(clipper.clip_().norm.item())), norms, squares.sqrt().item()]


@pytest.mark.parametrize("cut", [False, True])
def test_experts_that_start_alike_and_are_taken_for_copies_are_an_error_in_the_first_call(cut):
    """NeMo Automodel#3816: the norm was 20 to 30 % too small on every step."""
    for said, norms, _ in run_ranks(experts_alike, 4 if cut else 2, False, cut):
        assert said.startswith("ranks that should hold the same gradient do not: expert.weight; ")
        assert "layout=lambda name, p: distclip.Layout(1) if ... else None" in said
        assert norms == []
    for said, norms, true in run_ranks(experts_alike, 4 if cut else 2, True, cut):
        assert said == "no error"
        assert norms == [pytest.approx(true, rel=1e-6)]


class ByHand(nn.Module):
    """Tensor parallelism by hand: a column and a row of a layer, reduced once, between norm layers that all share."""

    def __init__(self, group: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.norm.weight, 1.0, 0.1)
        torch.manual_seed(seed)
        self.column, self.row = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm(x)
        seen.register_hook(lambda g: functional_all_reduce(g, self.group))
        return functional_all_reduce(self.row(self.column(seen).relu()), self.group, keep=True)


def functional_all_reduce(x: torch.Tensor, group: Any, keep: bool = False) -> torch.Tensor:
    """The sum over ``group``; ``keep``: with the gradient of the identity, as Megatron's reduce."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return x + (total - x).detach() if keep else total


def by_hand(fsdp: bool, how: str) -> list[Any]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"]
    model = ByHand(tp.get_group(), 1 + tp.get_local_rank())
    if fsdp:
        fully_shard(model, mesh=mesh["dp"])
    layout = None
    if how == "declared":
        replicas = 2 if fsdp else size  # of the norm's elements
        layout = lambda name, p: distclip.Layout(replicas) if "norm" in name else None  # noqa: E731
    clipper = distclip.Clipper(model, 1.0, split_over=[tp], layout=layout)
    torch.manual_seed(7)
    model(torch.randn(4, 8)).square().sum().backward()
    squares = 0.0
    for name, p in model.named_parameters():
        part = local_tensor(p.grad).double().square().sum() / (1 if fsdp else size // 2)
        dist.all_reduce(part)
        squares += part.item() / (2 if "norm" in name else 1)
    before = [local_tensor(p.grad).clone() for p in model.parameters()]
    norms: list[float] = []
    said = said_by(lambda: norms.append(clipper.clip_().norm.item()))
    untouched = all(map(torch.equal, before, (local_tensor(p.grad) for p in model.parameters())))
    return [said, norms, squares**0.5, untouched]


@pytest.mark.parametrize(("fsdp", "size"), [(False, 2), (True, 4)])
def test_norm_layers_that_split_over_counts_twice_are_an_error_in_the_first_call(size, fsdp):
    for said, norms, _, untouched in run_ranks(by_hand, size, fsdp, "undeclared"):
        assert "gradients are not counted once: " in said
        assert "norm." in said
        assert "norm layers that tensor-parallel ranks share" in said
        assert norms == []
        assert untouched
    for said, norms, true, _ in run_ranks(by_hand, size, fsdp, "declared"):
        assert said == "no error"
        assert norms == [pytest.approx(true, rel=1e-6)]


def stages_alike() -> list[Any]:
    """Stages whose parameters have the same names and start with the same values, as one seed on all ranks gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    clipper = distclip.Clipper(model, 1.0, split_over=[dist.group.WORLD])
    said = []
    for step in range(4):
        model.zero_grad()
        (model(torch.ones(2, 8) * torch.arange(8)) * (step + dist.get_rank())).sum().backward()
        said.append(said_by(clipper.clip_))
    return said


def test_stages_that_start_alike_are_not_taken_for_copies():
    assert run_ranks(stages_alike, 2) == [["no error"] * 4] * 2


class Stream(nn.Module):
    """Blocks of a stage that add to one stream, whose last biases start at zero: parallel, or behind a zero weight."""

    def __init__(self, parallel: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.parallel = parallel
        for layer in (self.left, self.right):
            nn.init.zeros_(layer.bias)
            if not parallel:
                nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x).tanh()
        if self.parallel:
            return x + self.left(y) + self.right(x.sin())
        x = x + self.left(y)
        return x + self.right(self.inner(x).sin())


def twins_on_stages(parallel: bool) -> list[Any]:
    """Two stages, of which every rank runs both and keeps the gradients of its own."""
    stages = [Stream(parallel, seed) for seed in (1, 2)]
    mine = stages[dist.get_rank()]
    optimizer = SGD(mine.parameters(), lr=0.1)
    clipper, came = distclip.Clipper(mine, 1.0, split_over=[dist.group.WORLD]), []
    others = SGD(stages[1 - dist.get_rank()].parameters(), lr=0.0)
    for step in range(5):
        torch.manual_seed(step)
        stages[1](stages[0](torch.randn(4, 8))).square().sum().backward()
        squares = sum(p.grad.double().square().sum() for p in mine.parameters())
        dist.all_reduce(squares)
        norms: list[float] = []
        said = said_by(lambda norms=norms: norms.append(clipper.step(optimizer).norm.item()))
        came.append((said, norms, [pytest.approx(squares.sqrt().item(), rel=1e-6)]))
        for each in (optimizer, others):
            each.zero_grad()
    return [(said, norms == want) for said, norms, want in came]


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel blocks", "zero weights"])
def test_biases_of_one_stream_are_no_copies(parallel):
    assert run_ranks(twins_on_stages, 2, parallel) == [[("no error", True)] * 5] * 2


def zero_branches(dtype: torch.dtype, alone: bool) -> list[tuple[str, str]]:
    """What verify() and clip_() say of two stages of two blocks that begin as the identity, and to bf16 stay it.

    ``alone``: the biases that are added to the stream, equal so far, are said to be on one rank each.
    """
    rank = dist.get_rank()
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to(dtype) for _ in range(4)]
    for block in blocks:
        nn.init.zeros_(block[-1].weight)
        nn.init.zeros_(block[-1].bias)
    model = nn.ModuleDict({str(k): block for k, block in enumerate(blocks) if k // 2 == rank})
    optimizer = torch.optim.AdamW([p for block in blocks for p in block.parameters()], lr=1e-6)
    layout = (lambda name, p: distclip.Layout(1) if name.endswith("3.bias") else None) if alone else None
    clipper, came = distclip.Clipper(model, 1e9, split_over=[dist.group.WORLD], layout=layout), []
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(4, 8).to(dtype)
        for block in blocks:
            x = x + block(x)
        x.square().sum().backward()
        came.append((said_by(clipper.verify), said_by(clipper.clip_)))
        optimizer.step()
        optimizer.zero_grad()
    return came


def test_what_is_equal_while_branches_are_zero_is_an_error_that_says_what_to_write():
    """Nothing tells these biases from copies, and an error is better than a wrong norm."""
    for (verified, _), (_, clipped), *_ in run_ranks(zero_branches, 2, torch.bfloat16, False):
        for said in (verified, clipped):
            assert "gradients are not counted once: on rank 0 0.3.bias (2x), 1.3.bias (2x)" in said
            assert "equal only while branches behind them are zero: Layout(1), and verify() once they differ" in said
    for came in run_ranks(zero_branches, 2, torch.bfloat16, True):
        assert [clipped for _, clipped in came] == ["no error"] * 4
    for came in run_ranks(zero_branches, 2, torch.float32, True):
        assert [verified for verified, _ in came[1:]] == ["no error"] * 3
        assert [clipped for _, clipped in came] == ["no error"] * 4


def uniform_on_stages() -> list[str]:
    """Pipeline stages cut by FSDP2, with a loss that gives all elements of a bias the same gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(1 + mesh["pp"].get_local_rank())
    model = fully_shard(nn.Linear(8, 8), mesh=mesh["dp"])
    clipper = distclip.Clipper(model, 1.0, split_over=[mesh["pp"]])
    (model(torch.randn(4, 8)) * (1 + mesh["pp"].get_local_rank())).sum().backward()
    return [said_by(clipper.verify), said_by(clipper.clip_)]


def test_equal_shards_of_one_bias_are_no_copies():
    assert run_ranks(uniform_on_stages, 4) == [["no error"] * 2] * 4


def tied_beside_many(small: int) -> str:
    """A weight on two stages whose gradient was summed by hand, beside many smaller ones of each stage."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"embed": torch.randn(40, 8)})
    torch.manual_seed(1 + dist.get_rank())
    model.update({f"small{k}": torch.randn(4) for k in range(small)})
    clipper = distclip.Clipper(model, 1.0, split_over=[dist.group.WORLD])
    for p in model.values():
        p.grad = torch.randn_like(p)
    dist.all_reduce(model["embed"].grad)
    return said_by(clipper.clip_)


@pytest.mark.parametrize("small", [3, 300])
def test_a_weight_tied_across_stages_is_seen_beside_any_number_of_others(small):
    for said in run_ranks(tied_beside_many, 2, small):
        assert "gradients are not counted once: on rank 0 embed (2x)" in said


def never_reduced(kind: str) -> list[str]:
    """Gradients of each rank's own whose norms, or the sum of whose differences, are alike."""
    rank = dist.get_rank()
    model = nn.ParameterDict({"weight": torch.ones(3, 4), "scale": torch.ones(1)})
    clipper = distclip.Clipper(model, 1.0)
    torch.manual_seed(rank)
    weight, scale = torch.randn(3, 4), torch.ones(1)
    if kind == "signs":
        weight = weight.sign()
    elif kind == "normalised":
        weight /= weight.norm()
    elif kind == "one element":
        weight, scale = torch.zeros(3, 4), torch.ones(1) * (-1) ** rank
    else:  # those of the others add up to twice that of the first
        weight = torch.ones(3, 4) * (2.0, 1.0, 3.0)[rank]
    model["weight"].grad, model["scale"].grad = weight, scale
    return [said_by(clipper.clip_), said_by(clipper.verify)]


@pytest.mark.filterwarnings("ignore:copies of gradients differ")
@pytest.mark.parametrize(
    ("kind", "size"), [("signs", 2), ("signs", 4), ("normalised", 2), ("one element", 2), ("differences cancel", 3)]
)
def test_copies_that_differ_and_have_equal_norms_are_an_error_in_the_first_call(kind, size):
    for clipped, verified in run_ranks(never_reduced, size, kind):
        assert clipped.startswith("ranks that should hold the same gradient do not: ")
        assert verified.startswith("ranks that should hold the same gradient do not: ")


def trains_apart(grouped: bool) -> str:
    """Local SGD: each rank trains a copy for itself, and they are averaged now and then."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    clipper = distclip.Clipper(model, 1.0, group=alone if grouped else None)
    model(torch.randn(4, 8) + dist.get_rank()).square().sum().backward()
    return said_by(clipper.clip_)


def test_ranks_that_train_apart_are_told_to_say_their_group():
    for said in run_ranks(trains_apart, 2, False):
        assert "group=... for ranks that train apart (local SGD, DiLoCo)" in said
    assert run_ranks(trains_apart, 2, True) == ["no error"] * 2


def called_often(
    apart_in: int, bad: tuple[int, ...], load_after: int = 99, model: Any = ddp, on_drift: Any = "warn"
) -> list[Any]:
    """What each of nine calls came to: its collectives, or the first words of its error."""
    model = model()
    clipper, came = distclip.Clipper(model, 1.0, on_drift=on_drift), []
    for call in range(1, 10):
        model.zero_grad()
        backward(model, call)
        first = next(model.parameters()).grad
        if call == apart_in and dist.get_rank() == 0:
            local_tensor(first).mul_(2)
        if call in bad:
            local_tensor(first).fill_(inf)
        with count_collectives() as counts:
            said = said_by(clipper.clip_)
        came.append(counts.total() if said == "no error" else said.partition(": ")[0].partition(" after")[0])
        if call == load_after:
            clipper.load_state_dict(clipper.state_dict())
    return came


APART = "ranks that should hold the same gradient do not"
DRIFTED = "copies of gradients have drifted apart in step "
OFTEN = pytest.mark.parametrize("on_drift", ["ignore", "warn", "raise"])


@OFTEN
def test_copies_are_compared_in_calls_1_2_4_and_8(on_drift):
    came = [2, 2, 1, 2, 1, 1, 1, APART if on_drift == "ignore" else DRIFTED + "7", 2]  # and until it goes well
    assert run_ranks(called_often, 2, 8, (), 99, ddp, on_drift) == [came] * 2


def test_a_norm_that_is_not_finite_leaves_the_comparison_to_the_next_call():
    came = run_ranks(called_often, 2, 3, (1, 2))
    assert came[0] == came[1]
    assert came[0][2] == APART


@OFTEN
def test_copies_are_compared_anew_after_a_state_was_loaded(on_drift):
    came = [2, 2, 1, 2, 1, APART if on_drift == "ignore" else DRIFTED + "5", 2, 1, 2]
    assert run_ranks(called_often, 2, 6, (), 5, ddp, on_drift) == [came] * 2


def test_where_there_are_no_copies_nothing_is_compared():
    assert run_ranks(called_often, 2, 99, (), 99, fsdp2) == [[1] * 9] * 2


def nearly_equal(kind: str) -> str:
    """Copies of a gradient as kernels that add in any order leave them."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    model = nn.ParameterDict({"big": torch.ones(100, dtype=dtype), "small": torch.ones(1, dtype=dtype)})
    model["big"].grad, model["small"].grad = torch.ones(100, dtype=dtype), torch.ones(1, dtype=dtype)
    if dist.get_rank():
        if kind == "noise around 0":  # a key's bias: what is left of a sum that is zero
            model["small"].grad.fill_(2e-7)
        else:
            model["small"].grad.mul_(1 + torch.finfo(dtype).eps)
    elif kind == "noise around 0":
        model["small"].grad.fill_(1e-7)
    return said_by(distclip.Clipper(model, 1.0).clip_)


@pytest.mark.filterwarnings("ignore:copies of gradients differ")
@pytest.mark.parametrize("kind", ["bf16", "fp32", "noise around 0"])
def test_the_last_bits_of_copies_may_differ(kind):
    assert run_ranks(nearly_equal, 2, kind) == ["no error"] * 2


def beside_whole_numbers() -> str:
    model = nn.Linear(4, 2)
    model.quantised = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    model.weight.grad = torch.ones(2, 4) * (1 + dist.get_rank())
    return said_by(distclip.Clipper(model, 1.0).clip_)


def test_frozen_whole_numbers_are_no_reason_to_fail():
    for said in run_ranks(beside_whole_numbers, 2):
        assert said.startswith("ranks that should hold the same gradient do not: weight; ")
