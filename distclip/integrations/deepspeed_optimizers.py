"""The optimizers of DeepSpeed: where each keeps its gradients, and what it would decide itself.

Private API of DeepSpeed, read in 0.19.8. Gradients are measured where each optimizer keeps them:
``averaged_gradients``, the flat partitions of offloaded and bf16 optimizers, or ``.grad``. The decision replaces what
DeepSpeed would compute itself: the overflow check (``check_overflow``, ``overflow_checker``), the norm
(``scaled_global_norm``, ``_get_norm_groups``, ``get_grads_for_norm``) and ``unscale_and_clip_grads``, where gradients
are fp32 already. So a step is skipped as DeepSpeed skips an overflow, and the next one starts as clean.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf, nan
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import NonFiniteError
from ..layouts.layout import Layout, LayoutFn
from ..step.decision import Outcome

Gradients: TypeAlias = Sequence[Tensor | None]
Part: TypeAlias = tuple[Sequence[nn.Parameter], Callable[[], Gradients | None]]
"""Parameters that this rank steps, or a part of each, and a function that returns their gradients; None: not yet."""


class Step:
    """The decision on the step that an engine is making, in the forms that its optimizer asks for.

    ``outcome``: the decision, None before the first. ``failed``: an error in place of one, raised when the engine has
    ended this step.
    """

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.failed: NonFiniteError | None = None

    @property
    def skips(self) -> bool:
        """Whether it changes nothing."""
        return self.failed is not None or (self.outcome is not None and self.outcome.skip is True)

    @property
    def norm(self) -> Tensor:
        """Before clipping, 0-d."""
        if self.failed is not None:
            return torch.tensor(nan)
        assert self.outcome is not None
        return self.outcome.report.norm

    @property
    def verdict(self) -> Tensor:
        """0-d float32 on the host, in place of a norm of which DeepSpeed only checks whether it is finite."""
        return torch.tensor(inf if self.skips else 0.0)

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Unscale, scale and clamp ``gradients`` as this step's decision says."""
        assert self.outcome is not None
        self.outcome.apply_to(gradients, unscale=True)  # by the scale of the measurement: DeepSpeed's may be another


def parts_of_torch(optimizer: Any) -> Iterator[Part]:
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
    """Whole gradients or parts of them, without the padding of the partition, which is marked or comes last."""
    found = optimizer.averaged_gradients.get(i)
    if found is None:
        return None
    return [gradient for gradient in found if not getattr(gradient, "_zero_padding", False)][:count]


def forget_sums(optimizer: Any, engine: Any) -> None:
    """Clear sums that DeepSpeed steps again, or adds to, unless the first backward of a step overwrites them."""
    several = engine.gradient_accumulation_steps() > 1 or not engine.managed_gradient_accumulation()
    if hasattr(optimizer, "grad_partitions_flat_buffer") and (several or not optimizer.offload_optimizer):
        optimizer.grad_partitions_flat_buffer.zero_()
    for sums in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
        sums.zero_()


def _offloaded(optimizer: Any, masters: str, i: int, parameters: Sequence[Any]) -> list[Tensor]:
    """Parts of the flat gradient on the host, without those left over from an older step."""
    getattr(optimizer, "_wait_for_offload_copies", bool)()
    flat = getattr(optimizer, masters)[i].grad
    gradients = []
    for key in map(optimizer.get_param_id, parameters):
        gradients.append(flat.narrow(0, *optimizer.grad_position[key][-2:]))
        if key not in optimizer.norm_for_param_grads:
            gradients[-1].zero_()
    return gradients


def _hook_fp16(optimizer: Any, step: Step) -> None:
    masters = getattr(optimizer, "fp32_groups_flat", None) or [p for group in optimizer.fp32_groups for p in group]
    optimizer.overflow_checker = SimpleNamespace(check=lambda: step.skips, has_overflow=lambda _: step.skips)
    optimizer.unscale_and_clip_grads = lambda *_: step.finish([p.grad for p in masters])
    _hook_loss_scale(optimizer, step)


def _hook_bf16(optimizer: Any, step: Step) -> None:
    optimizer.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else ([step.verdict], {})


def _hook_stages_1_and_2(optimizer: Any, step: Step) -> None:
    def check_overflow(partition_gradients: bool = True) -> None:
        optimizer.overflow = step.skips

    def reset_cpu_buffers() -> None:  # where it skips, DeepSpeed keeps the fp32 sums of bf16 and adds to them
        reset()
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    reset, optimizer.reset_cpu_buffers = optimizer.reset_cpu_buffers, reset_cpu_buffers
    optimizer.check_grad_overflow = True
    optimizer.check_overflow = check_overflow
    optimizer.scaled_global_norm = lambda: step.verdict
    optimizer.unscale_and_clip_grads = lambda gradients, _: step.finish(gradients)
    _hook_loss_scale(optimizer, step)


def _hook_stage_3(optimizer: Any, step: Step) -> None:
    optimizer.check_overflow = lambda: None
    optimizer._get_norm_groups = lambda: [step.verdict]
    optimizer.unscale_and_clip_grads = lambda i, _: step.finish([optimizer.fp32_partitioned_groups_flat[i].grad])
    _hook_loss_scale(optimizer, step)


def _hook_loss_scale(optimizer: Any, step: Step) -> None:
    """Lower the loss scale only for a norm that is not finite, not for a skip for the policy's own reason."""
    update = optimizer._update_scale
    optimizer._update_scale = lambda skipped: update(bool(skipped and not step.norm.isfinite()))


KINDS = {
    FP16_Optimizer: (_parts_of_fp16, _hook_fp16),
    FP16_UnfusedOptimizer: (_parts_of_fp16, _hook_fp16),
    BF16_Optimizer: (_parts_of_bf16, _hook_bf16),
    DeepSpeedZeroOptimizer: (_parts_of_stages_1_and_2, _hook_stages_1_and_2),
    DeepSpeedZeroOptimizer_Stage3: (_parts_of_stage_3, _hook_stage_3),
}
WHOLE = (FP16_Optimizer, FP16_UnfusedOptimizer, Optimizer)  # every rank has whole gradients, but for experts


def layout_of(optimizer: Any, held: Sequence[nn.Parameter]) -> LayoutFn | None:
    """Partitions are on one rank each; whole gradients on all ranks, those of an expert on the ranks that have it."""
    partitioned = not isinstance(optimizer, WHOLE)
    if not partitioned and not any(map(is_moe_param, held)):
        return None

    def layout(name: str, parameter: Any) -> Layout | None:
        if is_moe_param(parameter):
            return _layout_of_expert(parameter.group_name, partitioned)
        return Layout(1, parts=True) if partitioned else None

    return layout


def _layout_of_expert(name: str, partitioned: bool) -> Layout:
    """``name``: of the groups of ranks that share it. Others have another expert under the name of this one."""
    sharers = [groups._get_expert_data_parallel_group(name)] if partitioned else []
    return Layout.cut(over=[groups._get_expert_parallel_group(name)], parts=sharers)
