"""The command in this process, cut off before it starts ranks, and what it promises on any input."""

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import HealthCheck, settings

import distclip.bench.start
import distclip.train.start
from distclip.cli import main

# few in CI; tests/fuzz/run.sh asks for 10,000 and draws them anew each time
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
LONGEST = 1000  # characters of a line that a person still reads


def fuzz(examples: int) -> settings:
    """So many examples in CI, always the same ones."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    launched: bool  # nothing was wrong, and ranks would have been started


def command(*words: str) -> Ended:
    """What `distclip WORDS` does, short of starting ranks. Any error but an exit is the test's failure."""
    out, err, calls = io.StringIO(), io.StringIO(), []

    def launch(*given: object, **named: object) -> int:
        calls.append(given)
        return 0

    with (
        patch.object(distclip.train.start, "launch", launch),
        patch.object(distclip.bench.start, "spawn", launch),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code: object = main(list(words))
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int), f"exit code {code!r}"
    return Ended(code, out.getvalue(), err.getvalue(), launched=bool(calls))


def keeps_promise(ended: Ended, told: Sequence[object] = ()) -> None:
    """0 in silence, or 1 or 2 with one short line on stderr and nothing on stdout."""
    assert ended.code in (0, 1, 2), (ended, told)
    if ended.code == 0:
        assert ended.err == "", (ended, told)
        return
    assert not ended.launched, (ended, told)
    assert ended.out == "", (ended, told)
    line = ended.err.removesuffix("\n")
    assert ended.err == line + "\n", (ended, told)
    assert line.startswith("distclip: "), (ended, told)
    assert line.isprintable(), (ended, told)
    assert len(line) <= LONGEST, (len(line), told)
