"""What optimizers/test_wrapped.py promises, for what frameworks hand out and for wrappers that users hand to them."""

import tempfile

import pytest
import torch
from torch import nn
from torch.optim import SGD

import distclip
from support import wrappers

pytest.importorskip("accelerate", reason="needs the extra: pip install 'distclip[accelerate]'")
pytest.importorskip("lightning", reason="needs the extra: pip install 'distclip[lightning]'")

import lightning
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer

from distclip.integrations.accelerate import Accelerator
from distclip.integrations.lightning import ClipGradients, FabricClipper

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
ONE = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Lightning warns of workers."""


class Counts(SGD):
    """As MADGRAD and Distributed Shampoo count, and as Adai demands gradients."""

    def step(self, closure=None):
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            raise RuntimeError("no parameter has a gradient")
        self.state["k"] = self.state.get("k", 0) + 1
        return super().step(closure)


def accelerator_of(model, optimizer, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    return accelerator, *accelerator.prepare(model, optimizer)


def loss_of(model, step=0, bad=()):
    return 1000 * model(torch.ones(2, 3) + step).sum() * (torch.nan if step in bad else 1.0)


class TestAccelerate:
    def test_attach_clips_once_accumulation_is_over(self):
        net = nn.Linear(3, 1)
        accelerator, model, optimizer = accelerator_of(
            net, SGD(net.parameters(), lr=1.0), gradient_accumulation_steps=2
        )
        clipper, norms = distclip.attach(optimizer, model, 1.0), []
        for step in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                if step % 2:
                    norms.append(torch.cat([p.grad.double().flatten() for p in net.parameters()]).norm().item())
                before = net.weight.detach().clone()
                optimizer.step()
                optimizer.zero_grad()
                moved = (net.weight - before).norm().item()
                assert (0 < moved <= 1) if step % 2 else moved == 0
        assert clipper.state_dict()["steps"] == 2
        assert clipper.report.norm.item() == pytest.approx(norms[-1], rel=1e-6)

    @pytest.mark.parametrize("wrap", [lambda base: base, wrappers.lookahead, wrappers.lookahead_without_hooks])
    def test_a_nan_step_is_not_taken_and_counted_by_nothing(self, wrap):
        net = nn.Linear(3, 1)
        inner = wrap(base := Counts(net.parameters(), lr=0.1))
        inner.state_dict, inner.load_state_dict = base.state_dict, lambda state: None
        accelerator, model, optimizer = accelerator_of(net, inner)
        clipper = accelerator.clipper(model, 1.0)
        skipped = []
        for step in range(4):
            accelerator.backward(loss_of(model, step, bad=(1, 2)))
            clipper.clip_()
            optimizer.step()
            optimizer.zero_grad()
            skipped.append(bool(optimizer.step_was_skipped))
        assert skipped == [False, True, True, False]
        assert base.state["k"] == 2
        assert all(p.isfinite().all() for p in net.parameters())

    @pytest.mark.parametrize("wrap", [wrappers.fault_tolerant, wrappers.private, wrappers.sharpness_aware])
    def test_a_clipper_says_what_to_write_for_wrappers_that_make_gradients_in_their_step(self, wrap):
        net = nn.Linear(3, 1)
        inner = wrap(SGD(net.parameters(), lr=0.1))
        inner.state_dict, inner.load_state_dict = dict, lambda state: None
        accelerator, model, _ = accelerator_of(net, inner)
        clipper = accelerator.clipper(model, 1.0)
        accelerator.backward(loss_of(model))
        with pytest.raises(ValueError, match=r"call distclip\.attach\(optimizer, model, policy\) once"):
            clipper.clip_()

    def test_a_closure_after_the_clip_is_refused(self):
        net = nn.Linear(3, 1)
        accelerator, model, optimizer = accelerator_of(net, SGD(net.parameters(), lr=0.1))
        clipper = accelerator.clipper(model, 1.0)
        accelerator.backward(loss_of(model))
        clipper.clip_()
        with pytest.raises(RuntimeError, match="makes gradients after clip_"):
            optimizer.step(lambda: accelerator.backward(loss_of(model)))

    def test_step_of_a_plain_clipper_is_right_where_accelerate_steps_and_refused_where_not(self):
        net = nn.Linear(3, 1)
        accelerator, model, optimizer = accelerator_of(
            net, SGD(net.parameters(), lr=1.0), gradient_accumulation_steps=2
        )
        clipper = distclip.Clipper(model, 1.0)
        for step in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                if step:
                    before = net.weight.detach().clone()
                    clipper.step(optimizer)
                    assert 0 < (net.weight - before).norm().item() <= 1
                else:
                    with pytest.raises(ValueError, match=r"accelerator\.sync_gradients is true"):
                        clipper.step(optimizer)
        optimizer.scaler = torch.amp.GradScaler("cpu")
        for call in (lambda: clipper.step(optimizer), lambda: distclip.attach(optimizer, model, 1.0)):
            with pytest.raises(ValueError, match=r"Accelerator\.clipper\(\) of distclip\.integrations\.accelerate"):
                call()


class Net(LightningModule):
    def __init__(self, kind=SGD, wrap=lambda base: base, manual=False, bad=()):
        super().__init__()
        self.net, self.kind, self.wrap, self.bad = nn.Linear(3, 1), kind, wrap, bad
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        return self.wrap(self.kind(self.net.parameters(), lr=0.1))

    def training_step(self, batch, index):
        return loss_of(self.net, index, self.bad)


class Manual(Net):
    """Lightning's manual optimization, attached to what self.optimizers() returns."""

    def on_train_start(self):
        self.clipper = distclip.attach(self.optimizers(), self.net, 1.0)

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, index, self.bad))
        optimizer.step()


