"""Accelerate: the Accelerator with one import line changed, whose clipping is by the true global norm.

Read in accelerate 1.15.0. Overridden: ``Accelerator.clip_grad_norm_`` and ``clip_grad_value_``. Private API:
``Accelerator._models``, ``_optimizers`` and ``_custom_objects``; of AcceleratedOptimizer ``_is_overflow`` and, with a
scaler, ``_optimizer_original_step_method`` and ``_optimizer_patched_step_method``, between which every step switches.
"""

from collections.abc import Sequence, Set
from functools import partial
from math import inf
from typing import Any, NoReturn, Unpack
from weakref import WeakSet

import accelerate
from accelerate.optimizer import AcceleratedOptimizer, patch_optimizer_step
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

import distclip

from ..clipper import Clipper
from ..layouts.fsdp1 import is_flattened
from ..optimizers.hooks import guard, watch
from ..optimizers.scaler import is_unscaled, unscale_
from ..optimizers.wrapped import refuse_clip_before_step
from ..plan.arguments import Parameters
from ..policies import MaxNorm, Policy
from ..report import Report
from ..step.driver import Driver
from ..step.engine import Engine
from ..step.options import Options
from ..step.signals import Signals

UNSUPPORTED = (DistributedType.MEGATRON_LM, DistributedType.XLA)

