"""What the command prints when it refuses or fails: one line on stderr; and that nobody may be able to read."""

import errno
import os
import signal
import sys
from typing import TextIO

from distclip.errors import printable

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or what the user may have of it
UNREAD = 128 + signal.SIGPIPE  # what a shell reports for a process whose output nobody reads any more
LONGEST = 500  # characters; a value from a config or a path can be a million


def complain(text: str) -> None:
    """Print what is wrong, without control characters; where stderr takes nothing, the exit code alone says it."""
    if sys.stderr is None:  # it was closed, and print() would take the standard output
        return
    try:
        print(f"distclip: {one_line(text)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def leave_pipe() -> int:
    """Print nowhere from now on, since `head` or `less` has read enough; returns the exit code."""
    silence(sys.stdout)
    return UNREAD


def leave(error: OSError) -> int:
    """The same after any error of printing: also that the disk is full, in one line. Raises what is none."""
    if isinstance(error, BrokenPipeError):
        return leave_pipe()
    if error.errno not in FULL:
        raise error
    silence(sys.stdout)
    complain(f"cannot write: {error.strerror}")
    return 2  # not Python's own 1, by which `distclip diff` says that runs differ


def silence(stream: TextIO) -> None:
    """Let a stream write nowhere: what is buffered would be an error at the very end of this process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def one_line(text: str) -> str:
    """``text`` with line breaks and control characters escaped, and its middle left out if it is too long."""
    spelled = printable(text[: 4 * LONGEST])
    if len(text) <= LONGEST and len(spelled) <= LONGEST:
        return spelled
    return f"{spelled[: LONGEST - 5]} ..."
