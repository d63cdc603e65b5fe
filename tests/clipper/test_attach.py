"""attach: loops that keep their lines clip in `optimizer.step()`, or change nothing there, on all ranks alike."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

import distclip
from support.layouts import backward, build, ddp, ddp_bucket_view, fsdp2
from support.own_policy import OwnRunningMean
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import crossed

STEPS = 12
BOUND = 1.4  # between the norms of these runs
BROKEN = 4  # the step with a NaN
COUNTED = (0, 2, 3, 5)  # the steps whose collectives are counted, which takes as long as the step
OPTIMIZERS = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3),
    "fused": lambda parameters: AdamW(parameters, lr=1e-3, fused=True),
    "fused_sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.05),
}
POLICIES = {
    "max_norm": BOUND,
    "autoclip": distclip.AutoClip(percentile=40),
    "value": distclip.ValueClip(0.01),
    "by unit": OwnRunningMean(),
}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(model) -> list[torch.Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def trained(layout, optimizer: str, policy, attached: bool):
    """Norms, coefficients, parameters; one rank's gradient has a NaN in the middle."""
    model = layout()
    steps = OPTIMIZERS[optimizer](model.parameters())
    clipper = distclip.attach(steps, model, policy) if attached else distclip.Clipper(model, policy)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    log, counts = [], []
    for step in range(STEPS):
        backward(model, step)
        if step == BROKEN and rank == 0:
            local(next(p.grad for p in model.parameters()))[0, 0] = torch.nan
        with count_collectives() if step in COUNTED else nullcontext({}) as counted:
            steps.step() if attached else clipper.step(steps)
        counts += counted.values()
        log.append(clipper.report.to_dict())
        steps.zero_grad()
    state = {i: {k: local(v) for k, v in kept.items()} for i, kept in steps.state_dict()["state"].items()}
    return log, whole(model), counts, state


CASES = [(layout, name) for layout in (build, ddp, ddp_bucket_view, fsdp2) for name in OPTIMIZERS]
CASES.remove((fsdp2, "fused_sgd"))  # torch 2.13 has no fused SGD for DTensors


@pytest.mark.parametrize(("layout", "optimizer", "policy"), crossed(CASES, POLICIES))
def test_an_attached_optimizer_does_what_step_does(layout, optimizer, policy):
    arguments = layout, optimizer, POLICIES[policy]
    if layout is build:
        (hooked,), (called,) = [trained(*arguments, True)], [trained(*arguments, False)]
        pairs = [(hooked, called)]
    else:
        pairs = list(
            zip(run_ranks(trained, 2, *arguments, True), run_ranks(trained, 2, *arguments, False), strict=True)
        )
    for (log, parameters, counts, state), (their_log, theirs, _, their_state) in pairs:
        assert [bool(entry["skip"]) for entry in log] == [step == BROKEN for step in range(STEPS)]
        assert same_bits([log, their_log])
        assert same_bits([parameters, theirs])
        assert same_bits([state, their_state]), "a skipped step must not be counted"
        clipped = [entry["coef"] < 1 for entry in log]
        assert policy == "value" or (any(clipped) and not all(clipped))
        if layout is not build:
            compares = (1, 2, 4, 8) if layout is not fsdp2 else ()  # calls that compare copies
            assert counts == [2 if step + 1 in compares else 1 for step in COUNTED]


