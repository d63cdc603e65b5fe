"""A running job and its ranks, to be hit from outside."""

import os
import signal
import subprocess
import time
from pathlib import Path

from train.commands import metrics

PATIENCE = 200  # seconds: what takes 3 on a quiet machine has taken 60 on a busy one
TIMES = {"seconds", "per_second"}  # what a record says of time


def ranks_of(job: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank that the launcher `job` has started."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return {rank: int(child) for child in children if (rank := rank_of(child)) is not None}


def rank_of(process: str) -> int | None:
    try:
        words = Path(f"/proc/{process}/environ").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return None
    return next((int(word[5:]) for word in words if word.startswith("RANK=")), None)


def wait_for_step(folder: Path, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while steps_of(folder) < step:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, f"step {step} was not taken"
        time.sleep(0.02)


def steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def hit(job: subprocess.Popen[str], rank: int, number: signal.Signals, victims: set[int]) -> None:
    """Send a rank a signal, and note all ranks that live now in `victims`."""
    ranks = ranks_of(job)
    victims.update(ranks.values())
    os.kill(ranks[rank], number)


def still_there(processes: set[int]) -> set[int]:
    """Those that do not end."""
    deadline = time.monotonic() + PATIENCE
    while left := {p for p in processes if Path(f"/proc/{p}").exists()}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def timeless(folder: Path) -> list[dict[str, object]]:
    """All records of a run, but for what they say of time."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in metrics(folder)]
