"""DeepSpeed: ``engine.step()`` clips by a policy, by the true global norm, at every ZeRO stage.

Private API of DeepSpeed, read in 0.19.8. ``engine.optimizer.step`` is replaced on the instance: the engine calls it
once for every optimizer step, after all reduction; and ``engine.step``, to raise when it has counted the micro-batch.
Gradients are measured where each optimizer keeps them: ``averaged_gradients``, the flat partitions of offloaded and
bf16 optimizers, or ``.grad``. What DeepSpeed would compute by itself is replaced by the decision: the look for overflow
(``check_overflow``, ``overflow_checker``), the norm (``scaled_global_norm``, ``_get_norm_groups``,
``get_grads_for_norm``) and ``unscale_and_clip_grads``, where gradients are fp32 already. So a step is skipped as
DeepSpeed skips an overflow, and the next one starts as clean.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf, nan
from types import MethodType, SimpleNamespace
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.clipper import Clipper
from distclip.errors import LayoutError, NonFiniteError
from distclip.gradients.storage import in_grad
from distclip.kernels import scale_
from distclip.layouts.layout import Layout, LayoutFn
from distclip.plan.measured import Measured
from distclip.policies import Policy
from distclip.shield import shielded
from distclip.step.decision import Outcome

Gradients: TypeAlias = Sequence[Tensor | None]
Part: TypeAlias = tuple[Sequence[nn.Parameter], Callable[[], Gradients | None]]
"""Parameters that this rank steps, or a part of each, and what returns the gradients of just that, or None so far."""

_taken: WeakSet[DeepSpeedEngine] = WeakSet()


def take_over(
    engine: DeepSpeedEngine,
    policy: Policy | float,
    *,
    norm_type: float = 2.0,
    nonfinite: Literal["skip", "raise", "propagate"] = "skip",
    max_consecutive_skips: int | None = None,
) -> Clipper:
    """Let every optimizer step of ``engine`` clip by ``policy`` first, in place of DeepSpeed's own clipping.

    * ``engine``: what ``deepspeed.initialize`` returned: ZeRO 0 to 3, fp32, bf16 or fp16, offloaded or not.
    * the others: those of :class:`Clipper`. The norm is over the parameters in the optimizer, without the loss scale.

    Returns the Clipper, for ``report``, ``culprit`` and ``state_dict``; its ``clip_`` and ``step`` raise
    RuntimeError. ``engine.get_global_grad_norm()`` is the norm before clipping. A skipped step counts in
    ``engine.skipped_steps`` and leaves parameters, optimizer and LR scheduler alone; only a norm that is not finite
    lowers a loss scale. NonFiniteError comes from ``engine.step()`` when the engine has skipped and counted the step:
    a loop that catches it goes on, without the gradients of that step. ``gradient_clipping`` of the DeepSpeed config,
    which is 1.0 where nobody wrote it, is off from now on, with a warning where somebody did. One all-reduce a step, of
    two float64 words, under ZeRO of four; the host waits for the decision. Gradients are scaled in fp32 wherever
    DeepSpeed steps fp32 copies.

    ValueError for what is no engine with an optimizer, or was taken over before; NotImplementedError for what is not
    supported, by name. Source: DeepSpeed 0.19.8, ``DeepSpeedEngine._take_model_step``.
    """
    _refuse(engine, nonfinite)
    clipper = EngineClipper(
        engine, policy, norm_type=norm_type, nonfinite=nonfinite, max_consecutive_skips=max_consecutive_skips
    )
    engine._config.gradient_clipping = 0.0
    _taken.add(engine)
    written = engine._config._param_dict.get("gradient_clipping")
    if written:
        warnings.warn(
            f'"gradient_clipping": {written} in the DeepSpeed config is off from now on, as {policy!r} clips: write '
            '"gradient_clipping": 0.0 there',
            stacklevel=2,
        )
    return clipper


class EngineClipper(Clipper):
    """The Clipper that :func:`take_over` returns: ``engine.step()`` makes its calls."""

    def __init__(self, engine: DeepSpeedEngine, policy: Policy | float, **options: Any) -> None:
        self._engine = engine
        self._optimizer = optimizer = engine.optimizer
        parts_of, hook = KINDS.get(type(optimizer), (_parts_of_torch, None))
        self._parts = list(parts_of(optimizer))
        self._scale = 1.0  # what DeepSpeed multiplied the loss by
        self._outcome: Outcome | None = None
        self._failed: NonFiniteError | None = None  # to be raised when the engine has ended the step that is being made
        known = {parameter: name for name, parameter in engine.module.named_parameters()}
        held = [parameter for parameters, _ in self._parts for parameter in parameters]
        names = [known.get(parameter, f"parameter {k} of the optimizer") for k, parameter in enumerate(held)]
        super().__init__(_Held(zip(names, held, strict=True)), policy, layout=_layout_of(optimizer, held), **options)
        self._driver = "engine.step()"
        self._of_parts = not isinstance(optimizer, WHOLE)
        if self._of_parts:  # whose gradients do not fit into the .grad of parameters
            self._holders = [SimpleNamespace(grad=None) for _ in held]  # type: ignore[misc]
            self._storage = in_grad(self._holders)
        if hook is not None:
            hook(optimizer, self)
        self._inner, self._inner_of_engine = optimizer.step, engine.step
        optimizer.step = MethodType(lambda _, *args, **kwargs: self._step(*args, **kwargs), optimizer)
        engine.step = MethodType(lambda _, *args, **kwargs: self._step_engine(*args, **kwargs), engine)

    @property
    def skips(self) -> bool:
        """Whether the step that is being made changes nothing."""
        return self._failed is not None or (self._outcome is not None and self._outcome.skip is True)

    @property
    def norm(self) -> Tensor:
        """Before clipping, 0-d, of the step that is being made."""
        if self._failed is not None:
            return torch.tensor(nan)
        assert self.report is not None
        return self.report.norm

    @property
    def verdict(self) -> Tensor:
        """0-d float32 on the host: what DeepSpeed takes for the norm and only looks at whether it is finite."""
        return torch.tensor(inf if self.skips else 0.0)

    @shielded
    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Unscale, scale and clamp ``gradients`` as this step's decision says."""
        assert self._outcome is not None
        if self._scale != 1.0:
            scale_(gradients, 1 / self._scale)
        self._apply(self._outcome, gradients)

    def verify(self) -> None:
        """That of :class:`Clipper` in stage 0; NotImplementedError for partitions, of which there are no copies."""
        if self._of_parts:
            raise NotImplementedError(
                f"verify() compares copies of gradients, and the partitions of {type(self._optimizer).__name__} have "
                "none: use measure(), and compare its norm with deepspeed.utils.safe_get_full_grad"
            )
        super().verify()

    def _step_engine(self, *args: Any, **kwargs: Any) -> None:
        """The engine counts micro-batches at the very end, and would be off by one after an exception before it."""
        self._inner_of_engine(*args, **kwargs)
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _step(self, *args: Any, **kwargs: Any) -> None:
        self._failed = None
        try:
            self._decide_step()
        except NonFiniteError as error:
            self._failed = error
        optimizer, knows_overflow = self._optimizer, not isinstance(self._optimizer, Optimizer)
        if not knows_overflow:
            optimizer.overflow = self.skips
        if knows_overflow or not self.skips:
            self._inner(*args, **kwargs)
        optimizer._global_grad_norm = self.norm
        _forget_sums(optimizer, self._engine)

    @shielded
    def _decide_step(self) -> None:
        """Measure, decide, and scale what DeepSpeed will not hand to :meth:`finish`. Keeps no gradient."""
        outcome = self._advance(skips_on_device=False)
        self._outcome = replace(outcome, measured=outcome.measured.without_gradients())
        if not self.skips and not hasattr(self._optimizer, "unscale_and_clip_grads"):
            self.finish(outcome.measured.runs)

    def _measure(self, tag: int, fault: LayoutError | None = None) -> Measured:
        gradients = self._gradients()
        self._scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        if self._of_parts:
            for holder, gradient in zip(self._holders, gradients, strict=True):
                holder.grad = gradient
        try:
            measured = super()._measure(tag, fault)
        finally:
            if self._of_parts:
                for holder in self._holders:
                    holder.grad = None  # DeepSpeed frees them one by one during the step
        return replace(measured, reduced=measured.reduced.unscaled(self._scale, self._plan.p))

    def _gradients(self) -> list[Tensor | None]:
        parts = [gradients_of() for _, gradients_of in self._parts]
        if not self._engine.is_gradient_accumulation_boundary() or any(part is None for part in parts):
            raise RuntimeError(
                "DeepSpeed has no reduced gradients now: measure() comes after the last engine.backward() of an "
                "accumulation and before engine.step()"
            )
        return [gradient for part in parts if part is not None for gradient in part]


