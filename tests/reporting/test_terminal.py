"""What is shown in a terminal, or in a pipe that nobody reads to its end."""

import io

import pytest

from distclip.reporting.terminal import Terminal


class Closed(io.StringIO):
    """As a pipe to `head` once it has read enough."""

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_closed_pipe_is_left_to_the_command():
    """rich ended the process with 1, as if the report had failed."""
    with pytest.raises(BrokenPipeError):
        Terminal(file=Closed()).print("norms")
