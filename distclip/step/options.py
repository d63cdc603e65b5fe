"""The keywords of a Clipper: what each may be, and how ranks compare them."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Literal, TypeAlias, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from ..gradients.elsewhere import Place, given_by, in_attribute
from ..gradients.storage import GradientFn, Storage, in_grad
from ..layouts.layout import LayoutFn
from ..layouts.model import ParameterFilter
from ..plan.build import Plan
from ..policies import Policy
from ..policies.adopt import spelled
from ..policies.checks import whole
from ..policies.statistic import Signal, Statistic
from ..ranks.group import Axis
from . import refusals
from .nonfinite import MODES, Nonfinite, Streak

SETTINGS = (
    "norm_type",
    "policy",
    "nonfinite",
    "max_consecutive_skips",
    "split_over",
    "layout",
    "only",
    "gradients",
    "watch",
    "watch_zeros",
    "exact",
    "fingerprint_every",
    "verify_every",
    "on_drift",
)


OnDrift: TypeAlias = Literal["raise", "warn", "ignore"]
"""What is done where copies of gradients have other bits than each other."""

Watch: TypeAlias = Literal["parameters"] | Mapping[str, str | Sequence[str]]
"""Whose norms are reported: of all parameters, or of groups of them by patterns of their names."""


class Keywords(TypedDict, total=False):
    """Those that a Clipper and an Engine have in common; :func:`.building.build` has their defaults."""

    group: dist.ProcessGroup | None
    split_over: Sequence[Axis]
    layout: LayoutFn | None
    only: ParameterFilter | None
    norm_type: float
    nonfinite: Nonfinite
    max_consecutive_skips: int | None
    watch: Watch | None
    watch_zeros: bool
    exact: bool
    fingerprint_every: int | None
    verify_every: int | None
    on_drift: OnDrift | None


class Options(Keywords, total=False):
    """The keywords of :class:`Clipper`, for those who build one on behalf of a user."""

    gradients: str | GradientFn | None


def settings(
    p: float,
    policy: Policy,
    nonfinite: str,
    max_consecutive_skips: int | None,
    given: Sequence[Any],
    gradients: Any,
    asked: Sequence[Statistic | Signal],
    watch: Statistic | None,
    watch_zeros: bool,
    exact: bool,
    fingerprint_every: int | None,
    verify_every: int | None,
    on_drift: str | None,
) -> dict[str, str]:
    """A text for each setting, for ranks to compare; of ``given`` and functions only whether they were given."""
    texts = ["given" if each else "not given" for each in given]
    where = gradients if isinstance(gradients, str) else "not given" if gradients is None else "given"
    decided = f"{spelled(policy)}{list(asked) if asked else ''}"
    more = map(str, (watch, watch_zeros, exact, fingerprint_every, verify_every, on_drift))
    known = (str(p), decided, nonfinite, str(max_consecutive_skips), *texts, where, *more)
    return dict(zip(SETTINGS, known, strict=True))


def watched(watch: Watch | None, zeros: bool, p: float) -> Statistic | None:
    """The statistic that is reported; ValueError for what cannot be watched, or whose ``zeros`` cannot be counted."""
    if zeros and (watch is None or p == inf):
        raise refusals.zeros_of_nothing() if watch is None else refusals.zeros_of_maxima()
    if watch is None:
        return None
    if watch == "parameters":
        return Statistic("parameter")
    if isinstance(watch, Mapping) and watch:
        return Statistic("group", groups=watch)
    raise refusals.unknown_watch(watch)


def drift(on_drift: OnDrift | None, device: torch.device, p: float) -> OnDrift:
    """``on_drift``, or what None means where messages are reduced on ``device``; ValueError for what it is not."""
    if on_drift is None:
        # On the CPU the pass that squares elements adds their bits too; accelerators have no kernel for that yet.
        return "warn" if device.type == "cpu" and p < inf else "ignore"
    if on_drift not in ("raise", "warn", "ignore"):
        raise refusals.unknown_drift(on_drift)
    return on_drift


def streak(nonfinite: Nonfinite, max_consecutive_skips: int | None) -> Streak:
    """Their :class:`Streak`; ValueError for what they cannot be."""
    if nonfinite not in MODES:
        raise refusals.unknown_mode(nonfinite, MODES)
    if max_consecutive_skips is not None and max_consecutive_skips < 1:
        raise refusals.too_few_skips(max_consecutive_skips)
    return Streak(nonfinite, max_consecutive_skips)


def every(steps: int | None) -> int | None:
    """``verify_every``; ValueError for what it cannot be."""
    return None if steps is None else whole("verify_every", steps)


def storage(gradients: str | GradientFn | Storage | None, holders: Sequence[Tensor], plan: Plan) -> Storage:
    """Where the gradients of ``holders`` are: see ``gradients`` of a Clipper."""
    if isinstance(gradients, Storage):
        return gradients
    if gradients is None or gradients == "grad":
        return in_grad(holders)
    if isinstance(gradients, str):
        return in_attribute(_places(holders, plan), gradients)
    if callable(gradients):
        return given_by(_places(holders, plan), gradients)
    raise refusals.unknown_gradients(gradients)


def _places(holders: Sequence[Tensor], plan: Plan) -> list[Place]:
    """By the first piece of each of ``holders``. By ``layout`` ranks may have parts; FSDP1's are checked later.

    [Note: a new sharding] in layouts/__init__.py.
    """
    places, by_axis = [], frozenset(plan.by_split_over)
    first = {source: i for i, source in reversed(list(enumerate(plan.sources)))}
    for source, holder in enumerate(holders):
        i = first[source]
        by_layout = not plan.known_to_all[i] and i not in by_axis
        is_flat = plan.pieces[i].span is not None or bool(plan.pieces[i].flat_over)
        places.append(Place(plan.label(i), holder, may_be_part=by_layout or is_flat))
    return places
