"""Run a program as `python program.py` does, or `torchrun`: as the main program of fresh processes.

They are forked from the server of `tests/support/ranks.py`, which has imported torch and distclip already, and find the
environment of torchrun there, with a store that the caller keeps as its agent does. On two ranks that takes a second
where torchrun takes four, all of it to import the same modules three times.
"""

import gc
import os
import runpy
import sys
import time
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

from support.ranks import processes


def play(program: Path, ranks: int | None, path: list[str], limit: float) -> tuple[list[int], str]:
    """The exit code of each rank, or of the one process where ``ranks`` is None, and what they have printed, in order.

    They run in the folder of ``program`` and import from ``path`` too. Once one has failed, or after ``limit`` seconds,
    the others are stopped: their code is negative.
    """
    logs = [program.with_suffix(f".{rank}") for rank in range(ranks or 1)]
    store = None if ranks is None else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank, log in enumerate(logs):
        log.touch()
        environment = {} if store is None else torchrun_environment(rank, ranks or 1, store.port)
        process = processes.Process(target=_be, args=(program, environment, path, log))
        process.start()
        started.append(process)
    deadline = time.monotonic() + limit
    while running := [process for process in started if process.exitcode is None]:
        connection.wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        if any(process.exitcode for process in started) or time.monotonic() >= deadline:
            for process in running:
                process.terminate()
            break
    for process in started:
        process.join(5)
        process.kill()
        process.join()
    return [process.exitcode for process in started], "".join(log.read_text(errors="replace") for log in logs)


def torchrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a rank of `torchrun --standalone` finds."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "ROLE_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "ROLE_WORLD_SIZE": size,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    texts = {
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return texts | {name: str(number) for name, number in numbers.items()}


def _be(program: Path, environment: dict[str, str], path: list[str], log: Path) -> None:
    """Become the process that runs ``program``."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    gc.freeze()  # as in ranks.py
    torch.set_num_threads(1)
    os.chdir(program.parent)
    sys.path[:0] = [str(program.parent), *path]
    sys.argv = [str(program)]
    runpy.run_path(str(program), run_name="__main__")
    sys.stdout.flush()
