"""The command that resumes a run, to be pasted into a shell, whatever folder that is in."""

import os
import sys
from pathlib import Path
from shlex import quote
from shutil import which

from distclip.ranks.lost_ranks import MEETING_POINT
from distclip.train.folder import RunFolder
from distclip.train.place import Place, processes_here


def command_to_resume(folder: RunFolder, place: Place) -> str:
    """Relative paths of the config are of the folder that the run was started in."""
    if MEETING_POINT in os.environ:
        start = program("distclip", "distclip")
    elif processes_here(place.world) == place.world:
        start = f"{program('torchrun', 'torch.distributed.run')} --nproc-per-node {place.world} -m distclip"
    else:
        return f"the same command on each machine, and resume=true run.dir={quote(str(folder.path))}"
    return f"cd {quote(str(Path.cwd()))} && {start} train {quote(str(folder.config))} resume=true"


def program(name: str, module: str) -> str:
    """A program of this Python: by its name if the shell finds that one."""
    found, python = which(name), Path(sys.executable)
    return name if found is not None and Path(found).parent == python.parent else f"{quote(str(python))} -m {module}"
