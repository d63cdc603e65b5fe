"""DeepSpeed: ``engine.step()`` clips by a policy, by the true global norm, at every ZeRO stage.

Private API of DeepSpeed, read in 0.19.8. Two methods are replaced on the instances: ``engine.optimizer.step``, which
the engine calls once for every optimizer step, after all reduction; and ``engine.step``, to raise errors only when it
has counted the micro-batch. What else is replaced, in each optimizer: see :mod:`.deepspeed_optimizers`.
"""

from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..clipper import Clipper
from ..errors import NonFiniteError, warn_user
from ..gradients.storage import Storage
from ..policies import Policy
from ..step.driver import Driver
from ..step.engine import Engine
from ..step.options import Watch
from .deepspeed_optimizers import KINDS, WHOLE, Step, forget_sums, layout_of, parts_of_torch

_clippers: WeakKeyDictionary[DeepSpeedEngine, ref[Clipper]] = WeakKeyDictionary()  # an engine keeps its own alive


def take_over(
    engine: DeepSpeedEngine,
    policy: Policy | float,
    *,
    norm_type: float = 2.0,
    nonfinite: Literal["skip", "raise", "propagate"] = "skip",
    max_consecutive_skips: int | None = None,
    watch: Watch | None = None,
    watch_zeros: bool = False,
    verify_every: int | None = None,
) -> Clipper:
    """Let every optimizer step of ``engine`` clip by ``policy`` first, in place of DeepSpeed's own clipping.

    * ``engine``: what ``deepspeed.initialize`` returned: ZeRO 0 to 3, fp32, bf16 or fp16, offloaded or not.
    * the others: those of :class:`Clipper`; ``verify_every`` only at stage 0, where gradients are whole. The norm is
      over the parameters in the optimizer, without the loss scale.

    Returns the Clipper, for ``report``, ``culprit`` and ``state_dict``; its ``clip_`` and ``step`` raise
    RuntimeError. ``engine.get_global_grad_norm()`` is the norm before clipping. One all-reduce a step, of two float64
    numbers, under ZeRO of four (more with ``watch``, or where ``policy`` needs more), and a host sync. Gradients are
    scaled in fp32 wherever DeepSpeed steps fp32 copies, but by unit in their own dtype.

    * A skipped step counts in ``engine.skipped_steps`` and changes neither parameters nor optimizer nor LR scheduler.
      Only a norm that is not finite lowers a loss scale.
    * ``engine.step()`` raises NonFiniteError after the engine has skipped and counted the step, so that a loop that
      catches it continues without the gradients of that step.
    * ``gradient_clipping`` of the DeepSpeed config, 1.0 by default, is off from now on, with a warning if it was set.

    ValueError for anything but an engine with an optimizer, and for one taken over before; NotImplementedError, by
    name, for what is not supported. Source: DeepSpeed 0.19.8, ``DeepSpeedEngine._take_model_step``.
    """
    _refuse(engine, nonfinite)
    if verify_every is not None and not isinstance(engine.optimizer, WHOLE):
        raise _not_verified(engine.optimizer)
    clipper = Takeover(
        engine,
        policy,
        norm_type=norm_type,
        nonfinite=nonfinite,
        max_consecutive_skips=max_consecutive_skips,
        watch=watch,
        watch_zeros=watch_zeros,
        verify_every=verify_every,
    ).clipper
    engine._config.gradient_clipping = 0.0
    _clippers[engine] = ref(clipper)
    written = engine._config._param_dict.get("gradient_clipping")
    if written:
        warn_user(
            f'"gradient_clipping": {written} in the DeepSpeed config is off from now on, as {policy!r} clips: write '
            '"gradient_clipping": 0.0 there',
            UserWarning,
        )
    return clipper


def clipper_of(engine: DeepSpeedEngine) -> Clipper | None:
    """What :func:`take_over` returned for this ``engine``; None if it was not taken over."""
    found = _clippers.get(engine)
    return None if found is None else found()


