"""The command line as a process of its own: `python -m distclip`, the script `distclip`, and the ranks it starts."""

import atexit
import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

from distclip.cli import main


def run() -> int:
    """`main`, where all that has been imported so far stays to the end."""
    gc.freeze()  # neither later collections nor the one at exit look through torch: 0.8 s of a rank's 3.6
    gc.enable()
    code = main()
    if "RANK" in os.environ:
        end_rank(code)
    return code


def end_rank(code: int) -> NoReturn:
    """End this process as the last thing that a rank does, without Python's own end.

    A thread of Gloo may still hold the last collective. If it lets go of a tensor while the interpreter is ending, that
    is a SIGABRT: one run of `distclip train` on two ranks in 25 "failed" after its work was done (torch 2.13).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
