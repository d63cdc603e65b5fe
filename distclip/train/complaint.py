"""What the command prints when it refuses or fails: one line on stderr; and that nobody may be reading."""

import os
import signal
import sys

UNREAD = 128 + signal.SIGPIPE  # what a shell reports for a process whose output nobody reads any more
LONGEST = 500  # characters; a value from a config or a path can be a million


def complain(text: str) -> None:
    """Print what is wrong, without control characters."""
    print(f"distclip: {one_line(text)}", file=sys.stderr)


def leave_pipe() -> int:
    """Print nowhere from now on, since `head` or `less` has read enough; returns the exit code.

    What is buffered would be an error at the very end of this process.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return UNREAD


def one_line(text: str) -> str:
    """``text`` with line breaks and control characters escaped, and its middle left out if it is too long."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 4 * LONGEST])
    if len(text) <= LONGEST and len(spelled) <= LONGEST:
        return spelled
    return f"{spelled[: LONGEST - 5]} ..."
