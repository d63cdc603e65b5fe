"""A roll call ends in time, whatever became of the store that it is called by."""

import threading
import time
from typing import Any

import pytest

from distclip.ranks import roll_call, slow_collective
from distclip.ranks.slow_collective import SlowCollective, given_up


class Unreachable:
    """A store behind a link that is down: a request waits for an answer that does not come."""

    def __init__(self) -> None:
        self.link = threading.Event()
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: object) -> None:
            self.requests += 1
            self.link.wait(60)
            raise RuntimeError("connection reset")

        return request


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    store = Unreachable()
    monkeypatch.setattr(roll_call, "_get_default_store", lambda: store)
    monkeypatch.setattr(roll_call.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(slow_collective, "PATIENCE", 0.1)
    yield store
    store.link.set()
    for thread in roll_call._stuck:
        thread.join()


def test_a_store_that_does_not_answer_hangs_nobody(store: Unreachable):
    began = time.monotonic()
    assert [given_up("group", 2) for _ in range(50)] == [False] * 50
    said = SlowCollective(range(2), "group", 2).who_is_missing(1.0)
    assert said == "a collective of the clipping group failed, and the job's store is gone too: it does not answer"
    assert time.monotonic() - began < 10
    assert store.requests == 1  # later ones would wait behind it


def test_a_store_that_answers_again_is_asked_again(store: Unreachable):
    assert not given_up("group", 2)
    store.link.set()
    for thread in roll_call._stuck:
        thread.join()
    said = SlowCollective(range(2), "group", 2).who_is_missing(1.0)
    assert said.endswith("gone too: connection reset")
