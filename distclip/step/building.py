"""Building an Engine: what it is given is read, and all ranks agree on it or all of them raise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import FAILURES
from ..gradients.storage import GradientFn, Storage
from ..layouts.layout import LayoutFn
from ..layouts.model import ParameterFilter, chosen, held_in, parts_of
from ..layouts.piece import holders_of, once
from ..plan.agreed_copies import agree_on_copies
from ..plan.build import Plan
from ..plan.construction import agreed_on_units, compare_ranks, tell_ranks
from ..plan.copies import has_copies
from ..policies import Policy
from ..policies.adopt import as_policy, needs
from ..policies.checks import positive, whole
from ..policies.statistic import Signal, Statistic
from ..ranks.group import Axis, ClippingGroup
from . import options, refusals
from .calls import Calls
from .nonfinite import Nonfinite
from .progress import Progress


@dataclass(frozen=True, slots=True)
class Built:
    """What an Engine is made of: ``holders`` are in its norm, of ``everything`` that the ``parts`` of a model hold."""

    parts: Sequence[nn.Module]
    everything: list[Tensor]
    holders: list[Tensor]
    progress: Progress


def build(
    model: nn.Module | Sequence[nn.Module],
    policy: Policy | float,
    *,
    gradients: str | GradientFn | Storage | None,
    decides_on_device: bool | None,
    group: dist.ProcessGroup | None = None,
    split_over: Sequence[Axis] = (),
    layout: LayoutFn | None = None,
    only: ParameterFilter | None = None,
    norm_type: float = 2.0,
    nonfinite: Nonfinite = "skip",
    max_consecutive_skips: int | None = None,
    watch: options.Watch | None = None,
    watch_zeros: bool = False,
    exact: bool = False,
    fingerprint_every: int | None = None,
    verify_every: int | None = None,
    on_drift: options.OnDrift | None = None,
) -> Built:
    """Read the arguments of an :class:`.Engine`, and compare them with those of the other ranks of ``group``.

    Two all-reduces, up to four more for statistics other than the norm of all gradients, as many for fingerprints, and
    up to two to find copies that are not on all ranks, with a host sync each.
    """
    where, parts = ClippingGroup.of(group), list[nn.Module]()
    try:
        parts = parts_of(model)
        streak = options.streak(nonfinite, max_consecutive_skips)
        policy = as_policy(policy)
        p, given = positive("norm_type", norm_type), (split_over, layout, only)
        needed, watched = needs(policy), options.watched(watch, watch_zeros, p)
        asked = [each for each in needed if isinstance(each, Statistic)] + ([] if watched is None else [watched])
        signals = tuple(each.name for each in needed if isinstance(each, Signal))
        if signals and p == inf:
            raise refusals.signals_of_maxima()
        if exact and p < inf and (asked or signals):
            raise refusals.more_than_exact()
        if fingerprint_every is not None:
            whole("fingerprint_every", fingerprint_every)
        told = policy, nonfinite, max_consecutive_skips, given, gradients, needed, watched, watch_zeros, exact
        settings = options.settings(p, *told, fingerprint_every, verify_every, on_drift)
        everything = once(held_in(parts))
        listed = chosen(everything, only)
        holders, plan = holders_of(listed), replace(Plan.of(listed, p, where, split_over, layout), signals=signals)
        plan, on_drift = replace(plan, numbered=len(parts) > 1), options.drift(on_drift, plan.device, p)
        plan = plan.exactly() if exact else plan
        axes = bool(split_over) and where.size > 1
        ready = partial(
            Progress,
            holders=holders,
            storage=options.storage(gradients, holders, plan),
            policy=policy,
            streak=streak,
            calls=Calls(1.0 if axes or has_copies(plan) else inf, options.every(verify_every)),
            compares_axes=axes,
            on_device=decides_on_device,
            watch=watched,
            fingerprint_every=fingerprint_every,
        )
        progress = None if asked else ready(plan)
    except FAILURES as error:  # the other ranks are about to compare, and would hang: they raise as well
        device = where.device_for(parameter for part in parts for parameter in part.parameters())
        tell_ranks(where, device, dict.fromkeys(options.SETTINGS, ""), error)
        raise
    compare_ranks(plan, listed, settings)
    progress = progress or agreed_on_units(plan, asked, ready, watch_zeros)
    if on_drift != "ignore":
        copies = agree_on_copies(progress.plan, bool(split_over or layout), on_drift == "raise")
        progress.plan = replace(progress.plan, copies=copies)
        progress.calls.compare_in = progress.calls.compare_in if copies is None else 1.0
    progress.fingerprints.prepare(progress.plan)
    progress.calls.count_among(plan.group.clippers)
    return Built(parts, holders_of(everything), holders, progress)
