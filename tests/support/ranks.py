"""Run one function on many ranks, and bring home what every rank returned, or why it did not.

    def share(value: float) -> float:  # a function of a module: the ranks import it by name
        total = torch.tensor(value)
        dist.all_reduce(total)
        return total.item()

    def test_the_sum_is_the_same_everywhere():
        assert run_ranks(share, 2, 1.5) == [3.0, 3.0]

Ranks are processes of this machine that talk through Gloo. They are forked from a server that has already
imported torch (0.1 s; a spawned process takes 3 s and more) and stay for the next case of the same size,
which then costs about 30 ms. Every case has its own process group, which meets in a fresh file and not on a
port, so that any number of test runs go side by side, and leaves it once all ranks have answered. After a
failure of any kind the ranks are thrown away, and where too many groups of older cases are still in them.

Return values and compare them in the test: there pytest shows both sides, an `assert` on a rank neither.
"""

import atexit
import faulthandler
import functools
import gc
import os
import pickle
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from support import older_torch as older_torch

LIMIT = 280.0  # seconds for a case: what takes one on a quiet machine has taken 60 at load 40
GRACE = 3.0  # seconds the other ranks have to finish once one has failed
CROWD = 60  # threads of a rank: DTensor's caches keep Gloo groups, each of which wakes a hundred times a second

processes = get_context("forkserver")
processes.set_forkserver_preload(
    ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.pipelining", "distclip"]
)


class RankError(Exception):
    """A rank raised, died or hung. The message has the traceback of each rank, or where it was."""


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout: float = LIMIT, fresh: bool = False) -> list[Any]:
    """Call `fn(*args)` on `size` ranks of one Gloo group and return their results in the order of ranks.

    `fn` is a function of a module, or a `functools.partial` of one; it, `args` and the results are pickled.
    Each rank has one thread, seed 0 and the caller's warning filters. Ranks that are not done after `timeout`
    seconds are killed. `fresh=True` takes new processes and keeps none, for code that patches libraries.
    """
    call = pickle.dumps((fn, args))
    team = (None if fresh else _teams.pop(size, None)) or _Team(size)
    kept = False
    try:
        results = team.run(call, timeout)
        if not fresh:
            team.part(timeout)
        kept = not fresh and size not in _teams and not team.is_crowded()
    except RankError as error:
        name = fn.func if isinstance(fn, functools.partial) else fn
        raise RankError(f"{name.__qualname__} on {size} ranks: {error}") from None
    finally:
        if kept:
            _teams[size] = team
        else:
            team.kill()
    return results


# ---- the caller's side -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """One case as it travels to the ranks. `call` is pickled by itself, to be read once `path` is set."""

    call: bytes
    timeout: float
    meeting_point: str
    path: list[str]
    filters: list[Any]


