"""An exception that keeps a rank from the next collective: those who wait there are told, through the job's store.

It may have been raised on every rank alike, and all of them go on. So a rank that stopped before the same collective
takes no notice of the others.
"""

from contextlib import suppress

import torch.distributed as dist

from . import refusals
from .connections import following
from .group import ClippingGroup
from .roll_call import LOOK, Roll, within


def tell(group: ClippingGroup, call: str, why: str) -> None:
    """Say that this rank left ``call`` by an exception, for ranks that wait in the next collective of ``group``.

    Returns within ``LOOK`` seconds, whatever has become of the store. Nothing where messages are reduced on an
    accelerator, whose waits cannot be ended.
    """
    process_group = None if group.reference is None else group.reference()
    name = following(process_group) if process_group is not None and group.size > 1 else ""
    if not name or not dist.is_initialized():
        return
    text = refusals.stopped(dist.get_rank(), call, why)

    def post() -> None:
        roll = Roll(name, group.ranks)
        roll.answer(text)  # first: who has answered does not ask who has left
        roll.leave(text)

    with suppress(RuntimeError):  # the store is gone, and the exception says more
        within(LOOK, post)
