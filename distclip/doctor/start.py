"""From the command line to an exit code: as one rank of a launcher's job, or by starting ranks on this machine."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from tempfile import TemporaryDirectory

import torch

from distclip.bench.place import launched, reports_errors, shows
from distclip.bench.start import MOST, writable
from distclip.doctor import refusals
from distclip.doctor.options import Options
from distclip.train.complaint import complain

RANK = "distclip.doctor.rank"  # what the ranks are forked with
PATIENCE = 20.0  # seconds that rank 0 has once a rank has failed, to say which it was
LEAVING = 3.0  # seconds that the others have once rank 0 has said it
LOOK = 0.5  # seconds between two looks at those


def start(options: Options) -> int:
    """Make the checks and return the exit code; what the user can fix is one line on stderr and 2."""
    problem = problem_with(options)
    if problem is not None:
        if reports_errors():
            complain(problem)
        return 2
    if launched():
        from distclip.doctor.rank import be_launched  # imports FSDP and DTensor

        return be_launched(options)
    return start_local(options)


def start_local(options: Options) -> int:
    """Start the ranks, forked from a process that has imported what they need, and wait for them."""
    from distclip.doctor.rank import be_local

    loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    context = get_context("forkserver")
    context.set_forkserver_preload([RANK])
    with TemporaryDirectory(prefix="distclip-doctor-") as folder:
        numbers = range(options.processes)
        ranks = [context.Process(target=be_local, args=(rank, folder, options), daemon=True) for rank in numbers]
        for rank in ranks:
            rank.start()
        try:
            return code_of(wait_for(ranks))
        except KeyboardInterrupt:
            end(ranks, signal.SIGINT)  # which they may not have got from the terminal
            raise


def wait_for(ranks: Sequence[BaseProcess]) -> list[int]:
    """The exit codes of all ranks; those that go on too long after one has failed are killed: 1."""
    deadline = inf
    while alive := [rank for rank in ranks if rank.exitcode is None]:
        connection.wait([rank.sentinel for rank in alive], None if deadline == inf else LOOK)
        if any(rank.exitcode for rank in ranks):
            patience = PATIENCE if ranks[0].exitcode is None else LEAVING
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            end(alive, signal.SIGKILL)
            return [1 if rank in alive else rank.exitcode or 0 for rank in ranks]
    return [rank.exitcode or 0 for rank in ranks]


def end(ranks: Sequence[BaseProcess], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.pid is not None and rank.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, number)
    for rank in ranks:
        rank.join()


def code_of(codes: Sequence[int]) -> int:
    """The exit code of the command; a rank that was killed has told nobody."""
    for rank, code in enumerate(codes):
        if code < 0:
            complain(refusals.killed(rank, signal.Signals(-code).name))
    return 2 if 2 in codes else int(any(codes))


def problem_with(options: Options) -> str | None:
    """What is wrong with the options on this machine, or None."""
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = here if launched() else options.processes
    if options.model is not None and not all(options.model.partition(":")):
        return refusals.bad_path(options.model)
    if not 1 <= options.processes <= MOST:
        return refusals.bad_processes(options.processes, MOST)
    if not 0 < options.timeout < inf:
        return refusals.bad_timeout(options.timeout)
    if options.parameters < 1:
        return refusals.bad_parameters(options.parameters)
    if options.device == "cuda" and wanted > gpus:
        return refusals.no_gpus(wanted, gpus)
    if options.json is not None and str(options.json) != "-" and shows() and not writable(options.json.absolute()):
        return refusals.not_writable(options.json)
    return None
