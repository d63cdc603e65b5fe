"""`step(optimizer, scaler=...)`: the norm of unscaled gradients, and all ranks lower their loss scale or none."""

import gc
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer

import distclip
from distclip.optimizers.fused import Stepping
from distclip.step.engine import Engine
from support.oracle import true_norm
from support.ranks import run_ranks, same_bits

SCALE = 1024.0
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "sgd-fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw-fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
}


@dataclass(frozen=True)
class SkipsAll:
    def needs(self):
        return ()

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        norm = statistics.norm()
        return distclip.Decision(torch.full_like(norm, inf), skip=torch.ones_like(norm, dtype=torch.bool)), state


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 1))


def backward(model, step: int, scaler: GradScaler | None = None) -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    loss = 30 * model(rows).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def scaler_on_cpu(**settings) -> GradScaler:
    return GradScaler("cpu", init_scale=SCALE, growth_interval=1000, **settings)


def values(model) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained(clipper_of, make, scaled: bool, unscaled_by: str, bound: float) -> tuple[list[float], list[Tensor]]:
    """Norms and parameters of five steps of two optimizers, with a scaler or without one."""
    model, norms = net(), []
    optimizers = [make(model[0].parameters()), make(model[1].parameters())]
    clipper = clipper_of(model, bound)
    scaler = scaler_on_cpu(enabled=scaled)
    for step in range(5):
        backward(model, step, scaler)
        if unscaled_by == "user":
            scaler.unscale_(optimizers[0])
        norms.append(clipper.step(*optimizers, scaler=scaler).norm.item())
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return norms, values(model)


@pytest.mark.parametrize("bound", [1.0, 1e6])
@pytest.mark.parametrize("unscaled_by", ["user", "us"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_changes_neither_norms_nor_parameters(clipper_of, name, unscaled_by, bound):
    norms, parameters = trained(clipper_of, OPTIMIZERS[name], True, unscaled_by, bound)
    plain_norms, plain = trained(clipper_of, OPTIMIZERS[name], False, unscaled_by, bound)
    assert norms == pytest.approx(plain_norms, rel=1e-6)
    assert (norms[0] > bound) is (bound == 1.0), "one bound is to clip the first step, the other is not"
    for mine, theirs in zip(parameters, plain, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skip_for_the_policys_reason_keeps_the_scale(clipper_of, name):
    model = net()
    optimizer, scaler, clipper = (
        OPTIMIZERS[name](model.parameters()),
        scaler_on_cpu(),
        clipper_of(model, SkipsAll()),
    )
    before = values(model)
    for step in range(3):
        backward(model, step, scaler)
        assert clipper.step(optimizer, scaler=scaler).skip.item()
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == SCALE
    assert same_bits([before, values(model)])


def by_stepping(stepping: Stepping, optimizer: Optimizer, scaler: GradScaler) -> None:
    stepping.step(0, optimizer)


def by_the_scaler_inside_around(stepping: Stepping, optimizer: Optimizer, scaler: GradScaler) -> None:
    with stepping.around(0, optimizer):
        scaler.step(optimizer)


@pytest.mark.parametrize("step", [by_stepping, by_the_scaler_inside_around])
def test_a_friend_that_steps_by_a_scaler_keeps_the_policys_skip_on_the_device(step):
    """The scaler set found_inf of its own just before the step, and the optimizer stepped."""
    model = net()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), scaler_on_cpu()
    engine, before = Engine(model, SkipsAll(), decides_on_device=True), values(model)
    backward(model, 0, scaler)
    stepping = engine.begin([optimizer], scaler)
    assert isinstance(stepping.skip_on_device, Tensor), "the host knows the skip: this would show nothing"
    step(stepping, optimizer, scaler)
    scaler.update()
    assert same_bits([before, values(model)])
    assert all(state["step"] == 0 for state in optimizer.state.values())
    assert scaler.get_scale() == SCALE
    assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("step", [by_stepping, by_the_scaler_inside_around])
@pytest.mark.parametrize("decides_on_device", [False, True])
def test_a_friend_that_steps_by_a_scaler_steps_as_a_clipper_does(step, decides_on_device):
    results = []
    for friend in (False, True):
        model = net()
        optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), scaler_on_cpu()
        engine = Engine(model, 1.0, decides_on_device=decides_on_device)
        for turn in range(3):
            backward(model, turn, scaler)
            if friend:
                step(engine.begin([optimizer], scaler), optimizer, scaler)
            else:
                engine.step(optimizer, scaler=scaler)
            scaler.update()
            optimizer.zero_grad()
        results.append(values(model))
    assert same_bits(results)


def test_a_step_that_the_host_knows_to_be_skipped_is_not_made():
    model = net()
    optimizer, engine, before = torch.optim.SGD(model.parameters(), lr=0.1), Engine(model, SkipsAll()), values(model)
    backward(model, 0)
    stepping = engine.begin([optimizer])
    assert stepping.skipped
    stepping.step(0, optimizer)
    assert same_bits([before, values(model)])


@pytest.mark.parametrize("decides_on_device", [False, True])
def test_a_scaler_that_steps_an_attached_optimizer_keeps_the_policys_skip(decides_on_device):
    model = net()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), scaler_on_cpu()
    distclip.attach(optimizer, model, SkipsAll(), decides_on_device=decides_on_device)
    before = values(model)
    backward(model, 0, scaler)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert same_bits([before, values(model)])
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_is_skipped_and_lowers_the_scale(clipper_of, name):
    model = net()
    optimizer, scaler, clipper = OPTIMIZERS[name](model.parameters()), scaler_on_cpu(), clipper_of(model, 1.0)
    before = values(model)
    backward(model, 0, scaler)
    model[1].bias.grad[0] = inf
    assert clipper.step(optimizer, scaler=scaler).skip.item()
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert same_bits([before, values(model)])
    optimizer.zero_grad()
    backward(model, 1, scaler)
    expected = true_norm([p.grad for p in model.parameters()]) * 2 / SCALE
    report = clipper.step(optimizer, scaler=scaler)
    assert report.norm.item() == pytest.approx(expected, rel=1e-6)
    assert not report.skip.item()
    assert not same_bits([before, values(model)])


