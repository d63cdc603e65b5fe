"""Uneven inputs: in DDP's ``join()`` ranks that have run out of data shadow the collectives of DDP, and no others.

A Clipper's all-reduce would wait for them. ``distclip.clip_grad_norm_`` makes none under DDP, and works there.

Private torch API, 2.13: ``DistributedDataParallel._join_config``, which ``join()`` sets and leaves behind.
"""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import refusals


def joinable_in(parts: Iterable[nn.Module]) -> Sequence[DistributedDataParallel]:
    """The modules in ``parts`` whose ranks may run out of data one by one."""
    modules = dict.fromkeys(module for part in parts for module in part.modules())
    return [module for module in modules if isinstance(module, DistributedDataParallel)]


def refuse_join(modules: Iterable[DistributedDataParallel]) -> None:
    """RuntimeError inside a ``join()``, unless it stops all ranks in the forward when the first runs out of data."""
    for module in modules:
        config = module._join_config
        if config.enable and not config.throw_on_early_termination:
            raise refusals.inside_join()
