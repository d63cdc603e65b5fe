"""A record: the numbers of one step, by the names in keys.py."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..report import Fingerprint, Report, tensors_of as watched_in
from . import keys

Record: TypeAlias = tuple[dict[str, float], int]
"""The numbers of a step, and the step."""


def row_of(reports: Sequence[Report]) -> Tensor:
    """The numbers of all of them, 1-D, on their device: of each norm, bound, coefficient, skip, norms, zeros, extra."""
    skips = torch.stack([report.skip for report in reports]).to(reports[0].norm.dtype)  # cat is slow on mixed dtypes
    each = zip(reports, skips.unbind(), strict=True)
    return torch.cat([tensor.view(-1) for report, skip in each for tensor in _tensors_of(report, skip)])


def _tensors_of(report: Report, skip: Tensor) -> list[Tensor]:
    watched = [*watched_in(report.norms), *watched_in(report.zeros)]
    extra = [number.to(report.norm.device) for number in report.extra.values()]
    return [report.norm, report.max_norm, report.coef, skip, *watched, *extra]


def width(report: Report) -> int:
    """How many numbers these are."""
    return 4 + len(report.norms) + len(report.zeros) + len(report.extra)


def texts_of(fingerprint: Fingerprint | None) -> dict[str, str]:
    """A fingerprint by the names in keys.py; nothing of None."""
    if fingerprint is None:
        return {}
    shown = fingerprint.to_dict()
    differ = {keys.FINGERPRINT_DIFFER: ", ".join(fingerprint.differ)} if fingerprint.differ else {}
    each = {keys.FINGERPRINT_OF.format(name): text for name, text in shown["parameters"].items()}
    return {keys.FINGERPRINT: shown["total"], **differ, **each}


def is_clipped(coef: float) -> bool:
    """As :class:`.History` counts it; the coefficient of a skipped step is 1."""
    return coef < 1


def numbers_of(report: Report, row: Sequence[float]) -> dict[str, float]:
    """The same numbers, once they are on the host, by their names."""
    norm, max_norm, coef, skipped, *others = row
    watched = [*map(keys.LAYER.format, report.norms), *map(keys.ZEROS.format, report.zeros)]
    names = [*watched, *map(keys.EXTRA.format, report.extra)]
    own = {
        keys.PRE_CLIP: norm,
        keys.POST_CLIP: norm * coef,
        keys.COEF: coef,
        keys.MAX_NORM: max_norm,
        keys.CLIPPED: float(is_clipped(coef)),
        keys.SKIPPED: skipped,
    }
    return own | dict(zip(names, others, strict=True)) | own  # no policy's number replaces one of these
