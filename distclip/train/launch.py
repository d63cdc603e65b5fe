"""Local ranks, started and watched by torch's elastic launcher."""

import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, TracebackType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distclip.ranks.lost_ranks import MEETING_POINT
from distclip.train.begun import has_begun
from distclip.train.place import MEETING
from distclip.train.problem import require
from distclip.train.stop import STOP_SIGNALS, exit_code, heeded

SHUTDOWN = 30.0  # seconds that ranks have to save and end, as TORCH_ELASTIC_SHUTDOWN_TIMEOUT says
LOOK = 0.1  # seconds between looks at ranks that are still starting
MOST = max(8, os.cpu_count() or 1)  # processes on one machine: one a core, and 8 on the smallest for trying out

# `python -m distclip`, but stop signals wait from the beginning until StopSignals heeds them: to import torch takes
# seconds, in which Ctrl-C would end each rank with a traceback. Nor is garbage collected before `run` says so: imports
# leave none, and to look for it takes a third of their time.
RANK = (
    "import gc, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}); "
    "gc.disable(); from distclip.__main__ import run; sys.exit(run())"
)


def check_processes(processes: int) -> None:
    require(
        processes <= MOST,
        "parallel.processes",
        f"{processes} is more than the {MOST} that are started on this machine: use torchrun on several",
    )


def launch(processes: int, words: Sequence[str], *, restarts: int) -> int:
    """Run `distclip <words>` as local ranks and wait for them. Returns the exit code of the whole job.

    When a rank fails, all are restarted, at most `restarts` times.

    A stop signal to this process is forwarded to the ranks once they train; they save and end, and are killed after
    30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores already
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    # torch's TCP store listens on every interface of the machine: local ranks meet in a private folder instead
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with TemporaryDirectory(prefix="distclip-") as meeting, torch_unheard():
        os.environ[MEETING_POINT] = f"file://{meeting}/ranks"
        return launch_at(Path(meeting), processes, words, restarts)


@contextmanager
def torch_unheard() -> Iterator[None]:
    """Torch's launcher logs what the ranks say better, into the middle of their display; LOGLEVEL asks for it."""
    before = logging.root.manager.disable
    logging.disable(before if "LOGLEVEL" in os.environ else logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def cursor_shown() -> Iterator[None]:
    """Show the terminal's cursor in the end: rank 0 hides it, and may be killed."""
    try:
        yield
    finally:
        if sys.stdout is not None and sys.stdout.isatty():
            print("\033[?25h", end="", flush=True)


def launch_at(meeting: Path, processes: int, words: Sequence[str], restarts: int) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=str(meeting / "launcher"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        signals_to_handle="SIGQUIT",  # the others are for PatientStop; this one ends everything at once
    )
    try:
        with cursor_shown(), PatientStop(meeting):
            elastic_launch(config, sys.executable)("-c", RANK, *words)
    except SignalException as error:
        received = signal.Signals(error.sigval)
        end_forgotten(received)
        return exit_code(received)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in map(exit_code, STOP_SIGNALS):  # that was sent to the ranks as well, and they were faster
            return failure.exitcode
        code = 2 if failure.exitcode == 2 else 1
        print(f"distclip: rank {rank} failed, {ending(failure.exitcode)}", file=sys.stderr)
        return code
    return 0


class PatientStop:
    """While entered, a stop signal ends torch's launcher as soon as no rank is still starting.

    torch's own handler ends it at once, and the launcher kills ranks after 30 s: on a busy machine before their first
    step, which takes 2 s of computing to reach.
    """

    def __init__(self, meeting: Path) -> None:
        self.meeting = meeting
        self.received: signal.Signals | None = None
        self.limit = 0.0
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> None:
        for number in heeded():
            self.previous[number] = signal.signal(number, self.receive)
        self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.look)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.limit = signal.Signals(number), time.monotonic() + MEETING
        self.look(number, frame)

    def look(self, number: int, frame: FrameType | None) -> None:
        """Raise the exception that ends torch's launcher, or check again a moment later."""
        assert self.received is not None
        starting = [pid for pid in ranks_started() if not has_begun(pid, self.meeting)]
        if not starting or time.monotonic() > self.limit:
            raise SignalException(f"received {self.received.name}", self.received)
        signal.setitimer(signal.ITIMER_REAL, LOOK)


def end_forgotten(received: signal.Signals) -> None:
    """Forward the signal to ranks that torch's launcher was just starting when it came, and does not know of."""
    deadline = time.monotonic() + SHUTDOWN
    for number in (received, signal.SIGKILL):
        for pid in ranks_started():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while ranks_started() and time.monotonic() < deadline:
            time.sleep(0.1)


def ranks_started() -> list[int]:
    """The live children of this process that are ranks, where the system can tell."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return [pid for pid in pids if RANK.encode() in command_of(pid)]


def command_of(pid: int) -> bytes:
    """Empty if the process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
