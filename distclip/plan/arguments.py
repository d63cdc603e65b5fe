"""What the functions are passed: from parameters or modules to pieces, and the plan that measures their gradients."""

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..gradients.realign import is_candidate
from ..layouts.fsdp1 import is_flattened, is_whole
from ..layouts.fsdp2 import managed_anywhere
from ..layouts.layout import LayoutFn
from ..layouts.model import held_in
from ..layouts.piece import Held, held_parameter
from ..ranks.group import Axis, ClippingGroup
from . import refusals
from .build import Plan
from .disagreement import tell_others

Parameters: TypeAlias = Tensor | nn.Module | Iterable[Tensor] | Iterable[nn.Module]


def plan_of(
    listed: Sequence[Held],
    p: float,
    group: dist.ProcessGroup | None,
    split_over: Sequence[Axis],
    layout: LayoutFn | None,
) -> Plan:
    """The plan for what is ``listed``: of all ranks if any of it is seen to be cut, else of this process alone.

    [Note: a new sharding] in layouts/__init__.py.
    """
    seen_cut = False
    for i, item in enumerate(listed):
        cut = is_flattened(item.holder) and (bool(item.piece.name) or not is_whole(item.holder))
        if cut and not item.piece.name:
            raise refusals.fsdp1_parameter(f"parameter {i} of shape {tuple(item.holder.shape)}")
        seen_cut = seen_cut or cut or item.piece.spec is not None
    communicates = bool(group or split_over or layout) or seen_cut
    where = ClippingGroup.of(group) if communicates else ClippingGroup.alone()
    return Plan.of(listed, p, where, split_over, layout, sends_flags=group is not None)


def tell_ranks(
    listed: Sequence[Any],
    norm_type: Any,
    group: dist.ProcessGroup | None,
    split_over: Sequence[Axis],
    layout: LayoutFn | None,
    error: Exception,
    call: str,
    reduces: bool = True,
    exact: bool = False,
) -> None:
    """Where this rank has failed before it had a plan: take part in the one all-reduce of the others, who raise then.

    Nothing where its arguments do not tell that they make one, or in which group. What they send follows from what is
    ``listed``, as in a plan. ``reduces``: FSDP2 has brought what it manages to its placements, as it does gradients of
    parameters, but not tensors that are given as gradients.
    """
    tensors = [t for item in listed for t in (item.parameters() if isinstance(item, nn.Module) else [item])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    bare = {id(item) for item in listed if isinstance(item, Tensor) and is_whole(item)}
    says_so = bool(group or split_over or layout)
    if not says_so and not any(isinstance(t, DTensor) or (is_flattened(t) and id(t) not in bare) for t in tensors):
        return
    try:
        where = ClippingGroup.of(group)
    except (RuntimeError, TypeError, ValueError):  # it is the group that is wrong
        return
    ours = managed_anywhere()[0] if reduces else set()
    cut = [held_parameter(t, reduced=id(t) in ours).piece for t in tensors if isinstance(t, DTensor)]
    sends_flags = group is not None or (where.size > 1 and (says_so or any(map(is_candidate, cut))))
    p = inf if norm_type == inf else 2.0  # of all others it only matters that they send as many numbers
    tell_others(
        where, where.device_for(tensors), p, (False, False) if sends_flags else (), error, call, exact=exact and p < inf
    )


def held_of(listed: list[Any]) -> list[Held]:
    """What modules hold, with its names, or bare parameters."""
    kinds = set(map(type, listed))
    if all(issubclass(kind, Tensor) for kind in kinds):
        return _held_tensors(listed)
    if all(issubclass(kind, nn.Module) for kind in kinds):
        return held_in(listed)
    odd = next((kind for kind in kinds if not issubclass(kind, (Tensor, nn.Module))), None)
    if odd is not None:
        raise refusals.neither_tensor_nor_module(odd.__name__)
    raise refusals.tensors_and_modules()


def _held_tensors(tensors: Sequence[Tensor]) -> list[Held]:
    """Bare parameters; LayoutError where one is only a stand-in that FSDP2 shows: [Note: a new sharding]."""
    sharded, copies = managed_anywhere()
    for i, tensor in enumerate(tensors):
        if id(tensor) in copies:
            raise refusals.unsharded_parameter(f"parameter {i} of shape {tuple(tensor.shape)}")
    return [held_parameter(tensor, reduced=id(tensor) in sharded) for tensor in tensors]
