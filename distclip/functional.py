"""Drop-in functions with the signatures of ``torch.nn.utils``: patch them over torch's, or call them in their place.

They communicate only where they must: if a parameter is a DTensor or lies in an FSDP1 module, or ``group``,
``split_over`` or ``layout`` is given (then also for an empty list), every call makes one all-reduce, whatever gradients
exist. Otherwise they stay local, like torch's, and every rank must hold all parameters. Plain tensors do not show how
they are cut: pipeline stages and experts held as such need ``split_over`` or ``layout``, or a :class:`Clipper`, which
compares the ranks. Two models whose parameters have the same names (bare tensors have none), shapes, dtypes and
placements look alike: ranks that call for them in a different order get one norm of both and no error. Names tell them
apart, as in ``nn.ModuleDict({"critic_1": critic})``; a Clipper always does.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from math import inf, isnan
from types import GeneratorType
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import FAILURES, warn_user
from .gradients.look import laid_out
from .gradients.refusals import pending_sum, shared_memory
from .gradients.sharing import first_shared
from .gradients.storage import store_in_grad
from .kernels import check_memory, clamp_, scale_, triton
from .kernels.device import has_float64, reads_are_free
from .layouts.layout import LayoutFn
from .layouts.piece import held_gradient, holders_of, local_tensor
from .plan import refusals
from .plan.arguments import Parameters, held_of, plan_of, tell_ranks
from .plan.build import Plan
from .plan.cache import planned
from .plan.copies import compare_copies
from .plan.culprit import find_culprit
from .plan.measure import measure, norms_of
from .plan.measured import Measured
from .policies.checks import bounds, positive
from .policies.coefficient import clip_coef_on_device, factors, presented, presented_on_device
from .ranks.group import Axis
from .ranks.message import Scalar
from .report import Culprit
from .shield import shielded


@shielded
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    split_over: Sequence[Axis] = (),
    layout: LayoutFn | None = None,
    exact: bool = False,
) -> Tensor:
    """Scale gradients in place so that the norm of all of them, as one vector over all ranks, is at most ``max_norm``.

    Returns the norm before clipping: 0-d, float32 (float64 when a parameter is float64), a plain tensor with the same
    bits on every rank, on the device where the group reduces.

    1. Look up the plan: who holds what, known from an earlier call with the same parameters, or read now.
    2. Measure: sum this rank's gradients, make one all-reduce if ranks communicate, and realign misplaced gradients.
    3. Decide, from reduced values only: raise, or take the coefficient ``min(1, max_norm / (norm + 1e-6))``.
    4. Scale the gradients, where that changes anything.

    * ``parameters``: an iterable of parameters, one tensor, one module or several. Each counts once, however often it
      is listed. FSDP1 shows only on the module: its parameters without it are a LayoutError, except the flat ones of
      NO_SHARD, which are whole. An exhausted generator warns, as torch's function does.
    * ``max_norm``: above 0; ``inf`` measures only. (torch accepts 0; it is a ValueError here.)
    * ``norm_type``: p > 0, or inf. Ranks that pass different ones get an error, as with ``max_norm``; if some pass inf
      and some a number, their messages never pair, and they are named when the group's timeout is over.
    * ``error_if_nonfinite``: raise NonFiniteError on every rank, gradients untouched, naming parameter and rank: one
      host sync a call on accelerators, and three more all-reduces when it raises. Otherwise a norm that is not finite
      goes through the formula as in torch, except that gradients that are all finite are left as they are.
    * ``foreach``: accepted for compatibility with torch; the kernels are chosen by device.
    * ``group``, ``split_over``, ``layout``, ``exact``: as for :class:`Clipper`, on every rank or on none.

    Collectives: none, or one all-reduce of two float64 numbers (three int64 for inf), as the module says. With DTensors
    that FSDP2 does not manage, ``group``, ``split_over`` or ``layout``, it carries two flags more: some rank holds
    float64, some gradient is misplaced, so that its placements are not its parameter's (sequence-parallel norms leave
    pending sums). Reading them is a host sync on accelerators. Misplaced gradients are redistributed into ``.grad`` by
    the ranks of their mesh, and the norm is reduced again. Ranks that disagree all raise a LayoutError, also if one of
    them cannot read what it was passed and raises an error of its own; on accelerators, where the host does not read
    that, the norm is NaN instead. If every rank holds all gradients and one rank's norm is 1e-6 off, that rank warns,
    and the next call for these parameters raises on all (CPU).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    # 1. Look up the plan. A rank that fails here has none, and still takes part in the all-reduce of the others.
    listed = _listed(parameters)
    if not listed and isinstance(parameters, GeneratorType) and not (group or split_over or layout):
        warn_user("`parameters` is an empty generator, no gradient clipping will occur.", UserWarning)
    try:
        bound = positive("max_norm", max_norm, "inf measures only")
        p = positive("norm_type", norm_type)
        known = planned(listed, p, group, split_over, layout)
        plan = known.plan.exactly() if exact else known.plan
    except FAILURES as error:
        tell_ranks(listed, norm_type, group, split_over, layout, error, "clip_grad_norm_()", exact=exact)
        raise
    memory = plan.memory

    # 2. Measure. The settings are in the agreement word, so that ranks with other ones disagree.
    call = f"clip_grad_norm_(max_norm={bound}, norm_type={p}, error_if_nonfinite={bool(error_if_nonfinite)})"
    call += " exactly" * bool(exact)
    measured = measure(
        plan,
        known.gradients,
        partial(store_in_grad, known.holders),
        crc32(call.encode()),
        unmoved=known.unmoved,
        error=memory.late_error and memory.take_late_error(),
        call=call,
    )

    # 3. Decide, from reduced values only, so that all ranks decide alike.
    norm, culprit = _total_norm(plan, measured, error_if_nonfinite)
    if plan.fully_replicated and not isinstance(norm, Tensor):
        compare_copies(plan, norm, measured.reduced.own, "the call before")

    shown, found = _decided(norm, bound, measured.dtype)

    # 4. Scale. Where only the sum of powers overflowed all gradients are finite, and the formula would zero them.
    if culprit is None or culprit.kind != "overflow":
        for factor in found:
            scale_(measured.runs, factor)
    return shown


