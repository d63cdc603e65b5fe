"""What ranks tell each other through the job's store, whatever becomes of the backend that is being checked.

Every wait ends: a rank that has told nothing within the time allowed is absent.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.distributed.distributed_c10d import Store

Record: TypeAlias = dict[str, Any]
"""What one rank found in one check, as JSON has it: with ``error`` where it failed there."""

STARTING = 120.0  # seconds at least for ranks to start: machines may be late
LOOK = 0.02  # seconds between two looks into the store
GRACE = 4.0  # seconds that the others have once a rank has failed: a broken connection shows at once


@dataclass(kw_only=True, slots=True, frozen=True)
class Meeting:
    """The ranks of a job in its store.

    ``timeout``: seconds to wait for a rank. ``stopped``: whether this process was asked to end.
    """

    store: Store
    rank: int
    world: int
    timeout: float
    stopped: Callable[[], bool] = lambda: False

    def tell(self, topic: str, record: Record) -> None:
        """Tell rank 0 what this rank has found."""
        if "error" in record:
            self.store.set(f"{topic}/failed", "")
        self.store.set(f"{topic}/{self.rank}", json.dumps(record))

    def hear(self, topic: str, seconds: float) -> list[Record | None]:
        """On rank 0: what all ranks have told, None of those that have not after so many ``seconds``."""
        keys = [f"{topic}/{rank}" for rank in range(self.world)]
        self._wait(keys, seconds, f"{topic}/failed")
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def publish(self, topic: str, conclusion: dict[str, Any]) -> None:
        """On rank 0: what all ranks go by."""
        self.store.set(f"{topic}/all", json.dumps(conclusion))

    def learn(self, topic: str, seconds: float) -> dict[str, Any] | None:
        """What rank 0 has published, which waits for the others itself; None if it does not answer."""
        key = f"{topic}/all"
        self._wait([key], 2 * seconds + GRACE, f"{topic}/no such key")
        conclusion: dict[str, Any] | None = json.loads(self.store.get(key)) if self.store.check([key]) else None
        return conclusion

    def leave(self) -> None:
        """The end: rank 0, which may hold the store, goes last."""
        self.tell("end", {})
        if self.rank == 0:
            self.hear("end", 1.0)

    def _wait(self, keys: list[str], seconds: float, failed: str) -> None:
        """Wait until all ``keys`` are there; once ``failed`` is, or this process is to end, for ``GRACE`` seconds."""
        deadline, hurries = time.monotonic() + seconds, False
        while not self.store.check(keys) and time.monotonic() < deadline:
            if not hurries and (self.stopped() or self.store.check([failed])):
                hurries, deadline = True, min(deadline, time.monotonic() + GRACE)
            time.sleep(LOOK)


def said_alike(records: Sequence[Record], key: str) -> dict[Any, list[int]]:
    """The different values of ``key``, and the ranks that have each, the most common first; ties by the first rank."""
    found: dict[Any, list[int]] = {}
    for rank, record in enumerate(records):
        found.setdefault(record[key], []).append(rank)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[1][0])))