class _Held(nn.Module):
    """The parameters that this rank steps, under the names of the user's model."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__()
        self._named = list(named)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named)


def _parts_of_torch(optimizer: Any) -> Iterator[Part]:
    return (_whole(group["params"]) for group in optimizer.param_groups)


def _parts_of_fp16(optimizer: Any) -> Iterator[Part]:
    return map(_whole, optimizer.fp16_groups)


def _whole(parameters: Sequence[nn.Parameter]) -> Part:
    return parameters, lambda: [parameter.grad for parameter in parameters]


def _parts_of_bf16(optimizer: Any) -> Iterator[Part]:
    for i, group in enumerate(optimizer.bf16_groups):
        here = [p for p in group if p._hp_mapping is not None]
        flat = optimizer.fp32_groups_gradient_flat_partition[i]  # stays as long as the optimizer
        spans = [p._hp_mapping.get_hp_fragment_address() for p in here]
        yield here, partial(list, [flat.narrow(0, span.start, span.numel) for span in spans])


def _parts_of_stages_1_and_2(optimizer: Any) -> Iterator[Part]:
    for i, here in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            yield here, partial(_offloaded, optimizer, "single_partition_of_fp32_groups", i, here)
        else:
            yield here, partial(_averaged, optimizer, i, len(here))


def _parts_of_stage_3(optimizer: Any) -> Iterator[Part]:
    for i, here in enumerate(optimizer.fp16_groups):
        if optimizer.offload_optimizer:
            yield here, partial(_offloaded, optimizer, "fp32_partitioned_groups_flat", i, here)
        else:
            yield here, partial(_averaged, optimizer, i, len(here))


def _averaged(optimizer: Any, i: int, count: int) -> list[Tensor] | None:
    """Whole gradients or parts of them; what pads the partition is marked, or is the last."""
    found = optimizer.averaged_gradients.get(i)
    if found is None:
        return None
    return [gradient for gradient in found if not getattr(gradient, "_zero_padding", False)][:count]


def _forget_sums(optimizer: Any, engine: Any) -> None:
    """Clear sums that DeepSpeed steps again, or adds to, unless the first backward of a step overwrites them."""
    several = engine.gradient_accumulation_steps() > 1 or not engine.managed_gradient_accumulation()
    if hasattr(optimizer, "grad_partitions_flat_buffer") and (several or not optimizer.offload_optimizer):
        optimizer.grad_partitions_flat_buffer.zero_()
    for sums in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
        sums.zero_()


def _offloaded(optimizer: Any, masters: str, i: int, parameters: Sequence[Any]) -> list[Tensor]:
    """Parts of the flat gradient on the host, without those that stayed from an older step."""
    getattr(optimizer, "_wait_for_offload_copies", bool)()
    flat = getattr(optimizer, masters)[i].grad
    gradients = []
    for key in map(optimizer.get_param_id, parameters):
        gradients.append(flat.narrow(0, *optimizer.grad_position[key][-2:]))
        if key not in optimizer.norm_for_param_grads:
            gradients[-1].zero_()
    return gradients


def _hook_fp16(optimizer: Any, clipper: EngineClipper) -> None:
    masters = getattr(optimizer, "fp32_groups_flat", None) or [p for group in optimizer.fp32_groups for p in group]
    optimizer.overflow_checker = SimpleNamespace(check=lambda: clipper.skips, has_overflow=lambda _: clipper.skips)
    optimizer.unscale_and_clip_grads = lambda *_: clipper.finish([p.grad for p in masters])
    _hook_loss_scale(optimizer, clipper)


def _hook_bf16(optimizer: Any, clipper: EngineClipper) -> None:
    optimizer.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else ([clipper.verdict], {})


def _hook_stages_1_and_2(optimizer: Any, clipper: EngineClipper) -> None:
    def check_overflow(partition_gradients: bool = True) -> None:
        optimizer.overflow = clipper.skips

    def reset_cpu_buffers() -> None:  # where it skips, DeepSpeed keeps the fp32 sums of bf16 and adds to them
        reset()
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    reset, optimizer.reset_cpu_buffers = optimizer.reset_cpu_buffers, reset_cpu_buffers
    optimizer.check_grad_overflow = True
    optimizer.check_overflow = check_overflow
    optimizer.scaled_global_norm = lambda: clipper.verdict
    optimizer.unscale_and_clip_grads = lambda gradients, _: clipper.finish(gradients)
    _hook_loss_scale(optimizer, clipper)


def _hook_stage_3(optimizer: Any, clipper: EngineClipper) -> None:
    optimizer.check_overflow = lambda: None
    optimizer._get_norm_groups = lambda: [clipper.verdict]
    optimizer.unscale_and_clip_grads = lambda i, _: clipper.finish([optimizer.fp32_partitioned_groups_flat[i].grad])
    _hook_loss_scale(optimizer, clipper)


def _hook_loss_scale(optimizer: Any, clipper: EngineClipper) -> None:
    """A skip for the policy's own reason does not lower the loss scale."""
    update = optimizer._update_scale
    optimizer._update_scale = lambda skipped: update(bool(skipped and not clipper.norm.isfinite()))


