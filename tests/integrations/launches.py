"""Launches that take long, made once in a test run: the workers of pytest-xdist share what came of them."""

import fcntl
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest


def once(folders: pytest.TempPathFactory, name: str, launch: Callable[[], Any]) -> Any:
    """What `launch()` returned. The worker that asks first runs it, the others wait and read; a failure is not kept."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return launch()
    shared = folders.getbasetemp().parent
    results = shared / f"{name}.results"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            results.write_bytes(pickle.dumps(launch()))
    return pickle.loads(results.read_bytes())
