"""Comparing ranks where a Clipper is built: all hold the same parameters, settings and values, or all raise."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar
from zlib import crc32

import torch

from ..errors import FAILURES
from ..layouts.piece import Held, once
from ..policies.statistic import Statistic
from ..ranks.compare import checksums, differing_fields, distinct_texts, who_differs
from ..ranks.group import ClippingGroup
from . import refusals
from .build import Plan
from .copies import values_apart
from .disagreement import stopped_by
from .table import Others, others_of
from .units import with_slots

ERROR = "an error of its own"
STOPPED = ""  # in place of a text, which is never empty

R = TypeVar("R")


def compare_ranks(plan: Plan, listed: Sequence[Held], settings: Mapping[str, str]) -> None:
    """Raise on every rank unless parameters, ``settings`` and the values of copies are the same on all of them.

    LayoutError for parameters and values, or where a rank called :func:`tell_ranks` instead; ValueError for settings.
    Two all-reduces, each with a host sync.
    """
    different = differing_fields(plan.group, plan.device, _fields(settings, plan.code))
    if ERROR in different:
        raise refusals.not_made("its Clipper", _who(plan, "made its Clipper"))
    if "parameters" in different:
        known = [piece for piece, is_known in zip(plan.pieces, plan.known_to_all, strict=True) if is_known]
        count = sum(piece.here if piece.size is None else piece.size for piece in known)
        mine = f"{len(known)} parameters of {count} elements (hash {plan.code:x})"
        raise refusals.other_parameters(_who(plan, mine))
    if different:
        mine = ", ".join(f"{name} {settings[name]}" for name in different)
        raise refusals.other_settings(different, _who(plan, mine))
    apart = values_apart(plan, once(listed), checksums)
    if apart:
        raise refusals.other_values(apart)


def agreed_on_units(
    plan: Plan, asked: Sequence[Statistic], ready: Callable[[Plan], R], counts_zeros: bool = False
) -> R:
    """``ready`` with ``plan`` and the slots for what is ``asked``, on all ranks, or an error on all.

    Collectives: those of :func:`agreed`.
    """
    return agreed(plan, asked, lambda others: ready(with_slots(plan, asked, others, counts_zeros)), "its Clipper")


def agreed(plan: Plan, asked: Sequence[Statistic], made: Callable[[Sequence[Others]], R], what: str) -> R:
    """What is ``made`` of the parameters that not all ranks know, on all ranks, or an error on all.

    ``what``: that is, in errors. Three all-reduces, and a fourth where ranks hold different
    parameters, each with a host sync.
    """
    failed: Exception | None = None
    try:
        text = json.dumps(others_of(plan, asked))
    except FAILURES as error:
        failed, text = error, STOPPED
    texts = distinct_texts(plan.group, plan.device, text)
    if STOPPED not in texts:
        try:
            done = made([json.loads(each) for each in texts])
        except FAILURES as error:
            failed = error
        if not differing_fields(plan.group, plan.device, {ERROR: failed is not None}) and failed is None:
            return done
    who = who_differs(plan.group, plan.device, f"made {what}" if failed is None else stopped_by(failed))
    raise failed or refusals.not_made(what, who)


def tell_ranks(group: ClippingGroup, device: torch.device, settings: Mapping[str, str], error: Exception) -> None:
    """In place of :func:`compare_ranks`, on a rank that is about to raise ``error``: the others raise as well."""
    if differing_fields(group, device, _fields(settings, failed=True)):
        who_differs(group, device, stopped_by(error))


def _fields(settings: Mapping[str, str], code: int = 0, failed: bool = False) -> dict[str, float]:
    numbers: dict[str, float] = {name: crc32(text.encode()) for name, text in settings.items()}
    return {**numbers, "parameters": code, ERROR: failed}


def _who(plan: Plan, mine: str) -> str:
    return who_differs(plan.group, plan.device, mine)
