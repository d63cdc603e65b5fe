"""One rank from its start to its end, in a process of its own."""

import os
import signal
import sys
from types import FrameType

from distclip.doctor import refusals
from distclip.doctor.options import Options
from distclip.doctor.place import chosen_device, local_place, meet
from distclip.ranks.lost_ranks import of_backend
from distclip.train.complaint import complain
from distclip.train.place import number_in
from distclip.train.problem import ConfigError

received: list[int] = []  # signals to end


def be_local(rank: int, folder: str, options: Options) -> None:
    """A rank that `distclip doctor` has started."""
    sys.exit(be(f"file://{folder}/ranks", rank, options.processes, options))


def be_launched(options: Options) -> int:
    """A rank of a launcher."""
    try:
        rank, world = number_in("RANK"), number_in("WORLD_SIZE")
    except ConfigError as error:
        complain(str(error))
        return 2
    return be("env://", rank, world, options)


def be(url: str, rank: int, world: int, options: Options) -> int:
    signal.signal(signal.SIGTERM, remember)  # of a launcher, once a rank has failed: the others say first which it was
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception could be lost in a callback, or hang in a collective
    from distclip.doctor.visit import visit  # imports what the process that starts ranks does without

    try:
        meeting = meet(url, rank, world, options.timeout, lambda: bool(received))
        code, works = visit(meeting, options, chosen_device(options.device, *local_place(rank, world)))
        meeting.leave()
    except RuntimeError as error:
        if not of_backend(error):
            raise
        complain(refusals.not_met(rank, error))
        code, works = 1, False
    if not works:  # its threads would wait for the others until the timeout
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def remember(number: int, frame: FrameType | None) -> None:
    received.append(number)