def test_raising_lets_the_scale_be_lowered():
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_on_cpu()
    clipper = distclip.Clipper(model, 1.0, nonfinite="raise")
    backward(model, 0, scaler)
    model[0].weight.grad[0, 0] = inf
    with pytest.raises(distclip.NonFiniteError, match=r"0\.weight on rank 0 has inf"):
        clipper.step(optimizer, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2


def test_a_gradient_that_no_optimizer_holds_is_refused():
    model = net()
    optimizer, scaler, clipper = (
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        scaler_on_cpu(),
        distclip.Clipper(model, 1.0),
    )
    backward(model, 0, scaler)
    with pytest.raises(ValueError, match=r"1\.weight has a gradient and is in none of the optimizers"):
        clipper.step(optimizer, scaler=scaler)


def test_two_steps_without_an_update_are_refused_as_torch_does():
    model = net()
    optimizer, scaler, clipper = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        scaler_on_cpu(),
        distclip.Clipper(model, 1.0),
    )
    backward(model, 0, scaler)
    clipper.step(optimizer, scaler=scaler)
    with pytest.raises(RuntimeError, match="call it after every step"):
        clipper.step(optimizer, scaler=scaler)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_no_update_after_a_step_that_was_skipped_is_refused_before_a_wrong_norm(nonfinite):
    """The scaler held the new gradients for unscaled: the norm was 1024 times too large."""
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_on_cpu()
    clipper = distclip.Clipper(model, 1.0, nonfinite=nonfinite)
    backward(model, 0, scaler)
    model[0].weight.grad[0, 0] = torch.nan
    if nonfinite == "raise":
        with pytest.raises(distclip.NonFiniteError):
            clipper.step(optimizer, scaler=scaler)
    else:
        assert clipper.step(optimizer, scaler=scaler).skip
    optimizer.zero_grad()
    backward(model, 1, scaler)
    with pytest.raises(RuntimeError, match=r"scaler.update\(\) was not called since the last step"):
        clipper.step(optimizer, scaler=scaler)
    scaler.update()
    optimizer.zero_grad()
    backward(model, 1, scaler)
    norm = clipper.step(optimizer, scaler=scaler).norm.item()
    reference = net()
    backward(reference, 1)
    assert norm == pytest.approx(true_norm([p.grad for p in reference.parameters()]), rel=1e-6)