def small(count: int = 1, **options):
    """A model, its optimizers, each with a layer of its own, and the Clipper they are attached to."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(count)))
    optimizers = [SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model]
    return model, optimizers, distclip.attach(optimizers, model, 0.5, **options)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 3)).square().sum() * 10


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def norm_of(tensors) -> float:
    return torch.cat([t.flatten().double() for t in tensors]).norm().item()


class TestSkipping:
    def test_gradients_come_back_and_nothing_else_happens(self):
        model, (optimizer,), clipper = small()
        loss_of(model).backward()
        model[0].weight.grad[1, 1] = torch.inf
        before, found, kept = copy.deepcopy(model.state_dict()), gradients(model), model[0].weight.grad
        optimizer.step()
        assert clipper.report.skip
        assert same_bits([before, model.state_dict()])
        assert same_bits([gradients(model), found])
        assert model[0].weight.grad is kept
        assert not optimizer.state

    def test_also_where_a_step_with_a_closure_raises(self):
        class Failing(SGD):
            def step(self, closure=None):
                closure()
                assert all(p.grad is None for group in self.param_groups for p in group["params"])
                raise OSError("disk")

        model = torch.nn.Linear(3, 3)
        optimizer = Failing(model.parameters(), lr=0.1)
        distclip.attach(optimizer, model, 1.0)
        loss_of(model).backward()
        model.bias.grad.fill_(torch.nan)
        with pytest.raises(OSError, match="disk"):
            optimizer.step(lambda: None)
        assert model.weight.grad is not None
        assert model.bias.grad.isnan().all()

    def test_also_where_a_hook_raises_that_came_before(self):
        model = torch.nn.Linear(3, 3)
        optimizer = SGD(model.parameters(), lr=0.1)

        def fail(*_):
            raise OSError("disk")

        handle = optimizer.register_step_pre_hook(fail)
        distclip.attach(optimizer, model, 0.5)
        loss_of(model).backward()
        model.bias.grad.fill_(torch.nan)
        with pytest.raises(OSError, match="disk"):
            optimizer.step()
        assert model.bias.grad.isnan().all()
        handle.remove()
        optimizer.step()
        assert model.bias.grad.isnan().all()

    def test_an_exception_leaves_no_factor_in_a_fused_optimizer(self):
        model = torch.nn.Linear(3, 3)
        optimizer = AdamW(model.parameters(), fused=True)

        def fail(*_):
            raise OSError("disk")

        distclip.attach(optimizer, model, 1e-3)
        optimizer.register_step_pre_hook(fail)
        loss_of(model).backward()
        with pytest.raises(OSError, match="disk"):
            optimizer.step()
        assert "grad_scale" not in vars(optimizer)
        assert "found_inf" not in vars(optimizer)

    @pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad, SGD])
    def test_without_waiting_where_reading_is_not_free(self, kind):
        model = torch.nn.Linear(3, 3)
        optimizer = kind(model.parameters(), lr=0.1, fused=True)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            pytest.skip(f"the fused {kind.__name__} of torch {torch.__version__} knows no found_inf")
        seen = []
        clipper = distclip.attach(optimizer, model, 0.5, decides_on_device=True)  # to the Engine, as its other options
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((o.found_inf.item(), len(_all(o)))))
        for broken in (False, True, False):
            optimizer.zero_grad()
            loss_of(model).backward()
            if broken:
                model.weight.grad[0, 0] = torch.nan
            before = copy.deepcopy(model.state_dict())
            optimizer.step()
            assert same_bits([before, model.state_dict()]) == broken
            assert bool(clipper.report.skip) == broken
        assert seen == [(0.0, 2), (1.0, 2), (0.0, 2)]

    def test_the_limit_of_skips_raises_from_the_step(self):
        model, (optimizer,), _ = small(max_consecutive_skips=1)
        loss_of(model).backward()
        model[0].weight.grad[0, 0] = torch.nan
        optimizer.step()
        with pytest.raises(distclip.NonFiniteError, match="weight"):
            optimizer.step()

    @pytest.mark.parametrize("closure", [False, True])
    def test_what_an_optimizer_counts_in_its_groups_is_counted_with_a_closure_alone(self, closure):
        class Counting(SGD):
            def step(self, closure=None):
                self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
                return super().step(closure)

        model = torch.nn.Linear(3, 3)
        optimizer = Counting(model.parameters(), lr=0.1)
        distclip.attach(optimizer, model, 1.0)
        loss_of(model).backward()
        model.bias.grad.fill_(torch.nan)
        before = copy.deepcopy(model.state_dict())
        optimizer.step((lambda: None) if closure else None)
        assert same_bits([before, model.state_dict()])
        assert optimizer.param_groups[0].get("k", 0) == closure  # the docstring says so


def _all(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class TestSeveralOptimizers:
    def test_the_first_step_decides_for_all(self):
        model, optimizers, clipper = small(3)
        for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
            loss_of(model).backward()
            raw, before = gradients(model), whole(model)
            state = [copy.deepcopy(o.state_dict()) for o in optimizers]
            reports = []
            for index in order:
                optimizers[index].step()
                reports.append(clipper.report)
            assert all(report is reports[0] for report in reports), "one decision an iteration"
            assert reports[0].norm.item() == pytest.approx(norm_of(raw), rel=1e-6)
            factor = 0.5 / (norm_of(raw) + 1e-6)
            twin = [torch.nn.Parameter(p.clone()) for p in before]
            for index in range(3):
                mine = twin[2 * index : 2 * index + 2]
                plain = SGD(mine, lr=0.1, momentum=0.9)
                plain.load_state_dict(state[index])
                for p, g in zip(mine, raw[2 * index :], strict=False):
                    p.grad = g * factor
                plain.step()
            assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(twin, model.parameters(), strict=True))
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert clipper.state_dict()["steps"] == 3

    def test_all_of_them_skip(self):
        model, optimizers, _ = small(2)
        loss_of(model).backward()
        model[1].weight.grad[0, 0] = torch.nan
        before = whole(model)
        for optimizer in optimizers:
            optimizer.step()
        assert same_bits([before, whole(model)])

    def test_a_backward_between_the_steps_is_refused(self):
        model, (first, second), _ = small(2)
        loss_of(model).backward()
        first.step()
        before = whole(model)
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="run every backward before the first step"):
            second.step()
        assert same_bits([before, whole(model)])

    def test_new_gradients_between_the_steps_are_refused(self):
        model, (first, second), _ = small(2)
        loss_of(model).backward()
        first.step()
        model.zero_grad()
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="run every backward before the first step"):
            second.step()

    def test_gradients_are_never_clipped_twice(self):
        model, (first, _), _ = small(2)
        loss_of(model).backward()
        first.step()
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="has not stepped since its gradients were clipped"):
            first.step()

    def test_one_that_steps_less_often_may_be_cleared(self):
        model, (first, second), clipper = small(2)
        for step in range(4):
            model.zero_grad()
            loss_of(model).backward()
            first.step()
            if step % 2:
                second.step()
        assert clipper.state_dict()["steps"] == 4

    def test_gradients_zeroed_in_place_look_like_clipped_ones_and_the_error_says_how_to_clear_them(self):
        model, (first, second), clipper = small(2)
        for step in range(2):
            model.zero_grad(set_to_none=False)
            loss_of(model).backward()
            if step == 1:
                with pytest.raises(RuntimeError, match=r"zero_grad\(\) meanwhile, which must set them to None"):
                    first.step()
                second.zero_grad(set_to_none=True)
            first.step()
        assert clipper.state_dict()["steps"] == 2

    def test_or_attached_by_itself(self):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        optimizers = [SGD(layer.parameters(), lr=0.1) for layer in model]
        clippers = [distclip.attach(o, layer, 0.5) for o, layer in zip(optimizers, model, strict=True)]
        loss_of(model).backward()
        found = norm_of(p.grad for p in model[0].parameters())
        optimizers[0].step()
        loss_of(model).backward()
        optimizers[1].step()
        assert clippers[0].report.norm.item() == pytest.approx(found, rel=1e-6)
        assert clippers[1].report.norm.item() != clippers[0].report.norm.item()


class TestOwners:
    def test_the_clipper_itself_refuses(self):
        model, (optimizer,), clipper = small()
        loss_of(model).backward()
        for call in (clipper.clip_, lambda: clipper.step(optimizer)):
            with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) clips with this Clipper already"):
                call()
        assert clipper.measure().norm.item() == pytest.approx(norm_of(gradients(model)), rel=1e-6)

    def test_an_optimizer_is_attached_once(self):
        model, (optimizer,), clipper = small()
        with pytest.raises(ValueError, match="attached already"):
            distclip.attach(optimizer, model, 1.0)
        clipper.detach()
        with pytest.raises(ValueError, match="attached already"):
            distclip.attach([optimizer, optimizer], model, 1.0)
        distclip.attach(optimizer, model, 1.0)

    @pytest.mark.parametrize(("given", "message"), [([], "at least one"), ([3], "got int"), ("x", "got str")])
    def test_what_is_no_optimizer(self, given, message):
        with pytest.raises(ValueError, match=message):
            distclip.attach(given, torch.nn.Linear(2, 2), 1.0)

    def test_a_refused_policy_leaves_no_hook(self):
        model = torch.nn.Linear(3, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="max_norm"):
            distclip.attach(optimizer, model, -1.0)
        distclip.attach(optimizer, model, 1.0)

    def test_gradients_that_no_optimizer_holds_do_not_add_up_in_the_norm(self):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        optimizer = SGD(model[1].parameters(), lr=0.0)
        clipper = distclip.attach(optimizer, model, 1e-3, fingerprint_every=1)
        alone = norm_of(torch.autograd.grad(loss_of(model), list(model[0].parameters())))
        for step in range(1, 4):
            loss_of(model).backward()
            found = norm_of(p.grad for p in model[1].parameters())
            assert clipper.measure().norm.item() == pytest.approx(found, rel=1e-6)
            fingerprint = clipper.fingerprint()
            optimizer.step()
            assert clipper.report.norm.item() == pytest.approx(found, rel=1e-6)
            assert clipper.report.fingerprint == fingerprint
            optimizer.zero_grad()
            others = norm_of(p.grad for p in model[0].parameters())
            assert others == pytest.approx(step * alone, rel=1e-6), "they are neither scaled nor zeroed"
        clipper.detach()
        assert clipper.measure().norm.item() == pytest.approx(others, rel=1e-6)

    @pytest.mark.parametrize("first", [torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))])
    def test_model_and_optimizer_swapped(self, first):
        with pytest.raises(ValueError, match=r"got \w+ as optimizer 0: call attach\(optimizer, model, policy\)"):
            distclip.attach(first, SGD(first.parameters(), lr=0.1), 1.0)


class TestWrongOrder:
    def test_a_step_that_calls_the_step_of_its_base_is_one_step(self):
        class Nested(SGD):
            def step(self, closure=None):
                return super().step(closure)

        SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # makes the hooks of the base class run as well
        model, twin = build(), build()
        optimizer, plain = Nested(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
        clippers = distclip.attach(optimizer, model, BOUND), distclip.attach(plain, twin, BOUND)
        for step in range(STEPS):
            closures = [lambda m=m: backward(m, step) for m in (model, twin)] if step % 2 else [None, None]  # noqa: B023
            for m, o, closure in zip((model, twin), (optimizer, plain), closures, strict=True):
                if closure is None:
                    backward(m, step)
                o.step(closure)
                o.zero_grad()
        assert same_bits([clipper.report.to_dict() for clipper in clippers])
        assert same_bits([whole(model), whole(twin)])
        assert [clipper.state_dict()["steps"] for clipper in clippers] == [STEPS, STEPS]

    def test_a_step_past_the_instance_that_raised_is_named_and_forgotten(self):
        class Failing(SGD):
            def step(self, closure=None):
                raise OSError("disk")

        model = torch.nn.Linear(3, 3)
        optimizer = Failing(model.parameters(), lr=0.1)
        distclip.attach(optimizer, model, 1.0)
        loss_of(model).backward()
        with pytest.raises(OSError, match="disk"):
            Failing.step(optimizer)
        with pytest.raises(RuntimeError, match=r"Failing was stepped past optimizer\.step"):
            optimizer.step()
        with pytest.raises(OSError, match="disk"):
            optimizer.step()

    def test_an_optimizer_that_runs_its_closure_again_and_again(self):
        model = torch.nn.Linear(3, 3)
        optimizer = LBFGS(model.parameters())
        distclip.attach(optimizer, model, 1.0)

        def closure():
            model.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match="LBFGS runs its closure more than once"):
            optimizer.step(closure)

    def test_a_scaler_that_has_not_unscaled(self):
        model = torch.nn.Linear(3, 3)
        optimizer = AdamW(model.parameters(), fused=True)
        distclip.attach(optimizer, model, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(model)).backward()
        with pytest.raises(RuntimeError, match=r"scaler\.unscale_\(optimizer\) before"):
            scaler.step(optimizer)

    def test_a_scaler_that_has_unscaled(self):
        model = torch.nn.Linear(3, 3)
        optimizer = AdamW(model.parameters(), fused=True)
        clipper = distclip.attach(optimizer, model, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        found = norm_of(gradients(model))
        scaler.step(optimizer)
        scaler.update()
        assert clipper.report.norm.item() == pytest.approx(found, rel=1e-6)

    def test_a_scaler_before_an_optimizer_that_is_not_fused(self):
        model, (optimizer,), clipper = small()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        loss = loss_of(model)
        plain = norm_of(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # unscales by itself, before our hook
        scaler.update()
        assert clipper.report.norm.item() == pytest.approx(plain, rel=1e-6)


class TestClosures:
    @pytest.mark.parametrize("kind", ["sgd", "fused"])
    @pytest.mark.parametrize("by_name", [False, True])
    def test_gradients_made_in_a_closure_are_clipped(self, kind, by_name):
        model, twin = build(), build()
        optimizer, plain = (OPTIMIZERS[kind](m.parameters()) for m in (model, twin))
        attached, clipper = distclip.attach(optimizer, model, BOUND), distclip.Clipper(twin, BOUND)
        for step in range(STEPS):
            broken = step == BROKEN

            def closure(step=step, broken=broken):
                optimizer.zero_grad()
                loss = backward(model, step)
                if broken:
                    model.head.weight.grad[0, 0] = torch.nan
                return loss

            loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            expected = backward(twin, step)
            if broken:
                twin.head.weight.grad[0, 0] = torch.nan
            clipper.step(plain)
            assert loss == expected
            assert same_bits([attached.report.to_dict(), clipper.report.to_dict()])
            assert bool(attached.report.skip) == broken
            plain.zero_grad()
        assert same_bits([whole(model), whole(twin)])

    def test_an_exception_in_a_closure_is_the_users(self):
        model, (optimizer,), clipper = small()
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        loss_of(model).backward()
        optimizer.step()
        assert clipper.state_dict()["steps"] == 1


def test_an_optimizer_that_is_initialised_again_is_clipped_still():
    """Its hooks are gone then, and with them nothing clipped."""
    model, (optimizer,), clipper = small()
    for step in range(2):
        if step:
            optimizer.__init__(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        (1e3 * loss_of(model)).backward()
        expected = clipper.measure()
        before = [p.detach().clone() for p in model.parameters()]
        gradients_before = [expected.coef * p.grad for p in model.parameters()]
        optimizer.step()
        for p, was, gradient in zip(model.parameters(), before, gradients_before, strict=True):
            assert torch.allclose(was - p, 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert clipper.steps == 2
    assert clipper.report.coef < 1
    clipper.detach()
    assert "step" not in vars(optimizer)


class TestDetach:
    @pytest.mark.parametrize("scheduled", ["never", "before", "after"])
    def test_the_optimizer_is_as_it_was(self, scheduled):
        model = torch.nn.Linear(3, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        if scheduled == "before":
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        before = vars(optimizer).get("step")
        clipper = distclip.attach(optimizer, model, 1e-3)
        if scheduled == "after":
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        clipper.detach()
        loss_of(model).backward()
        weight, gradient = model.weight.detach().clone(), model.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.weight, torch.add(weight, gradient, alpha=-0.1))
        assert clipper.report is None
        assert scheduled == "after" or vars(optimizer).get("step") is before
        clipper.detach()  # a second time does nothing
        assert clipper.clip_().coef < 1

    def test_a_detached_clipper_is_no_rival_where_a_scheduler_has_wrapped_the_step(self):
        model = torch.nn.Linear(3, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = distclip.attach(optimizer, model, 1.0)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        clipper.detach()
        del clipper
        gc.collect()
        anew = distclip.attach(optimizer, model, 1.0)
        loss_of(model).backward()
        anew.verify()

    def test_attached_optimizers_live_as_long_as_their_clipper_and_no_longer(self):
        model, optimizers, clipper = small(2)
        alive = list(map(weakref.ref, optimizers))
        del optimizers
        gc.collect()
        loss_of(model).backward()
        assert clipper.measure().norm == pytest.approx(norm_of(gradients(model)))
        del clipper
        gc.collect()
        assert [reference() for reference in alive] == [None, None]

    def test_in_the_middle_of_an_iteration(self):
        model, (first, second), clipper = small(2)
        loss_of(model).backward()
        first.step()
        clipper.detach()
        second.step()
        assert clipper.state_dict()["steps"] == 1

    @pytest.mark.parametrize("order", ["scheduler first", "scheduler second"])
    def test_schedulers_count_the_steps(self, order, recwarn):
        model = torch.nn.Linear(3, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        if order == "scheduler first":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        distclip.attach(optimizer, model, 1.0)
        if order == "scheduler second":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        loss_of(model).backward()
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [0.05]
        assert not recwarn.list, "torch warns when it has not seen the optimizer step"
