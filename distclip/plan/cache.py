"""Plans that the functions reuse while they are handed the same parameters: local, bounded, keeping nothing alive.

A hit or a miss changes nothing but this rank's time: a plan is what :meth:`Plan.of` makes of the same parameters, and
making one takes no collective. Modules are referred to weakly, tensors not at all: torch refuses to swap tensors that
have weak references, which ``module.cpu()`` does with DTensors. Instead all that a plan was made of is compared: the
address of each tensor, and, since another may have got it since, its type, placements, dtype, device and the marks that
wrappers (FSDP1, DDP over tensor parallel) left on it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..gradients.memory import attributes
from ..gradients.storage import gradients_of
from ..layouts.fsdp2 import taken_over
from ..layouts.layout import LayoutFn
from ..layouts.piece import holders_of
from ..ranks.group import Axis
from .arguments import held_of, plan_of
from .build import Plan

MOST = 8  # plans of lists of tensors; those of modules live as long as their first module
dtype_and_device = attrgetter("dtype", "device")
dtype_device_and_shape = attrgetter("dtype", "device", "shape")

Terms: TypeAlias = Hashable


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, its holders and their gradients; ``unmoved``: the very tensors that its memory knows, where they were."""

    plan: Plan
    holders: Sequence[Tensor]
    gradients: list[Tensor | None]
    unmoved: bool = False


class Known:
    """One plan and what it was made of."""

    __slots__ = (
        "_alone",
        "_cut",
        "_facts",
        "_ids",
        "_marked",
        "_marks",
        "_places",
        "_plain",
        "_plan",
        "_specs",
        "_types",
    )

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], holders: Sequence[Tensor]) -> None:
        """``holders`` are among ``tensors``."""
        self._plan = plan
        self._alone = plan.group.size == 1
        self._ids = list(map(id, tensors))
        first = {number: k for k, number in reversed(list(enumerate(self._ids)))}
        places = [first[id(holder)] for holder in holders]
        self._places = None if places == list(range(len(tensors))) else places
        self._types = list(map(type, tensors))
        self._marks = _marks(tensors)
        self._marked = [(k, tuple(attributes(tensors[k]))) for k, count in enumerate(self._marks) if count]
        self._cut = [k for k, kind in enumerate(self._types) if issubclass(kind, DTensor)]
        self._specs = _specs(tensors, self._cut)
        self._plain = [k for k, kind in enumerate(self._types) if not issubclass(kind, DTensor)]
        self._facts = self._facts_of(tensors)

    def planned(self, tensors: list[Tensor]) -> Planned | None:
        """The plan for ``tensors``, as many, or None where it does not fit."""
        if not self._has_marks(tensors):
            return None
        if self._alone and self._places is None:
            gradients = gradients_of(tensors)
            if self._plan.memory.knows(gradients):  # in one process all depends on the gradients
                return Planned(self._plan, tensors, gradients, unmoved=True)
            return Planned(self._plan, tensors, gradients) if self._fits(tensors) else None
        if not self._fits(tensors):
            return None
        holders = tensors if self._places is None else [tensors[k] for k in self._places]
        return Planned(self._plan, holders, gradients_of(holders))

    def _has_marks(self, tensors: Sequence[Tensor]) -> bool:
        if _marks(tensors) != self._marks:
            return False
        return all(tuple(attributes(tensors[k])) == names for k, names in self._marked)

    def _fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same objects, or new ones at their addresses that are alike in all that matters."""
        return (
            list(map(id, tensors)) == self._ids
            and list(map(type, tensors)) == self._types
            and all(map(is_, _specs(tensors, self._cut), self._specs))
            and self._facts_of(tensors) == self._facts
        )

    def _facts_of(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What specs tell of DTensors, of the plain ones; shapes matter where other ranks compare them."""
        plain = tensors if len(self._plain) == len(tensors) else [tensors[k] for k in self._plain]
        return list(map(dtype_and_device if self._alone else dtype_device_and_shape, plain))


