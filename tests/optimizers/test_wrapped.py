"""Optimizers around optimizers: attach clips where the gradients are final, skips, or says what to write."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

import distclip
from distclip.optimizers.hooks import guard, skip_next_step
from support import wrappers
from support.layouts import backward, build, ddp, fsdp2
from support.ranks import run_ranks, same_bits
from support.wrappers import ByHand

STEPS = 8
BROKEN = (3, 4)  # the steps with a NaN
BOUND = 1.4  # between the norms of these runs
INSIDE = {  # by the base's step, where skips are the base's too
    "accumulating": wrappers.accumulating,
    "proxy": wrappers.proxy,
    "torchft": wrappers.fault_tolerant,
    "opacus": wrappers.private,
    "scaled": wrappers.scaled,
    "two deep": lambda base: wrappers.proxy(wrappers.fault_tolerant(base)),
}
WHOLE = {  # which must not be called at all for a step that is skipped
    "lookahead": wrappers.lookahead,
    "without hooks": wrappers.lookahead_without_hooks,
    "patched": wrappers.patched_lookahead,
    "schedule-free": wrappers.schedule_free,
}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broken(model) -> None:
    next(g for p in model.parameters() if (g := local(p.grad)).numel()).view(-1)[0] = torch.nan


def run(model, optimizer, skips_whole=False, closure=False):
    """Eight steps, two of them with a NaN on the last rank; what the optimizer holds then."""
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1

    def gradients(step):
        loss = backward(model, step)
        if step in BROKEN and last:
            broken(model)
        return loss

    for step in range(STEPS):
        if closure:
            optimizer.step(functools.partial(gradients, step))
        else:
            gradients(step)
            if not (skips_whole and step in BROKEN):
                optimizer.step()
        optimizer.zero_grad()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def pair(wrap, kind=build, momentum=0.9):
    """What an attached wrapper makes of the model, and what the same wrapper around an optimizer that clips by hand."""
    ByHand.bound = BOUND
    model, twin = kind(), build()
    optimizer = wrap(SGD(model.parameters(), lr=0.05, momentum=momentum))
    clipper = distclip.attach(optimizer, model, BOUND)
    return model, optimizer, clipper, twin, wrap(ByHand(twin.parameters(), lr=0.05, momentum=momentum))


@pytest.mark.parametrize("name", [*INSIDE, *WHOLE])
def test_an_attached_wrapper_clips_as_by_hand_and_skips(name):
    model, optimizer, clipper, twin, by_hand = pair((INSIDE | WHOLE)[name])
    mine, theirs = run(model, optimizer), run(twin, by_hand, skips_whole=name in WHOLE)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    heard = {"accumulating": STEPS // 2, "scaled": STEPS - len(BROKEN)}  # a scaler leaves out what is not finite
    assert clipper.state_dict()["steps"] == heard.get(name, STEPS)
    unclipped = build()
    run(unclipped, (INSIDE | WHOLE)[name](SGD(unclipped.parameters(), lr=0.05, momentum=0.9)), skips_whole=True)
    assert not same_bits([mine, list(unclipped.parameters())])


@pytest.mark.parametrize("name", ["lookahead", "without hooks", "patched", "schedule-free", "proxy"])
def test_gradients_of_a_closure_are_clipped_in_a_wrapper(name):
    model, optimizer, clipper, twin, by_hand = pair((INSIDE | WHOLE)[name], momentum=0.0)
    clean = [step for step in range(STEPS) if step not in BROKEN]
    for step in clean:
        optimizer.step(functools.partial(backward, model, step))
        backward(twin, step)
        by_hand.step()
        optimizer.zero_grad()
        by_hand.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-7)
    assert clipper.state_dict()["steps"] == len(clean)


@pytest.mark.parametrize("name", ["lookahead", "without hooks", "patched", "schedule-free", "proxy"])
def test_a_nan_in_a_closure_never_reaches_the_parameters(name):
    model, optimizer, clipper, *_ = pair((INSIDE | WHOLE)[name])
    optimizer.step(lambda: (backward(model), broken(model)))
    assert clipper.report.skip
    assert all(p.isfinite().all() for p in model.parameters())
    assert next(model.parameters()).grad.isnan().any(), "the gradients come back"


def test_sharpness_aware_minimisation_clips_its_second_gradients():
    model, optimizer, clipper, twin, by_hand = pair(wrappers.sharpness_aware)
    for step in range(STEPS):
        for net, steps, way in ((model, optimizer, step % 2), (twin, by_hand, step % 2)):
            backward(net, step)
            if step in BROKEN:
                broken(net)
            if way:
                steps.first_step(zero_grad=True)
                backward(net, step)
                steps.second_step(zero_grad=True)
            else:
                steps.step(functools.partial(backward, net, step))
                steps.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-7)
    assert clipper.state_dict()["steps"] == STEPS


def on_ranks(name: str, layout):
    model, optimizer, clipper, *_ = pair((INSIDE | WHOLE)[name], kind=layout)
    parameters = run(model, optimizer)
    return parameters, clipper.report.to_dict(), clipper.state_dict()["steps"]


@pytest.mark.parametrize("name", ["accumulating", "torchft", "lookahead", "without hooks", "schedule-free"])
@pytest.mark.parametrize(("layout", "size"), [(ddp, 2), (fsdp2, 4)], ids=["ddp", "fsdp2"])
def test_wrappers_on_ranks_are_one_process(name, layout, size):
    one, by_hand = build(), (INSIDE | WHOLE)[name]
    ByHand.bound = BOUND
    expected = run(one, by_hand(ByHand(one.parameters(), lr=0.05, momentum=0.9)), skips_whole=name in WHOLE)
    results = run_ranks(on_ranks, size, name, layout)
    assert same_bits(results)
    torch.testing.assert_close(results[0][0], expected, rtol=1e-4, atol=1e-6)


def manager_says(refuses: int):
    model = ddp()
    base = SGD(model.parameters(), lr=0.05)
    optimizer = wrappers.fault_tolerant(base, commits=lambda step: step != refuses)
    clipper = distclip.attach(optimizer, model, BOUND)
    run(model, optimizer)
    return optimizer.manager.asked, clipper.state_dict()["steps"], next(model.parameters()).isfinite().all().item()


def test_the_manager_of_torchft_is_asked_at_every_step_also_at_those_that_are_skipped():
    for asked, decided, finite in run_ranks(manager_says, 2, 5):
        assert (asked, decided, finite) == (STEPS, STEPS - 1, True)


def test_what_optimizers_ran_before_changes_nothing():
    """A class that torch patches later, by load_state_dict or a sibling, is heard as well, and no more than once."""
    results = []
    for patched in ("never", "before", "between", "after"):
        model = build()
        optimizer = wrappers.lookahead(SGD(model.parameters(), lr=0.05))
        if patched == "before":
            optimizer._patch_step_function()
        if patched == "between":  # the scheduler keeps the step from before
            StepLR(optimizer, 1)
            optimizer._patch_step_function()
        clipper = distclip.attach(optimizer, model, BOUND)
        if patched == "after":
            optimizer._patch_step_function()
        results.append((run(model, optimizer), clipper.state_dict()["steps"], optimizer.steps))
    assert same_bits(results)
    assert results[0][1:] == (STEPS, STEPS - len(BROKEN))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["lookahead", "without hooks", "patched"])
def test_a_scheduler_of_a_wrapper_goes_on(name, when):
    model = build()
    optimizer = WHOLE[name](SGD(model.parameters(), lr=0.05))
    scheduler = StepLR(optimizer, 1, gamma=0.5) if when == "before" else None
    clipper = distclip.attach(optimizer, model, BOUND)
    scheduler = scheduler or StepLR(optimizer, 1, gamma=0.5)
    run(model, optimizer)
    scheduler.step()
    assert clipper.state_dict()["steps"] == STEPS
    assert scheduler.get_last_lr() == [0.025]


@pytest.mark.parametrize("name", [*INSIDE, *WHOLE])
def test_detach_gives_the_wrapper_back(name):
    model = build()
    optimizer = (INSIDE | WHOLE)[name](base := SGD(model.parameters(), lr=0.05))
    clipper = distclip.attach(optimizer, model, 1e-3)
    clipper.detach()
    assert "step" not in vars(base)
    assert "step" not in vars(optimizer)
    for _ in range(2):
        backward(model)
        optimizer.step()
    assert clipper.report is None
    distclip.attach(optimizer, model, 1e-3)


class TestRefused:
    def test_a_base_and_its_wrapper_would_clip_twice(self):
        for order in (0, 1):
            model = build()
            base = SGD(model.parameters(), lr=0.05)
            both = [base, wrappers.lookahead(base)]
            distclip.attach(both[order], model, 1.0)
            with pytest.raises(ValueError, match="attached already"):
                distclip.attach(both[1 - order], model, 1.0)

    def test_two_optimizers_of_the_same_parameters_inside(self):
        model = build()
        wrapper = wrappers.proxy(SGD(model.parameters(), lr=0.1))
        wrapper.adam = Adam(model.parameters())
        with pytest.raises(ValueError, match=r"\._optimizer and \.adam.*distclip\.attach\(optimizer\._optimizer"):
            distclip.attach(wrapper, model, 1.0)

    def test_what_holds_an_optimizer_and_is_none(self):
        model = build()

        class Engine:
            optim = None

        engine = Engine()
        engine.optim = SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"got Engine as optimizer 0.*an optimizer in \.optim"):
            distclip.attach(engine, model, 1.0)

    @pytest.mark.parametrize("wrap", [wrappers.fault_tolerant, wrappers.private, wrappers.sharpness_aware])
    @pytest.mark.parametrize("behind", [False, True])
    def test_step_of_a_clipper_says_what_to_write(self, wrap, behind):
        model = build()
        optimizer = wrap(SGD(model.parameters(), lr=0.1))
        optimizer = wrappers.proxy(optimizer) if behind else optimizer
        backward(model)
        before = copy.deepcopy(model.state_dict())
        clipper = distclip.Clipper(model, 1.0)
        with pytest.raises(ValueError, match=r"inside step\(\)|before step\(\)") as raised:
            clipper.step(optimizer)
        assert "call distclip.attach(optimizer, model, policy) once" in str(raised.value)
        assert same_bits([before, model.state_dict()])
        assert clipper.state_dict()["steps"] == 0

    def test_sharpness_aware_optimizers_are_known_by_their_names_too(self):
        model = build()
        optimizer = type("GSAM", (SGD,), {})(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="GSAM steps with second gradients"):
            distclip.Clipper(model, 1.0).step(optimizer)

    def test_optimizers_that_the_engine_of_deepspeed_steps(self):
        model = build()
        engines = type("Stage2", (SGD,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
        optimizer = engines(model.parameters(), lr=0.1)
        for call in (distclip.attach, lambda o, m, policy: distclip.Clipper(m, policy).step(o)):
            with pytest.raises(ValueError, match=r"integrations\.deepspeed\.take_over\(engine, policy\)"):
                call(optimizer, model, 1.0)


@pytest.mark.parametrize("name", WHOLE)
def test_step_of_a_clipper_is_right_for_a_wrapper_that_begins_with_its_gradients(name):
    ByHand.bound = BOUND
    model, twin = build(), build()
    optimizer, by_hand = (WHOLE[name](kind(m.parameters(), lr=0.05)) for kind, m in ((SGD, model), (ByHand, twin)))
    clipper = distclip.Clipper(model, BOUND)
    for step in range(STEPS):
        backward(model, step)
        backward(twin, step)
        if step in BROKEN:
            broken(model)
        else:
            by_hand.step()
        assert clipper.step(optimizer).skip == (step in BROKEN)
        optimizer.zero_grad()
        by_hand.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-7)


def test_optimizers_in_a_list_are_clipped_together():
    model = build()
    halves = list(model.parameters())[::2], list(model.parameters())[1::2]
    optimizer = wrappers.together(SGD(halves[0], lr=0.1), AdamW(halves[1]))
    clipper = distclip.attach(optimizer, model, 1e-3)
    backward(model)
    raw = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    optimizer.step()
    assert clipper.report.norm.item() == pytest.approx(raw, rel=1e-6)
    after = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    assert after == pytest.approx(1e-3, rel=1e-4)


class TestStepsPutOnTheInstance:
    def test_one_that_never_calls_the_class_is_no_silent_step(self):
        model = build()
        optimizer = SGD(model.parameters(), lr=0.1)
        held = list(model.parameters())
        optimizer.step = lambda: torch._foreach_add_([p.detach() for p in held], 1.0)
        distclip.attach(optimizer, model, 1.0)
        backward(model)
        with pytest.raises(RuntimeError, match="the step was not clipped"):
            optimizer.step()

    def test_one_that_waits_is_no_error(self):
        model = build()
        optimizer = SGD(model.parameters(), lr=0.1)
        inner, calls = optimizer.step, []
        optimizer.step = lambda: calls.append(0) or (inner() if len(calls) % 2 == 0 else None)
        clipper = distclip.attach(optimizer, model, 1e-3)
        for _ in range(4):
            backward(model)
            optimizer.step()
        assert clipper.state_dict()["steps"] == 2

    def test_a_class_that_copies_torchs_mark_is_heard(self):
        class Decorated(SGD):
            @functools.wraps(SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step.__func__)
            def step(self, closure=None):
                for p in (p for group in self.param_groups for p in group["params"]):
                    p.data.sub_(p.grad)

        model = build()
        assert Decorated.step.hooked
        optimizer = Decorated(model.parameters(), lr=0.1)
        clipper = distclip.attach(optimizer, model, 1e-3)
        backward(model)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert clipper.state_dict()["steps"] == 1
        moved = torch.cat([(p - b).double().flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
        assert moved.item() <= 1.001e-3


class TestSkippedSteps:
    """The host knows the decision, so the step is not made: nothing counts it, and nothing can raise in it."""

    @pytest.mark.parametrize("skips", ["attach", "skip_next_step"])
    @pytest.mark.parametrize("before", [False, True])
    def test_counters_and_hooks_see_none(self, skips, before):
        class Counts(SGD):
            def step(self, closure=None):
                self.state["k"] = self.state.get("k", 0) + 1
                assert any(p.grad is not None for group in self.param_groups for p in group["params"])
                return super().step(closure)

        SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        model = build()
        optimizer, calls = Counts(model.parameters(), lr=0.1), []
        if before:
            StepLR(optimizer, 1)
        if skips == "attach":
            distclip.attach(optimizer, model, 1.0)
        else:
            guard(optimizer, lambda _: calls.append("over"))
            skip_next_step([optimizer], torch.tensor(True))
            optimizer.step()
            calls.clear()
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        state = []
        for step in range(4):
            backward(model)
            if step % 2:
                broken(model)
                if skips == "skip_next_step":
                    skip_next_step([optimizer], torch.tensor(True))
            optimizer.step()
            optimizer.zero_grad()
            state.append(optimizer.state["k"])
        assert state == [1, 1, 2, 2]
        assert [call for call in calls if call != "over"] == ["pre", "pre", "post", "post"] * 2  # two classes

    def test_several_optimizers_attached_together_are_all_left_out(self):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        optimizers = [wrappers.lookahead(SGD(layer.parameters(), lr=0.1)) for layer in model]
        clipper = distclip.attach(optimizers, model, 0.5)
        for step in range(4):
            model(torch.ones(2, 3)).sum().backward()
            if step == 1:
                model[1].bias.grad.fill_(torch.nan)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert [optimizer.steps for optimizer in optimizers] == [3, 3]
        assert clipper.state_dict()["steps"] == 4

    def test_a_step_of_the_class_past_the_instance_has_no_gradients(self):
        model = build()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        clipper = distclip.attach(optimizer, model, 1.0)
        backward(model)
        broken(model)
        before = copy.deepcopy(model.state_dict())
        SGD.step(optimizer)
        assert clipper.report.skip
        assert same_bits([before, model.state_dict()])
        assert all(p.grad is not None for p in model.parameters())

    def test_an_argument_of_step_that_is_no_closure_is_handed_on(self):
        class Weighted(SGD):
            def step(self, weight=1.0):
                self.seen = weight
                return super().step()

        model = build()
        optimizer = Weighted(model.parameters(), lr=0.1)
        clipper = distclip.attach(optimizer, model, 1e-3)
        backward(model)
        optimizer.step(0.5)
        assert optimizer.seen == 0.5
        assert clipper.state_dict()["steps"] == 1

    def test_no_exception_of_ours_is_a_stop_iteration(self):
        model = build()
        optimizer, other = (SGD(model.parameters(), lr=0.1) for _ in range(2))
        distclip.attach(optimizer, model, 1.0)
        other._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
        backward(model)
        with pytest.raises(RuntimeError, match="attach the one whose step"):
            other.step()
