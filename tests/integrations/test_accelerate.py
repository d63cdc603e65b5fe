"""distclip.integrations.accelerate, in real runs on two ranks beside one process that is clipped by hand."""

import os
import re
import warnings
from functools import cache, partial
from importlib.util import find_spec
from math import inf, nan

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

import distclip
from distclip import AutoClip, Decision, MaxNorm, ValueClip
from integrations.launches import once
from support.layouts import ROWS, batch, build
from support.own_policy import OwnGate, OwnRunningMean
from support.ranks import run_ranks, same_bits

accelerate = pytest.importorskip("accelerate", reason="needs the extra: pip install 'distclip[accelerate]'")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402

from distclip.integrations.accelerate import Accelerator  # noqa: E402

STEPS = 12
BOUND = 1.25  # between the norms of the run
BAD = 5  # the step whose loss is NaN on rank 1
POLICIES = {
    "max_norm": MaxNorm(BOUND),
    "autoclip": AutoClip(50),
    "value": ValueClip(0.05),
    "by unit": OwnRunningMean(),
}


class SkipOdd:
    """Skips every second step for a reason of its own."""

    def needs(self):
        return ()

    def init(self, units, device):
        return {"steps": torch.zeros((), dtype=torch.int64, device=device)}

    def decide(self, statistics, state):
        bound = torch.full_like(statistics.norm(), inf)
        return Decision(bound, skip=state["steps"] % 2 == 1), {"steps": state["steps"] + 1}


class SkipFirst(SkipOdd):
    def decide(self, statistics, state):
        bound = torch.full_like(statistics.norm(), inf)
        return Decision(bound, skip=state["steps"] == 0), {"steps": state["steps"] + 1}


# ---- one process ---------------------------------------------------------------------------------------------


def loss_of(model, step, rank=0, size=1, bad=None):
    words, targets = batch(step)
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    loss = (model(words[mine]) - targets[mine]).square().mean()
    return loss * nan if step == bad and rank == size - 1 else loss


@cache
def alone(policy, accumulated=1, bad=None):
    """Norms, skipped steps and parameters of one process; MaxNorm and ValueClip by their definitions."""
    model = build()
    optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    clipper = distclip.Clipper(model, POLICIES[policy])
    norms, skipped = [], []
    for step in range(STEPS):
        for micro in range(accumulated):
            (loss_of(model, step * accumulated + micro, bad=bad) / accumulated).backward()
        norm = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
        for p in model.parameters():
            if policy == "max_norm":
                p.grad.mul_(min(1.0, BOUND / (norm.item() + 1e-6)))
            elif policy == "value":
                p.grad.clamp_(-0.05, 0.05)
        if policy in ("autoclip", "by unit"):
            clipper.clip_()
        if norm.isfinite():
            optimizer.step()
        else:
            skipped.append(step)
        optimizer.zero_grad()
        norms.append(norm.item())
    return norms, skipped, [p.detach() for p in model.parameters()]


# ---- two ranks -----------------------------------------------------------------------------------------------


def fresh(kind=Accelerator, **options):
    """An accelerator that finds the group of `run_ranks` in place, and nothing left of the one before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return kind(**{"cpu": True} | options)


def prepared(accelerator):
    model = build()
    return accelerator, *accelerator.prepare(model, AdamW(model.parameters(), lr=1e-3, eps=1e-4))


def ddp(kind=Accelerator, **options):
    return prepared(fresh(kind, **options))


def fsdp2(kind=Accelerator, **options):
    """FSDP2 with ignored parameters on the CPU, where accelerate would make DDP of it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        ignored_modules="embed|head",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    accelerator = fresh(kind, fsdp_plugin=plugin, **options)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return prepared(accelerator)


def fsdp1(use_orig_params=False, **options):
    """FSDP1 as accelerate keeps it, wrapped by hand since accelerate wraps none on the CPU."""
    accelerator = fresh(**options)
    model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    accelerator._models.append(model)
    return accelerator, model, accelerator.prepare_optimizer(AdamW(model.parameters(), lr=1e-3, eps=1e-4))


