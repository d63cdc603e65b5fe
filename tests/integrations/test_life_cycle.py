"""What clipper/test_life_cycle.py promises, where a framework makes the calls: no added layer is stepped unclipped."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

import distclip
from support.ranks import run_ranks

pytest.importorskip("accelerate", reason="needs the extra: pip install 'distclip[accelerate]'")
pytest.importorskip("lightning", reason="needs the extra: pip install 'distclip[lightning]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'distclip[transformers]'")

SAID = "the model has another .*added.weight since the Clipper was built"


def added(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Linear:
    """A layer that the loss reaches, in the model and in the optimizer after some steps; gradients are 1000."""
    layer = model.added = nn.Linear(4, 4, bias=False)
    optimizer.add_param_group({"params": list(layer.parameters())})
    return layer


def in_accelerate() -> float:
    from accelerate.state import AcceleratorState, GradientState

    from distclip.integrations.accelerate import Accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    inner = nn.Sequential(nn.Linear(4, 4))
    model, optimizer = accelerator.prepare(inner, SGD(inner.parameters(), lr=1.0))
    clipper = accelerator.clipper(model, 1.0, verify_every=3)
    for _ in range(3):
        accelerator.backward(model(torch.ones(2, 4)).sum())
        clipper.clip_()
        optimizer.step()
        optimizer.zero_grad()
    layer = added(inner, optimizer)
    accelerator.backward((model(torch.ones(2, 4)) + 1000 * layer(torch.ones(2, 4))).sum())
    before = layer.weight.detach().clone()
    with pytest.raises(distclip.LayoutError, match=SAID):
        clipper.clip_()
    return (layer.weight - before).norm().item()


def in_lightning(way: str) -> tuple[float, int]:
    from lightning.pytorch import LightningModule, Trainer

    from distclip.integrations.lightning import ClipGradients

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if index == 3:
                added(self, self.trainer.optimizers[0])
                self.before = self.added.weight.detach().clone()
            out = self.net(torch.ones(2, 4))
            return (out + 1000 * self.added(torch.ones(2, 4)) if index > 2 else out).sum()

        def on_train_start(self) -> None:
            if way == "attach":
                distclip.attach(self.trainer.optimizers, self, 1.0, verify_every=3)

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=1.0)

    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [ClipGradients(1.0, verify_every=3)] if way == "callback" else []
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=callbacks, **quiet)
    with pytest.raises(distclip.LayoutError, match=SAID):
        trainer.fit(module, torch.utils.data.DataLoader([0.0] * 8, num_workers=0))
    return (module.added.weight - module.before).norm().item(), trainer.global_step


def in_transformers(folder: str) -> tuple[float, int]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from distclip.integrations.transformers import take_over

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            out = self.net(x)
            return {"loss": (out + 1000 * self.added(x) if hasattr(self, "added") else out).sum()}

    class Grow(TrainerCallback):
        def on_step_begin(self, args, state, control, model, optimizer, **_):
            if state.global_step == 3:
                added(model, optimizer)
                self.before = model.added.weight.detach().clone()

    model, grow = Model(), Grow()
    options = {"max_steps": 8, "per_device_train_batch_size": 1, "max_grad_norm": 0.0, "use_cpu": True}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    trainer = Trainer(
        model,
        TrainingArguments(folder, **options, **quiet),
        train_dataset=[{"x": torch.ones(4)} for _ in range(8)],
        callbacks=[grow],
        optimizers=(SGD(model.parameters(), lr=1.0), None),
    )
    take_over(trainer, 1.0, verify_every=3)
    with pytest.raises(distclip.LayoutError, match=SAID):
        trainer.train()
    return (model.added.weight - grow.before).norm().item(), trainer.state.global_step


def everywhere(folder: str) -> dict[str, object]:
    """One rank without a process group: each framework finds the world that it expects. And how often they prove."""
    dist.destroy_process_group()
    found = {}
    for name, how in {
        "accelerate": in_accelerate,
        "lightning": partial(in_lightning, "callback"),
        "lightning, attached": partial(in_lightning, "attach"),
        "transformers": partial(in_transformers, folder),
    }.items():
        with patch("distclip.step.proofs.verify") as verify:
            found[name] = (how(), verify.call_count)
    return found


@pytest.mark.filterwarnings("ignore")  # of Lightning about workers, of transformers about optimizers
def test_a_layer_that_is_added_during_training_is_refused_before_it_is_stepped_and_verify_every_is_known(tmp_path):
    (found,) = run_ranks(everywhere, 1, str(tmp_path), fresh=True)  # one process: each import takes seconds
    stepped = (0.0, 3)  # how far the layer moved, and the steps before
    assert found == {
        "accelerate": (0.0, 1),
        "lightning": (stepped, 1),
        "lightning, attached": (stepped, 1),
        "transformers": (stepped, 1),
    }
