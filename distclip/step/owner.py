"""Who clips what, and for which optimizers: no parameter is clipped twice in a step, and none steps unclipped."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Self
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor
from torch.optim import Optimizer

from ..errors import LayoutError
from ..optimizers.fused import Folds
from ..optimizers.hooks import parameters_of
from ..optimizers.wrapped import with_inner
from . import refusals

_alive: WeakValueDictionary[int, "Owner"] = WeakValueDictionary()


class Owner:
    """The parameters of one Clipper, by id, and the optimizers that it is known to clip for.

    ``clipped``: those in its norm. ``left_out``: those of its model that ``only=`` leaves alone.
    """

    __slots__ = ("__weakref__", "_everything", "_optimizers", "_released", "clipped", "left_out")

    def __init__(self, clipped: Iterable[Tensor], everything: Sequence[Tensor]) -> None:
        """``clipped`` are among ``everything``."""
        # Kept alive, so that no other tensor gets their ids: another thread may read this Owner when its Clipper is
        # dropped.
        self._everything = everything
        self.clipped = frozenset(map(id, clipped))
        self.left_out = frozenset(map(id, everything)) - self.clipped
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._released = False
        _alive[id(self)] = self

    def register(self, optimizers: Iterable[Optimizer]) -> None:
        """From now on it is known to clip for ``optimizers``, and for those that they wrap."""
        self._released = False
        for optimizer in optimizers:
            if optimizer not in self._optimizers:
                self._optimizers.update(with_inner(optimizer))

    def release(self) -> None:
        """It clips for nobody until it is told to again, and is no rival of others."""
        self._released = True

    def rivalry(self) -> LayoutError | None:
        """The error where others clip some of these parameters, and not for optimizers known to be different ones."""
        rivals = sum(1 for other in self._others() if self._may_be_clipped_by(other))
        return refusals.rivals(rivals) if rivals else None

    def foreign_to(self, folds: Folds, optimizers: Sequence[Optimizer]) -> LayoutError | None:
        """The error where an optimizer would step parameters that nobody clips; None where none does.

        Those that ``only`` leaves out are unclipped on purpose. Another Clipper may clip some that an optimizer holds,
        but not all: then the optimizers of two Clippers were mixed up.
        """
        if folds.foreign <= self.left_out:
            return None
        known = self.clipped | self.left_out
        elsewhere = frozenset[int]().union(*(other.clipped for other in self._others()))
        for optimizer in optimizers:
            held = {id(parameter): parameter for parameter in parameters_of(optimizer)}
            foreign = [p for i, p in held.items() if i not in known and p.requires_grad]  # frozen ones are not stepped
            if len(foreign) < len(held):
                foreign = [p for p in foreign if id(p) not in elsewhere]
            if foreign:
                return refusals.not_clipped(type(optimizer).__name__, len(foreign), len(held), foreign[0].shape)
        return None

    def _others(self) -> Iterator[Self]:
        # valuerefs() lists them at once: another thread may build a Clipper meanwhile.
        found = [owner for each in _alive.valuerefs() if (owner := each()) is not None]
        return (owner for owner in found if owner is not self)  # type: ignore[misc]

    def _may_be_clipped_by(self, other: "Owner") -> bool:
        apart = self._optimizers and other._optimizers and not set(self._optimizers) & set(other._optimizers)
        return not apart and not other._released and not self.clipped.isdisjoint(other.clipped)
