"""A roll call ends in time, whatever became of the store that it is called by."""

import threading
from typing import Any

import pytest

from distclip.ranks import roll_call, slow_collective
from distclip.ranks.slow_collective import SlowCollective, given_up


class Unreachable:
    """A store behind a link that is down: a request waits for an answer that does not come."""

    def __init__(self) -> None:
        self.link = threading.Event()
        self.waiting: list[threading.Thread] = []

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: object) -> None:
            self.waiting.append(threading.current_thread())
            self.link.wait(60)
            raise RuntimeError("connection reset")

        return request

    def reset(self) -> None:
        """The link is up again, and every request has ended."""
        self.link.set()
        for thread in self.waiting:
            thread.join()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    store = Unreachable()
    monkeypatch.setattr(roll_call, "_get_default_store", lambda: store)
    monkeypatch.setattr(roll_call.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(slow_collective, "PATIENCE", 0.1)
    yield store
    store.reset()


def test_a_store_that_does_not_answer_hangs_nobody(store: Unreachable):
    assert [given_up("group", 2) for _ in range(50)] == [False] * 50
    said = SlowCollective(range(2), "group", 2).who_is_missing(1.0)
    assert said == "a collective of the clipping group failed, and the job's store is gone too: it does not answer"
    assert len(store.waiting) == 1  # later ones would wait behind it


def test_a_store_that_answers_again_is_asked_again(store: Unreachable):
    assert not given_up("group", 2)
    store.reset()
    said = SlowCollective(range(2), "group", 2).who_is_missing(1.0)
    assert said.endswith("gone too: connection reset")
