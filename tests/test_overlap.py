"""`Clipper(overlap=True)`: sums of the backward are used where they still hold, never where they do not.

What accelerators do runs here too, on the CPU: gradients are taken for a device's, and Triton interprets the kernels.
"""

import gc
import os
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from math import inf
from threading import Lock
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.early import OnDevice, Seen
from distclip.group import ClippingGroup
from distclip.kernels import triton
from distclip.measured import NOTHING
from distclip.model import held_in
from distclip.plan import Plan
from oracle import true_norm
from ranks import count_collectives, run_ranks, same_bits

HOST = "host"
DEVICE = pytest.param(
    "device",
    marks=pytest.mark.skipif(
        find_spec("triton") is None or find_spec("numpy") is None,
        reason="Triton and numpy are not installed (CPU builds of torch bring neither): pip install triton numpy",
    ),
)
on_host_and_device = pytest.mark.parametrize("where", [HOST, DEVICE])


def on(where: str, fn, size: int, *args) -> list:
    """What `fn` returns on `size` ranks, whose gradients lie on the host, or are treated as a device's."""
    if where == HOST:
        return run_ranks(fn, size, *args)
    return run_ranks(partial(as_on_a_device, fn), size, *args, fresh=True)


def as_on_a_device(fn, *args):
    os.environ |= {"TRITON_INTERPRET": "1", "DISTCLIP_TRITON": "1"}  # of a process of its own
    for name in [name for name in sys.modules if name.startswith("triton") and not name.startswith("triton._C")]:
        del sys.modules[name]  # torch has imported it, and it decides at its import whether it interprets
    planned, take, one_by_one = Plan.of, OnDevice.take, Lock()

    def taken(*given):
        with one_by_one:  # DDP calls hooks on several threads of Gloo, and the interpreter knows only one
            return take(*given)

    with (
        patch.object(Plan, "of", lambda *given, **named: replace(planned(*given, **named), on_host=False)),
        patch.object(OnDevice, "take", taken),
    ):
        return fn(*args)


class Net(nn.Module):
    """Layers of uneven sizes; the last is used only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.spare = nn.Linear(7, 7)

    def forward(self, x, spare=False):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.spare(x) if spare else x


def ddp() -> nn.Module:
    return DistributedDataParallel(
        Net(), gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=0.0005
    )


def fsdp2() -> nn.Module:
    net = Net()
    for layer in [*net.layers, net.spare]:
        fully_shard(layer)
    return fully_shard(net)


def backward(model, seed: int, scale: float = 30.0, spare: bool = False) -> None:
    rows = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * seed + dist.get_rank()))
    (scale * model(rows, spare=spare).square().mean()).backward()


def whole(model) -> list[torch.Tensor]:
    """The true gradients: averaged by DDP, gathered from FSDP2."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def summed_after(clipper) -> int:
    """How many gradients the next measurement has to sum again."""
    gradients = [holder.grad for holder in clipper._holders]
    return sum(g is not None for g in gradients) - len(clipper._overlap.taken(gradients).sources)


def ordinary_steps(make, p: float) -> list[dict]:
    torch.manual_seed(0)
    model = make()
    clipper = distclip.Clipper(model, 1.0, norm_type=p, overlap=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seen = []
    for step in range(5):
        with count_collectives() as during:
            backward(model, step, scale=30.0 if step % 2 else 1e-4, spare=True)
        oracle, again = true_norm(whole(model), p), summed_after(clipper)
        with count_collectives() as counts:
            report = clipper.step(optimizer)
        seen.append({"norm": report.norm, "oracle": oracle, "again": again, "coef": report.coef.item()})
        seen[-1] |= {"during": dict(during), "counts": dict(counts)}
        optimizer.zero_grad()
    return seen


@on_host_and_device
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("make", [ddp, fsdp2])
def test_ordinary_steps_sum_nothing_after_the_backward(make, p, where):
    results = on(where, ordinary_steps, 2, make, p)
    assert same_bits([[s["norm"] for s in r] for r in results])
    for step, s in enumerate(results[0]):
        assert s["norm"].item() == pytest.approx(s["oracle"], rel=2e-7)
        assert (s["coef"] < 1) == (step % 2 == 1)
        assert s["again"] == 0
        assert s["counts"] == {"allreduce": 2 if make is ddp and step + 1 in (1, 2, 4) else 1}, "copies are compared"


def collectives_of_a_backward(make, overlap: bool) -> dict[str, int]:
    torch.manual_seed(0)
    model = make()
    clipper = distclip.Clipper(model, 1.0, overlap=overlap)
    backward(model, 0)
    with count_collectives() as counts:
        backward(model, 1)
    assert clipper.measure().norm > 0
    return dict(counts)


@pytest.mark.parametrize("make", [ddp, fsdp2])
def test_no_hook_talks(make):
    assert run_ranks(collectives_of_a_backward, 2, make, True) == run_ranks(collectives_of_a_backward, 2, make, False)


def unusual_steps(make) -> list[tuple[str, torch.Tensor, float]]:
    """Each: what was done, the norm we report, and the oracle."""
    torch.manual_seed(0)
    model = make()
    clipper = distclip.Clipper(model, 1.0, overlap=True)
    seen = []

    def check(name: str) -> None:
        seen.append((name, clipper.measure().norm, true_norm(whole(model))))

    def clear() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    backward(model, 0)
    check("first")
    backward(model, 1)
    check("accumulated")
    clear()
    backward(model, 2, spare=True)
    check("a layer that was not used before")
    clear()
    backward(model, 3)
    check("a layer that is not used any more")
    with torch.no_grad():
        gradient = next(iter(model.parameters())).grad
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(1000.0)
    check("changed in place")
    clear()
    backward(model, 3)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients[1::2]:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).data.mul_(3.0)
    check("changed in place, and no version with it")
    clear()
    backward(model, 4)
    parameter = list(model.parameters())[1]
    parameter.grad = parameter.grad * 50.0
    check("replaced")
    clear()
    backward(model, 5)
    clipper.clip_()
    check("clipped")
    backward(model, 6)
    check("accumulated on what was clipped")
    clear()
    backward(model, 7)
    list(model.parameters())[2].grad = None
    check("one taken away")
    if make is ddp:
        clear()
        with model.no_sync():
            backward(model, 8)
        backward(model, 9)
        check("no_sync, then a backward that reduces")
    return seen