KINDS = {
    FP16_Optimizer: (_parts_of_fp16, _hook_fp16),
    FP16_UnfusedOptimizer: (_parts_of_fp16, _hook_fp16),
    BF16_Optimizer: (_parts_of_bf16, _hook_bf16),
    DeepSpeedZeroOptimizer: (_parts_of_stages_1_and_2, _hook_stages_1_and_2),
    DeepSpeedZeroOptimizer_Stage3: (_parts_of_stage_3, _hook_stage_3),
}
WHOLE = (FP16_Optimizer, FP16_UnfusedOptimizer, Optimizer)  # every rank has whole gradients, but for experts


def _layout_of(optimizer: Any, held: Sequence[nn.Parameter]) -> LayoutFn | None:
    """Partitions are on one rank each; whole gradients on all, those of an expert on the ranks that have it."""
    if not isinstance(optimizer, WHOLE):
        return lambda name, parameter: Layout(1)
    if not any(map(is_moe_param, held)):
        return None

    def layout(name: str, parameter: Any) -> Layout | None:
        if not is_moe_param(parameter):
            return None
        return Layout(dist.get_world_size(groups._get_expert_data_parallel_group(parameter.group_name)))

    return layout


def _refuse(engine: Any, nonfinite: str) -> None:
    if not isinstance(engine, DeepSpeedEngine) or not (
        type(engine.optimizer) in KINDS or isinstance(engine.optimizer, (Optimizer, DeepSpeedOptimizer))
    ):
        raise ValueError(
            "take_over needs the engine that deepspeed.initialize returned, with an optimizer (accelerate has it in "
            "accelerator.deepspeed_engine_wrapped.engine)"
        )
    if engine in _taken:
        raise ValueError("this engine was taken over before: use the Clipper that the first take_over returned")
    for name in _unsupported(engine, engine.optimizer, nonfinite):
        raise NotImplementedError(f"take_over does not support {name}: turn it off, or let DeepSpeed clip")


def _unsupported(engine: Any, optimizer: Any, nonfinite: str) -> Iterator[str]:
    """The names of what this engine uses and the Clipper cannot see through."""
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