class Stepped(Manual):
    """The same with a Clipper of its own."""

    def on_train_start(self):
        self.clipper = distclip.Clipper(self.net, 1.0)

    def training_step(self, batch, index):
        self.manual_backward(loss_of(self.net, index, self.bad))
        before = self.net.weight.detach().clone()
        self.clipper.step(optimizer := self.optimizers())
        assert (self.net.weight - before).norm() <= 0.1
        optimizer.zero_grad()


def fit(module, **options):
    trainer = Trainer(max_epochs=2, **ONE, **QUIET, **options)
    trainer.fit(module, torch.utils.data.DataLoader([0.0] * 4))
    return trainer


class TestLightning:
    @pytest.mark.parametrize("wrap", [lambda base: base, wrappers.lookahead, wrappers.private])
    @pytest.mark.parametrize("bad", [(), (1, 2)])
    def test_attach_takes_what_optimizers_returns(self, wrap, bad):
        trainer = fit(module := Manual(wrap=wrap, manual=True, bad=bad))
        assert trainer.global_step == 8, "no exception of ours is taken for the end of the data"
        assert module.clipper.state_dict()["steps"] == 8
        assert module.clipper.report.norm.item() > 1
        assert all(p.isfinite().all() for p in module.parameters())

    def test_step_of_a_plain_clipper_takes_it_too(self):
        trainer = fit(module := Stepped(manual=True, bad=(1, 2)))
        assert module.clipper.state_dict()["steps"] == 8
        assert trainer.global_step == 4, "a step that is skipped is not made"

    @pytest.mark.parametrize("wrap", [lambda base: base, wrappers.lookahead, wrappers.lookahead_without_hooks])
    @pytest.mark.parametrize("manual", [False, True])
    def test_a_nan_step_changes_nothing_under_the_callback(self, wrap, manual):
        class Both(Net):
            def training_step(self, batch, index):
                if not manual:
                    return super().training_step(batch, index)
                self.manual_backward(loss_of(self.net, index, self.bad))
                self.optimizers().step()
                return self.optimizers().zero_grad()

        clip = ClipGradients(1.0)
        trainer = fit(module := Both(wrap=wrap, manual=manual, bad=(1, 2)), callbacks=[clip])
        assert trainer.global_step == clip.clipper.state_dict()["steps"] == 8
        assert all(p.isfinite().all() for p in module.parameters())

    @pytest.mark.parametrize("wrap", [wrappers.lookahead, wrappers.lookahead_without_hooks])
    def test_a_wrapper_that_is_stepped_past_lightning_is_an_error(self, wrap):
        class Past(Net):
            def training_step(self, batch, index):
                self.manual_backward(loss_of(self.net))
                self.optimizers().optimizer.step()

        with pytest.raises(RuntimeError, match="Lookahead was stepped past Lightning"):
            fit(Past(wrap=wrap, manual=True), callbacks=[ClipGradients(1.0)])

    @pytest.mark.parametrize("wrap", [wrappers.fault_tolerant, wrappers.private, wrappers.sharpness_aware])
    def test_the_callback_says_what_to_write_for_others(self, wrap):
        with pytest.raises(ValueError, match=r"call distclip\.attach\(optimizer, model, policy\) once"):
            fit(Net(wrap=wrap), callbacks=[ClipGradients(1.0)])


