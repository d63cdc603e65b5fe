"""distclip.integrations.lightning: fits of the Trainer and loops of Fabric, beside one process clipped by hand."""

from functools import cache, partial
from math import inf, isfinite, isnan, nan

import pytest
import torch
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import StepLR

from integrations.launches import once
from support.own_policy import OwnGate
from support.ranks import run_ranks, same_bits
from support.samples import rare

pytest.importorskip("lightning", reason="needs the extra: pip install 'distclip[lightning]'")

from lightning.fabric import Fabric
from lightning.pytorch.strategies import DeepSpeedStrategy, XLAStrategy

from distclip import NonFiniteError
from distclip.integrations.lightning import ClipGradients, FabricClipper
from integrations import lightning_runs as runs
from integrations.lightning_runs import STEPS, Case, Lit

FITS = [  # each layout and each way to train, in every run
    *(Case(layout) for layout in ("fsdp1", "tp")),
    *(Case(layout, "autoclip") for layout in ("ddp", "fsdp2")),
    *(Case(layout, bad=5) for layout in ("fsdp1", "tp")),
    *(Case(layout, accumulate=2) for layout in ("ddp", "fsdp2")),
    *(Case(layout, "value") for layout in ("fsdp1", "fsdp2")),
    *(Case(layout, "skip_third", optimizer) for layout, optimizer in (("ddp", "fused"), ("fsdp1", "sgd"))),
    Case("ddp", manual=True, optimizer="sgd"),
    Case("fsdp2", validate=True),
    *(Case(layout, "by_unit") for layout in ("fsdp1", "tp")),
    Case(scaled=True, bad=5),
    Case(scaled=True, corrupt=5),
    Case(policy="skip_third", scaled=True),
]
OTHER_FITS = [
    *(Case(layout) for layout in ("ddp", "fsdp2")),
    *(Case(layout, "autoclip") for layout in ("fsdp1", "tp")),
    *(Case(layout, bad=5) for layout in ("ddp", "fsdp2")),
    Case("fsdp1", accumulate=2),
    Case("ddp", "value"),
    Case("fsdp2", manual=True, optimizer="sgd"),
    *(Case(layout, validate=True) for layout in ("ddp", "fsdp1")),
    Case("ddp", "by_unit"),
]
LOOPS = [
    Case("fsdp2", "by_unit"),
    Case("fsdp2", "autoclip"),
    Case("ddp", "autoclip"),
    Case("fsdp1", "autoclip"),
    *(Case(layout, bad=5) for layout in ("ddp", "fsdp1", "fsdp2")),
    Case("ddp", accumulate=2),
    Case("fsdp2", optimizer="fused"),
    Case("ddp", optimizer="fused", scaled=True, bad=5),
    Case("ddp", "skip_third", scaled=True),
]
RESUMED = [("ddp", "autoclip"), ("fsdp1", "max_norm"), ("fsdp2", "autoclip"), ("fsdp2", "by_unit")]
OTHERS_RESUMED = [("ddp", "max_norm"), ("fsdp1", "autoclip"), ("fsdp2", "max_norm")]
EXACT = {"rel": 1e-6, "nan_ok": True}


