"""Put a case on stage: start its ranks as processes of this machine, wait, and bring home what became of each.

Every case has new processes, which end as a user's do: with their connections closed. They are forked from the server
of ``support/ranks.py``, which has imported torch. The store is the caller's, as torchrun's agent has it, so that
it outlives every rank.
"""

import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path

import torch.distributed as dist

from faults.loop import Case, Notes, play, read
from support import ranks  # noqa: F401  (it says what the server imports)

LATEST = 25.0  # seconds past a group's timeout after which a rank is killed and called hung
START = 120.0  # seconds to reach the fault, on a machine that does other things

_processes = get_context("forkserver")


@dataclass(frozen=True, slots=True)
class End:
    """How one rank ended. ``fate``: "finished", an exception's type, "hung", or "died of SIGKILL"."""

    fate: str
    notes: Notes
    seconds: float  # from the fault, or from where a slow rank went on, until it ended


def played(case: Case) -> list[End]:
    """Run ``case`` and return the ends of its ranks; nothing of it is left running."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        _processes.Process(target=play, args=(case, rank, store.port, str(folder)), daemon=True)
        for rank in range(case.size)
    ]
    try:
        for process in processes:
            process.start()
        ended = _wait(case, processes, folder)
        notes = [read(folder, rank) for rank in range(case.size)]
        codes = [process.exitcode if rank in ended else None for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)
    start = min((n.injected for n in notes if n.injected is not None), default=None)
    return [_end(n, code, start, ended.get(rank)) for rank, (n, code) in enumerate(zip(notes, codes, strict=True))]


def _wait(case: Case, processes: list, folder: Path) -> dict[int, float]:
    """When each rank ended, of those that did in time."""
    ended: dict[int, float] = {}
    deadline = time.monotonic() + START
    reached = False
    while len(ended) < len(processes) and time.monotonic() < deadline:
        connection.wait([p.sentinel for rank, p in enumerate(processes) if rank not in ended], 0.2)
        for rank, process in enumerate(processes):
            if rank not in ended and not process.is_alive():
                ended[rank] = time.monotonic()
        if not reached and read(folder, case.guilty).injected is not None:
            reached = True
            deadline = time.monotonic() + 2 * case.timeout + LATEST
    return ended


def _end(notes: Notes, code: int | None, start: float | None, died: float | None) -> End:
    since = notes.resumed or start
    until = notes.ended or died
    seconds = until - since if since is not None and until is not None else 0.0
    if notes.fate and notes.ended is not None:
        return End(notes.fate if code is not None else "hung at its exit", notes, seconds)
    if code is None:
        return End("hung", notes, seconds)
    return End(f"died of {signal.Signals(-code).name}" if code < 0 else f"left with code {code}", notes, seconds)
