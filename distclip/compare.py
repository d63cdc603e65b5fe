"""Comparing a few numbers between ranks once, at construction."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from .group import ClippingGroup


def differing(group: ClippingGroup, device: torch.device, fields: Mapping[str, float]) -> list[str]:
    """The names of the fields whose numbers are not the same on every rank of the group, the same list on all.

    One all-reduce of twice as many float64 words as there are fields, and one wait. Numbers must be finite.
    """
    values = torch.tensor(list(fields.values()), dtype=torch.float64, device=device)
    high, low = group.all_reduce(torch.cat([values, -values]), dist.ReduceOp.MAX).chunk(2)
    return [name for name, differs in zip(fields, (high != -low).tolist(), strict=True) if differs]
