"""GradScaler beside a Clipper: gradients are unscaled first, and all ranks skip where one finds an inf.

``scaler.unscale_`` checks the gradients of its own rank only. A rank that finds an inf would skip and lower its loss
scale while the others step and raise theirs; the global norm makes all of them skip. Private torch API, read in 2.13
and 2.11: ``_per_optimizer_states``, which ``scaler.update()`` clears.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from . import refusals
from .fused import can_fold, prepare_skip_on_device

OWNERS = "distclip"  # key, in the scaler's state of an optimizer, of who clipped for it since update()


def claim(scaler: GradScaler, optimizers: Sequence[Optimizer], owner: object) -> None:
    """Record that ``owner`` clips for ``optimizers`` now; RuntimeError where it has since ``scaler.update()``.

    The scaler would take the new gradients for unscaled, since the old ones were.
    """
    for optimizer in optimizers:
        owners = _state(scaler, optimizer).setdefault(OWNERS, [])
        if any(one is owner for one, _ in owners):
            raise refusals.update_missing()
        owners.append((owner, optimizer))  # kept alive: the scaler's key is its id, which no other may get


def unscale_(scaler: GradScaler, optimizers: Sequence[Optimizer]) -> None:
    """Unscale the gradients of every optimizer for which that was not done since ``scaler.update()``.

    RuntimeError, from torch, for an optimizer that the scaler has stepped since; ValueError for a gradient that torch
    would unscale twice.
    """
    found = [p.grad for o in optimizers for group in o.param_groups for p in group["params"]]
    ids = [id(gradient) for gradient in found if gradient is not None]
    if len(set(ids)) < len(ids):
        raise refusals.unscaled_twice()
    for optimizer in optimizers:
        if can_fold(optimizer):  # the scaler tells it of a non-finite gradient by found_inf, in its first step too
            prepare_skip_on_device(optimizer)
        state = _state(scaler, optimizer)
        if state["stage"] is not OptState.UNSCALED:
            scaler.unscale_(optimizer)
        # Without a gradient on this rank there is no entry, and scaler.step() asserts that there is one (torch 2.13).
        if not state["found_inf_per_device"]:
            scale = scaler._get_scale_async()
            assert scale is not None, "unscale_ refuses to go on without"
            state["found_inf_per_device"][scale.device] = torch.zeros_like(scale, dtype=torch.float32)


def join_found_inf(scaler: GradScaler, optimizers: Sequence[Optimizer], nonfinite: bool | Tensor) -> None:
    """Report a norm that is not finite to ``scaler``, so that all ranks skip and lower the scale alike."""
    if nonfinite is False:
        return
    for optimizer in optimizers:
        for found_inf in _state(scaler, optimizer)["found_inf_per_device"].values():
            flag = torch.as_tensor(nonfinite, dtype=found_inf.dtype, device=found_inf.device)
            torch.maximum(found_inf, flag.expand_as(found_inf), out=found_inf)


def is_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the gradients of ``optimizer`` were unscaled since ``scaler.update()``, and it has not stepped since."""
    return _state(scaler, optimizer)["stage"] is OptState.UNSCALED


def needs_update(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether ``scaler`` has unscaled gradients of ``optimizer`` since its last ``update()``, so that one is due."""
    return bool(_state(scaler, optimizer)["found_inf_per_device"])


def _state(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    return state
