"""The command line as a process of its own: `python -m distclip`, the script `distclip`, and the ranks it starts."""

import gc
import sys

from distclip.cli import main


def run() -> int:
    """`main`, where all that has been imported so far stays to the end."""
    gc.freeze()  # neither later collections nor the one at exit look through torch: 0.8 s of a rank's 3.6
    gc.enable()
    return main()


if __name__ == "__main__":
    sys.exit(run())