class Plans:
    """A memory of plans, looked up by the tensors or modules of a call and by its other arguments, ``terms``."""

    __slots__ = ("_of_modules", "_of_tensors")

    def __init__(self) -> None:
        self._of_tensors: OrderedDict[Hashable, Known] = OrderedDict()
        self._of_modules: WeakKeyDictionary[nn.Module, tuple[Hashable, Known]] = WeakKeyDictionary()

    def find(self, tensors: list[Tensor], modules: Sequence[nn.Module], terms: Terms) -> Planned | None:
        """The plan made from the like of ``tensors``, all those in ``modules`` if there are any.

        ``tensors`` may hold anything: what is found has the types of what was kept.
        """
        key = _key(tensors, modules, terms)
        if modules:
            there, known = self._of_modules.get(modules[0], (None, None))
            known = known if there == key else None
        else:
            known = self._of_tensors.get(key)
        try:
            planned = None if known is None else known.planned(tensors)
        except AttributeError:  # something among them is no tensor
            return None
        if planned is not None and not modules:
            self._of_tensors.move_to_end(key)
        return planned

    def keep(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module], terms: Terms, planned: Planned) -> None:
        """Remember a plan, unless its holders are not among ``tensors`` (DDP over tensor parallel hides them)."""
        shown = set(map(id, tensors))
        if any(id(holder) not in shown for holder in planned.holders):
            return
        known = Known(planned.plan, tensors, planned.holders)
        key = _key(tensors, modules, terms)
        if modules:
            self._of_modules[modules[0]] = key, known
            return
        self._of_tensors[key] = known
        if len(self._of_tensors) > MOST:
            self._of_tensors.popitem(last=False)

    def clear(self) -> None:
        """Forget all of them."""
        self._of_tensors.clear()
        self._of_modules.clear()


plans = Plans()


def planned(
    listed: list[Any],
    p: float,
    group: dist.ProcessGroup | None,
    split_over: Sequence[Axis],
    layout: LayoutFn | None,
) -> Planned:
    """The plan for what is ``listed``, and its gradients; no collective.

    Known plans are reused, unless ``layout`` is given, which may answer otherwise each time.
    """
    of_modules = bool(listed) and isinstance(listed[0], nn.Module) and all(isinstance(m, nn.Module) for m in listed)
    terms = None if layout is not None else _terms(p, group, split_over)
    if terms is not None:
        modules, tensors, names = skeleton(listed) if of_modules else ([], listed, [])
        found = plans.find(tensors, modules, (terms, *names))
        if found is not None:
            return found
    everything = held_of(listed)
    holders = holders_of(everything)
    made = Planned(plan_of(everything, p, group, split_over, layout), holders, gradients_of(holders))
    if terms is not None:
        modules, tensors, names = skeleton(listed) if of_modules else ([], listed, [])  # before, FSDP2 showed copies
        plans.keep(tensors, modules, (terms, *names), made)
    return made


def skeleton(models: Iterable[nn.Module]) -> tuple[list[nn.Module], list[Tensor], list[str]]:
    """All modules in ``models``, each once, those of ``models`` first; the parameters that they show; all names."""
    modules = dict.fromkeys(models)
    waiting = list(modules)
    tensors: list[Tensor] = []
    names: list[str] = []
    for module in waiting:  # which grows meanwhile
        names += (*module._parameters, *module._modules)
        tensors += (p for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None and child not in modules:
                modules[child] = None
                waiting.append(child)
    return waiting, tensors, names


def _key(tensors: Sequence[Tensor], modules: Sequence[nn.Module], terms: Terms) -> Hashable:
    """Few words that tell most plans apart; whether one fits is then seen from all of its tensors."""
    ends = (id(tensors[0]), id(tensors[-1])) if tensors else ()
    return len(tensors), ends, tuple(map(ref, modules)), terms


def _marks(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(len, map(attributes, tensors)))


def _specs(tensors: Sequence[Any], cut: Sequence[int]) -> list[Any]:
    """What holds mesh, placements, shape and dtype of a DTensor: one object for its life."""
    return [tensors[k]._spec for k in cut]


def _terms(p: float, group: dist.ProcessGroup | None, split_over: Sequence[Axis]) -> Terms | None:
    """What else a plan depends on; None for groups that are none, which a plan refuses.

    Process groups are referred to weakly: one that was destroyed fits nothing.
    """
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    axes = [a.get_group() if isinstance(a, DeviceMesh) and a.ndim == 1 else a for a in split_over]
    groups = [each for each in (world, group, *axes) if each is not None]
    if not all(isinstance(each, dist.ProcessGroup) for each in groups):
        return None
    return p, group is None, tuple(map(ref, groups)), len(taken_over)
