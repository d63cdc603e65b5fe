"""From the command line to an exit code: as one rank of a launcher's job, or by starting ranks on this machine."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from math import inf
from multiprocessing import connection, forkserver, get_context
from multiprocessing.process import BaseProcess
from tempfile import TemporaryDirectory

import torch

from distclip.bench.place import launched, reports_errors, shows
from distclip.bench.start import MOST, writable
from distclip.doctor import refusals
from distclip.doctor.options import Options
from distclip.doctor.rank import be_launched, be_local
from distclip.train.complaint import complain

PRELOADED = ["distclip.doctor.visit", "torch.distributed.pipelining"]  # the ranks have imported it when they begin
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
    return be_launched(options) if launched() else start_local(options)


def start_local(options: Options) -> int:
    """Start the ranks, forked from a process that has imported what they need, and wait for them."""
    loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    process, numbers = get_context("forkserver").Process, range(options.processes)
    with TemporaryDirectory(prefix="distclip-doctor-") as folder:
        ranks = [process(target=be_local, args=(rank, folder, options), daemon=True) for rank in numbers]
        try:
            start_all(ranks)
            return code_of(wait_for(ranks))
        except KeyboardInterrupt:
            end(ranks)  # which may not have got it from the terminal
            raise


def start_all(ranks: Sequence[BaseProcess]) -> None:
    """Start the process that ranks are forked from, and the ranks; then KeyboardInterrupt if Ctrl-C came meanwhile.

    That process inherits to ignore it: it would end with a traceback. A rank is forked even if nobody waits for it.
    """
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
        for rank in ranks:
            rank.start()
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def wait_for(ranks: Sequence[BaseProcess]) -> list[int]:
    """The exit codes of all ranks; those that go on too long after one has failed are killed: 1."""
    deadline = inf
    while alive := [rank for rank in ranks if rank.exitcode is None]:
        connection.wait([rank.sentinel for rank in alive], None if deadline == inf else LOOK)
        if any(rank.exitcode for rank in ranks):
            patience = PATIENCE if ranks[0].exitcode is None else LEAVING
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            end(alive)
            return [1 if rank in alive else rank.exitcode or 0 for rank in ranks]
    return [rank.exitcode or 0 for rank in ranks]


def end(ranks: Sequence[BaseProcess]) -> None:
    """Kill those that are alive: they have nothing to save."""
    started = [rank for rank in ranks if rank.pid is not None]
    for rank in started:
        rank.kill()
    for rank in started:
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
