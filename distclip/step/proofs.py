"""Proofs of the layout, by hand and in steps: what :meth:`.Clipper.verify` promises, of the gradients there are."""

from collections.abc import Sequence, Set

from torch import Tensor

from ..errors import LayoutError
from ..gradients.storage import Storage
from ..plan.build import Plan
from ..plan.verify import verify
from .calls import Call, Calls


class Proofs:
    """Those of one ``plan``; ``calls`` says in which steps they are due."""

    def __init__(self, plan: Plan, holders: Sequence[Tensor], storage: Storage, calls: Calls) -> None:
        self._plan, self._holders, self._storage, self._calls = plan, holders, storage, calls

    def now(self, fault: LayoutError | None) -> None:
        """Prove it, or raise on all ranks; ``fault``: what this rank knows to be wrong."""
        self._make(self._calls.verification(), fault, None)

    def in_step(self, fault: LayoutError | None, counted: Set[int] | None) -> None:
        """The same where the step being made is one to be proved; ``counted``: ids of those whose gradients are."""
        if self._calls.proof_is_due():
            self._make(self._calls.proof(), fault, counted)

    def _make(self, call: Call, fault: LayoutError | None, counted: Set[int] | None) -> None:
        storage = self._storage.among(self._holders, counted)
        verify(self._plan, self._holders, storage, fault, call.tag, call.name)
