"""The keywords of a Clipper: what each may be, and how ranks compare them."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch.distributed as dist
from torch import Tensor

from ..gradients.storage import GradientFn, Storage, given_by, in_attribute, in_grad
from ..layouts.layout import LayoutFn
from ..layouts.model import ParameterFilter
from ..plan.build import Plan
from ..policies import Policy
from ..policies.adopt import spelled
from ..ranks.group import Axis
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
)


class Options(TypedDict, total=False):
    """The keywords of :class:`Clipper`, for those who make one on behalf of a user."""

    group: dist.ProcessGroup | None
    split_over: Sequence[Axis]
    layout: LayoutFn | None
    only: ParameterFilter | None
    norm_type: float
    nonfinite: Nonfinite
    max_consecutive_skips: int | None
    gradients: str | GradientFn | None


def settings(
    p: float,
    policy: Policy,
    nonfinite: str,
    max_consecutive_skips: int | None,
    given: Sequence[Any],
    gradients: Any,
) -> dict[str, str]:
    """A text for each setting, equal on ranks that were built alike; of ``given`` only whether they were."""
    texts = ["given" if each else "not given" for each in given]
    where = gradients if isinstance(gradients, str) else "not given" if gradients is None else "given"
    known = (str(p), spelled(policy), nonfinite, str(max_consecutive_skips), *texts, where)
    return dict(zip(SETTINGS, known, strict=True))


def streak(nonfinite: Nonfinite, max_consecutive_skips: int | None) -> Streak:
    """ValueError for what neither may be."""
    if nonfinite not in MODES:
        raise ValueError(f"nonfinite must be one of {', '.join(MODES)}, got {nonfinite!r}")
    if max_consecutive_skips is not None and max_consecutive_skips < 1:
        raise ValueError(f"max_consecutive_skips must be at least 1 or None, got {max_consecutive_skips!r}")
    return Streak(nonfinite, max_consecutive_skips)


def storage(gradients: str | GradientFn | Storage | None, holders: Sequence[Tensor], plan: Plan) -> Storage:
    """Where the gradients of ``holders`` are: see ``gradients`` of a Clipper."""
    if isinstance(gradients, Storage):
        return gradients
    if gradients is None or gradients == "grad":
        return in_grad(holders)
    if isinstance(gradients, str):
        return in_attribute(holders, gradients)
    if callable(gradients):
        names = [plan.label(plan.sources.index(source)) for source in range(len(holders))]
        return given_by(gradients, holders, names)
    raise ValueError(
        'gradients must be the name of an attribute of parameters ("main_grad") or a function of a parameter\'s name '
        f"and the parameter that returns its gradient, got {gradients!r}"
    )
