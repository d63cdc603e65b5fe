"""From the command line to a run: as one rank of a launcher's job, or by starting the ranks."""

import os
from collections.abc import Sequence

from distclip import NonFiniteError
from distclip.complaint import complain
from distclip.train.job import check, run_rank
from distclip.train.launch import check_processes, launch
from distclip.train.parse import read_config
from distclip.train.place import launched, launched_world
from distclip.train.problem import ConfigError


def start(path: str, overrides: Sequence[str]) -> int:
    """Train and return the exit code; what the user can put right is one line on stderr and 2."""
    try:
        config = read_config(path, overrides)
        if launched():
            return run_rank(config, launched_world(config.parallel))
        check_processes(config.parallel.processes)
        check(config, config.parallel.processes)
    except ConfigError as error:
        if leads():
            complain(str(error))
        return 2
    except NonFiniteError as error:
        if leads():
            complain(f"training failed: {error}")
        return 1
    return launch(config.parallel.processes, ["train", path, *overrides])


def leads() -> bool:
    """One process speaks for all: every rank has found the same."""
    return not launched() or os.environ["RANK"] == "0" or not os.environ["RANK"].isdecimal()
