"""Proofs of the layout, by hand and in steps: what :meth:`.Clipper.verify` promises, of the gradients there are."""

from collections.abc import Sequence, Set

from torch import Tensor

from ..errors import LayoutError
from ..gradients.storage import Storage
from ..plan.build import Plan
from ..plan.verify import verify
from .calls import Call, Calls


class Proofs:
    """Those of one Clipper; ``calls`` says in which steps they are due."""

    def __init__(self, holders: Sequence[Tensor], storage: Storage, calls: Calls) -> None:
        self._holders, self._storage, self._calls = holders, storage, calls

    def now(self, plan: Plan, fault: LayoutError | None) -> None:
        """Prove the layout of ``plan``, or raise on all ranks; ``fault``: what this rank knows to be wrong."""
        self._make(plan, self._calls.verification(), fault, None)

    def in_step(self, plan: Plan, fault: LayoutError | None, counted: Set[int] | None) -> None:
        """The same where the step being made is one to be proved; ``counted``: ids of those whose gradients are."""
        if self._calls.proof_is_due():
            self._make(plan, self._calls.proof(), fault, counted)

    def _make(self, plan: Plan, call: Call, fault: LayoutError | None, counted: Set[int] | None) -> None:
        storage = self._storage.among(self._holders, counted)
        verify(plan, self._holders, storage, fault, call.tag, call.name)