@on_host_and_device
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", [ddp, fsdp2])
def test_what_changed_since_is_summed_again(make, size, where):
    results = on(where, unusual_steps, size, make)
    for name, norm, oracle in results[0]:
        assert norm.item() == pytest.approx(oracle, rel=2e-7), name
    assert same_bits([[norm for _, norm, _ in r] for r in results])


def interrupted() -> list[tuple[torch.Tensor, float]]:
    """A backward that stopped half way leaves some of a block's hooks called: the first of it, or the last."""
    torch.manual_seed(0)
    model = fsdp2()
    clipper = distclip.Clipper(model, 1.0, overlap=True)
    backward(model, 0, spare=True)
    seen = []
    for seed, end in ((1, 0), (2, -1)):
        for block in list(clipper._overlap._blocks):
            clipper._overlap.arrived(block, block[end])
        backward(model, seed, spare=True)
        seen.append((clipper.measure().norm, true_norm(whole(model))))
    return seen


@on_host_and_device
def test_a_backward_that_stopped_half_way_leaves_nothing_behind(where):
    for norm, oracle in [pair for seen in on(where, interrupted, 2) for pair in seen]:
        assert norm.item() == pytest.approx(oracle, rel=2e-7)


def removed(make) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = make()
    clipper = distclip.Clipper(model, 1.0, overlap=True)
    backward(model, 0)
    seen = [(clipper.measure().norm.item(), true_norm(whole(model)))]
    del clipper
    gc.collect()
    hooks = [getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()]
    assert not any(hooks)
    for parameter in model.parameters():
        parameter.grad = None
    backward(model, 1)
    seen.append((distclip.Clipper(model, 1.0).measure().norm.item(), true_norm(whole(model))))
    return seen


@on_host_and_device
@pytest.mark.parametrize("make", [ddp, fsdp2])
def test_hooks_go_with_their_clipper(make, where):
    for seen in on(where, removed, 2, make):
        for norm, oracle in seen:
            assert norm == pytest.approx(oracle, rel=2e-7)


def norms_put_into_slots(make) -> list[tuple[float, float]]:
    """The norm where some slots hold 7 after the backward, and that of 7s in place of the norms of these gradients."""
    torch.manual_seed(0)
    model = make()
    clipper = distclip.Clipper(model, 1.0, overlap=True)
    backward(model, 0, spare=True)
    clipper.clip_()
    seen = []
    for changed in (0, 2):
        backward(model, 1, spare=True)
        slots, plan = clipper._overlap._early._slots, clipper._plan
        slots.norms.fill_(7.0)
        gradients = [holder.grad for holder in clipper._holders]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        for g in local[:changed]:
            g.data.mul_(2.0)
        squares = [(g.double().square().sum() if k < changed or not g.numel() else 49.0) for k, g in enumerate(local)]
        terms = [float(s) / r for s, r in zip(squares, plan.replicas, strict=True)]
        total = torch.tensor(sum(terms), dtype=torch.float64)
        dist.all_reduce(total)
        seen.append((clipper.measure().norm.item(), total.sqrt().item()))
        clipper.clip_()
    return seen


@pytest.mark.parametrize("make", [ddp, fsdp2])
@pytest.mark.parametrize("where", [DEVICE])
def test_a_device_takes_norms_from_slots_and_makes_those_again_whose_gradients_changed(make, where):
    for seen in on(where, norms_put_into_slots, 2, make):
        for norm, expected in seen:
            assert norm == pytest.approx(expected, rel=1e-6)


class Stream:
    """As much of a CUDA stream as shows what waits for what; what is current is whose turn it is."""

    current: "Stream"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records {len(self.log)}")
        return f"{self.name} {len(self.log) - 1}"