@shielded
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    split_over: Sequence[Axis] = (),
    exact: bool = False,
) -> Tensor:
    """Return the norm of gradient ``tensors`` as one vector over all ranks, touching nothing.

    Gradients, not parameters, as in torch; a DTensor's placements say how it is cut. One that is listed twice counts
    once, not as in torch. Arguments, result, collectives and errors as for :func:`clip_grad_norm_`. Unlike it, this
    function is given what exists: a rank that leaves out a gradient disagrees with the others.

    >>> import torch
    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    given = _listed(tensors)
    try:
        listed = [held_gradient(t) for t in given]
        plan = plan_of(listed, positive("norm_type", norm_type), group, split_over, None)
        plan = plan.exactly() if exact else plan
    except FAILURES as error:
        tell_ranks(given, norm_type, group, split_over, None, error, "get_total_norm()", reduces=False, exact=exact)
        raise
    call = f"get_total_norm(norm_type={plan.p}, error_if_nonfinite={bool(error_if_nonfinite)})"
    call += " exactly" * bool(exact)
    measured = measure(plan, holders_of(listed), tag=crc32(call.encode()), call=call)
    norm, _ = _total_norm(plan, measured, error_if_nonfinite)
    return (
        presented_on_device(norm, norm < inf, measured.dtype)
        if isinstance(norm, Tensor)
        else presented(norm, measured.dtype)
    )


@shielded
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale the gradients of ``parameters`` in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    ``total_norm``: 0-d, the same on every rank, for example from :func:`get_total_norm`. No collective and no
    host sync. Each parameter is scaled once, and gradients that share memory are a LayoutError; nothing is
    touched where the factor, float64 if ``total_norm`` is and float32 otherwise, is 1 on the CPU.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grads_with_norm_([weight], 2.5, torch.tensor(5.0))
    >>> weight.grad
    tensor([1.5000, 2.0000])
    """
    bound = positive("max_norm", max_norm, "inf measures only")
    if isinstance(total_norm, DTensor):
        raise refusals.norm_is_dtensor()
    norm = torch.as_tensor(total_norm)
    if norm.is_meta:
        raise refusals.norm_on_meta()
    if not has_float64(norm.device):
        norm = norm.cpu()
    dtype = torch.float64 if norm.dtype == torch.float64 else torch.float32
    listed = held_of(_listed(parameters))
    holders = [holder for holder in holders_of(listed) if holder.grad is not None]
    gradients = _gradients(holders)
    triton.check_choice(gradient.device for gradient in gradients)
    check_memory(gradients, shared=True)
    pair = first_shared(gradients)
    if pair is not None:
        labels = {id(item.holder): item.piece.label(i) for i, item in enumerate(listed)}
        raise shared_memory(*(labels[id(holders[k])] for k in pair))
    for factor in _factors(norm.double(), bound, dtype):
        scale_(gradients, factor)


