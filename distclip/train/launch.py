"""Local ranks, started and watched by torch's own elastic launcher."""

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distclip.presence import MEETING_POINT
from distclip.train.problem import require
from distclip.train.stop import exit_code, heeded

SHUTDOWN = 30.0  # seconds that ranks have to save and end, as TORCH_ELASTIC_SHUTDOWN_TIMEOUT says
MOST = max(8, os.cpu_count() or 1)  # processes on one machine: one a core, and 8 on the smallest for trying out

# `python -m distclip`, but stop signals wait from the beginning until StopSignals heeds them: to import torch takes
# seconds, in which Ctrl-C would end each rank with a traceback.
RANK = (
    "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}); "
    "from distclip.cli import main; sys.exit(main())"
)


def check_processes(processes: int) -> None:
    require(
        processes <= MOST,
        "parallel.processes",
        f"{processes} is more than the {MOST} that are started on this machine: use torchrun on several",
    )


def launch(processes: int, words: Sequence[str], *, restarts: int) -> int:
    """Run `distclip <words>` as so many local ranks and wait for them. Returns the exit code of the whole job.

    When a rank has failed, all are started again, `restarts` times at most.

    A stop signal to this process is passed on to the ranks, which save and end; those that have not after 30 s
    (TORCH_ELASTIC_SHUTDOWN_TIMEOUT) are killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores already
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    # torch's TCP store listens on every interface of the machine: local ranks meet in a private folder instead
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with TemporaryDirectory(prefix="distclip-") as meeting:
        os.environ[MEETING_POINT] = f"file://{meeting}/ranks"
        return launch_at(f"{meeting}/launcher", processes, words, restarts)


def launch_at(meeting: str, processes: int, words: Sequence[str], restarts: int) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting,
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        signals_to_handle=",".join(s.name for s in heeded()),
    )
    try:
        elastic_launch(config, sys.executable)("-c", RANK, *words)
    except SignalException as error:
        received = signal.Signals(error.sigval)
        end_forgotten(received)
        return exit_code(received)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = 2 if failure.exitcode == 2 else 1
        print(f"distclip: rank {rank} failed, {ending(failure.exitcode)}", file=sys.stderr)
        return code
    return 0


def end_forgotten(received: signal.Signals) -> None:
    """Pass the signal on to ranks that torch's launcher was just starting when it came, and does not know of."""
    deadline = time.monotonic() + SHUTDOWN
    for number in (received, signal.SIGKILL):
        for pid in ranks_started():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while ranks_started() and time.monotonic() < deadline:
            time.sleep(0.1)


def ranks_started() -> list[int]:
    """The children of this process that are ranks and live, where the system tells."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return [pid for pid in pids if RANK.encode() in command_of(pid)]


def command_of(pid: int) -> bytes:
    """Empty where the process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
