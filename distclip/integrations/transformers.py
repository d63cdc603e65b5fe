"""Transformers: a Trainer, or any subclass of it, clips by any policy and logs the norm before clipping.

Replaced on the instance: ``log``. Private API, replaced too, of Trainer in transformers 5.23.0: ``_get_grad_norm``,
which its loop calls once for every optimizer step, after the last backward; ``_save_optimizer_and_scheduler`` and
``_load_optimizer_and_scheduler``, which know the checkpoint's folder. Read: ``AcceleratedOptimizer.optimizer`` of
accelerate 1.15.0; written: its ``_is_overflow``, which ``step_was_skipped`` returns.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, Unpack
from zipfile import BadZipFile, ZipFile

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from ..clipper import Clipper
from ..errors import NonFiniteError, warn_user
from ..optimizers.hooks import watch
from ..optimizers.wrapped import refuse_clip_before_step
from ..policies import Policy
from ..policies.adopt import without_signals
from ..step.driver import Driver
from ..step.engine import Engine
from ..step.options import Options
from ..telemetry.record import Record
from ..telemetry.window import Window

FILE = "distclip.pt"  # in a checkpoint, beside scheduler.pt
EngineTakeOver: TypeAlias = Callable[..., Clipper]  # that of deepspeed.py, which is another integration
STEPPED_BEFORE = ("lomo", "layerwise")  # optimizers that step inside the backward


class Clipping(TrainerCallback):  # type: ignore[misc]
    """The callback that :func:`take_over` adds and returns.

    ``clipper``: the :class:`Clipper` of the present or latest training, None before the first; its ``report`` is of the
    latest step.
    """

    def __init__(self, trainer: Trainer, policy: Policy | float, engine: EngineTakeOver | None, options: Any) -> None:
        self.clipper: Clipper | None = None
        self._policy = without_signals(policy, type(trainer).__name__)
        self._trainer, self._engine, self._options = trainer, engine, options
        self._resumed: str | None = None  # the file, from the load to the beginning of this training
        self._clipped = False
        self._window = Window()
        self._save, self._load = trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler
        self._log = trainer.log
        trainer.log, trainer._get_grad_norm = self._log_with_ours, self._clip
        trainer._save_optimizer_and_scheduler = self._save_with_ours
        trainer._load_optimizer_and_scheduler = self._load_with_ours

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        _refuse(trainer, self._engine)
        if self._engine is not None:
            self.clipper = self._engine(trainer.deepspeed, self._policy, **self._options)
        else:
            refuse_clip_before_step(_inner(trainer.optimizer))
            engine = Engine(trainer.model_wrapped, self._policy, **self._options)
            self.clipper = Clipper.of(engine, Driver(type(trainer).__name__))
        resumed, self._resumed, self._clipped = self._resumed, None, False
        self._window = Window()
        self.clipper.register_report_hook(lambda report, _: self._window.add(report, trainer.state.global_step + 1))
        if resumed is not None:
            _load(self.clipper, resumed)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if not self._clipped:
            raise RuntimeError(
                f"{type(self._trainer).__name__} has a loop of its own, which stepped without asking for the norm, so "
                "that nothing was clipped: use distclip.attach in it"
            )
        self._clipped = False
        self._log_between(self._window.records(due=False))

    def _clip(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        """Clip, and return the norm that Trainer logs."""
        if self.clipper is None or self not in self._trainer.callback_handler.callbacks:
            raise RuntimeError("the callback of distclip was removed from this Trainer: add it again before train()")
        _refuse(self._trainer, self._engine)
        self._clipped = True
        if self._engine is not None:  # which has stepped inside the backward
            assert self.clipper.report is not None
            return self.clipper.report.norm
        outer, scaler = self._trainer.optimizer, self._trainer.accelerator.scaler
        inner = _inner(outer)
        watch(inner)
        try:
            report = self.clipper.engine.clip_([inner], scaler)
        except NonFiniteError:
            self._log_between(self._window.rest())  # the last chance
            raise
        if scaler is None:
            outer._is_overflow = report.skip
        return report.norm

    def _log_with_ours(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Where Trainer logs a norm, log the numbers of that step with it, and those of bad steps before."""
        if "grad_norm" in logs and (records := self._window.records(due=True)):
            *between, (numbers, _) = records
            self._log_between(between)
            logs.update(numbers)
        elif "train_runtime" in logs:  # at the end
            self._log_between(self._window.rest())
        self._log(logs, *arguments, **options)

    def _log_between(self, records: Iterable[Record]) -> None:
        state = self._trainer.state
        present = state.global_step
        try:
            for numbers, state.global_step in records:
                self._log(numbers)
        finally:
            state.global_step = present

    def _save_with_ours(self, output_dir: str) -> None:
        self._save(output_dir)
        if self._trainer.args.should_save and self.clipper is not None:
            torch.save(self.clipper.state_dict(), os.path.join(output_dir, FILE))

    def _load_with_ours(self, checkpoint: str | None) -> None:
        self._resumed = None  # of a resume that has failed before its training began
        self._load(checkpoint)
        if checkpoint is None:
            return
        file = os.path.join(checkpoint, FILE)
        if os.path.exists(file):
            self._resumed = file
        else:
            warn_user(f"{checkpoint} has no {FILE}: the clipping policy starts anew", UserWarning)


