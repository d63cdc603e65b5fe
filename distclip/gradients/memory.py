"""What is asked in every step: are these the gradients of an earlier step, and where do they lie now.

Where they lay is remembered, never what was there: a kept view would keep the gradients of the last step alive. Every
step looks at what could have changed, and where there is a difference each gradient is looked at anew; nothing here
communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, sub
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import LayoutError
from ..kernels import Pattern
from ..kernels.dtypes import WIDE
from ..layouts.piece import Piece, local_tensor
from .local import Local, grouped_by_replicas
from .runs import Run, find_runs, spans_of
from .sharing import first_shared

attributes = attrgetter("__dict__")  # of a tensor: the same object as long as the tensor is, and it keeps none alive
dtype_and_layout = attrgetter("dtype", "layout")
LONGEST_REST = 1 << 10


class Memory:
    """What a plan remembers of one step for the next: nothing that another rank would have to know.

    Where gradients never lie twice alike, noting where they lie rests for 2, 4, ... up to 1024 steps. ``late_error``:
    what this rank saw in the last step, for the next to tell the others.
    """

    __slots__ = ("_calls", "_next", "_noted", "_rest", "late_error")

    def __init__(self) -> None:
        self.late_error: LayoutError | None = None
        self._noted: Noted | None = None
        self._calls = 0
        self._next = 1
        self._rest = 1

    def knows(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether ``gradients`` are the very tensors that were noted, and where they were."""
        return self._noted is not None and self._noted.are_there(gradients)

    def forget(self) -> None:
        """Forget where gradients lay: they are summed in other groups from now on."""
        self._noted, self._next, self._rest = None, 1, 1

    def take_late_error(self) -> LayoutError | None:
        """The late error, which is then forgotten."""
        error, self.late_error = self.late_error, None
        return error

    def recall(self, gradients: Sequence[Tensor | None], unmoved: bool) -> Local | None:
        """``gradients`` if they lie as noted; where none are neighbours, None in calls 4, 8, 16, ... too.

        ``unmoved``: it :meth:`knows` them.
        """
        self._calls += 1
        if self._noted is None:
            return None
        if not self._noted.merged and self._calls & (self._calls - 1) == 0 and self._calls >= self._next:
            return None  # to see whether they have become neighbours
        local = self._noted.recall(gradients, unmoved)
        if local is not None:
            self._rest, self._next = 1, 0
        return local

    def note(
        self,
        gradients: Sequence[Tensor | None],
        local: Local,
        pieces: Sequence[Piece],
        sources: Sequence[int],
        kinds: Sequence[tuple[int, int]],
    ) -> Local:
        """Note where ``gradients`` lie, in which ``local`` was found, unless that was of no use lately.

        Returns ``local``, with its runs merged where that was noted.
        """
        if self._calls < self._next:
            return local
        self._noted = Noted.of(gradients, local, pieces, sources, kinds)
        self._rest = min(2 * self._rest, LONGEST_REST)
        self._next = self._calls + self._rest
        return (None if self._noted is None else self._noted.recall(gradients, unmoved=False)) or local