class TestFabric:
    def test_several_modules_of_one_optimizer_have_one_norm(self):
        fabric = Fabric(**ONE)
        nets = [nn.Linear(3, 3), nn.Linear(3, 1)]
        modules = [fabric.setup_module(net) for net in nets]
        optimizer = fabric.setup_optimizers(SGD([p for net in nets for p in net.parameters()], lr=1.0))
        clipper = FabricClipper(fabric, modules, 1.0)
        fabric.backward(1000 * modules[1](modules[0](torch.ones(2, 3))).sum())
        held = [p for net in nets for p in net.parameters()]
        norm = torch.cat([p.grad.double().flatten() for p in held]).norm().item()
        before = [p.detach().clone() for p in held]
        assert clipper.step(optimizer).norm.item() == pytest.approx(norm, rel=1e-6)
        moved = torch.cat([(p - b).double().flatten() for p, b in zip(held, before, strict=True)]).norm().item()
        assert moved == pytest.approx(1.0, rel=1e-5)
        with pytest.raises(ValueError, match=r"fabric\.setup\(\) returned, got Linear"):
            FabricClipper(fabric, [modules[0], nets[1]], 1.0)

    def test_a_wrapper_that_fabric_did_not_make_is_stepped_as_a_whole(self):
        fabric = Fabric(**ONE)
        net = nn.Linear(3, 1)
        module = fabric.setup_module(net)
        accumulating = wrappers.accumulating(SGD(net.parameters(), lr=1.0), every=1)  # has an attribute .optimizer
        clipper = FabricClipper(fabric, module, 1.0)
        fabric.backward(loss_of(module))
        clipper.step(accumulating)
        assert accumulating.calls == 1

    @pytest.mark.parametrize("wrap", [lambda base: base, wrappers.lookahead])
    @pytest.mark.parametrize("way", ["attach", "step"])
    def test_what_setup_returns_is_clipped(self, wrap, way):
        fabric = Fabric(**ONE)
        net = nn.Linear(3, 1)
        model, optimizer = fabric.setup(net, wrap(SGD(net.parameters(), lr=1.0)))
        clipper = distclip.attach(optimizer, model, 1.0) if way == "attach" else distclip.Clipper(net, 1.0)
        for step in range(4):
            before = net.weight.detach().clone()
            fabric.backward(loss_of(model, step, bad=(1, 2)))
            optimizer.step() if way == "attach" else clipper.step(optimizer)
            optimizer.zero_grad()
            moved = (net.weight - before).norm().item()
            assert moved == 0 if step in (1, 2) else 0 < moved <= 1
        assert clipper.state_dict()["steps"] == 4

    def test_a_scaler_of_fabric_is_refused_by_a_plain_clipper(self):
        fabric = Fabric(
            **ONE, plugins=lightning.fabric.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        )
        net = nn.Linear(3, 1)
        model, optimizer = fabric.setup(net, SGD(net.parameters(), lr=1.0))
        fabric.backward(model(torch.ones(2, 3)).sum())
        with pytest.raises(ValueError, match=r"use FabricClipper of distclip\.integrations\.lightning"):
            distclip.Clipper(net, 1.0).step(optimizer)


def test_a_trainer_of_transformers_does_not_make_the_steps_it_skips():
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'distclip[transformers]'")
    from distclip.integrations.transformers import take_over

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def forward(self, x, labels):
            return {"loss": (self.net(x) - labels).square().mean()}

    rows = [{"x": torch.ones(3), "labels": torch.tensor([torch.nan if i == 1 else 1.0])} for i in range(4)]
    model = Model()
    optimizer = wrappers.lookahead(base := Counts(model.parameters(), lr=0.1))
    optimizer.state_dict, optimizer.load_state_dict = base.state_dict, lambda state: None
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_grad_norm=0.0, use_cpu=True, max_steps=4, per_device_train_batch_size=1, report_to="none",
            disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential",
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
        clipping = take_over(trainer, 1.0)
        trainer.train()
    assert clipping.clipper.state_dict()["steps"] == 4
    assert (base.state["k"], optimizer.steps, schedule.last_epoch) == (3, 3, 3)
    assert all(p.isfinite().all() for p in model.parameters())
