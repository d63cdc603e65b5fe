"""From the command line to figures: as one rank of a launcher's job, or by starting the ranks."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from distclip.bench.cases import CASES, chosen, unknown
from distclip.bench.machine import machine
from distclip.bench.place import Place, join_launched, join_local, launched, reports_errors, shows
from distclip.bench.result import Result
from distclip.bench.rounds import measure
from distclip.bench.table import heading, line, listing
from distclip.train.complaint import UNREAD, complain, leave

MOST = 256  # processes of one machine


@dataclass(kw_only=True, slots=True, frozen=True)
class Options:
    """``words``: the command line; ``rounds``: None for each case's own."""

    cases: Sequence[str]
    processes: int
    rounds: int | None
    json: Path | None
    device: str
    words: Sequence[str]


def start(options: Options) -> int:
    """Measure and return the exit code; what the user can fix is one line on stderr and 2."""
    problem = problem_with(options)
    if problem is not None:
        if reports_errors():
            complain(problem)
        return 2
    if launched():
        run(join_launched(options.device), options)
    else:
        with TemporaryDirectory(prefix="distclip-bench-") as folder:
            arguments = run_local, (folder, options), options.processes
            try:
                spawn(*arguments, daemon=True)  # type: ignore[no-untyped-call]  # daemons end with this process
            except ProcessExitedException as error:
                if error.exit_code not in (UNREAD, 2):  # a rank has said why
                    raise
                return int(error.exit_code)
    return 0


def problem_with(options: Options) -> str | None:
    """What is wrong with the options on this machine, or None."""
    strangers = unknown(options.cases)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else options.processes
    gpus = torch.cuda.device_count()
    if strangers:
        return f"no case is called {strangers[0]!r}: distclip bench --list names them"
    if options.processes < 1:
        return f"--processes must be at least 1, not {options.processes}"
    if options.processes > MOST:
        return f"--processes must be at most {MOST}, not {options.processes}"
    if options.rounds is not None and options.rounds < 1:
        return f"--rounds must be at least 1, not {options.rounds}"
    if options.json is not None and shows() and not writable(options.json.absolute()):
        return f"--json: {options.json} cannot be written"
    if options.device == "cuda" and here > gpus:
        return f"--device cuda: {here} processes need as many GPUs, this machine has {gpus}"
    return None


def writable(path: Path) -> bool:
    try:
        return not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:  # a name that is too long
        return False


def run_local(rank: int, folder: str, options: Options) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception could be lost in a callback, or hang in a collective
    try:
        run(join_local(folder, rank, options.processes, options.device), options)
    except OSError as error:  # the reader of rank 0's figures has gone, or the disk is full: torch ends the others
        sys.exit(leave(error))


def run(place: Place, options: Options) -> None:
    """Measure on a rank that has joined the others."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells stderr that it starts and stops
    try:
        play_all(place, options)
    finally:
        dist.destroy_process_group()


def play_all(place: Place, options: Options) -> None:
    """Measure the chosen cases one by one; rank 0 shows each result and updates the file."""
    cases = chosen(options.cases)
    width = max(len(case.name) for case in cases)
    found: list[Result] = []
    if place.rank == 0:
        print(heading(width), flush=True)
    for case in cases:
        result = measure(case, place, options.rounds or case.rounds)
        dist.barrier()  # for the ranks that had no part in it
        if place.rank == 0 and result is not None:
            print(line(result, width), flush=True)
            found.append(result)
            write(place, options, found)


def write(place: Place, options: Options, found: Sequence[Result]) -> None:
    if options.json is not None:
        document = {"machine": machine(place, options.words), "cases": [result.to_dict() for result in found]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def show_cases() -> int:
    print(listing(CASES))
    return 0