@dataclass(frozen=True, slots=True)
class Facts:
    """What gradients have in common with those of an earlier step that can be summed likewise, wherever they lie.

    * ``types``: of every gradient, that of None included; ``gaps``: whether some are None.
    * ``specs``: of those that exist, where some are DTensors; ``specs_suffice``: all are, so that a spec that is the
      same object tells shape and dtype too, as FSDP2 keeps one.
    * ``kinds``, ``numels``, ``contiguous``: of each local tensor; ``strides``: of those that are not contiguous.
    * ``has_complex``: some may come conjugated, which their strides do not tell.
    """

    types: list[type]
    gaps: bool
    specs: list[Any] | None
    specs_suffice: bool
    kinds: list[Any]
    numels: list[int]
    contiguous: list[bool]
    strides: list[tuple[int, tuple[int, ...]]]
    has_complex: bool

    @classmethod
    def of(cls, gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> Self:
        """Those of ``gradients``, whose local tensors are ``tensors``."""
        present = [g for g in gradients if g is not None]
        cut = [isinstance(g, DTensor) for g in present]
        contiguous = list(map(Tensor.is_contiguous, tensors))
        return cls(
            types=list(map(type, gradients)),
            gaps=len(present) < len(gradients),
            specs=[g._spec if isinstance(g, DTensor) else None for g in present] if any(cut) else None,
            specs_suffice=any(cut) and all(cut),
            kinds=list(map(dtype_and_layout, tensors)),
            numels=list(map(Tensor.numel, tensors)),
            contiguous=contiguous,
            strides=[(k, tensors[k].stride()) for k, each in enumerate(contiguous) if not each],
            has_complex=any(t.is_complex() for t in tensors),
        )

    def local_tensors(self, gradients: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The local tensors of ``gradients`` if these differ in nothing but where they lie."""
        if list(map(type, gradients)) != self.types:
            return None
        tensors: list[Any] = [g for g in gradients if g is not None] if self.gaps else list(gradients)
        known = False
        if self.specs is not None:
            specs = [getattr(g, "_spec", None) for g in tensors]
            if specs != self.specs:
                return None
            known = self.specs_suffice and all(map(is_, specs, self.specs))
            tensors = [g if s is None else g._local_tensor for g, s in zip(tensors, specs, strict=True)]
        if not known and list(map(dtype_and_layout, tensors)) != self.kinds:
            return None
        if not known and list(map(Tensor.numel, tensors)) != self.numels:
            return None
        if self.has_complex and any(map(Tensor.is_conj, tensors)):
            return None
        return tensors if self.lie_alike(tensors) else None

    def lie_alike(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, of the same sizes, have the same strides."""
        return list(map(Tensor.is_contiguous, tensors)) == self.contiguous and all(
            tensors[k].stride() == stride for k, stride in self.strides
        )


class Noted:
    """Where the gradients of one plan lay when it was made."""

    __slots__ = ("_addresses", "_distances", "_facts", "_identities", "_local", "_runs", "merged")

    def __init__(self, facts: Facts, tensors: Sequence[Tensor], runs: list[Run], local: Local) -> None:
        """``local``: what is found again, without tensors."""
        self._facts = facts
        self._identities: list[Any] | None = None  # of plain tensors, none of them missing
        if not facts.gaps and facts.specs is None:
            self._identities = list(map(attributes, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._runs = runs
        self.merged = any(not run.whole for run in runs)
        others = [(k, run.first, distance) for run in runs for k, distance in run.others]
        self._distances = tuple(map(list, zip(*others, strict=True))) if others else ([], [], [])
        self._local = local

    @classmethod
    def of(
        cls,
        gradients: Sequence[Tensor | None],
        local: Local,
        pieces: Sequence[Piece],
        sources: Sequence[int],
        kinds: Sequence[tuple[int, int]],
    ) -> Self | None:
        """Note where ``gradients`` lie, in which ``local`` was found; None where some are not plain memory."""
        tensors = [local_tensor(g) for g in gradients if g is not None]
        plain = all(type(t) is Tensor and t.layout == torch.strided for t in tensors)
        if not plain or local.instead or local.misplaced or local.error:
            return None
        spans = spans_of(local, gradients, pieces, sources)
        runs = find_runs(local, spans, tensors, kinds)
        (grouped, families), wide = grouped_by_replicas(run.kind for run in runs), any(t.dtype in WIDE for t in tensors)
        each = all(span == (k, None) for k, span in enumerate(spans)) and len(spans) == len(tensors)
        lie = None if each else spans, local.indices, wide
        found_again = Local((), grouped, (), *lie, pattern=Pattern(), families=families)
        return cls(Facts.of(gradients, tensors), tensors, runs, found_again)

    def recall(self, gradients: Sequence[Tensor | None], unmoved: bool) -> Local | None:
        """``gradients`` as they are summed, or None where these do not lie as those did that were noted."""
        tensors: Any = gradients
        if not unmoved and not self._are_the_same(gradients):
            tensors = self._facts.local_tensors(gradients)
        runs = None if tensors is None else self._runs_in(tensors, unmoved)
        if runs is None:
            return None
        known = self._local
        lie = known.spans, known.indices, known.wide
        return Local(runs, known.by_replicas, tensors, *lie, pattern=known.pattern, families=known.families)

    def are_there(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the very tensors, at the same addresses: what changes one of them in place moves it.

        What makes it smaller in place does not (``gradient.data = gradient.data[:5]``), but is seen by its size.
        """
        tensors: Any = gradients
        return self._are_the_same(gradients) and list(map(Tensor.data_ptr, tensors)) == self._addresses

    def _are_the_same(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the very tensors of the last time, as DDP's bucket views are, and of the same size."""
        if self._identities is None:
            return False
        try:
            if all(map(is_, map(attributes, gradients), self._identities)):
                tensors: Any = gradients
                return list(map(Tensor.numel, tensors)) == self._facts.numels and self._facts.lie_alike(tensors)
        except AttributeError:  # None has none
            pass
        self._identities = None  # they are made anew each step: do not ask again
        return False

    def _runs_in(self, tensors: list[Tensor], unmoved: bool) -> list[Tensor] | None:
        """The runs as they lie now; None where they are no runs any more, or share memory."""
        if not self.merged:
            runs = [tensors[run.first] for run in self._runs]
            # Of two that share a storage and do not begin together one has an offset: 40 ns each to see that none has.
            apart = unmoved or not any(map(Tensor.storage_offset, runs)) or first_shared(runs) is None
            return runs if apart else None
        try:
            moved = False
            if not unmoved:
                addresses = list(map(Tensor.data_ptr, tensors))
                moved = addresses != self._addresses
                if moved and not self._moved_together(addresses):
                    return None
            runs = [
                tensor if run.whole else tensor.as_strided((run.numel,), (1,), tensor.storage_offset() + run.start)
                for run in self._runs
                for tensor in (tensors[run.first],)
            ]
            return None if moved and first_shared(runs) is not None else runs
        except RuntimeError:  # no memory of its own, or side by side by chance, in storages of their own
            return None

    def _moved_together(self, addresses: list[int]) -> bool:
        """Whether the tensors of each run lie as far from each other as before: FSDP2's blocks are new each step."""
        others, firsts, distances = self._distances
        return list(map(sub, map(addresses.__getitem__, others), map(addresses.__getitem__, firsts))) == distances