def one_rank_overflows(kind: type[GradScaler], sharded: bool, fused: bool) -> dict[str, object]:
    model = net()
    if sharded:
        fully_shard(model)
    scaler = kind("cpu", init_scale=SCALE, growth_interval=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    clipper = distclip.Clipper(model, 1.0)
    scales, norms, oracle, moved = [], [], [], []
    local = [p.to_local() if sharded else p for p in model.parameters()]
    for step in range(4):
        before = [p.detach().clone() for p in local]
        backward(model, step, scaler)
        gradients = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
        oracle.append(true_norm(gradients) / scaler.get_scale())
        if step == 1 and dist.get_rank() == 1:
            gradient = model[0].weight.grad
            (gradient.to_local() if sharded else gradient).view(-1)[0] = inf
        norms.append(clipper.step(optimizer, scaler=scaler).norm)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not same_bits([before, [p.detach() for p in local]]))
        optimizer.zero_grad()
    replicas = {} if sharded else {"parameters": local}
    return {"scales": scales, "norms": norms, "oracle": oracle, "moved": moved, **replicas}


@pytest.mark.filterwarnings("ignore:Found a non-scalar tensor")  # torch's scaler, of its own flag
@pytest.mark.parametrize(
    ("kind", "sharded", "fused"),
    [
        (GradScaler, False, False),
        (GradScaler, False, True),
        (GradScaler, True, False),
        (GradScaler, True, True),
        (ShardedGradScaler, True, False),  # with a fused optimizer torch 2.13 itself fails, by the shape of its flag
    ],
)
def test_an_overflow_on_one_rank_lowers_the_scale_of_all(kind, sharded, fused):
    results = run_ranks(one_rank_overflows, 2, kind, sharded, fused)
    for r in results:
        assert r["scales"] == [SCALE, SCALE / 2, SCALE / 2, SCALE / 2]
        assert r["moved"] == [True, False, True, True]
        for step in (0, 2, 3):
            assert r["norms"][step].item() == pytest.approx(r["oracle"][step], rel=1e-6)
    assert same_bits([r["norms"] for r in results])
    if not sharded:
        assert same_bits([r["parameters"] for r in results])


def only_here() -> str:
    """Rank 0 alone has a gradient that no optimizer holds."""
    model = net()
    optimizer, scaler = torch.optim.SGD(model[0].parameters(), lr=0.1), scaler_on_cpu()
    clipper = distclip.Clipper(model, 1.0)
    backward(model, 0, scaler)
    if dist.get_rank() == 1:
        for parameter in model[1].parameters():
            parameter.grad = None
    try:
        clipper.step(optimizer, scaler=scaler)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_a_gradient_that_no_optimizer_holds_on_one_rank_lets_none_wait():
    here, there = run_ranks(only_here, 2)
    assert here.startswith("1.weight has a gradient and is in none of the optimizers")
    assert "one of them stopped with an error of its own" in there


def test_the_id_of_a_dropped_optimizer_is_not_given_to_another_before_update():
    """The scaler keys what it knows by the id: a new optimizer at the same address would pass for the old one."""
    model, scaler = net(), scaler_on_cpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dropped = ref(optimizer)
    backward(model, 0, scaler)
    distclip.Clipper(model, 1.0).step(optimizer, scaler=scaler)
    del optimizer
    gc.collect()
    assert dropped() is not None
    scaler.update()
    gc.collect()
    assert dropped() is None


def test_a_step_that_the_scaler_skips_by_itself_is_no_call_and_the_report_is_known_to_be_old():
    """An attached optimizer is not stepped at all then: nothing can renew the report."""
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=SCALE)
    clipper = distclip.attach(optimizer, model, 1.0)
    seen = []
    for bad in (False, True, False):
        backward(model, 0, scaler)
        if bad:
            next(model.parameters()).grad.view(-1)[0] = inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((clipper.steps, clipper.report))
    assert [steps for steps, _ in seen] == [1, 1, 2]
    assert seen[0][1] is seen[1][1]


@pytest.mark.parametrize("verb", ["clip_", "step"])
def test_a_fused_sgd_whose_first_step_is_not_finite_keeps_no_memory_of_others_as_momentum(verb):
    model, scaler = torch.nn.Linear(64, 64), scaler_on_cpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    engine = Engine(model, 1.0)
    for step in range(2):
        junk = [torch.full((64, 64), 1e9) for _ in range(20)]
        del junk  # whose memory is what torch.empty finds
        loss = model(torch.ones(8, 64)).square().mean()
        scaler.scale(loss * (nan if step == 0 else 1.0)).backward()
        if verb == "clip_":
            engine.clip_([optimizer], scaler)
            scaler.step(optimizer)
        else:
            engine.step(optimizer, scaler=scaler)
        scaler.update()
        optimizer.zero_grad()
        momenta = [state["momentum_buffer"].abs().max().item() for state in optimizer.state.values()]
        assert max(momenta, default=0.0) <= 1.0
    assert momenta