class Takeover:
    """An engine whose ``step()`` makes the calls of ``clipper``."""

    def __init__(self, engine: DeepSpeedEngine, policy: Policy | float, **options: Any) -> None:
        self._engine = engine
        self._optimizer = optimizer = engine.optimizer
        parts_of, hook = KINDS.get(type(optimizer), (parts_of_torch, None))
        self._parts = list(parts_of(optimizer))
        self._step = Step()
        known = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._held = held = [parameter for parameters, _ in self._parts for parameter in parameters]
        names = [known.get(parameter, f"parameter {k} of the optimizer") for k, parameter in enumerate(held)]
        self._clipping = Engine(
            _Held(zip(names, held, strict=True)),
            policy,
            layout=layout_of(optimizer, held),
            gradients=Storage(self._gradients, self._store, self._loss_scale),
            **options,
        )
        verify = None if isinstance(optimizer, WHOLE) else self._refuse_to_verify
        self.clipper = Clipper.of(self._clipping, Driver("engine.step()", verify=verify))
        if hook is not None:
            hook(optimizer, self._step)
        self._inner, self._inner_of_engine = optimizer.step, engine.step
        optimizer.step = MethodType(lambda _, *args, **kwargs: self._step_optimizer(*args, **kwargs), optimizer)
        engine.step = MethodType(lambda _, *args, **kwargs: self._step_engine(*args, **kwargs), engine)

    def _step_engine(self, *args: Any, **kwargs: Any) -> None:
        """Raise at the end, when the engine has counted the micro-batch: earlier, its count would be off by one."""
        self._inner_of_engine(*args, **kwargs)
        failed, self._step.failed = self._step.failed, None
        if failed is not None:
            raise failed

    def _step_optimizer(self, *args: Any, **kwargs: Any) -> None:
        step, optimizer = self._step, self._optimizer
        step.failed = None
        try:
            self._decide()
        except NonFiniteError as error:
            step.failed = error
        knows_overflow = not isinstance(optimizer, Optimizer)
        if not knows_overflow:
            optimizer.overflow = step.skips
        if knows_overflow or not step.skips:
            self._inner(*args, **kwargs)
        optimizer._global_grad_norm = step.norm
        forget_sums(optimizer, self._engine)

    def _decide(self) -> None:
        """Measure, decide, and scale what DeepSpeed will not pass to :meth:`Step.finish`. Keeps no gradient alive."""
        step = self._step
        outcome = self._clipping.decide().scaled_by_unit()  # DeepSpeed passes flat buffers, in which no unit shows
        step.outcome = outcome.without_gradients()
        if not hasattr(self._optimizer, "unscale_and_clip_grads"):
            step.finish(outcome.gradients)

    def _loss_scale(self) -> float:
        return float(getattr(self._optimizer, "loss_scale", 1.0))

    def _gradients(self) -> list[Tensor | None]:
        parts = [gradients_of() for _, gradients_of in self._parts]
        if not self._engine.is_gradient_accumulation_boundary() or any(part is None for part in parts):
            raise RuntimeError(
                "DeepSpeed has no reduced gradients now: measure() comes after the last engine.backward() of an "
                "accumulation and before engine.step()"
            )
        return [gradient for part in parts if part is not None for gradient in part]

    def _store(self, index: int, gradient: Tensor) -> None:
        assert isinstance(self._optimizer, WHOLE), "a partition is no DTensor, and is never realigned"
        self._held[index].grad = gradient

    def _refuse_to_verify(self) -> None:
        raise _not_verified(self._optimizer)


class _Held(nn.Module):
    """The parameters that this rank steps, under the names of the user's model."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__()
        self._named = list(named)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named)


def _not_verified(optimizer: Any) -> NotImplementedError:
    return NotImplementedError(
        f"verify() compares copies of gradients, and the partitions of {type(optimizer).__name__} have none: use "
        "measure(), and compare its norm with deepspeed.utils.safe_get_full_grad"
    )


def _refuse(engine: Any, nonfinite: str) -> None:
    if not isinstance(engine, DeepSpeedEngine) or not (
        type(engine.optimizer) in KINDS or isinstance(engine.optimizer, (Optimizer, DeepSpeedOptimizer))
    ):
        raise ValueError(
            "take_over needs the engine that deepspeed.initialize returned, with an optimizer (accelerate has it in "
            "accelerator.deepspeed_engine_wrapped.engine)"
        )
    if engine in _clippers:
        raise ValueError("this engine was taken over before: use the Clipper that the first take_over returned")
    for name in _unsupported(engine, engine.optimizer, nonfinite):
        raise NotImplementedError(f"take_over does not support {name}: turn it off, or let DeepSpeed clip")


def _unsupported(engine: Any, optimizer: Any, nonfinite: str) -> Iterator[str]:
    """The names of what this engine uses and the Clipper does not support."""
    kind = type(optimizer)
    if engine.pipeline_parallelism:
        yield "PipelineModule"
    if dist.get_world_size(engine.seq_data_parallel_group) != dist.get_world_size():
        yield "ranks that hold different parts of the model (mpu, tensor_parallel.autotp_size)"
    if not (kind in KINDS or isinstance(optimizer, Optimizer)) or getattr(optimizer, "zenflow", False):
        yield f"{kind.__name__} (zenflow, super_offload)"
    if getattr(optimizer, "swap_optimizer", False):
        yield '"offload_optimizer": {"device": "nvme"}'
    if engine.is_deepcompile_enabled():
        yield '"compile": {"deepcompile": true}'
    if getattr(optimizer, "torch_autocast_gradscaler", None) or engine.torch_autocast_z0_gradscaler:
        yield '"torch_autocast" in float16'
    if "muon" in type(engine.basic_optimizer).__name__.lower():
        yield "Muon, which changes gradients before they are clipped"
    if getattr(optimizer, "fused_adam_legacy", False) or getattr(optimizer, "fused_lamb_legacy", False):
        yield "fused optimizers that unscale by themselves (legacy_fusion, Lamb)"
    if kind in (FP16_Optimizer, FP16_UnfusedOptimizer) and nonfinite == "propagate":
        yield f"nonfinite='propagate' with {kind.__name__}, which skips such steps by itself"