_followed: WeakSet[AcceleratedOptimizer] = WeakSet()
_decided: WeakSet[AcceleratedOptimizer] = WeakSet()  # of these: whose clip_() came after their latest step
_clippers: WeakSet[Clipper] = WeakSet()  # that clipper() of an Accelerator has returned


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator``, same arguments, whose clipping is right for every layout that distclip knows."""

    def clip_grad_norm_(self, parameters: Parameters, max_norm: float, norm_type: float = 2) -> Tensor:
        """Unscale, then :func:`distclip.clip_grad_norm_`, which says what is returned and when ranks communicate.

        * ``parameters``: as there; from all parameters of a prepared FSDP1 model the model is known.

        A norm that is not finite goes through the formula, as in torch: to skip such steps use :meth:`clipper`.
        RuntimeError inside gradient accumulation (clip where ``accelerator.sync_gradients`` is true). DeepSpeed has
        stepped by now, so nothing is clipped: returns the norm of a ``take_over`` with this bound; RuntimeError without
        one.
        """
        if self.distributed_type == DistributedType.DEEPSPEED:
            return self._norm_of_deepspeed(max_norm, norm_type)
        return distclip.clip_grad_norm_(self._to_clip("clip_grad_norm_", parameters), max_norm, norm_type)

    def clip_grad_value_(self, parameters: Parameters, clip_value: float | tuple[float, float]) -> None:
        """Unscale, then :func:`distclip.clip_grad_value_`: FSDP included. Errors as for :meth:`clip_grad_norm_`."""
        distclip.clip_grad_value_(self._to_clip("clip_grad_value_", parameters), clip_value)

    def clipper(
        self, model: nn.Module | Sequence[nn.Module], policy: Policy | float, **options: Unpack[Options]
    ) -> Clipper:
        """Return the Clipper of a prepared ``model``, for any policy; ``save_state`` saves it too.

        ``options``: those of :class:`Clipper`, which says what is compared here. RuntimeError with DeepSpeed;
        ValueError where ``model`` is not what ``prepare`` returned, or has a clipper already.

        * ``clip_()`` clips as the policy decides. Where it decides to skip, the next ``optimizer.step()`` changes
          nothing and prepared schedulers do not step: ``optimizer.step_was_skipped`` is a 0-d bool, and reading it is a
          host sync on an accelerator. Collectives and host syncs: those of :meth:`Clipper.clip_`.
        * With fp16 it unscales first, and makes one more host sync a step. A norm that is not finite on any rank lowers
          the scale of all ranks; a skip for the policy's own reason does not.
        * Gradients that no prepared optimizer holds are in no norm and stay as they are: nobody zeroes them.
        * It raises RuntimeError inside gradient accumulation, and where no prepared optimizer holds the model;
          ValueError for optimizers that make other gradients inside their step (SAM, Opacus). A step with a closure,
          which would do so too, raises RuntimeError.
        * ``measure()`` and ``fingerprint()`` raise RuntimeError where fp16 gradients are not unscaled yet, and
          ``step()`` always, as accelerate steps.
        """
        self._refuse_deepspeed(f"a policy ({policy})")
        engine = Engine(model, policy, **options)
        clipped = engine.owner.clipped
        parts = [model] if isinstance(model, nn.Module) else model
        if not all(id(p) in clipped for part in parts for p in part.parameters()):
            raise ValueError("the model is a part of what FSDP1 made of it: pass what accelerator.prepare() returned")
        if self._clips_any_of(clipped):
            raise ValueError("a clipper() clips this model already and both would: keep that one, call clipper() once")
        look, clip_ = partial(self._look, engine), partial(self._clip, engine)
        measure, fingerprint = partial(look, "measure"), partial(look, "fingerprint")
        clipper = Clipper.of(engine, Driver("accelerate", measure, fingerprint, clip_=clip_, step=_refuse_to_step))
        _clippers.add(clipper)
        self.register_for_checkpointing(clipper)
        return clipper

    def _clip(self, engine: Engine, signals: Signals | None = None) -> Report:
        self._refuse_to_clip("clip_()")
        prepared = self._to_step(engine.owner.clipped)
        inner = list(map(_inner, prepared))
        for optimizer in inner:
            refuse_clip_before_step(optimizer)
        list(map(_follow, prepared))
        report = engine.clip_(inner, self.scaler, only_theirs=True, signals=signals)
        for optimizer in prepared:
            if optimizer.scaler is None:
                optimizer._is_overflow = report.skip
                _decided.add(optimizer)
        return report

    def _look(self, engine: Engine, name: str, **said: Any) -> Any:
        """``measure`` or ``fingerprint`` of what prepared optimizers hold."""
        inner, scaler = list(map(_inner, self._holding(engine.owner.clipped))), self.scaler
        if scaler is not None and scaler.is_enabled() and not all(is_unscaled(scaler, each) for each in inner):
            raise RuntimeError(
                "the gradients are still multiplied by the loss scale: call accelerator.unscale_gradients() before "
                f"{name}(), or clip_(), whose report is of the unscaled ones"
            )
        return getattr(engine, name)(inner, only_theirs=True, **said)

    def _clips_any_of(self, ids: Set[int]) -> bool:
        """Whether a :meth:`clipper` of this Accelerator clips any of these parameters."""
        made = [each for each in self._custom_objects if isinstance(each, Clipper) and each in _clippers]
        return any(clipper.engine.owner.clipped & ids for clipper in made)

    def _to_clip(self, name: str, parameters: Parameters) -> list[Any]:
        """What to clip for ``parameters``, unscaled: prepared models if they are all of theirs, else themselves."""
        self._refuse_to_clip(name)
        listed: list[Any] = [parameters] if isinstance(parameters, (Tensor, nn.Module)) else list(parameters)
        if not listed:
            raise ValueError(
                f"{name} was given no parameters: a generator is empty after its first use, and DDP over tensor "
                "parallel shows none, so pass the model itself"
            )
        modules = [item for item in listed if isinstance(item, nn.Module)]
        given = {id(p) for module in modules for p in module.parameters()} | set(map(id, listed))
        if self._clips_any_of(given):
            raise ValueError(f"a clipper() clips these parameters already: take the line with {name} out")
        if self.scaler is not None and self.scaler.is_enabled():
            unscale_(self.scaler, list(map(_inner, self._to_step(given))))
        models = [model for model in self._models if _is_inside(model, given)]
        whole = not modules and given <= {id(p) for model in models for p in model.parameters()}
        return models if whole else listed

    def _holding(self, ids: Set[int]) -> list[AcceleratedOptimizer]:
        """The prepared optimizers that hold any of these parameters."""
        found = [o for o in self._optimizers if any(id(p) in ids for g in o.param_groups for p in g["params"])]
        if not found:
            raise RuntimeError(
                "no prepared optimizer holds these parameters: pass the optimizer to accelerator.prepare() as well"
            )
        return found

    def _to_step(self, ids: Set[int]) -> list[AcceleratedOptimizer]:
        """The same; RuntimeError where a scaler would step another one as well."""
        found = self._holding(ids)
        if self.scaler is not None and self.scaler.is_enabled():
            waiting = [o for o in self._optimizers if o in found or is_unscaled(self.scaler, _inner(o))]
            if len(waiting) > 1:
                raise RuntimeError(
                    "accelerate forgets at the first optimizer.step() which gradients were unscaled, and would unscale "
                    "those of a second optimizer twice: clip and step one optimizer after the other"
                )
        return found

    def _refuse_to_clip(self, name: str) -> None:
        self._refuse_accumulation(name)
        self._refuse_deepspeed(name)
        if self.distributed_type in UNSUPPORTED:
            raise RuntimeError(f"{name} is not supported with {self.distributed_type.value}")
        if self.has_lomo_optimizer:
            raise RuntimeError(f"{name} comes too late: LOMO steps inside the backward; use another optimizer")

    def _refuse_accumulation(self, name: str) -> None:
        if not self.sync_gradients:
            raise RuntimeError(
                f"{name} was called inside gradient accumulation, on incomplete gradients: call it where "
                "`accelerator.sync_gradients` is true"
            )

    def _refuse_deepspeed(self, name: str) -> None:
        if self.distributed_type == DistributedType.DEEPSPEED:
            raise _too_late(name)

    def _norm_of_deepspeed(self, max_norm: float, norm_type: float) -> Tensor:
        """The norm of the step in the latest backward; RuntimeError where another bound is in force."""
        self._refuse_accumulation("clip_grad_norm_")
        from .deepspeed import clipper_of  # importing it takes seconds, and patches torch

        engine = getattr(getattr(self, "deepspeed_engine_wrapped", None), "engine", None)
        clipper = None if engine is None else clipper_of(engine)
        if clipper is None:
            raise _too_late("clip_grad_norm_")
        policy, p = clipper.policy, clipper.engine.plan.p
        if max_norm != inf and (policy, p) != (MaxNorm(max_norm), norm_type):
            raise RuntimeError(
                f"clip_grad_norm_ with {max_norm:g} of order {norm_type:g} is not what take_over() put in force, "
                f"{policy} of order {p:g}: pass that, or inf to get the norm"
            )
        if clipper.report is None:
            raise RuntimeError("DeepSpeed has made no step yet: call clip_grad_norm_ after accelerator.backward()")
        return clipper.report.norm


def _too_late(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} comes too late: DeepSpeed steps inside accelerator.backward(). Call distclip.integrations."
        "deepspeed.take_over(accelerator.deepspeed_engine_wrapped.engine, policy) after prepare()"
    )


def _refuse_to_step(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("accelerate steps the optimizers it prepared: call clip_() and then optimizer.step()")


def _inner(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _follow(optimizer: AcceleratedOptimizer) -> None:
    """Follow its steps from now on, so that ``step_was_skipped`` is of the latest, also if nobody clipped before it."""
    if optimizer in _followed:
        return
    _followed.add(optimizer)

    def begin(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer not in _decided:
            optimizer._is_overflow = False
        elif any(map(callable, (*args[1:], *kwargs.values()))):
            raise RuntimeError(
                "optimizer.step(closure) makes gradients after clip_() has clipped: call distclip.attach(optimizer, "
                "model, policy) once in place of clip_(), and the closure's are clipped"
            )

    inner = _inner(optimizer)
    watch(inner)
    guard(inner, lambda _: _decided.discard(optimizer), begin)
    if optimizer.scaler is not None:  # after every step accelerate puts back the method that it knows
        optimizer._optimizer_original_step_method = inner.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, inner.step)


def _is_inside(model: nn.Module, given: Set[int]) -> bool:
    """Whether ``model``'s parameters are given; of FSDP1's flat ones, which only the module shows, those that train."""
    needed = [p for p in model.parameters() if p.requires_grad or not is_flattened(p)]
    return bool(needed) and all(id(p) in given for p in needed)