@shielded
def clip_grad_value_(
    parameters: Parameters, clip_value: float | tuple[float, float], foreach: bool | None = None
) -> None:
    """Clamp every gradient element in place to ``[-clip_value, clip_value]``, or to ``(min, max)``.

    ``clip_value`` is in the unit of the gradients. NaN stays NaN, inf becomes a bound. No collective and no host sync.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, -4.0])
    >>> clip_grad_value_([weight], (-1.0, 2.0))
    >>> weight.grad
    tensor([ 2., -1.])
    """
    low, high = bounds("clip_value", clip_value)
    holders = holders_of(held_of(_listed(parameters)))
    for holder in holders:
        gradient = holder.grad
        if isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements):  # [Note: a new sharding]
            raise pending_sum(gradient.placements)
    gradients = _gradients(holders)
    check_memory(gradients, shared=True)
    clamp_(gradients, low, high)


def _listed(parameters: Parameters) -> list[Any]:
    """What is passed, one by one: an iterator is used up by its first reading."""
    return [parameters] if isinstance(parameters, (Tensor, nn.Module)) else list(parameters)


def _total_norm(plan: Plan, measured: Measured, error_if_nonfinite: bool) -> tuple[Scalar, Culprit | None]:
    """The float64 norm, and the culprit where a host sync was allowed to look for one."""
    reduced = measured.reduced
    if not (error_if_nonfinite or measured.can_overflow or plan.reads_are_free):
        return reduced.tensor(plan.device), None
    number, disagrees = (reduced.norm, reduced.disagree) if plan.reads_are_free else reduced.read()[:2]
    if disagrees:
        raise refusals.functions_disagree(reduced.who)
    if not (isnan(number) or number == inf) or not (error_if_nonfinite or measured.can_overflow):
        return reduced.norm, None
    culprit = find_culprit(plan, norms_of(plan, measured))
    if error_if_nonfinite:
        what_to_do = "To disable this error and scale the gradients by the non-finite norm anyway, set "
        raise refusals.nonfinite(plan.p, culprit, f"{what_to_do}`error_if_nonfinite=False`")
    return reduced.norm, culprit


def _decided(norm: Scalar, max_norm: float, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
    """The norm as it is returned, and what gradients are multiplied by; no host sync."""
    if not isinstance(norm, Tensor):
        return presented(norm, dtype), factors(norm, max_norm, None, dtype)[1]
    finite = norm < inf
    return presented_on_device(norm, finite, dtype), _factors(norm, max_norm, dtype, finite)


def _factors(norm: Tensor, max_norm: float, dtype: torch.dtype, finite: Tensor | None = None) -> Sequence[Tensor]:
    """What gradients are multiplied by, one after the other."""
    if reads_are_free(norm.device):
        return factors(norm.item(), max_norm, None, dtype)[1]
    if max_norm == inf:
        return ()
    finite = norm < inf if finite is None else finite
    return (clip_coef_on_device(norm, max_norm, dtype).mul_(finite),)  # 0 of inf, as in torch


def _gradients(holders: Sequence[Tensor]) -> list[Tensor]:
    """The local gradients that exist, as they lie; what cannot be changed in place is replaced by a copy."""
    found: list[Tensor] = []
    for holder in holders:
        gradient = holder.grad
        if gradient is None:
            continue
        if gradient.layout == torch.sparse_coo:
            gradient = holder.grad = gradient.coalesce()
            gradient = gradient._values()
        elif (copy := laid_out(gradient)) is not None:
            gradient = holder.grad = copy
        found.append(local_tensor(gradient))
    return found