def take_over(
    trainer: Trainer, policy: Policy | float, *, deepspeed: EngineTakeOver | None = None, **options: Unpack[Options]
) -> Clipping:
    """Let ``trainer``, before its ``train()``, clip by ``policy`` in every optimizer step, and log that norm.

    * ``trainer``: a ``transformers.Trainer`` or a subclass, with ``max_grad_norm=0.0``, whatever wraps its model.
    * ``policy``, ``options``: those of :class:`Clipper`, which is built when training begins.
    * ``deepspeed``: under DeepSpeed, ``distclip.integrations.deepspeed.take_over``, which is called with the engine
      when training begins; ``options`` are then its own.

    ``grad_norm`` in the logs is the norm before clipping, also where nothing is clipped, and has the numbers of
    :mod:`distclip.telemetry.keys` beside it; a step between logs that was skipped or not finite is logged with them. A
    skipped step changes neither
    parameters nor optimizer nor learning rate, on all ranks, but counts as a step. Checkpoints contain the policy's
    state as ``distclip.pt``, from which a resumed training continues. Collectives and host syncs: those of
    :meth:`Clipper.clip_` once a step, and on accelerators one more, since Trainer must know whether to move the
    learning rate.

    ValueError if something else clips too, for DeepSpeed without ``deepspeed`` and the reverse, XLA, optimizers that
    step inside the backward or make other gradients inside their step, and a ``distclip.pt`` that does not fit;
    RuntimeError from ``train()`` where a subclass does not ask for the norm. Source: ``Trainer._run_epoch``
    of transformers 5.23.0.
    """
    if isinstance(getattr(trainer._get_grad_norm, "__self__", None), Clipping):
        raise ValueError("this Trainer was taken over before and would be clipped twice: call take_over() once")
    _refuse(trainer, deepspeed)
    clipping = Clipping(trainer, policy, deepspeed, options)
    trainer.add_callback(clipping)
    return clipping


def _load(clipper: Clipper, file: str) -> None:
    """Load the state in ``file`` into ``clipper``; ValueError where there is none, or that of another policy."""
    damaged = (
        f"{file} is cut or garbled: resume from another checkpoint, or delete the file, and the policy starts anew"
    )
    if not _is_whole(file):  # for which torch.load would blame weights_only
        raise ValueError(damaged)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise ValueError(damaged) from error
    try:
        clipper.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{file} does not fit: {error}; or delete the file, and the policy starts anew") from error


def _is_whole(file: str) -> bool:
    """Whether the checksums of an archive are those of its contents."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except BadZipFile:
        return False


def _inner(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _refuse(trainer: Trainer, engine: EngineTakeOver | None) -> None:
    """ValueError for what would be clipped twice, or cannot be."""
    arguments = trainer.args
    if arguments.max_grad_norm and arguments.max_grad_norm > 0:
        raise ValueError(
            f"TrainingArguments.max_grad_norm={arguments.max_grad_norm} (1.0 by default) clips as well: pass "
            "max_grad_norm=0.0"
        )
    if trainer.is_deepspeed_enabled and engine is None:
        raise ValueError(
            "DeepSpeed steps inside the backward, before Trainer would clip: call take_over(trainer, policy, "
            "deepspeed=distclip.integrations.deepspeed.take_over)"
        )
    if engine is not None and not trainer.is_deepspeed_enabled:
        raise ValueError(
            "this Trainer has no DeepSpeed: leave deepspeed= out, or give it TrainingArguments(deepspeed=...)"
        )
    if trainer.accelerator.distributed_type in ("XLA", "MEGATRON_LM"):
        raise ValueError(f"clipping is not supported with {trainer.accelerator.distributed_type.value}")
    if any(word in arguments.optim for word in STEPPED_BEFORE):
        raise ValueError(
            f"optim={arguments.optim.value} steps inside the backward, before there is a norm: take another one"
        )