def named(case):
    default = vars(Case())
    others = [f"{name}={value}" for name, value in vars(case).items() if value != default[name] and name != "layout"]
    return "-".join([case.layout, *others])


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Lightning warns of workers and CPUs; its own signal handlers and environment stay as they were."""
    runs.quiet()


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """launch(rest): what the ranks return to each (function, key), of the sample or of the rest. One launch for all."""

    def launch(rest):
        folder = str(tmp_path_factory.mktemp("checkpoints"))
        fits, resumed = (OTHER_FITS, OTHERS_RESUMED) if rest else (FITS, RESUMED)
        wanted = {runs.fits: (fits,)}
        wanted |= {(runs.resume, layout, policy): (layout, policy, folder) for layout, policy in resumed}
        if not rest:
            wanted |= {(runs.fit_again, layout): (layout,) for layout in ("ddp", "fsdp2")}
            wanted |= {runs.log: (folder,), runs.alone_among_ranks: (), runs.two_optimizers: ()}
            wanted |= {runs.fabric_fits: (LOOPS, folder)}
        functions = [(key[0] if isinstance(key, tuple) else key, *arguments) for key, arguments in wanted.items()]
        name = f"lightning{'-rest' * rest}"
        results = once(tmp_path_factory, name, lambda: run_ranks(runs.calls, 2, *functions, fresh=True))
        return dict(zip(wanted, zip(*results, strict=True), strict=True))

    return cache(launch)


@pytest.fixture(scope="module")
def more(launches):
    return launches(False)


@pytest.fixture(scope="module")
def loops(more):
    return more[runs.fabric_fits]


def agrees(results, case, scheduled=True):
    """The ranks decide alike, and as one process does."""
    norms, skips, parameters, rate = runs.alone(case, scheduled)
    first = results[0]
    for key in ("norms", "coefs", "skips", "scale"):
        assert same_bits([result[key] for result in results]), key
    assert first["norms"] == pytest.approx(norms, **EXACT)
    assert first["skips"] == skips
    if case.policy != "value":
        assert 0 < sum(coef < 1 for coef in first["coefs"]) < STEPS, "the bound is not between the norms"
    for mine, one in zip(first["parameters"], parameters, strict=True):
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-5)
    return first, rate


@pytest.mark.parametrize("case", [*FITS, *map(rare, OTHER_FITS)], ids=named)
def test_a_fit_is_that_of_one_process(launches, case):
    rest = case in OTHER_FITS
    fits = dict(
        zip(map(named, OTHER_FITS if rest else FITS), zip(*launches(rest)[runs.fits], strict=True), strict=True)
    )
    first, rate = agrees(fits[named(case)], case)
    assert first["global_step"] == STEPS, "skipped steps count"
    assert first["rate"] == (rate if not case.manual else 0.05)
    bad = case.bad is not None or case.corrupt is not None
    assert sum(first["skips"]) == bad + (STEPS // 3 if case.policy == "skip_third" else 0)
    if case.scaled:
        assert first["scale"] == (512.0 if bad else 1024.0), "a policy's skip keeps the scale"


@pytest.mark.thorough
def test_fsdp2_over_tensor_parallel_is_one_process():
    cases = [Case("fsdp2_tp"), Case("fsdp2_tp", "autoclip", bad=5)]
    for case, *results in zip(cases, *run_ranks(runs.fits, 4, cases, fresh=True), strict=True):
        agrees(results, case)


@pytest.mark.parametrize("case", [Case("single"), Case("single", "autoclip", "fused", bad=3)], ids=named)
def test_one_process_is_clipped_as_by_hand(case):
    agrees([runs.fit(case)], case)


@pytest.mark.parametrize("key", [*RESUMED, *map(rare, OTHERS_RESUMED)], ids="-".join)
def test_a_resumed_fit_decides_as_if_it_had_never_stopped(launches, key):
    for whole, first, second in launches(key in OTHERS_RESUMED)[(runs.resume, *key)]:
        assert (first["global_step"], second["global_step"]) == (STEPS // 2, STEPS)
        assert first["norms"] + second["norms"] == pytest.approx(whole["norms"], **EXACT)
        assert first["coefs"] + second["coefs"] == pytest.approx(whole["coefs"], rel=1e-6)
        assert first["skips"] + second["skips"] == whole["skips"]
        for state in (whole["state"], second["state"]):
            assert state["clipper"]["steps"] == STEPS
        for name, value in whole["state"]["clipper"]["policy"].items():
            torch.testing.assert_close(second["state"]["clipper"]["policy"][name], value, rtol=1e-6, atol=0)
        for mine, one in zip(second["parameters"], whole["parameters"], strict=True):
            torch.testing.assert_close(mine, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_second_fit_goes_on_with_the_state_of_the_first(more, layout):
    for norms, state in more[(runs.fit_again, layout)]:
        policy = state["clipper"]["policy"]
        assert len(norms) == state["clipper"]["steps"] == policy["count"] == STEPS
        assert policy["norms"][-len(norms) :].tolist() == pytest.approx(norms, rel=1e-6)


def test_loggers_get_the_numbers_of_telemetry(more):
    (few, table, every), (_, _, every_of_rank_1) = more[runs.log]
    coefs = few["coefs"]
    assert [step for step, _ in few["logged"]] == [3, 5, 7, 11]
    ((bad, at_bad),) = [few["logged"].pop(1)]
    assert (bad, at_bad["clip/skipped"], "clip/fraction" in at_bad) == (5, 1.0, False)
    assert isnan(at_bad["grad_norm/pre_clip"])
    assert [few["skips"][step] for step, _ in few["logged"]] == [False] * 3
    for i, (step, metrics) in enumerate(few["logged"]):
        assert step == 4 * i + 3
        assert metrics["grad_norm/pre_clip"] == pytest.approx(few["norms"][step], **EXACT)
        norms = few["norms"][4 * i : 4 * i + 4]
        assert metrics["grad_norm/max"] == pytest.approx(max(filter(isfinite, norms)), **EXACT)
        assert metrics["clip/coef"] == coefs[step]
        assert metrics["clip/fraction"] == sum(coef < 1 for coef in coefs[4 * i : 4 * i + 4]) / 4
    assert len({metrics["clip/fraction"] for _, metrics in few["logged"]}) > 1
    in_table = [float(row["grad_norm/pre_clip"]) for row in table]
    assert isnan(in_table.pop(1))
    assert in_table == [metrics["grad_norm/pre_clip"] for _, metrics in few["logged"]]
    assert [step for step, _ in every["logged"]] == list(range(STEPS)), "steps are counted, not batches"
    assert every_of_rank_1["logged"] == []


def test_a_process_that_trains_alone_among_others_names_its_group(more):
    norms = runs.alone(Case("single"))[0]
    for error, found in more[runs.alone_among_ranks]:
        assert "trains on 1 ranks, and the default process group has 2" in error
        assert "pass group=" in error
        assert len(found) == len(norms)


def test_several_optimizers_are_told_of_attach_which_clips_each_by_its_own_norm(more):
    norms = runs.alone(Case("single", optimizer="sgd"))[0]
    for error, (one, other) in more[runs.two_optimizers]:
        assert "got 2: remove it, and in on_train_start" in error
        assert "distclip.attach(optimizer, module, policy)" in error
        assert one == other
        assert one[0] == pytest.approx(norms[0], rel=1e-6)
        assert len(one) == STEPS


# ---- Fabric --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(LOOPS)), ids=[named(case) for case in LOOPS])
def test_a_loop_with_fabric_is_that_of_one_process(loops, index):
    case = LOOPS[index]
    first, _ = agrees([rank[0][index] for rank in loops], case, scheduled=False)
    assert first["after"] == STEPS
    if case.scaled:
        assert first["scale"] == (512.0 if case.bad is not None else 1024.0)


@pytest.mark.parametrize("index", range(4), ids=[named(case) for case in LOOPS[:4]])
def test_fabric_saves_and_loads_the_clipper(loops, index):
    for whole, resumed in loops:
        assert resumed[index]["norms"] == pytest.approx(whole[index]["norms"], **EXACT)
        assert resumed[index]["coefs"] == pytest.approx(whole[index]["coefs"], rel=1e-6)
        assert resumed[index]["state"]["steps"] == STEPS


def test_fabric_refuses_what_it_cannot_clip():
    fabric = Fabric(accelerator="cpu", devices=1)
    net = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"must be what fabric.setup\(\) returned, got Linear"):
        FabricClipper(fabric, net, 1.0)
    clipper = FabricClipper(fabric, fabric.setup(net), 1.0)
    with pytest.raises(ValueError, match="the scaler is Fabric's: call step"):
        clipper.step(SGD(net.parameters(), 0.1), scaler=torch.amp.GradScaler("cpu"))
    scaled = Fabric(
        accelerator="cpu", devices=1, plugins=runs.FabricScaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    )
    clipper = FabricClipper(scaled, scaled.setup(torch.nn.Linear(2, 1)), 1.0)
    for call in (clipper.clip_, clipper.measure, clipper.fingerprint):
        with pytest.raises(RuntimeError, match=r"still multiplied by the GradScaler's scale: call step\(optimizer\)"):
            call()
    fabric._strategy = XLAStrategy.__new__(XLAStrategy)
    with pytest.raises(ValueError, match="FabricClipper does not know XLAStrategy"):
        FabricClipper(fabric, net, 1.0)


def test_signals_are_passed_by_who_makes_the_calls_and_refused_where_nobody_can():
    with pytest.raises(ValueError, match=r"OwnGate asks for the signals loss, tokens, .* ClipGradients clips"):
        ClipGradients(OwnGate())
    fabric = Fabric(accelerator="cpu", devices=1)
    net = torch.nn.Linear(2, 1)
    module, optimizer = fabric.setup(net, SGD(net.parameters(), 0.1))
    clipper = FabricClipper(fabric, module, OwnGate(most=2.0))
    for call in (clipper.measure, clipper.clip_, partial(clipper.step, optimizer)):
        fabric.backward(module(torch.ones(1, 2)).sum())
        assert [call(signals={"loss": loss, "tokens": 1}).skip.item() for loss in (1.0, 3.0)] == [False, True]
        with pytest.raises(ValueError, match="the policy asks for signals="):
            call()


def test_a_step_of_fabric_that_raises_does_not_leave_the_scale_in_the_next_norm():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=runs.FabricScaled("16-mixed", "cpu", scaler))
    net = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, SGD(net.parameters(), 0.1))
    clipper = FabricClipper(fabric, model, 1.0, nonfinite="raise")
    with pytest.raises(ValueError, match="needs the optimizers"):
        clipper.step()  # before anything was unscaled: nothing to update
    fabric.backward(model(torch.ones(2, 4)).sum() * nan)
    with pytest.raises(NonFiniteError):
        clipper.step(optimizer)
    optimizer.zero_grad()
    assert scaler.get_scale() == 512.0
    fabric.backward(model(torch.ones(2, 4)).sum())
    assert clipper.step(optimizer).norm.item() == pytest.approx(20**0.5)


# ---- what is refused, and odd orders -------------------------------------------------------------------------


def single(module=Lit, /, **settings):
    case = Case("single", **settings)
    return runs.fit(case, module(case))


def scheduled(optimizer):
    return [optimizer], [{"scheduler": StepLR(optimizer, 4, 0.5), "interval": "step"}]


def test_a_second_owner_is_refused():
    class Overrides(Lit):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pass

    class Calls(Lit):
        def training_step(self, rows, batch_idx):
            self.manual_backward(self.loss(rows, batch_idx))
            self.clip_gradients(self.optimizers(), gradient_clip_val=0.5)

    class Another(ClipGradients):
        pass

    with pytest.raises(ValueError, match=r"Trainer\(gradient_clip_val=0.5\) would clip again.* remove gradient_clip"):
        single(trainer={"gradient_clip_val": 0.5})
    with pytest.raises(ValueError, match=r"Overrides.configure_gradient_clipping would clip again.* remove the method"):
        single(Overrides)
    with pytest.raises(ValueError, match=r"LightningModule.clip_gradients\(0.5\) was called.* remove the call"):
        single(Calls, manual=True)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ClipGradients`"):  # Lightning's
        runs.trainer_of(Case("single"), [ClipGradients(1.0), ClipGradients(1.0)])
    with pytest.raises(ValueError, match="two callbacks of the Trainer are ClipGradients: remove one"):
        runs.trainer_of(Case("single"), [ClipGradients(1.0), Another(1.0)]).fit(Lit(), runs.loader(Case("single")))
    assert single(trainer={"gradient_clip_val": 0})["global_step"] == STEPS  # Lightning's word for none


def test_the_clipper_of_the_callback_looks_and_does_not_act():
    result = single()
    clipper, plugin = result["clip"].clipper, result["trainer"].precision_plugin
    assert clipper.report.norm == result["norms"][-1]
    with pytest.raises(RuntimeError, match="ClipGradients clips with this Clipper already"):
        clipper.clip_()
    assert "clip_gradients" not in vars(plugin), "the Trainer is left as it was"


def test_optimizers_that_cannot_be_clipped_are_refused():
    class Searches(Lit):
        def configure_optimizers(self):
            return LBFGS(self.parameters())

    class Past(Lit):
        def training_step(self, rows, batch_idx):
            self.manual_backward(self.loss(rows, batch_idx))
            self.optimizers().optimizer.step()

    with pytest.raises(ValueError, match="LBFGS takes the gradients several times a step"):
        single(Searches)
    with pytest.raises(ValueError, match=r"leaves the gradients of a fused optimizer scaled: make AdamW with fused=F"):
        single(optimizer="fused", scaled=True)
    with pytest.raises(RuntimeError, match="AdamW was stepped past Lightning"):
        single(Past, manual=True)


def test_an_optimizer_whose_step_calls_that_of_its_base_is_stepped_by_lightning():
    class Nested(SGD):
        def step(self, closure=None):
            return super().step(closure)

    class CallsItself(SGD):
        def step(self, closure=None):
            loss = None if closure is None else closure()
            super().step()
            return loss

    SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)  # makes the hooks of the base class run as well
    plain = single(optimizer="sgd", bad=3)
    for kind in (Nested, CallsItself):

        class Own(Lit):
            def configure_optimizers(self):
                return scheduled(kind(self.parameters(), lr=0.05, momentum=0.9))  # noqa: B023

        for scaled in (False, True):
            assert same_bits([single(Own, bad=3, scaled=scaled)["norms"], plain["norms"]])


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_the_optimizer_does_not_hold_do_not_add_up_in_the_norm(scaled):
    class Part(Lit):
        def configure_optimizers(self):
            return scheduled(SGD(self.net.head.parameters(), lr=0.05))

        def on_before_optimizer_step(self, optimizer):
            others = torch.cat([p.grad.flatten() for p in self.net.blocks.parameters()])
            seen.append(others.norm().item())
            clipper = next(c for c in self.trainer.callbacks if isinstance(c, ClipGradients)).clipper
            before = clipper.fingerprint()
            for p in self.net.blocks.parameters():
                p.grad.add_(1.0)
            assert clipper.fingerprint() == before

    seen, net, norms = [], runs.build(), []
    optimizer = SGD(net.head.parameters(), lr=0.05)
    ([_], [scheduler]) = scheduled(optimizer)
    for step in range(STEPS):
        words, targets = runs.batch(step)
        optimizer.zero_grad()
        (net(words) - targets).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.head.parameters(), runs.BOUND).item())
        optimizer.step()
        scheduler["scheduler"].step()
    assert single(Part, scaled=scaled)["norms"] == pytest.approx(norms, rel=1e-5)
    assert seen[-1] > 2 * seen[0], "nobody zeroes the others"


@pytest.mark.parametrize("name", ["measure", "fingerprint"])
def test_looking_is_refused_where_gradients_are_scaled(name):
    class Looks(Lit):
        def on_after_backward(self):
            getattr(next(c for c in self.trainer.callbacks if isinstance(c, ClipGradients)).clipper, name)()

    with pytest.raises(RuntimeError, match=rf"GradScaler's scale: call {name}\(\) in on_before_optimizer_step"):
        single(Looks, scaled=True)
    assert single(Looks)["global_step"] == STEPS


def test_strategies_that_step_otherwise_are_refused():
    trainer = runs.trainer_of(Case("single"))
    for strategy, match in [
        (DeepSpeedStrategy, r"distclip.integrations.deepspeed.take_over\(trainer.strategy.model, policy\)"),
        (XLAStrategy, "does not know XLAStrategy: use one of SingleDeviceStrategy, DDPStrategy"),
    ]:
        trainer._accelerator_connector.strategy = strategy.__new__(strategy)  # neither can be made on this machine
        with pytest.raises(ValueError, match=match):
            ClipGradients(1.0).setup(trainer, Lit(), "fit")


def test_a_training_step_that_returns_none_is_no_step():
    class Returns(Lit):
        def training_step(self, rows, batch_idx):
            return None if batch_idx in (3, 7) else super().training_step(rows, batch_idx)

    plain, scaled = single(Returns, policy="autoclip"), single(Returns, policy="autoclip", scaled=True)
    accumulated = single(Returns, policy="autoclip", scaled=True, accumulate=2)  # what was accumulated is dropped
    for result in (plain, scaled, accumulated):
        assert result["state"]["clipper"]["steps"] == STEPS - 2
        assert 0.0 not in result["norms"]
    assert scaled["norms"] == plain["norms"]
    halves = single(Returns, policy="autoclip", accumulate=2)  # Lightning steps with what was accumulated
    assert halves["state"]["clipper"]["steps"] == STEPS


def test_an_epoch_may_end_in_mid_accumulation():
    result = single(accumulate=4, trainer={"limit_train_batches": 10})
    assert result["global_step"] == len(result["norms"]) == 3


def test_other_precisions_and_short_runs():
    exact = runs.alone(Case("single"))[0]
    assert single(precision="64-true")["norms"] == pytest.approx(exact, rel=1e-6)
    for precision in ("bf16-mixed", "bf16-true"):
        norms = single(precision=precision)["norms"]
        assert norms[0] == pytest.approx(exact[0], rel=1e-2)
        assert not same_bits([norms, exact])
    assert len(single(trainer={"overfit_batches": 2})["norms"]) == 2
    assert len(single(trainer={"fast_dev_run": True})["norms"]) == 1


def test_nonfinite_steps_raise_or_go_through_where_that_was_asked_for():
    with pytest.raises(NonFiniteError, match=r"net\.embed\.weight on rank 0 has NaN"):
        single(bad=3, options={"nonfinite": "raise"})
    assert any(map(isnan, single(bad=3, options={"nonfinite": "propagate"})["norms"][4:]))


def test_a_state_held_before_training_is_not_lost():
    clip = ClipGradients(1.0)
    assert clip.state_dict() == {}
    state = single(policy="autoclip")["state"]
    clip = ClipGradients(runs.POLICIES["autoclip"])
    clip.load_state_dict(state)
    assert clip.state_dict() is state
    runs.fit(Case("single", "autoclip"), clip=clip)
    assert clip.state_dict()["clipper"]["steps"] == 2 * STEPS
    clip = ClipGradients(inf)
    clip.load_state_dict(state)
    with pytest.raises(ValueError, match="this policy's state has the keys"):
        runs.fit(Case("single"), clip=clip)


def test_a_second_fit_that_cannot_start_leaves_the_state_of_the_first():
    right = [True]

    def everything(name: str, parameter: torch.Tensor) -> bool:
        if not right[0]:
            raise ValueError("not this time")
        return True

    clip = ClipGradients(runs.POLICIES["autoclip"], only=everything)
    runs.fit(Case("single", "autoclip"), clip=clip)
    state = clip.state_dict()
    right[0] = False
    with pytest.raises(ValueError, match="not this time"):
        runs.fit(Case("single", "autoclip"), clip=clip)
    assert clip.state_dict()["clipper"]["steps"] == state["clipper"]["steps"] == STEPS
    right[0] = True
    runs.fit(Case("single", "autoclip"), clip=clip)
    assert clip.state_dict()["clipper"]["steps"] == 2 * STEPS
