"""From the command line to a run: as one rank of a launcher's job, or by starting the ranks."""

from collections.abc import Sequence

from distclip import LayoutError
from distclip.train.failure import exit_code_after
from distclip.train.job import check, run_rank
from distclip.train.launch import check_processes, launch
from distclip.train.parse import read_config
from distclip.train.place import launched, launched_world
from distclip.train.problem import ConfigError
from distclip.train.stop import StopSignals


def start(path: str, overrides: Sequence[str]) -> int:
    """Train and return the exit code; a failure is one line on stderr."""
    return start_rank(path, overrides) if launched() else start_job(path, overrides)


def start_job(path: str, overrides: Sequence[str]) -> int:
    """Start the ranks on this machine, once the config has passed its checks."""
    try:
        config = read_config(path, overrides)
        check_processes(config.parallel.processes)
        check(config, config.parallel.processes)
    except ConfigError as error:
        return exit_code_after(error)
    return launch(config.parallel.processes, ["train", path, *overrides], restarts=config.run.restarts)


def start_rank(path: str, overrides: Sequence[str]) -> int:
    """Run as one of a launcher's ranks.

    Stop signals are deferred to the very end: a launcher sends them to all other ranks as soon as one fails, while they
    are still finding out which.
    """
    with StopSignals() as stop:
        try:
            config = read_config(path, overrides)
            return run_rank(config, launched_world(config.parallel), stop)
        except (ConfigError, LayoutError, RuntimeError, OSError) as error:
            return exit_code_after(error)
