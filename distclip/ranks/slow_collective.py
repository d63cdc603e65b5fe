"""A collective of ours that takes long or fails: who did not join, who joined late, who waits in another call."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ..errors import warn_user
from . import refusals
from .roll_call import LOOK, Roll, awaited, within

LONG = 30  # looks after which a warning says for whom a rank waits
HOPE = 30  # looks at a rank that has stopped: it may have caught that, to go on or to load a state on all ranks
LATE = 0.5  # of the longest wait: who waited less joined late
PATIENCE = 3.0  # seconds for the others' collective to fail too

_failed: Counter[str] = Counter()  # collectives of ours that failed, by the name of their group


@dataclass(frozen=True, slots=True)
class SlowCollective:
    """A collective of ours that is not done within a millisecond, or has failed.

    * ``ranks``: the global ranks of the clipping group; ``group``: its name.
    * ``signed_length``: of the message, which says by which channel it goes.
    * ``call``: what errors say that this rank was in; empty where no rank can be in another call.
    * ``name``: the name of this one collective in the store, the same on every rank; ``stopped``: where ranks say there
      that an exception keeps them from it.
    """

    ranks: Sequence[int]
    group: str
    signed_length: int
    call: str = ""
    name: str = ""
    stopped: str = ""

    def wait(self, work: dist.Work) -> None:
        """Wait for it on the host; RuntimeError if it fails, here or elsewhere, or a rank has stopped before it.

        After half a minute, a RuntimeWarning on the first rank that joined says which have not.
        """
        looks = stops = 0
        while True:
            try:
                work.wait(timedelta(seconds=LOOK))
                return
            except RuntimeError:
                awaited[:] = [self.call]
                if work.is_completed():  # it failed, or it was done just after we looked
                    work.wait()
                    return
                looks += 1
                if looks in (1, LONG):
                    self._warn(looks)
                # In a ring only the neighbours of a dead rank fail at once. The others join them, and are not taken
                # for dead themselves.
                if given_up(self.group, self.signed_length):
                    raise
                stops += self._is_vain()
                if stops > HOPE:
                    raise RuntimeError(refusals.GAVE_UP) from None

    def _is_vain(self) -> bool:
        """Whether a rank has stopped before this collective, and this one has not: where all have, all may go on."""
        roll = Roll(self.stopped, (dist.get_rank(),))
        try:
            return bool(self.stopped) and within(LOOK, lambda: bool(roll.left() and roll.absent()))
        except RuntimeError:  # the store is gone
            return False

    def _warn(self, looks: int) -> None:
        """Note in the store that this rank waits; on the later look the first rank to call warns of those absent."""
        roll = Roll(f"distclip/waits/{self.name}", self.ranks)

        def ask() -> list[int]:
            if looks == 1:
                roll.answer("")
            elif roll.is_first():
                return roll.absent()
            return []

        try:
            absent = within(LOOK, ask)
        except RuntimeError:  # the store is gone: the collective will fail, and that says so
            return
        if absent:
            warn_user(refusals.waits_for(dist.get_rank(), absent, self.call, looks * LOOK))

    def who_is_missing(self, waited: float) -> str:
        """The text of the error: which ranks did not report to the store that this collective failed for them too.

        ``waited``: seconds that this rank was in the collective. Returns within ``PATIENCE`` + 2 seconds.
        """
        awaited[:] = [self.call]
        name = _roll_name(self.group)  # by the collectives that failed before this one
        _failed[self.group] += 1
        roll = Roll(f"{name}/{self.signed_length}", self.ranks)
        calls = Roll(f"{name}/in", self.ranks)

        def call() -> str:
            calls.answer(self.call)
            return roll.call(f"{waited:.1f}", lambda: self._story(roll, calls), PATIENCE + 1)[0]

        try:
            return refusals.failed(self.call, within(PATIENCE + 2, call))
        except RuntimeError as error:
            return refusals.failed(self.call, refusals.store_gone_too(error))

    def _story(self, roll: Roll, calls: Roll) -> str:
        missing = roll.absent(PATIENCE)
        if missing:
            joined = [rank for rank in self.ranks if rank not in missing]
            stopped = Roll(self.stopped, missing).some_answers() if self.stopped else {}
            return refusals.missing(missing, joined, Roll(calls.name, missing).some_answers(), stopped)
        # A rank that joined late fails as well, because the others have given up: it is known by its short wait.
        waits = list(map(float, roll.answers(self.ranks)))
        late = [rank for rank, seconds in zip(self.ranks, waits, strict=True) if seconds < LATE * max(waits)]
        return refusals.late(late, max(waits) - min(waits)) if late and max(waits) > LOOK else refusals.ALL_FAILED


def given_up(group: str, signed_length: int) -> bool:
    """Whether a rank has called the roll of the group's current collective of this signed length."""
    roll = Roll(f"{_roll_name(group)}/{signed_length}", ())
    try:
        return within(LOOK, roll.is_called)
    except RuntimeError:  # the store is gone: what it could have told, the collective will
        return False


def _roll_name(group: str) -> str:
    return f"distclip/failed/{group}/{_failed[group]}"