def reduce_ignored(model):
    """What the user of ignored parameters must do."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def whole(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def train(make, policy, how, accumulated=1, bad=None):
    accelerator, model, optimizer = make(gradient_accumulation_steps=accumulated)
    watch = "parameters" if policy == "by unit" else None
    clipper = accelerator.clipper(model, POLICIES[policy], watch=watch) if how == "clipper" else None
    norms, skipped = [], []
    for micro in range(STEPS * accumulated):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, micro, dist.get_rank(), dist.get_world_size(), bad))
            if accelerator.sync_gradients:
                if make is fsdp2:
                    reduce_ignored(model)
                if clipper is not None:
                    report = clipper.clip_()
                    watched = torch.stack([*report.norms.values()]).norm() if watch else report.norm
                    norms.append(watched.item())
                elif policy == "value":
                    norms.append(distclip.clip_grad_norm_(accelerator._models, inf).item())
                    accelerator.clip_grad_value_(model.parameters(), 0.05)
                else:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), BOUND).item())
            optimizer.step()
            if accelerator.sync_gradients and optimizer.step_was_skipped:
                skipped.append(len(norms) - 1)
            optimizer.zero_grad()
    return norms, skipped, whole(model)


def resume(folder, policy):
    """The decisions of six steps after a checkpoint, in the run that made it and in one that loads it."""

    def start():
        accelerator, model, optimizer = ddp()
        return accelerator, model, optimizer, accelerator.clipper(model, policy)

    def go_on(run, steps):
        accelerator, model, optimizer, clipper = run
        decisions = []
        for step in steps:
            accelerator.backward(loss_of(model, step, dist.get_rank(), 2))
            decisions.append(clipper.clip_().to_dict())
            optimizer.step()
            optimizer.zero_grad()
        return decisions

    first = start()
    go_on(first, range(6))
    first[0].save_state(folder)
    expected = go_on(first, range(6, 12))
    second = start()
    second[0].load_state(folder)
    return expected, go_on(second, range(6, 12))


def schedule():
    """A prepared scheduler waits with the step that is skipped."""
    accelerator, model, optimizer = ddp()
    scheduler = accelerator.prepare(StepLR(optimizer, 1, gamma=0.5))
    clipper = accelerator.clipper(model, MaxNorm(BOUND))
    rates = []
    for step in range(4):
        accelerator.backward(loss_of(model, step, dist.get_rank(), 2, bad=1))
        clipper.clip_()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0] / 1e-3)
    return rates


def scaled(policy, unscale):
    """Norms, parameters, scales and skipped steps with a loss scale of 1024, as fp16 has it on accelerators."""
    accelerator = fresh()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    accelerator.native_amp, AcceleratorState._shared_state["_mixed_precision"] = True, "fp16"
    model = torch.nn.parallel.DistributedDataParallel(build())
    optimizer = accelerator.prepare_optimizer(SGD(model.parameters(), lr=0.05))
    accelerator._models.append(model)
    clipper = None if policy is None else accelerator.clipper(model, policy)
    norms, scales, moved, skips = [], [], [], []
    for step in range(4):
        accelerator.backward(loss_of(model, step, dist.get_rank(), 2, bad=2))
        if unscale:
            accelerator.unscale_gradients()
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5) if clipper is None else clipper.clip_().norm
        before = whole(model)
        optimizer.step()
        moved.append(not same_bits([before, whole(model)]))
        skips.append(bool(optimizer.step_was_skipped))
        optimizer.zero_grad()
        norms.append(norm.item())
        scales.append(accelerator.scaler.get_scale())
    return norms, scales, moved, skips, whole(model)


def two_scaled():
    """Two optimizers and a loss scale: clipped together, one after the other without a step, and as is right."""
    accelerator = fresh()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, AcceleratorState._shared_state["_mixed_precision"] = True, "fp16"
    a, b = (torch.nn.Linear(2, 1, bias=False) for _ in "ab")
    one, two = (accelerator.prepare_optimizer(SGD(model.parameters(), lr=0.05)) for model in (a, b))
    accelerator.backward((a(torch.ones(1, 2)) + b(torch.ones(1, 2))).sum())
    norms = [accelerator.clip_grad_norm_(a.parameters(), 1.0).item()]
    found = []
    for call in (
        lambda: accelerator.clip_grad_norm_(b.parameters(), 1.0),
        lambda: accelerator.clipper([a, b], 1.0).clip_(),
    ):
        with pytest.raises(RuntimeError, match="clip and step one optimizer after the other") as raised:
            call()
        found.append(str(raised.value))
    accelerator._custom_objects.clear()
    one.step()
    norms.append(accelerator.clip_grad_norm_(b.parameters(), 1.0).item())
    two.step()
    return norms, found


def errors():
    found = {}

    def note(name, call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    accelerator, model, optimizer = ddp(gradient_accumulation_steps=2)
    other = torch.nn.Linear(2, 2)
    lonely = accelerator.clipper(other, 1.0)
    clipper = accelerator.clipper(model, 1.0)
    note("two clippers", lambda: accelerator.clipper(model, 0.5))
    note("two owners", lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0))
    note("two owners by value", lambda: accelerator.clip_grad_value_(model, 1.0))
    note("step", lambda: clipper.step(optimizer))
    note("no optimizer", lonely.clip_)
    used = (p for p in ())
    note("used up", lambda: accelerator.clip_grad_norm_(used, 1.0))
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model, 0))
        note("accumulating", lambda: accelerator.clip_grad_norm_([torch.nn.Parameter(torch.zeros(1))], 1.0))
        note("accumulating by value", lambda: accelerator.clip_grad_value_(model.parameters(), 1.0))
        note("accumulating with a clipper", clipper.clip_)
    accelerator.sync_gradients = True
    AcceleratorState._shared_state["distributed_type"] = DistributedType.MEGATRON_LM
    note("megatron", clipper.clip_)
    sharded, wrapped, _ = fsdp1(True)
    sharded.backward(loss_of(wrapped, 0, dist.get_rank(), 2))
    note("part of FSDP1", lambda: sharded.clip_grad_norm_(list(wrapped.parameters())[1:], 1.0))
    note("inside FSDP1", lambda: sharded.clipper(wrapped.module, 1.0))
    AcceleratorState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    note("deepspeed", lambda: accelerator.clipper(model, 1.0))
    note("deepspeed not taken over", lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0))
    note("deepspeed by value", lambda: accelerator.clip_grad_value_(model.parameters(), 1.0))
    return found


def skip_and_go_on():
    """What each step did and said: one that is skipped, two without clip_(), and one that is clipped."""
    accelerator, model, optimizer = ddp()
    clipper = accelerator.clipper(model, SkipFirst())
    found = []
    for step, clips in enumerate([True, False, False, True]):
        accelerator.backward(loss_of(model, step, dist.get_rank(), 2))
        if clips:
            clipper.clip_()
        before = whole(model)
        optimizer.step()
        found.append((not same_bits([before, whole(model)]), bool(optimizer.step_was_skipped)))
        optimizer.zero_grad()
    return found


def clip_again():
    """The norms of two clip_() before a step that is skipped, and whether the gradients are there after it."""
    accelerator, model, optimizer = ddp()
    clipper = accelerator.clipper(model, SkipFirst())
    accelerator.backward(loss_of(model, 0, dist.get_rank(), 2, bad=0))
    norms = [clipper.clip_().norm.item() for _ in range(2)]
    gradients = [p.grad for p in model.parameters()]
    optimizer.step()
    return norms, all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def others(scale):
    """Norms of a model of which the optimizer holds one layer: by clip_(), by measure(), and of that layer."""
    accelerator = fresh()
    if scale:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp, AcceleratorState._shared_state["_mixed_precision"] = True, "fp16"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model, optimizer = torch.nn.parallel.DistributedDataParallel(model), SGD(model[1].parameters(), lr=0.1)
    accelerator._models.append(model)  # prepare() of fp16 is for accelerators
    optimizer = accelerator.prepare_optimizer(optimizer)
    clipper = accelerator.clipper(model, 1e9, fingerprint_every=1)
    found = []
    for _ in range(3):
        accelerator.backward(model(torch.ones(2, 3)).sum())
        if scale:
            for call in (clipper.measure, clipper.fingerprint):
                before = rf"loss scale: call accelerator.unscale_gradients\(\) before {call.__name__}\(\)"
                with pytest.raises(RuntimeError, match=before):
                    call()
            accelerator.unscale_gradients()
        held = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        measured, fingerprint, clipped = clipper.measure(), clipper.fingerprint(), clipper.clip_()
        assert fingerprint == clipped.fingerprint
        found.append((measured.norm.item(), clipped.norm.item(), torch.cat(held).norm().item()))
        optimizer.step()
        optimizer.zero_grad()
    return found


def skip_in_a_scaled_step():
    """How many steps were made by then, and whether there are gradients after it, for one that the policy skips."""

    class Counting(SGD):
        def step(self, closure=None):
            self.made = getattr(self, "made", 0) + 1
            return super().step(closure)

    accelerator = fresh()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = accelerator.prepare_optimizer(inner := Counting(model.parameters(), lr=0.05))
    clipper = accelerator.clipper(model, SkipOdd())
    found = []
    for _ in range(3):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        clipper.clip_()
        optimizer.step()
        found.append((inner.made, all(p.grad is not None for p in model.parameters())))
        optimizer.zero_grad()
    return found


def values(kind):
    """The largest gradient after value clipping under FSDP2 with ignored parameters, or why there is none."""
    accelerator, model, _ = fsdp2(kind)
    accelerator.backward(loss_of(model, 0, dist.get_rank(), 2))
    reduce_ignored(model)
    try:
        accelerator.clip_grad_value_(model.parameters(), 0.01)
    except Exception as error:  # accelerate raises just this class
        return str(error)
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return max(gradient.abs().max().item() for gradient in gradients)


def everything(folder):
    warnings.simplefilter("ignore")
    runs = {
        (layout.__name__, policy, how): train(layout, policy, how)
        for layout in (ddp, fsdp2)
        for policy in POLICIES
        for how in ("function", "clipper")
        if how == "clipper" or policy in ("max_norm", "value")
    }
    runs["fsdp1", "max_norm", "function"] = train(fsdp1, "max_norm", "function")
    runs["fsdp1 originals", "max_norm", "function"] = train(partial(fsdp1, True), "max_norm", "function")
    runs["fsdp1 originals", "value", "function"] = train(partial(fsdp1, True), "value", "function")
    runs["fsdp1", "autoclip", "clipper"] = train(fsdp1, "autoclip", "clipper")
    return {
        "runs": runs,
        "accumulated": {how: train(ddp, "max_norm", how, accumulated=2) for how in ("function", "clipper")},
        "bad": {make.__name__: train(make, "autoclip", "clipper", bad=BAD) for make in (ddp, fsdp2)},
        "resumed": [resume(folder, AutoClip(25)), resume(f"{folder}/by unit", OwnRunningMean())],
        "schedule": schedule(),
        "scaled": [scaled(None, False), scaled(None, True), scaled(MaxNorm(0.5), False), scaled(SkipOdd(), False)],
        "two scaled": two_scaled(),
        "skip and go on": skip_and_go_on(),
        "clip again": clip_again(),
        "others": [others(scale) for scale in (False, True)],
        "skip in a scaled step": skip_in_a_scaled_step(),
        "values": [values(kind) for kind in (accelerate.Accelerator, Accelerator)],
        "errors": errors(),
        "signals": with_signals(),
        "deepspeed": with_deepspeed() if find_spec("deepspeed") else None,  # last: it patches torch
    }


def with_deepspeed():
    """What the error says to do: DeepSpeed's integration, and the loop's line kept, which returns the norm."""
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from distclip.integrations.deepspeed import take_over

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {"train_micro_batch_size_per_gpu": ROWS // 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": 2}}
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=config)
    accelerator, model, optimizer = ddp(cpu=False, deepspeed_plugin=plugin, gradient_accumulation_steps=2)
    found = {}

    def note(name, bound, *order):
        try:
            accelerator.clip_grad_norm_(model.parameters(), bound, *order)
        except RuntimeError as error:
            found[name] = str(error)

    note("not taken over", BOUND)
    clipper = take_over(accelerator.deepspeed_engine_wrapped.engine, BOUND)
    note("no step yet", BOUND)
    accelerator.register_for_checkpointing(clipper)
    norms = []
    for micro in range(STEPS * 2):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, micro, dist.get_rank(), 2))
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), BOUND).item())
            elif micro == 0:
                note("accumulating", BOUND)
            optimizer.step()
            optimizer.zero_grad()
    note("another bound", 2 * BOUND)
    note("another order", BOUND, 3)
    assert accelerator.clip_grad_norm_(model.parameters(), inf).item() == norms[-1]
    return norms, [], whole(model), found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("state"))
    return once(tmp_path_factory, "accelerate", lambda: run_ranks(everything, 2, folder, fresh=True))


def agrees(results, expected):
    """Two ranks gave the same bits, and those of one process within what fp32 can."""
    assert same_bits(results)
    (norms, skipped, parameters), (expected_norms, expected_skipped, expected_parameters) = results[0], expected
    assert norms == pytest.approx(expected_norms, rel=1e-6, nan_ok=True)
    assert skipped == expected_skipped
    for mine, theirs in zip(parameters, expected_parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_training_is_that_of_one_process(ranks):
    for case in ranks[0]["runs"]:
        agrees([each["runs"][case] for each in ranks], alone(case[1]))
    norms = alone("max_norm")[0]
    assert min(norms) < BOUND < max(norms)


def test_accumulated_gradients_are_clipped_once(ranks):
    for how in ("function", "clipper"):
        agrees([each["accumulated"][how] for each in ranks], alone("max_norm", 2))


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks, layout):
    agrees([each["bad"][layout] for each in ranks], alone("autoclip", bad=BAD))
    assert alone("autoclip", bad=BAD)[1] == [BAD]


def test_a_prepared_scheduler_waits_with_a_skipped_step(ranks):
    for each in ranks:
        assert each["schedule"] == [1 / 4, 1 / 4, 1 / 16, 1 / 64]  # accelerate steps it once for each rank


def test_a_resumed_run_decides_as_the_one_that_went_on(ranks):
    for each in ranks:
        for expected, resumed in each["resumed"]:
            assert resumed == expected
        (_, by_all), (_, by_unit) = each["resumed"]
        assert by_all[0]["max_norm"] != by_all[0]["norm"], "the first bound of an AutoClip that starts anew"
        assert any(decision["coef"] < 1 for decision in by_unit)


def test_gradients_are_unscaled_first_and_skips_reach_the_scaler(ranks):
    assert same_bits([each["scaled"] for each in ranks])
    function, unscaled_before, clipper, skipping = ranks[0]["scaled"]
    norms, scales, moved, skips, _ = function
    assert norms[0] == pytest.approx(alone("max_norm")[0][0], rel=1e-6), "the scale is in the norm"
    assert scales == [1024, 1024, 512, 512]
    assert moved == [True, True, False, True]
    assert skips == [False, False, True, False]
    assert same_bits([function, unscaled_before, clipper])
    _, scales, moved, *_ = skipping  # a policy's own skips: steps 1 and 3
    assert scales == [1024, 1024, 512, 512]
    assert moved == [True, False, False, False]


def test_two_optimizers_with_a_loss_scale_are_clipped_one_after_the_other(ranks):
    for each in ranks:
        norms, refused = each["two scaled"]
        assert norms == pytest.approx([2**0.5, 2**0.5])
        assert len(refused) == 2


def test_step_was_skipped_is_of_the_latest_step_also_without_clip_(ranks):
    for each in ranks:
        assert each["skip and go on"] == [(False, True), (True, False), (True, False), (True, False)]


def test_a_second_clip_before_a_skipped_step_sees_the_gradients_and_loses_none(ranks):
    for each in ranks:
        norms, back = each["clip again"]
        assert norms == pytest.approx([nan, nan], nan_ok=True)
        assert back


def test_gradients_that_no_prepared_optimizer_holds_do_not_add_up_in_the_norm(ranks):
    for each in ranks:
        for found in each["others"]:
            for measured, clipped, held in found:
                assert measured == clipped == pytest.approx(held, rel=1e-6)
        plain, scaled = each["others"]
        assert [norm for _, norm, _ in scaled] == pytest.approx([norm for _, norm, _ in plain], rel=1e-6)


def test_a_scaled_step_that_the_policy_skips_is_not_made_and_keeps_its_gradients(ranks):
    for each in ranks:
        assert each["skip in a scaled step"] == [(1, True), (1, True), (2, True)]


def test_deepspeed_underneath_is_taken_over_and_the_line_returns_its_norm(ranks):
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'distclip[deepspeed]'")
    results = [each["deepspeed"] for each in ranks]
    agrees([(*result[:3],) for result in results], alone("max_norm", 2))
    for *_, found in results:
        assert re.match(r"clip_grad_norm_ comes too late: .*take_over\(", found["not taken over"])
        assert re.match("DeepSpeed has made no step yet", found["no step yet"])
        assert re.match("clip_grad_norm_ was called inside gradient accumulation", found["accumulating"])
        assert re.search(r"not what take_over\(\) put in force, MaxNorm\(max_norm=1.25\)", found["another bound"])
        assert re.search(r"of order 3 is not what take_over\(\) put in force", found["another order"])


def test_values_are_clipped_under_fsdp2_where_accelerate_refuses(ranks):
    for each in ranks:
        theirs, ours = each["values"]
        assert "FSDP  do not support `clip_grad_value_`" in theirs
        assert ours == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two owners", r"ValueError: a clipper\(\) clips these parameters already: take the line with clip_grad_norm_"),
        ("two owners by value", "ValueError: .* take the line with clip_grad_value_ out"),
        ("two clippers", r"ValueError: a clipper\(\) clips this model already .* call clipper\(\) once"),
        ("step", r"RuntimeError: .* call clip_\(\) and then optimizer.step\(\)"),
        ("no optimizer", r"RuntimeError: .* pass the optimizer to accelerator.prepare\(\) as well"),
        ("used up", "ValueError: clip_grad_norm_ was given no parameters"),
        ("accumulating", "RuntimeError: clip_grad_norm_ was called inside gradient accumulation"),
        ("accumulating by value", "RuntimeError: clip_grad_value_ was called inside gradient accumulation"),
        ("accumulating with a clipper", r"RuntimeError: clip_\(\) .*`accelerator.sync_gradients` is true"),
        ("part of FSDP1", "LayoutError: .* pass the FSDP1 module instead of its parameters"),
        ("inside FSDP1", r"ValueError: .* pass what accelerator.prepare\(\) returned"),
        ("megatron", "RuntimeError: .* not supported with MEGATRON_LM"),
        ("deepspeed", r"RuntimeError: .* comes too late: .*deepspeed.take_over\(accelerator.deepspeed_engine"),
        ("deepspeed by value", r"RuntimeError: .* comes too late: .*deepspeed.take_over\(accelerator.deepspeed_engine"),
        ("deepspeed not taken over", r"RuntimeError: .* comes too late: .*deepspeed.take_over\(accelerator.deepspeed_"),
    ],
)
def test_what_raises(ranks, case, message):
    for each in ranks:
        assert re.match(message, each["errors"][case])


def with_signals() -> list[bool]:
    accelerator, model, optimizer = ddp()
    clipper, skips = accelerator.clipper(model, OwnGate(most=2.0)), []
    for step, loss in enumerate((1.0, 9.0, torch.tensor(1.0))):
        accelerator.backward(loss_of(model, step))
        signals = {"loss": loss if dist.get_rank() else 1.0, "tokens": 1}
        skips += [bool(clipper.measure(signals=signals).skip), bool(clipper.clip_(signals=signals).skip)]
        optimizer.step()
        optimizer.zero_grad()
    return skips


def test_signals_are_passed_with_clip_and_measure(ranks):
    assert [each["signals"] for each in ranks] == [[False, False, True, True, False, False]] * 2
