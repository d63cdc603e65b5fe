"""A short soak: 600 steps on two ranks, and where it is thorough 1,000 on one process.

tests/soak/run.sh makes 100,000, and looks at times too. Here other tests share the cores, and a step may take as long
as it likes.
"""

import socket
from typing import Any

import pytest

from soak.soak import WAYS, faults, soak
from support.ranks import run_ranks

ANY = float("inf")


@pytest.mark.thorough
@pytest.mark.parametrize("way", WAYS)
def test_one_process_grows_by_nothing(way):
    figures = soak(way, steps=1000, warm_up=200)
    assert faults(figures, drift_allowed=ANY) == [], figures


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_grow_by_nothing(way):
    for figures in run_ranks(soak, 2, way, 600, 100):
        assert figures.ranks == 2
        assert faults(figures, drift_allowed=ANY) == [], figures


def test_what_leaks_is_found():
    """A soak that would not see a leak shows nothing."""
    kept: list[Any] = []

    def leak(number: int) -> None:
        kept.append(bytearray(10_000))
        kept.append(socket.socket())

    figures = soak("clipper", steps=600, warm_up=50, beside=leak)
    for leaked in kept[1::2]:
        leaked.close()
    assert [fault.split(" ", 1)[0] for fault in faults(figures, drift_allowed=ANY)] == ["grew", "600"], figures