class _Team:
    """The ranks of one size, kept from case to case. A rank answers with its pickled result or a story."""

    def __init__(self, size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.stacks = [self.folder / f"stack-{rank}" for rank in range(size)]
        self.pipes = []
        self.processes = []
        self.cases = 0
        for rank in range(size):
            ours, theirs = processes.Pipe()
            arguments = theirs, rank, size, self.stacks[rank]
            process = processes.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # the end of the process is now the end of the pipe
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, call: bytes, timeout: float) -> list[Any]:
        self.cases += 1
        meeting_point = str(self.folder / f"case-{self.cases}")
        job = _Job(call, timeout, meeting_point, sys.path, list(warnings.filters))
        return [pickle.loads(answer) for answer in self._ask(job, timeout)]

    def part(self, timeout: float) -> None:
        """Let the ranks leave the groups of the case, now that all have answered: what goes wrong is of that case."""
        self._ask(None, timeout)

    def _ask(self, job: _Job | None, timeout: float) -> list[bytes]:
        self._tell(job)
        answers = self._collect(timeout)
        if not all(isinstance(answer, bytes) for answer in answers):
            raise RankError(self._story(answers, timeout))
        return answers

    def _tell(self, job: _Job | None) -> None:
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # it died between cases: `_receive` says so
                pipe.send(job)

    def is_crowded(self) -> bool:
        """Whether the groups that its cases have left behind are a load for those to come."""
        status = Path(f"/proc/{self.processes[0].pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return any(line.startswith("Threads:") and int(line.split()[1]) > CROWD for line in lines)

    def _collect(self, timeout: float) -> list[bytes | str | None]:
        """The answer of each rank, None where there was none in time."""
        answers: list[bytes | str | None] = [None] * len(self.pipes)
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in connection.wait(list(waiting), left):
                rank = waiting.pop(pipe)
                answers[rank] = self._receive(rank)
                if isinstance(answers[rank], str):
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _receive(self, rank: int) -> bytes | str:
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionError):
            self.processes[rank].join(10.0)
            stack = self.stacks[rank].read_text()  # empty unless a signal such as SIGSEGV ended it
            return f"{stack}died with exit code {self.processes[rank].exitcode}"

    def _story(self, answers: Sequence[bytes | str | None], timeout: float) -> str:
        """What became of the ranks: first all in one line, then in full. Ranks of the same fate stand together."""
        stacks = self._stacks([rank for rank, answer in enumerate(answers) if answer is None])
        ends: dict[str, list[int]] = {}
        texts: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            if answer is None:
                end, text = "did not finish", f"did not finish; it was here:\n{stacks[rank]}"
            elif isinstance(answer, str):
                end, text = answer.rstrip().splitlines()[-1], answer
            else:
                end = text = "finished"
            ends.setdefault(end, []).append(rank)
            texts.setdefault(text.rstrip(), []).append(rank)
        headline = "; ".join(f"{_named(ranks)}: {end}" for end, ranks in ends.items())
        headline += f" (limit {timeout:g} s)" if stacks else ""
        return "\n".join([headline, *(f"---- {_named(ranks)} ----\n{text}" for text, ranks in texts.items())])

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """Where these ranks are: their fault handlers write that, even from inside a collective that hangs."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        stacks: dict[int, str] = {}
        for _ in range(20 if ranks else 0):
            time.sleep(0.25)
            before, stacks = stacks, {rank: self.stacks[rank].read_text() for rank in ranks}
            if stacks == before and all(stacks.values()):
                break  # nobody is still writing
        return stacks

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


_teams: dict[int, _Team] = {}


@atexit.register
def _dismiss() -> None:
    while _teams:
        _teams.popitem()[1].kill()


# ---- the rank's side ---------------------------------------------------------------------------------------


def _serve(pipe: connection.Connection, rank: int, size: int, stack: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who then kills us
    gc.freeze()  # each collection would walk through all of torch, and copy the pages: 0.2 s
    torch.set_num_threads(1)
    with stack.open("w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                return
            pipe.send(_answer(rank, size, job))


def _answer(rank: int, size: int, job: _Job | None) -> bytes | str:
    """The pickled result, or the traceback. Pickled here: an unpicklable result is an ordinary error."""
    try:
        return pickle.dumps(_part() if job is None else _result(rank, size, job))
    except BaseException:  # whatever it is, it is news from this rank
        return traceback.format_exc()


def _part() -> None:
    """Leave the groups of a case, once no rank waits for another in them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # FSDP's cycles hold them, and with them threads that never sleep for long


def _result(rank: int, size: int, job: _Job) -> Any:
    sys.path[:] = job.path
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filters.extend(job.filters)
        store = dist.FileStore(job.meeting_point, size)
        limit = timedelta(seconds=job.timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        torch.manual_seed(0)
        fn, args = pickle.loads(job.call)
        return fn(*args)


# ---- what distributed tests ask for ------------------------------------------------------------------------


@contextmanager
def count_collectives() -> Iterator[Counter[str]]:
    """Count the collectives of this rank and thread: `counts["allreduce"]`, `counts.total()`.

    Whoever makes them is seen at the dispatcher: `dist.all_reduce`, DTensor, FSDP, and DDP from its C++ side.
    """
    with _Collectives() as mode:
        yield mode.counts


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it become plain tensors and collectives, which come here again
        # c10d::allreduce_ (in place) and _c10d_functional::all_reduce (DTensor) are both "allreduce"
        library, _, name = func.name().replace("_", "").partition("::")
        if library.startswith("c10d") and not name.startswith(("wait", "wrap")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def same_bits(values: Sequence[Any]) -> bool:
    """Whether all values agree to the last bit: NaN equals NaN, 0.0 is not -0.0, float32 is not float64."""
    first, *others = map(_bits, values)
    return all(other == first for other in others)


def _bits(value: Any) -> Any:
    match value:
        case torch.Tensor():
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            return value.dtype, value.shape, bytes(raw.tolist())
        case float():
            return float, struct.pack("<d", value)
        case Mapping():
            return {key: _bits(item) for key, item in value.items()}
        case list() | tuple():
            return type(value), [_bits(item) for item in value]
    return type(value), value
