"""Lightning: a callback that clips for the Trainer, and a Clipper for loops with Fabric.

Source: lightning 2.6.6. The Trainer runs ``training_step`` and the backward inside the closure of ``optimizer.step()``,
then, once a step, ``GradScaler.unscale_`` and ``Callback.on_before_optimizer_step``, still inside the closure. It calls
these two under manual optimization as well. Private API: ``_FabricModule._forward_module``, the wrapped module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from ..clipper import Clipper
from ..errors import NonFiniteError
from ..optimizers.hooks import guard, watch
from ..optimizers.scaler import is_unscaled, needs_update
from ..optimizers.wrapped import refuse_clip_before_step
from ..policies import Policy
from ..policies.adopt import without_signals
from ..report import Report
from ..step.driver import Driver
from ..step.engine import Engine
from ..step.options import Options
from ..step.signals import Signals
from ..telemetry.record import Record
from ..telemetry.window import Window

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")
SCALED = "the gradients are still multiplied by the GradScaler's scale: call "
PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")


class ClipGradients(Callback):  # type: ignore[misc]  # mypy does not look into lightning
    """Clip by the true global norm before every optimizer step, or skip it on all ranks alike.

    * ``policy``, ``options``: those of :class:`distclip.Clipper`.
    * ``clipper``: the Clipper, from the start of training on, for ``report``, ``culprit``, ``measure`` and ``verify``.

    For one process, DDP, FSDP (where the Trainer cannot clip by norm) and ModelParallelStrategy (FSDP2 and tensor
    parallel), with any precision, gradient accumulation, automatic or manual optimization. A skipped step counts in
    ``trainer.global_step`` and for LR schedulers, as does one that a GradScaler skips. Checkpoints contain the state.

    Every ``log_every_n_steps`` steps ``trainer.loggers`` get the numbers of :mod:`distclip.telemetry.keys`, and with
    them those of each step in between that was skipped or not finite. Logging is a host sync on rank 0's accelerator.
    Other host syncs and collectives are those of :meth:`Clipper.clip_`, and one host sync a step for an optimizer that
    is not fused, or with a GradScaler, since the host must know whether to step.

    The norm is over what the optimizer holds, as with ``gradient_clip_val``: nobody zeroes other gradients. When the
    decision is made the step is already running: one to be skipped runs without gradients, and an optimizer that keeps
    counts of its own may count it. ValueError where something else clips too, for other strategies (DeepSpeed has an
    integration of its own), several optimizers, LBFGS, optimizers that make other gradients inside their step (SAM,
    Opacus) or heal there (torchft), and fused optimizers under a GradScaler. RuntimeError after a step that bypassed
    Lightning.
    """

    def __init__(self, policy: Policy | float, **options: Unpack[Options]) -> None:
        self.clipper: Clipper | None = None
        self._policy = without_signals(policy, "ClipGradients")
        self._options = options
        self._loaded: dict[str, Any] = {}
        self._window = Window()
        self._expected = False  # whether the step that ends next passed on_before_optimizer_step
        self._undo: list[Callable[[], Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is known before anything is wrapped."""
        if stage == "fit":
            _refuse_strategy(trainer.strategy, "ClipGradients", "trainer.strategy.model")
            _refuse_second_owner(trainer, pl_module)
            _refuse_other_ranks(trainer.world_size, self._options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the Clipper: by now parameters are wrapped and restored."""
        optimizer = _only_optimizer(trainer)
        state = self._loaded = self.state_dict()  # of a checkpoint or the previous fit; kept also if this one fails
        self.clipper, self._window = None, Window()  # its hooks go with it
        clipper = _called_by_trainer(trainer, optimizer, self._policy, self._options)
        if state:
            clipper.load_state_dict(state["clipper"])
        self.clipper = clipper
        plugin = trainer.precision_plugin
        plugin.clip_gradients = _refuse_clip_gradients
        watch(optimizer)
        remove_guard = guard(optimizer, self._end_step, stepped=self._refuse_unexpected_step)
        self._undo = [remove_guard, lambda: vars(plugin).pop("clip_gradients", None)]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip, and log every ``log_every_n_steps``."""
        assert self.clipper is not None
        self._expected = True
        if _nothing_to_step(trainer, optimizer):
            return
        report = self.clipper.engine.clip_([optimizer], trainer.scaler, only_theirs=True)
        if trainer.is_global_zero and trainer.loggers:
            self._window.add(report, trainer.global_step)
            every = trainer.log_every_n_steps
            due = bool(every) and (trainer.global_step + 1) % every == 0
            self._log(trainer, self._window.records(due))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was bad since the last log."""
        self._log(trainer, self._window.rest())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was: after an exception it calls no teardown."""
        if isinstance(exception, NonFiniteError):  # after others a device may be gone
            self._log(trainer, self._window.rest())
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The Clipper's state; empty before training, if nothing was loaded."""
        return self._loaded if self.clipper is None else {"clipper": self.clipper.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until training starts: there may be no model yet."""
        self.clipper, self._loaded = None, state_dict

    def _log(self, trainer: Trainer, records: list[Record]) -> None:
        for metrics, step in records:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def _refuse_unexpected_step(self, optimizer: Optimizer) -> None:
        if not self._expected:
            raise RuntimeError(
                f"{type(optimizer).__name__} was stepped past Lightning, where ClipGradients cannot clip: call step() "
                "of what self.optimizers() returns, not of the optimizer inside of it"
            )

    def _end_step(self, optimizer: Optimizer) -> None:
        self._expected = False


def FabricClipper(
    fabric: Fabric, module: nn.Module | Sequence[nn.Module], policy: Policy | float, **options: Unpack[Options]
) -> Clipper:
    """A :class:`distclip.Clipper` for loops with Fabric: ``clipper.step(optimizer)`` in place of ``optimizer.step()``.

    * ``module``: what ``fabric.setup`` or ``fabric.setup_module`` returned, or a list of that where the optimizers that
      step together hold the parameters of several modules: one norm for all.
    * ``policy``, ``options``: those of :class:`distclip.Clipper`.

    ``step`` takes the optimizers that Fabric returned. It uses the GradScaler of ``precision="16-mixed"`` and updates
    it, also if it raises, and calls Fabric's ``on_after_optimizer_step``, also after a skipped step. With a GradScaler
    ``clip_``, ``measure`` and ``fingerprint`` raise RuntimeError: the gradients are not unscaled yet. Do not call
    ``fabric.clip_gradients`` or ``optimizer.step()`` as well. Save ``clipper.state_dict()``, not the Clipper: from
    sharded checkpoints Fabric restores only models and optimizers in place. ValueError for strategies in which Fabric
    does not step the optimizers itself.
    """
    _refuse_strategy(fabric.strategy, "FabricClipper", "fabric.strategy.model")
    _refuse_other_ranks(fabric.world_size, options)
    wrapped = _as_wrapped(module) if isinstance(module, nn.Module) else list(map(_as_wrapped, module))
    engine = Engine(wrapped, policy, **options)
    calls = _FabricCalls(fabric, engine, getattr(fabric.strategy.precision, "scaler", None))
    measure, fingerprint, clip_ = (partial(calls.unscaled, name) for name in ("measure", "fingerprint", "clip_"))
    return Clipper.of(engine, Driver("Fabric", measure, fingerprint, clip_=clip_, step=calls.step))


@dataclass(frozen=True, slots=True)
class _FabricCalls:
    """What the methods of a :func:`FabricClipper` do."""

    fabric: Fabric
    engine: Engine
    scaler: GradScaler | None

    def unscaled(self, name: str, **said: Any) -> Any:
        """Make this call of the engine; RuntimeError with a scaler, which unscales in ``step`` alone."""
        if self.scaler is not None and self.scaler.is_enabled():
            raise RuntimeError(SCALED + "step(optimizer), whose report is of the unscaled ones")
        return getattr(self.engine, name)(**said)

    def step(self, *optimizers: Optimizer, scaler: GradScaler | None = None, signals: Signals | None = None) -> Report:
        if scaler is not None:
            raise ValueError("the scaler is Fabric's: call step(optimizer), and Fabric(plugins=MixedPrecision(...))")
        inner = [each.optimizer if isinstance(each, _FabricOptimizer) else each for each in optimizers]
        try:
            report = self.engine.step(*inner, scaler=self.scaler, signals=signals)
        finally:  # once it has unscaled, the scaler would take the next gradients for unscaled too
            if self.scaler is not None and any(needs_update(self.scaler, optimizer) for optimizer in inner):
                self.scaler.update()
        for optimizer in inner:
            self.fabric.call("on_after_optimizer_step", strategy=self.fabric.strategy, optimizer=optimizer)
        return report


def _called_by_trainer(trainer: Trainer, optimizer: Optimizer, policy: Policy, options: Options) -> Clipper:
    """The Clipper that :class:`ClipGradients` calls, over what ``optimizer`` holds."""
    engine, scaler = Engine(trainer.strategy.model, policy, **options), trainer.scaler

    def call(name: str) -> Any:
        if scaler is not None and scaler.is_enabled() and not is_unscaled(scaler, optimizer):
            raise RuntimeError(SCALED + f"{name}() in on_before_optimizer_step")
        return getattr(engine, name)([optimizer], only_theirs=True)

    return Clipper.of(engine, Driver("ClipGradients", partial(call, "measure"), partial(call, "fingerprint")))


def _as_wrapped(module: nn.Module) -> nn.Module:
    """A module that Fabric returned, as the strategy has wrapped it."""
    if not isinstance(module, _FabricModule):
        raise ValueError(
            f"module must be what fabric.setup() returned, got {type(module).__name__}: pass that, or a list of it"
        )
    return module._forward_module  # type: ignore[no-any-return]  # mypy does not look into lightning


def _refuse_strategy(strategy: Any, who: str, engine: str) -> None:
    """By the nearest class of Lightning's own, whose DeepSpeed and XLA strategies are subclasses of the others."""
    names = [kind.__name__ for kind in type(strategy).__mro__ if kind.__module__.split(".")[0] in PACKAGES]
    name = names[0] if names else type(strategy).__name__
    if name == "DeepSpeedStrategy":
        raise ValueError(
            f"under DeepSpeedStrategy the engine steps, where {who} cannot clip: remove it, and call "
            f"distclip.integrations.deepspeed.take_over({engine}, policy) once there is an engine"
        )
    if name not in STRATEGIES:
        raise ValueError(f"{who} does not know {name}: use one of {', '.join(STRATEGIES)}")


def _refuse_other_ranks(world_size: int, options: Options) -> None:
    if options.get("group") is None and dist.is_initialized() and dist.get_world_size() != world_size:
        raise ValueError(
            f"Lightning trains on {world_size} ranks, and the default process group has {dist.get_world_size()} that "
            "would be in the norm: pass group=, the process group of these ranks"
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
    if sum(isinstance(callback, ClipGradients) for callback in trainer.callbacks) > 1:
        raise ValueError("two callbacks of the Trainer are ClipGradients: remove one")


def _refuse_clip_gradients(optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = None) -> None:
    """In place of the precision plugin's method, which the Trainer calls with 0."""
    if clip_val > 0:
        raise ValueError(
            f"LightningModule.clip_gradients({clip_val}) was called, and ClipGradients clips already: remove the call"
        )


def _only_optimizer(trainer: Trainer) -> Optimizer:
    """The Trainer's optimizer; ValueError if there are several, or its steps cannot be clipped."""
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"ClipGradients clips for one optimizer, got {len(trainer.optimizers)}: remove it, and in on_train_start "
            "of the LightningModule call distclip.attach(optimizer, module, policy) for every one in "
            "self.trainer.optimizers with the module that has its parameters, or once for all that step together"
        )
    optimizer: Optimizer = trainer.optimizers[0]
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS takes the gradients several times a step, which no clipping suits: remove one of them")
    refuse_clip_before_step(optimizer)
    if trainer.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"under precision={trainer.precision!r} Lightning leaves the gradients of a fused optimizer scaled: make "
            f"{type(optimizer).__name__} with fused=False, or use precision='bf16-mixed'"
        )
    return optimizer


def _nothing_to_step(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Whether ``training_step`` returned None, as it may in a single process: Lightning calls the hooks nevertheless.

    It then does not let a scaler step, whatever gradients earlier batches have left.
    """
    if trainer.world_size > 1:
        return False
    if trainer.scaler is not None and trainer.scaler.is_enabled() and not is_unscaled(trainer.scaler, optimizer):
        return True
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])
