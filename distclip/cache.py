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
Planned: TypeAlias = tuple[Plan, list[Tensor]]


@dataclass(frozen=True, slots=True)
class Known:
    """One plan, the tensors that it was made from, and which of them are its holders."""

    plan: Plan
    attributes: list[dict[str, Any]]
    sizes: list[int]
    positions: list[int] | None  # None: all of them, in their order

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, found by their ids, are the same objects, with no new marks on them."""
        return (
            all(map(is_, map(attributes, tensors), self.attributes)) and list(map(len, self.attributes)) == self.sizes
        )

    def holders(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.positions is None else [tensors[k] for k in self.positions]


class Plans:
    """A memory of plans, looked up by the tensors or modules of a call and by its other arguments, ``terms``."""

    __slots__ = ("_of_modules", "_of_tensors")

    def __init__(self) -> None:
        self._of_tensors: OrderedDict[Hashable, Known] = OrderedDict()
        self._of_modules: WeakKeyDictionary[nn.Module, tuple[Hashable, Known]] = WeakKeyDictionary()

    def find(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module], terms: Terms) -> Planned | None:
        """The plan made from the same ``tensors``, all those in ``modules`` if there are any, and its holders."""
        key = _key(tensors, modules, terms)
        if modules:
            there, known = self._of_modules.get(modules[0], (None, None))
            if known is None or there != key or not known.fits(tensors):
                return None
        else:
            known = self._of_tensors.get(key)
            if known is None:
                return None
            if not known.fits(tensors):
                del self._of_tensors[key]
                return None
            self._of_tensors.move_to_end(key)
        return known.plan, known.holders(tensors)

    def keep(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module], terms: Terms, planned: Planned) -> None:
        """Remember a plan, unless the tensors do not show its holders or carry objects that would be kept alive."""
        plan, holders = planned
        position = {id(tensor): k for k, tensor in enumerate(tensors)}
        marks = list(map(attributes, tensors))
        if any(id(holder) not in position for holder in holders):
            return
        places = [position[id(holder)] for holder in holders]
        all_of_them = places == list(range(len(tensors)))
        known = Known(plan, marks, list(map(len, marks)), None if all_of_them else places)
        key = _key(tensors, modules, terms)
        if modules:
            self._of_modules[modules[0]] = key, known
        elif all(isinstance(value, PLAIN) for mark in marks for value in mark.values()):
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
    return tuple(map(id, tensors)), tuple(map(ref, modules)), terms
