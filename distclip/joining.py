"""Uneven inputs: a Clipper in torch's Join, where a rank that has run out of data shadows the steps of the others.

    with Join([model, clipper]):  # of torch.distributed.algorithms.join; the model is DistributedDataParallel

Join goes by iterations of the model: a forward and a backward that reduces gradients, and after it one step of the
Clipper. A rank without data makes the same step with nothing to add, so that policy, counters and report stay equal.

Private torch API, 2.13: ``Joinable._join_config``, which Join sets, and leaves behind when it is over.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from .plan import Plan

WRITE = "write `with Join([model, clipper]):` (torch.distributed.algorithms.join), the Clipper after the model"
UNKNOWN = (
    "the model is inside a join() that does not know of this Clipper, whose calls would wait for ranks that have run "
    f"out of data: {WRITE}; a join() that is over leaves its mark on the model: model.join(enable=False) takes it away"
)
ONCE = (
    "inside a Join, a Clipper makes one step after every backward that reduces gradients, as ranks do that have run "
    "out of data: make it once an iteration, and accumulate gradients inside model.no_sync()"
)


class Joining:
    """Whether the calls of a Clipper happen inside a Join, and whether ranks without data can shadow them there."""

    __slots__ = ("_configs", "_due", "_handles", "_modules", "_over", "config")

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        modules = dict.fromkeys(module for part in parts for module in part.modules())
        self._modules = [module for module in modules if isinstance(module, DistributedDataParallel)]
        self._configs: list[Any] = []  # of the modules, in the Join that this takes part in
        self._due: set[nn.Module] = set()  # have run forward since the latest step
        self._handles: list[Any] = []
        self._over = True
        self.config: Any = None

    def enter(self, config: Any, plan: Plan, overlap: bool) -> None:
        """A Join has begun; ValueError, before anything runs, where ranks without data could not shadow the steps."""
        self.end()
        self.config = config
        if not _shadows(config):
            return
        if config.is_first_joinable or not self._modules:
            raise ValueError(f"a Clipper joins a DistributedDataParallel model that it was built from: {WRITE}")
        if (plan.group.size > 1 and not plan.copied) or plan.heeds or overlap:
            raise ValueError(
                "a Clipper takes part in a Join only where every rank holds all gradients: build it without "
                "split_over, layout and overlap, of a model that nothing but DistributedDataParallel spreads"
            )
        self._configs = [module._join_config for module in self._modules]
        self._over = False
        self._handles = [module.register_forward_pre_hook(self._forward) for module in self._modules]

    def end(self) -> None:
        """All ranks have run out of data."""
        self._over = True
        self._due.clear()
        while self._handles:
            self._handles.pop().remove()

    def inside(self) -> bool:
        """Whether a Join goes on that this takes part in; RuntimeError in one where calls would hang."""
        configs = [module._join_config for module in self._modules]
        if not (configs and any(map(_shadows, configs))):
            return False
        known = len(configs) == len(self._configs) and all(a is b for a, b in zip(configs, self._configs, strict=True))
        if not (known and all(map(_shadows, configs))):
            raise RuntimeError(UNKNOWN)
        return not self._over

    def step(self) -> bool | None:
        """A step that the ranks without data shadow: True; None outside of a Join."""
        if not self.inside():
            return None
        if not self._due:
            raise RuntimeError(ONCE)
        self._due.clear()
        return True

    def refuse(self, what: str) -> None:
        """RuntimeError inside a Join, for what no rank can shadow."""
        if self.inside():
            raise RuntimeError(f"{what} cannot be shadowed by ranks that have run out of data: use it outside of Join")

    def reduces(self) -> bool:
        """On a rank without data: whether the others reduce gradients in this iteration, by what DDP's hook found."""
        return any(module.require_forward_param_sync for module in self._modules)

    def _forward(self, module: nn.Module, _: Any) -> None:
        ends = self._over or not _shadows(module._join_config)  # the latter where an exception has left the Join
        if ends or not (torch.is_grad_enabled() and module.require_backward_grad_sync):
            return
        if module in self._due:
            raise RuntimeError(ONCE)
        self._due.add(module)


class Shadow(JoinHook):
    """What a rank without data does in each iteration of the others, and when none is left."""

    def __init__(self, joining: Joining, step: Callable[[], object]) -> None:
        self._joining = joining
        self._step = step

    def main_hook(self) -> None:
        if self._joining.reduces():
            self._step()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._joining.end()


def _shadows(config: Any) -> bool:
    """With ``throw_on_early_termination`` all ranks stop in the forward, before the Clipper is called."""
    return bool(config.enable and not config.throw_on_early_termination)