def test_streams_wait_for_each_other(monkeypatch):
    """Hooks run on streams of their own: a step waits for all of them, and the hooks of the next step for the step."""
    log: list[str] = []
    main, side, other = (Stream(name, log) for name in ("main", "side", "other"))
    model = nn.Linear(2, 2)
    plan = Plan.of(held_in([model]), 2.0, ClippingGroup.alone())
    monkeypatch.setattr(triton, "chosen", lambda device: True)
    monkeypatch.setattr(triton, "take_norms", lambda *given: log.append("sums") or True)
    early = OnDevice(plan)
    monkeypatch.setattr(early, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr("distclip.early._is_plain", lambda tensor: True)
    gradient = SimpleNamespace(device=early._device)
    monkeypatch.setattr(Seen, "of", lambda gradients: "seen")

    capturing = False
    for step in range(2):
        for stream, block in ((side, (0,)), (other, (1,))):
            Stream.current = stream
            assert early.take(block, [gradient]) == "seen"
        Stream.current = main
        assert early.taken({(0,): None}).sources == {0}
        early.forget()
        if step == 0:
            first, log[:] = list(log), []
    assert first == [
        *("sums", "side records 1", "sums", "other records 3"),
        *("main waits for side 1", "main waits for other 3", "main records 6"),
    ]
    assert log == [
        *("side waits for main 6", "sums", "side records 2", "other waits for main 6", "sums", "other records 5"),
        *("main waits for side 2", "main waits for other 5", "main records 8"),
    ]
    capturing, log[:] = True, []
    assert early.take((0,), [gradient]) is None
    assert early.taken({(0,): None}) == NOTHING
    early.forget()
    assert log == []


def without_triton() -> str:
    planned = Plan.of
    with patch.object(Plan, "of", lambda *given, **named: replace(planned(*given, **named), on_host=False)):
        try:
            distclip.Clipper(Net(), 1.0, overlap=True)
        except NotImplementedError as error:
            return str(error)
    return ""


def test_a_device_without_triton_is_refused_at_construction():
    assert "DISTCLIP_TRITON=1" in run_ranks(without_triton, 1)[0]


def offloaded() -> None:
    distclip.Clipper(fully_shard(Net(), offload_policy=CPUOffloadPolicy(pin_memory=False)), 1.0, overlap=True)


def without_views() -> None:
    distclip.Clipper(DistributedDataParallel(Net()), 1.0, overlap=True)


def with_a_hook() -> None:
    model = ddp()
    model.register_comm_hook(None, allreduce_hook)
    distclip.Clipper(model, 1.0, overlap=True)


def twice() -> None:
    model = ddp()
    first = distclip.Clipper(model, 1.0, overlap=True)
    distclip.Clipper(model, 1.0, overlap=True)
    first.measure()


def refused(make) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (offloaded, "CPUOffloadPolicy"),
        (without_views, "gradient_as_bucket_view=True"),
        (with_a_hook, "communication hook, which is taken"),
        (twice, "communication hook, which is taken"),
    ],
)
def test_what_cannot_overlap_is_refused_at_construction(make, says):
    for message in run_ranks(partial(refused, make), 1):
        assert says in message


def tied_across_stages(overlap: bool) -> list[tuple[float, float]]:
    """Two ranks as two stages that share a large weight; the loop adds up its gradient after the backward."""
    rank = dist.get_rank()
    alone = dist.new_group([rank], use_local_synchronization=True)
    net = nn.Module()
    net.tied, net.own = nn.Parameter(torch.ones(2000, 16)), nn.Parameter(torch.full((9,), float(rank + 1)))
    net.forward = lambda rows: (net.tied[rows] * 3).sum() + (net.own**2).sum() * 50
    model = DistributedDataParallel(net, process_group=alone, gradient_as_bucket_view=True)
    tied = {"layout": lambda name, p: distclip.Layout(2) if "tied" in name else None}
    clipper = distclip.Clipper(model, inf, split_over=[dist.group.WORLD], overlap=overlap, **tied)
    seen = []
    for step in range(3):
        model.zero_grad()
        rows = torch.randint(2000, (12,), generator=torch.Generator().manual_seed(7 * step + rank))
        model(rows).backward()
        dist.all_reduce(net.tied.grad)
        squares = net.own.grad.double().square().sum()
        dist.all_reduce(squares)
        oracle = (squares + net.tied.grad.double().square().sum()).sqrt().item()
        seen.append((clipper.clip_().norm.item(), oracle))
    return seen


@on_host_and_device
@pytest.mark.parametrize("overlap", [False, True])
def test_a_weight_tied_across_stages_whose_few_rows_the_loop_adds_up(overlap, where):
    """The rows of the other stage missed the sampled elements: the sum of before was taken."""
    for seen in on(where, tied_across_stages, 2, overlap):
        for norm, oracle in seen:
            assert norm == pytest.approx(oracle, rel=1e-6)
