"""What ended a run, in one line from one rank, and the exit code."""

import os

import torch.distributed as dist

from distclip import LayoutError, NonFiniteError
from distclip.ranks.lost_ranks import Finding, first_sentence, of_backend, who_is_gone
from distclip.train.checkpoint import CheckpointError
from distclip.train.complaint import complain
from distclip.train.place import launched, number_in
from distclip.train.problem import ConfigError


def exit_code_after(error: ConfigError | LayoutError | RuntimeError | OSError) -> int:
    """Print what went wrong and return the exit code; re-raises what is our own bug."""
    match error:
        case ConfigError():
            if leads() or os.environ.get("LOCAL_RANK") == "0":  # of files and GPUs each machine has its own
                complain(str(error))
            return 2
        case NonFiniteError() | LayoutError() | CheckpointError():
            if leads():
                complain(f"training failed: {error}")
        case OSError():
            complain(f"training failed on rank {rank()}: {error}")
        case _ if of_backend(error):
            found = who_is_gone() if dist.is_initialized() else Finding("the ranks could not meet", called_here=True)
            if found.called_here:
                complain(f"training failed: {found.story} ({first_sentence(error)})")
        case _ if of_backend(error.__cause__):  # found by the Clipper, whose own roll call is of its collective alone
            return exit_code_after(error.__cause__)
        case _:
            raise error
    return 1


def leads() -> bool:
    """Whether this process reports for all: rank 0, since all ranks found the same, or a process that is no rank."""
    try:
        return not launched() or not 0 < number_in("RANK") < number_in("WORLD_SIZE")
    except ConfigError:
        return True


def rank() -> str:
    return os.environ["RANK"]
