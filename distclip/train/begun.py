"""Which ranks have begun to train: before that, a rank that gets a stop signal can neither save nor end in time."""

import os
from pathlib import Path

from distclip.ranks.lost_ranks import MEETING_POINT


def say_begun() -> None:
    """Tell our launcher, if there is one, that this rank has begun to train."""
    meeting = os.environ.get(MEETING_POINT)
    if meeting is not None:
        Path(meeting.removeprefix("file://")).with_name(_name(os.getpid())).touch()


def has_begun(pid: int, meeting: Path) -> bool:
    """Whether the rank with this process id has; ``meeting``: the folder where ranks meet."""
    return (meeting / _name(pid)).exists()


def _name(pid: int) -> str:
    return f"begun-{pid}"
