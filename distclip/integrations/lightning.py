"""Lightning: a callback that clips for the Trainer, and a Clipper for loops with Fabric.

Source: lightning 2.6.6. The Trainer runs ``training_step`` and the backward inside the closure of ``optimizer.step()``,
then, once a step, ``GradScaler.unscale_`` and ``Callback.on_before_optimizer_step``, still inside the closure and under
manual optimization too. Private API: ``_FabricModule._forward_module``, the module as the strategy wrapped it.
"""

from typing import Any, Unpack

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from ..amp import is_unscaled
from ..clipper import Clipper, Options
from ..policies import Policy
from ..policies.adopt import as_policy
from ..report import Report

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")
PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")


class ClipGradients(Callback):  # type: ignore[misc]  # lightning is not looked into by mypy
    """Clip by the true global norm before every optimizer step, or let it change nothing on all ranks alike.

    * ``policy``, ``options``: those of :class:`distclip.Clipper`.
    * ``clipper``: the Clipper, from the start of training on, for ``report``, ``culprit``, ``measure`` and ``verify``.

    For one process, DDP, FSDP (where the Trainer refuses to clip by norm) and ModelParallelStrategy (FSDP2, tensor
    parallel), any precision, gradient accumulation, automatic and manual optimization. A step that is skipped counts
    in ``trainer.global_step`` and for LR schedulers, as one that a GradScaler skips does.

    Every ``log_every_n_steps`` steps ``trainer.loggers`` get ``grad_norm`` (before clipping), ``grad_clip_coef`` and
    ``grad_clip_share``: of the steps since the last log, the share whose coefficient was below 1. Rank 0 waits for an
    accelerator when it logs; other waits and collectives are those of :meth:`Clipper.clip_`, and one wait a step with
    an optimizer that is not fused or with a GradScaler, which must know whether to step. Checkpoints of the Trainer
    hold the state of the policy.

    ValueError where somebody else clips too, for other strategies (DeepSpeed has an integration of its own), several
    optimizers, LBFGS, and fused optimizers under a GradScaler. RuntimeError when an optimizer is stepped past Lightning
    (``optimizer.optimizer.step()``), where nobody could clip, after that step.
    """

    def __init__(self, policy: Policy | float, **options: Unpack[Options]) -> None:
        self.clipper: Clipper | None = None
        self._policy = as_policy(policy)
        self._options = options
        self._restored: dict[str, Any] = {}
        self._steps = 0  # since the last log
        self._clipped: int | Tensor = 0  # of these
        self._clips_next = False  # whether the next step of the optimizer is one that we saw coming
        self._undo: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _refuse_strategy(trainer.strategy, "ClipGradients", "trainer.strategy.model")
            _refuse_second_owner(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the Clipper: parameters are wrapped and restored by now."""
        _refuse_group(trainer.world_size, self._options)
        optimizer = _only_optimizer(trainer)
        state = self.state_dict()  # of a fit before this one, or of a checkpoint
        self.clipper = None  # frees its hooks
        self.clipper = Clipper(trainer.strategy.model, self._policy, **self._options)
        self.clipper._driver = "ClipGradients"
        if state:
            self._steps, self._clipped = state["steps"], state["clipped"]
            self.clipper.load_state_dict(state["clipper"])
        self._release()
        handle = optimizer.register_step_post_hook(self._refuse_unseen_step)
        trainer.precision_plugin.clip_gradients = _refuse_clip_gradients
        self._undo = [handle.remove, lambda: vars(trainer.precision_plugin).pop("clip_gradients", None)]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.clipper is not None
        self._clips_next = True
        scaler = trainer.scaler if trainer.scaler is not None and trainer.scaler.is_enabled() else None
        if _nothing_to_step(trainer, optimizer, scaler):
            return
        report = self.clipper._clip_before([optimizer], scaler)
        self._steps += 1
        self._clipped = self._clipped + (report.coef < 1)
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            self._log(trainer, report)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The Clipper's state and the counts of the clip share; empty before training has started."""
        if self.clipper is None:
            return self._restored
        return {"clipper": self.clipper.state_dict(), "steps": self._steps, "clipped": self._clipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until training starts: the Trainer may not have a model yet."""
        self.clipper, self._restored = None, state_dict

    def _log(self, trainer: Trainer, report: Report) -> None:
        if trainer.is_global_zero and trainer.loggers:
            share = torch.as_tensor(self._clipped, device=report.coef.device) / self._steps
            norm, coef, share = torch.stack([t.double() for t in (report.norm, report.coef, share)]).tolist()
            metrics = {"grad_norm": norm, "grad_clip_coef": coef, "grad_clip_share": share}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        self._steps, self._clipped = 0, 0

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _refuse_unseen_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._clips_next:
            raise RuntimeError(
                f"{type(optimizer).__name__} was stepped past Lightning, so that ClipGradients could not clip: call "
                "step() of what self.optimizers() returns, not of the optimizer inside of it"
            )
        self._clips_next = False


class FabricClipper(Clipper):
    """A :class:`distclip.Clipper` for loops with Fabric: ``clipper.step(optimizer)`` in place of ``optimizer.step()``.

    * ``module``: what ``fabric.setup`` or ``fabric.setup_module`` returned.
    * ``step`` takes the optimizers that ``fabric.setup`` returned, knows the GradScaler of ``precision="16-mixed"`` and
      updates it, and calls Fabric's ``on_after_optimizer_step``, after a skipped step too.

    Do not call ``fabric.clip_gradients`` or ``optimizer.step()`` beside it. ``fabric.save`` and ``fabric.load`` take
    the Clipper as they take a model. ValueError for strategies that Fabric steps otherwise (DeepSpeed, XLA).
    """

    def __init__(self, fabric: Fabric, module: nn.Module, policy: Policy | float, **options: Unpack[Options]) -> None:
        _refuse_strategy(fabric.strategy, "FabricClipper", "model")
        _refuse_group(fabric.world_size, options)
        if not isinstance(module, _FabricModule):
            raise ValueError(f"module must be what fabric.setup() returned, got {type(module).__name__}")
        super().__init__(module._forward_module, policy, **options)
        self._fabric = fabric
        self._scaler: GradScaler | None = getattr(fabric.strategy.precision, "scaler", None)

    def clip_(self) -> Report:
        """See :meth:`Clipper.clip_`; RuntimeError under a GradScaler, as the gradients are still scaled."""
        if self._scaler is not None and self._scaler.is_enabled():
            raise RuntimeError("the gradients are still multiplied by the GradScaler's scale: call step(optimizer)")
        return super().clip_()

    def step(self, *optimizers: Optimizer, scaler: GradScaler | None = None) -> Report:
        """See :meth:`Clipper.step`; the scaler is Fabric's."""
        if scaler is not None:
            raise ValueError("Fabric has the scaler: call step(optimizer) without, or Fabric(plugins=MixedPrecision())")
        inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        report = super().step(*inner, scaler=self._scaler)
        if self._scaler is not None:
            self._scaler.update()
        for optimizer in inner:
            self._fabric.call("on_after_optimizer_step", strategy=self._fabric.strategy, optimizer=optimizer)
        return report


def _refuse_strategy(strategy: Any, who: str, engine: str) -> None:
    """Go by the nearest class of Lightning's own: those of DeepSpeed and XLA inherit from the others."""
    kinds = type(strategy).__mro__
    name = next((kind.__name__ for kind in kinds if kind.__module__.split(".")[0] in PACKAGES), kinds[0].__name__)
    if name == "DeepSpeedStrategy":
        raise ValueError(
            f"{who} cannot clip under DeepSpeedStrategy, where the engine steps: remove it and call "
            f"distclip.integrations.deepspeed.take_over({engine}, policy) once the engine is there"
        )
    if name not in STRATEGIES:
        raise ValueError(f"{who} does not know {name}: use one of {', '.join(STRATEGIES)}")


def _refuse_group(world_size: int, options: Options) -> None:
    if options.get("group") is None and dist.is_initialized() and dist.get_world_size() != world_size:
        raise ValueError(
            f"Lightning trains on {world_size} ranks and the default process group has {dist.get_world_size()}, whose "
            "gradients would be in the norm: pass group=, the process group of these ranks"
        )


def _refuse_second_owner(trainer: Trainer, module: LightningModule) -> None:
    if trainer.gradient_clip_val:
        raise ValueError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip again after ClipGradients: remove "
            "gradient_clip_val from the Trainer"
        )
    if is_overridden("configure_gradient_clipping", module):
        raise ValueError(
            f"{type(module).__name__}.configure_gradient_clipping would clip again after ClipGradients: remove the "
            "method, or the callback"
        )


def _refuse_clip_gradients(optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = None) -> None:
    """In place of ``Precision.clip_gradients``, which the Trainer calls with 0."""
    if clip_val > 0:
        raise ValueError(
            f"LightningModule.clip_gradients({clip_val}) was called, and ClipGradients clips already: remove the call"
        )


def _only_optimizer(trainer: Trainer) -> Optimizer:
    """The one optimizer of the Trainer, if its steps can be clipped."""
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"ClipGradients clips for one optimizer, got {len(trainer.optimizers)}: remove it, and in on_train_start "
            "of the LightningModule call distclip.attach(optimizer, module, policy) for every one in "
            "self.trainer.optimizers with the module that has its parameters, or once for all that step together"
        )
    optimizer: Optimizer = trainer.optimizers[0]
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS looks at the gradients several times a step, which no clipping suits: remove one")
    if trainer.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"under precision={trainer.precision!r} Lightning leaves the gradients of a fused optimizer scaled: make "
            f"{type(optimizer).__name__} with fused=False, or use precision='bf16-mixed'"
        )
    return optimizer


def _nothing_to_step(trainer: Trainer, optimizer: Optimizer, scaler: GradScaler | None) -> bool:
    """Whether ``training_step`` returned None, which a single process may: then Lightning steps without gradients.

    A scaler is then not asked to step at all, whatever gradients there are of the batches before.
    """
    if trainer.world_size > 1:
        return False
    if scaler is not None and not is_unscaled(scaler, optimizer):
        return True
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])
