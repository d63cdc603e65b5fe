"""Plans that the functions reuse while they are handed the same parameters: local, bounded, keeping no model alive.

A hit or a miss changes nothing but this rank's time: a plan is what :meth:`Plan.of` makes of the same parameters, and
making one takes no collective. Modules are referred to weakly. Tensors must not be: torch refuses to swap tensors that
have weak references, which ``module.cpu()`` does with DTensors. The ``__dict__`` of a tensor stands in for it: the same
object as long as the tensor is, with as many entries as long as no wrapper (FSDP1, DDP over tensor parallel) marked it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from .plan import Plan

MOST = 8  # plans of lists of tensors; those of modules live as long as their first module
PLAIN = (bool, int, float, str, type(None))
attributes = attrgetter("__dict__")

Terms: TypeAlias = Hashable


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, its holders and their gradients; ``same``: these are the very tensors of the last time."""

    plan: Plan
    holders: Sequence[Tensor]
    gradients: list[Tensor | None]
    same: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """One plan, the tensors that it was made from, and which of them are its holders."""

    plan: Plan
    attributes: list[dict[str, Any]]
    sizes: list[int]
    positions: list[int] | None  # None: all of them, in their order

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, as many, are the same objects, with no new marks on them."""
        same = all(map(is_, map(attributes, tensors), self.attributes))
        return same and list(map(len, self.attributes)) == self.sizes

    def planned(self, tensors: list[Tensor]) -> Planned | None:
        """The plan for ``tensors``, as many, or None where it does not fit.

        A plan that reads no placement depends on gradients alone: where these are the same, so is what it says.
        """
        holders = tensors if self.positions is None else [tensors[k] for k in self.positions]
        gradients = [holder.grad for holder in holders]
        if self.plan.group.size == 1 and self.plan.memory.knows(gradients):
            return Planned(self.plan, holders, gradients, same=True)
        return Planned(self.plan, holders, gradients) if self.fits(tensors) else None


class Plans:
    """A memory of plans, looked up by the tensors or modules of a call and by its other arguments, ``terms``."""

    __slots__ = ("_of_modules", "_of_tensors")

    def __init__(self) -> None:
        self._of_tensors: OrderedDict[Hashable, Known] = OrderedDict()
        self._of_modules: WeakKeyDictionary[nn.Module, tuple[Hashable, Known]] = WeakKeyDictionary()

    def find(self, tensors: list[Tensor], modules: Sequence[nn.Module], terms: Terms) -> Planned | None:
        """The plan made from the same ``tensors``, all those in ``modules`` if there are any.

        ``tensors`` may hold anything: what is found was looked at when it was kept.
        """
        key = _key(tensors, modules, terms)
        if modules:
            there, known = self._of_modules.get(modules[0], (None, None))
            return known.planned(tensors) if known is not None and there == key else None
        known = self._of_tensors.get(key)
        planned = None if known is None else known.planned(tensors)
        if planned is not None:
            self._of_tensors.move_to_end(key)
        elif known is not None:
            del self._of_tensors[key]
        return planned

    def keep(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module], terms: Terms, planned: Planned) -> None:
        """Remember a plan, unless the tensors do not show its holders or carry objects that would be kept alive."""
        position = {id(tensor): k for k, tensor in enumerate(tensors)}
        marks = list(map(attributes, tensors))
        shown = all(id(holder) in position for holder in planned.holders)
        if not shown or not all(isinstance(value, PLAIN) for mark in marks for value in mark.values()):
            return
        places = [position[id(holder)] for holder in planned.holders]
        all_of_them = places == list(range(len(tensors)))
        known = Known(planned.plan, marks, list(map(len, marks)), None if all_of_them else places)
        key = _key(tensors, modules, terms)
        if modules:
            self._of_modules[modules[0]] = key, known
            return
        self._of_tensors[key] = known
        if len(self._of_tensors) > MOST:
            self._of_tensors.popitem(last=False)

    def clear(self) -> None:
        self._of_tensors.clear()
        self._of_modules.clear()


def skeleton(models: Iterable[nn.Module]) -> tuple[list[nn.Module], list[Tensor]]:
    """All modules in ``models``, each once, those of ``models`` first, and the parameters that they show."""
    modules = dict.fromkeys(models)
    waiting = list(modules)
    tensors: list[Tensor] = []
    for module in waiting:  # which grows meanwhile
        tensors += (p for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None and child not in modules:
                modules[child] = None
                waiting.append(child)
    return waiting, tensors


def _key(tensors: Sequence[Tensor], modules: Sequence[nn.Module], terms: Terms) -> Hashable:
    """Few words that tell most plans apart; whether one fits is then seen from all of its tensors."""
    ends = (id(tensors[0]), id(tensors[-1])) if tensors else ()
    return len(tensors), ends, tuple(map(ref, modules)), terms
