"""What the command line asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True, slots=True, frozen=True)
class Options:
    """``command``: whose checks are made.

    * ``model``: ``package.module:function``, or None. ``every``: each of its parameters is listed.
    * ``processes``: local ranks, where no launcher has started this process.
    * ``parameters``: of the model that is timed.
    * ``timeout``: seconds that ranks wait for each other.
    * ``json``: where the findings go; ``-`` is the standard output.
    """

    command: Literal["doctor", "inspect"]
    model: str | None
    processes: int
    parameters: int = 4_000_000
    device: str = "auto"
    timeout: float = 30.0
    json: Path | None = None
    every: bool = False
