"""Proving a layout on real gradients, with the machinery of the norm itself."""

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import LayoutError
from .plan import Local, Plan

SHOWN = 5  # names in an error


def verify(plan: Plan, local: Local) -> None:
    """Raise LayoutError, on every rank of the group, unless the plan's layout holds for these gradients."""
    common = [i for i, is_common in enumerate(plan.common) if is_common]
    counted = plan.group.all_reduce(_sizes(plan, common))
    sizes = torch.tensor([plan.parameters[i].numel() for i in common], dtype=torch.float64, device=plan.device)
    wrong = (counted - sizes).abs() > 0.5
    everywhere = [i for i in common if round(plan.weights[i].reciprocal().item()) == plan.group.size]
    sums = _checksums(plan, local, everywhere)
    high, low = plan.group.all_reduce(torch.cat([sums, -sums]), dist.ReduceOp.MAX).chunk(2)
    apart = (high != -low).any(dim=1)
    if local.error is not None:
        raise local.error
    if wrong.any():
        listed = [f"{plan.label(common[k])} ({counted[k] / sizes[k]:.3g}x)" for k in wrong.nonzero().flatten().tolist()]
        raise LayoutError(f"elements are not counted once: {_few(listed)}; say the truth by split_over= or layout=")
    if apart.any():
        listed = [plan.label(everywhere[k]) for k in apart.nonzero().flatten().tolist()]
        raise LayoutError(
            f"ranks that should hold the same gradient do not: {_few(listed)}; reduce gradients before clipping "
            "(leave no_sync for the last backward), or say split_over= where ranks hold different parameters"
        )


def _sizes(plan: Plan, indices: list[int]) -> Tensor:
    """Local element counts over replicas, (len(indices),) float64: the norm's sum with 1 in place of |g|**p."""
    sizes = [float(plan.local(plan.parameters[i]).numel()) for i in indices]
    return torch.tensor(sizes, dtype=torch.float64, device=plan.device) * plan.weights[indices]


def _checksums(plan: Plan, local: Local, indices: list[int]) -> Tensor:
    """(len(indices), 3) float64: whether there is a gradient, its norm, its sum; NaN and inf count as 0."""
    position = {i: k for k, i in enumerate(local.indices)}
    rows = torch.zeros(len(indices), 3, dtype=torch.float64, device=plan.device)
    for row, i in enumerate(indices):
        if i in position:
            gradient = local.gradients[position[i]]
            rows[row, 0] = 1
            rows[row, 1] = local.norms[position[i]]
            rows[row, 2] = gradient.sum(dtype=torch.float64)
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
